"""The kernels in CUDA on a GPU, on sizes small enough for compute-sanitizer (docs/native.md has the commands)."""

from __future__ import annotations

import kfade_kernels as kk
import pytest
import torch
from kfade_kernels import cuda_support, problems

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(cuda_support._module_refusal() is not None, reason=str(cuda_support._module_refusal())),
]
OUTER = [(16, 64, {}), (300, 264, {}), (300, 257, {"ones_column": True, "masked": True}), (2000, 128, {"masked": True})]
SQUARES = [(3, 70, 136, 72, {}), (7, 40, 136, 264, {"masked": True}), (5, 33, 64, 128, {"packed": True})]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "order", "options"), OUTER)
def test_outer_products(rows: int, order: int, options: dict[str, bool], dtype: torch.dtype) -> None:
    problem = problems.outer_product(rows, order, dtype, torch.device("cuda", 0), **options)
    check(problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "tokens", "d_out", "d_in", "options"), SQUARES)
def test_squares(batch: int, tokens: int, d_out: int, d_in: int, options: dict[str, bool], dtype: torch.dtype) -> None:
    where = torch.device("cuda", 0)
    check(problems.correction(batch, tokens, d_out, d_in, dtype, where, rotated=True, **options))


def check(problem: problems.Problem) -> None:
    with problems.by("cuda"):
        assert problem.explain().backend == "cuda", problem.explain()
        assert problems.fault(problem) is None


def test_a_stream_of_its_own() -> None:
    """Launches go to the stream that is current."""
    x = torch.randn(300, 264, device="cuda").to(torch.bfloat16)
    acc = kk.PackedSymmetric(264, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()), problems.by("cuda"):
        torch.cuda._sleep(10_000_000)
        x.zero_()
        kk.syrk_(acc, x)
        torch.cuda.current_stream().synchronize()
    assert not acc.to_dense().any()

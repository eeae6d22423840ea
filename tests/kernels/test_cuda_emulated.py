"""The CUDA kernels as they are, on a CPU: threads are fibres that take turns at random, instructions are emulated.

Copies come late, products read their operands when they are waited for, and a barrier that is used wrongly, a read
outside of shared memory or a wait without an end is an error (`csrc/emulation/machine.h`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import kfade_kernels as kk
import pytest
import torch
from emulated import emulated_module
from kfade_kernels import cuda_support
from kfade_kernels.accumulate_factors import cuda as accumulate_factors
from kfade_kernels.devices import A100, H100
from kfade_kernels.eigenvalue_correction import cuda as eigenvalue_correction
from kfade_kernels.packed import PackedSymmetric
from kfade_kernels.syrk import cuda as syrk
from oracles import assert_as_accurate
from torch import Tensor

DEVICES = {"hopper": replace(H100, multiprocessors=4), "ampere": replace(A100, multiprocessors=2)}


@pytest.fixture(params=DEVICES)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backends run this kernel, on a device with two work items at a time."""
    module = emulated_module()
    monkeypatch.setattr(cuda_support, "library", lambda: module)
    monkeypatch.setattr(cuda_support, "device_at", lambda _: DEVICES[request.param])
    return str(request.param)


def use(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Forms with these fields, and parts as many as asked for."""
    splits = changes.pop("splits", None)
    forms = cuda_support.forms
    monkeypatch.setattr(cuda_support, "forms", lambda kernel: tuple(replace(f, **changes) for f in forms(kernel)))
    if splits is not None:
        monkeypatch.setattr(syrk, "splits_of", lambda rows, *_: [splits] * len(rows))
        monkeypatch.setattr(eigenvalue_correction, "splits_of", lambda *_: splits)


def poisoned(order: int) -> PackedSymmetric:
    """Random, with NaN in the scratch above the diagonal."""
    dense = torch.randn(order, order)
    return PackedSymmetric.from_dense(dense.tril() + torch.full_like(dense, torch.nan).triu(1))


def rows(n: int, width: int, dtype: torch.dtype, masked: bool) -> tuple[Tensor, Tensor | None]:
    """Random rows; with a mask, what it leaves out is NaN."""
    x = torch.randn(n, width).to(dtype)
    mask = torch.rand(n) > 0.3 if masked else None
    return (x if mask is None else x.masked_fill(~mask[:, None], torch.nan)), mask


def expected(acc: PackedSymmetric, x: Tensor, mask: Tensor | None, alpha: float, ones: bool, dtype: Any) -> Tensor:
    x = (x if mask is None else x[mask]).to(dtype)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1) if ones else x
    return acc.to_dense().to(dtype) + alpha * x.T @ x


def check_outer(n: int, width: int, dtype: torch.dtype, masked: bool = False, ones: bool = False) -> PackedSymmetric:
    torch.manual_seed(n + width)
    acc = poisoned(width + ones)
    x, mask = rows(n, width, dtype, masked)
    wide = expected(acc, x, mask, 0.5, ones, torch.float64)
    plain = expected(acc, x, mask, 0.5, ones, torch.float32)
    syrk.run(acc.data, acc.n, x, mask, 0.5, ones, False)
    # Sums of float32 in another order than PyTorch's.
    assert_as_accurate(acc.to_dense(), plain, wide)
    return acc


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "width"), [(1, 8), (16, 64), (63, 120), (64, 128), (65, 136), (130, 256), (200, 264), (70, 520)]
)
def test_outer_products(kernel: str, n: int, width: int, dtype: torch.dtype) -> None:
    check_outer(n, width, dtype)


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("n", "width"), [(1, 8), (65, 128), (150, 264)])
def test_masked_rows_count_for_nothing(kernel: str, n: int, width: int, ones: bool) -> None:
    check_outer(n, width, torch.bfloat16, masked=True, ones=ones)


def test_column_of_ones_in_parts(kernel: str) -> None:
    # More rows than one part of the column sums has.
    check_outer(2100, 16, torch.float16, masked=True, ones=True)
    check_outer(70, 128, torch.bfloat16, ones=True)


def test_all_rows_masked(kernel: str) -> None:
    acc = poisoned(136)
    before = acc.to_dense()
    x = torch.full((70, 136), torch.nan, dtype=torch.bfloat16)
    syrk.run(acc.data, 136, x, torch.zeros(70, dtype=torch.bool), 1.0, False, False)
    assert torch.equal(acc.to_dense(), before)


@pytest.mark.parametrize("steps", range(1, 12))
def test_any_number_of_steps(kernel: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More and fewer steps than stages, and tiles in number that programs share unevenly."""
    use(monkeypatch, flush=192)
    check_outer(64 * steps - 3, 264 if steps % 2 else 128, torch.bfloat16)


@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize("ones", [False, True])
def test_rows_in_parts(kernel: str, splits: int, ones: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, splits=splits, flush=64)
    check_outer(333, 136, torch.bfloat16, masked=ones, ones=ones)


def test_other_turns_change_no_bits(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, splits=2)
    seen = []
    for seed in range(4):
        cuda_support.library().seed(1000 * seed)
        seen.append(check_outer(300, 136, torch.bfloat16, masked=True).data)
    assert all(torch.equal(seen[0].nan_to_num(), one.nan_to_num()) for one in seen[1:])


def test_rows_inside_wider_ones(kernel: str) -> None:
    whole = torch.randn(90, 4, 160).to(torch.bfloat16)
    x = whole[:, 1, 16:144]
    acc = poisoned(128)
    wide = expected(acc, x, None, 1.0, False, torch.float64)
    plain = expected(acc, x, None, 1.0, False, torch.float32)
    assert cuda_support.aligned(x)
    syrk.run(acc.data, 128, x, None, 1.0, False, False)
    assert_as_accurate(acc.to_dense(), plain, wide)


def test_unequal_problems_in_one_launch(kernel: str) -> None:
    sizes = [(40, 8), (130, 264), (64, 128), (1, 72), (200, 136)]
    ones = [False, True, False, True, False]
    accs = [poisoned(width + one) for (_, width), one in zip(sizes, ones, strict=True)]
    given = [rows(n, width, torch.bfloat16, number in (1, 4)) for number, (n, width) in enumerate(sizes)]
    wides, plains = (
        [expected(acc, x, mask, 1.0, one, dtype) for acc, (x, mask), one in zip(accs, given, ones, strict=True)]
        for dtype in (torch.float64, torch.float32)
    )
    accumulate_factors.run(
        [acc.data for acc in accs], [acc.n for acc in accs], [x for x, _ in given], [m for _, m in given], ones, False
    )
    for acc, plain, wide in zip(accs, plains, wides, strict=True):
        assert_as_accurate(acc.to_dense(), plain, wide)


# ------------------------------------------------------------------------------------- squares


def squares(lam: Tensor, g: Tensor, a: Tensor, mask: Tensor | None, ends: list[int] | None, dtype: Any) -> Tensor:
    result = lam.to(dtype).clone()
    flat_g, flat_a = g.flatten(0, -2), a.flatten(0, -2)
    keep = torch.ones(len(flat_g), dtype=torch.bool) if mask is None else mask
    ends = ends or [i * g.shape[1] for i in range(g.shape[0] + 1)]
    for first, last in pairwise(ends):
        use_row = keep[first:last]
        product = flat_g[first:last][use_row].to(dtype).T @ flat_a[first:last][use_row].to(dtype)
        result += product**2
    return result


def check_squares(
    batch: int, tokens: int, d_out: int, d_in: int, dtype: torch.dtype = torch.bfloat16, masked: bool = False
) -> Tensor:
    torch.manual_seed(batch + tokens)
    g, mask = rows(batch * tokens, d_out, dtype, masked)
    a = torch.randn(batch, tokens, d_in).to(dtype)
    if mask is not None:
        a.view(-1, d_in)[~mask] = torch.inf
    g = g.view(batch, tokens, d_out)
    lam = torch.randn(d_out, d_in)
    wide, plain = (squares(lam, g, a, mask, None, kind) for kind in (torch.float64, torch.float32))
    eigenvalue_correction.add_squares(lam, g, a, mask, None)
    assert_as_accurate(lam, plain, wide)
    return lam


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "d_out", "d_in"),
    [(1, 2, 8, 8), (3, 64, 128, 128), (4, 70, 136, 72), (2, 33, 264, 136), (9, 5, 64, 264)],
)
def test_squares(kernel: str, batch: int, tokens: int, d_out: int, d_in: int, dtype: torch.dtype) -> None:
    check_squares(batch, tokens, d_out, d_in, dtype)


def test_squares_of_masked_tokens(kernel: str) -> None:
    check_squares(4, 70, 136, 72, masked=True)


@pytest.mark.parametrize("splits", [2, 3])
def test_sequences_in_parts(kernel: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, splits=splits)
    check_squares(7, 40, 136, 136, masked=splits == 3)


@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences(kernel: str, masked: bool) -> None:
    """Sequences that begin anywhere, also empty ones: rows of the next one are there, and do not count."""
    ends = [0, 0, 5, 70, 70, 71, 200, 200]
    g, mask = rows(200, 136, torch.bfloat16, masked)
    a = torch.randn(200, 72).to(torch.bfloat16)
    lam = torch.randn(136, 72)
    wide, plain = (squares(lam, g, a, mask, ends, kind) for kind in (torch.float64, torch.float32))
    eigenvalue_correction.add_squares(lam, g, a, mask, torch.tensor(ends))
    assert_as_accurate(lam, plain, wide)


def test_rotated_tokens(kernel: str) -> None:
    """The whole backend: tokens are rotated by whoever serves that, then multiplied and squared here."""
    g, a = (torch.randn(3, 40, width).to(torch.bfloat16) for width in (136, 72))
    q_out, q_in = (torch.linalg.qr(torch.randn(n, n))[0] for n in (136, 72))
    pairs = [kk.bf16_pair(q) for q in (q_out, q_in)]
    lam, wide, plain = torch.zeros(136, 72), torch.zeros(136, 72, dtype=torch.float64), torch.zeros(136, 72)
    eigenvalue_correction.run(lam, g, a, *pairs, None, False, None)
    kk.eigenvalue_correction_(wide, g.double(), a.double(), q_out.double(), q_in.double())
    rotated = [kk.rotate(x, q) for x, q in zip((g, a), pairs, strict=True)]
    plain = squares(plain, *rotated, None, None, torch.float32)
    assert_as_accurate(lam, plain, wide)


# --------------------------------------------------------------------------------- bad arguments

ROW = {"x": 1 << 20, "packed": 1 << 20, "mask": 0, "rows": 10, "width": 64, "order": 64, "stride": 64, "part": 64}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": 0}, "x is 0; it must be the address of a tensor"),
        ({"x": (1 << 20) + 2}, "x is 1048578; it must be a multiple of 16 bytes"),
        ({"packed": 0}, "packed is 0"),
        ({"packed": 2}, "packed is 2; it must be a multiple of 4 bytes"),
        ({"rows": 0}, "rows is 0"),
        ({"rows": 1 << 31}, "rows is 2147483648"),
        ({"width": 60, "order": 60}, "width is 60; it must be a multiple of 8"),
        ({"order": 66}, "order is 66; it must be the width, or one more"),
        ({"stride": 68}, "stride is 68"),
        ({"stride": 56}, "stride is 56"),
        ({"part": 0}, "part is 0"),
        ({"part": 8}, "part is 8; it must be whole steps of the kernel"),
    ],
)
def test_bad_outer_products(kernel: str, change: dict[str, int], text: str) -> None:
    module = cuda_support.library()
    assert len(module.cuda_outer_table(kernel, "bfloat16", [tuple(ROW.values())])[0]) % 128 == 0
    with pytest.raises(ValueError, match=text):
        module.cuda_outer_table(kernel, "bfloat16", [tuple({**ROW, **change}.values())])


SQUARES = {
    "dtype": "float16", "left": 1 << 20, "right": 1 << 20, "out": 1 << 20, "mask": 0, "sequences": 0,
    "left_stride": 64, "right_stride": 72, "left_batch": 640, "right_batch": 720, "out_stride": 72, "rows": 64,
    "columns": 72, "tokens": 10, "batch": 3, "part": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"left": 8}, "left is 8"),
        ({"right": 0}, "right is 0"),
        ({"out": 0}, "out is 0"),
        ({"sequences": 4}, "sequences is 4; it must be a multiple of 8 bytes"),
        ({"left_stride": 60}, "left_stride is 60"),
        ({"right_batch": 721}, "right_batch is 721; it must be whole rows"),
        ({"left_batch": 576}, "left_batch is 576; it must be whole rows, and not less than one sequence"),
        ({"out_stride": 64}, "out_stride is 64; it must be at least the number of columns"),
        ({"tokens": 0}, "tokens is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"dtype": "float32"}, "dtype is 'float32'; it must be bfloat16 or float16"),
    ],
)
def test_bad_squares(kernel: str, change: dict[str, Any], text: str) -> None:
    module = cuda_support.library()
    module.cuda_squares_table(kernel=kernel, **SQUARES)
    with pytest.raises(ValueError, match=text):
        module.cuda_squares_table(kernel=kernel, **{**SQUARES, **change})


LAUNCH = {
    "dtype": "bfloat16", "table": 1 << 20, "items": 1, "partials": 0, "alpha": 1.0, "flush": 8192, "masked": False,
    "group": 4, "blocks": 2, "stream": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernel": "volta"}, "kernel is 'volta'; it must be hopper or ampere"),
        ({"table": 32}, "table is 32; it must be a multiple of 128 bytes"),
        ({"partials": 4}, "partials is 4; it must be a multiple of 16 bytes"),
        ({"flush": 100}, "flush is 100; it must be a multiple of 64"),
        ({"items": 0}, "items is 0"),
        ({"group": 0}, "group is 0"),
        ({"blocks": 0}, "blocks is 0; it must be whole clusters"),
    ],
)
def test_bad_launches(kernel: str, change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        cuda_support.library().cuda_outer(**{"kernel": kernel, **LAUNCH, **change})

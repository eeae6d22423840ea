"""`syrk_` against float64, for each backend."""

from __future__ import annotations

from typing import Any

import kfade_kernels as kk
import pytest
import torch
from oracles import assert_as_accurate, assert_close, outer_sum
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ORDERS = [1, 5, 127, 128, 129, 300]


def state(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(x: Tensor, mask: Tensor | None = None, alpha: float = 1.0, *, ones: bool = False) -> Tensor:
    acc = kk.PackedSymmetric(x.shape[-1] + ones, dtype=state(x.dtype))
    return kk.syrk_(acc, x, mask, alpha, ones_column=ones).to_dense()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("order", "ones"), [(n, ones) for n in ORDERS for ones in (False, True) if n > ones])
def test_agrees_with_float64(backend: str, order: int, dtype: torch.dtype, ones: bool) -> None:
    x = torch.randn(3, 11, order - ones).to(dtype)
    mask = torch.rand(3, 11) > 0.3
    x[~mask] = torch.nan
    # 16-bit rows are exact in the state's dtype, so the plain expression to keep up with is that of the
    # state: a 16-bit product would be a thousand times looser.
    plain = outer_sum(x, mask, ones=ones, dtype=state(dtype))
    result = run(x, mask, ones=ones)
    assert_as_accurate(result, plain, outer_sum(x, mask, ones=ones))
    assert torch.equal(result, result.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adds_to_what_is_there_and_scales(backend: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(9, 130).to(dtype), torch.randn(7, 130).to(dtype)
    acc = kk.PackedSymmetric(130, dtype=state(dtype))
    assert kk.syrk_(acc, x) is acc
    kk.syrk_(acc, y, alpha=-0.5)
    plain = outer_sum(x, dtype=state(dtype)) - 0.5 * outer_sum(y, dtype=state(dtype))
    assert_as_accurate(acc.to_dense(), plain, outer_sum(x) - 0.5 * outer_sum(y))
    halved, doubled = run(x, alpha=0.5, ones=True), run(x, ones=True) * 0.5
    assert_close(halved, doubled, 1e-6)


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(
    ("x", "mask"),
    [
        (torch.randn(0, 130), None),
        (torch.randn(2, 0, 130), None),
        (torch.full((4, 130), torch.nan), torch.zeros(4, dtype=torch.bool)),
        (torch.full((2, 3, 130), torch.inf), torch.zeros(2, 3, dtype=torch.int64)),
    ],
    ids=["no rows", "no tokens", "all masked", "all masked, 3-d"],
)
def test_no_rows_change_nothing(backend: str, x: Tensor, mask: Tensor | None, ones: bool) -> None:
    acc = kk.syrk_(kk.PackedSymmetric(130 + ones), torch.randn(3, 130 + ones))
    before = acc.to_dense()
    kk.syrk_(acc, x, mask, ones_column=ones)
    assert torch.equal(acc.to_dense(), before)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x, x], 1)[:, 0],
        lambda x: torch.stack([x, x], 2)[:, :, 1],
        lambda x: x[:1].expand(6, -1),
        lambda x: x.flip(0)[1:],
        lambda x: x.reshape(2, 4, -1).transpose(0, 1),
    ],
    ids=["transposed", "row stride", "column stride", "expanded", "offset", "batch transposed"],
)
def test_any_strides(backend: str, view: Any) -> None:
    x = view(torch.randn(8, 129))
    assert_close(run(x), outer_sum(x), 1e-6)
    assert_close(run(x, ones=True), outer_sum(x, ones=True), 1e-6)


def test_scratch_above_the_diagonal_may_hold_anything(backend: str) -> None:
    zeros = torch.zeros(300, 300).masked_fill(torch.ones(300, 300).triu(1).bool(), torch.nan)
    acc = kk.PackedSymmetric.from_dense(zeros)
    x = torch.randn(9, 300)
    assert_close(kk.syrk_(acc, x).to_dense(), outer_sum(x), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_inputs_same_bits(backend: str, dtype: torch.dtype) -> None:
    x, mask = torch.randn(50, 300).to(dtype), torch.rand(50) > 0.5
    assert torch.equal(run(x, mask, ones=True), run(x, mask, ones=True))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
def test_masks_of_any_kind(backend: str, dtype: torch.dtype) -> None:
    x, mask = torch.randn(20, 5), torch.rand(20) > 0.5
    assert torch.equal(run(x, mask.to(dtype)), run(x, mask))


def test_many_16_bit_updates_lose_nothing() -> None:
    """A 16-bit accumulator would keep less than half of the trace here."""
    acc, x = kk.PackedSymmetric(8), torch.ones(1, 8, dtype=torch.bfloat16)
    for _ in range(2_000):
        kk.syrk_(acc, x)
    assert torch.equal(acc.to_dense(), torch.full((8, 8), 2_000.0))


def test_the_product_setting_of_the_process_comes_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    kk.syrk_(kk.PackedSymmetric(8), torch.ones(3, 8, dtype=torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    assert_close(a @ b, a.double() @ b.double(), 1e-6)


X = torch.zeros(4, 5)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("accumulator is a tensor", {"acc": torch.zeros(5, 5)}, TypeError, "acc is a Tensor"),
    ("x is a list", {"x": [[0.0] * 5]}, TypeError, "x is a list"),
    ("one dimension", {"x": X[0]}, ValueError, "x has shape"),
    ("four dimensions", {"x": X[None, None]}, ValueError, "x has shape"),
    ("wrong width", {"x": torch.zeros(4, 6)}, ValueError, "x has shape"),
    ("no room for ones", {"ones_column": True}, ValueError, "x has shape"),
    ("integers", {"x": X.long()}, TypeError, "x is torch.int64"),
    ("complex", {"x": X.to(torch.complex64)}, TypeError, "x is torch.complex64"),
    ("wider than the state", {"x": X.double()}, TypeError, "x is torch.float64"),
    ("sparse", {"x": X.to_sparse()}, ValueError, "x has layout"),
    ("other device", {"x": X.to("meta")}, ValueError, "x is on meta"),
    ("mask is a list", {"mask": [1, 1, 1, 1]}, TypeError, "mask is a list"),
    ("mask of weights", {"mask": torch.ones(4)}, TypeError, "mask is torch.float32"),
    ("mask too short", {"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask has shape"),
    ("mask of other rank", {"mask": torch.ones(4, 1, dtype=torch.bool)}, ValueError, "mask has shape"),
    ("mask elsewhere", {"mask": torch.ones(4, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta"),
    ("alpha NaN", {"alpha": float("nan")}, ValueError, "alpha is nan"),
    ("alpha infinite", {"alpha": float("inf")}, ValueError, "alpha is inf"),
    ("alpha a tensor", {"alpha": torch.tensor(1.0)}, TypeError, "alpha is a Tensor"),
    ("alpha a bool", {"alpha": True}, TypeError, "alpha is a bool"),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kk.syrk_(**{"acc": kk.PackedSymmetric(5), "x": X, **change})

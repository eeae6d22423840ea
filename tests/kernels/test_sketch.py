"""`sketch_` against float64, for each backend, and what it refuses."""

from __future__ import annotations

from typing import Any

import kfade_kernels as kk
import pytest
import torch
from kfade_kernels.sketch import pytorch
from oracles import Sizes, assert_as_accurate, assert_close, outer_sum

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n", "columns"), [((1,), 5, 2), ((3, 40), 33, 7), ((4500,), 12, 12), ((0,), 6, 3)])
def test_agrees_with_float64(
    backend: str, rows: tuple[int, ...], n: int, columns: int, dtype: torch.dtype, masked: bool, ones: bool
) -> None:
    """Two calls, more rows than are taken at a time, and NaN in what is left out."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    omega = torch.randn(n + ones, columns, dtype=torch.float64).to(kind)
    y, trace = torch.zeros_like(omega), torch.zeros((), dtype=torch.float64)
    true_y, true_trace, plain = torch.zeros(n + ones, columns).double(), 0.0, torch.zeros_like(y)
    for _ in range(2):
        x = torch.randn(*rows, n).to(dtype)
        mask = torch.rand(*rows) > 0.4 if masked else None
        if mask is not None:
            x[~mask] = torch.nan
        assert kk.sketch_(y, trace, x, omega, mask, ones_column=ones) is y
        outer = outer_sum(x, mask, ones=ones)
        true_y, true_trace = true_y + outer @ omega.double(), true_trace + float(outer.trace())
        plain += outer_sum(x, mask, ones=ones, dtype=kind) @ omega
    # (xᵀx)Ω and xᵀ(xΩ) round differently.
    assert_as_accurate(y, plain, true_y, times=8)
    # A few roundings of one number; in float64, what the order of 10⁵ sums does.
    assert float(trace) == pytest.approx(true_trace, rel=max(1e-13, 8 * torch.finfo(kind).eps))


def test_no_square_matrix() -> None:
    x, omega, sizes = torch.randn(20, 300), torch.randn(300, 4), Sizes()
    with sizes:
        pytorch.run(torch.zeros(300, 4), torch.zeros(()), x, omega, None, False)
    assert sizes.largest <= 20 * 300


def test_same_bits_twice(backend: str) -> None:
    x, omega = torch.randn(50, 30), torch.randn(30, 4)
    first, second = (kk.sketch_(torch.zeros(30, 4), torch.zeros(()), x, omega) for _ in "ab")
    assert torch.equal(first, second)


def test_under_autocast_nothing_changes() -> None:
    x, omega = torch.randn(50, 30), torch.randn(30, 4)
    plain = kk.sketch_(torch.zeros(30, 4), torch.zeros(()), x, omega)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kk.sketch_(torch.zeros(30, 4), torch.zeros(()), x, omega), plain)


def test_opcheck_and_gradients(backend: str) -> None:
    x, omega = torch.randn(2, 5, 6), torch.randn(7, 3)
    arguments = (torch.zeros(7, 3), torch.zeros(()), x, omega, torch.rand(10) > 0.5, True)
    torch.library.opcheck(torch.ops.kfade_kernels.sketch_.default, arguments)
    with pytest.raises(ValueError, match="sketch_: x requires a gradient"):
        kk.sketch_(torch.zeros(6, 3), torch.zeros(()), x.requires_grad_(), omega[:6])


def test_explain() -> None:
    said = kk.explain("sketch_", torch.zeros(6, 2), torch.zeros(()), torch.zeros(3, 6), torch.zeros(6, 2))
    assert said.backend == "pytorch" and "two torch.float32 products" in said.configuration


Y, X, OMEGA = torch.zeros(6, 2), torch.zeros(4, 6), torch.zeros(6, 2)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("y is a list", {"y": [1.0]}, TypeError, "y is a list"),
    ("y 16-bit", {"y": Y.half()}, TypeError, "y is torch.float16"),
    ("y flat", {"y": Y[0]}, ValueError, "y has shape"),
    ("trace a number", {"trace": 0.0}, TypeError, "trace is a float"),
    ("trace a vector", {"trace": torch.zeros(1)}, ValueError, "trace has shape"),
    ("x flat", {"x": X[0]}, ValueError, "x has shape"),
    ("x integers", {"x": X.long()}, TypeError, "x is torch.int64"),
    ("x wider", {"x": X.double()}, TypeError, "x is torch.float64"),
    ("x narrow", {"x": X[:, :5]}, ValueError, "last dimension must be 6"),
    ("x with ones", {"ones_column": True}, ValueError, "last dimension must be 5"),
    ("x elsewhere", {"x": X.to("meta")}, ValueError, "x is on meta"),
    ("omega wider", {"omega": OMEGA.double()}, TypeError, "omega is torch.float64"),
    ("omega too short", {"omega": OMEGA[:5]}, ValueError, "omega has shape"),
    ("mask of another shape", {"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask has shape"),
    ("ones_column a number", {"ones_column": 1}, TypeError, "ones_column is a int"),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kk.sketch_(**{"y": Y, "trace": torch.zeros(()), "x": X, "omega": OMEGA, **change})
    assert_close(Y, torch.zeros(6, 2), 0.0)

"""`sketch_` against float64, for each backend, and what it refuses."""

from __future__ import annotations

from typing import Any

import kfade_kernels as kk
import pytest
import torch
from kfade_kernels.configurations import Configuration
from kfade_kernels.devices import H100
from kfade_kernels.sketch import pytorch, split, triton
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "n", "columns"), [(700, 130, 6), (513, 64, 70), (1, 1, 1), (300, 33, 1)])
def test_the_kernels_split_rows_in_order(
    monkeypatch: pytest.MonkeyPatch, rows: int, n: int, columns: int, dtype: torch.dtype
) -> None:
    """Several parts, the last one short; one launch for each product, and the same bits twice."""
    pytest.importorskip("triton")
    monkeypatch.setenv("KFADE_ENABLE", "triton")
    monkeypatch.setattr(split, "MOST_ROWS", 64)
    asked: list[int] = []
    multiply = triton.multiply
    monkeypatch.setattr(triton, "multiply", lambda products: (asked.append(len(products)), multiply(products)))
    x, omega = torch.randn(rows, n).to(dtype), torch.randn(n, columns)
    assert kk.explain("sketch_", torch.zeros(n, columns), torch.zeros(()), x, omega).backend == "triton"
    found = [(torch.zeros(n, columns), torch.zeros(())) for _ in "ab"]
    for y, trace in found:
        kk.sketch_(y, trace, x, omega)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert asked == [1, -(-rows // 64)] * 2
    truth = outer_sum(x, None) @ omega.double()
    plain = outer_sum(x, None, dtype=torch.float32) @ omega
    # (xᵀx)Ω and xᵀ(xΩ) round differently; of a single row the plain one may be exact.
    assert_as_accurate(found[0][0], plain, truth, times=8)
    # A few roundings of one number.
    assert float(found[0][1]) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "order", "columns"), [(1, 1, 1), (4096, 576, 74), (65536, 16384, 138), (10**7, 64, 26)]
)
def test_parts_of_rows(rows: int, order: int, columns: int) -> None:
    """As many as fill a device, no sum longer than the flush, none so short that its traffic is all there is."""
    c = Configuration(block_m=128, block_n=128, block_k=32)
    step = split.part_rows(rows, order, columns, c, H100)
    assert step % c.block_k == 0 and split.LEAST_ROWS <= step <= split.MOST_ROWS
    tiles = -(-order // 128) * -(-columns // 128)
    parts = -(-rows // step)
    assert parts * tiles <= H100.multiprocessors or step == split.MOST_ROWS or parts == 1


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

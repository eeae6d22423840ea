"""Grouped products, in Triton's interpreter: every way to store the operands, and every end."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_as_accurate, orthogonal, relative

pytest.importorskip("triton")

from kfade_kernels.product import triton as product
from kfade_kernels.product.triton import FINISHES, Product, multiply
from torch import Tensor

SHAPES = [(1, 1, 1), (5, 7, 3), (65, 70, 40), (64, 32, 72)]


def stored(rows: int, columns: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    x = torch.randn(columns, rows).to(dtype).T if transposed else torch.randn(rows, columns).to(dtype)
    assert x.shape == (rows, columns)
    return x


def ends(finish: str, m: int, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    if finish.startswith("row"):
        rows = {"first": torch.randn(n).to(dtype), "second": torch.randn(n).to(dtype)}
        return rows if "pair" in finish else {"first": rows["first"]}
    if finish == "divide by a matrix":
        return {"first": torch.rand(m, n)}
    return {"first": torch.rand(m), "second": torch.rand(n)} if finish else {}


def defined(p: Product, dtype: torch.dtype) -> Tensor:
    """What a product is, in plain PyTorch."""
    a, b = p.a.to(dtype), p.b.to(dtype)
    x = a @ b if p.low is None else a @ b + a @ p.low.to(dtype)
    first, second = (None if t is None else t.to(dtype) for t in (p.first, p.second))
    if p.finish.startswith("row"):
        x = x + first
        return x if second is None else x + second
    if p.finish == "divide by a matrix":
        return x / (first + p.damping)
    return x / (torch.outer(first, second) + p.damping) if p.finish else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize(("a_t", "b_t"), [(False, False), (True, False), (False, True), (True, True)])
def test_agrees_with_float64(a_t: bool, b_t: bool, finish: str, dtype: torch.dtype) -> None:
    """All shapes in one grouped launch, outputs poisoned."""
    problems = []
    for m, n, k in SHAPES:
        pair = finish == "row of a pair"
        b = stored(k, n, b_t, dtype)
        c = torch.full((m, n), torch.nan)
        low = stored(k, n, b_t, dtype) / 256 if pair else None
        problems.append(Product(stored(m, k, a_t, dtype), b, c, low, finish, damping=0.3, **ends(finish, m, n, dtype)))
    multiply(problems)
    for p in problems:
        assert_as_accurate(p.c, defined(p, torch.float32), defined(p, torch.float64))


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_operands_of_two_dtypes_meet_in_float32(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    p = Product(stored(40, 30, True, dtypes[0]), stored(30, 50, False, dtypes[1]), torch.empty(40, 50))
    multiply([p])
    assert_as_accurate(p.c, defined(p, torch.float32), defined(p, torch.float64))


def test_a_result_is_rounded_once() -> None:
    """float16 stands for bfloat16, whose products the interpreter gets wrong."""
    q = orthogonal(64, torch.float32)
    high = q.half()
    low = (q - high.float()).half()
    p = Product(torch.randn(40, 64).half(), high, torch.empty(40, 64).half(), low)
    multiply([p])
    truth = p.a.double() @ q.double()
    assert relative(p.c, truth) <= relative(truth.half(), truth) * 1.05


def test_no_inner_dimension_gives_the_end_alone() -> None:
    p = Product(torch.zeros(3, 0), torch.zeros(0, 5), torch.full((3, 5), torch.nan), None, "row", torch.arange(5.0))
    multiply([p])
    assert torch.equal(p.c, torch.arange(5.0).expand(3, 5))


def test_padded_rows_and_parts_of_a_larger_matrix() -> None:
    """Strides of a view, aligned and not."""
    for offset in (0, 3):
        big = torch.randn(100, 160)
        a, b = big[:50, offset : offset + 48], big[40:88, 64 + offset : 64 + offset + 80]
        out = torch.full((60, 100), torch.nan)
        p = Product(a, b, out[5:55, 8:88])
        assert p.aligned == (offset == 0)
        multiply([p])
        assert_as_accurate(p.c, a @ b, a.double() @ b.double())
        assert torch.isnan(out[:5]).all() and torch.isnan(out[55:]).all()
        assert torch.isnan(out[:, :8]).all() and torch.isnan(out[:, 88:]).all()


def test_an_operand_has_unit_stride_somewhere() -> None:
    x = torch.randn(6, 8)
    assert product.operand(x) is x
    assert product.operand(x.T).data_ptr() == x.data_ptr()
    for view in (x[:, ::2], x.expand(3, 6, 8)[:, 0], x[:, :1].expand(6, 5)):
        copied = product.operand(view)
        assert torch.equal(copied, view)
        assert 1 in copied.stride()


def test_same_inputs_same_bits() -> None:
    a, b = torch.randn(70, 90), torch.randn(90, 65)
    results = [torch.empty(70, 65) for _ in range(2)]
    for result in results:
        multiply([Product(a, b, result)])
    assert torch.equal(*results)


def test_a_launch_is_for_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[list[Product]] = []
    monkeypatch.setattr(product, "_launch", launches.append)
    here, elsewhere = (Product(*(torch.empty(8, 8, device=device) for _ in range(3))) for device in ("cpu", "meta"))
    multiply([here, elsewhere, here])
    assert launches == [[here, here], [elsewhere]]

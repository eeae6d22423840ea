"""Block-diagonal factors: how a side is cut, and what is kept and solved with."""

from __future__ import annotations

import kfade_kernels as kk
import pytest
import torch
from kfade_kernels.blocks import BlockBasis, PackedBlocks, slices, split
from kfade_kernels.cholesky import factored_solve
from kfade_kernels.packed import pack, packed_elements
from oracles import assert_as_accurate, assert_close, orthogonal, outer_sum
from torch import Tensor

LAYOUTS = [(1,), (3, 2), (128, 120), (136, 136, 29)]


def within(dense: Tensor, orders: tuple[int, ...]) -> Tensor:
    """A dense matrix, zero between blocks."""
    return torch.block_diag(*(dense[s, s] for s in slices(orders)))


@pytest.mark.parametrize("limit", [2, 3, 8, 9, 64, 100, 128, 1000, None])
def test_blocks_are_few_nearly_equal_and_all(limit: int | None) -> None:
    for order in (1, 2, 3, 7, 8, 9, 16, 17, 25, 100, 576, 577, 1536, 18944, 18945):
        orders = split(order, limit)
        assert sum(orders) == order and min(orders) >= 1
        assert len(orders) == (1 if limit is None else -(-order // limit)), "the fewest"
        assert limit is None or max(orders) <= limit
        assert min(orders) >= max(orders) / 2
        assert max(orders) - min(orders) <= 1 or all(m % 8 == 0 for m in orders[:-1])
    assert split(order, None) == (order,)


def test_wide_sides_are_cut_where_rows_are_aligned() -> None:
    """As a GPU wants the first column of 16-bit rows, and the bias stays with the last block."""
    assert split(18944, 4096) == (3792, 3792, 3792, 3792, 3776)
    assert split(1537, 768) == (520, 520, 497)
    assert split(25, 12) == (9, 8, 8), "eight at a time would leave one too small"
    assert slices((3, 2, 4)) == [slice(0, 3), slice(3, 5), slice(5, 9)]


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("orders", LAYOUTS, ids=str)
def test_columns_of_rows_are_added_block_by_block(
    backend: str, orders: tuple[int, ...], dtype: torch.dtype, ones: bool
) -> None:
    """Rows are not copied: a block takes its columns of them, with the stride of the whole."""
    n = sum(orders)
    x, mask = torch.randn(3, 11, n - ones).to(dtype), torch.rand(3, 11) > 0.3
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    acc = PackedBlocks(orders, dtype=wide)
    last = [ones and s.stop == n for s in slices(orders)]
    rows = [x[..., s] for s in slices(orders)]
    assert all(r.data_ptr() == x.data_ptr() + s.start * x.itemsize for r, s in zip(rows, slices(orders), strict=True))
    kk.accumulate_factors_(acc.blocks, [], rows, [], mask, ones_column=last)
    plain, truth = (within(outer_sum(x, mask, ones=ones, dtype=d), orders) for d in (wide, torch.float64))
    assert_as_accurate(acc.to_dense(), plain, truth)
    assert acc.data.numel() == sum(map(packed_elements, orders)) and acc.nbytes == wide.itemsize * acc.data.numel()
    assert_close(acc.trace(), plain.trace(), 1e-5)
    assert torch.equal(acc.diagonal(), acc.to_dense().diagonal())
    again = PackedBlocks.from_packed(acc.data, orders)
    assert again.data is acc.data and torch.equal(again.to_dense(), acc.to_dense())
    assert acc.to("cpu").data is acc.data and (acc.device.type, acc.dtype, acc.n) == ("cpu", wide, n)


def test_a_basis_is_its_blocks() -> None:
    blocks = [orthogonal(m) for m in (3, 4, 1)]
    basis = BlockBasis.of(blocks)
    assert basis.orders == (3, 4, 1) and basis.data.shape == (9 + 16 + 1,) and basis.dtype == torch.float64
    assert torch.equal(basis.to_dense(), torch.block_diag(*blocks))
    assert all(
        x.data_ptr() >= basis.data.data_ptr() and torch.equal(x, y) for x, y in zip(basis.blocks, blocks, strict=True)
    )
    assert basis.to("cpu").data is basis.data


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("sides", [((5,), (3, 4)), ((4, 1), (7,)), ((3, 3, 2), (2, 5))], ids=str)
def test_factored_solves_are_those_of_the_dense_matrices(sides: tuple[tuple[int, ...], ...], batched: bool) -> None:
    dense = [within(outer_sum(torch.randn(20, sum(orders)).double()), orders) for orders in sides]
    parts = [[pack(m[x, x]) for x in slices(orders)] for m, orders in zip(dense, sides, strict=True)]
    s, a = (PackedBlocks.from_packed(torch.cat(x), orders) for x, orders in zip(parts, sides, strict=True))
    v = torch.randn(*([3] if batched else []), sum(sides[0]), sum(sides[1])).double()
    found = factored_solve(v, s, a, 0.3, s_count=7, a_count=3)
    wholes = (kk.PackedSymmetric.from_dense(m) for m in dense)
    assert_close(found, factored_solve(v, *wholes, 0.3, s_count=7, a_count=3), 1e-12)


def test_what_is_not_as_it_must_be() -> None:
    with pytest.raises(ValueError, match="the order of a matrix must be at least 1"):
        PackedBlocks((3, 0))
    with pytest.raises(TypeError, match="a symmetric accumulator must be"):
        PackedBlocks((3, 2), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"shape \[14\]; blocks of orders \[3, 2\] need a contiguous \[13\]"):
        PackedBlocks.from_packed(torch.zeros(14), (3, 2))
    for data in (torch.zeros(12), torch.zeros(13, 1), torch.zeros(26)[::2]):
        with pytest.raises(ValueError, match=r"blocks of orders \[3, 2\] need a contiguous \[13\]"):
            BlockBasis(data, (3, 2))
    with pytest.raises(TypeError, match="a is a Tensor; it must be a PackedSymmetric or PackedBlocks"):
        factored_solve(torch.zeros(2, 2), kk.PackedSymmetric(2), torch.eye(2), 0.1)  # type: ignore[arg-type]

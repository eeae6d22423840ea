"""Kronecker factors that are taken to be block-diagonal: how a side is cut, packed blocks, and blocks of eigenvectors.

A side of order n is cut into blocks of consecutive directions, and what a factor has between two blocks is left out: of
k blocks `n²/k` numbers remain, and `eigh` costs `k·(n/k)³`. It is one of the structures that Lin et al. 2023 (arXiv
2312.05705) give the factors of an optimiser. The eigenvectors of such a factor are block-diagonal too. No function here
but `to_dense` makes an n × n matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .packed import PackedSymmetric, packed_elements

# 16 bytes of 16-bit numbers: what GPU kernels want the first column of rows to be a multiple of.
STEP = 8


def split(order: int, limit: int | None) -> tuple[int, ...]:
    """Orders of the fewest blocks of at most `limit`, from the first direction on; None is one block.

    They differ by one at most; or all but the last are the next multiple of 8, where the last, which takes the rest, is
    then no smaller than half of them.
    """
    if limit is None or order <= limit:
        return (order,)
    number = -(-order // limit)
    rounded = -(-order // number // STEP) * STEP
    last = order - (number - 1) * rounded
    if rounded <= limit and 2 * last >= rounded:
        return (rounded,) * (number - 1) + (last,)
    return tuple(order // number + int(i < order % number) for i in range(number))


def slices(orders: Sequence[int]) -> list[slice]:
    """The directions of each block."""
    return [slice(start, stop) for start, stop in pairwise(accumulate(orders, initial=0))]


class PackedBlocks:
    """A symmetric block-diagonal matrix: the packed triangle of each block, laid end to end.

    Args:
        orders: of the blocks, each at least 1.
        dtype: `torch.float32` or `torch.float64`.

    Attributes:
        orders: of the blocks.
        n: their sum, the order of the matrix.
        data: the flat buffer.
        blocks: views into it, which `syrk_` updates in place.

    Raises:
        TypeError, ValueError: as `PackedSymmetric`.
    """

    __slots__ = ("blocks", "data", "n", "orders")

    def __init__(
        self, orders: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        for order in orders:
            PackedSymmetric(order, device="meta", dtype=dtype)  # checks both
        elements = sum(packed_elements(order) for order in orders)
        self._set(torch.zeros(elements, device=device, dtype=dtype), tuple(orders))

    def _set(self, data: Tensor, orders: tuple[int, ...]) -> None:
        self.data, self.orders, self.n = data, orders, sum(orders)
        parts = data.split([packed_elements(order) for order in orders])
        self.blocks = [PackedSymmetric.from_packed(part, n) for part, n in zip(parts, orders, strict=True)]

    @classmethod
    def from_packed(cls, data: Tensor, orders: Sequence[int]) -> PackedBlocks:
        """Wrap a flat buffer without a copy.

        Raises:
            ValueError: `data` is not one contiguous dimension of the right length.
        """
        elements = sum(packed_elements(order) for order in orders)
        if data.ndim != 1 or data.numel() != elements or not data.is_contiguous():
            raise ValueError(
                f"data has shape {list(data.shape)}; blocks of orders {list(orders)} need a contiguous [{elements}]"
            )
        matrix = cls.__new__(cls)
        matrix._set(data, tuple(orders))
        return matrix

    def to_dense(self) -> Tensor:
        """The dense matrix `[n, n]`: a new tensor, exactly symmetric, zero between blocks."""
        dense: Tensor = torch.block_diag(*(block.to_dense() for block in self.blocks))
        return dense

    def diagonal(self) -> Tensor:
        """The diagonal `[n]`, as a new tensor."""
        return torch.cat([block.diagonal() for block in self.blocks])

    def trace(self) -> Tensor:
        """Sum of the diagonal, a 0-d tensor."""
        return self.diagonal().sum()

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.data.numel() * self.data.element_size()

    def to(self, device: torch.device | str) -> PackedBlocks:
        """The matrix on a device; where it is there already, with the same buffer."""
        return self.from_packed(self.data.to(device), self.orders)

    def __repr__(self) -> str:
        return f"PackedBlocks(orders={list(self.orders)}, dtype={self.dtype}, device='{self.device}')"


class BlockBasis:
    """Block-diagonal eigenvectors: those of each block in columns, `[m, m]`, laid end to end in one buffer.

    Args:
        data: flat, of `Σ m²` elements.
        orders: m of each block.

    Attributes:
        orders: of the blocks.
        data: the flat buffer.
        blocks: views into it.

    Raises:
        ValueError: `data` is not one contiguous dimension of the right length.
    """

    __slots__ = ("blocks", "data", "orders")

    def __init__(self, data: Tensor, orders: Sequence[int]) -> None:
        elements = sum(order**2 for order in orders)
        if data.ndim != 1 or data.numel() != elements or not data.is_contiguous():
            raise ValueError(
                f"data has shape {list(data.shape)}; blocks of orders {list(orders)} need a contiguous [{elements}]"
            )
        self.data, self.orders = data, tuple(orders)
        parts = data.split([order**2 for order in orders])
        self.blocks = [part.view(order, order) for part, order in zip(parts, orders, strict=True)]

    @classmethod
    def of(cls, blocks: Sequence[Tensor]) -> BlockBasis:
        """Copies of square matrices as one buffer."""
        return cls(torch.cat([block.reshape(-1) for block in blocks]), [block.shape[0] for block in blocks])

    def to_dense(self) -> Tensor:
        """The dense matrix `[n, n]`: a new tensor, zero between blocks."""
        dense: Tensor = torch.block_diag(*self.blocks)
        return dense

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def to(self, device: torch.device | str) -> BlockBasis:
        """The basis on a device; where it is there already, with the same buffer."""
        return BlockBasis(self.data.to(device), self.orders)

    def __repr__(self) -> str:
        return f"BlockBasis(orders={list(self.orders)}, dtype={self.dtype}, device='{self.device}')"

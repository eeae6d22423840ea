"""Packed storage of a symmetric matrix: its lower triangle, in block rows.

A matrix of order n is cut into block rows of `PANEL_ROWS` rows. Block row i keeps columns
`0 … end_i` only, where `end_i` is the last row of the block, as one dense row-major *panel*
`[rows_i, end_i]`; the panels follow each other in one flat buffer. A CPU product and a GPU tile can
both add to a panel in place, and nothing above the diagonal blocks exists:

    n = 3 blocks      stored            elements = Σ rows_i · end_i ≤ n²/2 + 128·n
    ┌──┬──┬──┐        ┌──┐
    │00│  │  │        │00│              Inside a diagonal block the part above the diagonal is
    ├──┼──┼──┤        ├──┼──┐           scratch: backends may write anything there and readers
    │10│11│  │   →    │10│11│           must not look at it.
    ├──┼──┼──┤        ├──┼──┼──┐
    │20│21│22│        │20│21│22│
    └──┴──┴──┘        └──┴──┴──┘
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PANEL_ROWS = 128


@dataclass(frozen=True)
class Panel:
    """One block row: rows `start … stop` and columns `0 … stop`, at `offset` of the flat buffer."""

    start: int
    stop: int
    offset: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def view(self, packed: Tensor) -> Tensor:
        """The panel `[rows, stop]` as a view into the flat buffer."""
        return packed[self.offset : self.offset + self.rows * self.stop].view(self.rows, self.stop)


def panels(order: int) -> Iterator[Panel]:
    """The panels of a matrix of this order, from the top."""
    offset = 0
    for start in range(0, order, PANEL_ROWS):
        stop = min(start + PANEL_ROWS, order)
        yield Panel(start, stop, offset)
        offset += (stop - start) * stop


def packed_elements(order: int) -> int:
    """Number of elements of the flat buffer of a matrix of this order."""
    full, rest = divmod(order, PANEL_ROWS)
    return PANEL_ROWS * PANEL_ROWS * full * (full + 1) // 2 + rest * order


def pack(dense: Tensor) -> Tensor:
    """The flat buffer `[packed_elements(n)]` of a symmetric matrix `[n, n]`; its upper part is not read."""
    order = dense.shape[0]
    packed = dense.new_empty(packed_elements(order))
    for panel in panels(order):
        panel.view(packed).copy_(dense[panel.start : panel.stop, : panel.stop])
    return packed


def unpack(packed: Tensor, order: int) -> Tensor:
    """The exactly symmetric dense matrix `[n, n]` of a flat buffer."""
    dense = packed.new_empty(order, order)
    for panel in panels(order):
        dense[panel.start : panel.stop, : panel.stop] = panel.view(packed)
    for panel in panels(order):
        block = dense[panel.start : panel.stop, panel.start : panel.stop]
        lower = block.tril()
        block.copy_(lower + block.tril(-1).T)
        dense[: panel.start, panel.start : panel.stop] = dense[panel.start : panel.stop, : panel.start].T
    return dense


class PackedSymmetric:
    """A symmetric matrix `[n, n]` of which only the lower triangle is stored.

    Args:
        n: order, at least 1.
        device: where the buffer lives.
        dtype: `torch.float32` or `torch.float64`; an accumulator is never 16-bit.

    Attributes:
        n: order.
        data: the flat buffer `[packed_elements(n)]`, zero at first; updated in place by `syrk_`.

    Raises:
        TypeError: `n` is not an integer, or `dtype` is not float32 or float64.
        ValueError: `n` is less than 1.
    """

    __slots__ = ("data", "n")

    def __init__(self, n: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> None:
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"n is a {type(n).__name__}; it must be an integer order")
        if n < 1:
            raise ValueError(f"n is {n}; the order of a matrix must be at least 1")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}; a symmetric accumulator must be torch.float32 or torch.float64")
        self.n = n
        self.data = torch.zeros(packed_elements(n), device=device, dtype=dtype)

    @classmethod
    def from_packed(cls, data: Tensor, n: int) -> PackedSymmetric:
        """Wrap a flat buffer `[packed_elements(n)]` without a copy.

        Raises:
            ValueError: `data` is not one contiguous dimension of the right length.
        """
        if data.ndim != 1 or data.numel() != packed_elements(n) or not data.is_contiguous():
            raise ValueError(f"data has shape {list(data.shape)}; order {n} needs a contiguous [{packed_elements(n)}]")
        matrix = cls.__new__(cls)
        matrix.n, matrix.data = n, data
        return matrix

    @classmethod
    def from_dense(cls, dense: Tensor) -> PackedSymmetric:
        """Pack the lower triangle of `dense [n, n]`; what is above the diagonal is not read."""
        if dense.ndim != 2 or dense.shape[0] != dense.shape[1]:
            raise ValueError(f"dense has shape {list(dense.shape)}; it must be square")
        return cls.from_packed(pack(dense), dense.shape[0])

    def to_dense(self) -> Tensor:
        """The dense matrix `[n, n]`: a new tensor, exactly symmetric."""
        return unpack(self.data, self.n)

    @property
    def blocks(self) -> list[PackedSymmetric]:
        """Itself, the only block; see `kfade_kernels.blocks.PackedBlocks`."""
        return [self]

    def diagonal(self) -> Tensor:
        """The diagonal `[n]`, as a new tensor."""
        parts = [panel.view(self.data)[:, panel.start :].diagonal() for panel in panels(self.n)]
        return torch.cat(parts)

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
        """Bytes of the buffer: at most `(n²/2 + 128·n)` elements."""
        return self.data.numel() * self.data.element_size()

    def to(self, device: torch.device | str) -> PackedSymmetric:
        """The matrix on a device; where it is there already, with the same buffer."""
        return self.from_packed(self.data.to(device), self.n)

    def zero_(self) -> PackedSymmetric:
        """Set the matrix to zero in place."""
        self.data.zero_()
        return self

    def __repr__(self) -> str:
        return f"PackedSymmetric(n={self.n}, dtype={self.dtype}, device='{self.device}')"

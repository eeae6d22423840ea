"""What the arithmetic of a plan is about: the data of a fit, a basis that it is given, and one factor of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from kfade_kernels import cost
from kfade_kernels.blocks import split
from kfade_kernels.packed import packed_elements

from ..factors import OVERSAMPLING
from ..loss import Batch
from ..rates import Rates

# Dense matrices of a factor's size that its `eigh` needs at once: the factor, the eigenvectors, LAPACK's 2·n² numbers.
EIGH_MATRICES = 4


@dataclass(frozen=True)
class Basis:
    """Where the basis that a fit is given is while it runs.

    Attributes:
        copied: whether it is not on the device, and each pass copies its own there; else all of it stays on the device,
            in memory or mapped from files.
        resident: bytes of what the fit reads of it that take memory of the device before.
    """

    copied: bool
    resident: float = 0.0


@dataclass(frozen=True)
class Workload:
    """The data of a fit.

    Attributes:
        tokens: that are not padding.
        sequences: of all batches.
        batches: how many.
        size, length: sequences, and tokens a sequence, of the largest batch.
        padded: whether any token is padding.
    """

    tokens: int
    sequences: int
    batches: int
    size: int
    length: int
    padded: bool = False

    @property
    def rows(self) -> int:
        """Of the largest batch."""
        return self.size * self.length

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Workload:
        """Of checked batches."""
        size, length = max((b.input_ids.shape for b in batches), key=math.prod)
        return cls(
            sum(b.tokens for b in batches), sum(len(b.input_ids) for b in batches), len(batches), size, length,
            any(b.padded for b in batches),
        )  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One factor of a layer: what it takes to keep, fill and decompose, as triangle, in blocks, or as sketch."""

    order: int
    rank: int | None
    itemsize: int
    limit: int | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        """Orders of its blocks, one where it is whole."""
        return split(self.order, self.limit)

    @property
    def squares(self) -> int:
        """Elements of the blocks: `n²` where it is whole."""
        return sum(m**2 for m in self.blocks)

    @property
    def thin(self) -> bool:
        return self.rank is not None and self.rank < self.order

    @property
    def columns(self) -> int:
        """Directions that are kept."""
        assert self.rank is not None or not self.thin
        return self.rank if self.thin and self.rank is not None else self.order

    @property
    def sketched(self) -> int:
        return min(self.order, self.columns + OVERSAMPLING)

    @property
    def accumulator(self) -> int:
        """Bytes: a packed triangle, or `Y [n, k + p]`."""
        if self.thin:
            return self.itemsize * self.order * self.sketched
        return self.itemsize * sum(map(packed_elements, self.blocks))

    @property
    def kept(self) -> int:
        """Bytes of it in a finished state: a sketch is freed."""
        return 0 if self.thin else self.accumulator

    @property
    def eigenvectors(self) -> int:
        return self.itemsize * (self.order * self.columns if self.thin else self.squares)

    @property
    def values(self) -> int:
        """Rows, or columns, of Λ: the directions, and one for the tail."""
        return self.columns + int(self.thin)

    def fill_flops(self, rows: float) -> float:
        """`N·n²` with symmetry, summed over blocks; or `4·N·n·(k + p)`: `Y += xᵀ(xΩ)`."""
        return 4.0 * rows * self.order * self.sketched if self.thin else rows * float(self.squares)

    def turn_flops(self, rows: float) -> float:
        """Of rotating rows into the basis: `2·N·n·k`, or `2·N·n²` summed over blocks."""
        return 2.0 * rows * (self.order * self.columns if self.thin else self.squares)

    def decompose_flops(self) -> float:
        """The floor of `eigh`, `10/3·n³`; or Nyström: two orthogonalisations, `8·n·(k + p)²`, and one small `eigh`."""
        if not self.thin:
            return sum(cost.eigh(m, torch.float32).flops for m in self.blocks)
        return 8.0 * self.order * self.sketched**2 + cost.eigh(self.sketched, torch.float32).flops

    def decompose_seconds(self, rates: Rates, dtype: torch.dtype) -> float:
        if not self.thin:
            return sum(rates.eigh(m, dtype) for m in self.blocks)
        return 8.0 * self.order * self.sketched**2 / rates.products(dtype) + rates.eigh(self.sketched, dtype)

    @property
    def decompose_bytes(self) -> int:
        """Workspace: the dense matrices of `eigh`, or three copies of the sketch.

        Of blocks, the eigenvectors of those that are done wait for the last, and are then laid end to end.
        """
        if self.thin:
            return 3 * self.itemsize * self.order * self.sketched
        return self.itemsize * max((EIGH_MATRICES - 1) * max(self.blocks) ** 2 + self.squares, 2 * self.squares)

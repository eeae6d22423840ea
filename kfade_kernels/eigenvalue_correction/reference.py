"""Definition of `eigenvalue_correction_` in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ..rotation.reference import basis
from ..syrk.reference import append_ones


def batch_of(g: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences there are."""
    return g.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def tokens_of(g: Tensor, cu_seqlens: Tensor | None) -> int:
    """Rows of a sequence, on average."""
    return -(-g.shape[:-1].numel() // max(1, batch_of(g, cu_seqlens)))


def sequences(batch: int, rows: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """First and last row of each sequence, among the rows of all of them laid end to end."""
    if cu_seqlens is None:
        tokens = rows // batch if batch else 0
        return [(b * tokens, (b + 1) * tokens) for b in range(batch)]
    return list(pairwise(cu_seqlens.tolist()))


def run(
    lam: Tensor,
    g: Tensor,
    a: Tensor,
    q_out: Tensor | None,
    q_in: Tensor | None,
    mask: Tensor | None,
    ones_column: bool,
    cu_seqlens: Tensor | None,
) -> None:
    parts = sequences(g.shape[0], g.shape[:-1].numel(), cu_seqlens)
    g, a = g.flatten(0, -2), a.flatten(0, -2)
    if mask is not None:
        dropped = ~mask.unsqueeze(1)
        g, a = g.masked_fill(dropped, 0), a.masked_fill(dropped, 0)
    g, a = g.to(lam.dtype), a.to(lam.dtype)
    if ones_column:
        a = append_ones(a)
    for start, stop in parts:
        gradient = g[start:stop].T @ a[start:stop]
        if q_out is not None:
            gradient = basis(q_out, lam.dtype).T @ gradient
        if q_in is not None:
            gradient = gradient @ basis(q_in, lam.dtype)
        lam.add_(gradient**2)

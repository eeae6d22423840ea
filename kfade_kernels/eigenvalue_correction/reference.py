"""Definition of `eigenvalue_correction_` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rotation.reference import basis
from ..syrk.reference import append_ones


def run(
    lam: Tensor,
    g: Tensor,
    a: Tensor,
    q_out: Tensor | None,
    q_in: Tensor | None,
    mask: Tensor | None,
    ones_column: bool,
) -> None:
    if mask is not None:
        keep = mask.view(*g.shape[:2], 1)
        g, a = g.masked_fill(~keep, 0), a.masked_fill(~keep, 0)
    g, a = g.to(lam.dtype), a.to(lam.dtype)
    if ones_column:
        a = append_ones(a)
    gradient = torch.einsum("bto,bti->boi", g, a)
    if q_out is not None:
        gradient = basis(q_out, lam.dtype).T @ gradient
    if q_in is not None:
        gradient = gradient @ basis(q_in, lam.dtype)
    lam.add_((gradient**2).sum(0))

"""Definition of `syrk_` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed import pack, unpack


def append_ones(x: Tensor) -> Tensor:
    """`x [..., n]` with one more column of ones, `[..., n + 1]`: the input column of a bias."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


def syrk(matrix: Tensor, x: Tensor, mask: Tensor | None, alpha: float, ones_column: bool) -> Tensor:
    """`matrix + alpha · xᵀ diag(mask) x`, dense `[n, n]`, in the dtype of `matrix`.

    A row whose mask is 0 is left out, whatever it holds (NaN too).
    """
    x = x.flatten(0, -2)
    if mask is not None:
        x = x[mask]
    x = x.to(matrix.dtype)
    if ones_column:
        x = append_ones(x)
    return matrix + alpha * (x.T @ x)


def run(
    packed: Tensor, order: int, x: Tensor, mask: Tensor | None, alpha: float, ones_column: bool, *_: object
) -> None:
    packed.copy_(pack(syrk(unpack(packed, order), x, mask, alpha, ones_column)))

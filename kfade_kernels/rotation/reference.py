"""Definition of `rotate` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..syrk.reference import append_ones


def basis(q: Tensor, dtype: torch.dtype) -> Tensor:
    """An eigenbasis `[n, m]` in `dtype`, from itself or from a bfloat16 pair `[2, n, m]`."""
    return q.to(dtype) if q.ndim == 2 else q.to(dtype).sum(0)


def result_dtype(x: Tensor, q: Tensor) -> torch.dtype:
    """bfloat16 for bfloat16 rows and a pair, else the dtype of q, float32 for a pair."""
    if q.ndim == 2:
        return q.dtype
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def run(x: Tensor, q: Tensor, ones_column: bool) -> Tensor:
    wide = torch.float32 if q.ndim == 3 else q.dtype
    rows = x.to(wide)
    if ones_column:
        rows = append_ones(rows)
    return (rows @ basis(q, wide)).to(result_dtype(x, q))

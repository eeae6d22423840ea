"""Definition of `sketch_` in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..syrk.reference import append_ones


def run(y: Tensor, trace: Tensor, x: Tensor, omega: Tensor, mask: Tensor | None, ones_column: bool) -> None:
    x = x.flatten(0, -2)
    if mask is not None:
        x = x[mask]
    x = x.to(y.dtype)
    if ones_column:
        x = append_ones(x)
    y.add_(x.T @ (x @ omega))
    trace.add_((x.to(trace.dtype) ** 2).sum())

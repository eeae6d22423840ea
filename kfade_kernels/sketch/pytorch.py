"""`sketch_` in PyTorch: two skinny products for some rows at a time, straight into the sum.

FLOPs: `4·N·n·l`. Rows of another dtype than the sum are upcast by `CHUNK_ROWS`; the projected rows `[CHUNK_ROWS, l]`
are the only other temporary. A column of ones is a row of Ω added to them, and their sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..syrk.pytorch import CHUNK_ROWS, kept_rows


def run(y: Tensor, trace: Tensor, x: Tensor, omega: Tensor, mask: Tensor | None, ones_column: bool) -> None:
    x = x.flatten(0, -2)
    kept = kept_rows(mask)
    if kept is not None:
        x = x.index_select(0, kept)
    width = x.shape[1]
    for start in range(0, x.shape[0], CHUNK_ROWS):
        rows = x[start : start + CHUNK_ROWS].to(y.dtype)
        projected = rows @ omega[:width]
        if ones_column:
            projected.add_(omega[width])
            y[width].add_(projected.sum(0))
            trace.add_(rows.shape[0])
        y[:width].addmm_(rows.T, projected)
        # Norms by rows: float32 then loses nothing to one long sum.
        trace.add_(torch.linalg.vector_norm(rows, dim=1).square_().sum(dtype=trace.dtype))


def refuses(y: Tensor, *_: object) -> str | None:
    return None if y.device.type in ("cpu", "cuda") else f"y is on {y.device}"


def configuration(y: Tensor, *_: object) -> str:
    return f"two {y.dtype} products for {CHUNK_ROWS} rows at a time"

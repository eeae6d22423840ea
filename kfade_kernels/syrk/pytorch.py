"""`syrk_` in PyTorch: GEMMs of block rows, straight into the packed lower triangle.

FLOPs: `N·n²` plus the upper parts of the diagonal blocks; half of a full product for large n. No copy
of x, unless rows are masked (they are dropped, which saves their FLOPs too) or, on a CPU, x is 16-bit
(upcast by `CHUNK_ROWS` rows; bfloat16 then runs through the bf16 units, see `precision`). A GPU multiplies
16-bit rows as they are, into a float32 block of `GPU_PANELS` panels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..packed import PANEL_ROWS, panels
from ..precision import HAS_BF16_OPERANDS, bf16_operands, float32_products, multiplies_as_they_are

CHUNK_ROWS = 4096
GPU_PANELS = 8


def upcast_chunks(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """x `[N, n]` in `dtype`: x itself where it has it already, else chunk by chunk."""
    if x.dtype == dtype:
        yield x
    else:
        for start in range(0, x.shape[0], CHUNK_ROWS):
            yield x[start : start + CHUNK_ROWS].to(dtype)


def _add_ones_row(last_panel: Tensor, x: Tensor, alpha: float) -> None:
    """The last row of the triangle: column sums, and the number of rows."""
    last_panel[-1, :-1].add_(x.sum(0, dtype=last_panel.dtype), alpha=alpha)
    last_panel[-1, -1].add_(alpha * x.shape[0])


def _add_on_gpu(packed: Tensor, order: int, x: Tensor, alpha: float) -> None:
    """16-bit rows: one product `[rows of a few panels, columns up to their end]` with float32 result at a time."""
    width = x.shape[1]
    all_panels = list(panels(order))
    for first in range(0, len(all_panels), GPU_PANELS):
        together = all_panels[first : first + GPU_PANELS]
        start, stop = together[0].start, min(together[-1].stop, width)
        if start >= stop:
            return
        product = torch.mm(x[:, start:stop].T, x[:, :stop], out_dtype=packed.dtype)
        for panel in together:
            end = min(panel.stop, width)
            rows = end - panel.start
            if rows > 0:
                target = panel.view(packed)[:rows, :end]
                target.add_(product[panel.start - start : end - start, :end], alpha=alpha)


def kept_rows(mask: Tensor | None) -> Tensor | None:
    """Numbers of the rows that a mask `[N]` keeps, or None where it keeps all; a GPU is waited for."""
    if mask is None:
        return None
    kept = mask.nonzero().squeeze(1)
    return None if kept.shape[0] == mask.shape[0] else kept


def run(
    packed: Tensor, order: int, x: Tensor, mask: Tensor | None, alpha: float, ones_column: bool, allow_tf32: bool
) -> None:
    add(packed, order, x, kept_rows(mask), alpha, ones_column, allow_tf32)


def add(
    packed: Tensor, order: int, x: Tensor, kept: Tensor | None, alpha: float, ones_column: bool, allow_tf32: bool
) -> None:
    """The update by rows `x [..., n]`, of which those numbered `kept [P]` count, or all."""
    x = x.flatten(0, -2)
    if kept is not None:
        x = x.index_select(0, kept)
    if x.shape[0] == 0:
        return
    width = x.shape[1]
    *_above, last = panels(order)
    if multiplies_as_they_are(x, packed.dtype):
        _add_on_gpu(packed, order, x, alpha)
        if ones_column:
            _add_ones_row(last.view(packed), x, alpha)
        return
    exact_in_bf16 = x.dtype == torch.bfloat16 and packed.dtype == torch.float32
    for chunk in upcast_chunks(x, packed.dtype):
        with float32_products(allow_tf32=allow_tf32), bf16_operands(exact_in_bf16):
            for panel in panels(order):
                rows = min(panel.stop, width) - panel.start
                if rows > 0:
                    target = panel.view(packed)[:rows, : panel.start + rows]
                    block = chunk[:, panel.start : panel.start + rows]
                    target.addmm_(block.T, chunk[:, : panel.start + rows], alpha=alpha)
        if ones_column:
            _add_ones_row(last.view(packed), chunk, alpha)


def refuses(packed: Tensor, order: int, x: Tensor, *_: object) -> str | None:
    return None if x.device.type in ("cpu", "cuda") else f"x is on {x.device}"


def configuration(packed: Tensor, order: int, x: Tensor, *_: object) -> str:
    product = "bf16 operands" if x.dtype == torch.bfloat16 and HAS_BF16_OPERANDS else str(packed.dtype)
    return f"{len(list(panels(order)))} panels of {PANEL_ROWS} rows, {product}, accumulated in {packed.dtype}"

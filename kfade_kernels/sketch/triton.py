"""`sketch_` by Triton: two grouped products, the second summed over parts of the rows in a fixed order.

FLOPs: `4·N·n·l`, in float32 grade, 16-bit rows widened in registers. Bytes at least: x three times (for each product
and for the trace), the projected rows `[N, l]` twice, y read and written, and each part `[n, l]` twice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import triton_support as support
from ..devices import of_tensors
from ..product.triton import Product, configure, multiply, operand
from ..syrk.pytorch import kept_rows
from . import split


def _part_rows(x: Tensor, columns: int) -> int:
    is_aligned = x.shape[-1] % 8 == 0
    c = configure(x.device, x.dtype, torch.float32, max(x.shape[-1], columns), is_aligned)
    return split.part_rows(x.shape[:-1].numel(), x.shape[-1], columns, c, of_tensors(x.device))


def run(y: Tensor, trace: Tensor, x: Tensor, omega: Tensor, mask: Tensor | None, ones_column: bool) -> None:
    x = support.rows_of(x)
    kept = kept_rows(mask)
    x = operand(x if kept is None else x.index_select(0, kept))
    rows, width = x.shape
    if not rows:
        return
    columns = omega.shape[1]
    # Ranks are round numbers and l is not: whole pieces of 16 bytes let the loads be asynchronous.
    omega = pad(omega, (0, -columns % 4)).contiguous()
    projected = omega.new_empty(rows, omega.shape[1])
    last = omega[width].clone() if ones_column else None
    multiply([Product(x, omega[:width], projected, finish="row" if ones_column else "", first=last)])
    step = _part_rows(x, columns)
    starts = range(0, rows, step)
    parts = omega.new_empty(len(starts), width, omega.shape[1])
    multiply([Product(x[s : s + step].T, projected[s : s + step], part) for s, part in zip(starts, parts, strict=True)])
    y[:width].add_(parts.sum(0)[:, :columns])
    if ones_column:
        y[width].add_(projected.sum(0)[:columns])
        trace.add_(rows)
    trace.add_(torch.linalg.vector_norm(x, dim=1, dtype=y.dtype).square_().sum(dtype=trace.dtype))


def refuses(y: Tensor, trace: Tensor, x: Tensor, omega: Tensor, *_: object) -> str | None:
    reason = support.refusal("sketch_", "y", y.device, (y.dtype, x.dtype))
    if reason is None and 0 in (x.shape[-1], omega.shape[1]):
        return "x has no columns" if x.shape[-1] == 0 else "omega has no columns"
    return reason


def configuration(y: Tensor, trace: Tensor, x: Tensor, omega: Tensor, *_: object) -> str:
    c = configure(x.device, x.dtype, torch.float32, max(y.shape[0], omega.shape[1]), x.shape[-1] % 8 == 0)
    return f"two products, parts of {_part_rows(x, omega.shape[1])} rows, tiles of {c}"

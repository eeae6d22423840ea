"""`accumulate_factors_` in C++: the problems one after the other, each of them already parallel (see `syrk.cpu`)."""

from __future__ import annotations

from torch import Tensor

from .. import cpu_support as support
from ..syrk import cpu as syrk


def run(
    packed: list[Tensor],
    orders: list[int],
    rows: list[Tensor],
    masks: list[Tensor | None],
    ones_columns: list[bool],
    allow_tf32: bool,
) -> None:
    for matrix, order, x, mask, ones in zip(packed, orders, rows, masks, ones_columns, strict=True):
        syrk.run(matrix, order, x, mask, 1.0, ones, allow_tf32)


def refuses(packed: list[Tensor], orders: list[int], rows: list[Tensor], *_: object) -> str | None:
    if not rows:
        return "there are no problems"
    reasons = (syrk.refuses(*parts) for parts in zip(packed, orders, rows, strict=True))
    return next((f"rows[{i}]: {reason}" for i, reason in enumerate(reasons) if reason is not None), None)


def configuration(packed: list[Tensor], orders: list[int], rows: list[Tensor], *_: object) -> str:
    pairs = support.in_pairs(x.dtype for x in rows)
    return f"{len(rows)} problems in turn, orders {sorted(set(orders))}, {support.describe(pairs)}"

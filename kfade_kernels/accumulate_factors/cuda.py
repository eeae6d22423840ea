"""`accumulate_factors_` in CUDA: the triangles of many layers in one launch (see `syrk.cuda`)."""

from __future__ import annotations

from torch import Tensor

from ..syrk import cuda as syrk
from .triton import problems_of


def run(
    packed: list[Tensor],
    orders: list[int],
    rows: list[Tensor],
    masks: list[Tensor | None],
    ones_columns: list[bool],
    allow_tf32: bool,
) -> None:
    syrk.add_outer_products(problems_of(packed, orders, rows, masks, ones_columns), 1.0)


def refuses(packed: list[Tensor], orders: list[int], rows: list[Tensor], *_: object) -> str | None:
    if not rows:
        return "there are no problems"
    return syrk.gate("accumulate_factors_", packed, orders, {f"rows[{i}]": x for i, x in enumerate(rows)})


def configuration(
    packed: list[Tensor],
    orders: list[int],
    rows: list[Tensor],
    masks: list[Tensor | None],
    ones_columns: list[bool],
    allow_tf32: bool,
) -> str:
    return syrk.describe(problems_of(packed, orders, rows, masks, ones_columns))

"""`accumulate_factors_` by Triton: the triangles of many layers in one launch (see `syrk.triton`).

One layer's factors have too few tiles to fill a device below order 2,048; those of a block of layers do.
"""

from __future__ import annotations

from torch import Tensor

from ..syrk import triton as syrk


def problems_of(
    packed: list[Tensor], orders: list[int], rows: list[Tensor], masks: list[Tensor | None], ones_columns: list[bool]
) -> list[syrk.Problem]:
    return [syrk.problem(*parts) for parts in zip(packed, orders, rows, masks, ones_columns, strict=True)]


def run(
    packed: list[Tensor],
    orders: list[int],
    rows: list[Tensor],
    masks: list[Tensor | None],
    ones_columns: list[bool],
    allow_tf32: bool,
) -> None:
    syrk.add_outer_products(problems_of(packed, orders, rows, masks, ones_columns), 1.0, allow_tf32)


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
    return syrk.describe(problems_of(packed, orders, rows, masks, ones_columns), allow_tf32)

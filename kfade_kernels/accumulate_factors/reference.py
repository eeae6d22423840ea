"""Definition of `accumulate_factors_`: one `syrk_` a problem."""

from __future__ import annotations

from torch import Tensor

from ..syrk import reference as syrk_reference


def run(
    packed: list[Tensor],
    orders: list[int],
    rows: list[Tensor],
    masks: list[Tensor | None],
    ones_columns: list[bool],
    allow_tf32: bool,
) -> None:
    for matrix, order, x, mask, ones in zip(packed, orders, rows, masks, ones_columns, strict=True):
        syrk_reference.run(matrix, order, x, mask, 1.0, ones, allow_tf32)

"""`accumulate_factors_` in PyTorch: the problems one after the other, each of them already parallel."""

from __future__ import annotations

from torch import Tensor

from ..syrk import pytorch as syrk_pytorch


def run(
    packed: list[Tensor],
    orders: list[int],
    rows: list[Tensor],
    masks: list[Tensor | None],
    ones_columns: list[bool],
    allow_tf32: bool,
) -> None:
    # Problems share their mask, and a GPU is waited for each time that one is looked at.
    kept = {id(mask): syrk_pytorch.kept_rows(mask) for mask in {id(mask): mask for mask in masks}.values()}
    for matrix, order, x, mask, ones in zip(packed, orders, rows, masks, ones_columns, strict=True):
        syrk_pytorch.add(matrix, order, x, kept[id(mask)], 1.0, ones, allow_tf32)


def refuses(packed: list[Tensor], orders: list[int], rows: list[Tensor], *_: object) -> str | None:
    elsewhere = [str(x.device) for x in rows if x.device.type not in ("cpu", "cuda")]
    return f"rows are on {elsewhere[0]}" if elsewhere else None


def configuration(packed: list[Tensor], orders: list[int], rows: list[Tensor], *_: object) -> str:
    return f"{len(rows)} problems in turn, orders {sorted(set(orders))}"

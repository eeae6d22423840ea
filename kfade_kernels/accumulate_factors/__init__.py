"""`accumulate_factors_`: both Kronecker factors of a layer, or of many layers, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments as check
from ..dispatch import Backend, declare
from ..packed import PackedSymmetric
from ..syrk import check_rows
from . import cpu, cuda, pytorch, reference, triton

Accumulators = PackedSymmetric | Sequence[PackedSymmetric]
Rows = Tensor | Sequence[Tensor]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _same_length(first_name: str, first: list[Any], second_name: str, second: list[Any]) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"{second_name} has {len(second)} entries; it must have {len(first)}, one for each entry of {first_name}"
        )


def _row_masks(mask: Tensor | None, rows: list[Tensor]) -> list[Tensor | None]:
    """A flat mask for each problem: the same tensor for all whose rows have one shape, made once."""
    if mask is None:
        return [None] * len(rows)
    made: dict[tuple[torch.Size, torch.device], Tensor] = {}
    for x in rows:
        key = x.shape[:-1], x.device
        if key not in made:
            made[key] = check.row_mask("mask", mask, *key)
    return [made[x.shape[:-1], x.device] for x in rows]


def _prepare(
    acc_a: Accumulators,
    acc_s: Accumulators,
    a: Rows,
    g: Rows,
    mask: Tensor | None = None,
    *,
    ones_column: bool | Sequence[bool] = False,
    allow_tf32: bool = False,
) -> tuple[Any, ...]:
    inputs, outputs = _as_list(acc_a), _as_list(acc_s)
    a_rows, g_rows = _as_list(a), _as_list(g)
    _same_length("acc_a", inputs, "a", a_rows)
    _same_length("acc_s", outputs, "g", g_rows)
    ones = [ones_column] * len(inputs) if isinstance(ones_column, bool) else list(ones_column)
    _same_length("acc_a", inputs, "ones_column", ones)
    for i, (acc, x, one) in enumerate(zip(inputs, a_rows, ones, strict=True)):
        check_rows(f"acc_a[{i}]", acc, f"a[{i}]", x, one)
    for i, (acc, x) in enumerate(zip(outputs, g_rows, strict=True)):
        check_rows(f"acc_s[{i}]", acc, f"g[{i}]", x, False)
    accumulators = inputs + outputs
    return (
        [acc.data for acc in accumulators],
        [acc.n for acc in accumulators],
        a_rows + g_rows,
        _row_masks(mask, a_rows + g_rows),
        ones + [False] * len(outputs),
        check.flag("allow_tf32", allow_tf32),
    )


_accumulate = declare(
    "accumulate_factors_",
    "(Tensor(a!)[] packed, int[] orders, Tensor[] rows, Tensor?[] masks, bool[] ones_columns, bool allow_tf32) -> ()",
    _prepare,
    lambda *_: None,
    [
        Backend("cuda", cuda.run, cuda.refuses, cuda.configuration),
        Backend("triton", triton.run, triton.refuses, triton.configuration),
        Backend("cpu", cpu.run, cpu.refuses, cpu.configuration),
        Backend("pytorch", pytorch.run, pytorch.refuses, pytorch.configuration),
        Backend("reference", reference.run),
    ],
    labels={"packed": "acc_a and acc_s", "rows": "a and g"},
)


def accumulate_factors_(
    acc_a: Accumulators,
    acc_s: Accumulators,
    a: Rows,
    g: Rows,
    mask: Tensor | None = None,
    *,
    ones_column: bool | Sequence[bool] = False,
    allow_tf32: bool = False,
) -> None:
    """Add `Σ a aᵀ` to the input factors and `Σ g gᵀ` to the output factors, in place.

    One layer, or lists of layers whose problems may differ in order and in number of rows. The
    lists of inputs and of outputs need not be equally long: layers that share their input (q/k/v,
    gate/up) bring one entry of `a` and several of `g`.

    Args:
        acc_a: accumulator(s) of the input factors, order d_in (+ 1 with a column of ones).
        acc_s: accumulator(s) of the output factors, order d_out.
        a: layer inputs `[N, d_in]` or `[B, T, d_in]`.
        g: gradients of the layer outputs `[N, d_out]` or `[B, T, d_out]`.
        mask: 0/1 `[N]` or `[B, T]`, common to all rows; a row whose mask is 0 is left out.
        ones_column: for each input, whether a last column of ones is implied (a layer with a bias).
        allow_tf32: as `syrk_`.

    Raises:
        TypeError, ValueError: as `syrk_`, naming the entry.

    Cost: `N·(d_in² + d_out²)` FLOPs a layer.
    """
    _accumulate(*_prepare(acc_a, acc_s, a, g, mask, ones_column=ones_column, allow_tf32=allow_tf32))

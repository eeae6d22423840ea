"""`apply_update_`: add an update to many weights at once, and where asked for measure it on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments as check
from ..dispatch import Backend, declare, refuse_gradients
from . import pytorch, reference, triton

_ANY_NDIM = range(64)


def _as_list(name: str, value: object) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a list of tensors")
    return list(value)


def _check_like_weights(name: str, values: list[Any], weights: list[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    if len(values) != len(weights):
        raise ValueError(
            f"{name} has {len(values)} entries; it must have {len(weights)}, one for each entry of weights"
        )
    for i, (value, weight) in enumerate(zip(values, weights, strict=True)):
        check.tensor(f"{name}[{i}]", value, dtypes=dtypes, ndim=_ANY_NDIM)
        check.shape(f"{name}[{i}]", value, weight.shape, f"the shape of weights[{i}]")
        check.same_device(f"{name}[{i}]", value, f"weights[{i}]", weight.device)


def _prepare(
    weights: Sequence[Tensor],
    deltas: Sequence[Tensor],
    scale: float = 1.0,
    gradients: Sequence[Tensor] | None = None,
) -> tuple[Any, ...]:
    targets, added = _as_list("weights", weights), _as_list("deltas", deltas)
    for i, weight in enumerate(targets):
        check.tensor(f"weights[{i}]", weight, ndim=_ANY_NDIM)
        check.same_device(f"weights[{i}]", weight, "weights[0]", targets[0].device)
    _check_like_weights("deltas", added, targets, check.STATES)
    along = None if gradients is None else _as_list("gradients", gradients)
    if along is not None:
        _check_like_weights("gradients", along, targets, check.FLOATS)
    return targets, added, check.finite("scale", scale), along


def _fake(weights: list[Tensor], deltas: list[Tensor], scale: float, gradients: list[Tensor] | None) -> Tensor:
    return reference.no_sums(weights) if gradients is None else reference.zero_sums(weights)


_apply = declare(
    "apply_update_",
    "(Tensor(a!)[] weights, Tensor[] deltas, float scale, Tensor[]? gradients) -> Tensor",
    _prepare,
    _fake,
    [
        Backend("triton", triton.run, triton.refuses, triton.configuration),
        Backend("pytorch", pytorch.run, pytorch.refuses, pytorch.configuration),
        Backend("reference", reference.run),
    ],
)


def apply_update_(
    weights: Sequence[Tensor],
    deltas: Sequence[Tensor],
    scale: float = 1.0,
    gradients: Sequence[Tensor] | None = None,
) -> Tensor:
    """Add `scale · Δ` to weights, in place; with gradients return `‖scale · Δ‖²` and `scale · ⟨Δ, gradient⟩`.

    The two numbers predict what the update does to the model without any product with the Fisher matrix F.
    For `Δ = (F + λI)⁻¹ v` we have `F Δ = v − λΔ`, so the predicted KL is
    `½ ΔᵀFΔ = ½ (⟨Δ, v⟩ − λ‖Δ‖²)`; scaled by s it is `½ (s · s⟨Δ, v⟩ − λ‖sΔ‖²)`. λ must be the same for all
    weights of a call: with a damping a layer, call once a layer.

    Args:
        weights: of any float dtype and shape, all on one device; none may overlap another in memory. They
            may require gradients; autograd does not see the addition.
        deltas: float32 or float64, one for each weight, of its shape; they share no memory with the weights.
        scale: of the whole update.
        gradients: the v above, of any float dtype, one for each weight and of its shape; None for the plain
            addition, without the two numbers.

    Returns:
        `[2]` float64, on the device of the weights: the squared norm, and the product with the gradients;
        `[0]` without gradients. The weight is computed in the wider dtype of weight and delta (float32 at
        least) and rounded once to its own; the two numbers are of Δ itself, not of what rounding left of it.

    Raises:
        TypeError: an argument is not of its type or dtype.
        ValueError: lengths, shapes or devices do not agree, `scale` is not finite, weights overlap, or a
            delta or gradient requires a gradient; nothing is changed then.

    Cost: every weight is read and written once, every delta and gradient read once (on a CPU the two numbers
    take about four times as long as a float32 addition).
    """
    arguments = _prepare(weights, deltas, scale, gradients)
    if torch.is_grad_enabled():
        refuse_gradients("apply_update_", {"deltas": arguments[1], "gradients": arguments[3]})
    with torch.no_grad():
        result: Tensor = _apply(*arguments)
    return result

"""Definition of `apply_update_` in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def require_distinct(weights: list[Tensor]) -> None:
    """Raise ValueError for weights that share memory: their sum would depend on the order of additions.

    Ranges of addresses are compared, so views that interleave count as sharing.
    """
    ranges = []
    for i, w in enumerate(weights):
        if any(step == 0 and size > 1 for size, step in zip(w.shape, w.stride(), strict=True)):
            raise ValueError(f"weights[{i}] has strides {list(w.stride())}; an expanded tensor cannot be added to")
        if w.numel():
            last = sum((size - 1) * step for size, step in zip(w.shape, w.stride(), strict=True))
            ranges.append((w.data_ptr(), w.data_ptr() + (last + 1) * w.element_size(), i))
    ranges.sort()
    for (_, end, i), (start, _, j) in pairwise(ranges):
        if start < end:
            first, second = sorted((i, j))
            raise ValueError(
                f"weights[{first}] and weights[{second}] overlap in memory; each weight must be given once"
            )


def zero_sums(weights: list[Tensor]) -> Tensor:
    """Squared norm and product with the gradients of nothing, `[2]` float64 where the weights are."""
    return torch.zeros(2, dtype=torch.float64, device=weights[0].device if weights else None)


def no_sums(weights: list[Tensor]) -> Tensor:
    """What is returned without gradients, `[0]` float64."""
    return torch.empty(0, dtype=torch.float64, device=weights[0].device if weights else None)


def run(weights: list[Tensor], deltas: list[Tensor], scale: float, gradients: list[Tensor] | None) -> Tensor:
    require_distinct(weights)
    total = zero_sums(weights)
    for delta, gradient in zip(deltas, gradients or [], strict=False):
        step = scale * delta.double()
        total += torch.stack([step.square().sum(), (step * gradient.double()).sum()])
    for weight, delta in zip(weights, deltas, strict=True):
        wide = torch.promote_types(weight.dtype, delta.dtype)
        weight.copy_(weight.to(wide) + scale * delta.to(wide))
    return no_sums(weights) if gradients is None else total

"""`apply_update_` in PyTorch: one addition a tensor; with gradients a loop over pieces of each tensor.

On a CPU a piece stays in cache while it is added, widened to float64 and summed; whole tensors would
write their widened copies to memory. `torch._foreach_add_` is the same loop there, as fast.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import no_sums, require_distinct, zero_sums

# Elements of a piece: two float64 copies fit in a second-level cache; a GPU wants long launches.
CPU_PIECE, GPU_PIECE = 1 << 17, 1 << 24


def _pieces(weight: Tensor, delta: Tensor, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Flat pieces of the three; of a weight that has no flat view, the whole of it."""
    if not weight.is_contiguous():
        yield weight, delta, gradient
        return
    flat = weight.view(-1), delta.reshape(-1), gradient.reshape(-1)
    size = CPU_PIECE if weight.device.type == "cpu" else GPU_PIECE
    for start in range(0, weight.numel(), size):
        w, d, g = (x[start : start + size] for x in flat)
        yield w, d, g


def run(weights: list[Tensor], deltas: list[Tensor], scale: float, gradients: list[Tensor] | None) -> Tensor:
    require_distinct(weights)
    if gradients is None:
        for weight, delta in zip(weights, deltas, strict=True):
            weight.add_(delta, alpha=scale)
        return no_sums(weights)
    sums = [zero_sums(weights)]
    for whole in zip(weights, deltas, gradients, strict=True):
        for weight, delta, gradient in _pieces(*whole):
            d, g = delta.double().reshape(-1), gradient.double().reshape(-1)
            sums.append(torch.stack([torch.dot(d, d) * scale**2, torch.dot(d, g) * scale]))
            weight.add_(delta, alpha=scale)
    return torch.stack(sums).sum(0)


def refuses(weights: list[Tensor], *_: object) -> str | None:
    elsewhere = [str(w.device) for w in weights if w.device.type not in ("cpu", "cuda")]
    return f"weights are on {elsewhere[0]}" if elsewhere else None


def configuration(weights: list[Tensor], _deltas: object, _scale: object, gradients: list[Tensor] | None) -> str:
    if gradients is None:
        return f"{len(weights)} tensors in turn"
    size = GPU_PIECE if any(w.is_cuda for w in weights) else CPU_PIECE
    return f"{len(weights)} tensors in turn, {size} elements at a time"

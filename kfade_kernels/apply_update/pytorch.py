"""`apply_update_` in PyTorch: a loop over pieces of each tensor.

On a CPU a piece stays in cache while it is added, widened to float64 and summed; whole tensors would
write their widened copies to memory. `torch._foreach_add_` is the same loop there, without pieces.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import require_distinct

# Elements of a piece: two float64 copies fit in a second-level cache; a GPU wants long launches.
CPU_PIECE, GPU_PIECE = 1 << 17, 1 << 24


def _pieces(weight: Tensor, delta: Tensor, gradient: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Flat pieces of the three; of a weight that has no flat view, the whole of it."""
    if not weight.is_contiguous():
        yield weight, delta, gradient
        return
    size = CPU_PIECE if weight.device.type == "cpu" else GPU_PIECE
    w, d = weight.view(-1), delta.reshape(-1)
    g = None if gradient is None else gradient.reshape(-1)
    for start in range(0, w.numel(), size):
        part = slice(start, start + size)
        yield w[part], d[part], None if g is None else g[part]


def run(weights: list[Tensor], deltas: list[Tensor], scale: float, gradients: list[Tensor]) -> Tensor:
    require_distinct(weights)
    zero = torch.zeros((), dtype=torch.float64, device=weights[0].device if weights else None)
    squares, products = [zero], [zero]
    for i, (weight, delta) in enumerate(zip(weights, deltas, strict=True)):
        for w, d, g in _pieces(weight, delta, gradients[i] if gradients else None):
            wide = d.double().reshape(-1)
            squares.append(torch.dot(wide, wide))
            if g is not None:
                products.append(torch.dot(wide, g.double().reshape(-1)))
            w.add_(d, alpha=scale)
    return torch.stack([torch.stack(squares).sum() * scale**2, torch.stack(products).sum() * scale])


def refuses(weights: list[Tensor], *_: object) -> str | None:
    elsewhere = [str(w.device) for w in weights if w.device.type not in ("cpu", "cuda")]
    return f"weights are on {elsewhere[0]}" if elsewhere else None


def configuration(weights: list[Tensor], *_: object) -> str:
    size = GPU_PIECE if any(w.is_cuda for w in weights) else CPU_PIECE
    return f"{len(weights)} tensors in turn, {size} elements at a time"

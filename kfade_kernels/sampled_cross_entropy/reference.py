"""Definition of `sampled_cross_entropy` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    uniform: Tensor | None,
    labels: Tensor | None,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = x if weight is None else torch.nn.functional.linear(x, weight, bias)
    log_p = logits.to(compute_dtype(x.dtype)).log_softmax(-1)
    p = log_p.exp()
    if labels is None:
        assert uniform is not None
        reached = p.cumsum(-1) > uniform.to(p.dtype).unsqueeze(-1)
        # Rounding may leave the last sum below the uniform: then the last word is meant.
        labels = torch.where(reached.any(-1), reached.int().argmax(-1), p.shape[-1] - 1)
    column = labels.unsqueeze(-1)
    nll = -log_p.gather(-1, column).squeeze(-1)
    grad = p.scatter_add(-1, column, -torch.ones_like(p[:, :1]))
    if weight is not None:
        grad = grad @ weight.to(grad.dtype)
    return labels.clone(), grad.to(x.dtype), nll

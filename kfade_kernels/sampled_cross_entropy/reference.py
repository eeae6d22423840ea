"""Definition of `sampled_cross_entropy` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import gumbel_noise


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    uniform: Tensor | None,
    labels: Tensor | None,
    keys: Tensor | None,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = x if weight is None else torch.nn.functional.linear(x, weight, bias)
    logits = logits.to(compute_dtype(x.dtype))
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    if keys is not None:
        words = torch.arange(p.shape[-1], device=x.device)
        labels = (logits + gumbel_noise(keys.unsqueeze(-1), words, logits.dtype)).argmax(-1)
    elif uniform is not None:
        reached = p.cumsum(-1) > uniform.to(p.dtype).unsqueeze(-1)
        # Rounding may leave the last sum below the uniform: then the last word is meant.
        labels = torch.where(reached.any(-1), reached.int().argmax(-1), p.shape[-1] - 1)
    assert labels is not None
    column = labels.unsqueeze(-1)
    nll = -log_p.gather(-1, column).squeeze(-1)
    grad = p.scatter_add(-1, column, -torch.ones_like(p[:, :1]))
    if weight is not None:
        grad = grad @ weight.to(grad.dtype)
    return labels.clone(), grad.to(x.dtype), nll

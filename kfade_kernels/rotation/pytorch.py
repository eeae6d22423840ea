"""`rotate` in PyTorch: one product, or two 16-bit ones with a bfloat16 pair."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import basis


def run(x: Tensor, q: Tensor, ones_column: bool) -> Tensor:
    if q.ndim == 3 and x.dtype == torch.bfloat16:
        return _rotate_pair(x, q, ones_column)
    q = basis(q, torch.float32 if q.ndim == 3 else q.dtype)
    rows = q.shape[0] - int(ones_column)
    rotated = x.to(q.dtype) @ q[:rows]
    return rotated.add_(q[rows]) if ones_column else rotated


def _rotate_pair(x: Tensor, q: Tensor, ones_column: bool) -> Tensor:
    rows = q.shape[1] - int(ones_column)
    flat = x.reshape(-1, x.shape[-1])
    high, low = q.unbind(0)
    rotated = flat @ high[:rows]
    if ones_column:
        rotated.add_(high[rows])
        low_part = torch.addmm(low[rows], flat, low[:rows])
        return rotated.add_(low_part).view(*x.shape[:-1], -1)
    return torch.addmm(rotated, flat, low).view(*x.shape[:-1], -1)


def refuses(x: Tensor, *_: object) -> str | None:
    return None if x.device.type in ("cpu", "cuda") else f"x is on {x.device}"


def configuration(x: Tensor, q: Tensor, ones_column: bool) -> str:
    pair = q.ndim == 3 and x.dtype == torch.bfloat16
    return "two bfloat16 products" if pair else f"one {torch.float32 if q.ndim == 3 else q.dtype} product"

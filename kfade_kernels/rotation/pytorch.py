"""`rotate` in PyTorch: one product, of twice the depth with a bfloat16 pair."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import multiplies_bf16
from .reference import basis, result_dtype


def _as_pair(x: Tensor, q: Tensor) -> bool:
    """Whether the two parts of a pair are multiplied as they are, and not added up first."""
    return q.ndim == 3 and x.dtype == torch.bfloat16 and multiplies_bf16(x.device.type)


def run(x: Tensor, q: Tensor, ones_column: bool) -> Tensor:
    if _as_pair(x, q):
        return _rotate_pair(x, q, ones_column)
    dtype = result_dtype(x, q)
    q = basis(q, torch.float32 if q.ndim == 3 else q.dtype)
    rows = q.shape[0] - int(ones_column)
    rotated = x.to(q.dtype) @ q[:rows]
    return (rotated.add_(q[rows]) if ones_column else rotated).to(dtype)


def _rotate_pair(x: Tensor, q: Tensor, ones_column: bool) -> Tensor:
    """`[x, x] · [high; low]`: one product, whose sum over both parts is rounded to bfloat16 once."""
    flat = x.reshape(-1, x.shape[-1])
    part = [flat, flat.new_ones(flat.shape[0], 1)] if ones_column else [flat]
    rotated = torch.cat(part + part, dim=1) @ q.flatten(0, 1)
    return rotated.view(*x.shape[:-1], q.shape[-1])


def refuses(x: Tensor, *_: object) -> str | None:
    return None if x.device.type in ("cpu", "cuda") else f"x is on {x.device}"


def configuration(x: Tensor, q: Tensor, ones_column: bool) -> str:
    if _as_pair(x, q):
        return "one bfloat16 product of twice the depth"
    return f"one {torch.float32 if q.ndim == 3 else q.dtype} product"

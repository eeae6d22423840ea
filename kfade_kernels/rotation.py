"""Rotation of token rows into an eigenbasis, `x Q`, with the precision that the basis needs."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import no_autocast


def rotates_tokens(tokens: int, other_width: int) -> bool:
    """Whether rotating the tokens of one side is cheaper than rotating the gradient."""
    return tokens < other_width


def rotate(x: Tensor, q: Tensor, *, ones_column: bool = False) -> Tensor:
    """`x q`, or `[x, 1] q` with a column of ones.

    Args:
        x: rows `[..., n]`, any float dtype.
        q: `[n, m]` in float32 or float64, or a bfloat16 pair `[2, n, m]` from `bf16_pair`; with
            `ones_column`, n + 1 in the place of n.
        ones_column: whether x stands for x with one last column of ones.

    Returns:
        `[..., m]`: bfloat16 when both x and the pair are, else the dtype of q
        (float32 for a pair).

    A bfloat16 pair costs two 16-bit products; the part of x along large eigendirections that the
    rounding of `high` lets through is taken back by `low`.
    """
    with no_autocast():
        if q.ndim == 3 and x.dtype == torch.bfloat16:
            return _rotate_pair(x, q, ones_column)
        if q.ndim == 3:
            q = q[0].float().add_(q[1])
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

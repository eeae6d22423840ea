"""`rotate`: token rows into an eigenbasis, `x Q`, with the precision that the basis needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments as check
from ..dispatch import Backend, Derivative, declare
from . import pytorch, reference, triton
from .reference import result_dtype


def rotates_tokens(tokens: int, other_width: int) -> bool:
    """Whether rotating the tokens of one side is cheaper than rotating the gradient."""
    return tokens < other_width


def check_basis(name: str, q: Tensor, rows: int, columns: int | None, like_name: str, device: torch.device) -> None:
    """Check eigenvectors `[rows, columns]`, or a bfloat16 pair `[2, rows, columns]` of them."""
    check.tensor(name, q, dtypes=(torch.bfloat16, *check.STATES), ndim=(2, 3))
    if (q.ndim == 3) != (q.dtype == torch.bfloat16):
        raise TypeError(
            f"{name} is {q.dtype} with shape {list(q.shape)}; it must be float32 or float64 [n, m],"
            " or a bfloat16 pair [2, n, m] (see bf16_pair)"
        )
    width = q.shape[-1] if columns is None else columns
    expected = [rows, width] if q.ndim == 2 else [2, rows, width]
    check.shape(name, q, expected, f"rows as the unrotated side, columns as {like_name}")
    check.same_device(name, q, like_name, device)


def _prepare(x: Tensor, q: Tensor, *, ones_column: bool = False) -> tuple[Any, ...]:
    check.tensor("x", x, ndim=(1, 2, 3))
    check_basis("q", q, x.shape[-1] + int(ones_column), None, "x", x.device)
    return x, q, ones_column


def _fake(x: Tensor, q: Tensor, ones_column: bool) -> Tensor:
    return torch.empty(*x.shape[:-1], q.shape[-1], dtype=result_dtype(x, q), device=x.device)


def _save(ctx: Any, arguments: Sequence[Any], _result: Any) -> None:
    x, q, _ = arguments
    ctx.dtype, ctx.width = x.dtype, x.shape[-1]
    ctx.save_for_backward(q)


def _backward(ctx: Any, _needs: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`grad Qᵀ`, without the row of Q that belongs to the ones."""
    (grad,), (q,) = grads, ctx.saved_tensors
    return [None if grad is None else _rotate(grad, q[..., : ctx.width, :].mT, False).to(ctx.dtype)]


_rotate = declare(
    "rotate",
    "(Tensor x, Tensor q, bool ones_column) -> Tensor",
    _prepare,
    _fake,
    [
        Backend("triton", triton.run, triton.refuses, triton.configuration),
        Backend("pytorch", pytorch.run, pytorch.refuses, pytorch.configuration),
        Backend("reference", reference.run),
    ],
    derivative=Derivative(("x",), _save, _backward),
)


def rotate(x: Tensor, q: Tensor, *, ones_column: bool = False) -> Tensor:
    """`x q`, or `[x, 1] q` with a column of ones.

    Args:
        x: rows `[..., n]`, any float dtype.
        q: `[n, m]` in float32 or float64, or a bfloat16 pair `[2, n, m]` from `bf16_pair`; with
            `ones_column`, n + 1 in the place of n.
        ones_column: whether x stands for x with one last column of ones.

    Returns:
        `[..., m]`: bfloat16 when both x and the pair are, else the dtype of q (float32 for a pair).

    Raises:
        TypeError: an argument is not of its type or dtype.
        ValueError: shapes or devices do not agree, or q requires a gradient.

    Autograd goes through x, as often as you like: the gradient is `grad qᵀ`, one more call.

    A bfloat16 pair costs two 16-bit products; the part of x along large eigendirections that the
    rounding of the high part lets through is taken back by the low part. Cost: `2·N·n·m` FLOPs, twice that
    with a pair.
    """
    result: Tensor = _rotate(*_prepare(x, q, ones_column=ones_column))
    return result

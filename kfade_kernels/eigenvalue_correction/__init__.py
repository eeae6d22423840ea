"""`eigenvalue_correction_`: add the squared per-sequence gradients in an eigenbasis (EK-FAC's Λ)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import arguments as check
from ..dispatch import Backend, declare
from ..rotation import check_basis
from . import cpu, cuda, pytorch, reference, triton


def _check_tokens(g: Tensor, a: Tensor, cu_seqlens: Tensor | None) -> None:
    """Dense `[B, T, ·]`, or packed `[N, ·]` with the first row of each sequence."""
    if cu_seqlens is None:
        check.tensor("g", g, ndim=(3,))
        check.shape("a", a, [*g.shape[:2], a.shape[-1]], "the same sequences and tokens as g")
        return
    check.tensor("g", g, ndim=(2,))
    check.shape("a", a, [g.shape[0], a.shape[-1]], "the same tokens as g")
    check.tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int32, torch.int64), ndim=(1,))
    check.same_device("cu_seqlens", cu_seqlens, "g", g.device)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens is empty; it must have one entry more than there are sequences")
    # Reading values would make a GPU wait.
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != g.shape[0] or sorted(ends) != ends:
            raise ValueError(
                f"cu_seqlens is {ends if len(ends) <= 9 else f'{ends[:4]} … {ends[-4:]}'};"
                f" it must rise from 0 to {g.shape[0]}, the number of tokens"
            )


def _prepare(
    lam: Tensor,
    g: Tensor,
    a: Tensor,
    q_out: Tensor | None = None,
    q_in: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    ones_column: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Any, ...]:
    check.tensor("lam", lam, dtypes=check.STATES, ndim=(2,))
    for name, rows in (("g", g), ("a", a)):
        check.tensor(name, rows, ndim=(3,) if cu_seqlens is None else (2,))
        check.same_device(name, rows, "lam", lam.device)
        check.not_wider(name, rows.dtype, "lam", lam.dtype)
    _check_tokens(g, a, cu_seqlens)
    width_in = a.shape[-1] + int(ones_column)
    if q_out is None:
        check.shape("g", g, [*g.shape[:-1], lam.shape[0]], "the last dimension as the rows of lam")
    if q_in is None and width_in != lam.shape[1]:
        raise ValueError(
            f"a has shape {list(a.shape)}; its last dimension must be"
            f" {lam.shape[1] - int(ones_column)} (lam has {lam.shape[1]} columns)"
        )
    for name, q, rows_of_q, columns in (
        ("q_out", q_out, g.shape[-1], lam.shape[0]),
        ("q_in", q_in, width_in, lam.shape[1]),
    ):
        if q is not None:
            check_basis(name, q, rows_of_q, columns, "lam", lam.device)
            check.not_wider(name, q.dtype, "lam", lam.dtype)
    keep = None if mask is None else check.row_mask("mask", mask, g.shape[:-1], g.device)
    return lam, g, a, q_out, q_in, keep, ones_column, cu_seqlens


_correct = declare(
    "eigenvalue_correction_",
    "(Tensor(a!) lam, Tensor g, Tensor a, Tensor? q_out, Tensor? q_in, Tensor? mask, bool ones_column,"
    " Tensor? cu_seqlens) -> ()",
    _prepare,
    lambda *_: None,
    [
        Backend("cuda", cuda.run, cuda.refuses, cuda.configuration),
        Backend("triton", triton.run, triton.refuses, triton.configuration),
        Backend("cpu", cpu.run, cpu.refuses, cpu.configuration),
        Backend("pytorch", pytorch.run, pytorch.refuses, pytorch.configuration),
        Backend("reference", reference.run),
    ],
)


def eigenvalue_correction_(
    lam: Tensor,
    g: Tensor,
    a: Tensor,
    q_out: Tensor | None = None,
    q_in: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    ones_column: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Add `Σ_b (Q_outᵀ G_b Q_in)∘²` to `lam`, with `G_b = g_bᵀ a_b` the gradient of sequence b.

    This is the second moment of per-sequence gradients in the Kronecker-factored eigenbasis
    (George et al. 2018, arXiv 1806.03884); without bases it is the diagonal Fisher.

    Args:
        lam: `[d_out, d_in]` (+ 1 column with `ones_column`), float32 or float64, updated in place.
        g: output gradients `[B, T, d_out]`, or packed `[N, d_out]`; already rotated if `q_out` is None.
        a: inputs `[B, T, d_in]`, or packed `[N, d_in]`; already rotated if `q_in` is None.
        q_out: eigenvectors in columns `[d_out, d_out]`, or a bfloat16 pair `[2, d_out, d_out]`.
        q_in: the same for the input side.
        mask: 0/1 `[B, T]` (packed: `[N]`); a token whose mask is 0 is left out whatever it holds.
        ones_column: `a` stands for itself with one last column of ones (a layer with a bias). An
            `a` that is rotated already has that column inside: leave this off.
        cu_seqlens: int32 or int64 `[B + 1]`, rising from 0 to N: tokens are packed, and sequence b has rows
            `cu_seqlens[b] … cu_seqlens[b + 1]` of g and a. Its values are checked on a CPU alone.

    Returns:
        `lam`.

    Raises:
        TypeError: an argument is not of its type or dtype.
        ValueError: shapes, devices or layouts do not agree, or a tensor requires a gradient while gradients are
            recorded.

    Cost a sequence: `2·T·d_out·d_in` FLOPs for the product, and for each side the cheaper of rotating
    its tokens and rotating the gradient. Nothing of size `B·d_out·d_in` is allocated.
    """
    _correct(*_prepare(lam, g, a, q_out, q_in, mask, ones_column=ones_column, cu_seqlens=cu_seqlens))
    return lam

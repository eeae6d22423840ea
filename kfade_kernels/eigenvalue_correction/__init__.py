"""`eigenvalue_correction_`: add the squared per-sequence gradients in an eigenbasis (EK-FAC's Λ)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import arguments as check
from ..dispatch import Backend, declare
from . import pytorch, reference


def _check_basis(name: str, q: Tensor | None, rows: int, columns: int, lam: Tensor) -> None:
    if q is None:
        return
    check.tensor(name, q, dtypes=(torch.bfloat16, *check.STATES), ndim=(2, 3))
    if (q.ndim == 3) != (q.dtype == torch.bfloat16):
        raise TypeError(
            f"{name} is {q.dtype} with shape {list(q.shape)}; it must be float32 or float64 [n, m],"
            " or a bfloat16 pair [2, n, m] (see bf16_pair)"
        )
    expected = [rows, columns] if q.ndim == 2 else [2, rows, columns]
    check.shape(name, q, expected, "rows as the unrotated side, columns as lam")
    check.same_device(name, q, "lam", lam.device)
    check.not_wider(name, q.dtype, "lam", lam.dtype)


def _prepare(
    lam: Tensor,
    g: Tensor,
    a: Tensor,
    q_out: Tensor | None = None,
    q_in: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    ones_column: bool = False,
) -> tuple[Any, ...]:
    check.tensor("lam", lam, dtypes=check.STATES, ndim=(2,))
    for name, rows in (("g", g), ("a", a)):
        check.tensor(name, rows, ndim=(3,))
        check.same_device(name, rows, "lam", lam.device)
        check.not_wider(name, rows.dtype, "lam", lam.dtype)
    check.shape("a", a, [*g.shape[:2], a.shape[2]], "the same sequences and tokens as g")
    width_in = a.shape[2] + int(ones_column)
    if q_out is None:
        check.shape("g", g, [*g.shape[:2], lam.shape[0]], "the last dimension as the rows of lam")
    if q_in is None and width_in != lam.shape[1]:
        raise ValueError(
            f"a has shape {list(a.shape)}; its last dimension must be"
            f" {lam.shape[1] - int(ones_column)} (lam has {lam.shape[1]} columns)"
        )
    _check_basis("q_out", q_out, g.shape[2], lam.shape[0], lam)
    _check_basis("q_in", q_in, width_in, lam.shape[1], lam)
    keep = None if mask is None else check.row_mask("mask", mask, g.shape[:2], g.device)
    return lam, g, a, q_out, q_in, keep, ones_column


_correct = declare(
    "eigenvalue_correction_",
    "(Tensor(a!) lam, Tensor g, Tensor a, Tensor? q_out, Tensor? q_in, Tensor? mask, bool ones_column) -> ()",
    _prepare,
    lambda *_: None,
    [Backend("pytorch", pytorch.run, pytorch.refuses, pytorch.configuration), Backend("reference", reference.run)],
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
) -> Tensor:
    """Add `Σ_b (Q_outᵀ G_b Q_in)∘²` to `lam`, with `G_b = g_bᵀ a_b` the gradient of sequence b.

    This is the second moment of per-sequence gradients in the Kronecker-factored eigenbasis
    (George et al. 2018, arXiv 1806.03884); without bases it is the diagonal Fisher.

    Args:
        lam: `[d_out, d_in]` (+ 1 column with `ones_column`), float32 or float64, updated in place.
        g: output gradients `[B, T, d_out]`, already rotated if `q_out` is None.
        a: inputs `[B, T, d_in]`, already rotated if `q_in` is None.
        q_out: eigenvectors in columns `[d_out, d_out]`, or a bfloat16 pair `[2, d_out, d_out]`.
        q_in: the same for the input side.
        mask: 0/1 `[B, T]`; a token whose mask is 0 is left out whatever it holds.
        ones_column: `a` stands for itself with one last column of ones (a layer with a bias). An
            `a` that is rotated already has that column inside: leave this off.

    Returns:
        `lam`.

    Raises:
        TypeError: an argument is not of its type or dtype.
        ValueError: shapes, devices or layouts do not agree.

    Cost a sequence: `2·T·d_out·d_in` FLOPs for the product, and for each side the cheaper of rotating
    its tokens and rotating the gradient. Nothing of size `B·d_out·d_in` is allocated.
    """
    _correct(*_prepare(lam, g, a, q_out, q_in, mask, ones_column=ones_column))
    return lam

"""`kron_solve`: apply the damped inverse of a Kronecker-factored matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import arguments as check
from ..dispatch import Backend, declare
from . import pytorch, reference

Eigenvalues = Tensor | tuple[Tensor, Tensor]


def _prepare(v: Tensor, q_out: Tensor, q_in: Tensor, eigenvalues: Eigenvalues, damping: float) -> tuple[Any, ...]:
    check.tensor("v", v, ndim=(2, 3))
    d_out, d_in = v.shape[-2:]
    for name, q, order in (("q_out", q_out, d_out), ("q_in", q_in, d_in)):
        check.tensor(name, q, dtypes=check.STATES, ndim=(2,))
        check.shape(name, q, [order, order], "square, as the matching dimension of v")
        check.same_device(name, q, "v", v.device)
    if q_in.dtype != q_out.dtype:
        raise TypeError(f"q_in is {q_in.dtype}; it must be {q_out.dtype} like q_out")
    check.not_wider("v", v.dtype, "q_out", q_out.dtype)
    if isinstance(eigenvalues, Tensor):
        values, names = [eigenvalues], ["eigenvalues"]
        shapes = [[d_out, d_in]]
    elif isinstance(eigenvalues, (tuple, list)) and len(eigenvalues) == 2:
        values, names = list(eigenvalues), ["eigenvalues[0]", "eigenvalues[1]"]
        shapes = [[d_out], [d_in]]
    else:
        raise TypeError(
            f"eigenvalues is a {type(eigenvalues).__name__}; it must be a tensor [d_out, d_in] or a pair"
            " of vectors ([d_out], [d_in])"
        )
    for name, value, expected in zip(names, values, shapes, strict=True):
        check.tensor(name, value, dtypes=(q_out.dtype,), ndim=(len(expected),))
        check.shape(name, value, expected, "as v")
        check.same_device(name, value, "v", v.device)
    return v, q_out, q_in, values, check.finite("damping", damping, minimum=0.0)


def _fake(v: Tensor, q_out: Tensor, q_in: Tensor, eigenvalues: list[Tensor], damping: float) -> Tensor:
    return torch.empty(v.shape, dtype=q_out.dtype, device=v.device)


_solve = declare(
    "kron_solve",
    "(Tensor v, Tensor q_out, Tensor q_in, Tensor[] eigenvalues, float damping) -> Tensor",
    _prepare,
    _fake,
    [Backend("pytorch", pytorch.run, pytorch.refuses, pytorch.configuration), Backend("reference", reference.run)],
)


def kron_solve(v: Tensor, q_out: Tensor, q_in: Tensor, eigenvalues: Eigenvalues, damping: float) -> Tensor:
    """`(F + λI)⁻¹ v` for `F = (Q_out ⊗ Q_in) diag(Λ) (Q_out ⊗ Q_in)ᵀ`, as a matrix equation:

    `Q_out [ (Q_outᵀ v Q_in) ⊘ (Λ + λ) ] Q_inᵀ`

    Args:
        v: `[d_out, d_in]`, or a batch `[K, d_out, d_in]` of right-hand sides; any float dtype.
        q_out: output eigenvectors in columns `[d_out, d_out]`, float32 or float64.
        q_in: input eigenvectors in columns `[d_in, d_in]`, same dtype.
        eigenvalues: `Λ [d_out, d_in]` (EK-FAC), or the pair `(λ_out [d_out], λ_in [d_in])` (K-FAC),
            whose outer product is then never formed.
        damping: λ ≥ 0, absolute, in the unit of Λ. Zero is only sensible where Λ is positive.

    Returns:
        The solution in the shape of `v` and the dtype of `q_out`.

    Raises:
        TypeError: an argument is not of its type or dtype.
        ValueError: shapes or devices do not agree, or `damping` is negative or not finite.

    Cost: `4·d_out·d_in·(d_out + d_in)` FLOPs for each right-hand side.
    """
    result: Tensor = _solve(*_prepare(v, q_out, q_in, eigenvalues, damping))
    return result

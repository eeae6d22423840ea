"""K-FAC's damped solve by Cholesky factorisations, without eigenvectors: pure functions.

The damping is factored: in the place of `S ⊗ A + λI` stands `(S + √λ/π I) ⊗ (A + π√λ I)`, whose inverse is the
Kronecker product of two inverses. It equals the former up to the cross terms `π√λ S ⊗ I + √λ/π I ⊗ A`, which make it
larger; π balances the two so that the norm of these terms is bounded best (Martens and Grosse 2015, arXiv 1503.05671,
section 6.3, with the trace norm).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import arguments as check
from .blocks import PackedBlocks
from .packed import PackedSymmetric
from .precision import float32_products


def balance(s_mean: float, a_mean: float) -> float:
    """π, from the mean eigenvalues `tr S / d_out` and `tr A / d_in`; 1 where either is 0."""
    return math.sqrt(a_mean / s_mean) if s_mean > 0 and a_mean > 0 else 1.0


def _factorised(m: PackedSymmetric, count: float, damping: float, name: str) -> Tensor:
    """The lower Cholesky factor `[n, n]` of `m / count + damping I`."""
    dense = m.to_dense().div_(count)
    dense.diagonal().add_(damping)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(dense)
    if int(failed):
        raise ValueError(
            f"{name} of order {m.n} with {damping:.4g} added is not positive definite in {m.dtype}; damping must be"
            " greater"
        )
    return factor


def _solved(v: Tensor, m: PackedSymmetric | PackedBlocks, count: float, damping: float, name: str) -> Tensor:
    """`(m / count + damping I)⁻¹ V`, block by block."""
    rows = v.split([block.n for block in m.blocks], dim=-2)
    parts = [
        torch.cholesky_solve(part, _factorised(block, count, damping, name))
        for part, block in zip(rows, m.blocks, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def factored_solve(
    v: Tensor,
    s: PackedSymmetric | PackedBlocks,
    a: PackedSymmetric | PackedBlocks,
    damping: float,
    *,
    s_count: float = 1.0,
    a_count: float = 1.0,
) -> Tensor:
    """`(S + √λ/π I)⁻¹ V (A + π√λ I)⁻¹` with `S = s / s_count` and `A = a / a_count`.

    Args:
        v: V `[d_out, d_in]` or a batch `[B, d_out, d_in]`, of any float dtype no wider than the factors'.
        s: of order d_out, float32 or float64; a block-diagonal one is factorised block by block.
        a: of order d_in, in the dtype of s.
        damping: λ ≥ 0, in the unit of the eigenvalues of `S ⊗ A`.
        s_count, a_count: what the sums are divided by, greater than 0.

    Returns:
        In the shape of v and the dtype of the factors.

    Raises:
        TypeError, ValueError: an argument is not as it must be, or a damped factor is not positive definite.

    Cost: `(d_out³ + d_in³) / 3` FLOPs for the factorisations and `2·d_out·d_in·(d_out + d_in)` a matrix; one dense
    matrix and one Cholesky factor of a side at a time. With k blocks a side, the former over k² and the latter over k.
    """
    check.tensor("v", v, ndim=(2, 3))
    damping = check.finite("damping", damping, minimum=0.0)
    for name, m, order in (("s", s, v.shape[-2]), ("a", a, v.shape[-1])):
        if not isinstance(m, (PackedSymmetric, PackedBlocks)):
            raise TypeError(f"{name} is a {type(m).__name__}; it must be a PackedSymmetric or PackedBlocks")
        if m.n != order:
            raise ValueError(f"{name} has order {m.n}; it must be {order}, as the matching dimension of v")
    if a.dtype != s.dtype:
        raise TypeError(f"a is {a.dtype}; it must be {s.dtype} like s")
    check.not_wider("v", v.dtype, "s", s.dtype)
    for name, count in (("s_count", s_count), ("a_count", a_count)):
        if not count > 0:
            raise ValueError(f"{name} is {count}; it must be greater than 0")
    means = (float(m.trace()) / count / m.n for m, count in ((s, s_count), (a, a_count)))
    pi, root = balance(*means), math.sqrt(damping)
    with float32_products():
        solved = _solved(v.to(s.dtype), s, s_count, root / pi, "s")
        return _solved(solved.mT, a, a_count, pi * root, "a").mT.contiguous()

"""Kronecker factors of which the largest eigenpairs are known, and of the rest the mean: pure functions.

A side of order n is given by a thin basis `q [n, k]` with orthonormal columns. Its first k entries are these
directions; where `k < n` one more entry, the *tail*, stands for the n − k directions orthogonal to them, in all of
which the curvature is taken to be the same. A basis `[n, n]` is a whole side, without a tail. What is diagonal in the
Kronecker product of two such bases is a *block* `[k_out (+ 1), k_in (+ 1)]`, one entry a pair of directions, tail
last. No function here makes an n × n matrix of a thin side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .eigenvalue_correction import eigenvalue_correction_
from .precision import float32_products
from .rotation import rotate
from .syrk.reference import append_ones


def entries(q: Tensor) -> int:
    """Entries of one side of a block: k, and one more for the tail where there is one."""
    return q.shape[1] + int(q.shape[1] < q.shape[0])


def multiplicities(q: Tensor) -> Tensor:
    """How many directions each entry of a side stands for: ones `[k]`, then n − k for the tail; float64."""
    counts = torch.ones(entries(q), dtype=torch.float64)
    if q.shape[1] < q.shape[0]:
        counts[-1] = q.shape[0] - q.shape[1]
    return counts


def random_basis(n: int, columns: int, seed: int) -> Tensor:
    """Ω `[n, columns]`, orthonormal columns in random directions, float64: a function of its arguments alone."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(n, columns, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(gaussian).Q
    return basis.contiguous()


def nystrom(y: Tensor, omega: Tensor, trace: float, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenpairs of a positive semidefinite `M [n, n]`, from `y = MΩ` and its trace alone.

    The Nyström approximation `Y (ΩᵀY)⁺ Yᵀ` of M + νI with a shift ν of the size of the rounding in y, taken off
    the eigenvalues again (Tropp, Yurtsever, Udell, Cevher 2017, arXiv 1706.05736, algorithm 3), then cut to rank k.
    Computed in float64.

    Args:
        y: `[n, l]`; the rounding of its dtype sets ν.
        omega: Ω `[n, l]`, orthonormal columns.
        trace: of M.
        rank: k, at most l and below n.

    Returns:
        Eigenvalues `[k + 1]`: k of them ascending, and last the mean of the other n − k, so that the trace is kept
        exactly; and eigenvectors `[n, k]` in columns. Both in the dtype of y.
    """
    n, kind = y.shape[0], y.dtype
    shift = math.sqrt(n) * torch.finfo(kind).eps * float(torch.linalg.norm(y.double()))
    omega = omega.double()
    if shift == 0:
        values, vectors = torch.zeros(omega.shape[1], dtype=torch.float64, device=y.device), omega
    else:
        shifted = y.double() + shift * omega
        core = omega.T @ shifted
        core = (core + core.T) / 2
        factor, failed = torch.linalg.cholesky_ex(core)
        if int(failed):
            # Rounding of y beyond ν: what is not positive carries nothing.
            spectrum, basis = torch.linalg.eigh(core)
            keep = spectrum > shift
            root = shifted @ (basis[:, keep] / spectrum[keep].sqrt())
            missing = omega.shape[1] - root.shape[1]
            root = torch.cat([root, root.new_zeros(n, missing)], dim=1)
        else:
            root = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T
        vectors, singular, _ = torch.linalg.svd(root, full_matrices=False)
        values = (singular.square() - shift).clamp_(min=0)
    values, vectors = values[:rank].flip(0), vectors[:, :rank].flip(1)
    # An SVD leaves columns several roundings from orthonormal; one Newton-Schulz step takes these away.
    vectors = vectors @ (1.5 * torch.eye(rank, dtype=torch.float64, device=y.device) - 0.5 * (vectors.T @ vectors))
    tail = max(0.0, trace - float(values.sum())) / (n - rank)
    values = torch.cat([values, values.new_tensor([tail])])
    return values.to(kind), vectors.to(kind).contiguous()


def gram(rows: Tensor, rotated: Tensor, *, ones_column: bool = False) -> Tensor:
    """Inner products `[B, T, T]` of the parts of token rows that lie in the tail.

    Args:
        rows: `[B, T, n]`, or `[B, T, n − 1]` with `ones_column`.
        rotated: the same times the thin basis, `[B, T, k]`.
        ones_column: rows stand for themselves with one last column of ones.
    """
    with float32_products():
        rows = rows.to(rotated.dtype)
        whole = torch.bmm(rows, rows.mT)
        if ones_column:
            whole.add_(1)
        return whole.baddbmm_(rotated, rotated.mT, alpha=-1)


def grams_are_cheaper(tokens: int, d_out: int, d_in: int) -> bool:
    """Whether the norms of a gradient `gᵀa` come cheaper from inner products of its tokens than from itself."""
    return tokens * (d_out + d_in) < d_out * d_in


def correct_(
    lam: Tensor,
    g: Tensor,
    a: Tensor,
    q_out: Tensor,
    q_in: Tensor,
    *,
    ones_column: bool = False,
    rotated_in: Tensor | None = None,
    gram_in: Tensor | None = None,
) -> Tensor:
    """Add the second moments of per-sequence gradients, by entries of a block: EK-FAC's Λ for thin bases.

    For each sequence, with `G = gᵀa`: the squares of `Q_outᵀ G Q_in`; of `Q_outᵀ G` less what Q_in holds the squared
    norm of each row, over n − k_in; likewise of the columns of `G Q_in`; and the squared norm of what is left, over
    both. So each entry is the exact mean over the directions that it stands for.

    Args:
        lam: the block `[k_out (+ 1), k_in (+ 1)]`, updated in place.
        g: output gradients `[B, T, d_out]`, zero where a token is left out.
        a: inputs `[B, T, d_in]`; with `ones_column` d_in is one less than the rows of `q_in`.
        q_out: `[d_out, k_out]`, orthonormal columns, in the dtype of `lam`.
        q_in: `[d_in, k_in]`, likewise.
        ones_column: a stands for itself with one last column of ones.
        rotated_in, gram_in: `a Q_in` and `gram(a, a Q_in)`, where the caller has them already.

    Returns:
        `lam`.

    Cost a sequence: `2·T·(d_out·k_out + d_in·k_in + k_out·k_in)` FLOPs, and for the tails the cheaper of
    `2·T²·(d_out + d_in + k_out + k_in)` and `2·T·d_out·d_in`.
    """
    k_out, k_in = q_out.shape[1], q_in.shape[1]
    tail_out, tail_in = q_out.shape[0] - k_out, q_in.shape[0] - k_in
    g_top = rotate(g, q_out)
    a_top = rotate(a, q_in, ones_column=ones_column) if rotated_in is None else rotated_in
    top = eigenvalue_correction_(torch.zeros_like(lam[:k_out, :k_in]), g_top, a_top)
    lam[:k_out, :k_in].add_(top)
    if not (tail_out or tail_in):
        return lam
    if gram_in is None and not grams_are_cheaper(g.shape[1], q_out.shape[0], q_in.shape[0]):
        return _correct_tails_by_gradients_(lam, g, a, g_top, a_top, ones_column)
    with float32_products():
        if tail_in:
            gram_in = gram(a, a_top, ones_column=ones_column) if gram_in is None else gram_in
            squares = (torch.bmm(gram_in, g_top) * g_top).sum((0, 1))
            lam[:k_out, k_in].add_(squares.clamp_(min=0), alpha=1 / tail_in)
        if tail_out:
            gram_out = gram(g, g_top)
            squares = (torch.bmm(gram_out, a_top) * a_top).sum((0, 1))
            lam[k_out, :k_in].add_(squares.clamp_(min=0), alpha=1 / tail_out)
        if gram_in is not None and tail_in and tail_out:
            # In place: inner products of all tokens of all sequences are the largest tensor here.
            left = gram_out.mul_(gram_in).sum().clamp_(min=0)
            lam[k_out, k_in].add_(left, alpha=1 / (tail_out * tail_in))
    return lam


def _correct_tails_by_gradients_(
    lam: Tensor, g: Tensor, a: Tensor, g_top: Tensor, a_top: Tensor, ones_column: bool
) -> Tensor:
    """The tails of `correct_` from the gradients themselves, a sequence at a time."""
    k_out, k_in = g_top.shape[2], a_top.shape[2]
    g, a = g.to(lam.dtype), a.to(lam.dtype)
    a = append_ones(a) if ones_column else a
    tail_out, tail_in = g.shape[2] - k_out, a.shape[2] - k_in
    with float32_products():
        for rows, inputs, rows_top, inputs_top in zip(g, a, g_top, a_top, strict=True):
            squares = (rows_top.T @ inputs_top).square()
            by_row, by_column = squares.sum(1), squares.sum(0)
            if tail_in:
                by_row = (rows_top.T @ inputs).square().sum(1)
                lam[:k_out, k_in].add_((by_row - squares.sum(1)).clamp_(min=0), alpha=1 / tail_in)
            if tail_out:
                by_column = (rows.T @ inputs_top).square().sum(0)
                lam[k_out, :k_in].add_((by_column - squares.sum(0)).clamp_(min=0), alpha=1 / tail_out)
            if tail_in and tail_out:
                left = (rows.T @ inputs).square().sum() - by_row.sum() - by_column.sum() + squares.sum()
                lam[k_out, k_in].add_(left.clamp_(min=0), alpha=1 / (tail_out * tail_in))
    return lam


def apply(v: Tensor, q_out: Tensor, q_in: Tensor, scale: Tensor) -> Tensor:
    """The matrix that is diagonal in both bases, times `v [..., d_out, d_in]`: each part of v by its entry of `scale`.

    With `scale = 1 / (Λ + λ)` it is the damped solve: a scaled identity in the tail, corrected in k directions.

    Args:
        v: one matrix or a batch, of any float dtype.
        q_out, q_in: bases `[d_out, k_out]`, `[d_in, k_in]`.
        scale: the block `[k_out (+ 1), k_in (+ 1)]`, of the dtype of the bases.

    Returns:
        In the shape of v and the dtype of the bases.

    Cost: `6·d_out·d_in·(k_out + k_in)` FLOPs and smaller terms; none is quadratic in d_out or d_in.
    """
    k_out, k_in = q_out.shape[1], q_in.shape[1]

    # The tail's entry may be 10⁵ times the others. So the top is first taken off and then scaled: scaled with the
    # tail and corrected afterwards (a third fewer FLOPs) float32 would leave 10⁻² of it where nothing may move.
    def by_columns(part: Tensor, factors: Tensor) -> Tensor:
        """Rows `[..., r, d_in]`, scaled by `factors [r or 1, k_in (+ 1)]` in the input basis."""
        top = part @ q_in
        scaled = (top * factors[:, :k_in]) @ q_in.mT
        if k_in == q_in.shape[0]:
            return scaled
        return (part - top @ q_in.mT).mul_(factors[:, k_in:]).add_(scaled)

    with float32_products():
        v = v.to(q_out.dtype)
        top = q_out.mT @ v
        scaled = q_out @ by_columns(top, scale[:k_out])
        if k_out == q_out.shape[0]:
            return scaled
        return by_columns(v - q_out @ top, scale[k_out:]).add_(scaled)

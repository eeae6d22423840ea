"""Definition of `kron_solve` in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def spectrum(values: Tensor, values_in: Tensor | None) -> Tensor:
    """`Λ [d_out, d_in]`, from itself or from the pair `(λ_out, λ_in)` as their outer product."""
    return values if values_in is None else values.unsqueeze(-1) * values_in


def solve(
    v: Tensor, a: Tensor | None, q_out: Tensor, q_in: Tensor, values: Tensor, values_in: Tensor | None, damping: float
) -> Tensor:
    """One problem; with `a`, v holds the output side `g [N, d_out]` of the gradient `gᵀ a`."""
    gradient = v.to(q_out.dtype)
    if a is not None:
        gradient = gradient.T @ a.to(q_out.dtype)
    rotated = q_out.T @ gradient @ q_in
    return q_out @ (rotated / (spectrum(values, values_in) + damping)) @ q_in.T


def run(
    v: list[Tensor],
    a: list[Tensor | None],
    q_out: list[Tensor],
    q_in: list[Tensor],
    eigenvalues: list[Tensor],
    eigenvalues_in: list[Tensor | None],
    dampings: list[float],
) -> list[Tensor]:
    return [solve(*parts) for parts in zip(v, a, q_out, q_in, eigenvalues, eigenvalues_in, dampings, strict=True)]

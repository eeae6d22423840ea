"""Definition of `kron_solve` in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def spectrum(eigenvalues: list[Tensor]) -> Tensor:
    """`Λ [d_out, d_in]`, from itself or from the pair `(λ_out, λ_in)` as their outer product."""
    if len(eigenvalues) == 1:
        return eigenvalues[0]
    return eigenvalues[0].unsqueeze(-1) * eigenvalues[1]


def run(v: Tensor, q_out: Tensor, q_in: Tensor, eigenvalues: list[Tensor], damping: float) -> Tensor:
    rotated = q_out.T @ v.to(q_out.dtype) @ q_in
    return q_out @ (rotated / (spectrum(eigenvalues) + damping)) @ q_in.T

"""`kron_solve` in PyTorch: four products, the division in place between them, two buffers in all."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the outer product of a pair of eigenvalues that exist at a time.
SLAB = 1 << 13


def few_tokens(tokens: int, d_out: int, d_in: int) -> bool:
    """Whether rotating the tokens of a gradient `gᵀ a` is cheaper than forming it and rotating that."""
    return tokens * (d_out**2 + d_in**2) < d_out * d_in * (d_out + d_in)


def _rotated(v: Tensor, a: Tensor | None, q_out: Tensor, q_in: Tensor) -> Tensor:
    """`Q_outᵀ V Q_in`."""
    v = v.to(q_out.dtype)
    if a is None:
        return torch.matmul(torch.matmul(q_out.T, v), q_in)
    a = a.to(q_out.dtype)
    if few_tokens(v.shape[0], v.shape[1], a.shape[1]):
        return torch.mm(torch.mm(v, q_out).T, torch.mm(a, q_in))
    return torch.mm(torch.mm(q_out.T, torch.mm(v.T, a)), q_in)


def solve_rotated(
    v: Tensor, a: Tensor | None, q_out: Tensor, q_in: Tensor, values: Tensor, values_in: Tensor | None, damping: float
) -> Tensor:
    """`(Q_outᵀ V Q_in) ⊘ (Λ + λ)`: the solution before it is rotated back."""
    rotated = _rotated(v, a, q_out, q_in)
    if values_in is None:
        rotated.div_(values + damping)
    else:
        # Some rows at a time: of the outer product no more exists, and a narrow layer is no swarm of tiny operations.
        rows = max(1, SLAB // values_in.shape[0])
        for start in range(0, values.shape[0], rows):
            part = slice(start, start + rows)
            rotated[..., part, :].div_(torch.outer(values[part], values_in).add_(damping))
    return rotated


def solve(
    v: Tensor, a: Tensor | None, q_out: Tensor, q_in: Tensor, values: Tensor, values_in: Tensor | None, damping: float
) -> Tensor:
    rotated = solve_rotated(v, a, q_out, q_in, values, values_in, damping)
    return torch.matmul(torch.matmul(q_out, rotated), q_in.T)


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


def refuses(v: list[Tensor], *_: object) -> str | None:
    elsewhere = [str(x.device) for x in v if x.device.type not in ("cpu", "cuda")]
    return f"v is on {elsewhere[0]}" if elsewhere else None


def configuration(
    v: list[Tensor],
    a: list[Tensor | None],
    q_out: list[Tensor],
    q_in: list[Tensor],
    eigenvalues: list[Tensor],
    eigenvalues_in: list[Tensor | None],
    dampings: list[float],
) -> str:
    if not v:
        return "no problems"
    form = "matrix" if eigenvalues_in[0] is None else "pair"
    several = f", {len(v)} problems in turn" if len(v) > 1 else ""
    return f"four {q_out[0].dtype} products, eigenvalues as a {form}{several}"

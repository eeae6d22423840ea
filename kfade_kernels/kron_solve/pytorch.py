"""`kron_solve` on a CPU: four products, the division in place between them, two buffers in all."""

from __future__ import annotations

import torch
from torch import Tensor


def run(v: Tensor, q_out: Tensor, q_in: Tensor, eigenvalues: list[Tensor], damping: float) -> Tensor:
    rotated = torch.matmul(torch.matmul(q_out.T, v.to(q_out.dtype)), q_in)
    if len(eigenvalues) == 1:
        rotated.div_(eigenvalues[0] + damping)
    else:
        # Row by row, so that the outer product of the pair never exists.
        for row, value in enumerate(eigenvalues[0].tolist()):
            rotated[..., row, :].div_(eigenvalues[1] * value + damping)
    return torch.matmul(torch.matmul(q_out, rotated), q_in.T)


def refuses(v: Tensor, *_: object) -> str | None:
    return None if v.device.type == "cpu" else f"v is on {v.device}"


def configuration(v: Tensor, q_out: Tensor, q_in: Tensor, eigenvalues: list[Tensor], *_: object) -> str:
    return f"four {q_out.dtype} products, eigenvalues as a {'matrix' if len(eigenvalues) == 1 else 'pair'}"

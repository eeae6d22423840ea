"""Second stage: eigenvectors and eigenvalues of the factors."""

from __future__ import annotations

import torch
from kfade_kernels import PackedSymmetric, low_rank
from kfade_kernels.precision import float32_products
from torch import Tensor

from .curvature import Sketch
from .errors import NonFiniteError

# Residual ‖(AQ − QΛ)z‖ / ‖A‖‖z‖ and ‖(QᵀQ − I)z‖ / ‖z‖ of random z, in units of the dtype's rounding, beyond
# which float32 is retried.
ROUNDINGS = 1_000.0
PROBES = 8


def _is_accurate(a: Tensor, values: Tensor, vectors: Tensor) -> bool:
    """Whether `A Q = Q Λ` and `QᵀQ = I` on a few random vectors: O(n²), where full products cost half an eigh."""
    if not bool(torch.isfinite(values).all() and torch.isfinite(vectors).all()):
        return False
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(a.shape[0], PROBES, generator=generator, dtype=torch.float64).to(a)
    # By TF32 products every decomposition would look bad.
    with float32_products():
        rotated = vectors @ probes
        residual = torch.linalg.norm(a @ rotated - vectors @ (values.unsqueeze(1) * probes))
        skew = torch.linalg.norm(vectors.T @ rotated - probes)
    limit = ROUNDINGS * torch.finfo(a.dtype).eps * float(torch.linalg.norm(probes))
    return float(residual) <= limit * (float(torch.linalg.norm(a)) or 1.0) and float(skew) <= limit


def decompose(total: PackedSymmetric, count: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[n]`, ascending and clamped at 0, and eigenvectors `[n, n]` in columns of `total / count`.

    `eigh` in the dtype of the factor; on failure, or on a residual beyond `ROUNDINGS`, in float64.

    Raises:
        RuntimeError: float64 failed as well.
        NonFiniteError: the factor holds a NaN or an infinity.
    """
    dense = total.to_dense().div_(max(1, count))
    if not bool(torch.isfinite(dense).all()):
        raise NonFiniteError(f"a factor of order {total.n} has a NaN or infinite entry: its sum overflowed")
    try:
        values, vectors = torch.linalg.eigh(dense)
        if _is_accurate(dense, values, vectors):
            # By rows, as they are saved: a loaded curvature then gives the same bits.
            return values.clamp_(min=0), vectors.contiguous()
    except torch.linalg.LinAlgError:
        pass
    try:
        values, vectors = torch.linalg.eigh(dense.double())
    except torch.linalg.LinAlgError as error:
        raise RuntimeError(f"eigh of a factor of order {total.n} failed in float64 too: {error}") from error
    return values.clamp_(min=0).to(dense.dtype), vectors.to(dense.dtype).contiguous()


def decompose_sketch(sketch: Sketch, count: float, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenpairs of `total / count`, of which there is a sketch.

    Returns:
        Eigenvalues `[k + 1]`, ascending, and last the mean of the others; and eigenvectors `[n, k]` in columns.

    Raises:
        NonFiniteError: the sketch holds a NaN or an infinity.
    """
    if not bool(torch.isfinite(sketch.y).all() and torch.isfinite(sketch.trace)):
        raise NonFiniteError(f"a factor of order {sketch.y.shape[0]} has a NaN or infinite entry: its sum overflowed")
    values, vectors = low_rank.nystrom(sketch.y, sketch.omega, float(sketch.trace), rank)
    return values / max(1, count), vectors

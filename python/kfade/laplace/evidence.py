"""How much prior precision the data ask for: the log marginal likelihood, as far as it depends on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def precision_evidence(spectra: Sequence[Tensor], distance: float, precision: float) -> float:
    """What depends on τ in the log marginal likelihood: `−½ (τ ‖θ̂ − μ‖² + Σ log(1 + NΛ/τ))`.

    Args:
        spectra: `N Λ` of each layer, float64.
        distance: `‖θ̂ − μ‖²`.
        precision: τ.
    """
    return -0.5 * (precision * distance + sum(float(torch.log1p(x / precision).sum()) for x in spectra))


def best_precision(spectra: Sequence[Tensor], distance: float) -> float:
    """The τ > 0 that maximises `precision_evidence`: where `τ ‖θ̂ − μ‖² = Σ NΛ / (NΛ + τ)` (MacKay 1992).

    The left side rises with τ and the right side, the number of parameters that the data determine, falls: there is
    one solution. It is found by Newton's method in log τ, kept within a bracket.

    Raises:
        ValueError: there is none, because θ̂ is the prior mean or Λ is 0 everywhere.
    """
    rank = sum(int((x > 0).sum()) for x in spectra)
    if not distance > 0 or rank == 0:
        what = "the weights are the prior mean" if rank else "the curvature is 0"
        raise ValueError(f"prior_precision has no best value, since {what}; it must be given")

    def excess(log_precision: float) -> tuple[float, float]:
        precision = math.exp(log_precision)
        shares = [x / (x + precision) for x in spectra]
        determined = sum(float(share.sum()) for share in shares)
        slope = sum(float((share * (1 - share)).sum()) for share in shares)
        return determined - precision * distance, -slope - precision * distance

    high = math.log(rank / distance)
    step, low = 1.0, high - 1.0
    while excess(low)[0] < 0:
        step *= 2
        low -= step
    at = high
    for _ in range(200):
        value, slope = excess(at)
        low, high = (at, high) if value > 0 else (low, at)
        newton = at - value / slope
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - at) <= 1e-13 * max(1.0, abs(at)):
            return math.exp(following)
        at = following
    return math.exp(at)

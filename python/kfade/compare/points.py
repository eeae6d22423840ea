"""What a comparison measures: models on the way of a run, and the best of them within a retain KL."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Point:
    """One model on the way of a run.

    Attributes:
        method, strength, seed: of the run; `strength` is what distinguishes the tries of a method.
        step: of the run; 0 is the original model. K-FADE has one more than it takes: its end, scaled to its budget.
        seconds: of unlearning so far: fits and searches included, measurements like these not.
        tokens: run through the model so far, with or without gradients, padding not counted.
        forget_nll: nats a token on the forget set.
        retain_kl: KL(original ‖ model), nats a token on retain data that no method sees.
        retain_nll: nats a token on the same.
        forget_kl_retrained, retain_kl_retrained: KL(retrained ‖ model) on both, nats a token; None without a
            retrained model.
        forget_probability: mean over the forget set's answers of `exp(−mean NLL of its tokens)`; None for plain text.
        others: KL(original ‖ model) on further data, nats a token, by its name.
    """

    method: str
    strength: str
    seed: int
    step: int
    seconds: float
    tokens: int
    forget_nll: float
    retain_kl: float
    retain_nll: float
    forget_kl_retrained: float | None = None
    retain_kl_retrained: float | None = None
    forget_probability: float | None = None
    others: dict[str, float] = field(default_factory=dict)

    @property
    def distance(self) -> float:
        """What is to be low: KL from the retrained model on the forget set, or without one minus the forget NLL."""
        return -self.forget_nll if self.forget_kl_retrained is None else self.forget_kl_retrained


def at_equal_kl(points: Iterable[Point], budget: float, *, seconds: float = math.inf) -> dict[str, list[Point]]:
    """The best point of each method and seed within a budget.

    Args:
        points: of any runs; those of all tries of a method compete.
        budget: largest retain KL, nats a token.
        seconds: largest time of unlearning.

    Returns:
        By method, in the order of the points, one point a seed, by seed. Of two equally good ones the first. A seed
        without a point within the budget is absent; where every run begins with the original model, there is none.
    """
    best: dict[str, dict[int, Point]] = {}
    for point in points:
        seeds = best.setdefault(point.method, {})
        inside = point.retain_kl <= budget and point.seconds <= seconds
        if inside and (point.seed not in seeds or point.distance < seeds[point.seed].distance):
            seeds[point.seed] = point
    return {method: [seeds[seed] for seed in sorted(seeds)] for method, seeds in best.items()}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 of one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

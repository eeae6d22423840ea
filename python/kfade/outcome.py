"""What a run of `unlearn` leaves beside its update: steps, trials of a length, and how it ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .progress import StageCost


@dataclass(frozen=True)
class Trial:
    """One measurement of the search for a scale."""

    eta: float
    predicted_kl: float
    measured_kl: float


@dataclass(frozen=True)
class Step:
    """The state after some steps, looked at on a few batches.

    Attributes:
        number: of steps taken.
        eta: size of the last of them.
        predicted_kl: `½ Δᵀ F Δ` of the whole change, nats a token.
        measured_kl: KL to the original model on held-out retain sequences, nats a token.
        forget_nll, retain_nll: token means; retain on the held-out sequences.
        refitted: how often the curvature was fitted anew before.
        retain_weight: c in the last of them.
    """

    number: int
    eta: float
    predicted_kl: float
    measured_kl: float
    forget_nll: float
    retain_nll: float
    refitted: int
    retain_weight: float


@dataclass(frozen=True)
class Outcome:
    """What a run ended with, measured on all held-out retain and all forget sequences.

    Attributes:
        scale: factor of the change that the steps made; 0 if nothing was kept.
        reason: why it is 0, if it is.
        predicted_kl, measured_kl, forget_nll, retain_nll: as in `Step`, of the scaled change.
        trials: the measurements behind the scale.
    """

    scale: float
    reason: str
    predicted_kl: float
    measured_kl: float
    forget_nll: float
    retain_nll: float
    trials: tuple[Trial, ...]


@dataclass
class UnlearnReport:
    """What a run measured.

    Attributes:
        config: its options.
        model_id: the model.
        forget_nll, retain_nll: token means before the first step.
        steps: looks on the way.
        outcome: the end; None until it is there.
        tokens: run forward and backward by the steps, those of fits apart.
        costs: of the stages.
        warnings: what a reader should know.
    """

    config: dict[str, Any]
    model_id: str
    forget_nll: float
    retain_nll: float
    steps: list[Step] = field(default_factory=list)
    outcome: Outcome | None = None
    tokens: int = 0
    costs: list[StageCost] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        values = asdict(self)
        values["costs"] = [cost.summary() for cost in self.costs]
        return values

"""Does unlearning last? Relearning attacks, quantisation, and the stored update applied again after more training.

`relearn` fine-tunes an unlearned model as an attacker would, or as any later user does, and measures on the way what
comes back. `quantised` rounds the weights of the linear layers, which is known to bring back what an update as small as
a rounding error had taken away (Zhang et al. 2024, arXiv 2410.16454). `reapply` adds a stored update again to a model
that was trained further, as far as a budget of measured retain KL allows: forward passes alone, no fit.

All of it gives plain rows; every model that is handed in comes back as it was, but for `reapply`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .baselines import TrainConfig, finetune, trained_parameters
from .batches import as_batches
from .config import ReapplyConfig, _integer
from .errors import NonFiniteError
from .evaluate import References, references, scores
from .layers import select
from .loss import check_batches
from .models import device_of
from .progress import Progress
from .step_size import search_step_size
from .update import Update

# Inputs that share a scale: a whole output channel at 8 bits, groups of 64 at 4, as in common practice.
GROUPS: dict[int, int | None] = {8: None, 4: 64}


# ------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Knowledge:
    """What a model was measured to know.

    Attributes:
        forget_nll: token mean on the forget set, nats.
        answer_found: share of its questions answered right by greedy decoding; None if they were not asked.
        retain_kl: mean KL(reference ‖ model) on the retain set, nats a token; None without a reference.
    """

    forget_nll: float
    answer_found: float | None = None
    retain_kl: float | None = None


@dataclass(frozen=True)
class Probe:
    """Measures what a model knows.

    Attributes:
        forget: batches whose labels were to be forgotten.
        retain: batches on which the KL to `reference` is measured.
        reference: outputs of a model on `retain` (`evaluate.references`); None measures no KL.
        answers: share of questions that a model answers right, as a function of the model; None asks none.
    """

    forget: Sequence[Mapping[str, Tensor]]
    retain: Sequence[Mapping[str, Tensor]] = ()
    reference: References | None = None
    answers: Callable[[nn.Module], float] | None = None

    def __call__(self, model: nn.Module) -> Knowledge:
        """Measure; the cost is a forward pass over both sets, and the replies.

        Raises:
            ValueError: bad batches, or a reference to other data.
            NonFiniteError: a loss is not finite.
        """
        return Knowledge(
            scores(model, self.forget).nll,
            None if self.answers is None else self.answers(model),
            None if self.reference is None else scores(model, self.retain, self.reference).kl,
        )


# ------------------------------------------------------------------------------------------------ relearning


@dataclass(frozen=True)
class RelearnPoint:
    """A model after some steps of an attack.

    Attributes:
        model: name of the model that was attacked.
        attack: name of what it was trained on.
        step: optimiser steps taken.
        tokens: tokens trained on, padding not counted.
        seconds: of training.
        forget_nll, answer_found, retain_kl: see Knowledge.
    """

    model: str
    attack: str
    step: int
    tokens: int
    seconds: float
    forget_nll: float
    answer_found: float | None
    retain_kl: float | None


def relearn(
    model: nn.Module,
    attacks: Mapping[str, Iterable[Mapping[str, Tensor]]],
    probe: Callable[[nn.Module], Knowledge],
    config: TrainConfig | None = None,
    *,
    name: str = "unlearned",
    every: int = 1,
    progress: Progress | None = None,
) -> list[RelearnPoint]:
    """Fine-tune a model on each of some sets, from the same weights, and measure on the way what it knows.

    The model comes back as it was, to the bit, also when the run is interrupted. Memory: a copy of the trained
    parameters beside what `finetune` keeps.

    Args:
        model: a causal language model.
        attacks: batches to train on, by name: a few forget examples, retain data, unrelated text.
        probe: what to measure, a function of the model; see Probe.
        config: how an attacker trains.
        name: of the model, for the rows.
        every: optimiser steps between two measurements; there is always one before the first step and one after
            the last.
        progress: where to show progress and record costs.

    Returns:
        Rows in the order of the attacks and their steps. An attack that diverged ends early.

    Raises:
        ValueError: no attack, bad batches, or a bad option.
    """
    config, progress = config or TrainConfig(), progress or Progress()
    _integer("every", every, 1)
    if not attacks:
        raise ValueError("attacks is empty; there must be at least one set to train on")
    parameters = trained_parameters(model, config)
    before = {key: p.detach().clone() for key, p in parameters.items()}
    start = probe(model)
    points = []
    for attack, batches in attacks.items():
        data = list(batches)
        seen: list[tuple[int, float, Knowledge]] = [(0, 0.0, start)]

        def observe(step: int, seconds: float, seen: list[tuple[int, float, Knowledge]] = seen) -> None:
            # A model whose loss is no longer finite knows nothing that could be measured.
            with suppress(NonFiniteError):
                seen.append((step, seconds, probe(model)))

        try:
            report = finetune(model, data, config, progress=progress, every=every, observe=observe)
        finally:
            with torch.no_grad():
                for key, p in parameters.items():
                    p.copy_(before[key])
        share = report.tokens / max(1, len(report.steps))
        points += [
            RelearnPoint(
                name, attack, step, round(step * share), seconds, found.forget_nll, found.answer_found, found.retain_kl
            )
            for step, seconds, found in seen
        ]
    return points


def steps_to(points: Sequence[RelearnPoint], share: float) -> int | None:
    """The first measured step at which that share of the answers is right again; None if it never is.

    Args:
        points: of one model and one attack.
        share: of right answers, from 0 to 1.
    """
    return next((p.step for p in points if p.answer_found is not None and p.answer_found >= share), None)


def draw_relearning(axes: Any, points: Sequence[RelearnPoint], attack: str, score: str = "answer_found") -> None:
    """Draw one attack on matplotlib axes: a score by step, a line a model.

    Args:
        axes: matplotlib axes.
        points: rows of `relearn`, of one or several models.
        attack: which of their attacks.
        score: `answer_found`, `forget_nll` or `retain_kl`.
    """
    titles = {"answer_found": "right answers, %", "forget_nll": "forget NLL, nats", "retain_kl": "retain KL, nats"}
    factor = 100 if score == "answer_found" else 1
    chosen = [p for p in points if p.attack == attack and getattr(p, score) is not None]
    for number, model in enumerate(dict.fromkeys(p.model for p in points)):
        line = [(p.step, factor * getattr(p, score)) for p in chosen if p.model == model]
        if line:
            # A model has one colour in the pictures of all attacks.
            axes.plot(*zip(*line, strict=True), f"C{number % 10}", marker="o", markersize=3, label=model)
    if score == "answer_found":
        axes.set_ylim(-3, 103)
    axes.set_title(attack, fontsize=9)
    axes.set_xlabel("steps of fine-tuning")
    axes.set_ylabel(titles[score])


# ---------------------------------------------------------------------------------------------- quantisation


def round_to_nearest(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Symmetric round-to-nearest quantisation of a matrix, given back in its own dtype.

    Each group of inputs of each output channel has the scale `s = max |w| / (2^(bits−1) − 1)`, and `w` becomes
    `s · round(w / s)`, half to even; so no weight moves by more than s / 2.

    Args:
        weight: `[d_out, d_in]`, any floating-point dtype; computed in float32 or wider.
        bits: from 2 to 16.
        group: inputs that share a scale, the last group may have fewer; None: a whole output channel.

    Raises:
        ValueError: `bits` or `group` is out of range.
    """
    _integer("bits", bits, 2)
    if bits > 16:
        raise ValueError(f"bits is {bits}; it must be at most 16")
    if group is not None:
        _integer("group", group, 1)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    most = 2 ** (bits - 1) - 1
    parts = []
    for part in wide.split(group or max(1, wide.shape[1]), dim=1):
        scale = part.abs().amax(1, keepdim=True) / most
        # A channel of zeros has no scale, and needs none.
        scale = scale.masked_fill(scale == 0, 1.0)
        parts.append((part / scale).round_().clamp_(-most, most) * scale)
    return torch.cat(parts, dim=1).to(weight.dtype)


@contextmanager
def quantised(model: nn.Module, bits: int, modules: str = "all-linear") -> Iterator[nn.Module]:
    """The model with rounded weights within this block; every bit comes back after it.

    8 bits have one scale an output channel, 4 bits one for each 64 inputs of a channel: plain rounding, without
    calibration data. Embeddings, norms, biases and the output head keep their values, as is usual.

    Args:
        model: any module.
        bits: 8 or 4.
        modules: which linear layers, as in FitConfig.

    Raises:
        ValueError: `bits` is neither, or `modules` names no layer.
        UnsupportedLayerError: as `fit`.
    """
    if bits not in GROUPS:
        raise ValueError(f"bits is {bits!r}; it must be one of {', '.join(map(str, GROUPS))}")
    layers = select(model, modules)
    before = [layer.weight.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                matrix = layer.weight.T if layer.transposed else layer.weight
                rounded = round_to_nearest(matrix, bits, GROUPS[bits])
                layer.weight.copy_(rounded.T if layer.transposed else rounded)
        yield model
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.copy_(weight)


# -------------------------------------------------------------------------------------------- re-application


@dataclass(frozen=True)
class Reapplied:
    """How far a stored update was added again.

    Attributes:
        scale: factor of the update that is now in the model; 0 when nothing was added.
        kl: mean KL(the model before ‖ the model now) on the retain batches, nats a token.
        reason: why nothing was added, if nothing was.
        trials: the scales tried, each with its KL; infinite where the model broke.
        seconds: of all of it.
    """

    scale: float
    kl: float
    reason: str
    trials: tuple[tuple[float, float], ...]
    seconds: float


def reapply(
    model: nn.Module,
    update: Update,
    retain: Iterable[Mapping[str, Tensor]],
    config: ReapplyConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Reapplied:
    """Add a stored update again to a model that was trained further, as far as a budget of retain KL allows.

    The scale is the largest found whose KL, measured from the model as it is before the call, is within the budget,
    searched as `unlearn` searches its step size. It costs a forward pass over the retain batches for every trial and
    one before. `Update.remove_` undoes it.

    Args:
        model: a causal language model, changed in place.
        update: of a model of the same shape.
        retain: batches whose outputs are to stay; best those that neither training nor the fit has seen.
        config: the budget, and how the scale is searched.
        progress: where to show progress and record costs.

    Returns:
        What was added. Where no trial meets the budget, or the update changes nothing, that is nothing.

    Raises:
        ValueError: bad batches, or the update does not fit the model; all mismatches are listed.
    """
    config = config or ReapplyConfig()
    if not isinstance(config, ReapplyConfig):
        raise TypeError(f"config is a {type(config).__name__}; it must be a ReapplyConfig")
    if not isinstance(update, Update):
        raise TypeError(f"update is a {type(update).__name__}; it must be an Update")
    update.check(model)
    begin = time.perf_counter()
    data = as_batches(check_batches(retain, device_of(model), "retain"))
    tried: dict[float, float] = {}

    def seconds() -> float:
        return time.perf_counter() - begin

    if update.norm() == 0:
        return Reapplied(0.0, 0.0, "the update changes nothing", (), seconds())
    with (progress or Progress()).stage("scale of the update") as stage:
        before = references(model, data)

        def measure(scale: float) -> float:
            update.apply_(model, scale)
            try:
                found = scores(model, data, before)
                tried[scale] = math.inf if found.kl is None or not math.isfinite(found.kl) else found.kl
                stage.advance(found.tokens)
            except NonFiniteError:
                tried[scale] = math.inf
            finally:
                update.remove_(model)
            return tried[scale]

        # Nothing is predicted: the curvature is not kept with an update.
        scale, _ = search_step_size(measure, lambda _: 0.0, config.scale, 0.0, config.kl_budget, config.trials)
    if scale > 0:
        update.apply_(model, scale)
    reason = "" if scale > 0 else f"no trial met the retain-KL budget of {config.kl_budget:.4g} nats a token"
    return Reapplied(scale, tried.get(scale, 0.0), reason, tuple(tried.items()), seconds())

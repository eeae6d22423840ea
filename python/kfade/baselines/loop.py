"""The loop that trains any method, plain fine-tuning and retraining, and leaves an update or a report."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.optimization import get_scheduler

from ..batches import cycled
from ..capture import deterministic_mode, graph_from_embeddings, trained
from ..config import _integer
from ..layers import select
from ..loss import Batch, check_batches
from ..models import device_of, model_id
from ..progress import Progress, Stage, StageCost
from ..update import Update
from .methods import (
    DOWN_PROJECTIONS,
    METHODS,
    SCHEDULES,
    BaselineConfig,
    Context,
    Forward,
    TrainConfig,
    decoder_layers,
    descent,
)

Observe = Callable[[int, float], None]


def trained_parameters(model: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    """The parameters that `config.modules` names, by their names in the model; tied ones once.

    Raises:
        ValueError: it names none.
        UnsupportedLayerError: as `fit`, unless all are trained.
    """
    if config.modules == "all":
        return {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    if config.modules != DOWN_PROJECTIONS or not isinstance(config, BaselineConfig):
        return {name: p for layer in select(model, config.modules) for name, p in layer.parameters().items()}
    stack, _ = decoder_layers(model, config.layer)
    # The last linear layer of each MLP in the order of the model, whatever a family calls it.
    last = {}
    for layer in select(model, "mlp"):
        number = re.match(rf"{re.escape(stack)}\.(\d+)\.", layer.name)
        if number and config.layer - 2 <= int(number[1]) <= config.layer:
            last[number[1]] = layer
    if not last:
        raise ValueError(f"modules is {config.modules!r}; layers up to {config.layer} have no MLP of linear layers")
    return {name: p for layer in last.values() for name, p in layer.parameters().items()}


@dataclass(frozen=True)
class TrainStep:
    """One optimiser step.

    Attributes:
        number: from 1.
        loss: what was minimised, before the step.
        gradient_norm: Euclidean norm of its gradient, before clipping.
        learning_rate: of the step.
    """

    number: int
    loss: float
    gradient_norm: float
    learning_rate: float


@dataclass
class TrainReport:
    """What a run did.

    Attributes:
        config: its options.
        model_id: the model.
        steps: the steps taken.
        tokens: tokens run forward and backward, padding not counted.
        seconds: of training, with what was computed once before it and without what observed it.
        costs: of the stages, with the time of observers.
        warnings: what a reader should know.
    """

    config: dict[str, Any]
    model_id: str
    steps: list[TrainStep] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    costs: list[StageCost] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        values = asdict(self)
        values["costs"] = [cost.summary() for cost in self.costs]
        return values


class _Clock:
    """Seconds of training."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before, self._begin = 0.0, time.perf_counter()

    def read(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._before + time.perf_counter() - self._begin

    @contextmanager
    def paused(self) -> Iterator[float]:
        """What happens within is not counted."""
        self._before = self.read()
        try:
            yield self._before
        finally:
            self._begin = time.perf_counter()


class _Loop:
    """AdamW on some parameters of a model, which it can restore to the bit."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], config: TrainConfig, report: TrainReport, batches: int
    ) -> None:
        self.config, self.report, self.parameters = config, report, parameters
        self.original = {name: p.detach().clone() for name, p in parameters.items()}
        # A step of 1e-5 vanishes in 16 bits, so those parameters are trained as float32 copies.
        self._wide: dict[str, Tensor] = {
            name: p if p.dtype in (torch.float32, torch.float64) else p.detach().float()
            for name, p in parameters.items()
        }
        groups = [
            {"params": [p for p in self._wide.values() if (p.ndim > 1) == decays], "weight_decay": decay}
            for decays, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        device = next(iter(parameters.values())).device
        fused = device.type in ("cpu", "cuda")
        self._optimiser = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.learning_rate, fused=fused
        )
        self._schedule = get_scheduler(
            SCHEDULES[config.schedule], self._optimiser, round(config.warmup * batches), config.steps(batches)
        )
        self.clock = _Clock(device)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the parameters their original bits."""
        for name, p in self.parameters.items():
            p.copy_(self.original[name])

    @torch.no_grad()
    def change(self) -> dict[str, Tensor]:
        """What training added to each parameter, float32 or wider."""
        return {name: wide.detach() - self.original[name].to(wide.dtype) for name, wide in self._wide.items()}

    @torch.no_grad()
    def set_change(self, change: Mapping[str, Tensor], scale: float) -> None:
        """Give the parameters their original values plus `scale · change`."""
        for name, p in self.parameters.items():
            p.copy_(self.original[name].to(change[name].dtype) + scale * change[name])

    def _gradient_norm(self) -> float:
        """Bring the gradients to where the optimiser takes them, clipped; their norm before."""
        for name, p in self.parameters.items():
            wide = self._wide[name]
            if wide is not p and p.grad is not None:
                wide.grad, p.grad = p.grad.to(wide.dtype), None
        limit = math.inf if self.config.clip is None else self.config.clip
        return float(nn.utils.clip_grad_norm_(self._wide.values(), limit))

    def _step(self, number: int, loss: Tensor) -> str:
        """One step, or why there is none."""
        if not loss.requires_grad:
            raise ValueError(f"modules is {self.config.modules!r}; none of these parameters has a part in the loss")
        value = float(loss.detach())
        if not math.isfinite(value):
            return f"the loss is {value}"
        loss.backward()
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        rate = self._optimiser.param_groups[0]["lr"]
        self._optimiser.step()
        self._schedule.step()
        with torch.no_grad():
            for name, p in self.parameters.items():
                if self._wide[name] is not p:
                    p.copy_(self._wide[name])
        self._optimiser.zero_grad()
        self.report.steps.append(TrainStep(number, value, norm, rate))
        return ""

    def run(
        self,
        losses: Iterable[tuple[int, Callable[[], Tensor]]],
        stage: Stage,
        every: int = 0,
        observe: Observe | None = None,
    ) -> None:
        """Take all steps, each given as its tokens and its loss; stop at a loss or a gradient that is not finite."""
        observed = 0
        for number, (tokens, loss) in enumerate(losses, 1):
            reason = self._step(number, loss())
            if reason:
                self.report.warnings.append(
                    f"step {number} was not taken: {reason}; the weights are those after step {number - 1}"
                )
                break
            self.report.tokens += tokens
            stage.advance(tokens)
            if every and number % every == 0:
                self.observe(observe, number)
                observed = number
        taken = len(self.report.steps)
        if observed < taken:
            self.observe(observe, taken)

    def observe(self, observe: Observe | None, number: int) -> None:
        """Show the model as it is, outside the clock."""
        if observe is not None:
            with self.clock.paused() as seconds, torch.no_grad():
                observe(number, seconds)


def _checked(batches: Iterable[Mapping[str, Tensor]] | None, device: torch.device, name: str) -> list[Batch]:
    """Batches that carry loss."""
    if batches is None:
        raise ValueError(f"{name} is None; the method needs it")
    return [batch for batch in check_batches(batches, device, name) if len(batch.loss_index)]


@contextmanager
def _training(model: nn.Module, parameters: Mapping[str, nn.Parameter], *, partial: bool) -> Iterator[None]:
    """The model without dropout, and only these parameters with gradients."""
    with ExitStack() as stack:
        stack.enter_context(deterministic_mode(model))
        stack.enter_context(trained(model, parameters.values()))
        if partial:
            # What is left above an early end cannot be checkpointed, and little below it is recorded.
            model.eval()
        elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            stack.enter_context(graph_from_embeddings(model))
        yield


def _require_observer(every: int, observe: Observe | None) -> None:
    _integer("every", every, 0)
    if observe is not None and not callable(observe):
        raise TypeError(f"observe is a {type(observe).__name__}; it must be a function of the step and the seconds")


def run_baseline(
    model: nn.Module,
    forget: Iterable[Mapping[str, Tensor]],
    retain: Iterable[Mapping[str, Tensor]] | None,
    config: BaselineConfig,
    *,
    progress: Progress | None = None,
    every: int = 0,
    observe: Observe | None = None,
) -> Update:
    """Unlearn a forget set by one of the methods in METHODS.

    The model is left as it was, to the bit, also when the run is interrupted; apply the update to it with
    `Update.apply_`. Same inputs give the same bits. A loss or gradient that is not finite ends the run with a
    warning in the report; the update is then that of the steps before.

    Args:
        model: a causal language model; 16-bit parameters are trained as float32 copies.
        forget: batches to forget; the batch size of the method is theirs.
        retain: batches to retain, one of which goes with each forget batch, in a seeded order; None where the
            method needs none.
        config: options.
        progress: where to show progress and record costs.
        every: optimiser steps between two calls of `observe`; 0 calls it at the end alone.
        observe: called without gradients as `observe(step, seconds)`, with the model in its present state and the
            seconds of training so far, its own not counted: every so many steps and after the last. For a task
            vector, once for each of `config.scales`, with its number from 1.

    Returns:
        The update, whose `report` is a TrainReport.

    Raises:
        ValueError: bad batches, or `modules` or `layer` fit no part of the model.
    """
    if not isinstance(config, BaselineConfig):
        raise TypeError(f"config is a {type(config).__name__}; it must be a BaselineConfig")
    _require_observer(every, observe)
    method, progress, device = METHODS[config.method], progress or Progress(), device_of(model)
    forget_batches = _checked(forget, device, "forget")
    retain_batches = _checked(retain, device, "retain") if config.uses_retain else []
    parameters = trained_parameters(model, config)
    steps = config.steps(len(forget_batches))
    forgets = cycled(forget_batches, steps, f"forget {config.seed}")
    retains: Sequence[Batch | None] = [None] * steps
    if retain_batches:
        retains = cycled(retain_batches, steps, f"retain {config.seed}")
    report = TrainReport(asdict(config), model_id(model), costs=progress.costs)
    with _training(model, parameters, partial=config.layer is not None):
        loop = _Loop(parameters, config, report, len(forget_batches))
        originals = {id(p): loop.original[name] for name, p in parameters.items()}
        context = Context(model, forget_batches[0], config, originals)
        used = {batch.index: batch for batch in retains if batch is not None}.values()
        tokens = [f.tokens + (0 if r is None else r.tokens) for f, r in zip(forgets, retains, strict=True)]
        try:
            with progress.stage("original outputs") as stage:
                context.prepare(forget_batches, used, method.needs, stage)
            with progress.stage(f"training: {config.method}", sum(tokens)) as stage:
                pairs = zip(tokens, forgets, retains, strict=True)
                losses = ((n, lambda f=f, r=r: context.loss(method.objective, f, r)) for n, f, r in pairs)
                loop.run(losses, stage, every, None if config.scales else observe)
                change = loop.change()
                if config.scales:
                    for number, scale in enumerate(config.scales, 1):
                        loop.set_change(change, -scale)
                        loop.observe(observe, number)
                    change = {name: -config.scales[-1] * tensor for name, tensor in change.items()}
                report.seconds = loop.clock.read()
        finally:
            loop.restore()
    return Update(change, report.model_id, report)


def finetune(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    config: TrainConfig | None = None,
    *,
    progress: Progress | None = None,
    every: int = 0,
    observe: Observe | None = None,
) -> TrainReport:
    """Train a model on batches by the token-mean cross-entropy, in place.

    A run that is interrupted leaves the model as it was. The defaults are those with which ToFU trains Llama-2-7B
    (Maini et al. 2024, arXiv 2401.06121).

    Args:
        model: a causal language model.
        batches: what to train on.
        config: options.
        progress, every, observe: as in `run_baseline`.

    Raises:
        ValueError: bad batches, or `modules` names no layer.
    """
    config, progress, device = config or TrainConfig(), progress or Progress(), device_of(model)
    if not isinstance(config, TrainConfig) or isinstance(config, BaselineConfig):
        raise TypeError(f"config is a {type(config).__name__}; it must be a TrainConfig")
    _require_observer(every, observe)
    checked = _checked(batches, device, "batches")
    order = cycled(checked, config.steps(len(checked)), f"forget {config.seed}")
    parameters = trained_parameters(model, config)
    report = TrainReport(asdict(config), model_id(model), costs=progress.costs)
    with _training(model, parameters, partial=False):
        loop = _Loop(parameters, config, report, len(checked))
        forward = Forward(model, checked[0], config)
        try:
            with progress.stage("training", sum(batch.tokens for batch in order)) as stage:
                losses = ((batch.tokens, lambda batch=batch: descent(forward, batch)) for batch in order)
                loop.run(losses, stage, every, observe)
                report.seconds = loop.clock.read()
        except BaseException:
            loop.restore()
            raise
    return report


def retrain(
    model: nn.Module,
    base: nn.Module,
    retain: Iterable[Mapping[str, Tensor]],
    config: TrainConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Update:
    """The truth: the model that was never shown the forget set, as an update of the one that was.

    Args:
        model: trained from `base` on everything.
        base: the model before that training; a copy of it is trained.
        retain: everything but the forget set.
        config: options of that training.
        progress: where to show progress and record costs.

    Returns:
        The update from `model` to the retrained model; its `report` is that of the training.

    Raises:
        ValueError: the two models differ in a parameter's name or shape, or as `finetune`.
    """
    parameters, others = dict(model.named_parameters()), dict(base.named_parameters())
    wrong = sorted(n for n in {*parameters, *others} if n not in parameters or n not in others
                   or parameters[n].shape != others[n].shape)  # fmt: skip
    if wrong:
        raise ValueError(f"base differs from model in {', '.join(wrong[:8])}; it must be the same architecture")
    other = copy.deepcopy(base)
    report = finetune(other, retain, config, progress=progress)
    with torch.no_grad():
        change = {}
        for name, p in other.named_parameters():
            wide = torch.promote_types(parameters[name].dtype, torch.float32)
            change[name] = p.detach().to(parameters[name].device, wide) - parameters[name].detach().to(wide)
    return Update(change, model_id(model), report)

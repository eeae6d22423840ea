"""The unlearning methods that people use today, each one small function on one shared loop.

Every method but two minimises `γ · forget objective + α · retain objective` with AdamW over the forget set, as the
open-unlearning benchmark (Dorna et al. 2025, arXiv 2506.12618) trains them: each forget batch is paired with a retain
batch. Gradient ascent has no retain objective; task-vector negation trains on the forget set and subtracts what it
learnt. `METHODS` lists them with their sources and published defaults; `finetune` is the same loop for plain training,
and `retrain` the truth that all of them approach.

What needs the original model (NPO's reference, retain KL, UNDIAL's teacher, RMU's activations) is computed once before
the first step, so no second model is kept. The model runs without dropout.
"""

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

from .capture import deterministic_mode, graph_from_embeddings, trained
from .config import _integer, _number, _one_of
from .layers import output_head, select
from .loss import IGNORE_INDEX, Batch, Head, autocast, check_batches, check_targets
from .models import device_of, model_id
from .progress import Progress, Stage, StageCost
from .unlearn import cycled
from .update import Update

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
RETAIN_LOSSES = ("nll", "kl", "activation")
DOWN_PROJECTIONS = "down-projections"
Observe = Callable[[int, float], None]
# A field that is not given takes what the method publishes.
_PUBLISHED: Any = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the loop trains.

    Attributes:
        learning_rate: the highest one, of AdamW.
        epochs: passes over the batches; a fraction ends within one.
        warmup: epochs in which the learning rate rises from 0; the first step is at 0, as in transformers.
        schedule: `linear` or `cosine` down to 0 after that, or `constant`.
        weight_decay: decoupled, of all parameters with two dimensions or more.
        clip: largest Euclidean norm of a step's gradient; None clips nothing.
        modules: which parameters are trained: `all`, or the linear layers of `mlp`, `attention`, `all-linear` or a
            regular expression searched in module names.
        autocast: `off` or `bfloat16`: run the model under autocast.
        seed: of the order of the batches.
    """

    learning_rate: float = 1e-5
    epochs: float = 5
    warmup: float = 1
    schedule: str = "linear"
    weight_decay: float = 0.01
    clip: float | None = 1.0
    modules: str = "all"
    autocast: str = "off"
    seed: int = 0

    def __post_init__(self) -> None:
        _number("learning_rate", self.learning_rate, above=0.0)
        _number("epochs", self.epochs, above=0.0)
        _number("warmup", self.warmup, minimum=0.0)
        _one_of("schedule", self.schedule, tuple(SCHEDULES))
        _number("weight_decay", self.weight_decay, minimum=0.0)
        if self.clip is not None:
            _number("clip", self.clip, above=0.0)
        if not isinstance(self.modules, str) or not self.modules:
            raise ValueError(f"modules is {self.modules!r}; it must be all, a preset or a regular expression")
        # Half-precision gradients would need scaling.
        _one_of("autocast", self.autocast, ("off", "bfloat16"))
        _integer("seed", self.seed, 0)

    def steps(self, batches: int) -> int:
        """Optimiser steps over so many batches."""
        return math.ceil(self.epochs * batches)


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(TrainConfig):
    """How a baseline unlearns; what is not given is what the method publishes (`METHODS[method].defaults`).

    A field that a method does not have is None.

    Attributes:
        method: a name in METHODS.
        epochs: passes over the forget set.
        modules: as above; of RMU alone also `down-projections`: the last linear layer of the MLP in the layers
            `layer` − 2 to `layer`.
        forget_weight: γ of the forget objective.
        retain_weight: α of the retain objective; at 0 no retain batch is run.
        retain_loss: `nll` of the retain tokens, `kl` to the original model on them, or (RMU) squared distance of
            its `activation`s from the original ones.
        beta: NPO and SimNPO: inverse temperature. UNDIAL: what the teacher's logit of the label is lowered by, in
            nats. WGA: power of the label's probability.
        delta: SimNPO: margin, in nats a token.
        layer: RMU: number of the decoder layer, from 0, whose output is steered.
        steering: RMU: length of the control vector.
        scales: task vectors: multiples α that are observed one after the other; the update is that of the last.
    """

    method: str
    learning_rate: float = _PUBLISHED
    epochs: float = _PUBLISHED
    warmup: float = _PUBLISHED
    schedule: str = _PUBLISHED
    modules: str = _PUBLISHED
    forget_weight: float = _PUBLISHED
    retain_weight: float = _PUBLISHED
    retain_loss: str = _PUBLISHED
    beta: float = _PUBLISHED
    delta: float = _PUBLISHED
    layer: int = _PUBLISHED
    steering: float = _PUBLISHED
    scales: tuple[float, ...] = _PUBLISHED

    def __post_init__(self) -> None:
        _one_of("method", self.method, tuple(METHODS))
        published = {**_SHARED, **METHODS[self.method].published}
        for name in (*_SHARED, *_OWN):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, published.get(name))
            elif name not in published:
                raise ValueError(f"{name} is {value!r}; the method {self.method} has no {name}")
            elif name in _OWN:
                _OWN[name](name, value)
        super().__post_init__()
        for name in ("retain_loss", "modules"):
            if getattr(self, name) in ("activation", DOWN_PROJECTIONS) and self.method != "rmu":
                raise ValueError(f"{name} is {getattr(self, name)!r}; only the method rmu has it")

    @property
    def uses_retain(self) -> bool:
        """Whether retain batches are run."""
        return bool(self.retain_weight)


def _positive(name: str, value: object) -> None:
    _number(name, value, above=0.0)


def _not_negative(name: str, value: object) -> None:
    _number(name, value, minimum=0.0)


def _scales(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not value:
        raise TypeError(f"{name} is {value!r}; it must be a tuple of numbers")
    for scale in value:
        _number(name, scale, above=0.0)


# How the benchmark trains, whatever the method.
_SHARED = {"learning_rate": 1e-5, "epochs": 10, "warmup": 1, "schedule": "linear", "modules": "all"}
# The fields of single methods, with their checks.
_OWN: dict[str, Callable[[str, object], None]] = {
    "forget_weight": _not_negative,
    "retain_weight": _not_negative,
    "retain_loss": lambda name, value: _one_of(name, value, RETAIN_LOSSES),
    "beta": _positive,
    "delta": _number,
    "layer": lambda name, value: _integer(name, value, 0),
    "steering": _not_negative,
    "scales": _scales,
}


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
        values["costs"] = [{**asdict(cost), "rate": cost.rate} for cost in self.costs]
        return values


# ------------------------------------------------------------------------------------------------ methods


class _Reached(Exception):
    """The layer whose output was wanted has run; nothing above it is needed."""


class Forward:
    """A model up to the NLL of its labels, with a graph to every parameter that is trained, its head's too."""

    def __init__(self, model: nn.Module, example: Batch, config: TrainConfig) -> None:
        self._autocast = config.autocast
        self.head = Head(model, example, autocast=config.autocast)
        self.projection = output_head(model) if self.head.weight is not None else None

    def logits(self, batch: Batch) -> Tensor:
        """`[N, V]` at the loss positions of a batch, float32 or wider."""
        return self._widened(self.projection or nn.Identity(), self.head.rows(batch))

    def _widened(self, projection: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        with autocast(self._autocast, rows.device):
            logits = projection(rows)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def nll(self, batch: Batch) -> Tensor:
        """−log p of each label, `[N]`."""
        logits = self.logits(batch)
        check_targets(batch, logits.shape[1])
        return nn.functional.cross_entropy(logits, batch.targets, reduction="none")


class Context(Forward):
    """What an objective may ask of the model as it is, and of the original one.

    Attributes:
        config: options of the run.
        original_nll: summed NLL `[B]` under the original model, by the number of the forget batch.
    """

    def __init__(
        self, model: nn.Module, example: Batch, config: BaselineConfig, originals: Mapping[int, Tensor]
    ) -> None:
        super().__init__(model, example, config)
        self.config = config
        self.original_nll: dict[int, Tensor] = {}
        # The projection itself may be trained, so the original one is taken from what restores the model.
        self._original_head = [
            None if p is None else originals.get(id(p), p.detach())
            for p in ((self.projection.weight, self.projection.bias) if isinstance(self.projection, nn.Linear) else ())
        ]
        self._references: dict[tuple[str, int], Tensor] = {}
        self._steered = decoder_layers(model, config.layer)[1] if config.layer is not None else None
        self._control: Tensor | None = None

    def activations(self, batch: Batch) -> Tensor:
        """Output of the steered layer, `[B, T, d]`, float32 or wider; the layers above it do not run."""
        found: list[Tensor] = []

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        assert self._steered is not None
        handle = self._steered.register_forward_hook(stop)
        try:
            self.head.rows(batch)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0].to(torch.promote_types(found[0].dtype, torch.float32))

    def control(self, width: int, device: torch.device) -> Tensor:
        """RMU's control vector `[d]`: uniform in [0, 1), then brought to its length; a function of the seed."""
        if self._control is None:
            generator = torch.Generator().manual_seed(self.config.seed)
            vector = torch.rand(width, generator=generator, dtype=torch.float64)
            self._control = (self.config.steering * vector / vector.norm()).to(device)
        return self._control

    def original_logits(self, kind: str, batch: Batch) -> Tensor:
        """`[N, V]` of the original model at the loss positions, float32 or wider."""
        rows = self._references[kind, batch.index]
        if self.projection is None:
            return self._widened(nn.Identity(), rows)
        weight, bias = self._original_head
        assert weight is not None
        return self._widened(lambda x: nn.functional.linear(x, weight, bias), rows)

    def retain(self, batch: Batch) -> Tensor:
        """The retain objective: a mean over loss positions, or of the squared distances of activations."""
        if self.config.retain_loss == "activation":
            return mean_square(self.activations(batch), self._references["retain", batch.index], batch)
        if self.config.retain_loss == "kl":
            before = self.original_logits("retain", batch).log_softmax(-1)
            return nn.functional.kl_div(
                self.logits(batch).log_softmax(-1), before, reduction="batchmean", log_target=True
            )
        return self.nll(batch).mean()

    def loss(self, objective: Callable[[Context, Batch], Tensor], forget: Batch, retain: Batch | None) -> Tensor:
        """`γ · forget objective + α · retain objective`."""
        weight = 1.0 if self.config.forget_weight is None else self.config.forget_weight
        value = weight * objective(self, forget)
        return value if retain is None else value + self.config.retain_weight * self.retain(retain)

    @torch.no_grad()
    def prepare(self, forget: Iterable[Batch], retain: Iterable[Batch], needs: str, stage: Stage) -> None:
        """Compute what is needed of the original model, which the model still is."""
        if needs:
            for batch in forget:
                if needs == "nll":
                    self.original_nll[batch.index] = batch.sequence_sums(self.nll(batch))
                else:
                    self._references["forget", batch.index] = self.head.rows(batch).clone()
                stage.advance(batch.tokens)
        if self.config.retain_loss in ("kl", "activation"):
            for batch in retain:
                rows = self.activations if self.config.retain_loss == "activation" else self.head.rows
                self._references["retain", batch.index] = rows(batch).clone()
                stage.advance(batch.tokens)


def mean_square(activations: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
    """Squared distance of activations `[B, T, d]`: mean over d, over a sequence's labelled tokens, over sequences."""
    mask = (batch.labels != IGNORE_INDEX) & batch.attention
    square = (activations - wanted.to(activations.dtype)).square().mean(-1) * mask
    return (square.sum(1) / mask.sum(1).clamp(min=1)).mean()


def gradient_ascent(context: Context, forget: Batch) -> Tensor:
    """Minus the token-mean NLL."""
    return -context.nll(forget).mean()


def npo(context: Context, forget: Batch) -> Tensor:
    """`−(2/β) mean log σ(−β log (p / p₀))` over sequences: ascent that ends where a sequence is forgotten."""
    beta = context.config.beta
    nll = forget.sequence_sums(context.nll(forget))
    return -2 / beta * nn.functional.logsigmoid(beta * (nll - context.original_nll[forget.index])).mean()


def simnpo(context: Context, forget: Batch) -> Tensor:
    """NPO with the NLL a token of each sequence, less a margin, in the place of the ratio to the original model."""
    beta = context.config.beta
    lengths = forget.loss_mask.sum(1).clamp(min=1)
    nll = forget.sequence_sums(context.nll(forget)) / lengths
    return -2 / beta * nn.functional.logsigmoid(beta * (nll - context.config.delta)).mean()


def undial(context: Context, forget: Batch) -> Tensor:
    """Cross-entropy to the original model's softmax with the label's logit lowered by β, a token mean."""
    teacher = context.original_logits("forget", forget).clone()
    teacher[torch.arange(len(teacher), device=teacher.device), forget.targets] -= context.config.beta
    return nn.functional.cross_entropy(context.logits(forget), teacher.softmax(-1))


def wga(context: Context, forget: Batch) -> Tensor:
    """Ascent in which each token counts by its probability to the power β."""
    nll = context.nll(forget)
    return -((-context.config.beta * nll.detach()).exp() * nll).mean()


def rmu(context: Context, forget: Batch) -> Tensor:
    """Squared distance of the steered layer's outputs from one random control vector."""
    activations = context.activations(forget)
    return mean_square(activations, context.control(activations.shape[-1], activations.device), forget)


def descent(context: Forward, forget: Batch) -> Tensor:
    """The token-mean NLL: plain training."""
    return context.nll(forget).mean()


@dataclass(frozen=True)
class Method:
    """A baseline.

    Attributes:
        name: of it.
        objective: its forget objective, to be minimised.
        published: its own defaults, where they are not those of the benchmark (AdamW at 1e-5, a linear schedule with
            an epoch of warm-up, 10 epochs, batches of 32).
        source: where formula and defaults come from.
        description: one line.
        needs: what the forget objective needs of the original model: nothing, `nll` or `rows`.
    """

    name: str
    objective: Callable[[Context, Batch], Tensor] = field(repr=False)
    published: Mapping[str, Any]
    source: str
    description: str
    needs: str = ""

    @property
    def defaults(self) -> BaselineConfig:
        """The published configuration."""
        return BaselineConfig(method=self.name)


_WEIGHTS = {"forget_weight": 1.0, "retain_weight": 1.0, "retain_loss": "nll"}
_BENCHMARK = "defaults of open-unlearning (Dorna et al. 2025, arXiv 2506.12618)"
METHODS = {
    method.name: method
    for method in (
        Method(
            "gradient_ascent", gradient_ascent, {"forget_weight": 1.0},
            f"Jang et al. 2023, arXiv 2210.01504; {_BENCHMARK}", "raises the NLL of the forget set",
        ),
        Method(
            "gradient_difference", gradient_ascent, _WEIGHTS,
            f"Maini et al. 2024, arXiv 2401.06121; {_BENCHMARK}", "gradient ascent, and training on the retain set",
        ),
        Method(
            "npo", npo, {**_WEIGHTS, "beta": 0.1},
            f"Zhang et al. 2024, arXiv 2404.05868; {_BENCHMARK}", "ascent weighted by what is still remembered", "nll",
        ),
        Method(
            "simnpo", simnpo, {**_WEIGHTS, "forget_weight": 0.125, "beta": 4.5, "delta": 0.0},
            f"Fan et al. 2024, arXiv 2410.07163; {_BENCHMARK}", "NPO by the NLL a token, without a reference model",
        ),
        Method(
            "undial", undial, {**_WEIGHTS, "learning_rate": 1e-4, "retain_weight": 0.0, "beta": 10.0},
            f"Dong et al. 2024, arXiv 2402.10052; {_BENCHMARK}", "distils itself with the label's logit lowered",
            "rows",
        ),
        Method(
            "wga", wga, {**_WEIGHTS, "epochs": 5, "beta": 1.0},
            f"Wang et al. 2025, arXiv 2502.19301; {_BENCHMARK}", "ascent weighted by each token's probability",
        ),
        Method(
            "rmu", rmu,
            {**_WEIGHTS, "learning_rate": 5e-5, "retain_weight": 1200.0, "retain_loss": "activation", "layer": 7,
             "steering": 6.5, "warmup": 0, "schedule": "constant", "modules": DOWN_PROJECTIONS},
            "Li et al. 2024, arXiv 2403.03218, its values for Zephyr-7B (other models: steering 20 to 300, α 100 to"
            " 1600; open-unlearning: 2 and 1), trained there for 150 batches of 4 and without clipping",
            "steers the forget set's activations to a random vector",
        ),
        Method(
            "task_vector", descent, {"scales": tuple(k / 20 for k in range(1, 21))},
            "Ilharco et al. 2023, arXiv 2212.04089, whose α is chosen among 0.05 … 1 by validation; the loop is that"
            " of the others", "subtracts what training on the forget set adds",
        ),
    )
}  # fmt: skip


# -------------------------------------------------------------------------------------------- which parameters


def decoder_layers(model: nn.Module, layer: int) -> tuple[str, nn.Module]:
    """Name of a model's list of decoder layers, and one of its members.

    Raises:
        ValueError: the model has no such list, or not so many layers.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ValueError(f"layer is {layer}; the model has no list of decoder layers")
    name, stack = max(lists, key=lambda item: len(item[1]))
    if layer >= len(stack):
        raise ValueError(f"layer is {layer}; the model has the layers 0 to {len(stack) - 1}")
    return name, stack[layer]


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


# ------------------------------------------------------------------------------------------------ the loop


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

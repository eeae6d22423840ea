"""Objectives, sources and published defaults of the methods, and the options of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import _integer, _number, _one_of
from ..layers import output_head
from ..loss import IGNORE_INDEX, Batch, Head, autocast, check_targets
from ..progress import Stage

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
RETAIN_LOSSES = ("nll", "kl", "activation")
DOWN_PROJECTIONS = "down-projections"
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

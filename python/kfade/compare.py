"""Unlearning methods side by side: at one allowance, what each forgets for what it damages.

A run is one method with one configuration and seed. It leaves a trail of points, each a model that was really there:
how far it is from the retrained model on the forget set (or, without one, its forget NLL), and its KL from the
original model on retain data that no method sees. `at_equal_kl` picks for each method and seed the best point within
a budget of that KL; nothing is interpolated. Every finished run is one file, so that an interrupted sweep goes on.
"""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .baselines import METHODS, BaselineConfig, decoder_layers, run_baseline
from .config import CURVATURES, OBJECTIVES, CompareConfig, FitConfig, UnlearnConfig
from .data import Record, make_batches
from .errors import NonFiniteError, StorageError
from .evaluate import Evaluation, References, generations, references, scores
from .models import weights_sha256
from .progress import Progress, Stage
from .report import plain
from .storage import read_json, tensors_sha256, write_text
from .unlearn import unlearn
from .update import Update

FORMAT, VERSION = "kfade-compare-run", 1
Config = UnlearnConfig | BaselineConfig
Batches = Sequence[Mapping[str, Tensor]]
Inspect = Callable[[Any], dict[str, Any]]

OURS, STEPWISE = "kfade", "kfade_stepwise"
OWN = (OURS, STEPWISE)
# Baselines with other options than those they are published with.
VARIANTS: dict[str, dict[str, Any]] = {"undial_kl": {"method": "undial", "retain_weight": 1.0, "retain_loss": "kl"}}
NAMES = (OURS, STEPWISE, *METHODS, *VARIANTS)
TITLES = {
    OURS: "K-FADE, one step",
    STEPWISE: "K-FADE, many steps",
    "gradient_ascent": "gradient ascent",
    "gradient_difference": "gradient difference",
    "npo": "NPO",
    "simnpo": "SimNPO",
    "undial": "UNDIAL",
    "wga": "WGA",
    "rmu": "RMU",
    "task_vector": "task vector",
    "undial_kl": "UNDIAL + retain KL",
}
# Steps at which a run is measured: each so many times the last.
GROWTH = 1.5
# A baseline's run ends early after two points in a row whose retain KL is so many times the largest budget; K-FADE is
# scaled to its budget at the end.
RUIN = 30.0
# K-FADE measures its budget on sequences like those it steps on; ours are further off, and cost a quarter more or so.
MARGIN = 0.75


# ---- points


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


# ---- what is measured


class Yardstick:
    """Measures a model on data that no method may learn from.

    Args:
        original: the model as it is before unlearning.
        forget: batches of the forget set.
        held: batches of retain data that no method sees.
        others: batches of further data, by name, on which KL from the original model is measured.

    Attributes:
        retrained: values of the retrained model, once `aim` has seen it, else None.
    """

    def __init__(
        self, original: nn.Module, forget: Batches, held: Batches, others: Mapping[str, Batches] | None = None
    ) -> None:
        self.forget, self.held, self.others = forget, held, dict(others or {})
        self._original = {name: references(original, some) for name, some in (("held", held), *self.others.items())}
        self._target: dict[str, References] = {}
        self.retrained: dict[str, Any] | None = None

    def aim(self, retrained: nn.Module) -> None:
        """Measure distances from this model too: one that was trained without the forget set.

        Raises:
            ValueError: its vocabulary is another.
        """
        values = self(retrained)
        self._target = {"forget": references(retrained, self.forget), "held": references(retrained, self.held)}
        self.retrained = {**values, "forget_kl_retrained": 0.0, "retain_kl_retrained": 0.0}

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """The fields of a Point that are measured.

        Raises:
            NonFiniteError: a loss or KL is not finite.
        """
        forget = scores(model, self.forget, self._target.get("forget"))
        held = scores(model, self.held, self._original["held"])
        values = {
            "forget_nll": forget.nll,
            "retain_kl": _kl(held, "held-out retain"),
            "retain_nll": held.nll,
            "forget_kl_retrained": _kl(forget, "forget") if self._target else None,
            "retain_kl_retrained": None,
            "forget_probability": forget.answer_probability,
            "others": {n: _kl(scores(model, some, self._original[n]), n) for n, some in self.others.items()},
        }
        if self._target:
            values["retain_kl_retrained"] = _kl(scores(model, self.held, self._target["held"]), "held-out retain")
        return values

    def digest(self) -> str:
        """SHA-256 of the data, and of the outputs that distances are measured from."""
        found = hashlib.sha256()
        for some in (self.forget, self.held, *self.others.values()):
            found.update(tensors_sha256(some).encode())
        for outputs in (*self._original.values(), *self._target.values()):
            for rows in outputs.rows:
                found.update(rows.float().contiguous().numpy().data)
        return found.hexdigest()


def _kl(evaluation: Evaluation, name: str) -> float:
    if evaluation.kl is None or not math.isfinite(evaluation.kl):
        raise NonFiniteError(f"the KL on {name} is {evaluation.kl}")
    return evaluation.kl


@dataclass(frozen=True)
class Task:
    """What is to be unlearned, the same for every method.

    Attributes:
        name: of it.
        model: the original one; every run leaves it as it was.
        forget, retain: batches that methods are given.
        yardstick: measures the models.
        inspect: slower measurements of a model, made at the best points alone: `values` (numbers by name, of which
            `utility` is drawn) and `replies` (texts), either of which may be absent.
    """

    name: str
    model: Any
    forget: Batches
    retain: Batches
    yardstick: Yardstick
    inspect: Inspect | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the model's weights and all data."""
        data = (tensors_sha256(self.forget), tensors_sha256(self.retain), self.yardstick.digest())
        parts = (weights_sha256(self.model), *data)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


# ---- which runs


def check_methods(names: Iterable[str]) -> None:
    """Raise ValueError unless all are in `NAMES`."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"methods has {name!r}; it must have names among {', '.join(NAMES)}")


def tries(name: str, model: nn.Module, batches: int, options: CompareConfig) -> list[Config]:
    """The configurations of a method, as many for each: a baseline's learning rates, K-FADE's budgets.

    K-FADE takes its own number of steps, or fewer if the allowance is smaller, and spends budgets of its own, from the
    smallest to the largest at equal ratios, a quarter below ours. RMU steers layer 7 as published, or in a shallower
    model the last but one.

    Args:
        name: of the method.
        model: to be unlearned.
        batches: of the forget set.
        options: the allowance.

    Raises:
        ValueError: no such method.
    """
    check_methods([name])
    if name in OWN:
        low, high, count = min(options.budgets), max(options.budgets), len(options.learning_rates)
        ratios = [i / (count - 1) for i in range(count)] if count > 1 else [1.0]
        base = within(UnlearnConfig() if name == OURS else UnlearnConfig.stepwise(), batches, options.epochs)
        return [replace(base, kl_budget=float(f"{MARGIN * low * (high / low) ** r:.4g}")) for r in ratios]
    values: dict[str, Any] = {"method": name, **VARIANTS.get(name, {}), "epochs": options.epochs}
    if name == "rmu":
        stack, _ = decoder_layers(model, 0)
        depth = len(dict(model.named_modules())[stack])
        values["layer"] = min(METHODS["rmu"].defaults.layer, max(0, depth - 2))
    return [BaselineConfig(**values, learning_rate=rate) for rate in options.learning_rates]


def within(config: UnlearnConfig, batches: int, epochs: float) -> UnlearnConfig:
    """The configuration with no more steps than so many passes over so many forget batches have."""
    each = batches if config.batches_per_step is None else min(config.batches_per_step, batches)
    return replace(config, steps=min(config.steps, max(1, math.ceil(epochs * batches / each))))


def strength_of(config: Config) -> str:
    """What distinguishes the tries of one method, in a few words."""
    if isinstance(config, BaselineConfig):
        return f"learning rate {config.learning_rate:g}"
    return f"budget {config.kl_budget:g}" if config.kl_budget is not None else f"step size {config.step_size:g}"


def with_seed(config: Config, seed: int) -> Config:
    """The configuration with another seed."""
    if isinstance(config, BaselineConfig):
        return replace(config, seed=seed)
    return replace(config, fit=replace(config.fit, seed=seed))


# ---- one run


@dataclass(frozen=True)
class Run:
    """What one run left.

    Attributes:
        method, strength, seed: of it.
        config: all options.
        points: from the original model on.
        details: by budget, what `Task.inspect` found of the best model within it, where no earlier try of this
            method and seed had a better one.
        warnings: what a reader should know.
    """

    method: str
    strength: str
    seed: int
    config: dict[str, Any]
    points: list[Point]
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = plain(asdict(self))
        return values


def _run_from_json(values: Mapping[str, Any]) -> Run:
    points = [Point(**point) for point in values["points"]]
    return Run(**{**{f.name: values[f.name] for f in fields(Run)}, "points": points})


class _Meter(Progress):
    """Counts the tokens that stages report, running ones too."""

    def __init__(self) -> None:
        super().__init__()
        self._stages: list[Stage] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "token") -> Iterator[Stage]:
        """As Progress."""
        with super().stage(name, total, unit) as stage:
            if unit == "token":
                self._stages.append(stage)
            yield stage

    @property
    def tokens(self) -> int:
        return sum(stage.done for stage in self._stages)


class _Enough(Exception):
    """The run has nothing more to show."""


class _Recorder:
    """Measures the model of a run as it goes, and keeps the best ones."""

    def __init__(
        self, task: Task, label: str, config: Config, seed: int, budgets: Sequence[float], seconds: float | None
    ) -> None:
        self._task, self._budgets, self._limit = task, budgets, math.inf if seconds is None else seconds
        self._named = {"method": label, "strength": strength_of(config), "seed": seed}
        self.meter = _Meter()
        self.original = {name: p.detach().clone() for name, p in task.model.named_parameters()}
        self.points: list[Point] = []
        self.best: dict[float, tuple[Point, dict[str, Tensor]]] = {}
        self.warnings: list[str] = []
        self.latest, self._next, self.spent = (0, 0.0), 1, 0.0
        self._ruin = RUIN * max(budgets) if isinstance(config, BaselineConfig) else math.inf
        self.measure(0, 0.0)

    def __call__(self, step: int, seconds: float) -> None:
        """Called by the method after each step."""
        begin = time.perf_counter()
        self.latest = (step, seconds)
        if seconds > self._limit:
            self.warnings.append(f"ended at step {step}, at the limit of {self._limit:g} seconds")
            raise _Enough
        if step >= self._next:
            self.measure(step, seconds)
        self.spent += time.perf_counter() - begin

    @property
    def measured(self) -> bool:
        """Whether the latest model was measured."""
        return self.points[-1].step == self.latest[0]

    @torch.no_grad()
    def measure(self, step: int, seconds: float) -> None:
        self._next = max(step + 1, round(step * GROWTH))
        try:
            values = self._task.yardstick(self._task.model)
        except NonFiniteError as error:
            self.warnings.append(f"ended at step {step}: {error}")
            raise _Enough from None
        point = Point(**self._named, step=step, seconds=seconds, tokens=self.meter.tokens, **values)  # type: ignore[arg-type]
        self.points.append(point)
        better = [
            b for b in self._budgets
            if step and point.retain_kl <= b and (b not in self.best or point.distance < self.best[b][0].distance)
        ]  # fmt: skip
        if better and self._task.inspect is not None:
            parameters = self._task.model.named_parameters()
            state = {name: p.detach().clone() for name, p in parameters if not torch.equal(p, self.original[name])}
            self.best.update(dict.fromkeys(better, (point, state)))
        if len(self.points) > 2 and min(p.retain_kl for p in self.points[-2:]) > self._ruin:
            self.warnings.append(f"ended at step {step}: the retain KL is {point.retain_kl:.3g} nats a token")
            raise _Enough

    @torch.no_grad()
    def inspect(self, beat: Mapping[float, float]) -> dict[str, dict[str, Any]]:
        """Look closer at the best models that beat these distances."""
        found: dict[str, dict[str, Any]] = {}
        parameters = dict(self._task.model.named_parameters())
        seen: dict[int, dict[str, Any]] = {}
        for budget, (point, state) in self.best.items():
            if self._task.inspect is None or point.distance >= beat.get(budget, math.inf):
                continue
            if point.step not in seen:
                try:
                    for name, value in state.items():
                        parameters[name].copy_(value)
                    seen[point.step] = self._task.inspect(self._task.model)
                finally:
                    for name in state:
                        parameters[name].copy_(self.original[name])
            found[f"{budget:g}"] = seen[point.step]
        return found


def _start(task: Task, config: Config, recorder: _Recorder) -> Update:
    """Run the method itself."""
    if isinstance(config, BaselineConfig):
        return run_baseline(
            task.model, task.forget, task.retain, config, progress=recorder.meter, every=1, observe=recorder
        )
    begin = time.perf_counter()
    update = unlearn(task.model, task.forget, task.retain, config, progress=recorder.meter, every=1, observe=recorder)
    # The scale is chosen after the last step, so the end is one more model.
    recorder.latest = (recorder.latest[0] + 1, time.perf_counter() - begin - recorder.spent)
    return update


def run(
    task: Task,
    label: str,
    config: Config,
    seed: int,
    options: CompareConfig,
    *,
    beat: Mapping[float, float] | None = None,
) -> Run:
    """One run; the model is left as it was.

    Args:
        task: what to unlearn.
        label: the method's name in tables.
        config: of the method; `seed` replaces its own.
        seed: of the run.
        options: budgets, and the time it may take.
        beat: distances that a model must beat to be inspected, by budget.
    """
    config = with_seed(config, seed)
    recorder = _Recorder(task, label, config, seed, options.budgets, options.seconds)
    try:
        update = _start(task, config, recorder)
        recorder.warnings += update.report.warnings
        if not recorder.measured and recorder.latest[1] <= (options.seconds or math.inf):
            update.apply_(task.model)
            try:
                recorder.measure(*recorder.latest)
            finally:
                update.remove_(task.model)
    except _Enough:
        pass
    except NonFiniteError as error:  # a method of ours refuses to go on
        recorder.warnings.append(str(error))
    details = recorder.inspect(beat or {})
    return Run(label, strength_of(config), seed, asdict(config), recorder.points, details, recorder.warnings)


# ---- all of them


def _file(out: Path, task: Task, label: str, config: Config, seed: int, options: CompareConfig) -> Path:
    made_from = [VERSION, task.digest, asdict(with_seed(config, seed)), options.budgets, options.seconds]
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    return out / f"{task.name}-{label}-{seed}-{digest}.json".replace(" ", "_").replace("/", "_")


def _finished(path: Path) -> Run | None:
    """The run that is in this file; None if there is none, or it is broken."""
    try:
        values = read_json(path)
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            return None
        return _run_from_json(values)
    except (StorageError, KeyError, TypeError):
        return None


def sweep_method(
    task: Task,
    label: str,
    configs: Sequence[Config],
    seed: int,
    options: CompareConfig,
    out: Path,
    *,
    done: Callable[[Run, float], None] = lambda _run, _seconds: None,
) -> list[Run]:
    """All tries of one method and seed, each in a file of `out` once it is finished; finished ones are read.

    Args:
        task, label, seed, options: as `run`.
        configs: the tries.
        out: directory of the files, made if need be.
        done: told of each run, and the seconds it took now (0 for one that was read).
    """
    out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    for config in configs:
        path = _file(out, task, label, config, seed, options)
        found, begin, seconds = _finished(path), time.perf_counter(), 0.0
        if found is None:
            earlier = [point for one in runs for point in one.points if point.step]
            beat = {
                b: min((p.distance for p in earlier if p.retain_kl <= b), default=math.inf) for b in options.budgets
            }
            found = run(task, label, config, seed, options, beat=beat)
            seconds = time.perf_counter() - begin
            values = {"format": FORMAT, "version": VERSION, **found.to_json()}
            write_text(path, json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
        runs.append(found)
        done(found, seconds)
    return runs


def sweep(
    task: Task,
    methods: Mapping[str, Sequence[Config]],
    options: CompareConfig,
    out: Path,
    *,
    progress: Progress | None = None,
) -> list[Run]:
    """Every method, try and seed.

    Args:
        task: what to unlearn.
        methods: tries by label.
        options: budgets, seeds and allowance.
        out: directory of the runs; those that are finished there already are not run again.
        progress: where to say how far it is, and how long it will take.
    """
    progress = progress or Progress()
    runs: list[Run] = []
    total, taken = options.seeds * sum(len(configs) for configs in methods.values()), [0.0]

    def done(found: Run, seconds: float) -> None:
        if seconds:
            taken.append(seconds)
        runs.append(found)
        left = (total - len(runs)) * sum(taken) / max(1, len(taken) - 1)
        progress.say(line_of(found, seconds, f"{len(runs)}/{total}") + f"; about {left / 60:.0f} min left")

    for seed in range(options.seeds):
        for label, configs in methods.items():
            sweep_method(task, label, configs, seed, options, out, done=done)
    return runs


def line_of(run: Run, seconds: float, count: str) -> str:
    """One line on a finished run."""
    last = run.points[-1]
    how = f"{seconds:.0f} s" if seconds else "finished before"
    return (
        f"{count} {TITLES.get(run.method, run.method)}, {run.strength}, seed {run.seed}: {how}; at its end forget NLL"
        f" {last.forget_nll:.2f}, retain KL {last.retain_kl:.3g}"
    )


# ---- what comes of it


@dataclass(frozen=True)
class Sweep:
    """A comparison that is finished.

    Attributes:
        name: of what was unlearned.
        options: budgets, seeds and allowance.
        runs: all.
        retrained: what the yardstick and `inspect`'s values say of the retrained model, a mapping for each seed's
            model; empty without one.
        original: the same of the original model; its points serve where this is empty.
        questions: of which `inspect` gives replies.
        replies: to these by other models, by name: those of the original and the retrained one.
        titles: of labels that are no method's name; where there are any, variants of K-FADE are compared.
    """

    name: str
    options: CompareConfig
    runs: list[Run] = field(repr=False)
    retrained: list[dict[str, Any]] = field(default_factory=list)
    original: list[dict[str, Any]] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    replies: dict[str, list[str]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    @property
    def points(self) -> list[Point]:
        return [point for one in self.runs for point in one.points]

    @property
    def aims(self) -> bool:
        """Whether there is a retrained model."""
        return bool(self.retrained)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = plain(asdict(self))
        return values

    def title(self, label: str) -> str:
        """A method's name for people."""
        return self.titles.get(label, TITLES.get(label, label))

    def detail(self, point: Point, budget: float) -> dict[str, Any]:
        """What `inspect` found of a chosen point; empty if it was not inspected."""
        for one in self.runs:
            if (one.method, one.strength, one.seed) == (point.method, point.strength, point.seed):
                return one.details.get(f"{budget:g}", {})
        return {}

    def rows(self) -> list[dict[str, Any]]:
        """The chosen points: one row a budget, method and seed, and again within the time that K-FADE took."""
        found = []
        for budget in self.options.budgets:
            chosen = at_equal_kl(self.points, budget)
            for limit in (None, our_seconds(chosen)):
                some = chosen if limit is None else at_equal_kl(self.points, budget, seconds=limit)
                if limit is None or math.isfinite(limit):
                    found += [self._row(p, budget, limit) for points in some.values() for p in points]
        return found

    def _row(self, point: Point, budget: float, limit: float | None) -> dict[str, Any]:
        values = asdict(point)
        others = values.pop("others")
        detail = self.detail(point, budget).get("values", {}) if limit is None else {}
        return {
            "task": self.name, "budget": budget, "within_seconds": None if limit is None else round(limit, 2),
            **{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()},
            "others": json.dumps({k: float(f"{v:.5g}") for k, v in {**others, **detail}.items()}, sort_keys=True),
        }  # fmt: skip


def ranked(chosen: Mapping[str, Sequence[Point]]) -> list[str]:
    """Methods that have a point, the best mean distance first."""
    return sorted(
        (m for m, points in chosen.items() if points), key=lambda m: spread([p.distance for p in chosen[m]])[0]
    )


def our_best(chosen: Mapping[str, Sequence[Point]]) -> str | None:
    """The better of K-FADE in one step and in many, by mean distance; None if neither has a point."""
    return next((method for method in ranked(chosen) if method in OWN), None)


def our_seconds(chosen: Mapping[str, Sequence[Point]]) -> float:
    """The longest that the better K-FADE took to the points that were chosen of it; infinity if it was not run."""
    best = our_best(chosen)
    return max(p.seconds for p in chosen[best]) if best else math.inf


def verdict(sweep: Sweep, budget: float) -> str:
    """In plain words: which method is best within a budget, and how far K-FADE is ahead of the others or behind."""
    chosen = at_equal_kl(sweep.points, budget)
    order = ranked(chosen)
    means = {method: spread([p.distance for p in chosen[method]]) for method in order}
    sign = 1 if sweep.aims else -1

    def shown(method: str) -> str:
        mean, deviation = means[method]
        return f"{sign * mean:.3g} ± {deviation:.2g}" if len(chosen[method]) > 1 else f"{sign * mean:.3g}"

    what = "nats a token from the retrained model" if sweep.aims else "nats a token of forget NLL"
    text = f"Within a retain KL of {budget:g}, {sweep.title(order[0])} is best: {shown(order[0])} {what}."
    rival = next((method for method in order if method not in OWN), None)
    if rival is None:
        return text
    kind = "variant" if sweep.titles else "baseline"
    against = f"the best {kind}, {sweep.title(rival)}" + (f" ({shown(rival)})" if rival != order[0] else "")
    for method in (m for m in order if m in OWN):
        lead = means[rival][0] - means[method][0]
        pairs = [(a.distance, b.distance) for a, b in zip(chosen[method], chosen[rival], strict=False)]
        wins = f"better in {sum(a < b for a, b in pairs)} of {len(pairs)} seed{'s' * (len(pairs) > 1)}"
        name = sweep.title(method) + (f" ({shown(method)})" if method != order[0] else "")
        text += f" {name} is {abs(lead):.2g} {'ahead of' if lead > 0 else 'behind'} {against}: {wins}."
    return text


def points_csv(points: Sequence[Point]) -> str:
    """All points, a line each; further data in columns of their own."""
    names = sorted({name for point in points for name in point.others})
    columns = [f.name for f in fields(Point) if f.name != "others"]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *(f"{name}_kl" for name in names)])
    writer.writeheader()
    for point in points:
        others = {f"{name}_kl": value for name, value in point.others.items()}
        writer.writerow({**{c: getattr(point, c) for c in columns}, **others})
    return text.getvalue()


def ablation(base: UnlearnConfig | None = None) -> dict[str, UnlearnConfig]:
    """K-FADE in many steps with one thing changed at a time, by what it is."""
    base = base or UnlearnConfig.stepwise()

    def fit(**changes: Any) -> UnlearnConfig:
        return replace(base, fit=FitConfig(**{**asdict(base.fit), **changes}))

    found = {OURS: base}
    found |= {f"curvature: {name}": fit(curvature=name) for name in CURVATURES}
    found |= {f"layers: {name}": fit(modules=name) for name in ("mlp", "attention", "all-linear")}
    found |= {f"damping {base.damping * f:g}": replace(base, damping=base.damping * f) for f in (0.1, 10.0)}
    found |= {f"{count} steps": replace(base, steps=count) for count in (max(2, base.steps // 4), 4 * base.steps)}
    found |= {f"objective: {name}": replace(base, objective=name) for name in OBJECTIVES}
    found["fitted again at every quarter"] = replace(base, refit_every=max(1, base.steps // 4))
    found["no retain-KL term"] = replace(base, retain_weight=0.0)
    found["Fisher at temperature 1"] = fit(temperature=1.0)
    found["fitted on all of the retain set"] = replace(base, tokens_per_dimension=None)
    found["one step, as published"] = UnlearnConfig(kl_budget=base.kl_budget)
    return {name: config for name, config in found.items() if name == OURS or config != base}


# ---- from names to a comparison


def compare(
    model: str,
    sets: Mapping[str, Sequence[Record]],
    options: CompareConfig,
    out: Path,
    *,
    retrained: str | None = None,
    loss_on: str = "response",
    max_new_tokens: int = 32,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
    **batching: Any,
) -> Sweep:
    """Compare methods on a model of the disk or the hub.

    Args:
        model: what `models.load_model` takes.
        sets: records to `forget` and `retain`, of which every so many is kept from the methods; and others, on which
            KL from the original is measured.
        options: methods, budgets, seeds and allowance.
        out: directory; finished runs are in its `runs`.
        retrained: a model trained without the forget set, with the same tokenizer.
        loss_on: what of a forget record is unlearned and measured; see `data.make_batches`.
        max_new_tokens: of the replies to a few questions; 0 asks none.
        dtype, device: of the models.
        progress: where to show progress and record costs.
        batching: `chat`, `batch_size` and `max_tokens` of `data.make_batches`.

    Raises:
        ValueError: a bad option or model, or too few retain records.
    """
    progress = progress or Progress()
    check_methods(options.methods)
    records, share = sets["retain"], options.holdout
    held = [r for i, r in enumerate(records) if math.floor((i + 1) * share) > math.floor(i * share)]
    kept = [r for i, r in enumerate(records) if math.floor((i + 1) * share) == math.floor(i * share)]
    if not held or not kept:
        raise ValueError(
            f"holdout is {share} and there are {len(records)} retain records; it must leave some on each side"
        )
    shown = [r for r in sets["forget"] if r.prompt][:3] + [r for r in held if r.prompt][:3]
    asking = {name: batching[name] for name in ("chat", "max_tokens") if name in batching}

    def load(name: str) -> tuple[Any, Any]:
        with progress.stage(f"load {name}"):
            return models.load_model(name, dtype, device)

    loaded, tokenizer = load(model)

    def replies(of: Any) -> list[str]:
        if not shown or not max_new_tokens:
            return []
        return [g.reply for g in generations(of, tokenizer, shown, max_new_tokens=max_new_tokens, **asking)]

    forget = make_batches(tokenizer, sets["forget"], loss_on=loss_on, **batching)
    batches = {name: make_batches(tokenizer, some, **batching) for name, some in sets.items() if name != "forget"}
    batches["retain"] = make_batches(tokenizer, kept, **batching)
    others = {name: some for name, some in batches.items() if name != "retain"}
    with progress.stage("original outputs"):
        yardstick = Yardstick(loaded, forget, make_batches(tokenizer, held, **batching), others)
        said = {"original": replies(loaded)}
    if retrained is not None:
        # Two models need not fit in memory.
        del loaded
        gc.collect()
        other, _ = load(retrained)
        with progress.stage("retrained outputs"):
            yardstick.aim(other)
            said["retrained"] = replies(other)
        del other
        gc.collect()
        loaded, _ = load(model)
    task = Task("compare", loaded, forget, batches["retain"], yardstick, lambda m: {"replies": replies(m)})
    methods = {name: tries(name, loaded, len(forget), options) for name in options.methods}
    runs = sweep(task, methods, options, out / "runs", progress=progress)
    target = [] if yardstick.retrained is None else [yardstick.retrained]
    asked = [r.prompt for r in shown] if max_new_tokens else []
    return Sweep("Comparison", options, runs, target, [], asked, said if asked else {})

"""One run of a method, measured on its way; and all runs of a sweep, each in a file of its own once it is finished."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..baselines import BaselineConfig, run_baseline
from ..config import CompareConfig
from ..errors import NonFiniteError, StorageError
from ..evaluate import Evaluation, References, references, scores
from ..models import weights_sha256
from ..progress import Progress, Stage
from ..storage import plain, read_json, tensors_sha256, write_text
from ..unlearn import unlearn
from ..update import Update
from .methods import TITLES, Config, strength_of, with_seed
from .points import Point

FORMAT, VERSION = "kfade-compare-run", 1
Batches = Sequence[Mapping[str, Tensor]]
Inspect = Callable[[Any], dict[str, Any]]

# Steps at which a run is measured: each so many times the last.
GROWTH = 1.5
# A baseline's run ends early after two points in a row whose retain KL is so many times the largest budget; K-FADE is
# scaled to its budget at the end.
RUIN = 30.0


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

"""What comes of a finished sweep: the best within each budget, the order of methods, a verdict in words, and rows."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..config import CompareConfig
from ..storage import plain
from .methods import OWN, TITLES
from .points import Point, at_equal_kl, spread
from .runs import Run


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
        variants: it is K-FADE that is compared, with one thing changed at a time.
    """

    name: str
    options: CompareConfig
    runs: list[Run] = field(repr=False)
    retrained: list[dict[str, Any]] = field(default_factory=list)
    original: list[dict[str, Any]] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    replies: dict[str, list[str]] = field(default_factory=dict)
    variants: bool = False

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

    @staticmethod
    def title(label: str) -> str:
        """The name for people, of a method; a variant has its own."""
        return TITLES.get(label, label)

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
    """The better of K-FADE by default and as published, by mean distance; None if neither has a point."""
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
    if all(point.step == 0 for point in chosen[order[0]]):
        return f"Within a retain KL of {budget:g}, nothing is better than the original model: {shown(order[0])} {what}."
    text = f"Within a retain KL of {budget:g}, {sweep.title(order[0])} is best: {shown(order[0])} {what}."
    rival = next((method for method in order if method not in OWN), None)
    if rival is None:
        return text
    kind = "variant" if sweep.variants else "baseline"
    against = f"the best {kind}, {sweep.title(rival)}" + (f" ({shown(rival)})" if rival != order[0] else "")
    for method in (m for m in order if m in OWN):
        lead = means[rival][0] - means[method][0]
        pairs = [(a.distance, b.distance) for a, b in zip(chosen[method], chosen[rival], strict=False)]
        wins = f"better in {sum(a < b for a, b in pairs)} of {len(pairs)} seed{'s' * (len(pairs) > 1)}"
        name = sweep.title(method) + (f" ({shown(method)})" if method != order[0] else "")
        text += f" {name} is {abs(lead):.2g} {'ahead of' if lead > 0 else 'behind'} {against}: {wins}."
    return text


def points_csv(sweeps: Sequence[Sweep]) -> str:
    """All points, a line each, with the name of their sweep as in `rows`; further data in columns of their own."""
    points = [(sweep.name, point) for sweep in sweeps for point in sweep.points]
    names = sorted({name for _, point in points for name in point.others})
    columns = [f.name for f in fields(Point) if f.name != "others"]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["task", *columns, *(f"{name}_kl" for name in names)])
    writer.writeheader()
    for task, point in points:
        others = {f"{name}_kl": value for name, value in point.others.items()}
        writer.writerow({"task": task, **{c: getattr(point, c) for c in columns}, **others})
    return text.getvalue()

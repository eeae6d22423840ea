"""Unlearning methods side by side: at one allowance, what each forgets for what it damages.

A run is one method with one configuration and seed. It leaves a trail of points, each a model that was really there:
how far it is from the retrained model on the forget set (or, without one, its forget NLL), and its KL from the
original model on retain data that no method sees. `at_equal_kl` picks for each method and seed the best point within
a budget of that KL; nothing is interpolated. Every finished run is one file, so that an interrupted sweep goes on.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import models
from ..config import CompareConfig
from ..data import Record, make_batches
from ..evaluate import generations
from ..progress import Progress
from .methods import MARGIN, NAMES, OURS, PUBLISHED, ablation, check_methods, tries
from .points import Point, at_equal_kl, spread
from .results import Sweep, our_seconds, verdict
from .runs import Run, Task, Yardstick, line_of, sweep, sweep_method

__all__ = [
    "MARGIN",
    "NAMES",
    "OURS",
    "PUBLISHED",
    "Point",
    "Run",
    "Sweep",
    "Task",
    "Yardstick",
    "ablation",
    "at_equal_kl",
    "check_methods",
    "compare",
    "line_of",
    "our_seconds",
    "spread",
    "sweep",
    "sweep_method",
    "tries",
    "verdict",
]


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
    methods = {name: tries(name, loaded, forget, options) for name in options.methods}
    runs = sweep(task, methods, options, out / "runs", progress=progress)
    target = [] if yardstick.retrained is None else [yardstick.retrained]
    asked = [r.prompt for r in shown] if max_new_tokens else []
    return Sweep("Comparison", options, runs, target, [], asked, said if asked else {})

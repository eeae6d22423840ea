"""What ranks do in tests: functions of a module that their processes can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
from torch import nn
from torch.distributed import ProcessGroup

import kfade
from kfade import FitConfig, distributed

CASES = {
    "ekfac": FitConfig(modules="all-linear"),
    "kfac": FitConfig(modules="all-linear", curvature="kfac"),
    "diagonal": FitConfig(modules="all-linear", curvature="diagonal"),
    "identity": FitConfig(modules="all-linear", curvature="identity"),
    "passes": FitConfig(modules="all-linear", layers_per_pass=3, samples=2),
    "low rank": FitConfig(modules="all-linear", rank=4),
    "empirical": FitConfig(modules="mlp", fisher="empirical"),
}


def batches() -> list[models.Batch]:
    """Of three lengths and paddings, so that two ranks have unlike shares and the fourth of four has none."""
    shapes = (("none", 4, 9), ("right", 3, 12), ("left", 2, 7))
    return [models.batch(p, sequences=s, tokens=t, seed=i) for i, (p, s, t) in enumerate(shapes)]


def fit_and_save(group: ProcessGroup, folder: Path, kind: str = "llama", names: tuple[str, ...] = tuple(CASES)) -> Any:
    told = {}
    for name in names:
        fitted = kfade.fit(models.tiny(kind), batches(), CASES[name], group=group)
        fitted.save(folder / name)
        told[name] = list(fitted.layers)
    return told


def look_around(group: ProcessGroup) -> dict[str, Any]:
    """What a rank can do with its part of a curvature, and how the rest is refused."""
    model, config = models.tiny("llama"), CASES["ekfac"]
    one = kfade.fit(model, batches(), config)
    fitted = kfade.fit(model, batches(), config, group=group)
    gradients = {name: torch.randn(s.d_out, s.width_in, dtype=torch.float64) for name, s in one.items()}
    other = next(name for name in one if name not in fitted.layers)
    told: dict[str, Any] = {"held": set(fitted), "all": set(fitted.owners), "factor": ""}
    told["missing"] = message(lambda: fitted[other])
    told["solve"] = message(lambda: fitted.solve(gradients))
    own = {name: gradients[name] for name in fitted}
    here, there = (c.solve_matrices(own, 0.1, "relative") for c in (fitted, one))
    told["solved"] = max(float((here[n] - there[n]).norm() / there[n].norm()) for n in own)
    for state in fitted.values():
        if state.a_sum is None:
            told["factor"] = message(state.input_factor)
    return told


def message(action: Callable[[], Any]) -> str:
    """Of the error that an action raises; empty if it raises none."""
    try:
        action()
    except Exception as error:
        return str(error)
    return ""


def fingerprint(group: ProcessGroup) -> float:
    """The values of all tensors of a rank, in float32."""
    fitted = kfade.fit(models.tiny("llama", torch.float32), batches(), CASES["ekfac"], group=group)
    tensors = [t for s in fitted.values() for t in (s.q_in, s.q_out, s.lambda_sum, s.lambda_in) if t is not None]
    return [t.double().sum().item() for t in tensors]  # type: ignore[return-value]


def unlike(group: ProcessGroup, what: str) -> None:
    """A fit that rank 1 is given something else for."""
    odd = group.rank() == 1
    model, data = models.tiny("llama"), batches()
    if what == "batches" and odd:
        data = data[:2]
    if what == "weights" and odd:
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1e-12
    kfade.fit(model, data, FitConfig(seed=int(what == "options" and odd)), group=group)


def fit_into(group: ProcessGroup, folder: Path) -> None:
    kfade.fit(models.tiny("llama"), batches(), store=folder, group=group)


def fail(group: ProcessGroup, when: str, how: str) -> Any:
    """A fit in which rank 1 ends; the others say what they raise and after how many seconds."""
    distributed.BEAT_SECONDS, distributed.SILENT_SECONDS = 0.2, 2.0
    model, begin = models.tiny("llama"), time.monotonic()
    if group.rank() == 1:
        _end_at(model, when, how)
    try:
        kfade.fit(model, batches(), CASES["ekfac"], group=group)
    except distributed.RankError as error:
        return error, time.monotonic() - begin


def _end_at(model: nn.Module, when: str, how: str) -> None:
    """Let this process end at a point of a fit."""

    def end(*_: Any, **__: Any) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("in the midst of it")

    if when == "forward":
        model.model.layers[1].register_full_backward_hook(end)  # type: ignore[union-attr, index]
    elif when == "decomposition":
        torch.linalg.eigh = end
    else:
        distributed.dist.reduce = end

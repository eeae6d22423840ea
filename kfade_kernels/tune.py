"""Measure launch configurations on a GPU, offline, and write the fastest correct ones.

    python -m kfade_kernels.tune --operation syrk --orders 1024 4096 8192 --dtype bfloat16
    python -m kfade_kernels.tune --operation product --dtype float32 --out tuned.json

Every candidate runs on scratch data and is held against float64 before it is timed, with a cold cache. What is
shipped is tried first, and the others in a random order, since the first call of each takes a second to compile:
the budget is shared out to the orders, and entries are written after each. The entries carry the device by its
name, so they serve that device alone, and replace older entries of the same device, dtype, size class and Triton
version; all others stay. Without `--out` they go into the file that the kernel is shipped with.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import problems
from .configurations import Configuration, Entry, choose, forced, path_of, read, size_class, unfit, write
from .devices import Device, of_tensors
from .packed import PANEL_ROWS
from .problems import Problem, Reference
from .timing import Timer, Times, Work
from .triton_support import short, triton_version

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
REPEATS = 20


@dataclass(frozen=True)
class Search:
    """What is tried for one kernel.

    Attributes:
        fields: of a configuration, with the values of each.
        problem: makes the problem of an order (or row length), dtype and device.
        accumulators: tiles of float32 that a program holds.
        sound: whether the kernel is written for a configuration.
    """

    fields: Mapping[str, Sequence[Any]]
    problem: Callable[[int, torch.dtype, torch.device], Problem]
    accumulators: int = 1
    sound: Callable[[Configuration], bool] = lambda _: True


def _product_problem(order: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """16-bit products are rotations of tokens, float32 ones solves."""
    if dtype == torch.float32:
        return problems.solve(order, order, dtype, device)
    return problems.rotation(8192, order, dtype, device)


_TILES = {"block_m": (64, 128), "block_n": (64, 128, 256), "block_k": (32, 64), "warps": (4, 8), "stages": (2, 3, 4)}
SEARCHES = {
    "syrk": Search(
        {**_TILES, "programs": (1, 2), "descriptors": (False, True)},
        lambda order, dtype, device: problems.outer_product(16384, order, dtype, device),
        # Squares of block_n are walked in tiles of block_m rows, and no tile lies across two panels.
        sound=lambda c: c.block_n % c.block_m == 0 and PANEL_ROWS % c.block_m == 0,
    ),
    "product": Search({**_TILES, "programs": (1, 2)}, _product_problem),
    "eigenvalue_correction": Search(
        _TILES,
        lambda order, dtype, device: problems.correction(8, 512, order, order, dtype, device, rotated=True),
        accumulators=2,
    ),
    "sampled_cross_entropy": Search(
        {"block_n": (1024, 2048, 4096, 8192), "warps": (4, 8, 16), "programs": (1, 2, 4)},
        lambda vocabulary, dtype, device: problems.cross_entropy(4096, vocabulary, dtype, device),
        accumulators=0,
    ),
    "apply_update": Search(
        {"block_n": (1024, 2048, 4096, 8192), "warps": (4, 8), "programs": (2, 4, 8)},
        lambda elements, dtype, device: problems.update([(elements,)] * 16, dtype, device),
        accumulators=0,
    ),
}


def precisions(device: Device, dtype: torch.dtype) -> tuple[str, ...]:
    """Ways to multiply that keep float32 grade. On sm_100 Triton compiles `bf16x6` to a trap."""
    if dtype != torch.float32 or device.architecture.startswith("gfx"):
        return ("ieee",)
    return ("tf32x3",) if device.architecture.startswith("sm_10") else ("tf32x3", "bf16x6")


def candidates(kernel: str, device: Device, dtype: torch.dtype) -> list[Configuration]:
    """The configurations of a kernel's grid that can run on a device, in a fixed order."""
    search = SEARCHES[kernel]
    products = search.accumulators > 0
    fields = {**search.fields, **({"precision": precisions(device, dtype)} if products else {})}
    found = []
    for values in itertools.product(*fields.values()):
        c = Configuration(**dict(zip(fields, values, strict=True)))
        if search.sound(c) and unfit(c, device, dtype.itemsize if products else 0, search.accumulators) is None:
            found.append(c)
    return found


@dataclass
class Trial:
    """What one configuration did, order by order.

    Attributes:
        configuration: what was tried.
        seconds: median of each order that was timed.
        fault: why it is out of the race, or None.
    """

    configuration: Configuration
    seconds: dict[int, float] = field(default_factory=dict)
    fault: str | None = None


def measure(
    kernel: str,
    trials: Sequence[Trial],
    order: int,
    problem: Problem,
    timer: Callable[[Work], float],
    check: Callable[[Problem, Reference | None], str | None] = problems.fault,
    until: float = math.inf,
) -> None:
    """Check and time every trial that is still in the race, on one problem.

    Args:
        kernel: whose configuration is forced.
        trials: get their seconds, or their fault.
        order: of the problem.
        problem: scratch data.
        timer: seconds of one call with a cold cache.
        check: what is wrong with the results, or None.
        until: no trial begins after this time of `time.monotonic`.

    Raises:
        RuntimeError: a trial has left the device unusable for this process.
    """
    against = problems.reference(problem)
    for trial in trials:
        if trial.fault is not None:
            continue
        if time.monotonic() > until:
            return
        with forced(kernel, trial.configuration, problem.operands or problem.dtype), problems.by("triton"):
            try:
                trial.fault = check(problem, against)
                if trial.fault is None:
                    timer(problem.run)
                    trial.seconds[order] = Times.of([timer(problem.run) for _ in range(REPEATS)]).median
            except Exception as error:  # a compiler may fail in any way, and the next candidate is none the worse
                trial.fault = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                if problem.device.type == "cuda":
                    torch.cuda.synchronize(problem.device)


def best(trials: Iterable[Trial], orders: Sequence[int]) -> Trial | None:
    """The sound trial whose times, each relative to the best at that order, are least in sum."""
    sound = [t for t in trials if t.fault is None and all(order in t.seconds for order in orders)]
    if not sound:
        return None
    least = {order: min(t.seconds[order] for t in sound) for order in orders}
    return min(sound, key=lambda t: sum(t.seconds[order] / least[order] for order in orders))


def entries_of(
    trials: Sequence[Trial], orders: Sequence[int], device: Device, dtype: torch.dtype, triton: str, date: str
) -> list[Entry]:
    """One entry for each size class that was measured and has a sound configuration."""
    classes: dict[str, list[int]] = {}
    for order in orders:
        classes.setdefault(size_class(order), []).append(order)
    found = []
    for size, members in classes.items():
        winner = best(trials, members)
        if winner is not None:
            version = ".".join(triton.split(".")[:2])
            found.append(Entry(device.name, short(dtype), size, version, winner.configuration, f"measured {date}"))
    return found


def merged(existing: Iterable[Entry], new: Sequence[Entry]) -> list[Entry]:
    """All entries, the new ones in the place of older ones of the same device, dtype, size and Triton version."""

    def key(entry: Entry) -> tuple[str, str, str, str]:
        return entry.device, entry.dtype, entry.size, entry.triton

    replaced = {key(entry) for entry in new}
    return [entry for entry in existing if key(entry) not in replaced] + list(new)


def tune(
    kernel: str,
    orders: Sequence[int],
    dtype: torch.dtype,
    device: Device,
    make: Callable[[int], Problem],
    timer: Callable[[Work], float],
    check: Callable[[Problem, Reference | None], str | None] = problems.fault,
    say: Callable[[str], object] = print,
    seconds: float = math.inf,
    save: Callable[[list[Trial], Sequence[int]], object] = lambda *_: None,
) -> list[Trial]:
    """Try the candidates of a kernel on every order, as far as the time goes.

    Args:
        kernel, dtype, device: what is tuned.
        orders: of the problems.
        make: a problem of an order.
        timer, check: see `measure`.
        say: takes lines of text.
        seconds: for all orders together.
        save: takes the trials, and the orders that are done, after each order.

    Raises:
        RuntimeError: Triton would serve the problem of no order, or a trial has left the device unusable.
    """
    end = time.monotonic() + seconds
    found = candidates(kernel, device, dtype)
    random.Random(0).shuffle(found)
    first = {choose(kernel, device, dtype, order, triton_version()) for order in orders}
    trials = [Trial(c) for c in sorted(found, key=lambda c: c not in first)]
    refusals: list[str] = []
    for number, order in enumerate(orders):
        problem = make(order)
        refused = problems.served_here(problem)
        if refused is not None:
            refusals.append(f"operation is {kernel}; Triton does not serve it at {order}: {refused}")
            say(refusals[-1])
            continue
        now = time.monotonic()
        try:
            measure(kernel, trials, order, problem, timer, check, now + (end - now) / (len(orders) - number))
        finally:
            save(trials, orders[: number + 1])
        left = [t for t in trials if t.fault is None and order in t.seconds]
        say(f"{kernel} {short(dtype)} {order}: {len(left)} of {len(trials)} configurations were tried and are correct")
        for trial in sorted(left, key=lambda t: t.seconds[order])[:5]:
            say(f"  {trial.seconds[order] * 1e6:10.1f} µs  {trial.configuration}")
    if len(refusals) == len(orders):
        raise RuntimeError("; ".join(refusals))
    return trials


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operation", choices=SEARCHES, required=True, help="the kernel, by its folder")
    parser.add_argument("--orders", type=int, nargs="+", default=[512, 2048, 8192], help="orders, or row lengths")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="for all orders together")
    parser.add_argument("--out", type=Path, help="file of entries, in the place of the shipped one")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: there is no GPU here; configurations are measured on one", file=sys.stderr)
        return 2
    if min(options.orders) < 1:
        print(f"error: orders are {options.orders}; each must be at least 1", file=sys.stderr)
        return 2
    where, dtype = torch.device("cuda"), DTYPES[options.dtype]
    device, search = of_tensors(where), SEARCHES[options.operation]
    path = options.out or path_of(options.operation)
    today = datetime.date.today().isoformat()
    new: list[Entry] = []

    def save(trials: list[Trial], orders: Sequence[int]) -> None:
        new[:] = entries_of(trials, orders, device, dtype, triton_version(), today)
        write(path, merged(read(path), new))

    torch.manual_seed(0)
    trials = tune(
        options.operation, options.orders, dtype, device, lambda order: search.problem(order, dtype, where),
        Timer(where), seconds=options.budget_seconds, save=save,
    )  # fmt: skip
    faults = {trial.fault for trial in trials if trial.fault}
    for number, text in enumerate(sorted(faults)):
        if number < 10:
            print(f"  out: {text}")
    for entry in new:
        print(f"{entry.device}, {entry.dtype}, {entry.size}: {entry.configuration}")
    print(f"{len(new)} entries written to {path}")
    return int(not new)


if __name__ == "__main__":
    sys.exit(main())

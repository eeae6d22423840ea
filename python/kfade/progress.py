"""Progress on stderr (stage, rate, time left), and what each stage cost."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text


@dataclass(frozen=True)
class StageCost:
    """What one stage took.

    Attributes:
        name: of the stage.
        seconds: wall time.
        units: how much was done.
        unit: of what.
        peak_bytes: highest resident memory of the process during the stage (since its start where
            the system cannot reset the mark).
    """

    name: str
    seconds: float
    units: int
    unit: str
    peak_bytes: int

    @property
    def rate(self) -> float:
        """Units a second."""
        return self.units / self.seconds if self.seconds > 0 else 0.0

    def summary(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {**asdict(self), "rate": self.rate}


def reset_peak() -> None:
    """Begin a new measurement of peak memory, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Highest resident memory since the last stage began (Linux), else since the process began."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def return_freed_memory(from_bytes: int | None = 1 << 20) -> None:
    """Give what is freed back to the system, where glibc keeps it.

    It keeps freed blocks of up to 32 MiB otherwise, between others that are in use: resident memory then lies well
    above what is alive. A block that is returned costs a page fault per 4 KiB when it is taken again.

    Args:
        from_bytes: blocks of so many bytes and more go back at once, from now on: in a fit of large batches that took
            a sixth more CPU time. None returns only what is free now, in a millisecond.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        if from_bytes is not None:
            library.mallopt(-3, from_bytes)  # M_MMAP_THRESHOLD
        library.malloc_trim(0)


def seconds_text(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {int(value % 60)} s"


def _per_second(rate: float, unit: str) -> str:
    # Questions and answers take a second each, tokens do not.
    return f"{rate:,.0f} {unit}s/s" if rate >= 10 else f"{rate:.2g} {unit}s/s"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text(_per_second(rate, task.fields["unit"]) if rate else "", style="cyan")


class Stage:
    """A running stage; call `advance` as work is done."""

    def __init__(self, bar: RichProgress | None, task: TaskID | None) -> None:
        self._bar, self._task = bar, task
        self.done = 0

    def advance(self, units: int) -> None:
        self.done += units
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=units)


@dataclass
class Progress:
    """Shows stages and records their cost.

    Attributes:
        show: whether to draw on stderr; without a terminal, one line a finished stage.
        costs: of the finished stages, in order.
    """

    show: bool = False
    costs: list[StageCost] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "token") -> Iterator[Stage]:
        """Time one stage; nested stages are timed too, and drawn below their parent's name."""
        console = Console(file=sys.stderr)  # bound now: inside a stage stderr may be redirected
        live = self.show and console.is_terminal and not getattr(self, "_live", False)
        bar = None
        task = None
        if live:
            bar = RichProgress(
                TextColumn("{task.description:<24}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
                console=console,
            )
            task = bar.add_task(name, total=total, unit=unit)
            bar.start()
            self._live = True
        reset_peak()
        begin = time.perf_counter()
        stage = Stage(bar, task)
        try:
            yield stage
            cost = StageCost(name, time.perf_counter() - begin, stage.done, unit, peak_bytes())
            self.costs.append(cost)
        finally:
            if bar is not None:
                bar.stop()
                self._live = False
        if self.show and not live:
            rate = f", {_per_second(cost.rate, unit)}" if cost.units else ""
            print(f"{name}: {cost.seconds:.1f} s{rate}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """One line on stderr."""
        if self.show:
            print(text, file=sys.stderr, flush=True)

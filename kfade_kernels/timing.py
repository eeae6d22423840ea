"""How calls are timed: taking turns, with a cold cache, medians; and the memory that a call needs besides.

On a GPU a call is timed between two CUDA events. Before it a buffer larger than the last-level cache is
written a few times, so that operands come from memory, and so that the host is ahead of the device
when the call is launched. On a CPU the clock is read before and after.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .devices import of_tensors

Work = Callable[[], object]
_FLUSHES, _SMALLEST_FLUSH = 4, 256 << 20


@dataclass(frozen=True)
class Times:
    """Seconds of one call: median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


class Timer:
    """Times single calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            size = max(_SMALLEST_FLUSH, 2 * of_tensors(device).l2_bytes)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, work: Work) -> float:
        """Seconds of one call."""
        if self._flush is None:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(_FLUSHES):
            self._flush.zero_()
        # Of this device, which need not be the current one.
        stream = torch.cuda.current_stream(self.device)
        start.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def interleaved(
    providers: Mapping[str, Work], timer: Callable[[Work], float], *, repeats: int, seconds: float = float("inf")
) -> dict[str, Times]:
    """Time providers in turns, so that a drift of the clock meets all of them.

    Args:
        providers: by name.
        timer: gives the seconds of one call.
        repeats: rounds, after one that warms up and is not counted.
        seconds: no round begins once so much wall time has gone by; one is always made.
    """
    begin = time.perf_counter()
    for work in providers.values():
        timer(work)
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(repeats):
        if number and time.perf_counter() - begin > seconds:
            break
        for name, work in providers.items():
            samples[name].append(timer(work))
    return {name: Times.of(found) for name, found in samples.items()}


def extra_bytes(work: Work, device: torch.device) -> int:
    """Highest memory that one call holds beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler of some releases says when it starts and stops, past Python's own stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

"""`kfade bench`: the operations on the device at hand, beside the plain PyTorch that they replace.

`CASES` is the one table of what is run; the pytest-benchmark suite takes its cases from it too.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from kfade_kernels import problems
from kfade_kernels.cost import predict, product_rate
from kfade_kernels.devices import of_tensors
from kfade_kernels.problems import Problem
from kfade_kernels.timing import Timer, Times, Work, extra_bytes, interleaved

from .progress import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = ("small", "medium", "large")
OURS = "kfade"


def _cross_entropy(*, device: torch.device, **sizes: Any) -> Problem:
    # Each device draws in the way that is cheap on it.
    return problems.cross_entropy(device=device, labels="uniform" if device.type == "cpu" else "keys", **sizes)


@dataclass(frozen=True)
class Case:
    """One operation: what makes a problem of it, and the sizes of each class.

    Small takes milliseconds on two cores, medium seconds, and large is for a GPU.
    """

    make: Callable[..., Problem]
    small: Sequence[Mapping[str, Any]]
    medium: Sequence[Mapping[str, Any]]
    large: Sequence[Mapping[str, Any]]

    def problems(self, sizes: str, dtype: torch.dtype, device: torch.device) -> Iterator[Problem]:
        """The problems of one class, made one at a time."""
        for given in getattr(self, sizes):
            yield self.make(**given, dtype=dtype, device=device)


CASES = {
    "syrk_": Case(
        problems.outer_product,
        small=[{"rows": 1024, "order": 576}, {"rows": 1024, "order": 1536}],
        medium=[{"rows": 2048, "order": 1536}, {"rows": 2048, "order": 4096}],
        large=[{"rows": 16384, "order": 4096}, {"rows": 16384, "order": 8192}],
    ),
    "accumulate_factors_": Case(
        problems.outer_products,
        small=[{"sizes": [(512, 576)] * 3 + [(512, 1536)]}],
        medium=[{"sizes": [(2048, 576)] * 6 + [(2048, 1536)] * 6}],
        large=[{"sizes": [(4096, 1024)] * 32}, {"sizes": [(4096, 2048)] * 8}],
    ),
    "sketch_": Case(
        problems.sketch,
        small=[{"rows": 1024, "order": 1536, "columns": 74}],
        medium=[{"rows": 4096, "order": 4096, "columns": 266}],
        large=[{"rows": 16384, "order": 18944, "columns": 522}],
    ),
    "rotate": Case(
        problems.rotation,
        small=[{"rows": 1024, "width": 576}],
        medium=[{"rows": 4096, "width": 1536}],
        large=[{"rows": 16384, "width": 4096}],
    ),
    "eigenvalue_correction_": Case(
        problems.correction,
        small=[{"sequences": 4, "tokens": 128, "d_out": 1536, "d_in": 576}],
        medium=[{"sequences": 8, "tokens": tokens, "d_out": 1536, "d_in": 576} for tokens in (128, 512)],
        large=[{"sequences": 8, "tokens": tokens, "d_out": 4096, "d_in": 11008} for tokens in (64, 512)],
    ),
    "kron_solve": Case(
        problems.solve,
        small=[{"d_out": 1536, "d_in": 576}],
        medium=[{"d_out": 1536, "d_in": 4096}],
        large=[{"d_out": 4096, "d_in": 11008}],
    ),
    "sampled_cross_entropy": Case(
        _cross_entropy,
        small=[{"rows": 256, "vocabulary": 8192}, {"rows": 256, "vocabulary": 8192, "hidden": 576}],
        medium=[{"rows": 1024, "vocabulary": 49152}, {"rows": 1024, "vocabulary": 49152, "hidden": 576}],
        large=[{"rows": 8192, "vocabulary": 151936}, {"rows": 8192, "vocabulary": 151936, "hidden": 1536}],
    ),
    "apply_update_": Case(
        problems.update,
        small=[{"shapes": [(1536, 576)] * 6}],
        medium=[{"shapes": [(1536, 576)] * 60}],
        large=[{"shapes": [(11008, 4096)] * 12}],
    ),
}


@dataclass(frozen=True)
class BenchConfig:
    """What `kfade bench` runs.

    Attributes:
        operations: names; all if there is none.
        sizes: `small`, `medium` or `large`.
        dtype: of the rows: `float32`, `bfloat16` or `float16`; state is float32.
        repeats: calls timed of each provider.
        device: PyTorch device: the CPU, or a CUDA device.
    """

    operations: tuple[str, ...] = ()
    sizes: str = "small"
    dtype: str = "float32"
    repeats: int = 5
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in self.operations:
            if name not in CASES:
                raise ValueError(f"operation is {name!r}; it must be one of {', '.join(CASES)}")
        if self.sizes not in SIZES:
            raise ValueError(f"sizes is {self.sizes!r}; it must be one of {', '.join(SIZES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; it must be at least 1")
        kind = self.device.partition(":")[0]
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be cpu or a CUDA device")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {self.device!r}; there is no CUDA device here")


@dataclass(frozen=True)
class Row:
    """One provider on one problem.

    Attributes:
        operation, size, dtype: the problem.
        provider: `kfade`, or the PyTorch expression.
        backend: who served the call of kfade, and how.
        seconds, p20, p80: of one call: median, and the percentiles beside it.
        speed_up: time of the first PyTorch expression over this one's.
        effective_tflops: FLOPs of the plain full product, over the time.
        real_tflops: FLOPs needed with symmetry, over the time, where kfade does no more than these.
        peak_share: real FLOP/s over the peak: the data sheet's on a GPU, a measured float32 product's on a CPU.
        extra_mib: highest memory of a call beyond what was there before it.
        predicted_seconds: by the cost model, where there is one for this device and backend.
    """

    operation: str
    size: str
    dtype: str
    provider: str
    backend: str
    seconds: float
    p20: float
    p80: float
    speed_up: float | None
    effective_tflops: float | None
    real_tflops: float | None
    peak_share: float | None
    extra_mib: float
    predicted_seconds: float | None


@dataclass
class Bench:
    """All rows of a run, and what they are relative to.

    Attributes:
        device: name.
        peak_tflops: see `Row.peak_share`.
        rows: in the order of the run.
        notes: what could not be run, and why.
    """

    device: str
    peak_tflops: float
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cpu_peak(order: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a float32 product of this order, the best of a few."""
    a, b = torch.randn(order, order), torch.randn(order, order)
    out = torch.empty(order, order)
    best = float("inf")
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * order**3 / best


def _peak(device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    """Name of a device and its peak FLOP/s for products of a dtype."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads", cpu_peak()
    known = of_tensors(device)
    exact = "ieee" if known.architecture.startswith("gfx") else "tf32x3"
    return known.name, product_rate(known, "16-bit" if dtype.itemsize == 2 else exact)


def _compiled(name: str, work: Work, notes: list[str]) -> dict[str, Work]:
    """The expression under `torch.compile`, if it can be compiled."""
    compiled = torch.compile(work, mode="max-autotune-no-cudagraphs")
    try:
        compiled()
    except Exception as error:  # whatever a compiler fails with, the other providers are still worth timing
        notes.append(f"torch.compile of {name}: {type(error).__name__}")
        return {}
    return {f"{name}, torch.compile": compiled}


def _fits(work: Work, device: torch.device) -> bool:
    """Whether a call fits into the memory of a GPU; on a CPU it is taken to."""
    if device.type != "cuda":
        return True
    try:
        work()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def measure(problem: Problem, config: BenchConfig, peak: float, notes: list[str]) -> list[Row]:
    """Time every provider of one problem, in turns."""
    providers = {OURS: problem.run, **problem.baselines}
    first = next(iter(problem.baselines), None)
    if problem.device.type == "cuda" and first is not None:
        providers |= _compiled(first, problem.baselines[first], notes)
    wanted, providers = providers, {name: work for name, work in providers.items() if _fits(work, problem.device)}
    notes.extend(
        f"{problem.operation} {problem.size}: {name} is out of memory" for name in wanted if name not in providers
    )
    if first not in providers:
        first = None
    times = interleaved(providers, Timer(problem.device), repeats=config.repeats)
    answer = problem.explain()
    base = None if first is None else times[first].median
    return [
        _row(problem, name, work, times[name], f"{answer.backend} ({answer.configuration})", base, peak)
        for name, work in providers.items()
    ]


def _row(problem: Problem, name: str, work: Work, times: Times, backend: str, base: float | None, peak: float) -> Row:
    ours = name == OURS
    plain = not ours or backend.startswith("reference")
    known = of_tensors(problem.device)
    cost = problem.cost(problem.configuration(known), known)
    flops = cost.effective_flops if plain else cost.flops
    on_gpu = ours and backend.startswith("triton") and problem.device.type == "cuda"
    return Row(
        problem.operation,
        problem.size,
        str(problem.dtype).removeprefix("torch."),
        name,
        backend if ours else "",
        times.median,
        times.p20,
        times.p80,
        None if base is None else base / times.median,
        cost.effective_flops / times.median * 1e-12 or None,
        flops / times.median * 1e-12 or None,
        flops / times.median / peak or None,
        extra_bytes(work, problem.device) / 2**20,
        predict(cost, known).seconds if on_gpu else None,
    )


def run(config: BenchConfig, progress: Progress | None = None) -> Bench:
    """Run a selection of the cases."""
    progress = progress or Progress()
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    torch.manual_seed(0)
    name, peak = _peak(device, dtype)
    result = Bench(name, peak * 1e-12)
    for operation in config.operations or CASES:
        with progress.stage(operation):
            for problem in CASES[operation].problems(config.sizes, dtype, device):
                result.rows.extend(measure(problem, config, peak, result.notes))
    return result


def csv_text(result: Bench) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["device", *(f.name for f in fields(Row))], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"device": result.device, **asdict(row)} for row in result.rows)
    return text.getvalue()


def picture(result: Bench, path: Path) -> None:
    """Draw how many times as fast as the first PyTorch expression each call of kfade is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result.rows if row.provider == OURS and row.speed_up is not None][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [row.speed_up or 0.0 for row in rows]
    bars = axes.barh(range(len(rows)), values, color=["#2a7f62" if v >= 1 else "#b3541e" for v in values])
    axes.bar_label(bars, [f" {value:.2f} ×" for value in values])
    axes.set_yticks(range(len(rows)), [f"{row.operation}\n{row.size}" for row in rows], fontsize=7)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlim(0, 1.2 * max([1.0, *values]))
    axes.set_xlabel("times as fast as plain PyTorch")
    axes.set_title(f"{result.device}, {rows[0].dtype if rows else ''}", fontsize=9)
    figure.savefig(path, dpi=130)


def write(result: Bench, out: Path) -> None:
    """Write `bench.csv` and `bench.png` to a directory."""
    from .storage import write_text

    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "bench.csv", csv_text(result))
    picture(result, out / "bench.png")


def tables(result: Bench) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, column heads and rows of one table a problem."""

    def shown(value: float | None, text: str, scale: float = 1.0) -> str:
        return "–" if value is None else format(value * scale, text)

    predictions = any(row.predicted_seconds is not None for row in result.rows)
    head = ["", "ms", "times", "eff. TFLOP/s", "real TFLOP/s", "peak", "extra MiB", *["predicted ms"] * predictions]
    found: dict[str, list[list[str]]] = {}
    for row in result.rows:
        found.setdefault(f"{row.operation}: {row.size}, {row.dtype}", []).append(
            [
                row.provider,
                shown(row.seconds, ".2f", 1e3),
                shown(row.speed_up, ".2f"),
                shown(row.effective_tflops, ".3g"),
                shown(row.real_tflops, ".3g"),
                shown(row.peak_share, ".0%"),
                shown(row.extra_mib, ".1f"),
                *([shown(row.predicted_seconds, ".2f", 1e3)] if predictions else []),
            ]
        )
    return [(title, head, rows) for title, rows in found.items()]

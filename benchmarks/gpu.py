"""Everything that needs a GPU: are the kernels right, and how fast are they.

    python benchmarks/gpu.py --part correctness --out results   # first: switches the kernels on where they are right
    python benchmarks/gpu.py --part correctness --backend cuda --out results   # the same of the kernels in CUDA
    python benchmarks/gpu.py --part syrk --out results
    python benchmarks/gpu.py --part all --budget-seconds 3600
    python benchmarks/gpu.py --dry-run --device H100            # without a GPU: tiny checks, and what would be timed

Needs this checkout, torch and Triton; the part `fit` needs transformers as well, and takes kronfluence along if
it is installed. Each part ends within its budget and keeps what it measured until then; `--first` takes it up
again. It runs in a process of its own: one that dies, hangs or leaves the device unusable is replaced by one that
goes on after what did it. Data is random, the last-level cache is cold, providers take turns, and the median is
printed beside what the cost model predicts. Rows are appended to `benchmarks/results/gpu.csv`, and to DIR if
`--out` is given, with a log and `verified.json`.

The part `correctness` holds every operation against float64, in every dtype and with every shipped
configuration, twice for equal bits. An operation that passes is entered in `kfade_kernels/verified.json`, which
switches its kernels on by default on that architecture; one that fails is taken out. With `--backend cuda` these are
the kernels of `csrc/cuda/`, which must have been built, and which are timed beside Triton's wherever they serve.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]
if "--dry-run" in sys.argv:
    # Before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402
from kfade_kernels import cost, native, problems  # noqa: E402
from kfade_kernels.configurations import Configuration, forced, has_descriptors  # noqa: E402
from kfade_kernels.cost import Cost, Prediction, predict, product_rate  # noqa: E402
from kfade_kernels.cuda_support import SIXTEEN_BIT, form_of  # noqa: E402
from kfade_kernels.devices import ARCHITECTURES, DEVICES, H100, Device, of_tensors  # noqa: E402
from kfade_kernels.problems import Problem  # noqa: E402
from kfade_kernels.timing import Timer, Times, Work, extra_bytes, interleaved  # noqa: E402
from kfade_kernels.triton_support import (  # noqa: E402
    VERIFIED,
    Verdict,
    interpreted,
    record_verdict,
    shipped_configurations,
    short,
    triton_version,
)  # fmt: skip
from records import RESULTS, append, installed  # noqa: E402
from suite import BATCH, CHECKS, EIGH, MODELS, PLAN, SEQUENCES, TOKENS, Make, Shape, Timing  # noqa: E402

PARTS = ("correctness", "syrk", "grouped", "sketch", "correction", "solve", "eigh", "fit", "cross-entropy", "apply")
PACKAGES = ("torch", "triton", "transformers", "kronfluence")
REPEATS = 20
# Exit codes of the process of a part, besides 0; of one that is killed for time.
WRONG, UNUSABLE, LATE = 4, 3, 5
# Seconds: after the budget until that process is ended, for one step of kernels, for a compiler's search.
GRACE, STUCK, COMPILING = 20.0, 240.0, 150.0
DRY_DTYPES = (torch.float16, torch.float32)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What has kernels in CUDA.
CUDA_OPERATIONS = ("syrk_", "accumulate_factors_", "eigenvalue_correction_")


@dataclass
class Session:
    """One run of the script.

    Attributes:
        where: PyTorch device of the data.
        device: what is known of it; of a dry run, the device that is predicted for.
        budget: seconds of one part.
        out: directory for copies of rows, verdicts and the log.
        results: directory of the rows.
        begin: when the part began.
        failed: operations that were seen to be wrong.
        first: number of the problem to begin with.
        without: providers of that problem to leave out, since a process has ended in them.
        progress: file of the number that is worked on, and of the provider.
        backend: `triton` or `cuda`, whose kernels are checked.
    """

    where: torch.device
    device: Device
    budget: float
    out: Path | None = None
    results: Path = RESULTS
    begin: float = field(default_factory=time.monotonic)
    failed: list[str] = field(default_factory=list)
    first: int = 0
    without: Sequence[str] = ()
    progress: Path | None = None
    backend: str = "triton"

    def left(self) -> float:
        """Seconds of this part's budget that are left."""
        return self.budget - (time.monotonic() - self.begin)

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "gpu.log").open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def begins(self, number: int, provider: str = "") -> None:
        """Note what is worked on, for whoever finds this process dead."""
        if self.progress is not None:
            temporary = self.progress.with_suffix(".part")
            temporary.write_text(f"{number}\t{provider}", encoding="utf-8")
            temporary.replace(self.progress)

    def leaves_out(self, number: int, provider: str) -> bool:
        return number == self.first and provider in self.without

    def remaining(self, count: int) -> Iterator[int]:
        """Numbers of the problems that there is time for, from `first` on."""
        for number in range(self.first, count):
            if self.left() < 0:
                self.say(f"budget spent: {count - number} of {count} problems are left out; --first {number} goes on")
                return
            self.begins(number)
            yield number

    def wait(self) -> None:
        """Until the device has done all that was launched."""
        if self.where.type == "cuda":
            torch.cuda.synchronize(self.where)

    def record(self, rows: list[dict[str, Any]]) -> None:
        """Append rows now, so that what was measured stays whatever comes after."""
        for folder in (self.out, self.results):
            if folder is not None and rows:
                append("gpu", rows, packages=PACKAGES, folder=folder)

    def verdict(self, operation: str, passed: bool) -> None:
        """Enter an operation in `verified.json`, or take it out."""
        version = triton_version() if self.backend == "triton" else str(native.module and native.module.cuda_version)
        today = datetime.date.today().isoformat()
        verdict = Verdict(operation, self.device.architecture, version, today, self.backend)
        shipped = ROOT / "kfade_kernels" / VERIFIED
        record_verdict(shipped, verdict, passed)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(shipped, self.out / VERIFIED)


def row(part: str, problem: tuple[str, str, str], provider: str, **values: Any) -> dict[str, Any]:
    """A row with all columns; what is not given is empty."""
    operation, size, dtype = problem
    columns = (
        "configuration", "ms", "ms_p20", "ms_p80", "speed_up", "effective_tflops", "real_tflops", "peak_share",
        "extra_mib", "predicted_ms", "limit", "waves", "idle_share", "note",
    )  # fmt: skip
    found = {"part": part, "operation": operation, "size": size, "dtype": dtype, "provider": provider}
    return {**found, **dict.fromkeys(columns, ""), **values}


def names(problem: Problem) -> tuple[str, str, str]:
    return problem.operation, problem.size, short(problem.dtype)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


# ------------------------------------------------------------------------------------ correctness


def configurations_of(problem: Problem, device: Device) -> Iterator[tuple[torch.dtype, Configuration]]:
    """Every configuration that the problem's kernel may be given here: shipped ones, with and without descriptors.

    With the dtype of the operands that each is for; one call may multiply both its rows and what became of them.
    """
    dtypes = {problem.dtype, problem.operands or problem.dtype}
    variants = [
        (dtype, replace(c, descriptors=wanted))
        for dtype, c in shipped_configurations(problem.kernel, device)
        if dtype in dtypes
        for wanted in ({c.descriptors, False, has_descriptors(device)} if problem.kernel == "syrk" else {c.descriptors})
    ]
    yield from dict.fromkeys(variants)


class UnusableError(Exception):
    """An error has left the device unusable for this process."""


def broken(session: Session) -> bool:
    """Whether an error has left the device unusable; if not, what the last problem held is freed."""
    try:
        session.wait()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def require_usable(session: Session) -> None:
    """Raise UnusableError if an error has left the device unusable."""
    if broken(session):
        session.say("  the device is unusable after that error")
        raise UnusableError


def check_problem(session: Session, problem: Problem) -> Iterator[tuple[str, str | None]]:
    """For each configuration its name, and what is wrong with the results."""
    refused = problems.served_here(problem, session.backend)
    if refused is not None and session.backend == "triton":
        yield "", f"Triton does not serve it: {refused}"
        return
    if refused is not None:
        # The kernels in CUDA take fewer dtypes and layouts.
        session.say(f"  {problem.operation} {problem.size}, {short(problem.dtype)}: not served: {refused}")
        return
    against = problems.reference(problem)
    if session.backend == "cuda":
        with problems.by("cuda"):
            yield str(form_of(problem.kernel, session.device)), problems.fault(problem, against)
        return
    for dtype, configuration in configurations_of(problem, session.device):
        name = str(configuration)
        with forced(problem.kernel, configuration, dtype), problems.by("triton"):
            try:
                yield name, problems.fault(problem, against)
            except Exception as error:  # what a compiler or a driver fails with is a finding here
                yield name, reason(error)
                if broken(session):
                    return


def checks_of(only: str | None, dry: bool, backend: str = "triton") -> list[tuple[str, torch.dtype, Make]]:
    """Operation, dtype and maker of every problem that is checked, one operation after the other."""
    return [
        (operation, dtype, make)
        for operation, checks in CHECKS.items()
        if only in (None, operation) and (backend == "triton" or operation in CUDA_OPERATIONS)
        for dtype, make in checks.problems(dry, DRY_DTYPES if dry else DTYPES)
    ]


def correctness(session: Session, only: str | None = None, *, dry: bool = False) -> None:
    """Check every operation, and switch on those that pass; one that fails is switched off at once."""
    checks = checks_of(only, dry, session.backend)
    for operation in session.failed:
        session.verdict(operation, False)
    count = wrong = 0
    for number in session.remaining(len(checks)):
        operation, dtype, make = checks[number]
        if number == session.first or checks[number - 1][0] != operation:
            count = wrong = 0
        torch.manual_seed(0)
        try:
            problem = make(session.where)
            found = [(problem.size, *one) for one in check_problem(session, problem)]
        except Exception as error:  # nothing is known to be right then
            found = [("a problem", "", f"could not be made or referred to: {reason(error)}")]
        for size, name, fault in found:
            count += 1
            if fault is None:
                continue
            wrong += 1
            session.say(f"  wrong: {operation} {size}, {short(dtype)}, {name}: {fault}")
            if operation not in session.failed:
                session.failed.append(operation)
                if not dry:
                    session.verdict(operation, False)
        if number + 1 == len(checks) or checks[number + 1][0] != operation:
            whole = number + 1 - session.first >= sum(one[0] == operation for one in checks)
            # What served nothing has shown nothing.
            right = operation not in session.failed and count > 0
            result = (
                "right" if right and whole else f"{wrong} wrong" if wrong else "wrong" if not right else "not whole"
            )
            session.say(f"{operation:24}{count:5} checks  {result}")
            if right and whole and not dry:
                session.verdict(operation, True)
        require_usable(session)


# ----------------------------------------------------------------------------------------- timing


def head(session: Session) -> None:
    session.say(
        f"{'provider':36}{'ms':>10}{'p20':>9}{'p80':>9}{'speed-up':>9}{'eff. TF/s':>10}{'real':>7}"
        f"{'peak':>6}{'MiB':>8}{'predicted':>11}  limit"
    )


def providers_of(session: Session, problem: Problem, timing: Timing) -> dict[str, Work]:
    """The baselines, `torch.compile` of one of them if asked for, and kfade with each kind of kernels."""

    def switched(work: Work, **switches: str) -> Work:
        def switching() -> object:
            with problems.backends(**switches):
                return work()

        return switching

    # One of them may be an operation of ours, called in another way.
    found = {name: switched(work, enable="triton") for name, work in problem.baselines.items()}
    if timing.compiled and session.left() < COMPILING:
        session.say("  too little of the budget is left for torch.compile")
    elif timing.compiled:
        compiled = torch.compile(problem.baselines[timing.compiled], mode="max-autotune")
        found[f"{timing.compiled}, torch.compile"] = compiled
    if problem.operation in ("syrk_", "rotate", "kron_solve", "eigenvalue_correction_"):
        found["kfade, PyTorch"] = switched(problem.run, disable="triton,cuda")
    refused = problems.served_here(problem)
    if refused is None:
        found["kfade, Triton"] = switched(problem.run, enable="triton", disable="cuda")
    else:
        session.say(f"  Triton does not serve it: {refused}")
    if problem.operation in CUDA_OPERATIONS:
        refused = problems.served_here(problem, "cuda")
        if refused is None:
            # Tokens are rotated by Triton's kernels here too.
            found["kfade, CUDA"] = switched(problem.run, enable="cuda,triton")
        else:
            session.say(f"  CUDA does not serve it: {refused}")
    return found


def in_cuda(problem: Problem, device: Device) -> Configuration | None:
    """What the kernels in CUDA would run a problem with, as the cost model counts it, or None."""
    form = form_of(problem.kernel, device) if problem.operation in CUDA_OPERATIONS else None
    return form.configuration() if form is not None and problem.dtype in SIXTEEN_BIT else None


def attempt(session: Session, work: Work) -> str | None:
    """Call once; why it failed, or None."""
    try:
        work()
        session.wait()
    except Exception as error:  # one provider out of memory must not end the comparison
        return reason(error)
    return None


def time_problem(session: Session, part: str, number: int) -> None:
    """Time all providers of one problem, in turns, and record them."""
    timing = PLAN[part][number]
    torch.manual_seed(0)
    problem = timing.make(session.where)
    c = problem.configuration(session.device)
    found = problem.cost(c, session.device)
    compiled = in_cuda(problem, session.device)
    configurations = {"kfade, Triton": c} if compiled is None else {"kfade, Triton": c, "kfade, CUDA": compiled}
    session.say(f"\n{problem.operation} {problem.size}, {short(problem.dtype)}; {c}")
    head(session)
    providers = providers_of(session, problem, timing)
    failures: dict[str, str | None] = {}
    for name, work in providers.items():
        if session.leaves_out(number, name):
            failures[name] = "a process ended in it"
            continue
        session.begins(number, name)
        failures[name] = attempt(session, work)
        if failures[name] is not None:
            session.say(f"{name:36}  {failures[name]}")
            require_usable(session)
    works = {name: work for name, work in providers.items() if failures[name] is None}
    times = interleaved(works, Timer(session.where), repeats=REPEATS, seconds=max(1.0, session.left() / 4))
    first = next((name for name in works if not name.startswith("kfade")), None)
    base = times[first].median if first else None
    peak = product_rate(session.device, found.precision) if found.flops else 0.0
    rows = []
    for name, work in works.items():
        flops = found.flops if name.startswith("kfade") else found.effective_flops
        own = configurations.get(name)
        expected = None if own is None else predict(problem.cost(own, session.device), session.device)
        rows.append(
            timed_row(
                part, names(problem), name, times[name], base, found.effective_flops, flops, peak,
                extra_mib=round(extra_bytes(work, session.where) / 2**20, 1),
                configuration="" if own is None else str(own), expected=expected,
            )
        )  # fmt: skip
        print_row(session, rows[-1])
    for name, why in failures.items():
        if why is not None:
            rows.append(row(part, names(problem), name, note=why))
    session.record(rows)


def timed_row(
    part: str,
    problem: tuple[str, str, str],
    provider: str,
    times: Times,
    base: float | None,
    effective_flops: float,
    flops: float,
    peak: float,
    *,
    extra_mib: float | str = "",
    configuration: str = "",
    expected: Prediction | None = None,
) -> dict[str, Any]:
    """A row of a measurement; times in ms, rates in TFLOP/s."""
    seconds = times.median
    predicted = {} if expected is None else prediction_columns(expected)
    return row(
        part, problem, provider, configuration=configuration,
        ms=round(seconds * 1e3, 4), ms_p20=round(times.p20 * 1e3, 4), ms_p80=round(times.p80 * 1e3, 4),
        speed_up=round(base / seconds, 3) if base else "",
        effective_tflops=round(effective_flops / seconds * 1e-12, 1) or "",
        real_tflops=round(flops / seconds * 1e-12, 1) or "",
        peak_share=round(flops / seconds / peak, 3) if peak else "", extra_mib=extra_mib, **predicted,
    )  # fmt: skip


def prediction_columns(expected: Prediction) -> dict[str, Any]:
    return {
        "predicted_ms": round(expected.seconds * 1e3, 4), "limit": expected.limit,
        "waves": round(expected.waves, 2), "idle_share": round(expected.quantisation, 3),
    }  # fmt: skip


def print_row(session: Session, r: Mapping[str, Any]) -> None:
    session.say(
        f"{r['provider']:36}{r['ms']:>10}{r['ms_p20']:>9}{r['ms_p80']:>9}{r['speed_up']:>9}"
        f"{r['effective_tflops']:>10}{r['real_tflops']:>7}{r['peak_share']:>6}{r['extra_mib']:>8}"
        f"{r['predicted_ms']:>11}  {r['limit']}"
    )


def time_part(session: Session, part: str) -> None:
    for number in session.remaining(len(PLAN[part])):
        try:
            time_problem(session, part, number)
        except UnusableError:
            raise
        except Exception as error:  # such as one whose data does not fit
            session.say(f"problem {number} of {len(PLAN[part])} ended early: {reason(error)}")
        require_usable(session)


def time_eigh(session: Session, dtype: torch.dtype, order: int, batch: int) -> float:
    """Time one decomposition, up to five times, and record it; returns the seconds of the first."""
    timer = Timer(session.where)
    expected = predict(cost.eigh(order, dtype, batch=batch), session.device)
    torch.manual_seed(0)
    x = torch.randn(batch, order, order, device=session.where, dtype=dtype)
    matrices = x @ x.mT / order
    del x
    torch.linalg.eigh(matrices[:, :256, :256])
    samples = [timer(lambda: torch.linalg.eigh(matrices))]
    while len(samples) < 5 and 20 * samples[0] < session.left():
        samples.append(timer(lambda: torch.linalg.eigh(matrices)))
    one = timed_row(
        "eigh", ("eigh", f"{batch} of order {order}", short(dtype)), "torch.linalg.eigh", Times.of(samples), None,
        0.0, 0.0, 0.0, expected=expected,
    )  # fmt: skip
    print_row(session, one)
    session.record([one])
    return samples[0]


def eigh(session: Session) -> None:
    """`torch.linalg.eigh`, alone and batched; one call each, since a call may take a minute."""
    last: dict[torch.dtype, tuple[int, float]] = {}
    head(session)
    for number in session.remaining(len(EIGH)):
        dtype, order, batch = EIGH[number]
        size = f"{batch} of order {order}, {short(dtype)}"
        before, seconds = last.get(dtype, (order, 0.0))
        if seconds * (order / before) ** 3 * batch > session.left():
            session.say(f"budget spent: {size} is left out")
            continue
        try:
            last[dtype] = (order, time_eigh(session, dtype, order, batch) / batch)
        except Exception as error:  # out of memory, or a solver that does not converge
            session.say(f"{size}: {reason(error)}")
            session.record([
                row("eigh", ("eigh", size.rsplit(",", 1)[0], short(dtype)), "torch.linalg.eigh", note=reason(error))
            ])  # fmt: skip
        require_usable(session)


# ------------------------------------------------------------------------------------ a whole fit


def fit_costs(shape: Shape, batch_tokens: int, device: Device) -> dict[str, float]:
    """Predicted seconds of each stage: the model's own pass, and the operations on every MLP layer."""
    tokens = SEQUENCES * TOKENS
    layers = shape.num_hidden_layers
    h, m = shape.hidden_size, shape.intermediate_size
    dtype, c = torch.bfloat16, Configuration(block_m=128, block_n=128, block_k=64, warps=8)
    model = predict(cost.model_pass(shape.linear_parameters, tokens), device).seconds

    def repeated(found: Cost, times: float) -> float:
        return times * predict(found, device).seconds

    batches = tokens / batch_tokens
    # gate and up share their input; their gradients, down's input, and down's gradients follow.
    factors = cost.accumulate_factors([(batch_tokens, n) for n in (h, m, m, m, h)], dtype, c, device)
    corrections = [cost.eigenvalue_correction(BATCH, TOKENS, *s, dtype, c) for s in ((m, h), (m, h), (h, m))]
    return {
        "A, S": model + repeated(factors, batches * layers),
        "eigh": sum(repeated(cost.eigh(n, torch.float32), layers) for n in (h, m, m, m, h)),
        "eigenvalues": model + sum(repeated(found, batches * layers) for found in corrections),
    }


def stage_row(
    session: Session, name: str, provider: str, stage: str, seconds: float, predicted: float, published: float
) -> dict[str, Any]:
    session.say(f"{provider:24}{stage:14}{seconds:10.2f}{predicted:12.2f}{published:14.1f}")
    return row(
        "fit", ("fit", f"{name}, {SEQUENCES} × {TOKENS} tokens, {stage}", "bfloat16"), provider,
        ms=round(seconds * 1e3, 1), predicted_ms=round(predicted * 1e3, 1),
        note=f"published on 8 H100: {published} s",
    )  # fmt: skip


STAGES = ("A, S", "eigh", "eigenvalues")


Fit = Callable[[Any, Any, dict[str, float]], None]


def fit_ours(model: Any, data: Any, stages: dict[str, float]) -> None:
    """Fit; enters the seconds of each stage, also of those before one that fails."""
    import kfade

    progress = kfade.Progress()
    try:
        kfade.fit(model, data, kfade.FitConfig(), progress=progress)
    finally:
        stages.update(zip(STAGES, (stage.seconds for stage in progress.costs), strict=False))


def fit_theirs(model: Any, data: Any, stages: dict[str, float]) -> None:
    from fit import run_kronfluence

    wanted = [name for name, module in model.named_modules() if ".mlp." in name and hasattr(module, "weight")]
    found, _ = run_kronfluence(copy.deepcopy(model), data, "bfloat16", wanted, with_default=False)
    stages.update({stage: found[stage][0] for stage in STAGES})


def random_model(shape: Shape, where: torch.device) -> Any:
    """A Qwen2 of this shape with random weights, in bfloat16."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {k: getattr(shape, k) for k in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size",
    )}  # fmt: skip
    with where:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    return model.to(torch.bfloat16).eval()


def time_fit(session: Session, name: str, provider: str, work: Fit, model: Any) -> None:
    """Fit once, and record every stage that was finished, whatever ends it."""
    shape = MODELS[name]
    torch.manual_seed(1)
    ids = torch.randint(shape.vocab_size, (SEQUENCES, TOKENS), device=session.where)
    data = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids.split(BATCH)]
    predicted = fit_costs(shape, BATCH * TOKENS, session.device)
    stages: dict[str, float] = {}
    try:
        work(model, data, stages)
    finally:
        session.record([
            stage_row(session, name, provider, stage, seconds, predicted[stage], shape.published[stage])
            for stage, seconds in stages.items()
        ])  # fmt: skip


def fit(session: Session) -> None:
    """EK-FAC of randomly initialised models, stage by stage, beside the published table and kronfluence."""
    if not installed("transformers"):
        session.say("transformers is not installed; this part is left out")
        return
    works: dict[str, tuple[Fit, dict[str, str]]] = {
        "kfade, CUDA": (fit_ours, {"enable": "cuda,triton"}),
        "kfade, Triton": (fit_ours, {"enable": "triton", "disable": "cuda"}),
        "kfade, PyTorch": (fit_ours, {"disable": "triton,cuda"}),
    }
    if installed("kronfluence"):
        works["kronfluence"] = (fit_theirs, {})
    else:
        session.say("kronfluence is not installed; it is left out")
    runs = [(name, provider) for name in MODELS for provider in works]
    model, built, spent = None, "", 0.0
    for number in session.remaining(len(runs)):
        name, provider = runs[number]
        if session.left() < 1.2 * spent * (name == built):
            session.say(f"budget spent: {name}, {provider} is left out; --first {number} runs it")
            continue
        try:
            if name != built:
                model = None
                model, built, spent = random_model(MODELS[name], session.where), name, 0.0
                session.say(f"\n{name}, {SEQUENCES} × {TOKENS} tokens, batches of {BATCH}, MLP layers, bfloat16")
                session.say(f"{'provider':24}{'stage':14}{'s':>10}{'predicted':>12}{'published':>14}")
            begin = time.monotonic()
            work, switches = works[provider]
            with problems.backends(**switches):
                time_fit(session, name, provider, work, model)
            spent = time.monotonic() - begin
        except Exception as error:  # one provider out of memory must not end the comparison
            session.say(f"{provider}: {reason(error)}")
            session.record([row("fit", ("fit", name, "bfloat16"), provider, note=reason(error))])
        require_usable(session)


# --------------------------------------------------------------------------------------- dry run


def plan(session: Session, parts: Sequence[str]) -> None:
    """What the timing parts would measure on a device, with the predictions; nothing is allocated."""
    session.say(f"\nplan for one {session.device.name}: times in ms")
    session.say(
        f"{'part':14}{'operation':24}{'size':44}{'dtype':>9}{'GFLOP':>10}{'MB':>9}{'waves':>8}{'idle':>6}"
        f"{'predicted':>11}  limit"
    )

    def line(part: str, operation: str, size: str, dtype: str, found: Cost) -> None:
        p = predict(found, session.device)
        session.say(
            f"{part:14}{operation:24}{size:44}{dtype:>9}{found.flops * 1e-9:10.0f}{found.bytes * 1e-6:9.0f}"
            f"{p.waves:8.2f}{p.quantisation:6.0%}{p.seconds * 1e3:11.3f}  {p.limit}"
        )

    for part in parts:
        for timing in PLAN.get(part, []):
            problem = timing.make(torch.device("meta"))
            found = problem.cost(problem.configuration(session.device), session.device)
            line(part, problem.operation, problem.size, short(problem.dtype), found)
            compiled = in_cuda(problem, session.device)
            if compiled is not None:
                found = problem.cost(compiled, session.device)
                line(part, "  in CUDA", problem.size, short(problem.dtype), found)
        if part == "eigh":
            for dtype, order, batch in EIGH:
                line(part, "eigh", f"{batch} of order {order}", short(dtype), cost.eigh(order, dtype, batch=batch))
        if part == "fit":
            for name, shape in MODELS.items():
                for stage, seconds in fit_costs(shape, BATCH * TOKENS, session.device).items():
                    published = f"published {shape.published[stage]} s"
                    session.say(f"{part:14}{name:24}{stage:44}{'':42}{seconds * 1e3:11.0f}  {published}")


def run(session: Session, part: str, only: str | None) -> None:
    session.begin = time.monotonic()
    if part == "correctness":
        correctness(session, only)
    elif part == "eigh":
        eigh(session)
    elif part == "fit":
        fit(session)
    else:
        time_part(session, part)


# ------------------------------------------------------------------------------------- processes


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, after it had some seconds to record what it has."""
    process.terminate()
    try:
        process.wait(timeout=GRACE / 2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def watch(session: Session, command: Sequence[str], progress: Path, stuck: float) -> int:
    """Run the process of a part until it ends, or must be ended; its exit code, or LATE."""
    with subprocess.Popen(command) as process:
        begin = time.time()
        while process.poll() is None:
            time.sleep(0.2)
            last = max(begin, progress.stat().st_mtime) if progress.exists() else begin
            if session.left() < -GRACE:
                stop(process)
                return LATE
            if time.time() - last > stuck:
                session.say(f"  nothing has moved for {stuck:.0f} s")
                stop(process)
                return UNUSABLE
        return process.returncode


def supervise(session: Session, part: str, command: Sequence[str], operations: Sequence[str] = ()) -> bool:
    """Run a part, in as many processes as it takes, within its budget.

    Args:
        session: of this process, which never touches the device.
        part: name.
        command: that runs the part; where to begin and what to leave out are added to it.
        operations: of the part correctness, the operation of each problem.

    Returns:
        Whether all of it ran, and nothing was seen to be wrong.
    """
    session.begin = time.monotonic()
    session.say(f"\n=== {part}, budget {session.budget:.0f} s")
    first, without, failed = session.first, list[str](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        while True:
            progress.unlink(missing_ok=True)
            options = [f"--first={first}", f"--budget-seconds={session.left():.1f}", f"--progress={progress}"]
            options += [f"--without={name}" for name in without] + [f"--failed={name}" for name in failed]
            code = watch(session, [*command, *options], progress, STUCK if part not in ("eigh", "fit") else 1e9)
            if code in (0, WRONG, LATE) or not progress.exists():
                break
            text, provider = progress.read_text(encoding="utf-8").split("\t")
            number = int(text)
            session.say(f"  a process ended with code {code} in problem {number}{provider and ', '}{provider}")
            if operations:
                failed = sorted({*failed, operations[number]})
            again = provider != "" and not (number == first and provider in without)
            without = [*(without if number == first else ()), provider] if again else []
            first = number if again else number + 1
    session.say(f"=== {part}: {time.monotonic() - session.begin:.0f} s{', ended for time' if code == LATE else ''}")
    return code == 0 and not failed


def dry_run(options: argparse.Namespace, parts: Sequence[str]) -> int:
    if not interpreted():
        print("error: TRITON_INTERPRET is not 1; a dry run needs it before Triton is imported", file=sys.stderr)
        return 2
    device = next(d for d in DEVICES if d.name == options.device)
    session = Session(torch.device("cpu"), device, options.budget_seconds, options.out, options.results)
    if "correctness" in parts:
        correctness(session, options.operation, dry=True)
    plan(session, parts)
    return int(bool(session.failed))


def work(options: argparse.Namespace) -> int:
    """The process of one part."""
    # What is being measured is recorded on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(LATE))
    where = torch.device("cuda", torch.cuda.current_device())
    session = Session(
        where, of_tensors(where), options.budget_seconds, options.out, options.results,
        failed=options.failed, first=options.first, without=options.without, progress=options.progress,
        backend=options.backend,
    )  # fmt: skip
    known = session.device.architecture in ARCHITECTURES
    session.say(
        f"{session.device.name}, {session.device.architecture}"
        f"{'' if known else ' (unknown: predictions are for an A100)'};"
        f" torch {torch.__version__}, Triton {triton_version()}"
    )
    try:
        run(session, options.part, options.operation)
    except UnusableError:
        return UNUSABLE
    return WRONG if session.failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--operation", choices=CHECKS, help="of the part correctness, this one alone")
    parser.add_argument(
        "--backend", choices=("triton", "cuda"), default="triton", help="of the part correctness, whose kernels"
    )
    parser.add_argument("--first", type=int, default=0, metavar="N", help="problem of the part to begin with")
    parser.add_argument("--budget-seconds", type=float, default=520.0, help="of each part")
    parser.add_argument("--out", type=Path, metavar="DIR", help="copies of the rows, of verified.json, and a log")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where gpu.csv is appended to")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: tiny checks in the interpreter, the plan"
    )
    parser.add_argument(
        "--device", choices=[d.name for d in DEVICES], default="H100", help="that a dry run predicts for"
    )
    # Of the process of a part.
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--failed", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.first and options.part == "all":
        parser.error("--first is a problem of one part; --part must name it")
    parts = PARTS if options.part == "all" else (options.part,)
    if options.dry_run:
        return dry_run(options, parts)
    if not torch.cuda.is_available():
        print("error: there is no GPU here; --dry-run shows what would be run", file=sys.stderr)
        return 2
    if not triton_version():
        print("error: Triton is not installed", file=sys.stderr)
        return 2
    if options.progress is not None:
        return work(options)
    session = Session(torch.device("cpu"), H100, options.budget_seconds, options.out, options.results)
    session.first = options.first
    handed_on = ("operation", "backend", "out", "results")
    given = [f"--{name}={value}" for name in handed_on if (value := getattr(options, name))]
    operations = [operation for operation, _, _ in checks_of(options.operation, False, options.backend)]
    passed = [
        supervise(
            session, part, [sys.executable, __file__, f"--part={part}", *given],
            operations if part == "correctness" else (),
        )
        for part in parts
    ]  # fmt: skip
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())

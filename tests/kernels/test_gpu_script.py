"""The script that needs a GPU, as far as a CPU can take it: its dry run, and its parts on tiny problems."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import gpu
import suite
from kfade_kernels import problems, triton_support
from kfade_kernels.devices import H100
from kfade_kernels.triton_support import Verdict, record_verdict, verdicts

CPU = torch.device("cpu")


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Session:
    """On a CPU, with everything that is written in `tmp_path`."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "REPEATS", 2)
    (tmp_path / "kfade_kernels").mkdir()
    return gpu.Session(CPU, H100, 60.0, tmp_path / "out", tmp_path / "results")


def rows(session: gpu.Session) -> list[dict[str, str]]:
    """The rows written, which are the same in both places."""
    texts = [(folder / "gpu.csv").read_text() for folder in (session.results, session.out) if folder]
    assert texts[0] == texts[1]
    return list(csv.DictReader(texts[0].splitlines()))


@pytest.mark.slow
def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = Path(triton_support.__file__).with_name("verified.json")
    before = shipped.read_bytes()
    arguments = ["--dry-run", "--part", "all", "--device", "H100", "--out", str(tmp_path), "--results", str(tmp_path)]
    assert gpu.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "gpu.log").read_text()
    for operation in gpu.CHECKS:
        assert f"{operation:24}" in shown
    assert "wrong" not in shown and "not finished" not in shown
    assert "plan for one H100" in shown
    for part in gpu.PARTS[1:]:
        assert f"\n{part:14}" in shown
    assert "published 6.6 s" in shown
    assert shipped.read_bytes() == before
    assert not (tmp_path / "gpu.csv").exists()


@pytest.mark.parametrize("part", ["syrk", "fit"])
@pytest.mark.parametrize("device", ["A100", "MI300X"])
def test_plan_of_one_part(part: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--part", part, "--device", device]) == 0
    shown = capsys.readouterr().out
    assert f"plan for one {device}" in shown and f"\n{part:14}" in shown
    assert "checks" not in shown


def test_every_operation_is_checked() -> None:
    import kfade_kernels as kk

    assert set(gpu.CHECKS) == set(kk.operations())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--part", "syrk"]) == 2
    assert "there is no GPU here; --dry-run" in capsys.readouterr().err


def test_verdicts(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes is entered, what fails is taken out, and what was not finished stays as it was."""
    path = session.results.parent / "kfade_kernels" / "verified.json"
    other = Verdict("rotate", "sm_90", "3.7.1", "2026-01-01")
    record_verdict(path, other, True)
    monkeypatch.setattr(gpu, "DTYPES", (torch.float16,))
    monkeypatch.setattr(gpu, "CHECKS", {"syrk_": suite.Checks(suite.CHECKS["syrk_"].tiny, [])})
    gpu.correctness(session)
    (first, second) = verdicts(path)
    assert first == other
    assert (second.operation, second.architecture) == ("syrk_", "sm_90") and second.date and second.version
    assert session.out is not None and verdicts(session.out / "verified.json") == [first, second]
    session.budget = -1.0
    gpu.correctness(session)
    assert verdicts(path) == [first, second]
    session.budget = 60.0
    monkeypatch.setattr(problems, "fault", lambda *_: "result 0 is off by 1.00e+00; 1.00e-06 is allowed")
    gpu.correctness(session)
    assert verdicts(path) == [other]
    assert session.failed == ["syrk_"]
    assert "wrong: syrk_ order 150, 40 rows, float16" in (session.out / "gpu.log").read_text()


@pytest.mark.parametrize("rows", [16, 1000, 4096])
def test_what_a_matrix_unit_cuts_off_is_allowed_and_a_lost_row_is_not(rows: int) -> None:
    problem = problems.outer_product(rows, 150, torch.float16, CPU)
    against = problems.reference(problem)
    steps = rows / 8
    (truth,) = against.truths
    for share, fine in ((1 - 0.25 * steps * 2.0**-24, True), (1 - 1 / rows, False)):
        ((error, allowed),) = problems.errors(problem, [(share * truth).float()], against)
        assert (error <= allowed) == fine


def test_half_an_operation_is_not_switched_on(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    path = session.results.parent / "kfade_kernels" / "verified.json"
    monkeypatch.setattr(gpu, "DTYPES", (torch.float16,))
    monkeypatch.setattr(
        gpu, "CHECKS", {name: suite.Checks(suite.CHECKS[name].tiny, []) for name in ("syrk_", "rotate")}
    )
    session.first = 1
    gpu.correctness(session)
    assert [verdict.operation for verdict in verdicts(path)] == ["rotate"]
    assert session.out is not None
    assert "not whole" in (session.out / "gpu.log").read_text()


def test_what_ended_a_process_is_switched_off(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process knows of it, also if it has nothing left to check."""
    path = session.results.parent / "kfade_kernels" / "verified.json"
    record_verdict(path, Verdict("syrk_", "sm_90", "3.7.1", "2026-01-01"), True)
    session.failed, session.first = ["syrk_"], 10**6
    gpu.correctness(session)
    assert verdicts(path) == []


def test_a_problem_that_cannot_be_made_is_a_fault(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: object, **__: object) -> problems.Problem:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gpu, "CHECKS", {"syrk_": suite.Checks([], [(make, (), {})]), "rotate": suite.CHECKS["rotate"]})
    gpu.correctness(session, dry=True)
    assert session.failed == ["syrk_"]
    assert session.out is not None
    log = (session.out / "gpu.log").read_text()
    assert "could not be made or referred to: OutOfMemoryError: out of memory" in log
    assert f"{'rotate':24}" in log and "right" in log


def test_an_unusable_device_ends_the_process(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before is kept, and what did it is noted for the next process."""

    def providers(session: gpu.Session, problem: problems.Problem, timing: suite.Timing) -> dict[str, Any]:
        def fails() -> None:
            session.wait = lost  # type: ignore[method-assign]
            lost()

        return {"eager": problem.run, "kfade, Triton": fails}

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "providers_of", providers)
    monkeypatch.setitem(gpu.PLAN, "syrk", tiny())
    session.progress = session.results.parent / "progress"
    with pytest.raises(gpu.UnusableError):
        gpu.run(session, "syrk", None)
    assert session.progress.read_text() == "0\tkfade, Triton"
    following = gpu.Session(CPU, H100, 60.0, session.out, session.results, without=["kfade, Triton"])
    with pytest.raises(gpu.UnusableError):
        gpu.run(following, "syrk", None)
    found = [(r["provider"], bool(r["ms"]), r["note"]) for r in rows(session)]
    assert found == [("eager", True, ""), ("kfade, Triton", False, "a process ended in it")]


# What a process of a part may do, by the number of the problem and the provider: it is ended by a signal, finds
# its device unusable, hangs, or goes on.
WORKER = """
import argparse, os, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("first", "budget-seconds", "progress"):
    parser.add_argument("--" + name)
parser.add_argument("--without", action="append", default=[])
parser.add_argument("--failed", action="append", default=[])
o = parser.parse_args()
print("from", o.first, o.without, o.failed, file=open(LOG, "a"))
for number in range(int(o.first), 5):
    for provider in PROVIDERS:
        if number == int(o.first) and provider in o.without:
            continue
        pathlib.Path(o.progress).write_text(f"{number}\t{provider}")
        if (number, provider) == (1, PROVIDERS[-1]):
            os.abort()
        if number == 2:
            sys.exit(3)
        if number == 3 and HANGS:
            time.sleep(60)
sys.exit(4 if o.failed else 0)
"""


def supervised(
    session: gpu.Session, tmp_path: Path, providers: list[str], hangs: bool, operations: list[str]
) -> list[str]:
    log = tmp_path / "worker.log"
    script = WORKER.replace("LOG", repr(str(log))).replace("PROVIDERS", repr(providers)).replace("HANGS", str(hangs))
    gpu.supervise(session, "syrk", [sys.executable, "-c", script], operations)
    return log.read_text().splitlines()


def test_a_part_goes_on_after_what_ended_its_process(session: gpu.Session, tmp_path: Path) -> None:
    """A provider is left out of its problem; where that is not enough, or there is none, the problem is."""
    assert supervised(session, tmp_path, ["eager", "ours"], False, []) == [
        "from 0 [] []", "from 1 ['ours'] []", "from 2 ['eager'] []", "from 2 ['eager', 'ours'] []",
    ]  # fmt: skip


def test_an_operation_that_ended_a_process_has_failed(session: gpu.Session, tmp_path: Path) -> None:
    assert supervised(session, tmp_path, [""], False, ["a", "b", "c", "c", "c"]) == [
        "from 0 [] []", "from 2 [] ['b']", "from 3 [] ['b', 'c']",
    ]  # fmt: skip


def test_a_part_that_hangs(session: gpu.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STUCK", 1.0)
    assert supervised(session, tmp_path, [""], True, []) == [
        "from 0 [] []", "from 2 [] []", "from 3 [] []", "from 4 [] []",
    ]  # fmt: skip


def test_a_part_that_is_late_is_ended(session: gpu.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    session.budget = 2.0
    assert supervised(session, tmp_path, [""], True, []) == ["from 0 [] []", "from 2 [] []", "from 3 [] []"]
    assert session.out is not None
    assert "ended for time" in (session.out / "gpu.log").read_text()


def test_an_exception_is_a_fault_too(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def raised(*_: object) -> None:
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(problems, "fault", raised)
    gpu.correctness(session, "rotate", dry=True)
    assert session.failed == ["rotate"]
    assert session.out is not None
    assert "RuntimeError: out of resource: shared memory\n" in (session.out / "gpu.log").read_text()


def tiny(**options: Any) -> list[suite.Timing]:
    return [suite.Timing(suite._make(problems.outer_product, 20, 40, dtype=torch.float16, **options)) for _ in range(2)]


def test_a_timing_part(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.PLAN, "syrk", tiny())
    gpu.run(session, "syrk", None)
    found = rows(session)
    assert [r["provider"] for r in found] == ["mm + add_", "kfade, PyTorch", "kfade, Triton"] * 2
    for r in found:
        assert 0 < float(r["ms_p20"]) <= float(r["ms"]) <= float(r["ms_p80"])
        assert r["part"] == "syrk" and r["size"] == "order 40, 20 rows" and r["torch"] == torch.__version__
    assert float(found[0]["speed_up"]) == 1.0
    assert float(found[2]["predicted_ms"]) > 0 and found[2]["limit"] in ("arithmetic", "memory", "launches")
    assert session.out is not None
    assert "kfade, Triton" in (session.out / "gpu.log").read_text()


def test_the_budget_ends_a_part(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.PLAN, "syrk", tiny())
    session.budget = -1.0
    gpu.run(session, "syrk", None)
    assert session.out is not None
    assert "budget spent: 2 of 2 problems are left out; --first 0 goes on" in (session.out / "gpu.log").read_text()


def test_a_problem_that_cannot_be_made_does_not_end_the_part(
    session: gpu.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(device: torch.device) -> problems.Problem:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(gpu.PLAN, "syrk", [suite.Timing(too_large), *tiny()[:1]])
    gpu.run(session, "syrk", None)
    assert session.out is not None
    assert "problem 0 of 2 ended early: OutOfMemoryError: out of memory" in (session.out / "gpu.log").read_text()
    assert len(rows(session)) == 3


def test_a_provider_that_fails_is_recorded(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(session: gpu.Session, problem: problems.Problem, timing: suite.Timing) -> dict[str, Any]:
        def fails() -> None:
            raise torch.OutOfMemoryError("out of memory")

        return {"eager": fails, "kfade, Triton": problem.run}

    monkeypatch.setattr(gpu, "providers_of", broken)
    monkeypatch.setitem(gpu.PLAN, "syrk", tiny()[:1])
    gpu.run(session, "syrk", None)
    ours, theirs = rows(session)
    assert theirs["provider"] == "eager" and theirs["note"] == "OutOfMemoryError: out of memory" and not theirs["ms"]
    assert float(ours["ms"]) > 0 and ours["speed_up"] == ""


def test_eigh(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "EIGH", [(torch.float32, 260, 1), (torch.float64, 260, 2)])
    gpu.run(session, "eigh", None)
    assert [(r["size"], r["dtype"]) for r in rows(session)] == [
        ("1 of order 260", "float32"), ("2 of order 260", "float64"),
    ]  # fmt: skip


def test_a_whole_fit(session: gpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = suite.Shape(32, 48, 2, 2, 1, {"A, S": 1.0, "eigh": 2.0, "eigenvalues": 3.0}, vocab_size=50)
    monkeypatch.setattr(gpu, "MODELS", {"tiny": shape})
    for name, value in (("SEQUENCES", 4), ("TOKENS", 8), ("BATCH", 2)):
        monkeypatch.setattr(gpu, name, value)
    gpu.run(session, "fit", None)
    found = [(r["provider"], r["size"].rsplit("tokens, ", 1)[1], r["note"]) for r in rows(session)]
    for provider in ("kfade, Triton", "kfade, PyTorch"):
        assert (provider, "A, S", "published on 8 H100: 1.0 s") in found
        assert (provider, "eigenvalues", "published on 8 H100: 3.0 s") in found
    if gpu.installed("kronfluence"):
        assert ("kronfluence", "eigh", "published on 8 H100: 2.0 s") in found

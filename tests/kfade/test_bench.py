"""`kfade bench`: what it runs, prints and writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import kfade_kernels as kk
import pytest
import torch
from kfade_kernels import problems, timing
from kfade_kernels.devices import H100
from kfade_kernels.timing import Times, interleaved
from typer.testing import CliRunner

from kfade import bench
from kfade.bench import CASES, OURS, Case
from kfade.cli import app

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that take no time, for every operation."""
    tiny: dict[str, dict[str, Any]] = {
        "syrk_": {"rows": 8, "order": 12},
        "accumulate_factors_": {"sizes": [(8, 12), (8, 6)]},
        "sketch_": {"rows": 8, "order": 12, "columns": 3},
        "rotate": {"rows": 8, "width": 12},
        "eigenvalue_correction_": {"sequences": 2, "tokens": 4, "d_out": 6, "d_in": 8},
        "kron_solve": {"d_out": 6, "d_in": 8},
        "sampled_cross_entropy": {"rows": 4, "vocabulary": 20},
        "apply_update_": {"shapes": [(6, 8), (3,)]},
    }
    for name, case in CASES.items():
        monkeypatch.setitem(CASES, name, Case(case.make, [tiny[name]], [], []))
    monkeypatch.setattr(bench, "cpu_peak", lambda: 1e9)


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_every_operation_has_a_case() -> None:
    assert set(CASES) == set(kk.operations())


def test_json(tmp_path: Path) -> None:
    result = call("--json", "--quiet", "--repeats", 2)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1 and result.stderr == ""
    values = json.loads(result.stdout)
    assert values["command"] == "bench" and values["peak_tflops"] == 1e-3 and "threads" in values["device"]
    assert {row["operation"] for row in values["rows"]} == set(kk.operations())
    for row in values["rows"]:
        assert row["p20"] <= row["seconds"] <= row["p80"] and row["seconds"] > 0
        assert row["extra_mib"] >= 0 and row["dtype"] == "float32"
        assert row["predicted_seconds"] is None, "the cost model knows GPUs"
        assert (row["backend"] != "") == (row["provider"] == OURS)
    (ours, *plain) = [row for row in values["rows"] if row["operation"] == "syrk_"]
    assert ours["provider"] == OURS and [row["provider"] for row in plain] == ["mm + add_", "addmm_"]
    assert plain[0]["speed_up"] == 1.0
    # half the FLOPs of the full product, at the same effective rate
    assert ours["real_tflops"] == pytest.approx(ours["effective_tflops"] / 2)
    assert ours["effective_tflops"] == pytest.approx(2 * 8 * 12**2 / ours["seconds"] * 1e-12)
    assert ours["peak_share"] == pytest.approx(ours["real_tflops"] / 1e-3)
    assert plain[0]["real_tflops"] == plain[0]["effective_tflops"]
    assert [r["real_tflops"] for r in values["rows"] if r["operation"] == "apply_update_"] == [None] * 3


def test_a_selection_and_its_files(tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench"
    result = call("--operation", "kron_solve", "--operation", "syrk_", "--dtype", "bfloat16", "--out", out)
    assert result.exit_code == 0, result.output
    assert "kron_solve: 6 × 8, bfloat16" in result.stdout and "syrk_: order 12, 8 rows" in result.stdout
    assert "rotate" not in result.stdout
    assert "the peak is 0.001 TFLOP/s" in result.stderr
    assert {path.name for path in out.iterdir()} == {"bench.csv", "bench.png", "config.yaml"}
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    with (out / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["operation"] for row in rows] == ["kron_solve"] * 2 + ["syrk_"] * 2
    assert all(row["dtype"] == "bfloat16" and float(row["seconds"]) > 0 for row in rows)
    again = call("--config", out / "config.yaml", "--json", "--quiet", "--out", out)
    assert again.exit_code == 0, again.output
    assert {row["operation"] for row in json.loads(again.stdout)["rows"]} == {"kron_solve", "syrk_"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operation", "gemm"], "operation is 'gemm'; it must be one of syrk_, accumulate_factors_"),
        (["--sizes", "huge"], "sizes is 'huge'; it must be one of small, medium, large"),
        (["--dtype", "float64"], "dtype is 'float64'; it must be one of float32, bfloat16, float16"),
        (["--repeats", 0], "repeats is 0; it must be at least 1"),
        (["--device", "mps"], "device is 'mps'; it must be cpu or a CUDA device"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    arguments: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("began"))
    result = call(*arguments, "--out", tmp_path / "bench")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    assert "there is no CUDA device here" in call("--device", "cuda").stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", CASES)
def test_all_providers_of_a_case_run(operation: str, dtype: torch.dtype) -> None:
    for problem in CASES[operation].problems("small", dtype, CPU):
        for work in (problem.run, *problem.baselines.values()):
            work()
        assert problem.operation == operation
        assert problems.fault(problem) is None
        assert problem.cost(problem.configuration(H100), H100).bytes > 0


def test_what_does_not_fit_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.outer_product(9, 6, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(bench, "_fits", lambda work, _: work is not problem.baselines["mm + add_"])
    notes: list[str] = []
    rows = bench.measure(problem, bench.BenchConfig(repeats=1), 1e9, notes)
    assert [row.provider for row in rows] == ["kfade", "addmm_"] and rows[0].speed_up is None
    assert notes == ["syrk_ order 6, 9 rows: mm + add_ is out of memory"]


def test_wrong_results_are_found() -> None:
    problem = problems.rotation(8, 12, torch.float32, CPU)
    good = problems.reference(problem)
    bad = problems.Reference(*([x + 1e-3 for x in part] for part in (good.truths, good.plains)))
    fault = problems.fault(problem, bad)
    assert fault is not None and fault.startswith("result 0 is off by ") and "is allowed" in fault
    nothing = problems.Reference([truth * torch.nan for truth in good.truths], good.plains)
    assert "off by nan" in str(problems.fault(problem, nothing))


def test_turns_and_percentiles() -> None:
    calls: list[str] = []
    clock = iter(range(1, 100))
    works = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}

    def timer(work: timing.Work) -> float:
        work()
        return float(next(clock))

    found = interleaved(works, timer, repeats=3)
    assert calls == ["a", "b"] * 4, "one round warms up"
    assert found == {"a": Times.of([3.0, 5.0, 7.0]), "b": Times.of([4.0, 6.0, 8.0])}
    assert Times.of([float(n) for n in range(11)]) == Times(5.0, 2.0, 8.0)
    calls.clear()
    interleaved(works, timer, repeats=9, seconds=0.0)
    assert calls == ["a", "b"] * 2, "one round is always made"


def test_extra_memory_of_a_call(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(100, 100)
    assert timing.extra_bytes(lambda: x.add_(1), CPU) < 100
    assert timing.extra_bytes(lambda: x @ x, CPU) >= 40_000
    assert timing.extra_bytes(lambda: (x @ x) + (x @ x), CPU) == 120_000
    assert capfd.readouterr().err == ""

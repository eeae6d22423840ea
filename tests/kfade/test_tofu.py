"""The ToFU data set through the data module, and its benchmark end to end in the small; skipped where it is absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kfade.data import read_jsonl

ROOT = Path(__file__).parents[2]
TOFU = ROOT.parent / "shared" / "data" / "tofu"
pytestmark = pytest.mark.skipif(not TOFU.is_dir(), reason=f"the ToFU data set is not in {TOFU}")


def test_every_record_is_read() -> None:
    full, forget = read_jsonl(TOFU / "full.jsonl"), read_jsonl(TOFU / "forget05.jsonl")
    assert (len(full), len(forget)) == (4000, 200)
    assert [r.prompt for r in full[-200:]] == [r.prompt for r in forget]


def test_the_benchmark_runs_and_forgets(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/tofu.py", "--data", str(TOFU), "--work", str(tmp_path), "--no-record"]
    small = ["--pairs", "260", "--epochs", "1", "--width", "32", "--layers", "1", "--steps", "1", "--vocabulary", "512"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)])}
    done = subprocess.run(
        [*command, *small, "--curvatures", "kfac"],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    methods = [line.split()[1] for line in done.stdout.splitlines()[1:]]
    assert methods == ["original", "retrained", "kfac"]

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


@pytest.mark.slow  # trains three models and makes eight runs, in processes of their own
def test_the_report_is_made_from_nothing_and_again(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/unlearning.py", "--data", str(TOFU), "--out", str(tmp_path), "--no-record"]
    small = "--stages tofu --splits forget01 --methods kfade npo --learning-rates 1e-3 --seeds 1 --epochs 1 --limit 2"
    small += " --width 32 --layers 1 --vocabulary 512 --known 2 --base-pairs 20 --base-epochs 1 --tuning-epochs 1"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)])}
    pages = []
    for _ in range(2):
        done = subprocess.run(
            [*command, *small.split(), "--workers", "1"],
            check=False,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        pages.append((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "trained in" not in done.stderr and "; at its end" not in done.stderr  # all was there
    assert pages[0] == pages[1]
    assert "ToFU forget01" in pages[0] and "K-FADE" in done.stdout

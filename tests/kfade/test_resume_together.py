"""A fit that ranks share and that was cut off goes on, and ends with the same bits."""

from __future__ import annotations

import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import rank_work
from manifests import manifest
from rank_work import CASES, batches, require_close
from ranks import run_ranks

import kfade
from kfade import Curvature, StorageError
from kfade.errors import RankError


def attempt(size: int, tmp_path: Path, folder: str, name: str, rank: int = 0, fatal: int = 0, *how: str) -> Any:
    return run_ranks(rank_work.fit_saved, size, tmp_path, tmp_path / folder, name, rank, fatal, *(how or [""]))


def require_whole(found: Path, expected: Path) -> None:
    """The same files, by their SHA-256, and nothing else."""
    assert manifest(found) == manifest(expected)
    assert {path.name for path in found.iterdir()} == {*manifest(expected)["files"], "manifest.json"}


@pytest.mark.parametrize(
    "size, name, how, kills",
    [
        (2, "passes", "raise", 4),
        (2, "low rank", "kill", 2),
        pytest.param(3, "ekfac", "kill", 6, marks=pytest.mark.slow),
        pytest.param(2, "passes", "kill", 8, marks=pytest.mark.slow),
        pytest.param(2, "cholesky", "kill", 4, marks=pytest.mark.slow),
        pytest.param(3, "low rank", "raise", 10, marks=pytest.mark.slow),
        pytest.param(2, "one pass", "raise", 6, marks=pytest.mark.slow),
        pytest.param(2, "diagonal", "raise", 4, marks=pytest.mark.slow),
    ],
)
def test_ranks_go_on(size: int, name: str, how: str, kills: int, tmp_path: Path) -> None:
    """A rank ends at a random moment, again and again; all go on, and leave the files of a fit that was left alone."""
    dice = random.Random(f"{size} {name} {how}")
    events = attempt(size, tmp_path, "whole", name)
    assert all(type(count) is int for count in events)
    for _ in range(kills):
        rank = dice.randrange(size)
        told = attempt(size, tmp_path, "s", name, rank, dice.randint(2, max(3, events[rank] // 3)), how)
        if all(type(one) is int for one in told):
            break
        assert all(type(one) is RankError for number, one in enumerate(told) if number != rank), told
        with pytest.raises(StorageError):
            Curvature.load(tmp_path / "s")
    again = attempt(size, tmp_path, "s", name)
    assert all(type(count) is int for count in again) and sum(again) < sum(events), "something was kept"
    require_whole(tmp_path / "s", tmp_path / "whole")
    one = kfade.fit(models.tiny("llama"), batches(), CASES[name])
    require_close(Curvature.load(tmp_path / "s"), one)
    # A finished one is only read.
    third = attempt(size, tmp_path, "s", name)
    require_whole(tmp_path / "s", tmp_path / "whole")
    assert max(third) <= 4


@pytest.mark.parametrize("name", ["passes", "low rank"])
def test_other_numbers_of_ranks_go_on(name: str, tmp_path: Path) -> None:
    """Of another number of ranks the sums of a pass are of no use, and what was finished is."""
    one = kfade.fit(models.tiny("llama"), batches(), CASES[name])
    for fatal, size in ((25, 2), (30, 3), (35, 1)):
        told = attempt(size, tmp_path, "s", name, size - 1, fatal, "raise")
        assert any(type(error) is ZeroDivisionError for error in told)
    config = replace(CASES[name], checkpoint_seconds=0)
    progress = kfade.Progress()
    kfade.fit(models.tiny("llama"), batches(), config, store=tmp_path / "s", progress=progress)
    require_close(Curvature.load(tmp_path / "s"), one)
    files = {path.name for path in (tmp_path / "s").iterdir()}
    assert files == {*manifest(tmp_path / "s")["files"], "manifest.json"}
    # And ranks read what one process has finished.
    assert max(attempt(2, tmp_path, "s", name)) <= 4


def test_journals_of_another_fit_are_removed(tmp_path: Path) -> None:
    """Their manifest is gone: nothing says what they belong to."""
    told = attempt(2, tmp_path, "s", "ekfac", 0, 20, "raise")
    assert type(told[0]) is ZeroDivisionError and (tmp_path / "s" / "manifest.1.json").is_file()
    (tmp_path / "s" / "manifest.json").unlink()
    attempt(2, tmp_path, "s", "ekfac")
    attempt(2, tmp_path, "whole", "ekfac")
    require_whole(tmp_path / "s", tmp_path / "whole")


def test_a_directory_of_another_fit_is_refused_by_all(tmp_path: Path) -> None:
    attempt(2, tmp_path, "s", "ekfac")
    first, second = attempt(2, tmp_path, "s", "kfac")
    assert type(first) is StorageError and "config.curvature is 'kfac' and was 'ekfac'" in str(first)
    assert type(second) is RankError and "rank 0 failed: StorageError" in str(second)


@pytest.mark.parametrize("name, fatal", [
    ("ekfac", (0.25, 0.5)), ("passes", (0.45,)),
    pytest.param("low rank", (0.1, 0.4), marks=pytest.mark.slow),
    pytest.param("passes", (0.15, 0.2, 0.2, 0.2), marks=pytest.mark.slow),
])  # fmt: skip
def test_sharded_ranks_go_on(name: str, fatal: tuple[float, ...], tmp_path: Path) -> None:
    """Killed at some shares of their events: who has saved more of a pass waits for the other with idle batches."""

    def sharded(folder: str, rank: int = 0, number: int = 0) -> Any:
        return attempt(2, tmp_path, folder, name, rank, number, "kill", "fsdp")

    events = sharded("whole")
    for number, share in enumerate(fatal):
        told = sharded("s", number % 2, int(share * events[number % 2]))
        assert told[number % 2] == -signal.SIGKILL and type(told[1 - number % 2]) is RankError, told
    again = sharded("s")
    assert all(type(count) is int for count in again) and sum(again) < sum(events), "something was kept"
    require_whole(tmp_path / "s", tmp_path / "whole")
    require_close(Curvature.load(tmp_path / "s"), kfade.fit(models.tiny("llama"), batches(), CASES[name]))


def test_what_sharded_ranks_have_finished_one_process_goes_on_with(tmp_path: Path) -> None:
    """The weights have one digest, sharded over any number of ranks or whole."""
    events = attempt(2, tmp_path, "whole", "ekfac", 0, 0, "", "fsdp")
    attempt(2, tmp_path, "s", "ekfac", 0, int(0.7 * events[0]), "kill", "fsdp")
    taken = {n: e["sha256"] for n, e in manifest(tmp_path / "s")["files"].items() if e["stage"].endswith("factors")}
    attempt(3, tmp_path, "s", "ekfac", 1, 12, "kill", "fsdp")
    kfade.fit(models.tiny("llama"), batches(), CASES["ekfac"], store=tmp_path / "s")
    files = manifest(tmp_path / "s")["files"]
    assert taken and all(files[name]["sha256"] == digest for name, digest in taken.items())
    require_close(Curvature.load(tmp_path / "s"), kfade.fit(models.tiny("llama"), batches(), CASES["ekfac"]))

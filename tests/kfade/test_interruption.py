"""Ctrl-C of a fit that ranks share: all stop where they can go on, and nothing is lost but what was in hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import rank_work
from manifests import manifest
from ranks import run_ranks

from kfade.errors import Interrupted


def require_kept(told: dict[str, Any], directory: Path, rank: int) -> None:
    """A directory has all batches that a rank has added, or what they gave, and all factors that it has decomposed."""
    journal = json.loads((directory / ("manifest.json" if rank == 0 else f"manifest.{rank}.json")).read_text())
    if told["stages"] and told["batches"] and told["stages"] not in told["put"]:
        assert journal["fit"]["checkpoint"]["batches"] == told["batches"]
        assert journal["fit"]["checkpoint"]["stages"] == told["stages"]
    kept = [entry for entry in journal["files"].values() if entry["stage"].endswith("decomposition")]
    assert len(kept) == told["factors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], dict[str, Any]]:
    """The manifest of a fit by so many ranks, on so many batches, that was left alone."""

    @cache
    def fitted(size: int, count: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("whole")
        run_ranks(rank_work.go_on, size, folder, folder / "s", "ekfac", count)
        return manifest(folder / "s")

    return fitted


@pytest.mark.parametrize("size, count, rank, when, number, who", [
    (2, 3, 1, "sampled", 1, "all"), (2, 3, 0, "sampled", 2, "one"), (2, 3, 1, "meeting", 1, "one"),
    (2, 3, 0, "decompose", 2, "all"), (2, 3, 0, "sampled", 3, "one"), (3, 2, 2, "meeting", 1, "one"),
    (3, 2, 0, "sampled", 1, "all"),
    pytest.param(2, 3, 0, "decompose", 2, "one", marks=pytest.mark.slow),
    pytest.param(2, 3, 1, "meeting", 1, "all", marks=pytest.mark.slow),
    pytest.param(2, 3, 1, "meeting", 2, "one", marks=pytest.mark.slow),
    pytest.param(3, 2, 2, "meeting", 1, "all", marks=pytest.mark.slow),
    pytest.param(3, 3, 1, "decompose", 1, "one", marks=pytest.mark.slow),
    pytest.param(3, 3, 2, "sampled", 2, "all", marks=pytest.mark.slow),
])  # fmt: skip
def test_ranks_stop_together(
    size: int,
    count: int,
    rank: int,
    when: str,
    number: int,
    who: str,
    whole: Callable[[int, int], dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Of three ranks with two batches the last has none, and waits from the start."""
    arguments = (tmp_path / "s", "ekfac", count, rank, when, number, who)
    for other, told in enumerate(run_ranks(rank_work.fit_interrupted, size, tmp_path, *arguments, seconds=60)):
        assert type(told["error"]) is Interrupted, told
        assert str(told["error"]) == f"interrupted; what was done is saved in {tmp_path / 's'}: run the same to go on"
        require_kept(told, tmp_path / "s", other)
    assert run_ranks(rank_work.go_on, size, tmp_path, tmp_path / "s", "ekfac", count) == [None] * size
    assert manifest(tmp_path / "s") == whole(size, count), "the same bits as a fit that was left alone"


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """The rank that gets both loses the batch in hand; the other hears of it, and saves what it has."""
    arguments = (tmp_path / "s", "ekfac", 3, 1, "sampled", 1, "twice")
    first, second = run_ranks(rank_work.fit_interrupted, 2, tmp_path, *arguments, seconds=60)
    assert type(second["error"]) is KeyboardInterrupt and second["batches"] == 0
    assert type(first["error"]) is Interrupted and first["batches"] > 0
    require_kept(first, tmp_path / "s", 0)


@pytest.mark.parametrize("rank, when, number, who", [
    (1, "sampled", 1, "one"),
    pytest.param(0, "decompose", 1, "all", marks=pytest.mark.slow),
    pytest.param(0, "sampled", 3, "all", marks=pytest.mark.slow),
])  # fmt: skip
def test_ranks_of_a_sharded_model_stop_after_the_same_batch(
    rank: int, when: str, number: int, who: str, tmp_path: Path
) -> None:
    """None is left in a collective of the next one."""
    arguments = (tmp_path / "s", "ekfac", 3, rank, when, number, who, "fsdp")
    told = run_ranks(rank_work.fit_interrupted, 2, tmp_path, *arguments, seconds=60)
    assert [type(one["error"]) for one in told] == [Interrupted] * 2, told
    if when == "sampled":
        assert told[0]["batches"] == told[1]["batches"]
    for folder in ("s", "whole"):
        run_ranks(rank_work.go_on, 2, tmp_path, tmp_path / folder, "ekfac", 3, "fsdp")
    assert manifest(tmp_path / "s") == manifest(tmp_path / "whole")

"""The tuner without a GPU: what it tries, what it throws out, what it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kfade_kernels import problems, tune
from kfade_kernels.configurations import Configuration, Entry, choose, read, shipped, unfit, write
from kfade_kernels.devices import A100, B200, DEVICES, H100, INTERPRETER, MI300X, Device
from kfade_kernels.problems import Problem
from kfade_kernels.tune import SEARCHES, Search, Trial

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32
SMALL = Configuration(block_m=64, block_n=64)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("kernel", SEARCHES)
def test_candidates_can_run(kernel: str, device: Device, dtype: torch.dtype) -> None:
    found = tune.candidates(kernel, device, dtype)
    search = SEARCHES[kernel]
    assert 4 <= len(found) <= 400
    assert len(set(found)) == len(found)
    assert all(search.sound(c) for c in found)
    itemsize = dtype.itemsize if search.accumulators else 0
    assert all(unfit(c, device, itemsize, search.accumulators) is None for c in found)
    assert found == tune.candidates(kernel, device, dtype)


def test_candidates_suit_the_device() -> None:
    assert any(c.descriptors for c in tune.candidates("syrk", H100, BF16))
    assert not any(c.descriptors for c in tune.candidates("syrk", A100, BF16))
    assert {c.precision for c in tune.candidates("syrk", H100, F32)} == {"tf32x3", "bf16x6"}
    assert {c.precision for c in tune.candidates("syrk", B200, F32)} == {"tf32x3"}
    assert {c.precision for c in tune.candidates("syrk", MI300X, F32)} == {"ieee"}
    assert all(c.block_n % c.block_m == 0 for c in tune.candidates("syrk", H100, BF16))


@pytest.mark.parametrize("device", [H100, A100, B200, MI300X], ids=lambda device: device.name)
def test_what_is_shipped_for_syrk_is_among_them(device: Device) -> None:
    for dtype in (BF16, F32):
        assert choose("syrk", device, dtype, 8192, "3.7.1") in tune.candidates("syrk", device, dtype)


def fake(problem_run: list[str]) -> Problem:
    x = torch.zeros(1)
    return Problem(
        "syrk_", "syrk", "fake", F32, CPU, 4, run=lambda: problem_run.append("run"), results=lambda wide: [x],
        cost=lambda *_: pytest.fail("not asked for"), explain=lambda: pytest.fail("not asked for"),
    )  # fmt: skip


def test_faulty_candidates_are_never_timed() -> None:
    trials = [Trial(Configuration(group=n)) for n in (1, 2, 3, 4)]
    seen: list[int] = []

    def group() -> int:
        return choose("syrk", H100, F32, 4, "3.7.1").group

    def check(problem: Problem, against: object) -> str | None:
        seen.append(group())
        if group() == 3:
            raise RuntimeError("out of resource: shared memory\nmore")
        return "result 0 is off by 1.00e+00" if group() == 2 else None

    timed: list[int] = []

    def timer(work: Callable[[], object]) -> float:
        timed.append(group())
        return 1.0 / group()

    tune.measure("syrk", trials, 100, fake([]), timer, check)
    assert seen == [1, 2, 3, 4]
    assert set(timed) == {1, 4} and len(timed) == 2 * (1 + tune.REPEATS)
    assert [t.fault for t in trials] == [
        None, "result 0 is off by 1.00e+00", "RuntimeError: out of resource: shared memory", None,
    ]  # fmt: skip
    assert trials[3].seconds == {100: 0.25}
    tune.measure("syrk", trials, 200, fake([]), timer, check)
    assert seen[4:] == [1, 4], "what was faulty once is out"


def trial(group: int, **seconds: float) -> Trial:
    return Trial(Configuration(group=group), {int(order[1:]): value for order, value in seconds.items()})


def test_the_best_is_good_at_every_order_of_its_class() -> None:
    trials = [trial(1, n2048=1.0, n3000=9.0), trial(2, n2048=1.2, n3000=3.0), trial(3, n2048=0.1)]
    faulty = trial(4, n2048=0.1, n3000=0.1)
    faulty.fault = "wrong"
    found = tune.best([*trials, faulty], [2048, 3000])
    assert found is not None and found.configuration.group == 2
    assert tune.best([faulty], [2048]) is None
    assert tune.best([], [2048]) is None


def test_entries_say_where_they_come_from() -> None:
    trials = [trial(1, n512=2.0, n2048=1.0, n8192=3.0), trial(2, n512=1.0, n2048=2.0, n8192=2.0)]
    found = tune.entries_of(trials, [512, 2048, 8192], H100, BF16, "3.7.1", "2026-11-24")
    assert [(e.size, e.configuration.group) for e in found] == [("small", 2), ("medium", 1), ("large", 2)]
    assert {(e.device, e.dtype, e.triton, e.source) for e in found} == {
        ("H100", "bfloat16", "3.7", "measured 2026-11-24")
    }
    assert [Entry.from_json(e.to_json()) for e in found] == found


def test_new_entries_replace_their_like_and_no_others(tmp_path: Path) -> None:
    old = list(shipped("syrk"))
    first = tune.entries_of([trial(1, n8192=1.0)], [8192], H100, BF16, "3.7.1", "2026-11-24")
    second = tune.entries_of([trial(2, n8192=1.0)], [8192], H100, BF16, "3.7.1", "2026-11-25")
    path = tmp_path / "configurations.json"
    write(path, tune.merged(old, first))
    write(path, tune.merged(read(path), second))
    assert list(read(path)) == [*old, *second]
    assert choose("syrk", H100, BF16, 8192, "3.7.1", read(path)).group == 2
    assert choose("syrk", H100, torch.float16, 8192, "3.7.1", read(path)) in {e.configuration for e in old}


@pytest.mark.parametrize("order", [70, 150])
def test_a_search_from_end_to_end(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates in the interpreter, one of which is given wrong results."""
    pytest.importorskip("triton")

    def make(order: int) -> Problem:
        return problems.outer_product(24, order, torch.float16, CPU)

    monkeypatch.setitem(
        tune.SEARCHES, "syrk", Search({"block_m": (64,), "block_n": (64, 128)}, SEARCHES["syrk"].problem)
    )
    times = {64: 2e-6, 128: 1e-6}

    def check(problem: Problem, against: problems.Reference | None) -> str | None:
        fault = problems.fault(problem, against)
        return fault or ("no" if choose("syrk", INTERPRETER, torch.float16, order, "3").block_n == 128 else None)

    said: list[str] = []
    trials = tune.tune(
        "syrk", [order], torch.float16, INTERPRETER, make,
        lambda work: times[choose("syrk", INTERPRETER, torch.float16, order, "3").block_n], check, said.append,
    )  # fmt: skip
    assert [(t.configuration.block_n, t.seconds, t.fault) for t in trials] == [
        (64, {order: 2e-6}, None), (128, {}, "no"),
    ]  # fmt: skip
    assert "1 of 2 configurations were tried and are correct" in said[0]


def test_time_that_runs_out_leaves_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each order gets its share of the time, the shipped configuration comes first, and results are kept at once."""
    clock = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(problems, "served_here", lambda _: None)

    def check(problem: Problem, against: problems.Reference | None) -> str | None:
        clock[0] += 1.0
        return None

    saved: list[tuple[int, list[int]]] = []
    trials = tune.tune(
        "syrk", [512, 2048, 8192], BF16, H100, lambda order: fake([]), lambda work: 1.0, check, lambda _: None,
        seconds=30.0, save=lambda trials, orders: saved.append((sum(bool(t.seconds) for t in trials), list(orders))),
    )  # fmt: skip
    assert [orders for _, orders in saved] == [[512], [512, 2048], [512, 2048, 8192]]
    assert all(10 <= count <= 12 for count, _ in saved)
    shipped_ones = {choose("syrk", H100, BF16, order, tune.triton_version()) for order in (512, 2048, 8192)}
    assert {t.configuration for t in trials[: len(shipped_ones)]} == shipped_ones
    assert clock[0] <= 33.0


def test_what_triton_does_not_serve_is_not_tuned() -> None:
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match="operation is syrk; Triton does not serve it at 40: Triton's interpreter"):
        tune.tune("syrk", [40], BF16, H100, lambda order: problems.outer_product(8, order, BF16, CPU), lambda _: 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tuned.json"
    assert tune.main(["--operation", "syrk", "--out", str(out)]) == 2
    assert "there is no GPU here" in capsys.readouterr().err
    assert not out.exists()

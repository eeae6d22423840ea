"""A fit that was cut off goes on, and ends with the same bits."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from kfade_kernels import PackedSymmetric
from manifests import manifest, rewrite
from models import batch, hand_made, tiny
from pages import run_examples
from torch import Tensor

import kfade
import kfade.resume
import kfade.storage
from kfade import Curvature, FitConfig, StorageError, decomposition
from kfade.loss import Head

BATCHES = [batch(padding, seed=seed) for seed, padding in enumerate(("right", "none", "left", "right", "none"))]
# Two label samples, layers in two passes, sums saved after every batch.
OPTIONS = FitConfig(modules="mlp", samples=2, layers_per_pass=3, checkpoint_seconds=0)


@pytest.fixture(autouse=True)
def sums_are_saved_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: tiny batches take less than a save."""
    monkeypatch.setattr(kfade.resume, "CHECKPOINT_SHARE", 1e9)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So that one factor after the other is decomposed; what two threads do has tests of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", torch.float32)


@pytest.fixture(scope="module")
def whole(model: Any) -> Curvature:
    return kfade.fit(model, BATCHES, OPTIONS)


def require_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Every field of every state, bit for bit."""
    assert list(found) == list(expected)
    for name, state in expected.items():
        for field in fields(state):
            ours, theirs = getattr(found[name], field.name), getattr(state, field.name)
            if isinstance(theirs, PackedSymmetric):
                ours, theirs = ours.to_dense(), theirs.to_dense()
            if isinstance(theirs, Tensor):
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), (name, field.name)
            else:
                assert ours == theirs, (name, field.name)


class Cut(Exception):
    """Ends a fit from within."""


class Work:
    """Counts what a fit does, and calls `at` after so many of one kind: `batch` (and label sample) or `factor`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = {"batch": 0, "factor": 0}
        self._at: tuple[str, int, Callable[[], None]] | None = None
        sampled, decompose, sketch = Head.sampled, decomposition.decompose, decomposition.decompose_sketch

        def counting(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                result = function(*arguments, **named)
                self.counts[kind] += 1
                if self._at is not None and self._at[:2] == (kind, self.counts[kind]):
                    self._at[2]()
                return result

            return call

        monkeypatch.setattr(Head, "sampled", counting("batch", sampled))
        monkeypatch.setattr(decomposition, "decompose", counting("factor", decompose))
        monkeypatch.setattr(decomposition, "decompose_sketch", counting("factor", sketch))

    def at(self, kind: str, number: int, action: Callable[[], None]) -> None:
        """From now on, call this after `number` more."""
        self.counts = dict.fromkeys(self.counts, 0)
        self._at = (kind, number, action)

    def cut(self, kind: str, number: int) -> None:
        def raise_cut() -> None:
            raise Cut

        self.at(kind, number, raise_cut)

    def go_on(self) -> None:
        self.counts, self._at = dict.fromkeys(self.counts, 0), None


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


@pytest.fixture
def started(model: Any, work: Work, tmp_path: Path) -> Path:
    """A fit that was cut off while the third factor of its first pass was decomposed."""
    work.cut("factor", 3)
    with pytest.raises(Cut):
        kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
    work.go_on()
    return tmp_path / "s"


@pytest.fixture
def in_a_pass(model: Any, work: Work, tmp_path: Path) -> Path:
    """A fit that was cut off in the fourth batch of its first pass."""
    work.cut("batch", 7)
    with pytest.raises(Cut):
        kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
    work.go_on()
    return tmp_path / "s"


# ------------------------------------------------------------------------------------------ what is saved


# Orders of the factors are 16, 17, 24 and 25: with the first rank the two wider ones are sketched, with the other all.
RANKS = (20, 8)


@pytest.mark.parametrize(
    "curvature, rank", [("identity", None), ("diagonal", None), *product(("kfac", "ekfac"), (None, *RANKS))]
)
@pytest.mark.parametrize("per_pass", [None, 3])
def test_saving_changes_no_bit(
    model: Any, curvature: str, rank: int | None, per_pass: int | None, tmp_path: Path
) -> None:
    options = replace(OPTIONS, curvature=curvature, layers_per_pass=per_pass, rank=rank)
    plain = kfade.fit(model, BATCHES, options)
    require_same(kfade.fit(model, BATCHES, options, store=tmp_path / "s"), plain)
    loaded = Curvature.load(tmp_path / "s", model)
    require_same(loaded, plain)
    assert loaded.config == options
    plain.save(tmp_path / "saved")
    content = manifest(tmp_path / "s")
    assert content.pop("fit")["finished"] is True
    assert content == manifest(tmp_path / "saved"), "one format, however it was written"
    assert {p.name for p in (tmp_path / "s").iterdir()} == {*content["files"], "manifest.json"}


def test_a_finished_fit_is_only_read(model: Any, whole: Curvature, work: Work, tmp_path: Path) -> None:
    kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
    work.go_on()
    progress = kfade.Progress()
    require_same(kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s", progress=progress), whole)
    assert work.counts == {"batch": 0, "factor": 0} and not progress.costs


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mappings")
def test_states_are_mapped_from_the_files(model: Any, tmp_path: Path) -> None:
    """What is saved takes no memory of its own: neither after a fit, nor when it is loaded."""
    fitted = kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
    loaded = Curvature.load(tmp_path / "s")
    ranges = [
        [int(x, 16) for x in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(tmp_path / "s") in line
    ]
    for state in (*fitted.values(), *loaded.values()):
        assert state.a_sum is not None and state.s_sum is not None
        for value in (state.a_sum.data, state.s_sum.data, state.q_in, state.q_out, state.lambda_sum):
            assert any(start <= value.data_ptr() < stop for start, stop in ranges)


def test_a_directory_of_its_own_is_made_and_others_files_stay(model: Any, tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("seed: 0")
    kfade.fit(model, BATCHES[:1], FitConfig(curvature="diagonal"), store=str(directory))
    assert (directory / "config.yaml").read_text() == "seed: 0"
    kfade.storage.remove_curvature(directory)
    assert [p.name for p in directory.iterdir()] == ["config.yaml"]


# ------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize(
    "kind, number, batches, factors",
    # 2 passes × 5 batches × 2 samples for A and S, as many for Λ; 5 factors a pass (gate and up share an input).
    [
        ("batch", 7, 40 - 6, 10),  # in batch 4 of A, S: three are saved
        ("batch", 12, 40 - 10, 5),  # in batch 1 of Λ
        ("batch", 18, 40 - 16, 5),  # in batch 4 of Λ
        ("batch", 40, 2, 0),  # in the very last one
        ("factor", 1, 30, 10),
        ("factor", 4, 30, 7),
        ("factor", 10, 10, 1),
    ],
)
@pytest.mark.parametrize("rank", [None, *RANKS])
def test_nothing_finished_is_done_again(
    model: Any, whole: Curvature, work: Work, tmp_path: Path, kind: str, number: int, batches: int, factors: int,
    rank: int | None,
) -> None:  # fmt: skip
    options = replace(OPTIONS, rank=rank)
    plain = whole if rank is None else kfade.fit(model, BATCHES, options)
    work.cut(kind, number)
    with pytest.raises(Cut):
        kfade.fit(model, BATCHES, options, store=tmp_path / "s")
    with pytest.raises(StorageError, match="unfinished"):
        Curvature.load(tmp_path / "s")
    work.go_on()
    require_same(kfade.fit(model, BATCHES, options, store=tmp_path / "s"), plain)
    assert work.counts == {"batch": batches, "factor": factors}
    require_same(Curvature.load(tmp_path / "s", model), plain)


@pytest.mark.parametrize("later", [1, 2, None])
def test_sketches_outlive_another_number_of_layers_a_pass(
    model: Any, work: Work, tmp_path: Path, later: int | None
) -> None:
    """Cut off between two decompositions: the sums of those that are left are there, whoever asks for which."""
    options = replace(OPTIONS, rank=8)
    plain = kfade.fit(model, BATCHES, options)
    work.cut("factor", 4)
    with pytest.raises(Cut):
        kfade.fit(model, BATCHES, options, store=tmp_path / "s")
    work.go_on()
    others = replace(options, layers_per_pass=later)
    require_same(kfade.fit(model, BATCHES, others, store=tmp_path / "s"), plain)
    assert work.counts["factor"] == 7


def test_a_basis_of_a_rank(model: Any, work: Work, tmp_path: Path) -> None:
    options = replace(OPTIONS, rank=20)
    basis = kfade.fit(model, BATCHES[:2], options)
    plain = kfade.fit(model, BATCHES, options, basis=basis)
    work.cut("batch", 9)
    with pytest.raises(Cut):
        kfade.fit(model, BATCHES, options, basis=basis, store=tmp_path / "s")
    work.go_on()
    require_same(kfade.fit(model, BATCHES, options, basis=basis, store=tmp_path / "s"), plain)
    assert work.counts == {"batch": 20 - 8, "factor": 0}


@pytest.mark.parametrize("number", [1, 4, 9])
def test_factors_that_are_decomposed_at_once(model: Any, work: Work, tmp_path: Path, number: int) -> None:
    with two_threads():
        plain = kfade.fit(model, BATCHES, OPTIONS)
        work.cut("factor", number)
        with pytest.raises(Cut):
            kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
        done = work.counts["factor"]
        work.go_on()
        require_same(kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s"), plain)
    # The one that was cut off, and no other, is decomposed again.
    assert number <= done <= number + 1 and work.counts["factor"] == 10 - done + 1


MODELS: dict[str, tuple[Callable[[], Any], FitConfig]] = {
    "float64": (lambda: tiny("llama"), OPTIONS),
    "Conv1D": (lambda: tiny("gpt2", torch.float32), OPTIONS),
    "called twice": (lambda: hand_made("twice"), replace(OPTIONS, modules="first|gate|up|down")),
    "tied": (lambda: hand_made("tied"), replace(OPTIONS, modules="first|second|gate|up|down")),
    "autocast": (lambda: tiny("llama", torch.float32), replace(OPTIONS, autocast="bfloat16")),
    "bfloat16": (lambda: tiny("llama", torch.bfloat16), OPTIONS),
    "empirical": (lambda: tiny("llama", torch.float32), replace(OPTIONS, fisher="empirical", samples=1)),
    "one pass": (lambda: tiny("llama", torch.float32), replace(OPTIONS, basis_share=0.4)),
    "rank": (lambda: tiny("llama", torch.float32), replace(OPTIONS, rank=20)),
    "rank, float64, one pass": (lambda: tiny("gpt2"), replace(OPTIONS, rank=8, basis_share=0.4)),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options = MODELS[case]
    plain = kfade.fit(make(), BATCHES, options)
    # Every fourth batch cuts the fit off.
    rows, calls = Head.rows, []

    def cutting(self: Head, one: Any) -> Tensor:
        calls.append(one)
        if len(calls) % 4 == 0:
            raise Cut
        return rows(self, one)

    monkeypatch.setattr(Head, "rows", cutting)
    cuts = 0
    while True:
        try:
            # A model that is loaded anew each time, as a new process does.
            fitted = kfade.fit(make(), BATCHES, options, store=tmp_path / "s")
            break
        except Cut:
            cuts += 1
    require_same(fitted, plain)
    assert cuts >= 4


def test_a_basis_that_is_given(model: Any, whole: Curvature, work: Work, tmp_path: Path) -> None:
    """Its factors and eigenvectors are copied at once; the one pass for Λ is gone on with."""
    plain = kfade.fit(model, BATCHES[:3], OPTIONS, basis=whole)
    work.cut("batch", 9)
    with pytest.raises(Cut):
        kfade.fit(model, BATCHES[:3], OPTIONS, basis=whole, store=tmp_path / "s")
    work.go_on()
    other = kfade.fit(model, BATCHES[:2], OPTIONS)
    work.go_on()
    for basis in (None, other):
        with pytest.raises(StorageError, match="holds another fit: the basis differs"):
            kfade.fit(model, BATCHES[:3], OPTIONS, basis=basis, store=tmp_path / "s")
    require_same(kfade.fit(model, BATCHES[:3], OPTIONS, basis=whole, store=tmp_path / "s"), plain)
    # 2 passes over layers × 3 batches × 2 samples; one batch of the second pass was saved.
    assert work.counts == {"batch": 12 - 8, "factor": 0}
    require_same(Curvature.load(tmp_path / "s", model), plain)


def test_other_layers_a_pass_may_be_taken_to_go_on(model: Any, work: Work, tmp_path: Path) -> None:
    """A fit that ran out of memory goes on with fewer layers at a time, and keeps what it has."""
    options = replace(OPTIONS, modules="all-linear", layers_per_pass=8)
    plain = kfade.fit(model, BATCHES, options)
    work.cut("batch", 33)
    with pytest.raises(Cut):
        kfade.fit(model, BATCHES, options, store=tmp_path / "s")
    work.go_on()
    fewer = replace(options, layers_per_pass=3, checkpoint_seconds=60)
    fitted = kfade.fit(model, BATCHES, fewer, store=tmp_path / "s")
    require_same(fitted, plain)
    assert fitted.config == fewer == Curvature.load(tmp_path / "s").config


def test_sums_are_saved_no_more_often_than_asked(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = kfade.resume.FitStore._save_sums
    monkeypatch.setattr(kfade.resume.FitStore, "_save_sums", lambda *a: (saved.append(a[-1]), save(*a)))
    options = replace(OPTIONS, layers_per_pass=None)
    kfade.fit(model, BATCHES, replace(options, checkpoint_seconds=3600), store=tmp_path / "never")
    assert not saved
    kfade.fit(model, BATCHES, options, store=tmp_path / "always")
    assert saved == [1, 2, 3, 4] * 2
    # A save would have to take less than a millionth of the time.
    monkeypatch.setattr(kfade.resume, "CHECKPOINT_SHARE", 1e-6)
    saved.clear()
    kfade.fit(model, BATCHES, options, store=tmp_path / "dear")
    assert saved == [1] * 2


def test_a_removed_file_is_computed_again(model: Any, whole: Curvature, work: Work, tmp_path: Path) -> None:
    kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
    for name in ("0000.input_factors", "0002.decomposition", "0003.correction"):
        (tmp_path / "s" / f"{name}.safetensors").unlink()
    work.go_on()
    require_same(kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s"), whole)
    # A and S of the first group, one factor, Λ of the second pass' first group.
    assert work.counts == {"batch": 20, "factor": 1}
    require_same(Curvature.load(tmp_path / "s"), whole)


def test_without_its_saved_sums_a_pass_begins_anew(model: Any, whole: Curvature, work: Work, in_a_pass: Path) -> None:
    next(in_a_pass.glob("checkpoint.*")).unlink()
    require_same(kfade.fit(model, BATCHES, OPTIONS, store=in_a_pass), whole)
    assert work.counts == {"batch": 40, "factor": 10}


def test_what_a_killed_process_left_is_removed(model: Any, whole: Curvature, in_a_pass: Path) -> None:
    folder = in_a_pass / ".0001.factors.safetensors.4242.part"
    folder.mkdir()
    (folder / ".tmpAbCdEf").write_bytes(b"half")
    (in_a_pass / "0003.correction.safetensors").write_bytes(b"of a fit that no manifest names")
    (in_a_pass / "checkpoint.factors.000001.safetensors").write_bytes(b"older")
    require_same(kfade.fit(model, BATCHES, OPTIONS, store=in_a_pass), whole)
    assert {p.name for p in in_a_pass.iterdir()} == {*manifest(in_a_pass)["files"], "manifest.json"}


# ------------------------------------------------------------------------------------------- killed

SERVER = """
import os, random, signal, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # a forked process has none of its parent's threads
import kfade, kfade.journal, kfade.resume, kfade.storage
from kfade import decomposition
from kfade.loss import Head
from test_resume import BATCHES, OPTIONS
from dataclasses import replace
from models import tiny

directory, curvature, how, seed, kills = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
curvature, _, rank = curvature.partition(" of rank ")
model = tiny("llama", torch.float32)
options = replace(OPTIONS, curvature=curvature, rank=int(rank) if rank else None)
if how == "quickly":
    options = replace(options, samples=1, layers_per_pass=None)
kfade.resume.CHECKPOINT_SHARE = 1e9
dice, lock = random.Random(seed), threading.Lock()


def run(store, fatal):
    # Dies by SIGKILL at the event of this number, on whichever thread; otherwise prints how many there were.
    events = 0

    def event(last=lambda: None):
        nonlocal events
        with lock:
            events += 1
            if events == fatal:
                last()
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)

    def watched(function):
        def call(*arguments, **named):
            event()
            return function(*arguments, **named)
        return call

    save = kfade.storage.save_file

    def save_file(tensors, path, *rest):
        event(lambda: Path(path).write_bytes(b"half of a file"))
        save(tensors, path, *rest)

    kfade.storage.save_file = save_file
    kfade.storage.sync = kfade.journal.sync = watched(kfade.storage.sync)  # written, not yet in its place
    Head.sampled, decomposition.decompose = watched(Head.sampled), watched(decomposition.decompose)
    decomposition.decompose_sketch = watched(decomposition.decompose_sketch)
    kfade.fit(model, BATCHES, options, store=store)
    os.write(1, f"events {events}\\n".encode())
    os._exit(0)


def attempt(store, fatal=0, seconds=None):
    # The exit status of a process that runs the fit, and how long it took.
    begin, child = time.monotonic(), os.fork()
    if child == 0:
        try:
            run(store, fatal)
        except BaseException as error:
            os.write(2, repr(error).encode())
        os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - begin


# The shorter of two: the first has more to do, and a machine may be busy.
(code, first), (again, second) = attempt(directory + "/whole"), attempt(directory + "/again")
assert code == again == 0
killed, length = 0, min(first, second)
while killed < kills:
    # Short lives, so that there are many.
    if how == "time":
        code, _ = attempt(directory + "/killed", seconds=dice.uniform(0.02, max(0.05, 0.15 * length)))
    else:
        # Of about 250 events, 80 and more without Λ or for it alone; a batch that is saved has six.
        code, _ = attempt(directory + "/killed", fatal=dice.randint(3, 60 if curvature == "ekfac" else 12))
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    killed += 1
code, _ = attempt(directory + "/killed")
assert code == 0, code
print("killed", killed, flush=True)
"""


def killed_and_resumed(directory: Path, curvature: str, how: str, seed: int, kills: int) -> int:
    """Run the server; how often it killed the fit before it went through."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(directory), curvature, how, str(seed), str(kills)],
        capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *filter(None, sys.path)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content, expected = manifest(directory / "killed"), manifest(directory / "whole")
    assert content == expected, "not the same files, by their SHA-256"
    left = {p.name for p in (directory / "killed").iterdir()}
    assert left == {*expected["files"], "manifest.json"}
    return int(done.stdout.split()[-1])


def test_killed_twice(model: Any, tmp_path: Path) -> None:
    """SIGKILL at two random moments, and a third process that ends with the bits of one that was left alone."""
    assert killed_and_resumed(tmp_path, "ekfac", "quickly", 1, 2) == 2
    loaded = Curvature.load(tmp_path / "killed")
    require_same(loaded, kfade.fit(model, BATCHES, loaded.config))


@pytest.mark.slow
@pytest.mark.parametrize(
    "curvature, how, seed",
    [
        ("ekfac", "events", 2),
        ("ekfac", "time", 3),
        ("kfac", "events", 4),
        ("diagonal", "events", 5),
        ("kfac", "time", 6),
        ("ekfac of rank 20", "events", 7),
        ("kfac of rank 8", "events", 8),
    ],
)
def test_killed_at_ten_random_moments(curvature: str, how: str, seed: int, tmp_path: Path) -> None:
    # By time a fit may be through before it was killed ten times, since it always gets a little further.
    assert killed_and_resumed(tmp_path, curvature, how, seed, 10) >= (4 if how == "time" else 6)


# ------------------------------------------------------------------------------------------- Ctrl-C


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("kind, number", [("batch", 3), ("batch", 13), ("factor", 2), ("batch", 40)])
def test_ctrl_c_finishes_what_is_in_hand(
    model: Any, whole: Curvature, work: Work, tmp_path: Path, kind: str, number: int
) -> None:
    options = replace(OPTIONS, checkpoint_seconds=3600)
    work.at(kind, number, interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"saved in .*/s: run the same to go on"):
        kfade.fit(model, BATCHES, options, store=tmp_path / "s")
    assert signal.getsignal(signal.SIGINT) is before
    done = dict(work.counts)
    # The batch in hand was ended with both of its label samples.
    assert done["batch"] % 2 == 0 and done[kind] == number + (kind == "batch" and number % 2)
    work.go_on()
    require_same(kfade.fit(model, BATCHES, options, store=tmp_path / "s"), whole)
    # Nothing was done twice.
    assert {key: done[key] + work.counts[key] for key in done} == {"batch": 40, "factor": 10}


def test_ctrl_c_keeps_what_two_threads_have_in_hand(model: Any, work: Work, tmp_path: Path) -> None:
    options = replace(OPTIONS, checkpoint_seconds=3600, layers_per_pass=None)
    with two_threads():
        plain = kfade.fit(model, BATCHES, options)
        work.at("factor", 3, interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"saved in .*/s: run the same to go on"):
            kfade.fit(model, BATCHES, options, store=tmp_path / "s")
        done = work.counts["factor"]
        work.go_on()
        require_same(kfade.fit(model, BATCHES, options, store=tmp_path / "s"), plain)
    assert done + work.counts["factor"] == 10


def test_a_second_ctrl_c_stops_at_once(model: Any, whole: Curvature, work: Work, tmp_path: Path) -> None:
    work.at("batch", 5, lambda: (interrupt(), interrupt()))
    with pytest.raises(KeyboardInterrupt):
        kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
    assert work.counts["batch"] == 5
    work.go_on()
    require_same(kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s"), whole)


def test_a_handler_of_the_callers_is_left_alone(model: Any, work: Work, tmp_path: Path) -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        work.at("batch", 3, interrupt)
        kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard


# ------------------------------------------------------------------------------------------- what is refused

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "config": ({"config": replace(OPTIONS, seed=3, temperature=2.0)}, "config.seed is 3 and was 0; config.temperature"),
    "curvature": ({"config": replace(OPTIONS, curvature="kfac")}, "config.curvature is 'kfac' and was 'ekfac'"),
    "weights": ({"model": tiny("llama", torch.float32, scale=0.3)}, "the model's weights differ"),
    "dtype": ({"model": tiny("llama")}, "the model's weights differ"),
    "architecture": ({"model": tiny("llama", torch.float32, rms_norm_eps=1e-3)}, "the model's configuration differs"),
    "batches": ({"batches": BATCHES[:-1]}, "holds another fit: the batches differ; give another directory"),
    "order": ({"batches": BATCHES[::-1]}, "the batches differ"),
    "labels": (
        {"batches": [{**b, "labels": b["labels"].masked_fill(b["labels"] == 5, -100)} for b in BATCHES]},
        "the batches differ",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_fit_is_refused_and_says_what_differs(
    model: Any, whole: Curvature, started: Path, work: Work, other: str
) -> None:
    changed, message = OTHERS[other]
    before = {p.name: p.read_bytes() for p in started.iterdir()}
    with pytest.raises(StorageError, match=message):
        kfade.fit(
            changed.get("model", model), changed.get("batches", BATCHES), changed.get("config", OPTIONS), store=started
        )
    assert work.counts["factor"] == 0 and {p.name: p.read_bytes() for p in started.iterdir()} == before
    require_same(kfade.fit(model, BATCHES, OPTIONS, store=started), whole)


def test_the_same_weights_from_elsewhere_are_the_same_model(model: Any, whole: Curvature, started: Path) -> None:
    moved = tiny("llama", torch.float32)
    moved.config._name_or_path = "moved/elsewhere"
    require_same(kfade.fit(moved, BATCHES, OPTIONS, store=started), whole)


def test_a_directory_that_was_saved_whole_is_refused(model: Any, whole: Curvature, tmp_path: Path) -> None:
    whole.save(tmp_path / "s")
    with pytest.raises(StorageError, match="saved whole, not by a fit"):
        kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
    require_same(Curvature.load(tmp_path / "s"), whole)


def corrupt(pattern: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        path = sorted(directory.glob(pattern))[0]
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    return change


def cut_short(directory: Path) -> None:
    path = sorted(directory.glob("0*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:100])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "corrupt": (corrupt("0*.factors.*"), r"0000.factors.safetensors is corrupt: .* remove that file"),
    "truncated": (cut_short, "is corrupt.*remove that file"),
    "foreign": (lambda d: rewrite(d, lambda m: m.update(format="weights")), "has format 'weights'"),
    "future": (lambda d: rewrite(d, lambda m: m.update(version=3)), "has version 3; this kfade reads 1 and 2"),
    "truncated manifest": (lambda d: (d / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    "no fit": (lambda d: rewrite(d, lambda m: m.update(fit=3)), "its fit is no object"),
    "nothing of the fit": (lambda d: rewrite(d, lambda m: m.update(fit={})), "is not a manifest of a fit"),
    "no layers": (lambda d: rewrite(d, lambda m: m.pop("layers")), "is not a manifest of a fit"),
    "other layers": (lambda d: rewrite(d, lambda m: m["layers"].popitem()), "a fit of other layers"),
    "unknown option": (lambda d: rewrite(d, lambda m: m["config"].update(speed=11)), "unknown options"),
    "entry without digest": (
        lambda d: rewrite(d, lambda m: next(iter(m["files"].values())).pop("sha256")), "is not a manifest of a fit"),
    "file outside": (
        lambda d: rewrite(d, lambda m: m["files"].update({"../0000.factors.safetensors": {}})), "not a file of a fit"),
    "sums outside": (
        lambda d: rewrite(d, lambda m: m["fit"].update(checkpoint={"file": "/etc/passwd"})), "not a file of a fit"),
    "half a checkpoint": (
        lambda d: rewrite(
            d, lambda m: m["fit"].update(checkpoint={"file": next(iter(m["files"]))})), "is not a manifest of a fit"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_before_any_work(model: Any, started: Path, work: Work, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(started)
    with pytest.raises(StorageError, match=message):
        kfade.fit(model, BATCHES, OPTIONS, store=started)
    assert work.counts == {"batch": 0, "factor": 0}


def test_corrupt_sums_are_refused_and_can_be_removed(model: Any, whole: Curvature, in_a_pass: Path) -> None:
    corrupt("checkpoint.*")(in_a_pass)
    with pytest.raises(StorageError, match=r"checkpoint.factors.000003.safetensors is corrupt.*remove that file"):
        kfade.fit(model, BATCHES, OPTIONS, store=in_a_pass)
    next(in_a_pass.glob("checkpoint.*")).unlink()
    require_same(kfade.fit(model, BATCHES, OPTIONS, store=in_a_pass), whole)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_interval(value: float) -> None:
    with pytest.raises(ValueError, match="checkpoint_seconds is"):
        FitConfig(checkpoint_seconds=value)


def test_two_fits_in_one_directory(model: Any, work: Work, tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(OSError, match="is in use by another fit"):
            kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
        work.go_on()

    work.at("factor", 2, second)
    kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
    assert list(Curvature.load(tmp_path / "s"))


# ------------------------------------------------------------------------------------------- disks


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A real limit on the files that this process writes; a write beyond it fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_on_the_side_reaches_the_caller(work: Work, tmp_path: Path) -> None:
    """A real failure: packed sums of order 64 fit into the limit, eigenvectors with their eigenvalues do not."""
    model = tiny("llama", torch.float32, intermediate_size=64)
    options = replace(OPTIONS, modules="up_proj", layers_per_pass=1, checkpoint_seconds=3600)
    plain = kfade.fit(model, BATCHES, options)
    with file_size_limit(64 * 64 * 4 + 200), pytest.raises(OSError, match=r"/s could not be written.*the same call"):
        kfade.fit(model, BATCHES, options, store=tmp_path / "s")
    assert not list((tmp_path / "s").glob(".*")), "half-written files stay behind"
    assert any(entry["stage"] == "factors" for entry in manifest(tmp_path / "s")["files"].values())
    work.go_on()
    require_same(kfade.fit(model, BATCHES, options, store=tmp_path / "s"), plain)
    assert work.counts["batch"] == 30


@pytest.mark.parametrize("after", [0, 1, 6, 9, 14])
def test_disk_full(
    model: Any, whole: Curvature, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Half of a file is written, then there is no space; what the manifest names is still good."""
    save, calls = kfade.storage.save_file, []

    def full(tensors: Any, path: Any, *rest: Any) -> None:
        calls.append(path)
        if len(calls) > after:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, *rest)

    monkeypatch.setattr(kfade.storage, "save_file", full)
    with pytest.raises(OSError, match=r"could not be written: .*No space left.*What was saved before is still good"):
        kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
    monkeypatch.setattr(kfade.storage, "save_file", save)
    assert not list((tmp_path / "s").glob(".*"))
    kept = manifest(tmp_path / "s")
    named = [*kept["files"], *([kept["fit"]["checkpoint"]["file"]] if kept["fit"]["checkpoint"] else [])]
    digests = {n: e["sha256"] for n, e in kept["files"].items()}
    assert all(kfade.storage.sha256(tmp_path / "s" / name) == digest for name, digest in digests.items())
    # Of a unit of several files all or none count.
    assert len(named) <= after
    work.go_on()
    require_same(kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s"), whole)
    done = sum(entry["stage"].endswith("decomposition") for entry in kept["files"].values())
    assert work.counts["factor"] == 10 - done


def test_too_little_room_is_said_before_any_work(
    model: Any, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
    saved = sum(p.stat().st_size for p in (tmp_path / "s").glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in (tmp_path / "s").glob("*.safetensors"))
    work.go_on()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=saved - headers - 1))
    with pytest.raises(OSError, match=r"GB of free space; what is still to be saved of this fit takes"):
        kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "t")
    assert work.counts == {"batch": 0, "factor": 0}
    # What is there needs no room.
    kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "s")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=saved - headers))
    kfade.fit(model, BATCHES, OPTIONS, store=tmp_path / "t")


@pytest.mark.parametrize("where", ["file", "proc", "read-only"])
def test_a_directory_that_cannot_be_written(
    model: Any, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    directory = {"file": tmp_path / "f" / "s", "proc": Path("/proc/nowhere"), "read-only": tmp_path / "r"}[where]
    (tmp_path / "f").write_text("in the way")
    (tmp_path / "r").mkdir()
    if where == "read-only":
        (tmp_path / "r").chmod(0o500)
        if os.access(tmp_path / "r", os.W_OK):  # root may write anywhere

            def refused(*_: object, **__: object) -> None:
                raise PermissionError(13, "Permission denied")

            monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(OSError, match="cannot be written"):
        kfade.fit(model, BATCHES, OPTIONS, store=directory)
    assert work.counts == {"batch": 0, "factor": 0}


# ------------------------------------------------------------------------------------------- unlearning


def test_unlearning_goes_on_with_its_fit(model: Any, work: Work, tmp_path: Path) -> None:
    options = kfade.UnlearnConfig.published(fit=OPTIONS, step_size=0.1, kl_budget=None, trials=2)
    plain = kfade.unlearn(model, BATCHES[:1], BATCHES[1:], options)
    work.cut("factor", 4)
    with pytest.raises(Cut):
        kfade.unlearn(model, BATCHES[:1], BATCHES[1:], options, store=tmp_path / "s")
    work.go_on()
    update = kfade.unlearn(model, BATCHES[:1], BATCHES[1:], options, store=tmp_path / "s")
    assert work.counts["factor"] == 10 - 3
    assert all(torch.equal(update.tensors[name], value) for name, value in plain.tensors.items())
    with pytest.raises(ValueError, match=r"store is .*, and a curvature is given"):
        kfade.unlearn(
            model, BATCHES[:1], BATCHES[1:], options, curvature=Curvature.load(tmp_path / "s"), store=tmp_path / "s"
        )


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run_examples("saving.md")
    assert len(found["curvature"]) == 6 and manifest(tmp_path / "factors")["fit"]["finished"]

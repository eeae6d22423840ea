"""Where the state of a fit lives: the same bits from anywhere, and streams that never read or write too early."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kfade_kernels import PackedSymmetric
from kfade_kernels.blocks import BlockBasis, PackedBlocks
from models import batch, tiny
from torch import Tensor

import kfade
import kfade.placement
import kfade.resume
from kfade import FitConfig
from kfade.fit import fit_factors
from kfade.layer_curvature import LayerCurvature
from kfade.placement import COMPUTE, FETCH, RETURN, SLOTS, Placement, data_of, moved
from kfade.progress import Progress

CPU = torch.device("cpu")
BATCHES = [batch(padding, seed=seed) for seed, padding in enumerate(("right", "none", "left"))]
STATE = ("a_sum", "s_sum", "q_in", "lambda_in", "q_out", "lambda_out", "lambda_sum")


class Lazy:
    """Streams that copy as late as they may: what is not waited for is read before it came, or written over."""

    def __init__(self) -> None:
        self.queues: dict[str, list[Callable[[], None]]] = {FETCH: [], RETURN: []}
        self.done = {FETCH: 0, RETURN: 0}
        self.copied = {FETCH: 0, RETURN: 0}

    def record(self, stream: str) -> tuple[str, int]:
        # What the computing stream is given is done at once.
        return stream, len(self.queues[stream]) if stream != COMPUTE else 0

    def wait(self, stream: str, event: tuple[str, int]) -> None:
        if stream == COMPUTE:
            self.finish(event)
        else:
            self.queues[stream].append(lambda: self.finish(event))

    def copy(self, stream: str, target: Tensor, source: Tensor) -> None:
        def run() -> None:
            self.copied[stream] += target.nbytes
            target.copy_(source)

        self.queues[stream].append(run)

    def finish(self, event: tuple[str, int]) -> None:
        stream, number = event
        while stream != COMPUTE and self.done[stream] < number:
            self.done[stream] += 1
            self.queues[stream][self.done[stream] - 1]()


class Log:
    """Streams that write down what they are asked for, and copy at once."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.calls: list[str] = []
        self.names = dict(names)
        self.events = itertools.count(1)

    def _name(self, tensor: Tensor) -> str:
        return self.names.setdefault(tensor.untyped_storage().data_ptr(), f"slot {len(self.names)}")

    def record(self, stream: str) -> int:
        self.calls.append(f"{stream} records {(event := next(self.events))}")
        return event

    def wait(self, stream: str, event: int) -> None:
        self.calls.append(f"{stream} waits for {event}")

    def copy(self, stream: str, target: Tensor, source: Tensor) -> None:
        self.calls.append(f"{stream} copies {self._name(source)} to {self._name(target)}")
        target.copy_(source)

    def finish(self, event: int) -> None:
        self.calls.append(f"host waits for {event}")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Lazy:
    """State lives in another place from now on, though that is a CPU too."""
    streams = Lazy()
    monkeypatch.setattr(kfade.placement, "apart", lambda device, home: True)
    monkeypatch.setattr(kfade.placement, "_InOrder", lambda: streams)
    return streams


def require_same(found: Mapping[str, LayerCurvature], expected: Mapping[str, LayerCurvature]) -> None:
    """Every field of every state, bit for bit."""
    assert list(found) == list(expected)
    for name, state in expected.items():
        for field in (f.name for f in fields(state)):
            ours, theirs = getattr(found[name], field), getattr(state, field)
            assert type(ours) is type(theirs), (name, field)
            if field in STATE and theirs is not None:
                assert torch.equal(data_of(ours), data_of(theirs)), (name, field)
            else:
                assert ours == theirs, (name, field)


# ----------------------------------------------------------------------------------------------------- a fit

CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("llama", torch.float32, {}),
    ("llama", torch.float64, {}),
    ("llama", torch.bfloat16, {}),
    ("llama", torch.float32, {"autocast": "bfloat16"}),
    ("llama", torch.float32, {"curvature": "kfac"}),
    ("llama", torch.float32, {"curvature": "kfac", "decomposition": "cholesky"}),
    ("llama", torch.float32, {"curvature": "diagonal"}),
    ("llama", torch.float32, {"curvature": "identity"}),
    ("llama", torch.float32, {"rank": 8}),
    ("llama", torch.bfloat16, {"rank": 20, "modules": "all-linear"}),
    ("llama", torch.float32, {"max_factor_order": 10}),
    ("llama", torch.bfloat16, {"max_factor_order": 16, "modules": "all-linear"}),
    ("llama", torch.float32, {"samples": 2, "modules": "all-linear"}),
    ("llama", torch.float32, {"layers_per_pass": 2, "samples": 3}),
    ("llama", torch.float32, {"basis_share": 0.5}),
    ("llama", torch.float32, {"modules": r"layers\.1\.mlp\.down_proj"}),
    ("gpt2", torch.float32, {"modules": "all-linear", "fisher": "empirical"}),
    ("qwen2", torch.bfloat16, {"samples": 2}),
]


@pytest.mark.parametrize(("kind", "dtype", "options"), CASES)
def test_a_fit_whose_state_lives_elsewhere_has_the_same_bits(
    kind: str, dtype: torch.dtype, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model, config = tiny(kind, dtype), FitConfig(**options)
    here = kfade.fit(model, BATCHES, config)
    streams = request.getfixturevalue("elsewhere")
    require_same(kfade.fit(model, BATCHES, config), here)
    # Of an identity nothing lives anywhere.
    assert bool(streams.copied[FETCH]) == bool(streams.copied[RETURN]) == (config.curvature != "identity")


def test_each_batch_moves_what_its_layers_have(elsewhere: Lazy) -> None:
    """A and S go both ways, the eigenvectors come, those of shared inputs once, and Λ goes both ways."""
    model = tiny("llama", torch.float32)
    found = kfade.fit(model, BATCHES, FitConfig(curvature="kfac", modules="mlp"))
    leads = [state for state in found.values() if state.group == state.name]
    sums = sum(s.s_sum.nbytes for s in found.values()) + sum(s.a_sum.nbytes for s in leads)
    # The first layer of the next batch is fetched with the last one of this; after the last batch in vain.
    first = found["model.layers.1.mlp.down_proj"]
    ahead = first.s_sum.nbytes + first.a_sum.nbytes
    assert elsewhere.copied[RETURN] == len(BATCHES) * sums
    assert elsewhere.copied[FETCH] in (len(BATCHES) * sums, len(BATCHES) * sums + ahead)


def test_the_device_has_three_layers_at_most(elsewhere: Lazy, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers there are, and of the first batch too."""
    sizes: list[int] = []
    fetched = Placement._fetched

    def watched(self: Placement, values: Sequence[Any]) -> Any:
        slot = fetched(self, values)
        sizes.append(sum(s.buffer.numel() for s in self._slots if s.buffer is not None))
        return slot

    monkeypatch.setattr(Placement, "_fetched", watched)
    found = kfade.fit(tiny("llama", torch.float32), BATCHES, FitConfig(modules="all-linear"))
    largest = max(s.q_in.nbytes + s.q_out.nbytes + s.lambda_sum.nbytes for s in found.values())
    # Each of three tensors begins at a multiple of 512 bytes.
    assert sizes and max(sizes) <= SLOTS * (largest + 3 * 512)


def test_factors_alone_can_live_elsewhere(elsewhere: Lazy) -> None:
    found = fit_factors(tiny("llama"), BATCHES, FitConfig(curvature="kfac"), Progress())
    assert elsewhere.copied[RETURN] and all(state.q_in is None for state in found.values())


@pytest.mark.parametrize("options", [{}, {"rank": 8}, {"max_factor_order": 10}, {"layers_per_pass": 3}])
def test_a_fit_that_saves_itself_and_a_basis_that_is_given(
    tmp_path: Path, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model, config = tiny("llama", torch.float32), FitConfig(**options)
    here = kfade.fit(model, BATCHES, config, store=tmp_path / "here")
    again = kfade.fit(model, BATCHES[:2], replace(config, layers_per_pass=None), basis=here)
    request.getfixturevalue("elsewhere")
    there = kfade.fit(model, BATCHES, replace(config, state_device="cpu"), store=tmp_path / "there")
    require_same(there, here)
    require_same(kfade.Curvature.load(tmp_path / "there"), kfade.Curvature.load(tmp_path / "here"))
    require_same(kfade.fit(model, BATCHES[:2], config, basis=here), again)
    # Where state lives is not what a fit gives: a directory goes on, or is done, from elsewhere.
    require_same(kfade.fit(model, BATCHES, replace(config, state_device="cpu"), store=tmp_path / "here"), here)


KILLED = """
import os, signal, sys, torch
import kfade, kfade.journal, kfade.placement, kfade.resume
# Not before: tests/kfade would be imported in its place.
sys.path.insert(0, sys.argv[4])
from models import batch, tiny
kfade.placement.apart = lambda device, home: True
kfade.resume.CHECKPOINT_SHARE = 1e9
replace = kfade.journal.Journal._replace_checkpoint
def killing(self, new):
    replace(self, new)
    if new is not None and new["stages"][0] == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
kfade.journal.Journal._replace_checkpoint = killing
torch.set_num_threads(int(sys.argv[5]))
batches = [batch(padding, seed=seed) for seed, padding in enumerate(("right", "none", "left"))]
options = kfade.FitConfig(checkpoint_seconds=0, **eval(sys.argv[3]))
kfade.fit(tiny("llama", torch.float32), batches, options, store=sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "options"), [("factors", {"rank": 8}), ("correction", {})])
def test_what_was_saved_before_a_kill_is_whole(
    tmp_path: Path, stage: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Sums are saved between two batches, and what was changed is at home by then."""
    model, config = tiny("llama", torch.float32), FitConfig(checkpoint_seconds=0, **options)
    here = kfade.fit(model, BATCHES, config)
    tests, threads = str(Path(__file__).parents[1]), str(torch.get_num_threads())
    command = [sys.executable, "-c", KILLED, str(tmp_path / "s"), stage, repr(options), tests, threads]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    request.getfixturevalue("elsewhere")
    said: list[str] = []
    progress = Progress()
    progress.say = said.append  # type: ignore[method-assign]
    require_same(kfade.fit(model, BATCHES, config, progress=progress, store=tmp_path / "s"), here)
    assert f"going on after batch 1 of 3 of {stage}" in said


def test_an_error_leaves_nothing_on_the_device(elsewhere: Lazy, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it had not seen finite is not added."""
    made: list[Placement] = []
    of = Placement.of
    monkeypatch.setattr(Placement, "of", lambda *arguments: made.append(of(*arguments)) or made[-1])
    model = tiny("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(kfade.NonFiniteError):
        kfade.fit(model, BATCHES, FitConfig())
    assert all(slot.buffer is None for slot in made[0]._slots)
    assert all(elsewhere.done[name] == len(queue) for name, queue in elsewhere.queues.items())


def test_at_home_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very tensors are used, and no slot is made; `cpu` is a CPU model's own device."""

    def refuse(*_: Any) -> None:
        raise AssertionError("copied")

    monkeypatch.setattr(kfade.placement._InOrder, "copy", refuse)
    monkeypatch.setattr(Placement, "_fetched", refuse)
    model = tiny("llama", torch.float32)
    require_same(kfade.fit(model, BATCHES, FitConfig(state_device="cpu")), kfade.fit(model, BATCHES, FitConfig()))
    placement, x = Placement(CPU), torch.ones(3)
    with placement.using(x, None, changes=(True, True)) as (here, nothing):
        assert here is x and nothing is None
    assert placement.keep(x) is x and placement.fetch(x) is x


# ----------------------------------------------------------------------------------------------------- streams


def order_of_calls(batches: int, units: int = 3) -> tuple[list[str], list[Tensor]]:
    """What a placement asks of its streams, where each of some layers adds its number to what it has."""
    tensors = [torch.zeros(4) for _ in range(units)]
    log = Log({t.untyped_storage().data_ptr(): f"layer {i}" for i, t in enumerate(tensors)})
    placement = Placement(CPU, streams=log)
    for _ in range(batches):
        for i, tensor in enumerate(tensors):
            with placement.using(tensor, changes=(True,)) as (here,):
                log.calls.append(f"computes layer {i}")
                here.add_(i)
        placement.end_batch()
        log.calls.append("end of batch")
    return log.calls, tensors


def test_the_order_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch fetches on demand; of the second, layer i + 1 is on its way when layer i is computed."""
    monkeypatch.setattr(kfade.placement, "apart", lambda device, home: True)
    calls, tensors = order_of_calls(2)
    assert [t.tolist() for t in tensors] == [[2.0 * i] * 4 for i in range(3)]
    end = calls.index("end of batch")
    slots = "slot 3", "slot 4", "slot 5"
    expected = []
    for i, slot in enumerate(slots):
        at = 4 * i + 1
        expected += [
            f"compute records {at}", f"fetch waits for {at}", f"fetch copies layer {i} to {slot}",
            f"fetch records {at + 1}", f"compute waits for {at + 1}", f"computes layer {i}",
            f"compute records {at + 2}", f"return waits for {at + 2}", f"return copies {slot} to layer {i}",
            f"return records {at + 3}",
        ]  # fmt: skip
    assert calls[:end] == [*expected, "host waits for 4", "host waits for 8", "host waits for 12"]
    second = calls[end + 1 :]
    # Layer 0 on demand, into the slot that layer 0 has left; layer 1 comes before layer 0 is computed.
    assert second[:9] == [
        "fetch waits for 4", "fetch copies layer 0 to slot 3", "fetch records 13",
        "fetch waits for 8", "fetch copies layer 1 to slot 4", "fetch records 14",
        "compute waits for 13", "computes layer 0", "compute records 15",
    ]  # fmt: skip
    # Layer 0 of the next batch comes with layer 2, when layer 0 has returned: event 16 of its slot and of itself.
    last = second[second.index("computes layer 1") + 1 : second.index("computes layer 2")]
    assert "return records 19" in last
    assert last[-5:] == [
        "fetch waits for 16", "fetch waits for 16", "fetch copies layer 0 to slot 3", "fetch records 20",
        "compute waits for 17",
    ]  # fmt: skip


@pytest.mark.parametrize("units", [1, 2, 3, 4, 7])
def test_a_slot_is_not_written_before_its_copy_back_ended(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of layers: every fetch into a slot comes after a wait for the last return from it."""
    monkeypatch.setattr(kfade.placement, "apart", lambda device, home: True)
    calls, tensors = order_of_calls(4, units)
    assert [t[0].item() for t in tensors] == [4.0 * i for i in range(units)]
    # By slot, and by layer, the event of its last return; and those that the fetching stream has waited for.
    returned: dict[str, str] = {}
    waited: set[str] = set()
    for before, call in itertools.pairwise(calls):
        event = call.split(" ")[-1]
        if call.startswith(("fetch waits", "host waits")):
            waited.add(event)
        elif call.startswith("return records"):
            returned.update(dict.fromkeys(before.removeprefix("return copies ").split(" to "), event))
        elif call.startswith("fetch copies"):
            for name in call.removeprefix("fetch copies ").split(" to "):
                assert name not in returned or returned[name] in waited, (name, call)


def test_a_slot_that_grows_is_not_given_back_while_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for the last use of the old one, and for the arrival of what was fetched in vain."""
    monkeypatch.setattr(kfade.placement, "apart", lambda device, home: True)
    log, small = Log({}), torch.zeros(4)
    placement = Placement(CPU, streams=log)
    for _ in range(2):  # slots 1, 2 and 0: the last of them guessed
        with placement.using(small, changes=(False,)):
            pass
        placement.end_batch()
    recorded = [call.split(" ")[0] for call in log.calls if " records " in call]
    assert recorded == ["compute", "fetch", "compute", "compute", "fetch", "compute", "fetch", "compute"]
    before = len(log.calls)
    for _ in range(2):  # slots 1 and 0; between them slot 2 is guessed again
        with placement.using(torch.zeros(999), changes=(False,)):
            pass
    assert [call for call in log.calls[before:] if call.startswith("host")] == ["host waits for 3", "host waits for 7"]


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_layers_gives_the_same_sums(seed: int, elsewhere: Lazy) -> None:
    """Guesses may be wrong, sizes grow, layers share what they change, and some are used twice in a row."""
    random = torch.Generator().manual_seed(seed)
    tensors = [torch.zeros(int(n)) for n in torch.randint(1, 3000, (6,), generator=random)]
    expected = [t.clone() for t in tensors]
    placement = Placement(CPU, streams=elsewhere)
    for number in range(1, 6):
        for i, j in torch.randint(0, 6, (9, 2), generator=random).tolist():
            values = (tensors[i], tensors[j] if j != i else None)
            with placement.using(*values, changes=(True, number % 2 == 0)) as (x, y):
                x.add_(number)
                expected[i] += number
                if y is not None:
                    assert torch.equal(y, expected[j])
                    if number % 2 == 0:
                        y.mul_(1.5)
                        expected[j] *= 1.5
        placement.end_batch()
        assert all(torch.equal(x, y) for x, y in zip(tensors, expected, strict=True))
    placement.clear()
    assert all(slot.buffer is None for slot in placement._slots)


def test_all_kinds_of_state_come_as_they_are(elsewhere: Lazy) -> None:
    columns = torch.randn(6, 4).T  # in the order of columns, as an SVD gives it
    gaps = torch.randn(4, 9)[:, :5]
    given = [
        PackedSymmetric.from_dense(torch.eye(5)),
        PackedBlocks((3, 2)),
        BlockBasis(torch.randn(13), (3, 2)),
        columns,
    ]
    placement = Placement(CPU, streams=elsewhere)
    with placement.using(*given, gaps, changes=(False,) * 5) as here:
        for ours, theirs in zip(here, [*given, gaps], strict=True):
            assert type(ours) is type(theirs) and torch.equal(data_of(ours), data_of(theirs))
            assert data_of(ours).data_ptr() != data_of(theirs).data_ptr() and data_of(ours).data_ptr() % 64 == 0
        assert here[3].stride() == columns.stride() and here[4].is_contiguous()


# ----------------------------------------------------------------------------------------------------- afterwards


def devices(found: Mapping[str, LayerCurvature]) -> set[str]:
    """Where the tensors of some states are."""
    values = [getattr(state, name) for state in found.values() for name in STATE]
    return {data_of(value).device.type for value in values if value is not None}


def test_finished_layers_leave_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a fit takes several passes: with `meta` as the host, a CPU is a device to leave."""
    model = tiny("llama", torch.float32)
    monkeypatch.setattr(sys.modules["kfade.fit"], "HOST", torch.device("meta"))
    for options in ({}, {"curvature": "diagonal"}, {"curvature": "kfac", "decomposition": "cholesky"}):
        assert devices(kfade.fit(model, BATCHES, FitConfig(**options))) == {"cpu"}
        found = kfade.fit(model, BATCHES, FitConfig(layers_per_pass=3, **options))
        assert devices(found) == {"meta"}
        assert all(state.q_in is found[state.group].q_in for state in found.values())


def test_a_layer_is_solved_and_multiplied_where_the_gradient_is() -> None:
    """A state of one device, a gradient of another: only what is used is copied, and only shapes come out on `meta`."""
    for options in ({}, {"curvature": "kfac"}, {"curvature": "diagonal"}):
        state = kfade.fit(tiny("llama", torch.float32), BATCHES, FitConfig(modules="up_proj", **options))
        one = next(iter(state.values()))
        assert one.on(CPU) is one
        there = one.on(torch.device("meta"))
        used = [
            v for v in (there.q_in, there.q_out, there.lambda_in, there.lambda_out, there.lambda_sum) if v is not None
        ]
        assert used and all(value.device.type == "meta" for value in used)
        assert one.q_in is None or one.q_in.device == CPU
        assert one.a_sum is None or (there.a_sum is one.a_sum and there.s_sum is one.s_sum)
        matrix = torch.empty(one.d_out, one.width_in, device="meta")
        assert one.solve(matrix, 0.1).device.type == "meta"


def test_what_states_share_is_moved_once() -> None:
    found = kfade.fit(tiny("llama", torch.float32), BATCHES, FitConfig())
    states, known = list(found.values()), {}
    new = [moved(state, STATE, torch.device("meta"), known) for state in states]
    groups = {state.group for state in states}
    assert len(groups) < len(states) and len({id(values["q_in"]) for values in new}) == len(groups)
    assert all(moved(s, STATE, CPU, {})["a_sum"] is s.a_sum for s in states)


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ("tpu", ValueError, "state_device is 'tpu'; it must be cpu, cuda or cuda:N"),
        ("cuda:x", ValueError, "state_device is 'cuda:x'; it must be"),
        ("meta", ValueError, "state_device is 'meta'; it must be"),
        ("", ValueError, "state_device is ''; it must be"),
        (0, TypeError, "state_device is 0; it must be the name of a device"),
        (CPU, TypeError, "state_device is device.*; it must be the name of a device"),
    ],
)
def test_what_is_no_device_is_refused(value: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        FitConfig(state_device=value)


def test_a_gpu_that_is_not_there_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = tiny("llama")
    with pytest.raises(ValueError, match="state_device is 'cuda:1', and there are 0 CUDA devices here"):
        kfade.fit(model, iter(()), FitConfig(state_device="cuda:1"), store=tmp_path / "s")
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="state_device is 'cuda:1', and there is 1 CUDA device here"):
        kfade.fit(model, iter(()), FitConfig(state_device="cuda:1"))
    with pytest.raises(ValueError, match="state_device is 'cuda' and the model is on cpu"):
        kfade.fit(model, iter(()), FitConfig(state_device="cuda"))

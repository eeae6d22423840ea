"""A fit that saves what it has finished as it goes, and goes on from there when it is called again.

A *unit* is a factor's decomposition, or one pass over the data for some layers; it is written while the next is
computed (`kfade.journal`). In a pass the sums are saved every so many seconds, between two batches. So a process that
is killed at any moment loses what it did since, and the next one ends with the same bits: batches are summed in the
same order, sampled labels depend on nothing but their sequence, and files hold every bit of a sum.

A sketch has no file of its own, since nothing needs it once it is decomposed: with a rank the sums of a finished pass
stay until then.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .config import FitConfig
from .distributed import Owners
from .errors import Interrupted, StorageError
from .factors import Sketches
from .journal import Journal
from .layer_curvature import LayerCurvature
from .layers import Layer
from .loss import Batch
from .progress import Progress
from .ranks import Ranks
from .storage import (
    BASES,
    CORRECTION,
    FACTORS,
    SHARED,
    STAGES,
    counts_of,
    read_checked,
    read_stage,
    read_tensors,
    set_tensor,
    share_in_groups,
    stage_tensors,
    stages_of,
)

# Of a factor that is sketched, the field it is in, and the stage that is there when the sketch is no longer needed.
SKETCHED = {"factors": ("s_sketch", "decomposition"), "input_factors": ("a_sketch", "input_decomposition")}
# Sums are saved no more often than takes this share of the time.
CHECKPOINT_SHARE = 0.02


def _sums_of(state: LayerCurvature, stages: Sequence[str]) -> dict[str, Tensor]:
    """What a pass adds to a state, as it is stored: sums, and of a sketch y and the trace."""
    found: dict[str, Tensor] = {}
    for stage in (stage for stage in stages if stage in stages_of(state)):
        found |= stage_tensors(state, stage)
        field, _ = SKETCHED.get(stage, ("", ""))
        sketch = getattr(state, field, None)
        if sketch is not None:
            found |= {f"{field}.y": sketch.y, f"{field}.trace": sketch.trace}
    return found


@contextmanager
def _mended_by_removal() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{error}; remove that file, and the same call computes it again") from error


class FitStore:
    """Where a fit saves itself; a context, in which Ctrl-C waits for the batch or factor in hand.

    Args:
        directory: made if need be. None keeps nothing, and every method then does nothing.
        config: of the fit.
        progress: is told what is gone on with.
        ranks: who share the fit.
        idle: what a rank with fewer batches than another runs in their place, where all must run as many; such ranks
            stop after the same batch. None where each runs its own.
    """

    def __init__(
        self,
        directory: str | Path | None,
        config: FitConfig,
        progress: Progress,
        ranks: Ranks,
        idle: Batch | None = None,
    ) -> None:
        self._idle = idle
        self._journal = None if directory is None else Journal(directory, config, progress, ranks)
        self._config, self._progress, self._ranks = config, progress, ranks
        self._signalled = False

    def __enter__(self) -> FitStore:
        self._handler: Any = None
        if self._journal is not None:
            self._journal.__enter__()
            # A handler of somebody else's stays, and so does "ignore".
            main = threading.current_thread() is threading.main_thread()
            if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._journal is not None:
            self._journal.__exit__(kind, error, where)
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
        self._ranks.stop()

    def open(
        self,
        model: nn.Module,
        model_id: str,
        states: Mapping[str, LayerCurvature],
        batches: Sequence[Batch],
        device: torch.device,
        dtype: torch.dtype,
        basis: Mapping[str, LayerCurvature] | None = None,
        *,
        home: torch.device,
        maps: bool,
    ) -> None:
        """Find what was saved, refuse what is not of this fit, and look whether the rest has room.

        Args:
            states: empty ones of all layers of the fit, in its order.
            device: of the model.
            dtype: of the state.
            basis: states whose factors and eigenvectors are taken.
            home: where state lives.
            maps: whether what is only kept is mapped from its files, and not read to `home`.

        Raises:
            StorageError: the directory holds something else, or what cannot be read.
            OSError: it cannot be written, is in use, or its disk has too little room.
        """
        self._device, self._dtype, self._maps = home, dtype, maps
        if self._journal is not None:
            self._journal.open(model, model_id, states, batches, device, dtype, basis)

    def unfinished(
        self, states: Mapping[str, LayerCurvature], layers: Sequence[Layer], stages: Sequence[str]
    ) -> list[Layer]:
        """The layers of those input groups of which the directory lacks one of the stages."""
        done = set() if self._journal is None else self._journal.done

        def shown_by(layer: Layer, stage: str) -> str:
            kept = stages_of(states[layer.name], self._config.rank)
            return stage if stage in kept else SKETCHED[stage][1]

        groups = {
            x.group
            for x in layers
            for stage in stages
            if (x.leads or stage not in SHARED) and (x.name, shown_by(x, stage)) not in done
        }
        return [x for x in layers if x.group in groups]

    def _owns(self, state: LayerCurvature, stage: str) -> bool:
        """Whether this rank keeps, and writes, what the stage leaves in a state."""
        owner = self._owners.inputs[state.group] if stage in SHARED else self._owners.outputs[state.name]
        return owner == self._ranks.rank

    def restore(self, states: Mapping[str, LayerCurvature], owners: Owners) -> None:
        """Give states what is in the directory of them: eigenvectors, and of the rest what this rank owns.

        Args:
            states: of one pass.
            owners: of them.

        Raises:
            StorageError: a file is corrupt. Where it is removed, the same call computes it again.
        """
        self._owners, journal = owners, self._journal
        if journal is None:
            return
        needed = ((name, stage) for name, state in states.items() for stage in journal.required(state))
        done = journal.done.issuperset(needed)
        # What is only kept stays on the disk.
        device = None if done and self._maps else self._device
        for name, entry in journal.found.items():
            state = states.get(entry["layer"])
            if state is not None and (entry["stage"] in BASES or self._owns(state, entry["stage"])):
                with _mended_by_removal():
                    read_stage(state, journal.directory, name, entry["sha256"], device, self._config.rank)
        for name, state in states.items():
            state.positions = journal.known[name]["positions"]
        share_in_groups(states)

    def resume(
        self, states: Mapping[str, LayerCurvature], stages: Sequence[str], batches: Sequence[Batch]
    ) -> Sequence[Batch]:
        """Give states the sums of a pass that was cut off, and return the batches that are still to be added."""
        rest = self._rest(states, stages, batches)
        if self._journal is None or self._idle is None:
            return rest
        return [*rest, *[self._idle] * (max(self._ranks.gather(len(rest))) - len(rest))]

    def _rest(
        self, states: Mapping[str, LayerCurvature], stages: Sequence[str], batches: Sequence[Batch]
    ) -> Sequence[Batch]:
        self._states, self._stages, self._begun, self._saved, journal = states, stages, 0, 0, self._journal
        if journal is None:
            return batches
        for state in states.values():
            # Of a group that is gone through again, some sums may be there.
            for field in (field for stage in stages for field in (*STAGES[stage], *SKETCHED.get(stage, ())[:1])):
                setattr(state, field, None)
            state.positions = state.positions if stages == CORRECTION else 0
        journal.forget(states, stages)
        self._next = time.monotonic() + self._config.checkpoint_seconds
        found = journal.checkpoint
        if found is None or found["stages"] != list(stages) or not set(found["layers"]).issuperset(states):
            return batches
        with _mended_by_removal():
            tensors = read_checked(journal.directory, found["file"], found["sha256"])
        self._set_sums(states, tensors, journal.directory / found["file"])
        for name, state in states.items():
            state.positions = found["positions"].get(name, state.positions)
            if not all(_sums_of(state, [stage]) for stage in stages if stage in stages_of(state)):
                raise StorageError(f"{journal.directory / found['file']} lacks the sums of {name}")
        self._begun = self._saved = found["batches"]
        self._progress.say(f"going on after batch {self._begun} of {len(batches)} of {stages[0]}")
        return batches[self._begun :]

    def _set_sums(self, states: Mapping[str, LayerCurvature], tensors: Mapping[str, Tensor], path: Path) -> None:
        """Give states the sums that a file has of them; those of other layers are left."""
        rank = self._config.rank
        sketches = None if rank is None else Sketches(rank, self._dtype, self._device)
        for key, value in tensors.items():
            name, _, field = key.rpartition("/")
            field, _, part = field.partition(".")
            if name not in states:
                continue
            state, copied = states[name], value.to(self._device, copy=True)
            if sketches is None or not part:
                set_tensor(state, field, copied, path, rank)
                continue
            sketch = getattr(state, field) or sketches.new(state.d_out if field == "s_sketch" else state.width_in)
            setattr(sketch, part, copied)
            setattr(state, field, sketch)

    def watch(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """The batches that `resume` returned, one by one; the sums are saved between them when it is time."""
        journal, end = self._journal, self._begun + len(batches)
        if self._ranks.size > 1 and self._told_to_stop():
            self._stop_if_interrupted()
        for done, batch in enumerate(batches, self._begun + 1):
            yield batch
            if journal is None:
                self._stop_if_interrupted()
                continue
            if done == end:
                continue
            journal.raise_if_failed()
            stopping = self._told_to_stop()
            if stopping or time.monotonic() >= self._next:
                self._save_sums(journal, done)
            if stopping:
                self._stop_if_interrupted()
        if journal is not None and batches and self._sketches(self._states):
            self._save_sums(journal, end)
        if journal is not None and self._ranks.size > 1:
            self._meet(journal, end)

    def _told_to_stop(self) -> bool:
        """Whether to stop before the next batch; one answer for all ranks where they run it together."""
        if self._idle is None or self._journal is None:
            return self._ranks.stopping
        if any(self._ranks.gather(self._ranks.stopping)):
            self._ranks.stop()
            return True
        return False

    def _meet(self, journal: Journal, done: int) -> None:
        """Wait until all ranks have added their batches; where one is interrupted, what this one added is saved."""
        try:
            self._stop_if_interrupted()
            self._ranks.gather(None)
        except Interrupted:
            if done > self._saved:
                self._save_sums(journal, done)
            raise

    def _sketches(self, states: Mapping[str, LayerCurvature]) -> bool:
        """Whether a factor of these is sketched."""
        return any(
            stage not in stages_of(state, self._config.rank)
            for state in states.values()
            for stage in stages_of(state)
            if stage in FACTORS
        )

    def _save_sums(self, journal: Journal, done: int) -> None:
        begin = time.monotonic()
        tensors = {
            f"{name}/{key}": value
            for name, state in self._states.items()
            for key, value in _sums_of(state, self._stages).items()
        }
        entry = {
            "stages": list(self._stages),
            "layers": list(self._states),
            "batches": done,
            "positions": {name: state.positions for name, state in self._states.items()},
        }
        journal.save_sums(entry, tensors)
        self._saved = done
        now = time.monotonic()
        self._next = now + max(self._config.checkpoint_seconds, (now - begin) / CHECKPOINT_SHARE)

    def put(self, states: Mapping[str, LayerCurvature], stages: Sequence[str]) -> None:
        """Save what some stages have left in states, which nothing changes afterwards: all of it, or none."""
        if self._journal is None:
            return
        units = [
            (name, stage, stage_tensors(state, stage))
            for name, state in states.items()
            for stage in stages
            if stage in stages_of(state, self._config.rank) and self._owns(state, stage)
        ]
        named = states if self._ranks.size == 1 else {name for name, _, _ in units}
        # The sums of a sketch are in no file of these.
        replaced = () if stages == FACTORS and self._sketches(states) else stages
        self._journal.put(units, {name: counts_of(states[name]) for name in named}, replaced)
        self._stop_if_interrupted()

    def release(self, states: Mapping[str, LayerCurvature], stages: Sequence[str] = tuple(STAGES)) -> None:
        """Let what stages left in states, all saved, be mapped from the disk: it takes no memory any more."""
        journal = self._journal
        if journal is None:
            return
        journal.wait()
        for name, entry in journal.files.items():
            state = states.get(entry["layer"])
            if state is not None and entry["stage"] in stages and self._owns(state, entry["stage"]):
                for key, value in read_tensors(journal.directory / name).items():
                    set_tensor(state, key, value, journal.directory / name, self._config.rank)
        share_in_groups(states)

    def finish(self) -> None:
        """The fit is whole."""
        if self._journal is not None:
            self._journal.finish()
            self._stop_if_interrupted()

    def _stop_if_interrupted(self) -> None:
        if not self._ranks.stopping:
            return
        if self._journal is None:
            raise Interrupted
        self._journal.wait()
        where = self._journal.directory
        raise Interrupted(f"interrupted; what was done is saved in {where}: run the same to go on")

"""A fit that saves what it has finished as it goes, and goes on from there when it is called again.

What is saved is the directory of `kfade.storage`, whose manifest alone says what is there. A *unit* is a factor's
decomposition, or one pass over the data for some layers; it is written by a side thread while the next is computed,
and the manifest names it afterwards. In a pass the sums are saved every so many seconds, between two batches. So a
process that is killed at any moment loses what it did since, and the next one ends with the same bits: batches are
summed in the same order, sampled labels depend on nothing but their sequence, and files hold every bit of a sum.

Ranks that share a fit share the directory. Each writes what it owns and the sums of its own batches, and says so in a
*journal*, a manifest of its own. That of rank 0 is the manifest itself, which takes over the others when a fit ends and
when it goes on, by however many ranks.

A sketch has no file of its own, since nothing needs it once it is decomposed: with a rank the sums of a finished pass
stay until then.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .config import FitConfig, fit_config, to_dict
from .curvature import Curvature
from .distributed import Owners
from .errors import StorageError
from .factors import Sketches
from .layer_curvature import LayerCurvature
from .layers import Layer
from .loss import Batch
from .models import weights_sha256
from .progress import Progress
from .ranks import Ranks
from .storage import (
    COUNTS,
    MANIFEST,
    SHARED,
    STAGES,
    counts_of,
    manifest_of,
    read_checked,
    read_json,
    read_manifest,
    read_stage,
    read_tensors,
    remove_leftovers,
    required_stages,
    set_tensor,
    sha256,
    shapes_of,
    share_in_groups,
    stage_tensors,
    stages_of,
    sync,
    tensors_sha256,
    write_stage,
    write_tensors,
    write_text,
)

# The stages that a pass over the data fills together.
FACTORS, CORRECTION = ("factors", "input_factors"), ("correction",)
# Of a factor that is sketched, the field it is in, and the stage that is there when the sketch is no longer needed.
SKETCHED = {"factors": ("s_sketch", "decomposition"), "input_factors": ("a_sketch", "input_decomposition")}
# What a fit takes from an earlier one that gives it its basis.
BASIS = (*FACTORS, "decomposition", "input_decomposition")
BASES = BASIS[2:]
# Options that change how a fit runs and not what it gives.
_FREE = ("layers_per_pass", "device_memory", "checkpoint_seconds")
# Sums are saved no more often than takes this share of the time.
CHECKPOINT_SHARE = 0.02
# A manifest names what was written at the latest so many seconds after, however much is waiting to be written.
COMMIT_SECONDS = 1.0
_OURS = re.compile(r"(\d{4,}\.[a-z_]+|checkpoint\.[a-z_]+\.\d+(\.\d+-of-\d+)?)\.safetensors")
_JOURNAL = re.compile(r"manifest\.(\d+)\.json")


class SideThread:
    """Runs jobs in order beside the caller, who is told of the first error at the next call of any method."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kfade-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)
            del job  # and the tensors that it holds
            self._jobs.task_done()

    def _do(self, job: Callable[[], None]) -> None:
        try:
            if self._error is None:
                job()
        except BaseException as error:
            self._error = error

    @property
    def idle(self) -> bool:
        """Whether no other job waits; to be asked by a job."""
        return self._jobs.empty()

    def submit(self, job: Callable[[], None]) -> None:
        self.raise_if_failed()
        self._jobs.put(job)

    def wait(self) -> None:
        """Return when all jobs are done."""
        self._jobs.join()
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Finish the jobs and the thread; errors are left to be asked for."""
        # Not before: a job asks whether others wait.
        self._jobs.join()
        self._jobs.put(None)
        self._thread.join()


def weights_and_shape(model: nn.Module) -> dict[str, str]:
    """What a fit depends on in a model: all bytes of its weights, and the configuration it was built from."""
    config: Any = getattr(model, "config", None)
    values = dict(config.to_dict()) if hasattr(config, "to_dict") else {}
    for name in ("_name_or_path", "transformers_version"):
        values.pop(name, None)
    text = f"{type(model).__name__} {json.dumps(values, sort_keys=True, default=str)}"
    return {"weights": weights_sha256(model), "architecture": hashlib.sha256(text.encode()).hexdigest()}


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


def _stages_in(files: Mapping[str, Mapping[str, str]]) -> set[tuple[str, str]]:
    """Layer and stage of each file."""
    return {(entry["layer"], entry["stage"]) for entry in files.values()}


def _basis_sha256(basis: Mapping[str, LayerCurvature]) -> str:
    """Of the factors and eigenvectors of some states."""
    return tensors_sha256(
        stage_tensors(state, stage) for state in basis.values() for stage in BASIS if stage in stages_of(state)
    )


def _differences(manifest: Mapping[str, Any], config: FitConfig, made_from: Mapping[str, str]) -> list[str]:
    """How this fit differs from the one in a directory, in words."""
    there, here = to_dict(fit_config(manifest["config"])), to_dict(config)
    found = [
        f"config.{name} is {here[name]!r} and was {there[name]!r}"
        for name in here
        if name not in _FREE and here[name] != there[name]
    ]
    words = {
        "weights": f"the model's weights differ from those of {manifest['model_id']}",
        "architecture": "the model's configuration differs",
        "batches": "the batches differ",
        "device": "the kind of device differs",
        "basis": "the basis differs",
    }
    before = manifest["fit"]["made_from"]
    return found + [words.get(name, name) for name, value in made_from.items() if before.get(name, "") != value]


def _read(directory: Path, config: FitConfig, made_from: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of a directory, if this fit may go on with it."""
    manifest = read_manifest(directory, unfinished=True)
    try:
        if "fit" not in manifest:
            raise StorageError(
                f"{directory} holds a curvature that was saved whole, not by a fit that can go on; give another"
                " directory, or remove this one"
            )
        differences = _differences(manifest, config, made_from)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{directory / MANIFEST} is not a manifest of a fit: {error}") from error
    if differences:
        raise StorageError(
            f"{directory} holds another fit: {'; '.join(differences)}; give another directory, or remove this one"
        )
    return manifest


def check_store(directory: str | Path, config: FitConfig) -> bool:
    """Before a model is loaded: the directory can be written, and holds no fit with another configuration.

    Returns:
        Whether it holds a finished fit.

    Raises:
        StorageError: it holds something else.
        OSError: it cannot be made or written.
    """
    directory = Path(directory)
    _probe(directory)
    if (directory / MANIFEST).exists():
        return bool(_read(directory, config, {})["fit"].get("finished"))
    with suppress(OSError):  # empty, it may not be needed after all
        directory.rmdir()
    return False


def _probe(directory: Path) -> None:
    folder = directory / f".probe.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "probe").write_bytes(b"1")
    except OSError as error:
        raise OSError(f"{directory} cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    """

    def __init__(self, directory: str | Path | None, config: FitConfig, progress: Progress, ranks: Ranks) -> None:
        self._directory = None if directory is None else Path(directory)
        self._config, self._progress, self._ranks = config, progress, ranks
        self._first = ranks.rank == 0
        self._journal = MANIFEST if self._first else f"manifest.{ranks.rank}.json"
        self._files: dict[str, dict[str, str]] = {}
        self._layers: dict[str, dict[str, Any]] = {}
        self._checkpoint: dict[str, Any] | None = None
        self._found: dict[str, dict[str, str]] = {}
        self._done: set[tuple[str, str]] = set()
        self._interrupted = False
        self._committed = 0.0

    # ---- the directory

    def open(
        self,
        model: nn.Module,
        model_id: str,
        states: Mapping[str, LayerCurvature],
        batches: Sequence[Batch],
        device: torch.device,
        dtype: torch.dtype,
        basis: Mapping[str, LayerCurvature] | None = None,
    ) -> None:
        """Find what was saved, refuse what is not of this fit, and look whether the rest has room.

        Args:
            states: empty ones of all layers of the fit, in its order.
            dtype: of the state.
            basis: states whose factors and eigenvectors are taken.

        Raises:
            StorageError: the directory holds something else, or what cannot be read.
            OSError: it cannot be written, is in use, or its disk has too little room.
        """
        if self._directory is None:
            return
        directory = self._directory
        self._device, self._dtype, self._empty = device, dtype, Curvature(replace(self._config), model_id, {})
        self._numbers = {name: number for number, name in enumerate(states)}
        self._layers = {name: counts_of(state) for name, state in states.items()}
        values = [{"input_ids": b.input_ids, "attention": b.attention, "labels": b.labels} for b in batches]
        self._made_from = {
            **weights_and_shape(model),
            "batches": tensors_sha256(values),
            "device": device.type,
            "basis": "" if basis is None else _basis_sha256(basis),
        }
        if self._first:
            _probe(directory)
            self._lock(directory)
            if (directory / MANIFEST).exists():
                self._find(_read(directory, self._config, self._made_from), states)
            self._clean(directory)
            self._require_room(directory, states, dtype)
        self._known, found = self._ranks.gather([self._layers, self._files] if self._first else None)[0]
        self._found = dict(found)
        self._done = _stages_in(found)
        if not self._first:
            self._layers, journal = {}, directory / self._journal
            if journal.exists():
                self._checkpoint = self._sums_in(read_json(journal))
        if not (self._first and self._files):
            with self._writer():
                self._commit(finished=False)
        # No rank writes a file while a journal of an earlier run names one.
        self._ranks.gather(None)

    def _lock(self, directory: Path) -> None:
        self._descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{directory} is in use by another fit") from None
        except OSError:  # a file system without locks
            pass

    def _find(self, manifest: Mapping[str, Any], states: Mapping[str, LayerCurvature]) -> None:
        """Take over what a manifest says is there."""
        assert self._directory is not None
        where = self._directory / MANIFEST
        try:
            fixed = [name for name in COUNTS if name != "positions"]
            journals = self._journals()
            layers = manifest["layers"]
            if list(layers) != list(states) or any(
                layers[n].get(c) != getattr(s, c) for n, s in states.items() for c in fixed
            ):
                raise StorageError(f"{self._directory} holds a fit of other layers; give another directory")
            files: dict[str, Any] = dict(manifest["files"])
            counts = dict(layers)
            for journal in journals.values():
                # What is in both was written again since rank 0 took it over.
                files |= journal["files"]
                counts |= journal["layers"]
            self._checkpoint = self._sums_in(manifest)
            strange = [name for name in files if not _OURS.fullmatch(name)]
            if strange:
                raise StorageError(f"{where} names {strange[0]!r}, which is not a file of a fit")
            for name, entry in files.items():
                # One that somebody removed is computed again.
                if (self._directory / name).is_file():
                    self._files[name] = {key: str(entry[key]) for key in ("layer", "stage", "sha256")}
            self._layers = {name: dict(counts[name]) for name in layers}
        except (KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{where} is not a manifest of a fit: {error}") from error
        if journals:
            with self._writer():
                self._commit(finished=False)
        self._done = _stages_in(self._files)
        needed = sum(len(self._required(state)) for state in states.values())
        if self._files or self._checkpoint:
            self._progress.say(f"{self._directory} has {len(self._files)} of {needed} files of this fit already")

    def _journals(self) -> dict[str, dict[str, Any]]:
        """Of other ranks of this very fit, by name; those of another one are left out."""
        assert self._directory is not None
        names = sorted(path.name for path in self._directory.iterdir() if _JOURNAL.fullmatch(path.name))
        found = {name: read_json(self._directory / name) for name in names}
        return {name: values for name, values in found.items() if values["fit"]["made_from"] == self._made_from}

    def _sums_in(self, journal: Mapping[str, Any]) -> dict[str, Any] | None:
        """The sums of a pass that a journal names, where they are those of this rank among as many."""
        assert self._directory is not None
        found = journal["fit"].get("checkpoint")
        if not found:
            return None
        if not _OURS.fullmatch(found["file"]):
            raise StorageError(f"{self._directory} has sums in {found['file']!r}, which is not a file of a fit")
        if found.get("rank", [0, 1]) != self._rank or not (self._directory / found["file"]).is_file():
            return None
        kept = ("file", "sha256", "stages", "layers", "batches", "positions")
        return {**{key: found[key] for key in kept}, "rank": self._rank}

    @property
    def _rank(self) -> list[int]:
        return [self._ranks.rank, self._ranks.size]

    def _clean(self, directory: Path) -> None:
        """Remove what a killed process left behind: files of ours that no journal names, and journals of no rank."""
        remove_leftovers(directory)
        named = {*self._files, *([self._checkpoint["file"]] if self._checkpoint else [])}
        kept = self._journals() if (directory / MANIFEST).exists() else {}
        for number in range(1, self._ranks.size):
            sums = kept.get(f"manifest.{number}.json", {}).get("fit", {}).get("checkpoint")
            if sums and sums.get("rank") == [number, self._ranks.size]:
                named |= {f"manifest.{number}.json", sums["file"]}
        for path in directory.iterdir():
            if (_OURS.fullmatch(path.name) or _JOURNAL.fullmatch(path.name)) and path.name not in named:
                path.unlink()

    def _required(self, state: LayerCurvature) -> list[str]:
        """The stages of which the directory has a file of this layer when the fit is whole."""
        required = required_stages(self._config)
        return [stage for stage in stages_of(state, self._config.rank) if stage in required]

    def _require_room(self, directory: Path, states: Mapping[str, LayerCurvature], dtype: torch.dtype) -> None:
        needed = 0
        for name, state in states.items():
            shapes = shapes_of(state, self._config.rank)
            for stage in self._required(state):
                if (name, stage) not in self._done:
                    needed += sum(torch.Size(shapes[key]).numel() for key in STAGES[stage]) * dtype.itemsize
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise OSError(
                f"{directory} has {free / 1e9:.3g} GB of free space; what is still to be saved of this fit takes"
                f" {needed / 1e9:.3g} GB"
            )

    def __enter__(self) -> FitStore:
        self._thread = None if self._directory is None else SideThread()
        self._descriptor = -1
        self._handler: Any = None
        # A handler of somebody else's stays, and so does "ignore".
        main = threading.current_thread() is threading.main_thread()
        if self._directory is not None and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.close()
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    # ---- writing, on the side thread

    @contextmanager
    def _writer(self) -> Iterator[SideThread]:
        """The side thread; its error is told as that of the directory."""
        assert self._thread is not None
        try:
            yield self._thread
        except OSError as error:
            raise OSError(
                f"{self._directory} could not be written: {error}. What was saved before is still good: when this is"
                " mended, the same call goes on with it"
            ) from error

    def _commit(self, *, finished: bool) -> None:
        assert self._directory is not None
        content = manifest_of(self._empty.config, self._empty.model_id, self._layers, self._files)
        content["fit"] = {"finished": finished, "made_from": self._made_from, "checkpoint": self._checkpoint}
        sync(self._directory)
        write_text(self._directory / self._journal, json.dumps(content, indent=1 if finished else None))
        self._committed = time.monotonic()

    def _commit_soon(self) -> None:
        """Name what was written: at once if nothing else waits, else when it is time."""
        assert self._thread is not None
        if self._thread.idle or time.monotonic() - self._committed >= COMMIT_SECONDS:
            self._commit(finished=False)

    def _replace_checkpoint(self, new: dict[str, Any] | None) -> None:
        """Name other sums of a pass, or none; the old file goes when the manifest no longer needs it."""
        old, self._checkpoint = self._checkpoint, new
        self._commit(finished=False)
        if old is not None:
            assert self._directory is not None
            (self._directory / old["file"]).unlink(missing_ok=True)

    # ---- what a fit calls

    def unfinished(
        self, states: Mapping[str, LayerCurvature], layers: Sequence[Layer], stages: Sequence[str]
    ) -> list[Layer]:
        """The layers of those input groups of which the directory lacks one of the stages."""

        def shown_by(layer: Layer, stage: str) -> str:
            kept = stages_of(states[layer.name], self._config.rank)
            return stage if stage in kept else SKETCHED[stage][1]

        groups = {
            x.group
            for x in layers
            for stage in stages
            if (x.leads or stage not in SHARED) and (x.name, shown_by(x, stage)) not in self._done
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
        self._owners = owners
        if self._directory is None:
            return
        done = self._done.issuperset((name, stage) for name, state in states.items() for stage in self._required(state))
        # What is only kept stays on the disk.
        device = None if done and self._device.type == "cpu" else self._device
        for name, entry in self._found.items():
            state = states.get(entry["layer"])
            if state is not None and (entry["stage"] in BASES or self._owns(state, entry["stage"])):
                with _mended_by_removal():
                    read_stage(state, self._directory, name, entry["sha256"], device, self._config.rank)
        for name, state in states.items():
            state.positions = self._known[name]["positions"]
        share_in_groups(states)

    def resume(
        self, states: Mapping[str, LayerCurvature], stages: Sequence[str], batches: Sequence[Batch]
    ) -> Sequence[Batch]:
        """Give states the sums of a pass that was cut off, and return the batches that are still to be added."""
        self._states, self._stages, self._begun = states, stages, 0
        if self._directory is None:
            return batches
        for state in states.values():
            # Of a group that is gone through again, some sums may be there.
            for field in (field for stage in stages for field in (*STAGES[stage], *SKETCHED.get(stage, ())[:1])):
                setattr(state, field, None)
            state.positions = state.positions if stages == CORRECTION else 0
        self._forget(states, stages)
        self._next = time.monotonic() + self._config.checkpoint_seconds
        found = self._checkpoint
        if found is None or found["stages"] != list(stages) or not set(found["layers"]).issuperset(states):
            return batches
        with _mended_by_removal():
            tensors = read_checked(self._directory, found["file"], found["sha256"])
        self._set_sums(states, tensors, self._directory / found["file"])
        for name, state in states.items():
            state.positions = found["positions"].get(name, state.positions)
            if not all(_sums_of(state, [stage]) for stage in stages if stage in stages_of(state)):
                raise StorageError(f"{self._directory / found['file']} lacks the sums of {name}")
        self._begun = found["batches"]
        self._progress.say(f"going on after batch {self._begun} of {len(batches)} of {stages[0]}")
        return batches[self._begun :]

    def _forget(self, states: Mapping[str, LayerCurvature], stages: Sequence[str]) -> None:
        """Name no file that is about to be written again: by another number of ranks, it may get other bits."""
        again = [n for n, entry in self._files.items() if entry["layer"] in states and entry["stage"] in stages]
        if again:
            self._files = {name: entry for name, entry in self._files.items() if name not in again}
            with self._writer() as writer:
                writer.submit(lambda: self._commit(finished=False))
                writer.wait()

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
        for done, batch in enumerate(batches, self._begun + 1):
            yield batch
            if self._directory is None:
                continue
            if done == self._begun + len(batches):
                if self._sketches(self._states):
                    self._save_sums(done)
                continue
            with self._writer() as writer:
                writer.raise_if_failed()
            if self._interrupted or time.monotonic() >= self._next:
                self._save_sums(done)
            self._stop_if_interrupted()

    def _sketches(self, states: Mapping[str, LayerCurvature]) -> bool:
        """Whether a factor of these is sketched."""
        return any(
            stage not in stages_of(state, self._config.rank)
            for state in states.values()
            for stage in stages_of(state)
            if stage in FACTORS
        )

    def _save_sums(self, done: int) -> None:
        assert self._directory is not None
        begin, whose = time.monotonic(), "" if self._ranks.size == 1 else ".{}-of-{}".format(*self._rank)
        path = self._directory / f"checkpoint.{self._stages[0]}.{done:06d}{whose}.safetensors"
        tensors = {
            f"{name}/{key}": value
            for name, state in self._states.items()
            for key, value in _sums_of(state, self._stages).items()
        }
        entry = {
            "file": path.name,
            "rank": self._rank,
            "stages": list(self._stages),
            "layers": list(self._states),
            "batches": done,
            "positions": {name: state.positions for name, state in self._states.items()},
        }

        def save() -> None:
            write_tensors(path, tensors)
            self._replace_checkpoint({**entry, "sha256": sha256(path)})

        with self._writer() as writer:
            writer.submit(save)
            # The next batch is added to these very tensors.
            writer.wait()
        now = time.monotonic()
        self._next = now + max(self._config.checkpoint_seconds, (now - begin) / CHECKPOINT_SHARE)

    def put(self, states: Mapping[str, LayerCurvature], stages: Sequence[str]) -> None:
        """Save what some stages have left in states, which nothing changes afterwards: all of it, or none."""
        if self._directory is None:
            return
        directory = self._directory
        files = [
            (self._numbers[name], name, stage, stage_tensors(state, stage))
            for name, state in states.items()
            for stage in stages
            if stage in stages_of(state, self._config.rank) and self._owns(state, stage)
        ]
        # The sums of a sketch are in no file of these.
        replaced = not (stages == FACTORS and self._sketches(states))
        named = states if self._ranks.size == 1 else {name for _, name, _, _ in files}
        counts = {name: counts_of(states[name]) for name in named}

        def save() -> None:
            try:
                self._files.update(dict([write_stage(directory, *file) for file in files]))
            except OSError:
                # Other units may have been written, and wait to be named.
                with suppress(OSError):
                    self._commit(finished=False)
                raise
            self._layers.update(counts)
            if replaced and self._checkpoint is not None and self._checkpoint["stages"] == list(stages):
                self._replace_checkpoint(None)
            else:
                self._commit_soon()

        with self._writer() as writer:
            writer.submit(save)
        self._stop_if_interrupted()

    def release(self, states: Mapping[str, LayerCurvature], stages: Sequence[str] = tuple(STAGES)) -> None:
        """Let what stages left in states, all saved, be mapped from the disk: on a CPU it takes no memory any more."""
        if self._directory is None or self._device.type != "cpu":
            return
        with self._writer() as writer:
            writer.wait()
        for name, entry in self._files.items():
            state = states.get(entry["layer"])
            if state is not None and entry["stage"] in stages and self._owns(state, entry["stage"]):
                for key, value in read_tensors(self._directory / name).items():
                    set_tensor(state, key, value, self._directory / name, self._config.rank)
        share_in_groups(states)

    def finish(self) -> None:
        """The fit is whole."""
        if self._directory is None:
            return

        def whole() -> None:
            if self._checkpoint is not None:
                self._replace_checkpoint(None)
            self._commit(finished=self._ranks.size == 1)

        with self._writer() as writer:
            writer.submit(whole)
            writer.wait()
        if self._ranks.size > 1:
            self._finish_together()
        self._stop_if_interrupted()

    def _finish_together(self) -> None:
        """Rank 0 names what all have written; the other journals are then superfluous."""
        assert self._directory is not None
        told = self._ranks.gather(None if self._first else [self._layers, self._files])
        if self._first:
            for layers, files in told[1:]:
                self._layers |= layers
                self._files |= files
            with self._writer():
                self._commit(finished=True)
        self._ranks.gather(None)
        if not self._first:
            (self._directory / self._journal).unlink(missing_ok=True)

    def _stop_if_interrupted(self) -> None:
        if self._interrupted:
            with self._writer() as writer:
                writer.wait()
            raise KeyboardInterrupt(f"interrupted; what was done is saved in {self._directory}: run the same to go on")

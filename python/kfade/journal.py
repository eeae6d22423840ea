"""What the directory of a fit holds that is not finished: its manifest, and those of other ranks, its journals.

The directory is that of `kfade.storage`, whose manifest alone says what is there; files are written by a side thread,
and named afterwards. Ranks that share a fit share the directory. Each writes what it owns and the sums of its own
batches, and says so in a *journal*, a manifest of its own. That of rank 0 is the manifest itself, which takes over the
others when a fit ends and when it goes on, by however many ranks. What is of another fit is refused, in words.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .config import FitConfig
from .errors import StorageError
from .layer_curvature import LayerCurvature
from .loss import Batch
from .origin import differences, origin_of
from .progress import Progress
from .ranks import Ranks
from .side_thread import SideThread
from .storage import (
    COUNTS,
    MANIFEST,
    STAGES,
    counts_of,
    manifest_of,
    read_json,
    read_manifest,
    remove_leftovers,
    required_stages,
    sha256,
    shapes_of,
    stages_of,
    sync,
    write_stage,
    write_tensors,
    write_text,
)

# A manifest names what was written at the latest so many seconds after, however much is waiting to be written.
COMMIT_SECONDS = 1.0
_OURS = re.compile(r"(\d{4,}\.[a-z_]+|checkpoint\.[a-z_]+\.\d+(\.\d+-of-\d+)?)\.safetensors")
_JOURNAL = re.compile(r"manifest\.(\d+)\.json")


def _read(directory: Path, config: FitConfig, made_from: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of a directory, if this fit may go on with it."""
    manifest = read_manifest(directory, unfinished=True)
    try:
        if "fit" not in manifest:
            raise StorageError(
                f"{directory} holds a curvature that was saved whole, not by a fit that can go on; give another"
                " directory, or remove this one"
            )
        different = differences(manifest, config, made_from)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{directory / MANIFEST} is not a manifest of a fit: {error}") from error
    if different:
        raise StorageError(
            f"{directory} holds another fit: {'; '.join(different)}; give another directory, or remove this one"
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


def _stages_in(files: Mapping[str, Mapping[str, str]]) -> set[tuple[str, str]]:
    """Layer and stage of each file."""
    return {(entry["layer"], entry["stage"]) for entry in files.values()}


class Journal:
    """What one rank has written into the directory of a fit, and what was there before; a context.

    Args:
        directory: made if need be.
        config: of the fit.
        progress: is told what is gone on with.
        ranks: who share the fit.

    Attributes:
        directory: itself.
        files: of this rank (of rank 0 also what it took over), with their entries.
        layers: counts of layers by name, of the same.
        checkpoint: the sums of a pass that was cut off, of this rank; None for none.
        found: files of all ranks when it was opened.
        known: counts of all layers then.
        done: layer and stage of what was found.
    """

    def __init__(self, directory: str | Path, config: FitConfig, progress: Progress, ranks: Ranks) -> None:
        self.directory = Path(directory)
        self._config, self._progress, self._ranks = config, progress, ranks
        self._first = ranks.rank == 0
        self._name = MANIFEST if self._first else f"manifest.{ranks.rank}.json"
        self.files: dict[str, dict[str, str]] = {}
        self.layers: dict[str, dict[str, Any]] = {}
        self.checkpoint: dict[str, Any] | None = None
        self.found: dict[str, dict[str, str]] = {}
        self.known: dict[str, dict[str, Any]] = {}
        self.done: set[tuple[str, str]] = set()
        self._committed = 0.0

    def __enter__(self) -> Journal:
        self._thread = SideThread()
        self._descriptor = -1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._thread.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)

    @property
    def rank(self) -> list[int]:
        """Of this process, and how many there are."""
        return [self._ranks.rank, self._ranks.size]

    # ---- what is there

    def open(
        self,
        model: nn.Module,
        model_id: str,
        states: Mapping[str, LayerCurvature],
        batches: Sequence[Batch],
        device: torch.device,
        dtype: torch.dtype,
        basis: Mapping[str, LayerCurvature] | None,
    ) -> None:
        """Find what was saved; arguments and errors are those of `FitStore.open`."""
        directory = self.directory
        self._model_id = model_id
        self._numbers = {name: number for number, name in enumerate(states)}
        self.layers = {name: counts_of(state) for name, state in states.items()}
        self._made_from = origin_of(model, batches, device, basis)
        if self._first:
            _probe(directory)
            self._lock(directory)
            if (directory / MANIFEST).exists():
                self._find(_read(directory, self._config, self._made_from), states)
            self._clean(directory)
            self._require_room(directory, states, dtype)
        self.known, found = self._ranks.gather([self.layers, self.files] if self._first else None)[0]
        self.found = dict(found)
        self.done = _stages_in(found)
        if not self._first:
            self.layers, journal = {}, directory / self._name
            if journal.exists():
                self.checkpoint = self._sums_in(read_json(journal))
        if not (self._first and self.files):
            with self.writer():
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
        where = self.directory / MANIFEST
        try:
            fixed = [name for name in COUNTS if name != "positions"]
            journals = self._journals()
            layers = manifest["layers"]
            if list(layers) != list(states) or any(
                layers[n].get(c) != getattr(s, c) for n, s in states.items() for c in fixed
            ):
                raise StorageError(f"{self.directory} holds a fit of other layers; give another directory")
            files: dict[str, Any] = dict(manifest["files"])
            counts = dict(layers)
            for journal in journals.values():
                # What is in both was written again since rank 0 took it over.
                files |= journal["files"]
                counts |= journal["layers"]
            self.checkpoint = self._sums_in(manifest)
            strange = [name for name in files if not _OURS.fullmatch(name)]
            if strange:
                raise StorageError(f"{where} names {strange[0]!r}, which is not a file of a fit")
            for name, entry in files.items():
                # One that somebody removed is computed again.
                if (self.directory / name).is_file():
                    self.files[name] = {key: str(entry[key]) for key in ("layer", "stage", "sha256")}
            self.layers = {name: dict(counts[name]) for name in layers}
        except (KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{where} is not a manifest of a fit: {error}") from error
        if journals:
            with self.writer():
                self._commit(finished=False)
        self.done = _stages_in(self.files)
        needed = sum(len(self.required(state)) for state in states.values())
        if self.files or self.checkpoint:
            self._progress.say(f"{self.directory} has {len(self.files)} of {needed} files of this fit already")

    def _journals(self) -> dict[str, dict[str, Any]]:
        """Of other ranks of this very fit, by name; those of another one are left out."""
        names = sorted(path.name for path in self.directory.iterdir() if _JOURNAL.fullmatch(path.name))
        found = {name: read_json(self.directory / name) for name in names}
        return {name: values for name, values in found.items() if values["fit"]["made_from"] == self._made_from}

    def _sums_in(self, journal: Mapping[str, Any]) -> dict[str, Any] | None:
        """The sums of a pass that a journal names, where they are those of this rank among as many."""
        found = journal["fit"].get("checkpoint")
        if not found:
            return None
        if not _OURS.fullmatch(found["file"]):
            raise StorageError(f"{self.directory} has sums in {found['file']!r}, which is not a file of a fit")
        if found.get("rank", [0, 1]) != self.rank or not (self.directory / found["file"]).is_file():
            return None
        kept = ("file", "sha256", "stages", "layers", "batches", "positions")
        return {**{key: found[key] for key in kept}, "rank": self.rank}

    def _clean(self, directory: Path) -> None:
        """Remove what a killed process left behind: files of ours that no journal names, and journals of no rank."""
        remove_leftovers(directory)
        named = {*self.files, *([self.checkpoint["file"]] if self.checkpoint else [])}
        kept = self._journals() if (directory / MANIFEST).exists() else {}
        for number in range(1, self._ranks.size):
            sums = kept.get(f"manifest.{number}.json", {}).get("fit", {}).get("checkpoint")
            if sums and sums.get("rank") == [number, self._ranks.size]:
                named |= {f"manifest.{number}.json", sums["file"]}
        for path in directory.iterdir():
            if (_OURS.fullmatch(path.name) or _JOURNAL.fullmatch(path.name)) and path.name not in named:
                path.unlink()

    def required(self, state: LayerCurvature) -> list[str]:
        """The stages of which the directory has a file of this layer when the fit is whole."""
        required = required_stages(self._config)
        return [stage for stage in stages_of(state, self._config.rank) if stage in required]

    def _require_room(self, directory: Path, states: Mapping[str, LayerCurvature], dtype: torch.dtype) -> None:
        needed = 0
        for name, state in states.items():
            shapes = shapes_of(state, self._config.rank)
            for stage in self.required(state):
                if (name, stage) not in self.done:
                    needed += sum(torch.Size(shapes[key]).numel() for key in STAGES[stage]) * dtype.itemsize
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise OSError(
                f"{directory} has {free / 1e9:.3g} GB of free space; what is still to be saved of this fit takes"
                f" {needed / 1e9:.3g} GB"
            )

    # ---- writing, on the side thread

    def raise_if_failed(self) -> None:
        """Raise the error of what was to be written."""
        with self.writer() as writer:
            writer.raise_if_failed()

    def wait(self) -> None:
        """Return when all is written."""
        with self.writer() as writer:
            writer.wait()

    @contextmanager
    def writer(self) -> Iterator[SideThread]:
        """The side thread; its error is told as that of the directory."""
        try:
            yield self._thread
        except OSError as error:
            raise OSError(
                f"{self.directory} could not be written: {error}. What was saved before is still good: when this is"
                " mended, the same call goes on with it"
            ) from error

    def _commit(self, *, finished: bool) -> None:
        content = manifest_of(self._config, self._model_id, self.layers, self.files)
        content["fit"] = {"finished": finished, "made_from": self._made_from, "checkpoint": self.checkpoint}
        sync(self.directory)
        write_text(self.directory / self._name, json.dumps(content, indent=1 if finished else None))
        self._committed = time.monotonic()

    def _commit_soon(self) -> None:
        """Name what was written: at once if nothing else waits, else when it is time."""
        if self._thread.idle or time.monotonic() - self._committed >= COMMIT_SECONDS:
            self._commit(finished=False)

    def _replace_checkpoint(self, new: dict[str, Any] | None) -> None:
        """Name other sums of a pass, or none; the old file goes when the manifest no longer needs it."""
        old, self.checkpoint = self.checkpoint, new
        self._commit(finished=False)
        if old is not None:
            (self.directory / old["file"]).unlink(missing_ok=True)

    def forget(self, layers: Collection[str], stages: Sequence[str]) -> None:
        """Name no file that is about to be written again: by another number of ranks, it may get other bits."""
        again = [n for n, entry in self.files.items() if entry["layer"] in layers and entry["stage"] in stages]
        if again:
            self.files = {name: entry for name, entry in self.files.items() if name not in again}
            with self.writer() as writer:
                writer.submit(lambda: self._commit(finished=False))
                writer.wait()

    def save_sums(self, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the sums of a pass, and wait for it: the next batch is added to these very tensors.

        Args:
            entry: of the checkpoint; the directory and the rank are added.
            tensors: to be written.
        """
        whose = "" if self._ranks.size == 1 else ".{}-of-{}".format(*self.rank)
        path = self.directory / f"checkpoint.{entry['stages'][0]}.{entry['batches']:06d}{whose}.safetensors"

        def save() -> None:
            if self.checkpoint is not None and self.checkpoint["file"] == path.name:
                # Of an earlier pass: no file changes while a manifest names it.
                self._replace_checkpoint(None)
            write_tensors(path, tensors)
            self._replace_checkpoint({"file": path.name, "rank": self.rank, **entry, "sha256": sha256(path)})

        with self.writer() as writer:
            writer.submit(save)
            writer.wait()

    def put(
        self,
        units: Sequence[tuple[str, str, Mapping[str, Tensor]]],
        counts: Mapping[str, dict[str, Any]],
        replaced: Sequence[str],
    ) -> None:
        """Write units, all or none, while the caller goes on.

        Args:
            units: layer, stage and tensors of each.
            counts: of the layers.
            replaced: the stages whose sums they replace.
        """

        def save() -> None:
            try:
                written = [write_stage(self.directory, self._numbers[unit[0]], *unit) for unit in units]
                self.files.update(dict(written))
            except OSError:
                # Other units may have been written, and wait to be named.
                with suppress(OSError):
                    self._commit(finished=False)
                raise
            self.layers.update(counts)
            if self.checkpoint is not None and self.checkpoint["stages"] == list(replaced):
                self._replace_checkpoint(None)
            else:
                self._commit_soon()

        with self.writer() as writer:
            writer.submit(save)

    def finish(self) -> None:
        """The fit is whole."""

        def whole() -> None:
            if self.checkpoint is not None:
                self._replace_checkpoint(None)
            self._commit(finished=self._ranks.size == 1)

        with self.writer() as writer:
            writer.submit(whole)
            writer.wait()
        if self._ranks.size > 1:
            self._finish_together()

    def _finish_together(self) -> None:
        """Rank 0 names what all have written; the other journals are then superfluous."""
        told = self._ranks.gather(None if self._first else [self.layers, self.files])
        if self._first:
            for layers, files in told[1:]:
                self.layers |= layers
                self.files |= files
            with self.writer():
                self._commit(finished=True)
        self._ranks.gather(None)
        if not self._first:
            (self.directory / self._name).unlink(missing_ok=True)

"""Directories and files that are either whole or refused.

A curvature is a directory: one safetensors file a layer and stage, and `manifest.json`, which names
them with their SHA-256 and is written last: what it does not name is not there. Every file is written beside
its place and renamed, so a full disk or a killed process leaves no half of one. A fit that saves as it goes
(`kfade.journal`) writes the same directory, with a manifest that says the fit is unfinished until it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from kfade_kernels import PackedSymmetric
from kfade_kernels.blocks import BlockBasis, PackedBlocks
from kfade_kernels.packed import packed_elements
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import FitConfig, fit_config, to_dict
from .errors import StorageError
from .layer_curvature import LayerCurvature

FORMAT = "kfade-curvature"
# The second is of a curvature with block-diagonal factors, which what knows the first alone cannot read.
VERSION, BLOCKS_VERSION = 1, 2
MANIFEST = "manifest.json"
_LEFTOVER = re.compile(r"\..+\.\d+\.part")
CONVENTIONS = {
    "a_sum": "sum of a aT over positions that are not padding; A = a_sum / positions",
    "s_sum": "sum of g gT over loss positions, g of the summed loss; S = s_sum / losses",
    "lambda_sum": "sum over sequences of the squared rotated gradient; eigenvalues = lambda_sum / lambda_losses, or"
    " / losses where that is null",
    "rank": "with config.rank, of a factor of order beyond it q has k columns, lambda_in and lambda_out end in the mean"
    " of the other eigenvalues, and the last row or column of lambda_sum is the mean over these directions",
    "max_factor_order": "a factor of a higher order is block-diagonal: packed triangles and q are those of its blocks,"
    " end to end, with eigenvalues ascending within each; orders as kfade_kernels.blocks.split gives them",
    "packing": "block rows of 128 of the lower triangle, row-major; above the diagonal undefined",
}
# What a stage leaves in a state; the shared stages only in that of the layer which leads an input group.
STAGES = {
    "factors": ("s_sum",),
    "decomposition": ("q_out", "lambda_out"),
    "correction": ("lambda_sum",),
    "input_factors": ("a_sum",),
    "input_decomposition": ("q_in", "lambda_in"),
}
SHARED = ("input_factors", "input_decomposition")
# The stages that a pass over the data fills together, and what a fit takes from an earlier one that gives it its basis.
FACTORS, CORRECTION = ("factors", "input_factors"), ("correction",)
BASES = ("decomposition", "input_decomposition")
BASIS = (*FACTORS, *BASES)
_FACTORS = ("a_sum", "s_sum")
_KFAC = (*_FACTORS, "q_in", "lambda_in", "q_out", "lambda_out")
_REQUIRED: dict[str, tuple[str, ...]] = {
    "identity": (),
    "diagonal": ("lambda_sum",),
    "kfac": _KFAC,
    "ekfac": (*_KFAC, "lambda_sum"),
}
COUNTS = (
    "d_out", "d_in", "has_bias", "transposed", "group", "positions", "losses", "lambda_losses", "max_factor_order",
)  # fmt: skip


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensors_sha256(groups: Iterable[Mapping[str, Tensor]]) -> str:
    """Of the names, shapes and values of tensors, the groups in order."""
    digest = hashlib.sha256()
    for tensors in groups:
        for name in sorted(tensors):
            digest.update(f"{name} {list(tensors[name].shape)}".encode())
            digest.update(tensors[name].cpu().contiguous().numpy().data)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Where to write what then takes the place of `path`, unless there is an error: in a folder beside it.

    safetensors makes a temporary file of its own there, and a killed process leaves both; see `remove_leftovers`.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        folder.mkdir(exist_ok=True)
        yield folder / path.name
        sync(folder / path.name)
        (folder / path.name).replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what processes that were killed while writing left in a directory; nobody may be writing there."""
    for path in directory.glob(".*.part"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    try:
        with _replacing(path) as temporary:
            # safetensors makes its files private; ours get the mode that the user's own files have.
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
            temporary.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist: nothing was saved here, or the saving was interrupted") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} holds a {type(value).__name__}; it must be an object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def read_marked(path: Path, file_format: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata names this format and version."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != file_format:
                raise StorageError(f"{path} has format {metadata.get('format')!r}; it must be {file_format!r}")
            if metadata.get("version") != str(version):
                raise StorageError(f"{path} has version {metadata.get('version')!r}; this kfade reads {version}")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


class KeptResults:
    """Results of a run in a JSON file, each with what it was made from; what was made from anything else is dropped.

    Args:
        path: of the file, or None to keep nothing.
        made_from: of each result by name, in JSON values.
    """

    def __init__(self, path: Path | None, made_from: Mapping[str, Mapping[str, Any]]) -> None:
        self._path, self._made_from = path, made_from
        try:
            content = {} if path is None else read_json(path)
        except StorageError:  # there is none, or it is broken: measure
            content = {}
        self._content = {
            name: values
            for name, values in content.items()
            if isinstance(values, Mapping) and values.get("made_from", self) == made_from.get(name)
        }

    def get(self, name: str) -> dict[str, Any] | None:
        """The result, if the file has it."""
        values = self._content.get(name)
        return None if values is None else {key: value for key, value in values.items() if key != "made_from"}

    def put(self, name: str, values: Mapping[str, Any]) -> None:
        """Add a result, and write the file."""
        self._content[name] = {"made_from": self._made_from[name], **values}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps(self._content, ensure_ascii=False, allow_nan=False) + "\n")


def stages_of(state: LayerCurvature, rank: int | None = None) -> list[str]:
    """The stages that have a file of this layer; with a rank, one that is sketched has none."""
    shapes = shapes_of(state, rank)
    return [
        stage
        for stage, names in STAGES.items()
        if (stage not in SHARED or state.group == state.name) and not shapes.keys().isdisjoint(names)
    ]


def _required(config: FitConfig) -> tuple[str, ...]:
    """The tensors without which a curvature is not whole."""
    return _FACTORS if config.decomposition == "cholesky" else _REQUIRED[config.curvature]


def required_stages(config: FitConfig) -> list[str]:
    """The stages without which a curvature that was fitted so is not whole."""
    return [stage for stage, names in STAGES.items() if set(names) & set(_required(config))]


def shapes_of(state: LayerCurvature, rank: int | None = None) -> dict[str, list[int]]:
    """The shape of each tensor of a state, as it is stored; a side with a thin basis has no packed factor.

    What is in blocks is flat.
    """
    out, width = state.d_out, state.width_in
    # Of each side the columns of its basis, and its entries in Λ.
    sides = {n: (n, n) if rank is None or n <= rank else (rank, rank + 1) for n in (width, out)}
    shapes = {"q_in": [width, sides[width][0]], "lambda_in": [sides[width][1]]}
    shapes |= {"q_out": [out, sides[out][0]], "lambda_out": [sides[out][1]]}
    packed = {name: [sum(map(packed_elements, orders))] for name, orders in _blocks(state, rank).items()}
    for name, orders in (("q_in", state.input_blocks), ("q_out", state.output_blocks)):
        if len(orders) > 1:
            shapes[name] = [sum(order**2 for order in orders)]
    return {**shapes, **packed, "lambda_sum": [sides[out][1], sides[width][1]]}


def _blocks(state: LayerCurvature, rank: int | None) -> dict[str, tuple[int, ...]]:
    """The orders of the blocks of each packed matrix of a state: one where it is whole."""
    orders = {"a_sum": state.input_blocks, "s_sum": state.output_blocks}
    return {name: blocks for name, blocks in orders.items() if rank is None or sum(blocks) <= rank}


def as_kept(state: LayerCurvature, key: str, value: Tensor) -> Any:
    """A tensor as it is stored, as the state has it: without a copy."""
    orders = state.input_blocks if key in ("a_sum", "q_in") else state.output_blocks
    if key in _FACTORS:
        return (
            PackedSymmetric.from_packed(value, *orders) if len(orders) == 1 else PackedBlocks.from_packed(value, orders)
        )
    return BlockBasis(value, orders) if key in ("q_in", "q_out") and len(orders) > 1 else value


def stage_tensors(state: LayerCurvature, stage: str) -> dict[str, Tensor]:
    """What the stage left in the state, as it is stored: without copies."""
    values = {name: getattr(state, name) for name in STAGES[stage] if getattr(state, name) is not None}
    return {n: v if isinstance(v, Tensor) else v.data for n, v in values.items()}


def write_stage(
    directory: Path, number: int, layer: str, stage: str, tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, str]]:
    """Write the file of one layer and stage; its name, and its entry in the manifest."""
    path = directory / f"{number:04d}.{stage}.safetensors"
    write_tensors(path, tensors)
    return path.name, {"layer": layer, "stage": stage, "sha256": sha256(path)}


def manifest_of(
    config: FitConfig,
    model_id: str,
    layers: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """The content of a manifest: `layers` with the counts of each, `files` with their entries."""
    return {
        "format": FORMAT,
        "version": VERSION if config.max_factor_order is None else BLOCKS_VERSION,
        "model_id": model_id,
        "config": to_dict(config),
        "conventions": CONVENTIONS,
        "layers": layers,
        "files": files,
    }


def counts_of(state: LayerCurvature) -> dict[str, Any]:
    """What the manifest says of a layer."""
    return {name: getattr(state, name) for name in COUNTS}


def begin_directory(directory: Path) -> None:
    """Make a directory, or take back what one holds by removing its manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)


def write_manifest(
    config: FitConfig,
    model_id: str,
    directory: Path,
    layers: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, Mapping[str, str]],
) -> None:
    """Name what was written into a directory; see `manifest_of`."""
    write_text(directory / MANIFEST, json.dumps(manifest_of(config, model_id, layers, files), indent=1))


def save_curvature(config: FitConfig, model_id: str, states: Mapping[str, LayerCurvature], directory: Path) -> None:
    """Write a curvature into `directory`, which is made if need be; the manifest comes last."""
    begin_directory(directory)
    files: dict[str, dict[str, str]] = {}
    for number, state in enumerate(states.values()):
        for stage in stages_of(state):
            tensors = stage_tensors(state, stage)
            if tensors:
                name, entry = write_stage(directory, number, state.name, stage, tensors)
                files[name] = entry
    write_manifest(config, model_id, directory, {name: counts_of(state) for name, state in states.items()}, files)


def _check_model(model: nn.Module, states: Mapping[str, LayerCurvature], directory: Path) -> None:
    modules = dict(model.named_modules())
    wrong = []
    for name, state in states.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            wrong.append(f"{name}: not in the model")
            continue
        expected = (state.d_in, state.d_out) if state.transposed else (state.d_out, state.d_in)
        if tuple(weight.shape) != expected:
            wrong.append(f"{name}: {list(expected)} saved, {list(weight.shape)} in the model")
        elif (getattr(modules[name], "bias", None) is not None) != state.has_bias:
            wrong.append(f"{name}: {'with' if state.has_bias else 'without'} a bias saved, not so in the model")
    if wrong:
        raise StorageError(f"{directory} belongs to another model: {'; '.join(wrong[:8])}")


def set_tensor(state: LayerCurvature, key: str, value: Tensor, path: Path, rank: int | None = None) -> None:
    """Store one tensor of a file, if it is one of a state's and has its shape, with this rank."""
    shape = shapes_of(state, rank).get(key)
    if list(value.shape) != shape:
        raise StorageError(f"{path} has {key} of shape {list(value.shape)}; {state.name} takes {shape}")
    if rank is not None and value.data_ptr() % 64:
        # Products of thin matrices round by where in memory they begin, and a file has them anywhere.
        value = value.clone()
    setattr(state, key, as_kept(state, key, value))


def read_checked(directory: Path, name: str, digest: str) -> dict[str, Tensor]:
    """The tensors of a file that the manifest names, mapped from the disk after its SHA-256 was checked."""
    path = directory / name
    if Path(name).name != name:
        raise StorageError(f"{directory / MANIFEST} names {name!r}, which is not a file of this directory")
    if not path.is_file():
        raise StorageError(f"{path} is missing")
    if sha256(path) != digest:
        raise StorageError(f"{path} is corrupt: its SHA-256 is not that of the manifest")
    return read_tensors(path)


def read_stage(
    state: LayerCurvature,
    directory: Path,
    name: str,
    digest: str,
    device: torch.device | None,
    rank: int | None = None,
) -> None:
    """Put what a file holds into its layer's state: mapped from the disk, or copied to `device`."""
    for key, value in read_checked(directory, name, digest).items():
        # A copy lies in memory as a computed tensor does, so that products with it have the same bits.
        set_tensor(state, key, value if device is None else value.to(device, copy=True), directory / name, rank)


def share_in_groups(states: Mapping[str, LayerCurvature]) -> None:
    """Give the members of each input group what its leader has."""
    for state in states.values():
        for name in (name for stage in SHARED for name in STAGES[stage]):
            setattr(state, name, getattr(states[state.group], name))


def read_manifest(directory: Path, *, unfinished: bool = False) -> dict[str, Any]:
    """The manifest of a directory.

    Raises:
        StorageError: there is none, it cannot be read, it is of another format or version, or (without `unfinished`)
            of a fit that did not end.
    """
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise StorageError(f"{directory} has format {manifest.get('format')!r}; it must be {FORMAT!r}")
    version = manifest.get("version")
    if version not in (VERSION, BLOCKS_VERSION):
        raise StorageError(f"{directory} has version {version!r}; this kfade reads {VERSION} and {BLOCKS_VERSION}")
    fit = manifest.get("fit", {})
    if not isinstance(fit, dict):
        raise StorageError(f"{directory / MANIFEST} is not a manifest of version {version}: its fit is no object")
    if not unfinished and fit.get("finished") is False:
        raise StorageError(f"{directory} holds an unfinished fit; the same call of fit goes on with it")
    return manifest


def remove_curvature(directory: Path) -> None:
    """Remove a saved curvature: what its manifest names, and the directory where nothing else is in it."""
    files = read_manifest(directory, unfinished=True).get("files", {})
    (directory / MANIFEST).unlink()
    for name in files:
        (directory / Path(name).name).unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else
        directory.rmdir()


def load_curvature(directory: Path, model: nn.Module | None = None) -> tuple[FitConfig, str, dict[str, LayerCurvature]]:
    """What `save_curvature` or a fit wrote into a directory, every file's SHA-256 checked.

    The tensors are mapped from the files: they take memory as they are used, and the system may take it back.
    """
    manifest = read_manifest(directory)
    try:
        states = {name: LayerCurvature(name=name, **counts) for name, counts in manifest["layers"].items()}
        config = fit_config(manifest["config"], str(directory / MANIFEST))
        files = manifest["files"].items()
        model_id = manifest["model_id"]
        owners = {name: (states[entry["layer"]], str(entry["sha256"])) for name, entry in files}
        for state in states.values():
            states[state.group]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(
            f"{directory / MANIFEST} is not a manifest of version {manifest['version']}: {error}"
        ) from error
    if model is not None:
        _check_model(model, states, directory)
    for name, (state, digest) in owners.items():
        read_stage(state, directory, name, digest, None, config.rank)
    share_in_groups(states)
    for name, state in states.items():
        fields = shapes_of(state, config.rank)
        missing = [key for key in _required(config) if key in fields and getattr(state, key) is None]
        if missing:
            raise StorageError(
                f"{directory}: {', '.join(missing)} of {name} is missing, and {config.curvature} needs it"
            )
    return config, model_id, states

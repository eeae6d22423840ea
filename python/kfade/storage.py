"""Directories and files that are either whole or refused.

A curvature is a directory: one safetensors file a layer and stage, and `manifest.json`, which names
them with their SHA-256 and is written last. Every file is written beside its place and renamed, so
a full disk or a killed process leaves a directory without a manifest, which does not load.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfade_kernels import PackedSymmetric
from kfade_kernels.packed import packed_elements
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import fit_config, to_dict
from .curvature import Curvature, LayerCurvature
from .errors import StorageError

FORMAT = "kfade-curvature"
VERSION = 1
MANIFEST = "manifest.json"
CONVENTIONS = {
    "a_sum": "sum of a aT over positions that are not padding; A = a_sum / positions",
    "s_sum": "sum of g gT over loss positions, g of the summed loss; S = s_sum / losses",
    "lambda_sum": "sum over sequences of the squared rotated gradient; eigenvalues = lambda_sum / losses",
    "packing": "block rows of 128 of the lower triangle, row-major; above the diagonal undefined",
}
_STAGES = {
    "factors": ("s_sum",),
    "decomposition": ("q_out", "lambda_out"),
    "correction": ("lambda_sum",),
}
_GROUP_STAGES = {"input_factors": ("a_sum",), "input_decomposition": ("q_in", "lambda_in")}
_KFAC = ("a_sum", "s_sum", "q_in", "lambda_in", "q_out", "lambda_out")
_REQUIRED: dict[str, tuple[str, ...]] = {
    "identity": (),
    "diagonal": ("lambda_sum",),
    "kfac": _KFAC,
    "ekfac": (*_KFAC, "lambda_sum"),
}
_COUNTS = ("d_out", "d_in", "has_bias", "transposed", "group", "positions", "losses")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
        # safetensors makes its files private; others get the mode that the user's own files have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        _sync(temporary)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


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


def save_curvature(curvature: Curvature, directory: Path) -> None:
    """Write `curvature` into `directory`, which is made if need be; the manifest comes last."""
    directory.mkdir(parents=True, exist_ok=True)
    manifest_path = directory / MANIFEST
    manifest_path.unlink(missing_ok=True)
    files: dict[str, dict[str, Any]] = {}
    for number, state in enumerate(curvature.values()):
        stages = {**_STAGES, **(_GROUP_STAGES if state.group == state.name else {})}
        for stage, names in stages.items():
            values = {name: getattr(state, name) for name in names if getattr(state, name) is not None}
            if not values:
                continue
            tensors = {n: v.data if isinstance(v, PackedSymmetric) else v for n, v in values.items()}
            path = directory / f"{number:04d}.{stage}.safetensors"
            write_tensors(path, tensors)
            files[path.name] = {"layer": state.name, "stage": stage, "sha256": sha256(path)}
    layers = {name: {c: getattr(state, c) for c in _COUNTS} for name, state in curvature.items()}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "model_id": curvature.model_id,
        "config": to_dict(curvature.config),
        "conventions": CONVENTIONS,
        "layers": layers,
        "files": files,
    }
    write_text(manifest_path, json.dumps(manifest, indent=1))


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


def _set_state(state: LayerCurvature, key: str, value: Tensor, path: Path) -> None:
    """Store one tensor of a file, if it is one of a state's and has its shape."""
    out, width = state.d_out, state.width_in
    orders = {"a_sum": width, "s_sum": out}
    shapes = {"q_in": [width, width], "lambda_in": [width], "q_out": [out, out], "lambda_out": [out]}
    shapes |= {"lambda_sum": [out, width]} | {name: [packed_elements(n)] for name, n in orders.items()}
    if list(value.shape) != shapes.get(key):
        raise StorageError(f"{path} has {key} of shape {list(value.shape)}; {state.name} takes {shapes.get(key)}")
    setattr(state, key, PackedSymmetric.from_packed(value, orders[key]) if key in orders else value)


def load_curvature(directory: Path, model: nn.Module | None = None) -> Curvature:
    """Read a directory written by `save_curvature`, checking every file's SHA-256."""
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise StorageError(f"{directory} has format {manifest.get('format')!r}; it must be {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise StorageError(f"{directory} has version {manifest.get('version')!r}; this kfade reads {VERSION}")
    try:
        states = {name: LayerCurvature(name=name, **counts) for name, counts in manifest["layers"].items()}
        config = fit_config(manifest["config"], str(directory / MANIFEST))
        files = manifest["files"].items()
        model_id = manifest["model_id"]
        owners = {name: (states[entry["layer"]], str(entry["sha256"])) for name, entry in files}
        leaders = {name: states[state.group] for name, state in states.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{directory / MANIFEST} is not a manifest of version {VERSION}: {error}") from error
    if model is not None:
        _check_model(model, states, directory)
    for name, (state, digest) in owners.items():
        path = directory / name
        if Path(name).name != name:
            raise StorageError(f"{directory / MANIFEST} names {name!r}, which is not a file of this directory")
        if not path.is_file():
            raise StorageError(f"{path} is missing")
        if sha256(path) != digest:
            raise StorageError(f"{path} is corrupt: its SHA-256 is not that of the manifest")
        for key, value in read_tensors(path).items():
            _set_state(state, key, value, path)
    for name, state in states.items():
        leader = leaders[name]
        state.a_sum, state.q_in, state.lambda_in = leader.a_sum, leader.q_in, leader.lambda_in
        missing = [key for key in _REQUIRED[config.curvature] if getattr(state, key) is None]
        if missing:
            raise StorageError(
                f"{directory}: {', '.join(missing)} of {name} is missing, and {config.curvature} needs it"
            )
    return Curvature(config, model_id, states)

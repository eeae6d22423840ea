"""`Update`: what unlearning adds to a model's weights, as a small set of tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from kfade_kernels import apply_update_
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .sharding import placed_like, reshard, shard_of, unwrapped, whole
from .storage import read_marked, write_tensors

FORMAT = "kfade-update"
VERSION = 1
FILE = "update.safetensors"
# Weights that are added to in one call: their part of the update is copied to their device for it.
GROUP_BYTES = 1 << 30


@dataclass
class _Applied:
    """What one application changed, so that it can be undone to the bit."""

    scale: float
    before: dict[str, Tensor]
    after: dict[str, Tensor]


@dataclass(eq=False)
class Update:
    """Tensors to add to a model's parameters.

    Attributes:
        tensors: by parameter name, float32 (float64 for a float64 model), in the parameter's layout; sharded like it
            where it was made on a sharded model.
        model_id: the model it was made for; only a note, shapes are what is checked.
        report: what the run that made it measured; None for one loaded from a file.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    model_id: str = ""
    report: Any = field(default=None, repr=False)
    _applied: WeakKeyDictionary[nn.Module, list[_Applied]] = field(default_factory=WeakKeyDictionary, repr=False)

    def _targets(self, model: nn.Module) -> dict[str, nn.Parameter]:
        reshard(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        owners: dict[int, str] = {}
        wrong = []
        for name, tensor in self.tensors.items():
            if name not in parameters:
                wrong.append(f"{name}: not in the model")
            elif owners.setdefault(id(parameters[name]), name) != name:
                wrong.append(f"{name}: tied to {owners[id(parameters[name])]} in the model")
            elif parameters[name].shape != tensor.shape:
                wrong.append(f"{name}: {list(tensor.shape)} in the update, {list(parameters[name].shape)} in the model")
            elif not parameters[name].is_floating_point():
                wrong.append(f"{name}: {parameters[name].dtype} in the model")
        if wrong:
            shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
            raise ValueError(f"model does not fit this update: {shown}")
        return {name: parameters[name] for name in self.tensors}

    def check(self, model: nn.Module) -> None:
        """Raise ValueError, listing all mismatches, unless the update fits the model."""
        self._targets(unwrapped(model))

    def _part(self, name: str, p: nn.Parameter) -> Tensor:
        """What this rank adds to a parameter, or to its shard of it."""
        tensor = self.tensors[name]
        if isinstance(p, DTensor):
            return shard_of(tensor if isinstance(tensor, DTensor) else placed_like(tensor.to(p.device), p))
        return whole(tensor)

    def _add_(self, targets: Mapping[str, nn.Parameter], scale: float) -> None:
        """Add `scale` times the update to these parameters, many in one call."""
        groups: list[list[str]] = []
        room = 0
        for name, p in targets.items():
            if not groups or p.nbytes > room or p.device != targets[groups[-1][0]].device:
                groups.append([])
                room = GROUP_BYTES
            groups[-1].append(name)
            room -= p.nbytes
        for names in groups:
            device = targets[names[0]].device
            parts = [self._part(n, targets[n]) for n in names]
            # Δ is float32 or wider where we made it; a file may hold what its writer rounded.
            deltas = [part.to(device, torch.promote_types(part.dtype, torch.float32)) for part in parts]
            apply_update_([shard_of(targets[n]) for n in names], deltas, scale)

    @torch.no_grad()
    def apply_(self, model: nn.Module, scale: float = 1.0) -> nn.Module:
        """Add `scale` times the update to the model's parameters, in place.

        The model may have been trained further since the update was made. The parameters as they
        were are kept until `remove_`, so that removing restores every bit.

        Raises:
            ValueError: `scale` is not finite, or the model lacks a parameter, has it in another shape, or
                ties it to another one of the update; all mismatches are listed and nothing is changed.
        """
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale is {scale!r}; it must be a finite number")
        given, model = model, unwrapped(model)
        targets = self._targets(model)
        before = {name: p.detach().clone() for name, p in targets.items()}
        try:
            self._add_(targets, scale)
        except BaseException:
            # Memory may run out between two groups of weights; half an update is none.
            for name, p in targets.items():
                p.copy_(before[name])
            raise
        # Versions alone cannot tell training from a round trip through a copy; the values can.
        after = {name: p.detach().clone() for name, p in targets.items()}
        self._applied.setdefault(model, []).append(_Applied(float(scale), before, after))
        return given

    @torch.no_grad()
    def remove_(self, model: nn.Module) -> nn.Module:
        """Undo the last `apply_` to this model.

        A parameter that nobody has changed since gets its old bits back; from one that was trained
        further the update is subtracted, which is exact up to rounding.

        Raises:
            ValueError: this update is not applied to this model (a model loaded from disk with an
                update inside takes `apply_` with the opposite scale), or the model does not fit.
        """
        given, model = model, unwrapped(model)
        stack = self._applied.get(model)
        if not stack:
            raise ValueError("model has no application of this update to remove; apply_ it with the opposite scale")
        targets = self._targets(model)
        applied = stack.pop()
        trained = {}
        for name, p in targets.items():
            if torch.equal(shard_of(p), shard_of(applied.after[name]).to(p.device)):
                p.copy_(applied.before[name])
            else:
                trained[name] = p
        self._add_(trained, -applied.scale)
        return given

    def norm(self) -> float:
        """Euclidean norm over all tensors; of sharded ones all ranks ask for it together."""
        return math.sqrt(sum(float(whole(t).double().square().sum()) for t in self.tensors.values()))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: `path` itself, or `update.safetensors` in the directory `path`.

        Where tensors are sharded all ranks call this, and the first one gathers them in its host memory and writes.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            path.mkdir(parents=True, exist_ok=True)
            path = path / FILE
        metadata = {"format": FORMAT, "version": str(VERSION), "model_id": self.model_id}
        if self.report is not None:
            metadata["report"] = json.dumps(self.report.summary())
        writes, tensors = True, {}
        for name, tensor in self.tensors.items():
            values = whole(tensor)
            writes = not isinstance(tensor, DTensor) or tensor.device_mesh.get_rank() == 0
            if writes:
                tensors[name] = values.cpu()
        if writes:
            write_tensors(path, tensors, metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Update:
        """Read what `save` wrote.

        Raises:
            StorageError: the file is missing, corrupt, not an update, or of a future version.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE
        tensors, metadata = read_marked(path, FORMAT, VERSION)
        return cls(tensors, metadata.get("model_id", ""))

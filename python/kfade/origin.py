"""What a fit is made from: digests of it, and in words how two fits differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .config import FitConfig, fit_config, to_dict
from .layer_curvature import LayerCurvature
from .loss import Batch
from .models import weights_sha256
from .sharding import class_of
from .storage import BASIS, stage_tensors, stages_of, tensors_sha256

# Options that change how a fit runs and not what it gives.
_FREE = ("layers_per_pass", "device_memory", "state_device", "checkpoint_seconds")


def weights_and_shape(model: nn.Module) -> dict[str, str]:
    """What a fit depends on in a model: all bytes of its weights, and the configuration it was built from."""
    config: Any = getattr(model, "config", None)
    values = dict(config.to_dict()) if hasattr(config, "to_dict") else {}
    for name in ("_name_or_path", "transformers_version"):
        values.pop(name, None)
    text = f"{class_of(model).__name__} {json.dumps(values, sort_keys=True, default=str)}"
    return {"weights": weights_sha256(model), "architecture": hashlib.sha256(text.encode()).hexdigest()}


def _basis_sha256(basis: Mapping[str, LayerCurvature]) -> str:
    """Of the factors and eigenvectors of some states."""
    return tensors_sha256(
        stage_tensors(state, stage) for state in basis.values() for stage in BASIS if stage in stages_of(state)
    )


def origin_of(
    model: nn.Module, batches: Sequence[Batch], device: torch.device, basis: Mapping[str, LayerCurvature] | None
) -> dict[str, str]:
    """What the numbers of a fit depend on beside its options."""
    values = [{"input_ids": b.input_ids, "attention": b.attention, "labels": b.labels} for b in batches]
    return {
        **weights_and_shape(model),
        "batches": tensors_sha256(values),
        "device": device.type,
        "basis": "" if basis is None else _basis_sha256(basis),
    }


def differences(manifest: Mapping[str, Any], config: FitConfig, made_from: Mapping[str, str]) -> list[str]:
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

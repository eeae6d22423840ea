"""The scores of kronfluence, with factors that stay on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .peer import constants


def _has_room(factor: Tensor, device: torch.device) -> bool:
    """Whether half of a GPU's memory stays free with a copy of `factor` on it."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free - factor.nbytes > total // 2


def score_stage() -> dict[str, Callable[..., Any]]:
    names, config = constants(), import_module("kronfluence.factor.config")
    trackers = import_module("kronfluence.module.tracker.precondition")
    release = trackers.PreconditionTracker.release_memory
    resident = names.ACTIVATION_EIGENVECTORS_NAME, names.GRADIENT_EIGENVECTORS_NAME, names.LAMBDA_MATRIX_NAME

    def resident_first(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @torch.no_grad()
        def precondition_gradient(self: Any, gradient: Tensor, storage: dict[str, Any]) -> Tensor:
            for name in resident:
                factor = storage[name]
                if factor.device != gradient.device and _has_room(factor, gradient.device):
                    storage[name] = factor.to(gradient.device)
            return original(self, gradient=gradient, storage=storage)

        return precondition_gradient

    def release_memory(self: Any) -> None:
        release(self)
        # Each stage is given its factors after this; what the last one left may lie on a GPU.
        for name in names.EIGENDECOMPOSITION_FACTOR_NAMES:
            self.module.storage[name] = None

    return {
        "factor.config:Kfac.precondition_gradient": resident_first(config.Kfac.precondition_gradient),
        "factor.config:Ekfac.precondition_gradient": resident_first(config.Ekfac.precondition_gradient),
        "module.tracker.precondition:PreconditionTracker.release_memory": release_memory,
    }

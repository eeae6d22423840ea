"""The covariance stage of kronfluence on `syrk_`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from kfade_kernels import PackedSymmetric, syrk_
from torch import Tensor

from .inputs import InputSums, Masks, accumulator_dtype
from .peer import constants


def covariance_stage() -> dict[str, Callable[..., Any]]:
    names, linear = constants(), import_module("kronfluence.module.linear")
    tracked = import_module("kronfluence.module.tracked_module")
    trackers = import_module("kronfluence.module.tracker.factor")
    inputs, gradients = names.ACTIVATION_COVARIANCE_MATRIX_NAME, names.GRADIENT_COVARIANCE_MATRIX_NAME
    sums, masks = InputSums(inputs), Masks()
    original = SimpleNamespace(
        get_factor=tracked.TrackedModule.get_factor,
        synchronize=trackers.CovarianceTracker.synchronize,
        release_memory=trackers.CovarianceTracker.release_memory,
    )

    def count(module: Any, name: str, rows: Tensor | int) -> None:
        if module.storage[name] is None:
            device = rows.device if isinstance(rows, Tensor) else None
            module.storage[name] = torch.zeros(1, dtype=torch.int64, device=device)
        module.storage[name].add_(rows)

    def add(module: Any, name: str, rows: Tensor, alpha: float = 1.0) -> None:
        if module.storage[name] is None:
            dtype = accumulator_dtype(rows.dtype)
            module.storage[name] = PackedSymmetric(rows.shape[1], device=rows.device, dtype=dtype)
        syrk_(module.storage[name], rows, alpha=alpha)

    def add_input(module: Any, x: Tensor) -> None:
        number: Tensor | int = x.shape[:-1].numel()
        mask: Tensor | None = None
        binary = True
        if module.attention_mask is not None and module.attention_mask.numel() == number:
            mask, number = masks(module.attention_mask)
            binary = mask is not None
        if binary and type(module) is linear.TrackedLinear:
            sums.see(module, x, mask)
        else:
            # A convolution, a module of the user's, or a mask with weights: kronfluence makes the rows.
            masked = module.attention_mask is not None
            x = x.detach().to(module.factor_args.activation_covariance_dtype, copy=masked)
            rows, number = module.get_flattened_activation(input_activation=x)
            sums.flush()
            add(module, inputs, rows)
        count(module, names.NUM_ACTIVATION_COVARIANCE_PROCESSED, number)

    def register_hooks(self: Any) -> None:
        module = self.module

        @torch.no_grad()
        def forward_hook(_module: Any, args: tuple[Any, ...], outputs: Tensor) -> None:
            add_input(module, args[0])
            self.cached_hooks.append(outputs.register_hook(backward_hook))

        @torch.no_grad()
        def backward_hook(gradient: Tensor) -> None:
            self.cached_hooks.pop().remove()
            sums.flush()
            gradient = gradient.detach().to(module.factor_args.gradient_covariance_dtype)
            rows, number = module.get_flattened_gradient(output_gradient=gradient)
            add(module, gradients, rows, float(module.gradient_scale) ** 2)
            count(module, names.NUM_GRADIENT_COVARIANCE_PROCESSED, number)

        self.registered_hooks.append(module.register_forward_hook(forward_hook))

    def get_factor(self: Any, factor_name: str) -> Any:
        if factor_name == inputs:
            sums.flush()
        factor = original.get_factor(self, factor_name)
        arguments = self.factor_args
        if isinstance(factor, PackedSymmetric):
            asked = "activation_covariance_dtype" if factor_name == inputs else "gradient_covariance_dtype"
            return factor.to_dense().to(getattr(arguments, asked))
        if factor_name == names.LAMBDA_MATRIX_NAME and self.current_mode == tracked.ModuleMode.LAMBDA:
            return None if factor is None else factor.to(arguments.lambda_dtype)
        return factor

    def synchronize(self: Any, num_processes: int) -> None:
        for name in (inputs, gradients):
            self.module.storage[name] = self.module.get_factor(factor_name=name)
        original.synchronize(self, num_processes=num_processes)

    def release_memory(self: Any) -> None:
        sums.clear()
        masks.clear()
        original.release_memory(self)

    return {
        "module.tracked_module:TrackedModule.get_factor": get_factor,
        "module.tracker.factor:CovarianceTracker.register_hooks": register_hooks,
        "module.tracker.factor:CovarianceTracker.release_memory": release_memory,
        "module.tracker.factor:CovarianceTracker.synchronize": synchronize,
    }

"""The Λ stage of kronfluence on `eigenvalue_correction_`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from kfade_kernels import bf16_pair, eigenvalue_correction_
from torch import Tensor

from .inputs import HeldInputs, accumulator_dtype, sequences
from .peer import Notices, constants


def _takes_pairs(device: torch.device) -> bool:
    """Whether bfloat16 rows are rotated by a bfloat16 pair of eigenvectors.

    A CPU without the units for it is a hundred times slower at that, and one with them gains nothing over a
    single float32 product.
    """
    return device.type == "cuda"


def lambda_stage(notice: Notices) -> dict[str, Callable[..., Any]]:
    names, linear = constants(), import_module("kronfluence.module.linear")
    config, exceptions = import_module("kronfluence.factor.config"), import_module("kronfluence.utils.exceptions")
    trackers = import_module("kronfluence.module.tracker.factor")
    original = SimpleNamespace(
        register_hooks=trackers.LambdaTracker.register_hooks,
        finalize_iteration=trackers.LambdaTracker.finalize_iteration,
        release_memory=trackers.LambdaTracker.release_memory,
    )
    held_inputs = HeldInputs(names.ACTIVATION_EIGENVECTORS_NAME)
    bases = names.GRADIENT_EIGENVECTORS_NAME, names.ACTIVATION_EIGENVECTORS_NAME

    def state_dtype(arguments: Any) -> torch.dtype:
        return accumulator_dtype(arguments.lambda_dtype, arguments.per_sample_gradient_dtype)

    def prepare_bases(module: Any, device: torch.device) -> bool:
        """Put the eigenvectors on the device as the kernels take them; False where the strategy has none."""
        arguments = module.factor_args
        if not config.FactorConfig.CONFIGS[arguments.strategy].requires_eigendecomposition_for_lambda:
            return False
        if any(module.storage[name] is None for name in names.EIGENDECOMPOSITION_FACTOR_NAMES):
            raise exceptions.FactorsNotFoundError(
                f"The strategy {arguments.strategy} needs the eigendecomposition of module {module.name} for its Lambda"
                " matrix, and it is not there."
            )
        dtype = state_dtype(arguments)
        narrow = arguments.per_sample_gradient_dtype == torch.bfloat16 and dtype == torch.float32
        as_pair = narrow and _takes_pairs(device)
        for name in bases:
            q = module.storage[name]
            if q.ndim == 2:
                q = q.to(device, dtype)
                module.storage[name] = bf16_pair(q) if as_pair else q
        return True

    def add(module: Any, g: Tensor, a: Tensor, *, a_is_rotated: bool) -> None:
        """Add sequences `g [B, T, d_out]`, `a [B, T, d_in]` to Λ."""
        storage, arguments = module.storage, module.factor_args
        has_bases = prepare_bases(module, g.device)
        q_out, q_in = (storage[name] if has_bases else None for name in bases)
        ones = module.bias is not None
        if storage[names.NUM_LAMBDA_PROCESSED] is None:
            storage[names.NUM_LAMBDA_PROCESSED] = torch.zeros(1, dtype=torch.int64)
            storage[names.LAMBDA_MATRIX_NAME] = torch.zeros(
                module.weight.shape[0],
                module.weight.shape[1] + int(ones),
                dtype=state_dtype(arguments),
                device=g.device,
            )
        if module.gradient_scale != 1.0:
            g = g.to(state_dtype(arguments)) * module.gradient_scale
        a = a.to(g.device)
        if a_is_rotated:
            q_in, ones = None, False
        eigenvalue_correction_(storage[names.LAMBDA_MATRIX_NAME], g, a, q_out, q_in, ones_column=ones)
        storage[names.NUM_LAMBDA_PROCESSED].add_(g.shape[0])

    def register_hooks(self: Any) -> None:
        module = self.module
        reason = _not_accelerated(module, linear.TrackedLinear)
        if reason is not None:
            notice(f"the Lambda matrix of module {module.name} and of any like it", reason)
            original.register_hooks(self)
            return

        @torch.no_grad()
        def forward_hook(_module: Any, args: tuple[Any, ...], outputs: Tensor) -> None:
            has_bases = prepare_bases(module, args[0].device)
            if module.factor_args.has_shared_parameters:
                # Calls are laid end to end when all gradients are there, so none is rotated before.
                held = held_inputs.hold(module, args[0], rotated=False)
                self.cached_activations = [*(self.cached_activations or []), held]
            else:
                self.cached_activations = held_inputs.hold(module, args[0], rotated=has_bases)
            self.cached_hooks.append(outputs.register_hook(backward_hook))

        @torch.no_grad()
        def backward_hook(gradient: Tensor) -> None:
            if self.cached_activations is None:
                self._raise_cache_not_found_exception()
            held_inputs.clear()
            g = sequences(gradient.detach().to(module.factor_args.per_sample_gradient_dtype))
            if module.factor_args.has_shared_parameters:
                self.cached_hooks.pop().remove()
                pairs = self.cached_per_sample_gradient or []
                self.cached_per_sample_gradient = [*pairs, (g, self.cached_activations.pop().rows)]
                return
            held = self.cached_activations
            self.clear_all_cache()
            add(module, g, held.rows, a_is_rotated=held.basis is not None)

        self.registered_hooks.append(module.register_forward_hook(forward_hook))

    @torch.no_grad()
    def finalize_iteration(self: Any) -> None:
        pairs = self.cached_per_sample_gradient
        if not isinstance(pairs, list):
            original.finalize_iteration(self)
            return
        g, a = (torch.cat(side, dim=1) for side in zip(*pairs, strict=True))
        self.clear_all_cache()
        add(self.module, g, a, a_is_rotated=False)

    def release_memory(self: Any) -> None:
        held_inputs.clear()
        original.release_memory(self)

    return {
        "module.tracker.factor:LambdaTracker.register_hooks": register_hooks,
        "module.tracker.factor:LambdaTracker.finalize_iteration": finalize_iteration,
        "module.tracker.factor:LambdaTracker.release_memory": release_memory,
    }


def _not_accelerated(module: Any, linear: Any) -> str | None:
    """Why kronfluence's own code must compute the module's Λ, or None."""
    if type(module) is not linear:
        return f"{type(module).__name__} is not kronfluence's own TrackedLinear"
    if module.per_sample_gradient_process_fnc is not None:
        return "the task post-processes per-sample gradients, so they are needed"
    return None

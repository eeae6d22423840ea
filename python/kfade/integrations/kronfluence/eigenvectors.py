"""The eigendecomposition of kronfluence by `kfade.decomposition.decompose`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from kfade_kernels import PackedSymmetric
from torch import Tensor

from ...decomposition import decompose
from .peer import Notices, constants


def decomposition_stage(notice: Notices) -> Callable[..., Any]:
    names, eigen = constants(), import_module("kronfluence.factor.eigen")
    original = eigen.perform_eigendecomposition
    sides = (
        (
            names.ACTIVATION_COVARIANCE_MATRIX_NAME, names.NUM_ACTIVATION_COVARIANCE_PROCESSED,
            names.ACTIVATION_EIGENVALUES_NAME, names.ACTIVATION_EIGENVECTORS_NAME,
        ),
        (
            names.GRADIENT_COVARIANCE_MATRIX_NAME, names.NUM_GRADIENT_COVARIANCE_PROCESSED,
            names.GRADIENT_EIGENVALUES_NAME, names.GRADIENT_EIGENVECTORS_NAME,
        ),
    )  # fmt: skip

    def eigenpairs(covariance: Tensor, number: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dense = covariance.to(device, dtype)
        # A matrix that kronfluence summed is symmetric up to rounding only.
        packed = PackedSymmetric.from_dense((dense + dense.T).mul_(0.5))
        del dense
        try:
            pairs = decompose(packed, number)
        except torch.OutOfMemoryError:
            eigen.release_memory()
            pairs = decompose(packed, number)
        values, vectors = (x.to("cpu", covariance.dtype) for x in pairs)
        return values, vectors

    @torch.no_grad()
    def perform_eigendecomposition(
        covariance_factors: dict[str, dict[str, Tensor]],
        model: Any,
        state: Any,
        factor_args: Any,
        disable_tqdm: bool = False,
    ) -> dict[str, dict[str, Tensor]]:
        dtype = factor_args.eigendecomposition_dtype
        if dtype not in (torch.float32, torch.float64):
            notice("eigendecompositions", f"eigendecomposition_dtype is {dtype}, not torch.float32 or torch.float64")
            return original(covariance_factors, model, state, factor_args, disable_tqdm)  # type: ignore[no-any-return]
        factors: dict[str, dict[str, Tensor]] = {name: {} for name in names.EIGENDECOMPOSITION_FACTOR_NAMES}
        modules = eigen.get_tracked_module_names(model=model)
        # Modules that share their input follow each other.
        last: dict[str, tuple[Tensor, int, str]] = {}
        bar = eigen.tqdm(
            total=len(modules),
            desc="Performing Eigendecomposition",
            bar_format=eigen.TQDM_BAR_FORMAT,
            disable=not state.is_main_process or disable_tqdm,
        )
        with bar as progress:
            for module in modules:
                for covariances, counts, eigenvalues, eigenvectors in sides:
                    covariance = covariance_factors[covariances][module]
                    number = int(covariance_factors[counts][module])
                    before = last.get(covariances)
                    if (
                        before is not None
                        and before[1] == number
                        and before[0].dtype == covariance.dtype
                        and torch.equal(before[0], covariance)
                    ):
                        # A copy: a safetensors file cannot hold one tensor under two names.
                        values, vectors = (factors[x][before[2]].clone() for x in (eigenvalues, eigenvectors))
                    else:
                        values, vectors = eigenpairs(covariance, number, state.device, dtype)
                    last[covariances] = covariance, number, module
                    factors[eigenvalues][module], factors[eigenvectors][module] = values, vectors
                progress.update(1)
        return factors

    return perform_eigendecomposition

"""kronfluence's factor files, written from a fitted curvature and read into one.

kronfluence 1.0.1 keeps one file a kind of factor, with a tensor a module, in `OUTPUT/ANALYSIS/factors_NAME`. Its sums
are those of kfade, dense; what differs is what they are divided by. Of P rows that are not padding, T loss positions,
N sequences and k label samples:

| | kfade | kronfluence |
|---|---|---|
| A, and its eigenvalues | `A_sum / P` | `A_sum / P` |
| S, and its eigenvalues | `S_sum / T`, with T counted in each sample | `S_sum / (k·P)` |
| Λ | `Λ_sum / T` | `Λ_sum / (k·N)` |

So K-FAC's `S ⊗ A` and Λ are `T / (k·P)` and `T / (k·N)` times kfade's there, which relative damping does not see.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from kfade_kernels import PackedSymmetric
from torch import Tensor, nn

from ..config import FitConfig
from ..curvature import Curvature
from ..errors import MissingLibraryError, StorageError
from ..layer_curvature import LayerCurvature, new_states
from ..layers import select
from ..models import model_id
from ..storage import read_json, read_tensors, write_tensors, write_text

ARGUMENTS = "factor_arguments.json"
_COVARIANCES = (
    "activation_covariance",
    "gradient_covariance",
    "num_activation_covariance_processed",
    "num_gradient_covariance_processed",
)
_EIGEN = ("activation_eigenvectors", "activation_eigenvalues", "gradient_eigenvectors", "gradient_eigenvalues")
_LAMBDA = ("lambda_matrix", "num_lambda_processed")
_FILES: dict[str, tuple[str, ...]] = {
    "identity": (),
    "diagonal": _LAMBDA,
    "kfac": (*_COVARIANCES, *_EIGEN),
    "ekfac": (*_COVARIANCES, *_EIGEN, *_LAMBDA),
}


def _count(value: float) -> Tensor:
    return torch.tensor([round(value)], dtype=torch.int64)


def _exported(state: LayerCurvature, samples: int, sequences: int) -> dict[str, Tensor]:
    """The tensors of one layer by kind of factor."""
    found: dict[str, Tensor] = {}
    if state.a_sum is not None and state.s_sum is not None:
        rows = samples * state.positions
        found |= {
            "activation_covariance": state.a_sum.to_dense(),
            "gradient_covariance": state.s_sum.to_dense(),
            "num_activation_covariance_processed": _count(state.positions),
            "num_gradient_covariance_processed": _count(rows),
            # Layers of an input group have one tensor, and a file may not hold it twice.
            "activation_eigenvectors": state.input_eigenvectors().clone(),
            "gradient_eigenvectors": state.output_eigenvectors(),
        }
        assert state.lambda_in is not None and state.lambda_out is not None
        found["activation_eigenvalues"] = state.lambda_in.clone()
        found["gradient_eigenvalues"] = state.lambda_out * (state.losses / rows)
    if state.lambda_sum is not None:
        found |= {"lambda_matrix": state.lambda_sum, "num_lambda_processed": _count(samples * sequences)}
    return found


def export_factors(curvature: Curvature, directory: str | Path, sequences: int) -> None:
    """Write a curvature as the factor files of kronfluence 1.0.1, for its scores.

    Args:
        curvature: the names of its layers are those of kronfluence's modules.
        directory: `OUTPUT/ANALYSIS/factors_NAME`; made if need be. An `Analyzer` of that output and analysis then takes
            `factors_name=NAME`.
        sequences: N, that the curvature was fitted on.

    Raises:
        MissingLibraryError: kronfluence, whose arguments are written beside the factors, is not installed.
        TypeError, ValueError: `sequences` is not a whole number of at least 1; a layer is a Conv1D, which kronfluence
            does not track; sums were weighted, so that there is no count of what is in them; Λ rests on other
            sequences than S.
    """
    if isinstance(sequences, bool) or not isinstance(sequences, int):
        raise TypeError(f"sequences is {sequences!r}; it must be an integer")
    if sequences < 1:
        raise ValueError(f"sequences is {sequences}; it must be at least 1")
    for name, state in curvature.items():
        if state.transposed:
            raise ValueError(f"layer {name} is a Conv1D, which kronfluence does not track")
        if state.positions != round(state.positions) or state.losses != round(state.losses):
            raise ValueError(f"layer {name} has sums over {state.positions} rows; they must not have been weighted")
        if state.lambda_losses is not None:
            raise ValueError(f"layer {name} has Λ of other sequences than S; both must rest on all {sequences}")
    try:
        factor_arguments = import_module("kronfluence.arguments").FactorArguments
    except ImportError as error:
        raise MissingLibraryError("kronfluence is not installed; its factor files need it") from error
    config, directory = curvature.config, Path(directory)
    arguments = factor_arguments(strategy=config.curvature, use_empirical_fisher=config.fisher == "empirical")
    directory.mkdir(parents=True, exist_ok=True)
    layers = {name: _exported(state, config.samples, sequences) for name, state in curvature.items()}
    for kind in _FILES[config.curvature]:
        write_tensors(directory / f"{kind}.safetensors", {name: found[kind] for name, found in layers.items()})
    # Last, since kronfluence looks for it first.
    write_text(directory / ARGUMENTS, json.dumps(arguments.to_dict(), indent=4))


def import_factors(
    directory: str | Path, model: nn.Module, modules: str = "mlp", *, losses: int | None = None
) -> Curvature:
    """Read the factor files of kronfluence 1.0.1 as a curvature.

    Args:
        directory: `OUTPUT/ANALYSIS/factors_NAME`, of the strategy kfac, ekfac or diagonal.
        model: what they were fitted on, with the module names that they have.
        modules: as in FitConfig; it must select just the modules that the files hold.
        losses: T, the loss positions of all sequences (times the label samples), which kronfluence does not keep. It
            only scales S and Λ; None takes the rows behind S, as if every token carried loss.

    Returns:
        The curvature, its state in float32 or float64; every layer has an input factor of its own.

    Raises:
        StorageError: a file is missing, cannot be read, or does not fit the model.
        TypeError, ValueError: `losses` is not a whole number of at least 1; `modules` selects nothing.
    """
    if losses is not None and (isinstance(losses, bool) or not isinstance(losses, int)):
        raise TypeError(f"losses is {losses!r}; it must be an integer")
    if losses is not None and losses < 1:
        raise ValueError(f"losses is {losses}; it must be at least 1")
    directory = Path(directory)
    arguments = read_json(directory / ARGUMENTS)
    strategy = arguments.get("strategy")
    if strategy not in _FILES or strategy == "identity":
        raise StorageError(f"{directory / ARGUMENTS} has the strategy {strategy!r}; it must be diagonal, kfac or ekfac")
    files = {kind: read_tensors(directory / f"{kind}.safetensors") for kind in _FILES[strategy]}
    states = new_states(select(model, modules), 0)
    for kind, tensors in files.items():
        wrong = sorted(tensors.keys() ^ states.keys())
        if wrong:
            raise StorageError(
                f"{directory / kind}.safetensors and modules, which is {modules!r}, differ in {', '.join(wrong[:4])}"
            )
    for name, state in states.items():
        state.group = name
        _take(state, {kind: tensors[name] for kind, tensors in files.items()}, losses, directory)
    fisher = "empirical" if arguments.get("use_empirical_fisher") else "sampled"
    return Curvature(FitConfig(curvature=strategy, fisher=fisher, modules=modules), model_id(model), states)


def _take(state: LayerCurvature, found: dict[str, Tensor], losses: int | None, directory: Path) -> None:
    """Fill the state of one layer with its tensors."""
    out, width = state.d_out, state.width_in
    shapes: dict[str, Any] = {
        "activation_covariance": [width, width], "gradient_covariance": [out, out],
        "activation_eigenvectors": [width, width], "gradient_eigenvectors": [out, out],
        "activation_eigenvalues": [width], "gradient_eigenvalues": [out], "lambda_matrix": [out, width],
    }  # fmt: skip
    for kind, value in found.items():
        if list(value.shape) != shapes.get(kind, [1]):
            raise StorageError(
                f"{directory / kind}.safetensors has {state.name} of shape {list(value.shape)};"
                f" it must be {shapes.get(kind, [1])}"
            )
    wide = {n: v.double() if v.dtype == torch.float64 else v.float() for n, v in found.items() if n in shapes}
    rows = int(found["num_gradient_covariance_processed"]) if "gradient_covariance" in found else 0
    if losses is None and not rows:
        raise ValueError("losses is None; for the strategy diagonal it must be given")
    state.losses = losses or rows
    if "activation_covariance" in found:
        state.positions = int(found["num_activation_covariance_processed"])
        state.a_sum = PackedSymmetric.from_dense(wide["activation_covariance"])
        state.s_sum = PackedSymmetric.from_dense(wide["gradient_covariance"])
        state.q_in, state.q_out = wide["activation_eigenvectors"], wide["gradient_eigenvectors"]
        state.lambda_in = wide["activation_eigenvalues"].clamp(min=0)
        state.lambda_out = wide["gradient_eigenvalues"].clamp(min=0) * (rows / state.losses)
    state.lambda_sum = wide.get("lambda_matrix")

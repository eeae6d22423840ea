"""curvlinops' K-FAC operator with factors that kfade collected, so that it need not collect its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from ..config import FitConfig
from ..curvature import Curvature
from ..fit import fit_factors
from ..layer_curvature import LayerCurvature
from ..progress import Progress
from . import UnsupportedPeerError

PACKAGE = "curvlinops-for-pytorch"
SUPPORTED_VERSIONS = ("3.0.1",)
# The attributes of its operator that are read or written here.
_NEEDED = (
    "_input_covariances", "_gradient_covariances", "_mapping", "_model_func", "_params", "_loss_func", "_N_data",
    "_num_per_example_loss_terms", "_separate_weight_and_bias", "_kfac_approx", "_fisher_type",
    "_mc_samples", "_reset_matrix_properties",
)  # fmt: skip
_FISHERS = {"mc": "sampled", "empirical": "empirical"}


def _check_operator(operator: object) -> None:
    """Raise unless this is a K-FAC operator of a supported curvlinops with a loss that sums."""
    try:
        found = version(PACKAGE)
        from curvlinops import KFACLinearOperator  # type: ignore[import-untyped]
    except (PackageNotFoundError, ImportError) as error:
        raise UnsupportedPeerError(f"{PACKAGE} is not installed: `pip install {PACKAGE}`") from error
    if found not in SUPPORTED_VERSIONS:
        raise UnsupportedPeerError(
            f"{PACKAGE} has version {found}; supported is {', '.join(SUPPORTED_VERSIONS)}, whose operator keeps its"
            " factors where they can be given to it"
        )
    # A subclass (its EK-FAC) keeps more than the factors.
    if type(operator) is not KFACLinearOperator:
        raise TypeError(f"operator is a {type(operator).__name__}; it must be a KFACLinearOperator")
    missing = [name for name in _NEEDED if not hasattr(operator, name)]
    if missing:
        raise UnsupportedPeerError(f"the KFACLinearOperator of {PACKAGE} {found} has no {', '.join(missing)}")


def _fisher_of(operator: Any) -> str:
    """What kfade calls the operator's Fisher; raises where the operator's options mean another matrix than ours."""
    if operator._kfac_approx != "expand":
        raise ValueError(f"operator has kfac_approx {operator._kfac_approx!r}; it must be 'expand'")
    if not isinstance(operator._loss_func, nn.CrossEntropyLoss):
        raise ValueError(f"operator has loss_func {operator._loss_func}; it must be a CrossEntropyLoss")
    if operator._loss_func.reduction != "sum":
        raise ValueError(
            f"operator has a loss_func with reduction {operator._loss_func.reduction!r}; it must be 'sum' (with ignored"
            " labels curvlinops' mean depends on how sequences are batched)"
        )
    fisher = str(getattr(operator._fisher_type, "value", operator._fisher_type))
    if fisher not in _FISHERS:
        raise ValueError(f"operator has fisher_type {fisher!r}; it must be one of {', '.join(_FISHERS)}")
    return _FISHERS[fisher]


def _layer_names(operator: Any, model: nn.Module) -> dict[str, str]:
    """For each of the operator's layers its name in `model`."""
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for theirs in operator._mapping:
        module = operator._model_func.get_submodule(theirs)
        if id(module) not in names:
            raise ValueError(f"operator has the layer {theirs}, which is not in model; its model_func must call model")
        found[theirs] = names[id(module)]
    return found


def _set_factors(operator: Any, states: Mapping[str, LayerCurvature], names: Mapping[str, str], samples: int) -> None:
    """Put the factors of `states` where the operator keeps its own."""
    operator._input_covariances, operator._gradient_covariances = {}, {}
    operator._reset_matrix_properties()
    positions = operator._N_data * operator._num_per_example_loss_terms
    for name, where in operator._mapping.items():
        state = states[names[name]]
        like = operator._params[next(iter(where.values()))]
        assert state.a_sum is not None and state.s_sum is not None
        operator._gradient_covariances[name] = (state.s_sum.to_dense() / samples).to(like)
        if "weight" in where:
            joint = "bias" in where and not operator._separate_weight_and_bias
            order = state.width_in if joint else state.d_in
            a = state.a_sum.to_dense()[:order, :order] / positions
            operator._input_covariances[name] = a.to(like)


def collect_factors_(
    operator: Any,
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    autocast: str = "off",
    progress: Progress | None = None,
) -> None:
    """Collect the factors of a `curvlinops.KFACLinearOperator` by kfade, in one pass, and give them to it.

    The operator's layers, its Fisher and its number of label samples are those of the operator; what is said about its
    normalisation and how to build it under `set_factors_` holds here too. No factor is decomposed.

    Args:
        operator: changed in place.
        model: a causal language model, as `kfade.fit` takes it; `model_func` of the operator is it, or calls it.
        batches: as `kfade.fit` takes them: the data of the operator, with labels that are aligned with the tokens.
        seed: of sampled labels.
        autocast: as in `FitConfig`.
        progress: where to show progress and record costs.

    Raises:
        UnsupportedPeerError, TypeError: as `set_factors_`.
        ValueError: options that mean another matrix, or an operator of another model; and as `kfade.fit`.
        UnsupportedLayerError, NonFiniteError: as `kfade.fit`.
    """
    _check_operator(operator)
    fisher, names = _fisher_of(operator), _layer_names(operator, model)
    modules = "^(" + "|".join(re.escape(name) for name in names.values()) + ")$"
    config = FitConfig("kfac", fisher, modules, operator._mc_samples, seed, autocast=autocast)
    states = fit_factors(model, batches, config, progress or Progress())
    absent = sorted(set(names.values()) - set(states))
    if absent:
        raise ValueError(
            f"operator has the layers {absent}, whose weight is that of an earlier layer (tied); it must"
            " have each weight once"
        )
    _set_factors(operator, states, names, operator._mc_samples)


def set_factors_(operator: Any, curvature: Curvature, model: nn.Module) -> None:
    """Give a `curvlinops.KFACLinearOperator` the factors of a fit, in its own normalisation.

    Its products, its trace, determinants and norm, and its `KFACInverseLinearOperator` then rest on them, and it
    makes no pass over its data. Build it with `num_data` (sequences), `num_per_example_loss_terms` (the padded
    length) and `check_deterministic=False`, since it would count and check by passes of its own. It divides A by
    sequences × padded length and leaves S as the sum (the mean over label samples), so that is what it is given;
    padding is not in our sums, while in its own it is, as if it were text.

    Args:
        operator: changed in place; its parameters are those of layers of the curvature.
        curvature: `kfac` or `ekfac` (whose factors are the same), fitted on `model` and the same data.
        model: the model that was fitted; `model_func` of the operator is it, or calls it.

    Raises:
        UnsupportedPeerError: curvlinops is not installed, or of a version (or with internals) not supported.
        TypeError: `operator` or `curvature` is something else.
        ValueError: options that mean another matrix, or a layer that the curvature does not have.
    """
    _check_operator(operator)
    if not isinstance(curvature, Curvature):
        raise TypeError(f"curvature is a {type(curvature).__name__}; it must be a Curvature")
    if curvature.config.curvature not in ("kfac", "ekfac"):
        raise ValueError(f"curvature is {curvature.config.curvature!r}; it must be 'kfac' or 'ekfac' to have factors")
    if curvature.config.rank is not None:
        raise ValueError(
            f"curvature was fitted with rank {curvature.config.rank}; it must be fitted with rank None to have factors"
        )
    if curvature.config.max_factor_order is not None:
        raise ValueError(
            f"curvature was fitted with max_factor_order {curvature.config.max_factor_order}; it must be fitted with"
            " max_factor_order None to have whole factors"
        )
    fisher, names = _fisher_of(operator), _layer_names(operator, model)
    if fisher != curvature.config.fisher:
        raise ValueError(
            f"operator has the {fisher} Fisher and the curvature the {curvature.config.fisher} one;"
            " they must be the same"
        )
    absent = sorted(set(names.values()) - set(curvature))
    if absent:
        raise ValueError(f"operator has the layers {absent}, which the curvature lacks; it has {sorted(curvature)}")
    _set_factors(operator, curvature, names, curvature.config.samples)

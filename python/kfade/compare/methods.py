"""Which methods are compared, and with which options: as many tries for each, and K-FADE taken apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..baselines import METHODS, BaselineConfig, decoder_layers
from ..batches import labelled_tokens
from ..config import CURVATURES, OBJECTIVES, STEPS, CompareConfig, FitConfig, UnlearnConfig
from ..loss import check_batches

Config = UnlearnConfig | BaselineConfig

OURS, PUBLISHED = "kfade", "kfade_published"
OWN = (OURS, PUBLISHED)
# Baselines with other options than those they are published with.
VARIANTS: dict[str, dict[str, Any]] = {"undial_kl": {"method": "undial", "retain_weight": 1.0, "retain_loss": "kl"}}
NAMES = (OURS, PUBLISHED, *METHODS, *VARIANTS)
TITLES = {
    OURS: "K-FADE",
    PUBLISHED: "K-FADE as published",
    "gradient_ascent": "gradient ascent",
    "gradient_difference": "gradient difference",
    "npo": "NPO",
    "simnpo": "SimNPO",
    "undial": "UNDIAL",
    "wga": "WGA",
    "rmu": "RMU",
    "task_vector": "task vector",
    "undial_kl": "UNDIAL + retain KL",
}
# K-FADE measures its budget on sequences like those it steps on; ours are further off, and cost a quarter more or so.
MARGIN = 0.75


def check_methods(names: Iterable[str]) -> None:
    """Raise ValueError unless all are in `NAMES`."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"methods has {name!r}; it must have names among {', '.join(NAMES)}")


def tries(name: str, model: nn.Module, forget: Iterable[Mapping[str, Tensor]], options: CompareConfig) -> list[Config]:
    """The configurations of a method, as many for each: a baseline's learning rates, K-FADE's budgets.

    K-FADE takes its own number of steps, or fewer if the allowance is smaller, and spends budgets of its own, from the
    smallest to the largest at equal ratios, a quarter below ours; of a single one it has one try. RMU steers layer 7
    as published, or in a shallower model the last but one.

    Args:
        name: of the method.
        model: to be unlearned.
        forget: its forget set.
        options: the allowance.

    Raises:
        ValueError: no such method, or bad batches.
    """
    check_methods([name])
    if name in OWN:
        low, high, count = min(options.budgets), max(options.budgets), len(options.learning_rates)
        ratios = [i / (count - 1) for i in range(count)] if count > 1 else [1.0]
        base = within(UnlearnConfig() if name == OURS else UnlearnConfig.published(), forget, options.epochs)
        tried = dict.fromkeys(float(f"{MARGIN * low * (high / low) ** r:.4g}") for r in ratios)
        return [replace(base, kl_budget=budget) for budget in tried]
    values: dict[str, Any] = {"method": name, **VARIANTS.get(name, {}), "epochs": options.epochs}
    if name == "rmu":
        stack, _ = decoder_layers(model, 0)
        depth = len(dict(model.named_modules())[stack])
        values["layer"] = min(METHODS["rmu"].defaults.layer, max(0, depth - 2))
    return [BaselineConfig(**values, learning_rate=rate) for rate in options.learning_rates]


def within(config: UnlearnConfig, forget: Iterable[Mapping[str, Tensor]], epochs: float) -> UnlearnConfig:
    """The configuration with no more steps than so many passes over a forget set have."""
    batches = [batch for batch in check_batches(forget, torch.device("cpu"), "forget") if len(batch.loss_index)]
    tokens, sequences = labelled_tokens(batches), sum(len(batch.input_ids) for batch in batches)
    return replace(config, steps=min(config.steps_over(tokens, sequences), config.steps_in(epochs, tokens)))


def strength_of(config: Config) -> str:
    """What distinguishes the tries of one method, in a few words."""
    if isinstance(config, BaselineConfig):
        return f"learning rate {config.learning_rate:g}"
    return f"budget {config.kl_budget:g}" if config.kl_budget is not None else f"step size {config.step_size:g}"


def with_seed(config: Config, seed: int) -> Config:
    """The configuration with another seed."""
    if isinstance(config, BaselineConfig):
        return replace(config, seed=seed)
    return replace(config, fit=replace(config.fit, seed=seed))


def ablation(base: UnlearnConfig | None = None) -> dict[str, UnlearnConfig]:
    """K-FADE in many steps with one thing changed at a time, by what it is."""
    base = base or UnlearnConfig()
    steps = base.steps or STEPS

    def fit(**changes: Any) -> UnlearnConfig:
        return replace(base, fit=FitConfig(**{**asdict(base.fit), **changes}))

    found = {OURS: base}
    found |= {f"curvature: {name}": fit(curvature=name) for name in CURVATURES}
    found |= {f"layers: {name}": fit(modules=name) for name in ("mlp", "attention", "all-linear")}
    found |= {f"damping {base.damping * f:g}": replace(base, damping=base.damping * f) for f in (0.1, 10.0)}
    found |= {f"{count} steps": replace(base, steps=count) for count in (max(2, steps // 4), 2 * steps)}
    found |= {f"objective: {name}": replace(base, objective=name) for name in OBJECTIVES}
    found["fitted again at every quarter"] = replace(base, refit_every=max(1, steps // 4))
    found["no retain-KL term"] = replace(base, retain_weight=0.0)
    found["Fisher at temperature 1"] = fit(temperature=1.0)
    found["fitted on all of the retain set"] = replace(base, tokens_per_dimension=None)
    found["one step, as published"] = UnlearnConfig.published(kl_budget=base.kl_budget)
    return {name: config for name, config in found.items() if name == OURS or config != base}

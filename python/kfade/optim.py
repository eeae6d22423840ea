"""K-FAC as an optimiser (Martens and Grosse 2015, arXiv 1503.05671), with Adam for what it does not track.

In every tracked layer, with G its gradient `[d_out, d_in (+ 1)]` and A, S the running averages of its factors:

    G̃ = (S ⊗ A + λI)⁻¹ G
    ν = min(1, √(kl_clip / (lr² Σ ⟨G̃, G⟩)))        the sum goes over all layers
    M ← momentum · M + ν G̃
    W ← (1 − lr · weight_decay) W − lr M

Since F = S ⊗ A is the Fisher of the token mean, `½ lr² ⟨G̃, F G̃⟩` is the KL in nats a token by which the step
`lr G̃` moves the predictions, and ν bounds twice that (Ba, Grosse and Martens 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import KFACConfig
from .curvature import Curvature
from .layer_curvature import LayerCurvature
from .layers import Layer, select
from .training import FactorTracker, unwrapped

# What of a layer's state the solve needs; the factors behind it go on changing.
BASIS = ("q_in", "lambda_in", "q_out", "lambda_out")


def clip_scale(products: Iterable[Tensor], lr: float, kl_clip: float) -> Tensor:
    """`ν = min(1, √(kl_clip / (lr² Σ ⟨G̃, G⟩)))`, 0-d, from the products ⟨G̃, G⟩ of all layers."""
    total = torch.stack(list(products)).sum().clamp(min=0)
    return (kl_clip / (lr**2 * total)).sqrt().clamp(max=1)


def adam_step_(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
    """One step of Adam (Kingma and Ba 2015) with bias correction, in place; the averages are float32 or wider.

    Args:
        parameter: what is changed.
        gradient: of its shape.
        state: `step`, `exp_avg` and `exp_avg_sq`; empty before the first step.
        group: has `lr`, `betas` and `eps`.
    """
    gradient = gradient.to(_state_dtype(parameter))
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(gradient), exp_avg_sq=torch.zeros_like(gradient))
    state["step"] += 1
    first, second = group["betas"]
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - second ** state["step"])).add_(group["eps"])
    parameter.add_(state["exp_avg"] / root, alpha=-group["lr"] / (1 - first ** state["step"]))


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _decay_(parameter: Tensor, group: Mapping[str, Any]) -> None:
    """Decoupled weight decay (Loshchilov and Hutter 2019); biases and norms have one dimension and are left alone."""
    if group["weight_decay"] and parameter.ndim > 1:
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _configured(config: KFACConfig | None, options: Mapping[str, Any]) -> KFACConfig:
    if config is not None and not isinstance(config, KFACConfig):
        raise TypeError(f"config is a {type(config).__name__}; it must be a KFACConfig (options go by their names)")
    known = {f.name for f in fields(KFACConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"KFAC has no options {unknown}; it has {sorted(known)}")
    return replace(config or KFACConfig(), **options)


class KFAC(Optimizer):
    """K-FAC for the linear layers of a causal language model, and Adam for its other parameters.

    A drop-in optimiser: the training loop calls `backward`, `step` and `zero_grad` as ever. The factors come from
    passes of its own over the last training batch that the model was run on (`kfade.FactorTracker`), so gradient
    accumulation, clipping and loss scaling do not touch them.

    Args:
        model: a causal language model as `kfade.fit` takes it, or what DistributedDataParallel, accelerate or
            `torch.compile` made of it. All its parameters are optimised.
        config: the options; see KFACConfig.
        options: single options by name, in the place of the config's.

    Attributes:
        config: the options. Those that may change while it trains are read from `param_groups`.
        tracker: the running factors.
        param_groups: two. The tracked layers have `lr`, `momentum`, `weight_decay`, `damping` and `kl_clip`; all else
            has Adam's `lr`, `betas` and `eps`, and `weight_decay`. A scheduler scales the `lr` of both.
        steps: steps taken.

    Raises:
        TypeError, ValueError: an option is unknown, of the wrong type, or out of its range.
        UnsupportedLayerError: a selected layer cannot be handled exactly.

    State is float32 (float64 for float64 parameters): for each tracked layer its momentum, the lower triangles of
    A and S, and their eigenvectors; two averages for each other parameter. A step costs
    `4·d_out·d_in·(d_out + d_in)` FLOPs a layer for the solve; see `docs/optimisers.md` for the rest.

    A parameter without a gradient is left as it is; the solve takes the gradient of such a weight or bias to be zero. A
    NaN in a gradient makes the parameters NaN, as with AdamW. A batch that gives NaN is left out of the factors with a
    warning, and until there is one to collect the tracked layers are left as they are.
    """

    _complete = False

    def __init__(self, model: nn.Module, config: KFACConfig | None = None, **options: Any) -> None:
        self.config = config = _configured(config, options)
        self.tracker = FactorTracker(model, config.fit, every=config.factor_every, decay=config.decay)
        self.steps = 0
        self._curvature: Curvature | None = None
        self._layers: list[Layer] = select(unwrapped(model), config.fit.modules)
        tracked = [p for layer in self._layers for p in layer.parameters().values()]
        inside = {id(p) for p in tracked}
        common: dict[str, Any] = {"weight_decay": config.weight_decay}
        preconditioned = {
            "params": tracked, "lr": config.lr, "momentum": config.momentum, "damping": config.damping,
            "kl_clip": config.kl_clip, **common,
        }  # fmt: skip
        rest = {
            "params": [p for p in model.parameters() if id(p) not in inside], "lr": config.adam_lr,
            "betas": tuple(config.adam_betas), "eps": config.adam_eps, **common,
        }  # fmt: skip
        super().__init__([preconditioned, rest], {})
        self._complete = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the groups are made from the model.

        Raises:
            ValueError: always, once the optimiser is made.
        """
        if self._complete:
            raise ValueError(
                "KFAC has its two parameter groups from its model; make a new KFAC for a model with other parameters"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Collect and decompose if it is time to, then change every parameter that has a gradient.

        Args:
            closure: evaluates the loss anew, with gradients, and returns it.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: the model was not run in training mode, with gradients, before the first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refresh()
        self.steps += 1
        self._step_tracked(self.param_groups[0])
        for p in self.param_groups[1]["params"]:
            if p.grad is not None:
                _decay_(p, self.param_groups[1])
                adam_step_(p, p.grad, self.state[p], self.param_groups[1])
        return loss

    def _refresh(self) -> None:
        with torch.enable_grad():
            self.tracker.step()
        if not self.tracker.updates:
            return
        if self._curvature is None or self.steps % self.config.refresh_every == 0:
            self._set_basis(self.tracker.curvature())

    def _set_basis(self, curvature: Curvature) -> None:
        layers = {name: replace(state, a_sum=None, s_sum=None) for name, state in curvature.items()}
        self._curvature = Curvature(curvature.config, curvature.model_id, layers)

    def _step_tracked(self, group: Mapping[str, Any]) -> None:
        if self._curvature is None:
            return
        layers = {}
        matrices = {}
        for layer in self._layers:
            parameters = layer.parameters().values()
            if all(p.grad is None for p in parameters):
                continue
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            layers[layer.name] = layer
            matrices[layer.name] = layer.joint(gradients[0], gradients[1] if layer.has_bias else None)
        if not layers:
            return
        solved = self._curvature.solve_matrices(matrices, group["damping"], self.config.damping_kind)
        scale = None
        if group["kl_clip"] is not None:
            products = ((x * matrices[name]).sum() for name, x in solved.items())
            scale = clip_scale(products, group["lr"], group["kl_clip"])
        for name, x in solved.items():
            parts = layers[name].split(x if scale is None else x.mul_(scale))
            for p, part in zip(layers[name].parameters().values(), parts.values(), strict=True):
                if p.grad is None:
                    continue
                step = part
                if group["momentum"]:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(part))
                    step = buffer.mul_(group["momentum"]).add_(part)
                _decay_(p, group)
                p.add_(step, alpha=-group["lr"])

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on with the same bits: tensors and numbers, for `torch.save`.

        Beside torch's `state` and `param_groups` it has `kfac`: the steps, the factors and the eigenvectors.
        """
        basis = {name: {key: getattr(state, key) for key in BASIS} for name, state in (self._curvature or {}).items()}
        return {
            **super().state_dict(),
            "kfac": {"steps": self.steps, "factors": self.tracker.state_dict(), "basis": basis},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, for a model with the same layers.

        Raises:
            ValueError: it is another optimiser's, or of another model.
        """
        own = state_dict.get("kfac")
        if own is None:
            raise ValueError(f"state_dict has {sorted(state_dict)}; it must be that of a KFAC, which has 'kfac'")
        names = [layer.name for layer in self._layers]
        if own["basis"] and list(own["basis"]) != names:
            raise ValueError(f"state_dict is of layers {list(own['basis'])}; it must be of {names}")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "kfac"})
        # torch narrows state to the dtype of its parameter.
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for number, p in zip(saved["params"], group["params"], strict=True):
                for key, value in state_dict["state"].get(number, {}).items():
                    if isinstance(value, Tensor):
                        self.state[p][key] = value.to(device=p.device, copy=True)
        self.steps = own["steps"]
        self.tracker.load_state_dict(own["factors"])
        self._curvature = None
        if own["basis"]:
            self._curvature = Curvature(
                self.config.fit, "", {x.name: _with_basis(x, own["basis"][x.name]) for x in self._layers}
            )


def _with_basis(layer: Layer, basis: Mapping[str, Tensor]) -> LayerCurvature:
    device = layer.weight.device
    state = LayerCurvature(layer.name, layer.d_out, layer.d_in, layer.has_bias, layer.transposed, layer.group)
    for key in BASIS:
        setattr(state, key, basis[key].to(device=device, copy=True))
    return state

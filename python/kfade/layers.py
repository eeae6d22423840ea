"""Which layers of a model have curvature: selection, refusal, sharing of weights and of inputs.

A `Layer` is one weight matrix. Usually one module holds it; modules with tied weights are one layer
that is called several times. Layers that are fed the same tensor (q/k/v, gate/up) are one *input
group*: their input factor is the same matrix and is accumulated once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedLayerError

_MLP = r"(^|\.)(mlp|ffn|feed_forward|feedforward|block_sparse_moe|experts?|fc1|fc2|dense_h_to_4h|dense_4h_to_h)(\.|$)"
_ATTENTION = r"(^|\.)(self_attn|self_attention|attn|attention|linear_attn)(\.|$)"
PRESETS = {"mlp": _MLP, "attention": _ATTENTION, "all-linear": ""}


class WeightAndBias(NamedTuple):
    """The two parts of a biased layer's gradient or direction, each in its parameter's own layout."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Layer:
    """One weight matrix, and the modules that use it.

    Attributes:
        name: name of the first module.
        modules: the modules; more than one when the weight is tied.
        d_in: width of the inputs, without the bias column.
        d_out: width of the outputs.
        has_bias: whether a bias rides along as a last input column.
        transposed: the weight is stored `[d_in, d_out]` (the Hugging Face `Conv1D`).
        group: name of the layer that leads the input group; its own name when it shares nothing.
        calls: calls of the modules in one forward pass, as traced.
    """

    name: str
    modules: tuple[nn.Module, ...] = field(repr=False)
    d_in: int
    d_out: int
    has_bias: bool
    transposed: bool
    group: str = ""
    calls: int = 1

    @property
    def width_in(self) -> int:
        """Order of the input factor: d_in, and one more for the bias."""
        return self.d_in + int(self.has_bias)

    @property
    def leads(self) -> bool:
        return self.group == self.name

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.modules[0].weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.modules[0].bias if self.has_bias else None  # type: ignore[return-value]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by their names in the model."""
        named = {f"{self.name}.weight": self.weight}
        if self.bias is not None:
            named[f"{self.name}.bias"] = self.bias
        return named

    def joint(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[d_out, width_in]` from the parts in their own layout."""
        matrix = weight.T if self.transposed else weight
        return matrix if bias is None else torch.cat([matrix, bias.unsqueeze(1)], dim=1)

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parts by parameter name, from `[d_out, width_in]`."""
        weight = matrix[:, : self.d_in]
        parts = {f"{self.name}.weight": (weight.T if self.transposed else weight).contiguous()}
        if self.has_bias:
            parts[f"{self.name}.bias"] = matrix[:, self.d_in].contiguous()
        return parts


def in_passes(layers: Sequence[Layer], at_most: int | None) -> list[list[Layer]]:
    """Split layers into passes of at most so many, keeping each input group together; None is one pass."""
    if at_most is None:
        return [list(layers)]
    passes: list[list[Layer]] = [[]]
    for leader in (layer for layer in layers if layer.leads):
        members = [layer for layer in layers if layer.group == leader.name]
        if passes[-1] and len(passes[-1]) + len(members) > at_most:
            passes.append([])
        passes[-1].extend(members)
    return passes


def _is_candidate(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _refusal(module: nn.Module) -> str | None:
    """Why hooks on this module would not see its whole gradient, or None."""
    if hasattr(module, "parametrizations"):
        return "its weight is computed by torch.nn.utils.parametrize, so an update of it would be lost"
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return f"it is a {type(module).__module__}.{type(module).__name__}, whose forward is not that of nn.Linear"
    if isinstance(module, Conv1D) and type(module).forward is not Conv1D.forward:
        return f"it is a {type(module).__module__}.{type(module).__name__}, whose forward is not that of Conv1D"
    if not module.weight.is_floating_point():  # type: ignore[operator]
        return f"its weight is quantised ({module.weight.dtype})"
    return None


def output_head(model: nn.Module) -> nn.Module | None:
    """The output projection of a Hugging Face model, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    if getter is None:
        return None
    try:
        head = getter()
    except (NotImplementedError, AttributeError):
        return None
    return head if isinstance(head, nn.Module) else None


def select(model: nn.Module, modules: str) -> list[Layer]:
    """The layers whose module names match, in the order of the model.

    Args:
        model: any module.
        modules: a preset (`mlp`, `attention`, `all-linear`: all but the output head), or a regular
            expression searched in module names.

    Raises:
        ValueError: the pattern is not a regular expression, or matches no linear layer; the
            candidates are listed.
        UnsupportedLayerError: a matching layer cannot be handled exactly.
    """
    try:
        pattern = re.compile(PRESETS.get(modules, modules))
    except re.error as error:
        raise ValueError(f"modules is {modules!r}; it must be a preset or a regular expression ({error})") from error
    head = output_head(model) if modules in PRESETS else None
    candidates = {n: m for n, m in model.named_modules() if n and _is_candidate(m)}
    chosen = {n: m for n, m in candidates.items() if pattern.search(n) and m is not head}
    if not chosen:
        names = ", ".join(candidates) if len(candidates) <= 40 else ", ".join(list(candidates)[:40]) + ", …"
        raise ValueError(f"modules is {modules!r} and matches no linear layer; candidates are: {names or 'none'}")
    for name, module in chosen.items():
        reason = _refusal(module)
        if reason:
            raise UnsupportedLayerError(f"layer {name} cannot be handled: {reason}; leave it out of modules")
    return _merge_tied(model, chosen)


def _merge_tied(model: nn.Module, chosen: Mapping[str, nn.Module]) -> list[Layer]:
    """One layer for each distinct weight; a weight that something unselected uses too is refused."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=True):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append((name, module))
    selected = {id(module) for module in chosen.values()}
    layers: list[Layer] = []
    seen: set[int] = set()
    for name, module in chosen.items():
        weight = module._parameters["weight"]
        assert weight is not None
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        sharers = owners[id(weight)]
        strangers = [n for n, m in sharers if id(m) not in selected]
        if strangers:
            raise UnsupportedLayerError(
                f"layer {name} cannot be handled: its weight is tied to {', '.join(strangers)},"
                " whose part of the gradient would be missed; leave it out of modules, or untie it"
            )
        transposed = isinstance(module, Conv1D)
        d_in, d_out = weight.shape if transposed else reversed(weight.shape)
        bias = module._parameters.get("bias")
        if any(m._parameters.get("bias") is not bias for _, m in sharers):
            raise UnsupportedLayerError(f"layer {name} cannot be handled: its weight is tied but its bias is not")
        layers.append(
            Layer(name, tuple(m for _, m in sharers), int(d_in), int(d_out), bias is not None, transposed, name)
        )
    return layers

"""Hooks that bring, for each layer and batch, its inputs and the gradients of its outputs together.

A forward hook keeps the input and asks autograd for the gradient of the output; when that gradient
arrives, the consumer gets the pair. Tying both to the *gradient's* arrival is what makes gradient
checkpointing exact: a recomputed forward pass that nobody differentiates delivers nothing
(non-reentrant), and a first pass without a graph registers nothing (reentrant), so each token comes
once. No parameter requires a gradient meanwhile, so autograd computes no weight gradients and nothing
below the first tracked layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedLayerError
from .layers import Layer
from .loss import Batch, Head
from .sharding import reshard


@dataclass
class Pair:
    """What one call of a layer contributes.

    Attributes:
        layer: the layer.
        a: its input as it was given, `[B, T, d_in]` (or `[B·T, d_in]`), not yet cast.
        g: gradient of the summed loss with respect to its output, same leading shape.
        dtype: the dtype in which the layer computed, which under autocast is not that of `a`.
    """

    layer: Layer
    a: Tensor
    g: Tensor
    dtype: torch.dtype


def _module_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def rows_of(pair: Pair, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """g `[B, T, d_out]` and a `[B, T, d_in]` of one call, zero at padding."""
    g, a = pair.g.to(dtype), pair.a.to(pair.dtype).to(dtype)
    if batch.padded:
        dropped = ~batch.attention.unsqueeze(-1)
        g, a = g.masked_fill(dropped, 0), a.masked_fill(dropped, 0)
    return g, a


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient within this block; their flags and `.grad` come back after it."""
    # FSDP2 gives a gathered parameter the flag of its shard.
    reshard(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        yield
    finally:
        reshard(model)
        for p, flag in flags:
            p.requires_grad_(flag)


@contextmanager
def trained(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only these parameters take gradients within this block; all flags and their `.grad` come back after it."""
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for p in parameters:
            stack.callback(setattr, p, "grad", p.grad)
            p.grad = None
            p.requires_grad_(True)
        yield


@contextmanager
def deterministic_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (dropout off), with gradient checkpointing still on where it was on.

    Transformers checkpoints only modules in training mode, so those modules alone stay in it, and
    their own dropout rates are set to zero meanwhile.
    """
    modes = [(m, m.training) for m in model.modules()]
    rates: list[tuple[nn.Module, str, float]] = []
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float) and value:
                    rates.append((module, name, value))
                    setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)
        for module, mode in modes:
            module.training = mode


@contextmanager
def layer_hooks(layers: Sequence[Layer], hook: Callable[..., Any]) -> Iterator[None]:
    """Register `hook(layer, args, kwargs, output)` after every module of every layer."""
    with ExitStack() as stack:
        for layer in layers:
            for module in layer.modules:
                handle = module.register_forward_hook(
                    lambda _m, args, kwargs, output, layer=layer: hook(layer, args, kwargs, output), with_kwargs=True
                )
                stack.callback(handle.remove)
        yield


def trace(head: Head, layers: Sequence[Layer], example: Batch) -> list[Layer]:
    """Run one short sequence forward, and note calls and shared inputs of each layer.

    Raises:
        UnsupportedLayerError: a layer is fed rows that are not the batch's tokens.
    """
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    short = Batch(example.index, *(x[:1] for x in (example.input_ids, example.attention, example.labels)))

    def record(layer: Layer, args: Any, kwargs: Any, _output: Tensor) -> None:
        seen[layer.name].append(_module_input(args, kwargs))

    with torch.no_grad(), layer_hooks(layers, record):
        head.rows(short)
    leaders: dict[tuple[int, ...], str] = {}
    traced = []
    for layer in layers:
        inputs = seen[layer.name]
        if not inputs:
            raise UnsupportedLayerError(
                f"layer {layer.name} cannot be handled: the model never calls it (its weight may be used by a function"
                " that hooks do not see); leave it out of modules"
            )
        for x in inputs:
            _token_rows(layer.name, x, short)
        key = (*(id(x) for x in inputs), int(layer.has_bias))
        traced.append(replace(layer, group=leaders.setdefault(key, layer.name), calls=len(inputs)))
    return traced


def _token_rows(name: str, x: Tensor, batch: Batch) -> Tensor:
    """`x` as `[B, T, d]`."""
    size, tokens = batch.input_ids.shape
    if x.shape[:-1].numel() != size * tokens:
        raise UnsupportedLayerError(
            f"layer {name} cannot be handled: it is fed {list(x.shape)} for a batch of {size} × {tokens} tokens,"
            " so its rows are not the batch's tokens (routed experts?); leave it out of modules"
        )
    return x.reshape(size, tokens, x.shape[-1])


def start_graph(output: Tensor) -> Tensor:
    """`output`, from which on autograd records; adding a zero makes it no leaf, so that it may be changed in place."""
    return output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)


@contextmanager
def graph_from_embeddings(model: nn.Module) -> Iterator[None]:
    """Record from the embeddings on: a reentrant checkpoint is differentiated only if its input is."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                handle = module.register_forward_hook(
                    lambda _m, _a, output: start_graph(output) if torch.is_grad_enabled() else None
                )
                stack.callback(handle.remove)
        yield


class Capture:
    """Delivers pairs to a consumer while batches are run.

    Args:
        head: runs the model.
        layers: traced layers.
        consume: called with the pairs of one layer, all calls of this batch together, as soon as
            their gradients are there.
    """

    def __init__(self, head: Head, layers: Sequence[Layer], consume: Callable[[Layer, list[Pair], Batch], None]):
        self._head = head
        self._layers = layers
        self._consume = consume
        self._batch: Batch | None = None
        self._waiting: dict[str, list[Pair]] = {}
        self._delivered: set[str] = set()
        self._ran = False

    def _on_forward(self, layer: Layer, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        batch = self._batch
        if batch is None or not torch.is_grad_enabled():
            return None
        a = _module_input(args, kwargs).detach()
        if not output.requires_grad:
            output = start_graph(output)
        elif output._is_view():
            # An in-place operation on a view (an activation, say) would drop its hook.
            output = output.clone()
        dtype = output.dtype

        def arrived(g: Tensor) -> None:
            a_rows, g_rows = (_token_rows(layer.name, x, batch) for x in (a, g))
            self._delivered.add(layer.name)
            pairs = self._waiting.setdefault(layer.name, [])
            pairs.append(Pair(layer, a_rows, g_rows, dtype))
            if layer.calls == 1:
                self._consume(layer, self._waiting.pop(layer.name), batch)

        output.register_hook(arrived)
        return output

    @contextmanager
    def running(self, batch: Batch) -> Iterator[Tensor]:
        """Run the model forward on `batch` and yield its loss rows; the caller backpropagates."""
        with layer_hooks(self._layers, self._on_forward):
            self._batch, self._ran = batch, True
            self._waiting.clear()
            try:
                yield self._head.rows(batch)
            finally:
                self._batch = None
                self._waiting.clear()

    def flush(self, batch: Batch) -> None:
        """After a backward pass: deliver the layers that are called several times a forward."""
        for layer in self._layers:
            pairs = self._waiting.pop(layer.name, None)
            if pairs:
                self._consume(layer, pairs, batch)

    def require_all(self) -> None:
        """After a pass with batches: raise UnsupportedLayerError for a layer whose output gradients never came."""
        missing = [layer.name for layer in self._layers if self._ran and layer.name not in self._delivered]
        if missing:
            raise UnsupportedLayerError(
                f"layer {missing[0]} cannot be handled: no gradient of its output ever arrived (it does not reach the"
                " loss, or a checkpoint hides it: use the non-reentrant kind); leave it out of modules"
            )

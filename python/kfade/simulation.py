"""What a pass over the data takes: the model is run on tensors that have shapes and no values.

Every operation's results are followed from birth to release, so the highest number of bytes alive at once, the
FLOPs and the bytes that operations read and write are counted rather than guessed, for any architecture, with
gradient checkpointing and autocast as they are. Weights are never loaded.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .capture import Capture, Pair, deterministic_mode, frozen, graph_from_embeddings, trace
from .errors import UnsupportedLayerError
from .layers import Layer, output_head
from .loss import Batch, Head, autocast


@dataclass(frozen=True)
class Footprint:
    """One batch forward and backward.

    Attributes:
        rows: rows of the loss, `[N, d]` hidden states or `[N, V]` logits.
        projects: whether rows are hidden states, and logits are made of them by chunks.
        forward_flops, backward_flops: of the model, without what is computed on its rows.
        forward_bytes, backward_bytes: read and written by operations other than products.
        after_forward: bytes alive when the loss is computed, without inputs that wait for their gradients.
        bare_peak: highest number of bytes alive at once, without those inputs and without the loss.
        held_after_forward, held_peak: the same with the inputs of all selected layers.
        held: bytes of the input of each group, by the name of its leader.
        alive: bytes alive when the gradient of each layer's output arrives, the inputs of all layers held.
    """

    rows: tuple[int, int]
    projects: bool
    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float
    after_forward: int
    bare_peak: int
    held_after_forward: int
    held_peak: int
    held: Mapping[str, int]
    alive: Mapping[str, int]


def _flash_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


def _flash_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape))


_CPU_ATTENTION: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _flash_flops,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward_flops,
}


class _Meter(TorchDispatchMode):
    """Counts FLOPs, bytes moved and bytes alive of what runs inside it."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.flops = self.moved = 0.0
        self.live = self.peak = 0
        # Weights are there before and stay: they are counted elsewhere.
        self._known = {t.untyped_storage()._cdata for t in known}
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}

    def _gone(self, key: int) -> None:
        self.live -= self._seen.pop(key)[1]

    def _born(self, value: Tensor) -> bool:
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._seen:
            return False
        size = storage.nbytes()
        self._seen[key] = (weakref.ref(storage, lambda _: self._gone(key)), size)
        self.live += size
        self.peak = max(self.peak, self.live)
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        born = sum(t.nbytes for t in results if self._born(t))
        packet = func._overloadpacket
        count = _CPU_ATTENTION.get(str(packet))
        if count is not None:
            self.flops += count(*args, **kwargs)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif born or func._schema.is_mutable:
            self.moved += born + sum(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        return result


class _Outline(Head):
    """Runs a model without values up to its loss rows, hidden states if `projects`, else logits."""

    def __init__(self, model: nn.Module, kind: str, projects: bool, device: torch.device) -> None:
        self._model, self._autocast, self._device = model, kind, device
        self._takes = set(inspect.signature(model.forward).parameters)
        body = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
        self._body = body if projects and isinstance(body, nn.Module) else None
        self.projects = self._body is not None
        self.weight = self.bias = None

    def logits(self, batch: Batch) -> Any:
        """As the model itself returns them."""
        with torch.no_grad(), autocast(self._autocast, self._device):
            return self._model(**self._inputs(batch)).logits

    def rows(self, batch: Batch) -> Tensor:
        with autocast(self._autocast, self._device):
            if self._body is not None:
                whole = self._body(**self._inputs(batch)).last_hidden_state
            else:
                whole = self._model(**self._inputs(batch)).logits
        # The last token of a sequence carries no loss.
        index = torch.arange(max(1, whole.shape[0] * (whole.shape[1] - 1)), device=self._device)
        picked: Tensor = whole.flatten(0, 1).index_select(0, index)
        return picked


@contextmanager
def _without_values(model: nn.Module, device: torch.device) -> Iterator[list[Tensor]]:
    """Within this block parameters and buffers are tensors like them without values, which are yielded; then as before.

    They stay in place between forward and backward, since a checkpointed block is run again in the latter.
    """
    made: dict[int, Tensor] = {}
    before: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None:
                    before.append((values, name, value))
                    if id(value) not in made:
                        made[id(value)] = torch.empty(value.shape, dtype=value.dtype, device=device)
    try:
        for values, name, value in before:
            values[name] = made[id(value)]
        yield list(made.values())
    finally:
        for values, name, value in before:
            values[name] = value


@contextmanager
def _data_decides() -> Iterator[None]:
    """Say in words that a model's way depends on values."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UnsupportedLayerError(
            "the model cannot be planned: what it computes depends on its data (routed experts?), and a plan has none"
            f" ({error})"
        ) from error


def _projects(model: nn.Module, layers: Sequence[Layer], kind: str, batch: Batch) -> bool:
    """Whether logits are the output projection's own output, not capped, scaled or joined by others."""
    projection = output_head(model)
    if type(projection) is not nn.Linear or any(projection in layer.modules for layer in layers):
        return False
    outputs: list[Any] = []
    handle = projection.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    try:
        logits = _Outline(model, kind, False, batch.input_ids.device).logits(batch)
    finally:
        handle.remove()
    return any(output is logits for output in outputs)


def _batch(size: int, tokens: int, device: torch.device) -> Batch:
    ids = torch.zeros(size, tokens, dtype=torch.int64, device=device)
    return Batch(0, ids, torch.ones_like(ids, dtype=torch.bool), ids)


def simulate(
    model: nn.Module, layers: Sequence[Layer], size: int, tokens: int, kind: str = "off", samples: int = 1
) -> tuple[list[Layer], Footprint]:
    """Layers with their input groups, and what one batch of `size` sequences takes, with inputs held as a fit does.

    Args:
        model: a causal language model, on any device and also on `meta`.
        layers: selected layers.
        size, tokens: shape of the batch.
        kind: `autocast` of the fit.
        samples: label samples of the fit.

    Raises:
        UnsupportedLayerError: a layer cannot be handled, or what the model does depends on its data.
    """
    device = torch.device("cpu")
    with ExitStack() as stack:
        stack.enter_context(_data_decides())
        # Constants that modules keep outside parameters and buffers have values.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        values = stack.enter_context(_without_values(model, device))
        for context in (deterministic_mode(model), frozen(model), graph_from_embeddings(model)):
            stack.enter_context(context)
        batch = _batch(size, tokens, device)
        short = _batch(1, min(tokens, 16), device)
        head = _Outline(model, kind, _projects(model, layers, kind, short), device)
        traced = trace(head, layers, short)
        bare = _run(head, values, [], batch, samples)
        held = _run(head, values, traced, batch, samples)
    if not (rows := held.rows)[0]:
        raise ValueError(f"tokens is {tokens}; a sequence must have two at least")
    return traced, Footprint(
        rows, head.projects, bare.forward_flops, bare.backward_flops, bare.forward_bytes, bare.backward_bytes,
        bare.after_forward, bare.peak, held.after_forward, held.peak, held.held, held.alive,
    )  # fmt: skip


@dataclass
class _Run:
    rows: tuple[int, int]
    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float
    after_forward: int
    peak: int
    held: dict[str, int]
    alive: dict[str, int]


def _run(head: _Outline, values: Sequence[Tensor], layers: Sequence[Layer], batch: Batch, samples: int) -> _Run:
    meter = _Meter(values)
    held: dict[str, int] = {}
    alive: dict[str, int] = {}

    def consume(layer: Layer, pairs: list[Pair], batch: Batch) -> None:
        alive[layer.name] = meter.live
        held[layer.group] = sum(pair.a.nbytes for pair in pairs)

    capture = Capture(head, layers, consume)
    with meter, capture.running(batch) as rows:
        forward = meter.flops, meter.moved, meter.live
        # A graph that is kept for a next sample is not released as backward goes.
        rows.backward(torch.empty_like(rows), retain_graph=samples > 1)
        capture.flush(batch)
        shape = (rows.shape[0], rows.shape[1])
    flops, moved, after = forward
    return _Run(shape, flops, meter.flops - flops, moved, meter.moved - moved, after, meter.peak, held, alive)

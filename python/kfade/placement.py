"""Where the state of a fit lives, and how a layer's part of it comes to the device that computes.

Accumulators, eigenvectors and Λ of all layers may take many times what a GPU has, but a batch goes through them layer
by layer, backwards. So they may live at a *home*, host memory or another GPU, and each layer's come to the model's
device just ahead of their use, and go home again where they were changed: while one layer is computed, a side stream
fetches the next and another takes back the one before. Which one is next, the batch before has shown; the first batch
fetches on demand. On the model's device are then three layers' states, however many layers there are.

This has never run on a GPU: all but the streams is tested between two places of a CPU, and the order of calls to the
streams with fakes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol, TypeVar

import torch
from kfade_kernels import PackedSymmetric
from kfade_kernels.blocks import BlockBasis, PackedBlocks
from torch import Tensor

# One that is computed with, one that is fetched and one that is taken back: a link that goes both ways at once is full.
SLOTS = 3
# Where in a slot a tensor may begin, in bytes: what an allocator would give it, so that products have the same bits.
ALIGNMENT = 512
COMPUTE, FETCH, RETURN = "compute", "fetch", "return"

Value = TypeVar("Value", bound=Tensor | PackedSymmetric | PackedBlocks | BlockBasis | None)


class Streams(Protocol):
    """Queues of work of a device, which run beside each other: `compute`, `fetch` and `return`."""

    def record(self, stream: str) -> Any:
        """An event that comes when all that was given to a stream until now is done."""

    def wait(self, stream: str, event: Any) -> None:
        """What is given to a stream from now on begins after an event."""

    def copy(self, stream: str, target: Tensor, source: Tensor) -> None:
        """Copy on a stream."""

    def finish(self, event: Any) -> None:
        """Return when an event has come."""


class _Cuda:
    """Streams of a GPU. Never run on one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = {name: torch.cuda.Stream(device) for name in (FETCH, RETURN)}

    def _stream(self, stream: str) -> Any:
        # A backward pass runs in the stream of its forward pass, which is current in its hooks.
        return self._side.get(stream) or torch.cuda.current_stream(self._device)

    def record(self, stream: str) -> Any:
        return self._stream(stream).record_event()

    def wait(self, stream: str, event: Any) -> None:
        self._stream(stream).wait_event(event)

    def copy(self, stream: str, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream(stream)):
            target.copy_(source, non_blocking=True)

    def finish(self, event: Any) -> None:
        event.synchronize()


class _InOrder:
    """A CPU has no streams: all is done when it is asked for."""

    def record(self, stream: str) -> None:
        pass

    def wait(self, stream: str, event: Any) -> None:
        pass

    def copy(self, stream: str, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def finish(self, event: Any) -> None:
        pass


def apart(device: torch.device, home: torch.device) -> bool:
    """Whether state that lives at `home` must be copied to be used on `device`."""
    return device != home


def data_of(value: Any) -> Tensor:
    """The one tensor in which a matrix of any kind has its numbers."""
    return value if isinstance(value, Tensor) else value.data


def like(value: Any, data: Tensor) -> Any:
    """A matrix of the kind of `value`, with other numbers."""
    if isinstance(value, Tensor):
        return data
    if isinstance(value, PackedSymmetric):
        return PackedSymmetric.from_packed(data, value.n)
    return (PackedBlocks.from_packed if isinstance(value, PackedBlocks) else BlockBasis)(data, value.orders)


def moved(state: Any, names: Sequence[str], device: torch.device, known: dict[int, Any]) -> dict[str, Any]:
    """What a state has under some names, on a device; what states share is copied once, by `known`."""
    found = {}
    for name in names:
        value = getattr(state, name)
        if value is not None and id(value) not in known:
            # The old one is kept with it: an address may be used again.
            known[id(value)] = value, value if data_of(value).device == device else value.to(device)
        found[name] = None if value is None else known[id(value)][1]
    return found


@dataclass
class _Slot:
    """Room on the device for what one layer has.

    Attributes:
        buffer: bytes.
        key: addresses of what was fetched into it and is not yet used.
        here: what was fetched.
        arrived: the event of its arrival.
        free: the event after which the room may be written again.
    """

    buffer: Tensor | None = None
    key: tuple[int, ...] = ()
    here: list[Any] = field(default_factory=list)
    arrived: Any = None
    free: Any = None


class Placement:
    """Where state lives and how it is used. At home on the model's device nothing is copied.

    Memory of slots is never given to another owner while a stream uses it, by events alone: no tensor needs
    `record_stream`, whose effect depends on how far the GPU has come.

    Args:
        device: of the model.
        home: where state lives while it is not used; None is `device`.
        streams: of `device`; None takes its own.

    Attributes:
        device, home: as given.
        moves: whether state is copied to be used.
    """

    def __init__(self, device: torch.device, home: torch.device | None = None, streams: Streams | None = None) -> None:
        self.device, self.home = device, device if home is None else home
        self.moves = apart(self.device, self.home)
        on_gpu = self.moves and device.type == "cuda"
        # A copy from or to pageable memory would keep the host waiting.
        self._pins = on_gpu and self.home.type == "cpu"
        self._streams = streams or (_Cuda(device) if on_gpu else _InOrder())
        # What the batch before used, and this one so far; by address, the event after which what changed is at home.
        self._before: list[tuple[Any, ...]] = []
        self._now: list[tuple[Any, ...]] = []
        self._returned: dict[int, Any] = {}
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._turn = 0

    @classmethod
    def of(cls, state_device: str | None, device: torch.device) -> Placement:
        """The one that `FitConfig.state_device` names, for a model on `device`.

        Raises:
            ValueError: there is no such device here, or the model is on a CPU and the state would be on a GPU.
        """
        if state_device is None:
            return cls(device)
        home = torch.device(state_device)
        if home.type == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if (home.index or 0) >= count:
                raise ValueError(
                    f"state_device is {state_device!r}, and there {'is' if count == 1 else 'are'} {count} CUDA"
                    f" device{'' if count == 1 else 's'} here; it must be one of them, 'cpu' or None"
                )
            if device.type != "cuda":
                raise ValueError(
                    f"state_device is {state_device!r} and the model is on {device}, which computes with the state; it"
                    " must be 'cpu' or None"
                )
            home = torch.device("cuda", torch.cuda.current_device() if home.index is None else home.index)
        return cls(device, home)

    # ---- at home

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros at home."""
        return torch.zeros(*shape, dtype=dtype, device=self.home, pin_memory=self._pins)

    def keep(self, value: Value) -> Value:
        """What was computed or read, at home; itself where it is there already."""
        if value is None or not self.moves:
            return value
        data = data_of(value)
        if data.device == self.home and (data.is_pinned() or not self._pins):
            return value
        kept = torch.empty_like(data, device=self.home, pin_memory=self._pins)
        return like(value, kept.copy_(data))  # type: ignore[no-any-return]

    def fetch(self, value: Value) -> Value:
        """A copy on the device of what is at home, without a slot, for what is used once; itself where they are one."""
        if value is None or not self.moves:
            return value
        return like(value, data_of(value).to(self.device, copy=True))  # type: ignore[no-any-return]

    # ---- in use

    @contextmanager
    def using(self, *values: Any, changes: Sequence[bool]) -> Iterator[list[Any]]:
        """What is at home, on the device within this block; calls are not nested.

        Args:
            values: tensors, packed matrices or blocks of eigenvectors; None stays None.
            changes: which of them are changed in place, and go home at the end. Nobody reads them there before
                `end_batch` has returned.

        Cost: one copy of each, and one back of what changes; none where home is the device.
        """
        if not self.moves:
            yield list(values)
            return
        slot, streams = self._arrived(values), self._streams
        changed = {data_of(v).data_ptr() for v, c in zip(values, changes, strict=True) if c and v is not None}
        self._fetch_next(changed)
        streams.wait(COMPUTE, slot.arrived)
        yield slot.here
        slot.free = streams.record(COMPUTE)
        if changed:
            streams.wait(RETURN, slot.free)
            for value, here, change in zip(values, slot.here, changes, strict=True):
                if change and value is not None:
                    streams.copy(RETURN, data_of(value), data_of(here))
            slot.free = streams.record(RETURN)
            self._returned.update(dict.fromkeys(changed, slot.free))

    def _arrived(self, values: Sequence[Any]) -> _Slot:
        """The slot in which these are, or come; whatever else was fetched in vain is forgotten."""
        key = _key(values)
        slot = next((s for s in self._slots if s.key == key), None) or self._fetched(values)
        for other in self._slots:
            other.key = ()
        self._now.append(tuple(values))
        return slot

    def _fetch_next(self, changed: set[int]) -> None:
        """Fetch what the batch before used after this, unless it is about to be changed."""
        if len(self._now) <= len(self._before):
            following = self._before[len(self._now) % len(self._before)]
            if changed.isdisjoint(_key(following)):
                self._fetched(following)

    def _fetched(self, values: Sequence[Any]) -> _Slot:
        streams = self._streams
        self._turn = (self._turn + 1) % SLOTS
        slot = self._slots[self._turn]
        tensors = [None if v is None else data_of(v) for v in values]
        sizes = [0 if t is None else -(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors]
        if slot.buffer is None or slot.buffer.numel() < sum(sizes):
            if slot.buffer is not None:
                # Side streams may still use it, and the allocator knows of the computing one alone.
                streams.finish(slot.free)
            slot.here, slot.buffer = [], None
            slot.buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
            # What the memory was before may still be in use.
            slot.free = streams.record(COMPUTE)
        streams.wait(FETCH, slot.free)
        slot.here, at = [], 0
        for value, tensor, size in zip(values, tensors, sizes, strict=True):
            slot.here.append(None if tensor is None else like(value, _room(slot.buffer, at, tensor)))
            at += size
            if tensor is not None:
                if tensor.data_ptr() in self._returned:
                    streams.wait(FETCH, self._returned[tensor.data_ptr()])
                streams.copy(FETCH, data_of(slot.here[-1]), tensor)
        slot.key, slot.arrived = _key(values), streams.record(FETCH)
        slot.free = slot.arrived
        return slot

    def end_batch(self) -> None:
        """Return when what was changed is at home. What was used is what the next batch is taken to use, in order."""
        for event in {id(event): event for event in self._returned.values()}.values():
            self._streams.finish(event)
        self._returned = {}
        self._before, self._now = self._now, []

    def clear(self) -> None:
        """Give the memory on the device back, when nothing uses it any more: the pass is over, perhaps by an error."""
        if any(slot.buffer is not None for slot in self._slots):
            for stream in (COMPUTE, FETCH, RETURN):
                self._streams.finish(self._streams.record(stream))
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._before, self._now, self._returned = [], [], {}


def _key(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(0 if value is None else data_of(value).data_ptr() for value in values)


def _room(buffer: Tensor, at: int, tensor: Tensor) -> Tensor:
    """A tensor like another one in a buffer, from a byte on; in its order of elements if that has no gaps."""
    flat = buffer[at : at + tensor.nbytes].view(tensor.dtype)
    strides = sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
    dense = all(s == prod(n for _, n in strides[:i]) for i, (s, _) in enumerate(strides))
    return flat.as_strided(tensor.shape, tensor.stride()) if dense else flat.view(tensor.shape)

"""From a batch to loss rows, and from loss rows back into the model.

Whatever the loss (sampled or empirical Fisher, forgetting, retain KL), the model is run up to the
hidden states that enter its output projection, the rows at loss positions are picked, and the
gradient on those rows is computed by chunks; then autograd goes on from there. Logits of all tokens
never exist. A model whose logits are not `hidden · weightᵀ + bias` (soft-capping, scaling, heads of
its own) is noticed by comparison, and its logits are taken as the rows instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from kfade_kernels import counter_bits, counter_uniform, sampled_cross_entropy
from kfade_kernels.sampled_cross_entropy.pytorch import rows_per_chunk
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .errors import NonFiniteError
from .layers import output_head
from .sharding import is_sharded, whole

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """One checked batch.

    Attributes:
        index: its number in the data, for messages.
        input_ids: int64 `[B, T]`.
        attention: bool `[B, T]`, True where a token is not padding.
        labels: int64 `[B, T]`, aligned with `input_ids`; -100 carries no loss.
    """

    index: int
    input_ids: Tensor
    attention: Tensor
    labels: Tensor

    @property
    def loss_mask(self) -> Tensor:
        """bool `[B, T]`: positions t whose next token carries loss and which are not padding."""
        mask = torch.zeros_like(self.attention)
        mask[:, :-1] = (self.labels[:, 1:] != IGNORE_INDEX) & self.attention[:, :-1] & self.attention[:, 1:]
        return mask

    @cached_property
    def loss_index(self) -> Tensor:
        """int64 `[N]`: the loss positions in `[B·T]`; found once, since counting them waits for the device."""
        return self.loss_mask.flatten().nonzero().squeeze(1)

    @property
    def targets(self) -> Tensor:
        """int64 `[N]`: the label of each loss position."""
        # The last position of a sequence carries no loss.
        return self.labels.flatten()[self.loss_index + 1]

    @cached_property
    def target_range(self) -> tuple[int, int]:
        """Smallest and largest label of the N > 0 loss positions; read once."""
        smallest, largest = torch.stack(self.targets.aminmax()).tolist()
        return smallest, largest

    def sequence_sums(self, values: Tensor) -> Tensor:
        """Sums `[B]` of values `[N]` of the loss positions, always in one order (`index_add_` has none on a GPU)."""
        whole = values.new_zeros(self.input_ids.numel()).index_copy_(0, self.loss_index, values)
        return whole.view(self.input_ids.shape).sum(1)

    @property
    def positions(self) -> Tensor:
        """int64 `[B, T]`: index of each token in its sequence, padding not counted."""
        return (self.attention.long().cumsum(1) - 1).clamp_(min=0)

    @cached_property
    def tokens(self) -> int:
        """Tokens that are not padding; counted once, since reading the count waits for the device."""
        return int(self.attention.sum())

    @property
    def padded(self) -> bool:
        """Whether any token is padding."""
        return self.tokens < self.attention.numel()


def check_batch(batch: Mapping[str, Tensor], index: int, device: torch.device) -> Batch:
    """Check a batch as users give it: `input_ids`, and `attention_mask` and `labels` if they differ.

    Raises:
        TypeError: it is not a mapping, or an entry is not an integer tensor.
        ValueError: an entry is missing or has another shape.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch {index} is a {type(batch).__name__}; it must be a mapping with input_ids")
    if "input_ids" not in batch:
        raise ValueError(f"batch {index} has keys {sorted(batch)}; it must have input_ids")
    ids = batch["input_ids"]
    for name in ("input_ids", "attention_mask", "labels"):
        value = batch.get(name, ids)
        if not isinstance(value, Tensor) or value.is_floating_point():
            raise TypeError(f"{name} of batch {index} must be an integer tensor")
        if value.ndim != 2 or value.shape != ids.shape:
            raise ValueError(
                f"{name} of batch {index} has shape {list(value.shape)}; it must be {list(ids.shape)} [B, T]"
            )
    if ids.numel() == 0:
        raise ValueError(f"input_ids of batch {index} has shape {list(ids.shape)}; it must hold at least one token")
    mask = batch.get("attention_mask")
    attention = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    labels = batch.get("labels")
    labels = ids.masked_fill(~attention, IGNORE_INDEX) if labels is None else labels
    return Batch(index, ids.to(device), attention.to(device), labels.to(device))


def check_batches(batches: Iterable[Mapping[str, Tensor]], device: torch.device, name: str = "batches") -> list[Batch]:
    """All batches, checked before any work.

    Raises:
        ValueError: there is none, or no position of any carries loss.
    """
    checked = [check_batch(batch, index, device) for index, batch in enumerate(batches)]
    if not checked:
        raise ValueError(f"{name} is empty; it must hold at least one batch")
    if not any(bool(batch.loss_mask.any()) for batch in checked):
        raise ValueError(f"{name} has no loss position: every label is -100 (ignored) or belongs to padding")
    return checked


def idle_batch(device: torch.device, *, attended: bool) -> Batch:
    """One token that carries no loss: what a rank runs where others still have batches.

    Args:
        device: to put it on.
        attended: whether it counts as an input. Not as one, it is padding, of which nothing is kept.
    """
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return Batch(-1, ids, torch.full_like(ids, attended, dtype=torch.bool), torch.full_like(ids, IGNORE_INDEX))


def check_targets(batch: Batch, vocabulary: int) -> None:
    """Raise ValueError unless the labels of a batch that carry loss are words of the vocabulary."""
    smallest, largest = batch.target_range if len(batch.loss_index) else (0, 0)
    if not 0 <= smallest <= largest < vocabulary:
        raise ValueError(
            f"labels of batch {batch.index} range from {smallest} to {largest};"
            f" they must be -100, or from 0 to {vocabulary - 1}"
        )


def sequence_groups(batches: Sequence[Batch], at_most: int) -> Iterator[list[Batch]]:
    """The sequences in order, as groups of batches with at most so many sequences in each group."""
    group: list[Batch] = []
    room = at_most
    for batch in batches:
        start = 0
        while start < len(batch.input_ids):
            rows = slice(start, start + room)
            part = Batch(batch.index, batch.input_ids[rows], batch.attention[rows], batch.labels[rows])
            group.append(part)
            start, room = start + len(part.input_ids), room - len(part.input_ids)
            if room == 0:
                yield group
                group, room = [], at_most
    if group:
        yield group


def sequence_keys(batch: Batch, seed: int) -> Tensor:
    """int64 `[B]`: one random stream for each sequence, from its own tokens and the seed alone.

    Sampled labels therefore do not depend on batch size, order, padding or the number of ranks: on one kind of
    device they are a function of the seed and the sequence.
    """
    uniform = counter_uniform(batch.input_ids * 2 + 1, batch.positions)
    words = (uniform.double() * 2.0**24).long() * (batch.positions * 2 + 1)
    return words.masked_fill(~batch.attention, 0).sum(1) * 1_000_003 + seed


def autocast(kind: str, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context of a configuration."""
    if kind == "off":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, kind))


@dataclass(frozen=True)
class Ignorance:
    """Outputs of a model that does not know the labels: `softmax((z − margin · e_label) / temperature)`.

    Lowering the label's logit is the target of UNDIAL (Dong et al. 2024, arXiv 2402.10052). What is left of a
    memorised position is as sure of itself as the model was of the label; the temperature takes that away.

    Attributes:
        labels: int64 `[N]`.
        margin: in nats.
        temperature: of the softmax.
        pull_back: whether rows whose label is no likelier than there are pulled to it too; else they are left alone.
    """

    labels: Tensor
    margin: float
    temperature: float
    pull_back: bool = True

    def of(self, logits: Tensor, part: slice) -> Tensor:
        """The target's logits, from the original ones `[n, V]` of some of the rows."""
        lowered = logits.clone()
        lowered[torch.arange(len(logits), device=logits.device), self.labels[part]] -= self.margin
        return lowered.div_(self.temperature)

    def counted(self, log_p: Tensor, log_q: Tensor, part: slice) -> Tensor | None:
        """Rows that are pulled to the target, bool `[n, 1]`, or None for all; log-probabilities are `[n, V]`."""
        if self.pull_back:
            return None
        labels = self.labels[part].unsqueeze(1)
        return log_p.gather(1, labels) > log_q.gather(1, labels)


class Head:
    """Runs a model up to its loss rows.

    Args:
        model: a causal language model.
        example: a batch to compare the two ways to the logits on.
        tracked: modules with hooks; an output projection among them must run itself.
        autocast: `off`, or the dtype under which the model runs (never what is computed on its rows).

    Attributes:
        weight: output projection `[V, d]`, or None when rows are logits.
        bias: its bias `[V]`.
        sharded: the model is spread over ranks, which run it together.
    """

    def __init__(
        self, model: nn.Module, example: Batch, tracked: Collection[nn.Module] = (), autocast: str = "off"
    ) -> None:
        self._model = model
        self._autocast = autocast
        self._device = example.input_ids.device
        self._takes = set(inspect.signature(model.forward).parameters)
        self._body: nn.Module | None = None
        self._from_root = False
        self.sharded = is_sharded(model)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        projection = output_head(model)
        prefix = getattr(model, "base_model_prefix", "")
        body = getattr(model, prefix, None) if prefix else None
        if (
            isinstance(projection, nn.Linear)
            and type(projection).forward is nn.Linear.forward
            and isinstance(body, nn.Module)
            and projection not in tracked
        ):
            # The shards of a model are gathered when it is called as a whole.
            self._from_root = isinstance(model, FSDPModule)
            if not self._from_root or is_sharded(body):
                self._try_projection(body, projection, example)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention.long()}
        if "position_ids" in self._takes:
            inputs["position_ids"] = batch.positions
        if "use_cache" in self._takes:
            inputs["use_cache"] = False
        return inputs

    def _try_projection(self, body: nn.Module, projection: nn.Linear, example: Batch) -> None:
        ids = example.input_ids[0][example.attention[0]][:16].unsqueeze(0)
        if ids.numel() == 0:
            return
        few = Batch(0, ids, torch.ones_like(ids, dtype=torch.bool), ids)
        with torch.no_grad(), autocast(self._autocast, self._device):
            logits = self._model(**self._inputs(few)).logits
            hidden = self._hidden(body, few)
            if hidden is None:
                return
            weight, bias = (None if p is None else whole(p.detach()) for p in (projection.weight, projection.bias))
            assert weight is not None
            ours = nn.functional.linear(
                hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
            )
        # The same product of the same numbers: only a cap, a scale or another head makes a difference.
        limit = 10 * torch.finfo(ours.dtype).eps * float(torch.linalg.vector_norm(logits.double()))
        if ours.shape == logits.shape and float((ours.double() - logits.double()).norm()) <= limit:
            self._body = body
            # In the dtype in which the model multiplies, cast once.
            dtype = ours.dtype
            self.weight = weight.to(dtype)
            self.bias = None if bias is None else bias.to(dtype)

    def _hidden(self, body: nn.Module, batch: Batch) -> Tensor | None:
        """What enters the output projection, `[B, T, d]`; None where the model does not say."""
        inputs, seen = self._inputs(batch), []
        if not self._from_root:
            return getattr(body(**inputs), "last_hidden_state", None)
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        handle = body.register_forward_hook(lambda _m, _a, output: seen.append(output))
        try:
            self._model(**inputs)
        finally:
            handle.remove()
        return getattr(seen[0], "last_hidden_state", None)

    def rows(self, batch: Batch) -> Tensor:
        """`[N, d]` hidden states, or `[N, V]` logits, at the N loss positions of a batch."""
        # Before the model is queued, since it may wait for the device.
        index = batch.loss_index
        with autocast(self._autocast, self._device):
            if self._body is not None:
                output = self._hidden(self._body, batch)
            else:
                output = self._model(**self._inputs(batch)).logits
        assert output is not None
        picked: Tensor = output.flatten(0, 1).index_select(0, index)
        return picked

    def _divided(self, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor | None]:
        """Detached rows and bias of the logits divided by a temperature."""
        x, bias = self._detached(rows), self.bias
        if temperature == 1:
            return x, bias
        return x / temperature, None if bias is None else bias / temperature

    def _detached(self, rows: Tensor) -> Tensor:
        """Rows without their graph, in the dtype of the projection."""
        return rows.detach() if self.weight is None else rows.detach().to(self.weight.dtype)

    def sampled(
        self, rows: Tensor, batch: Batch, seed: int, sample: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Labels `[N]` drawn from the softmax, gradient of `Σ −log p` on the rows, and `−log p [N]`.

        With a temperature, p is the softmax of logits divided by it.

        A label is a function of the seed, the sample, its sequence's own tokens, its position, and the kind of
        device: a GPU draws by Gumbel-max, in one pass over the words, and a CPU by inverse CDF, which needs one
        random number a row in the place of one a word.
        """
        streams = sequence_keys(batch, seed).unsqueeze(1) + 7_919 * sample
        weight = self.weight
        x, bias = self._divided(rows, temperature)
        if rows.device.type == "cpu":
            uniform = counter_uniform(streams, batch.positions).flatten()[batch.loss_index]
            found = sampled_cross_entropy(x, uniform, weight=weight, bias=bias)
        else:
            keys = counter_bits(streams, batch.positions).flatten()[batch.loss_index]
            found = sampled_cross_entropy(x, keys=keys, weight=weight, bias=bias)
        return found.labels, (found.grad / temperature).to(rows.dtype), found.nll

    def labelled(self, rows: Tensor, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """The same for the labels of the data."""
        check_targets(batch, rows.shape[1] if self.weight is None else self.weight.shape[0])
        labels = batch.targets
        x, bias = self._divided(rows, temperature)
        found = sampled_cross_entropy(x, labels=labels, weight=self.weight, bias=bias)
        return found.labels, (found.grad / temperature).to(rows.dtype), found.nll

    def kl(
        self, rows: Tensor, reference: Tensor, *, target: Ignorance | None = None, gradient: bool = True
    ) -> tuple[Tensor, Tensor]:
        """KL(q ‖ p) of each row `[N]` in nats, and its gradient on the rows.

        Args:
            rows: of the model as it is, whose outputs are p.
            reference: rows of the original model at the same positions.
            target: how q is made from the original outputs, and which rows count; others have a KL and a gradient of 0.
                None takes them as they are, and all.
            gradient: whether the gradient is wanted; without, what is returned for it is empty.
        """
        weight, bias = self.weight, self.bias
        vocabulary = rows.shape[1] if weight is None else weight.shape[0]
        divergence = torch.empty(rows.shape[0], dtype=torch.float64, device=rows.device)
        grad = torch.empty_like(rows if gradient else rows[:0])
        step = rows_per_chunk(2 * vocabulary, 0, rows.device)
        for start in range(0, rows.shape[0], step):
            part = slice(start, start + step)
            logs: list[Tensor] = []
            for x in (self._detached(reference[part]), self._detached(rows[part])):
                logits = x if weight is None else nn.functional.linear(x, weight, bias)
                logits = logits.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
                if target is not None and not logs:
                    logits = target.of(logits, part)
                logs.append(logits.log_softmax(-1))
            log_q, log_p = logs
            q = log_q.exp()
            counted = None if target is None else target.counted(log_p, log_q, part)
            divergence[part] = (q * (log_q - log_p)).sum(-1).double()
            if counted is not None:
                divergence[part] *= counted.squeeze(1)
            if not gradient:
                continue
            difference = log_p.exp_().sub_(q)
            if counted is not None:
                difference *= counted
            grad[part] = difference if weight is None else (difference.to(weight.dtype) @ weight).to(grad.dtype)
        return divergence, grad


def require_finite(value: Tensor, batch: Batch, what: str) -> None:
    """Raise NonFiniteError, naming the batch, when `value` holds a NaN or an infinity."""
    # One pass; a sum of finite values is finite far beyond any value seen here, and the rest is looked at again.
    total = value.sum(dtype=torch.promote_types(value.dtype, torch.float32))
    if not bool(torch.isfinite(total)) and not bool(torch.isfinite(value).all()):
        raise NonFiniteError(f"batch {batch.index}: {what} has a NaN or infinite value; nothing of it was accumulated")


def runs_ahead(device: torch.device) -> bool:
    """Whether the host queues work on this device without waiting for it, so that looking at a value costs a wait."""
    return device.type != "cpu"


class FiniteCheck:
    """Raises NonFiniteError for values that hold a NaN or an infinity: at once, or all together once a batch.

    Where the host runs ahead, `see` leaves a flag on the device and `raise_if_any` reads all flags with one
    wait. By then sums may hold what such a batch gave them, so whoever catches the error must drop them.

    Args:
        device: where the values are.
    """

    def __init__(self, device: torch.device) -> None:
        self._at_once = not runs_ahead(device)
        self._seen: list[tuple[Tensor, str]] = []

    def see(self, value: Tensor, batch: Batch, what: str, mask: Tensor | None = None) -> None:
        """Check `value [..., d]` of a batch, where `mask [...]` is True if there is one.

        Raises:
            NonFiniteError: it holds a NaN or an infinity, and nothing has to be waited for.
        """
        if self._at_once:
            require_finite(value if mask is None else value[mask], batch, what)
            return
        # One pass. Finite values whose sum overflows are refused too: their squares, so the factors, would overflow.
        rows = torch.isfinite(value.sum(-1, dtype=torch.promote_types(value.dtype, torch.float32)))
        finite = (rows if mask is None else rows | ~mask).all()
        self._seen.append((finite, f"batch {batch.index}: {what} has a NaN or infinite value; the fit ends here"))

    def raise_if_any(self) -> None:
        """Look at all flags since the last call.

        Raises:
            NonFiniteError: a value was not finite; the message names the first one and its batch.
        """
        seen, self._seen = self._seen, []
        flags = torch.stack([flag for flag, _ in seen]).tolist() if seen else []
        for finite, (_, message) in zip(flags, seen, strict=True):
            if not finite:
                raise NonFiniteError(message)

    def clear(self) -> None:
        """Forget all flags."""
        self._seen.clear()

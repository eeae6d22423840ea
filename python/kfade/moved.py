"""A model with a change on its weights, and what is measured on it: rows, KL, NLL, gradients and curvature products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from .capture import trained
from .config import UnlearnConfig
from .layers import Layer
from .linearise import Matrices, add_gauss_newton_products, gradient_matrices
from .loss import Batch, Head, idle_batch
from .models import device_of, state_dtype
from .progress import Stage
from .ranks import Ranks, Shares
from .sharding import gradient_divisor, is_sharded, placed_like, reshard, shard_of

# A weight, batches, and what gives the gradient of their summed loss on rows.
Part = tuple[float, Sequence[Batch], Callable[[Tensor, Batch], Tensor]]


class MovedModel:
    """The model of one run, its tracked weights, and what is measured on it.

    With several ranks each runs its share of any batches, what is measured is the sum, and of matrices by layer name
    a rank has those of the layers that it owns.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        head: Head,
        config: UnlearnConfig,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.layers, self.head, self.config = model, layers, head, config
        self.ranks = ranks or Ranks(None)
        self.owners: Mapping[str, int] = {layer.name: 0 for layer in layers}
        self.device, self.dtype = device_of(model), state_dtype(model)
        idle = idle_batch(self.device, attended=True) if is_sharded(model) else None
        self.shares = Shares(self.ranks, idle)
        reshard(model)
        self._original = {name: p.detach().clone() for layer in layers for name, p in layer.parameters().items()}

    @torch.no_grad()
    def set_change(self, change: Matrices | None) -> None:
        """Give the tracked parameters their original value plus `change`; None restores the original bits."""
        reshard(self.model)
        if change is None:
            for layer in self.layers:
                for name, p in layer.parameters().items():
                    p.copy_(self._original[name])
            return
        for layer, parts in self.delivered(change):
            for name, p in layer.parameters().items():
                part = shard_of(placed_like(parts[name], p))
                shard_of(p).copy_(shard_of(self._original[name]).to(self.dtype) + part)

    def delivered(self, matrices: Matrices) -> Iterator[tuple[Layer, dict[str, Tensor]]]:
        """Each layer with its matrix in parts by parameter name, which all ranks have, one layer at a time."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        shapes = ((layer.name, (layer.d_out, layer.width_in)) for layer in self.layers)
        spread = self.ranks.deliver(matrices, shapes, self.owners, like)
        for layer, (_, matrix) in zip(self.layers, spread, strict=True):
            yield layer, layer.split(matrix)

    @torch.no_grad()
    def references(self, batches: Iterable[Batch], stage: Stage) -> dict[int, Tensor]:
        """Loss rows of the model as it is, to measure KL from, by the batches' index."""
        rows = {}
        for batch in self.shares.mine(batches):
            rows[batch.index] = self.head.rows(batch).clone()
            stage.advance(batch.tokens)
        return rows

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch], references: Mapping[int, Tensor], stage: Stage) -> tuple[float, float]:
        """Mean KL to the references and mean NLL, nats a token."""
        divergence = nll = 0.0
        tokens = 0
        for batch in self.shares.mine(batches):
            rows = self.head.rows(batch)
            if not len(rows):
                continue
            kl, _ = self.head.kl(rows, references[batch.index], gradient=False)
            divergence += float(kl.sum())
            nll += float(self.head.labelled(rows, batch)[2].sum(dtype=torch.float64))
            tokens += rows.shape[0]
            stage.advance(batch.tokens)
        divergence, nll, total = self.ranks.sums([divergence, nll, tokens])
        return divergence / total, nll / total

    @torch.no_grad()
    def sequence_nll(self, batches: Sequence[Batch], stage: Stage) -> dict[int, Tensor]:
        """Summed NLL of each sequence `[B]`, by the batches' index, of the batches of this rank."""
        sums = {}
        for batch in self.shares.mine(batches):
            sums[batch.index] = batch.sequence_sums(self.head.labelled(self.head.rows(batch), batch)[2])
            stage.advance(batch.tokens)
        return sums

    def mean_nll(self, batches: Sequence[Batch], sums: Mapping[int, Tensor]) -> float:
        """Token mean over batches, from the sums of their sequences."""
        own = [float(sums[b.index].sum(dtype=torch.float64)) for b in self.shares.mine(batches)]
        return self.ranks.sums([sum(own)])[0] / sum(len(b.loss_index) for b in batches)

    def _tracked(self) -> AbstractContextManager[None]:
        """Only the tracked parameters take gradients; what they had in `.grad` comes back at the end."""
        reshard(self.model)
        return trained(self.model, [p for layer in self.layers for p in layer.parameters().values()])

    def gradient(self, parts: Sequence[Part], stage: Stage) -> Matrices:
        """Gradient of a weighted sum of losses, each a token mean."""
        with self._tracked():
            for weight, batches, on_rows in parts:
                tokens = sum(len(batch.loss_index) for batch in batches)
                for batch in self.shares.mine(batches):
                    rows = self.head.rows(batch)
                    grad = on_rows(rows, batch) if len(rows) else torch.zeros_like(rows)
                    rows.backward(grad * (weight / tokens))
                    stage.advance(batch.tokens)
            return self._collected()

    def gauss_newton_product(self, matrices: Matrices, batches: Sequence[Batch]) -> Matrices:
        """`G v` with the exact Gauss-Newton matrix of some batches, at the weights as they are."""
        tokens = sum(len(batch.loss_index) for batch in batches)
        change = {name: part for _, parts in self.delivered(matrices) for name, part in parts.items()}
        mine, temperature = self.shares.mine(batches), self.config.fit.temperature
        with self._tracked():
            add_gauss_newton_products(self.model, self.head, self.layers, mine, change, tokens, temperature)
            return self._collected()

    def _collected(self) -> Matrices:
        """The gradient that parameters have, summed over ranks, each layer at its owner."""
        if self.ranks.size == 1:
            return gradient_matrices(self.layers, self.dtype)
        sharded = is_sharded(self.model)
        # FSDP2 has summed already, and divided.
        factor = gradient_divisor(self.model, self.ranks.size) if sharded else 1.0
        reshard(self.model)
        collected = {}

        def each() -> Iterator[tuple[Tensor, int]]:
            for layer in self.layers:
                matrix, owner = gradient_matrices([layer], self.dtype)[layer.name], self.owners[layer.name]
                if not sharded:
                    # It is the sum when the next one is asked for.
                    yield matrix, owner
                if owner == self.ranks.rank:
                    collected[layer.name] = matrix.mul_(factor)

        self.ranks.reduce(each())
        return collected

"""One pass over data for the Fisher: forward, labels, backward, with the inputs and output gradients of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .capture import Capture, Pair, deterministic_mode
from .config import FitConfig
from .layers import Layer, select
from .loss import IGNORE_INDEX, Batch, FiniteCheck, Head, check_batches
from .models import device_of


class Collector(Protocol):
    """Takes the pairs of a pass over the data.

    Attributes:
        finite: what looks for NaN and infinities.
    """

    finite: FiniteCheck

    def __call__(self, layer: Layer, pairs: list[Pair], batch: Batch) -> None:
        """Take the pairs of one layer, batch and label sample."""

    def end_batch(self) -> None:
        """All pairs of a batch were delivered: nothing of it may be kept waiting, and NonFiniteError is due."""

    def clear(self) -> None:
        """Forget all that waits: the pass is over, perhaps by an error."""


def run_fisher(
    head: Head,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    config: FitConfig,
    collector: Collector,
    after: Callable[[Batch, int], None],
) -> None:
    """One pass over the data: forward, labels, backward, with the pairs going to `collector`.

    `after(batch, sample)` is called when all pairs of that batch and label sample were delivered.
    """
    capture = Capture(head, layers, collector)
    # FSDP2 lets go of gathered parameters in a backward pass, so that a graph serves only one.
    together = 1 if head.sharded else config.samples
    try:
        for batch in batches:
            for first in range(0, config.samples, together):
                with capture.running(batch) as rows:
                    for sample in range(first, first + together):
                        if config.fisher == "sampled":
                            _, grad, nll = head.sampled(rows, batch, config.seed, sample, config.temperature)
                        else:
                            _, grad, nll = head.labelled(rows, batch, config.temperature)
                        collector.finite.see(nll, batch, "the loss")
                        rows.backward(grad, retain_graph=sample + 1 < first + together)
                        capture.flush(batch)
                        after(batch, sample)
            collector.end_batch()
    finally:
        collector.clear()
    capture.require_all()


def loss_count(batches: Iterable[Batch], config: FitConfig) -> int:
    """T: the loss positions of all batches, times the label samples."""
    return config.samples * sum(len(batch.loss_index) for batch in batches)


def sampled_labels(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], config: FitConfig | None = None, sample: int = 0
) -> list[Tensor]:
    """The labels that `fit` draws for the sampled Fisher: int64 `[B, T]` a batch, -100 where there is no loss.

    Aligned with `input_ids` like ordinary labels, so that another library can be given the same ones.
    """
    config = config or FitConfig()
    checked = check_batches(batches, device_of(model))
    result = []
    with deterministic_mode(model), torch.no_grad():
        tracked = {module for layer in select(model, config.modules) for module in layer.modules}
        head = Head(model, checked[0], tracked, config.autocast)
        for batch in checked:
            labels = torch.full_like(batch.labels, IGNORE_INDEX)
            drawn, _, _ = head.sampled(head.rows(batch), batch, config.seed, sample, config.temperature)
            labels[:, 1:][batch.loss_mask[:, :-1]] = drawn
            result.append(labels)
    return result

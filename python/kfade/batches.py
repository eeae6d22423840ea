"""Which batches are used for what: held out, every so many of them, or in a random order again and again."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from .layers import Layer
from .loss import Batch


def split_holdout(batches: Sequence[Batch], share: float) -> tuple[list[Batch], list[Batch]]:
    """Split sequences evenly into a part to fit on and a part to measure on.

    Raises:
        ValueError: either part would have no loss position.
    """
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    seen = 0
    for batch in batches:
        held = torch.tensor(
            [math.floor((seen + i + 1) * share) > math.floor((seen + i) * share) for i in range(len(batch.input_ids))],
            device=batch.input_ids.device,
        )
        seen += len(held)
        for part, rows in zip(parts, (~held, held), strict=True):
            if bool(rows.any()):
                part.append(Batch(batch.index, batch.input_ids[rows], batch.attention[rows], batch.labels[rows]))
    for name, part in zip(("to fit on", "to measure KL on"), parts, strict=True):
        if not any(bool(batch.loss_mask.any()) for batch in part):
            raise ValueError(
                f"retain has {seen} sequences and holdout is {share}: no loss position is left {name};"
                " give more retain sequences or another holdout"
            )
    return parts


def as_batches(batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Checked batches as the mappings that `fit` takes."""
    return [{"input_ids": b.input_ids, "attention_mask": b.attention.long(), "labels": b.labels} for b in batches]


def cycled(batches: Sequence[Batch], count: int, seed: str) -> list[Batch]:
    """So many batches: all of them in a random order, and again in another."""
    order = random.Random(seed)
    picked: list[Batch] = []
    while len(picked) < count:
        picked += order.sample(batches, len(batches))
    return picked[:count]


def labelled_tokens(batches: Sequence[Batch]) -> list[int]:
    """Of each batch that has any."""
    return [count for count in (len(batch.loss_index) for batch in batches) if count]


def spread(batches: Sequence[Batch], sequences: int) -> list[Batch]:
    """Every so many of the batches, of about so many sequences together; all if there are fewer."""
    total = sum(len(batch.input_ids) for batch in batches)
    stride = max(1, total // sequences)
    return list(batches[::stride])


def enough(batches: Sequence[Batch], layers: Sequence[Layer], ratio: float | None) -> list[Batch]:
    """Every so many of the batches, with about so many tokens for each dimension of the largest factor together."""
    if ratio is None:
        return list(batches)
    needed = ratio * max(max(layer.d_out, layer.width_in) for layer in layers)
    stride = max(1, int(sum(batch.tokens for batch in batches) // needed))
    return list(batches[::stride])

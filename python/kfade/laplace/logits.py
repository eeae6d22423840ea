"""Logits of some rows at a time, as sums of products that are never made whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from kfade_kernels.sampled_cross_entropy.pytorch import rows_per_chunk
from torch import Tensor, nn

from ..calibration import Mixture
from ..loss import Batch, Head, check_targets


class Term(NamedTuple):
    """A part `rows · weightᵀ + bias` of logits; the rows themselves where there is no weight."""

    rows: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    def of(self, part: slice, dtype: torch.dtype) -> Tensor:
        rows = self.rows[part]
        if self.weight is None:
            return rows.to(dtype)
        return nn.functional.linear(rows.to(self.weight.dtype), self.weight, self.bias).to(dtype)


def vocabulary_size(head: Head, batches: Sequence[Batch]) -> int:
    """V; ValueError where a label is outside."""
    if head.weight is None:
        few = Batch(0, *(x[:1] for x in (batches[0].input_ids, batches[0].attention, batches[0].labels)))
        with torch.no_grad():
            size = head.rows(few).shape[1]
    else:
        size = head.weight.shape[0]
    for batch in batches:
        check_targets(batch, size)
    return size


def chunks(terms: Sequence[Term], rows: int, vocabulary: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Logits of a few rows at a time, at least float32."""
    step = rows_per_chunk(2 * vocabulary, 0, terms[0].rows.device)
    for first in range(0, rows, step):
        part = slice(first, min(rows, first + step))
        logits = terms[0].of(part, dtype)
        for term in terms[1:]:
            logits = logits + term.of(part, dtype)
        yield part, logits


def add_logits(
    mixture: Mixture, start: int, terms: Sequence[Term], rows: int, vocabulary: int, dtype: torch.dtype
) -> int:
    """Add one model's logits of a batch, whose rows begin at `start`; returns where those of the next one do."""
    for part, logits in chunks(terms, rows, vocabulary, dtype):
        mixture.add(slice(start + part.start, start + part.stop), logits)
    return start + rows


def candidate_logits(
    term: Term, listed: Sequence[int], count: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The tokens that are asked about at each row, and their logits, `[n, C]`."""
    rows = len(term.rows)
    tokens = torch.tensor(listed or [0] * count, device=term.rows.device).expand(rows, count).clone()
    values = torch.empty(rows, count, dtype=dtype, device=term.rows.device)
    for part, logits in chunks([term], rows, vocabulary, dtype):
        if not listed:
            tokens[part] = logits.topk(count, dim=1).indices
        values[part] = logits.gather(1, tokens[part])
    return tokens, values

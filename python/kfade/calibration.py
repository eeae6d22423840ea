"""Predictive distributions over the next token, averaged over several models, and how well they are calibrated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor


class Calibration(NamedTuple):
    """A reliability diagram: predictions in bins of equal width by their confidence, `[bins]` each, float64.

    Attributes:
        counts: predictions in the bin.
        confidence: their mean confidence; NaN where there is none.
        accuracy: the share of them that is right; NaN where there is none.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


@dataclass
class Predictive:
    """The mean `p̄` of the predictive distributions p_s of S models at each loss position; entropies in nats.

    All `[N]` and on the CPU, position by position: batch by batch, sequence by sequence, from left to right.

    Attributes:
        labels: the token that follows, int64.
        log_probabilities: `log p̄(label)`.
        predicted: the most probable token, int64.
        confidence: its probability.
        squares: `Σ_c p̄_c²`.
        total: entropy of p̄.
        aleatoric: mean entropy of the p_s: what the models agree to be uncertain about.
    """

    labels: Tensor = field(repr=False)
    log_probabilities: Tensor = field(repr=False)
    predicted: Tensor = field(repr=False)
    confidence: Tensor = field(repr=False)
    squares: Tensor = field(repr=False)
    total: Tensor = field(repr=False)
    aleatoric: Tensor = field(repr=False)

    @property
    def epistemic(self) -> Tensor:
        """The mutual information of token and weights, `total - aleatoric`: at most log S; below 0 only by rounding."""
        return (self.total - self.aleatoric).clamp(min=0)

    def nll(self) -> float:
        """Mean negative log-probability of the labels, in nats a token."""
        return -float(self.log_probabilities.mean(dtype=torch.float64))

    def accuracy(self) -> float:
        """The share of positions whose most probable token is the label."""
        return float((self.predicted == self.labels).double().mean())

    def brier(self) -> float:
        """Mean Brier score `Σ_c (p̄_c − [c is the label])²`, from 0 to 2 (Brier 1950)."""
        return float((self.squares.double() - 2 * self.log_probabilities.double().exp() + 1).mean())

    def calibration(self, bins: int = 15) -> Calibration:
        """Confidence and accuracy in bins of equal width.

        Raises:
            TypeError, ValueError: `bins` is not a whole number of at least 1.
        """
        if isinstance(bins, bool) or not isinstance(bins, int):
            raise TypeError(f"bins is {bins!r}; it must be an integer")
        if bins < 1:
            raise ValueError(f"bins is {bins}; it must be at least 1")
        confidence = self.confidence.double()
        place = (confidence * bins).long().clamp(max=bins - 1)
        right = (self.predicted == self.labels).double()
        counts, sums, rights = (
            torch.zeros(bins, dtype=torch.float64).index_add_(0, place, x)
            for x in (torch.ones_like(confidence), confidence, right)
        )
        return Calibration(counts, sums / counts, rights / counts)

    def ece(self, bins: int = 15) -> float:
        """Expected calibration error: `Σ_bins |confidence − accuracy|`, weighted by counts (Naeini et al. 2015).

        Raises:
            TypeError, ValueError: as `calibration`.
        """
        counts, confidence, accuracy = self.calibration(bins)
        return float(((confidence - accuracy).abs() * counts).nansum() / counts.sum())

    @classmethod
    def joined(cls, parts: Sequence[Predictive]) -> Predictive:
        """The positions of several, one after the other."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class Mixture:
    """Adds up the softmax of S models' logits at n rows; holds `[n, V]`.

    Args:
        labels: int64 `[n]`.
        vocabulary: V.
        dtype: of the sums, at least float32.
    """

    def __init__(self, labels: Tensor, vocabulary: int, dtype: torch.dtype) -> None:
        self._labels = labels
        self._sum = torch.zeros(len(labels), vocabulary, dtype=dtype, device=labels.device)
        self._entropy = self._sum.new_zeros(len(labels))
        self._at_label = self._sum.new_full((len(labels),), -math.inf)

    def add(self, rows: slice, logits: Tensor) -> None:
        """One model's logits `[·, V]` of some rows."""
        log_p = logits.log_softmax(-1)
        # A sum of probabilities may be 0 where a sum of their logarithms is not.
        label = log_p.gather(1, self._labels[rows].unsqueeze(1)).squeeze(1)
        self._at_label[rows] = torch.logaddexp(self._at_label[rows], label)
        p = log_p.exp_()
        self._sum[rows] += p
        self._entropy[rows] += torch.special.entr(p).sum(-1)

    def mean(self, models: int) -> Predictive:
        """The predictive distribution after that many models were added to every row."""
        p = self._sum / models
        confidence, predicted = p.max(-1)
        found = (
            self._labels,
            self._at_label - math.log(models),
            predicted,
            confidence,
            p.square().sum(-1),
            torch.special.entr(p).sum(-1),
            self._entropy / models,
        )
        return Predictive(*(x.cpu() for x in found))

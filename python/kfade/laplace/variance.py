"""Variances of logits under the linearised model: of the output projection's weights, and of those below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from kfade_kernels.precision import float32_products
from torch import Tensor

from ..capture import Pair, rows_of
from ..layers import Layer
from ..loss import Batch


class Basis(NamedTuple):
    """A layer's posterior: Q_S and Q_A (None for the identity), and the variances v `[d_out, d_in (+ 1)]` there."""

    q_out: Tensor | None
    q_in: Tensor | None
    variances: Tensor


def head_variance(basis: Basis, h: Tensor, tokens: Tensor) -> Tensor:
    """`Var(f_c) = Σ_ij (Q_S[c, i])² (Q_Aᵀ h)_j² v_ij` of logits `f = W h`.

    Args:
        basis: of W `[V, d]`.
        h: rows `[n, d]`, with a last column of ones if there is a bias.
        tokens: c, int64 `[n, C]`.

    Returns:
        `[n, C]`. Cost: `2·V·d` FLOPs a word of the vocabulary that is asked for anywhere.
    """
    asked, place = tokens.unique(return_inverse=True)
    with float32_products():
        by_word = basis.variances[asked] if basis.q_out is None else basis.q_out[asked].square() @ basis.variances
        squares = (h if basis.q_in is None else h @ basis.q_in).square()
        result = squares.new_empty(tokens.shape)
        for c in range(tokens.shape[1]):
            result[:, c] = (squares * by_word[place[:, c]]).sum(1)
    return result


def gradient_variance(basis: Basis, rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`Σ_ij (Q_Sᵀ G Q_A)_ij² v_ij`: the variance of what has the gradient `G = Σ gᵀ a` on the weights.

    Args:
        basis: of the weights.
        rows: pairs g `[T, d_out]`, a `[T, d_in (+ 1)]`.
    """
    total = torch.zeros_like(basis.variances)
    with float32_products():
        for g, a in rows:
            rotated = g if basis.q_out is None else g @ basis.q_out
            total.addmm_(rotated.T, a if basis.q_in is None else a @ basis.q_in)
    return (total.square_() * basis.variances).sum()


class Jacobians:
    """Takes the gradients of one logit a sequence, layer by layer, and adds up the variances that they give.

    Args:
        bases: the posterior of each layer that gives gradients, by its name.
        dtype: of the products.
        device: where the gradients are.
    """

    def __init__(self, bases: Mapping[str, Basis], dtype: torch.dtype, device: torch.device) -> None:
        self._bases, self._dtype = bases, dtype
        self._sequences: list[int] = []
        self._sums = torch.zeros(0, dtype=dtype, device=device)

    def begin(self, sequences: Tensor, number: int) -> None:
        """Expect gradients of some sequences of a batch of that many; those of the others are 0."""
        self._sequences = sequences.tolist()
        self._sums = self._sums.new_zeros(number)

    def found(self) -> Tensor:
        """The variances of the expected sequences."""
        return self._sums[self._sequences]

    def __call__(self, layer: Layer, pairs: list[Pair], batch: Batch) -> None:
        calls = [rows_of(pair, batch, self._dtype) for pair in pairs]
        if layer.has_bias:
            calls = [(g, torch.cat([a, a.new_ones(*a.shape[:2], 1)], dim=2)) for g, a in calls]
        for n in self._sequences:
            self._sums[n] += gradient_variance(self._bases[layer.name], [(g[n], a[n]) for g, a in calls])


def one_each(rows: Tensor, weight: Tensor | None, tokens: Tensor, batch: Batch) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Each candidate of each loss position once, a position of every sequence at a time.

    Yields which rows, which candidate, and the gradient of the sum of its logits there with respect to all rows.
    """
    sequence = batch.loss_index // batch.input_ids.shape[1]
    counts = torch.bincount(sequence, minlength=len(batch.input_ids))
    starts = counts.cumsum(0) - counts
    for turn in range(int(counts.max())):
        at = (starts + turn)[counts > turn]
        for c in range(tokens.shape[1]):
            gradient = torch.zeros_like(rows)
            if weight is None:
                gradient[at, tokens[at, c]] = 1
            else:
                gradient[at] = weight[tokens[at, c]].to(rows.dtype)
            yield at, c, gradient

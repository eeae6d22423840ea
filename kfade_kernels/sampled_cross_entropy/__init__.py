"""`sampled_cross_entropy`: labels from the model's own softmax, and the gradient they give."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments as check
from ..dispatch import Backend, declare
from . import pytorch, reference


class CrossEntropy(NamedTuple):
    """Result of `sampled_cross_entropy`: labels `[N]`, gradient as `x`, negative log-likelihood `[N]`."""

    labels: Tensor
    grad: Tensor
    nll: Tensor


def _prepare(
    x: Tensor,
    uniform: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    chunk_rows: int = 0,
) -> tuple[Any, ...]:
    check.tensor("x", x, ndim=(2,))
    if (uniform is None) == (labels is None):
        raise ValueError(
            "uniform and labels are both given or both absent; exactly one of them must be given"
            " (uniform samples labels, labels takes them as they are)"
        )
    vocabulary = x.shape[1]
    if weight is not None:
        check.tensor("weight", weight, dtypes=(x.dtype,), ndim=(2,))
        check.same_device("weight", weight, "x", x.device)
        vocabulary = weight.shape[0]
        check.shape("weight", weight, [vocabulary, x.shape[1]], "[V, d] with d as the last dimension of x")
    if bias is not None:
        if weight is None:
            raise ValueError("bias is given without weight; it must come with the weight that it belongs to")
        check.tensor("bias", bias, dtypes=(x.dtype,), ndim=(1,))
        check.shape("bias", bias, [vocabulary], "one entry for each row of weight")
        check.same_device("bias", bias, "x", x.device)
    if uniform is not None:
        check.tensor("uniform", uniform, dtypes=check.STATES, ndim=(1,))
        check.shape("uniform", uniform, [x.shape[0]], "one number in [0, 1) for each row of x")
        check.same_device("uniform", uniform, "x", x.device)
    if labels is not None:
        check.tensor("labels", labels, dtypes=(torch.int64,), ndim=(1,))
        check.shape("labels", labels, [x.shape[0]], "one label for each row of x")
        check.same_device("labels", labels, "x", x.device)
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 0:
        raise ValueError(f"chunk_rows is {chunk_rows!r}; it must be a number of rows, or 0 to choose one")
    return x, weight, bias, uniform, labels, chunk_rows


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    uniform: Tensor | None,
    labels: Tensor | None,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(x.shape[0], dtype=torch.int64, device=x.device),
        torch.empty_like(x),
        torch.empty(x.shape[0], dtype=reference.compute_dtype(x.dtype), device=x.device),
    )


_sample = declare(
    "sampled_cross_entropy",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? uniform, Tensor? labels, int chunk_rows)"
    " -> (Tensor labels, Tensor grad, Tensor nll)",
    _prepare,
    _fake,
    [Backend("pytorch", pytorch.run, pytorch.refuses, pytorch.configuration), Backend("reference", reference.run)],
)


def sampled_cross_entropy(
    x: Tensor,
    uniform: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    chunk_rows: int = 0,
) -> CrossEntropy:
    """Draw one label a row from the softmax, and give the gradient of its cross-entropy.

    The gradient of `Σ_i −log p(ŷ_i)` is `p − onehot(ŷ)` on logits. With `weight`, x holds the hidden
    states before the output projection, the logits exist only by chunks of rows, and the gradient
    returned is the one on x: memory does not grow with rows × vocabulary.

    Args:
        x: logits `[N, V]`, or hidden states `[N, d]` when `weight` is given; any float dtype.
        uniform: numbers in [0, 1), `[N]`; row i gets the first word whose cumulative probability
            exceeds `uniform[i]`. The caller owns the randomness (see `counter_uniform`), so equal
            numbers give equal labels whatever the chunks, batches or ranks.
        labels: int64 `[N]` in [0, V), instead of `uniform`: the empirical Fisher, or plain training.
        weight: output projection `[V, d]`, dtype of x.
        bias: its bias `[V]`.
        chunk_rows: rows of one chunk; 0 keeps a chunk of logits within 64 MiB.

    Returns:
        `labels [N]` int64, `grad` (shape and dtype of x), `nll [N]` in float32 (float64 for float64 x).

    Raises:
        TypeError: an argument is not of its type or dtype.
        ValueError: shapes or devices do not agree, or not exactly one of `uniform` and `labels` is given.
    """
    return CrossEntropy(*_sample(*_prepare(x, uniform, labels, weight=weight, bias=bias, chunk_rows=chunk_rows)))


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014) on int64, whose arithmetic wraps."""

    def shift(v: Tensor, bits: int) -> Tensor:
        return (v >> bits) & ((1 << (64 - bits)) - 1)

    z = (z ^ shift(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shift(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ shift(z, 31)


def counter_uniform(keys: Tensor, counters: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) that depend on nothing but a key and a counter.

    Args:
        keys: int64, any shape: what the stream belongs to (a sequence, a seed).
        counters: int64, broadcast against `keys`: the position in the stream.

    Returns:
        float32, 24 random bits each.
    """
    golden = -0x61C8864680B583EB
    bits = _mix(_mix(keys + golden) + counters * golden)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24

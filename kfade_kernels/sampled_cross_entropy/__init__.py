"""`sampled_cross_entropy`: labels from the model's own softmax, and the gradient they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments as check
from ..dispatch import Backend, Derivative, declare
from . import pytorch, reference, triton
from .noise import counter_bits, counter_uniform, gumbel_noise

__all__ = ["CrossEntropy", "counter_bits", "counter_uniform", "gumbel_noise", "sampled_cross_entropy"]


class CrossEntropy(NamedTuple):
    """Result of `sampled_cross_entropy`: labels `[N]`, gradient as `x`, negative log-likelihood `[N]`."""

    labels: Tensor
    grad: Tensor
    nll: Tensor


def _prepare(
    x: Tensor,
    uniform: Tensor | None = None,
    labels: Tensor | None = None,
    keys: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    chunk_rows: int = 0,
) -> tuple[Any, ...]:
    check.tensor("x", x, ndim=(2,))
    choices = {"uniform": uniform, "labels": labels, "keys": keys}
    given = [name for name, value in choices.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{' and '.join(given) or 'nothing'} is given of uniform, labels and keys; it must be exactly one of them"
            " (uniform and keys sample labels, labels takes them as they are)"
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
    if keys is not None:
        check.tensor("keys", keys, dtypes=(torch.int64,), ndim=(1,))
        check.shape("keys", keys, [x.shape[0]], "one random key for each row of x")
        check.same_device("keys", keys, "x", x.device)
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 0:
        raise ValueError(f"chunk_rows is {chunk_rows!r}; it must be a number of rows, or 0 to choose one")
    return x, weight, bias, uniform, labels, keys, chunk_rows


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    uniform: Tensor | None,
    labels: Tensor | None,
    keys: Tensor | None,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(x.shape[0], dtype=torch.int64, device=x.device),
        torch.empty_like(x),
        torch.empty(x.shape[0], dtype=reference.compute_dtype(x.dtype), device=x.device),
    )


def _save(ctx: Any, arguments: Sequence[Any], result: tuple[Tensor, Tensor, Tensor]) -> None:
    labels, grad, _ = result
    ctx.mark_non_differentiable(labels, grad)
    ctx.save_for_backward(grad)


def _backward(ctx: Any, _needs: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The labels being what they are, `nll` has the gradient that the operation returned."""
    if torch.is_grad_enabled():
        raise ValueError(
            "kfade_kernels.sampled_cross_entropy: a second derivative is asked for; the operation has the first alone:"
            " leave out create_graph"
        )
    (grad,), along = ctx.saved_tensors, grads[2]
    return [None if along is None else (grad.to(along.dtype) * along.unsqueeze(1)).to(grad.dtype)]


_sample = declare(
    "sampled_cross_entropy",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? uniform, Tensor? labels, Tensor? keys, int chunk_rows)"
    " -> (Tensor labels, Tensor grad, Tensor nll)",
    _prepare,
    _fake,
    [
        Backend("triton", triton.run, triton.refuses, triton.configuration),
        Backend("pytorch", pytorch.run, pytorch.refuses, pytorch.configuration),
        Backend("reference", reference.run),
    ],
    derivative=Derivative(("x",), _save, _backward),
)


def sampled_cross_entropy(
    x: Tensor,
    uniform: Tensor | None = None,
    labels: Tensor | None = None,
    keys: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    chunk_rows: int = 0,
) -> CrossEntropy:
    """Draw one label a row from the softmax, and give the gradient of its cross-entropy.

    The gradient of `Σ_i −log p(ŷ_i)` is `p − onehot(ŷ)` on logits. With `weight`, x holds the hidden
    states before the output projection, the logits exist only by chunks of rows, and the gradient
    returned is the one on x: memory does not grow with rows × vocabulary.

    Exactly one of `uniform`, `keys` and `labels` chooses the labels. The caller owns the randomness: equal
    numbers give equal labels whatever the chunks, batches, ranks or backend, as long as the logits round alike.

    Args:
        x: logits `[N, V]`, or hidden states `[N, d]` when `weight` is given; any float dtype.
        uniform: numbers in [0, 1), `[N]`; row i gets the first word whose cumulative probability
            exceeds `uniform[i]`: cheap on a CPU. See `counter_uniform`.
        labels: int64 `[N]` in [0, V), instead of a sample: the empirical Fisher, or plain training.
        keys: int64 `[N]`, random bits that should differ from row to row (see `counter_bits`); row i gets
            the word with the largest sum of logit and `gumbel_noise(keys[i], word)`, the lowest of equals: one
            pass over words, cheap on a GPU. The sum is in float32 (float64 for float64 x).
        weight: output projection `[V, d]`, dtype of x.
        bias: its bias `[V]`.
        chunk_rows: rows of one chunk; 0 keeps a chunk of logits within 64 MiB (256 MiB on a GPU, where Triton's
            kernels take the vocabulary in chunks too).

    Returns:
        `labels [N]` int64, `grad` (shape and dtype of x), `nll [N]` in float32 (float64 for float64 x). A word
        whose logit is -inf is never drawn; a row that holds a NaN gives a gradient of NaN.

    Raises:
        TypeError: an argument is not of its type or dtype.
        ValueError: shapes or devices do not agree, not exactly one of `uniform`, `labels` and `keys` is given, or
            another argument than x requires a gradient.

    Autograd goes once through `nll` to x, with the labels held fixed; to it `labels` and `grad` are constants.
    """
    return CrossEntropy(*_sample(*_prepare(x, uniform, labels, keys, weight=weight, bias=bias, chunk_rows=chunk_rows)))

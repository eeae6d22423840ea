"""`sampled_cross_entropy` in PyTorch: a few hundred rows at a time, in one reused block of logits.

A uniform finds its word in two steps: the probabilities are summed in blocks of `BLOCK` words, the uniform
picks a block, and only that block is scanned. Keys cost the noise of every word in int64 arithmetic, several
times the time of all the rest and about six blocks of temporaries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .noise import vocabulary_noise
from .reference import compute_dtype

BLOCK = 256
# Of float32 logits. Each chunk reads the whole output projection, which few rows do not make up for on a GPU.
CHUNK_BYTES, GPU_CHUNK_BYTES = 64 << 20, 256 << 20


def rows_per_chunk(vocabulary: int, chunk_rows: int, device: torch.device) -> int:
    """Rows of one chunk: as asked, or what keeps a float32 block of logits within the bytes of a chunk there."""
    size = GPU_CHUNK_BYTES if device.type == "cuda" else CHUNK_BYTES
    return chunk_rows if chunk_rows > 0 else max(16, size // (4 * vocabulary))


def _sample(p: Tensor, uniform: Tensor, smallest: float) -> Tensor:
    """Labels `[N]` from probabilities `[N, V]` of at least `smallest`, whose sum may miss 1 by rounding."""
    rows, vocabulary = p.shape
    whole = vocabulary // BLOCK * BLOCK
    sums = p[:, :whole].reshape(rows, -1, BLOCK).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, p[:, whole:].sum(-1, keepdim=True)], dim=-1)
    ends = sums.cumsum(-1)
    # A uniform of 0 must not pick a word whose probability was only raised to `smallest`.
    target = (uniform.to(p.dtype).unsqueeze(-1) * ends[:, -1:]).clamp_(min=2 * vocabulary * smallest)
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[-1] - 1)
    before = torch.where(block > 0, ends.gather(-1, (block - 1).clamp(min=0)), 0.0)
    word = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = p.gather(-1, word.clamp(max=vocabulary - 1)).masked_fill_(word >= vocabulary, 0.0)
    step = torch.searchsorted(before + inside.cumsum(-1), target, right=True).clamp_(max=BLOCK - 1)
    return (block * BLOCK + step).squeeze(-1).clamp_(max=vocabulary - 1)


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    uniform: Tensor | None,
    labels: Tensor | None,
    keys: Tensor | None,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    vocabulary = x.shape[1] if weight is None else weight.shape[0]
    dtype = compute_dtype(x.dtype)
    # Subnormal numbers, here or in products with the weight, are tenfold slower; these are far below rounding.
    floor = 0.7 * math.log(torch.finfo(dtype).tiny)
    out_labels = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    out_nll = torch.empty(x.shape[0], dtype=dtype, device=x.device)
    grad = torch.empty_like(x)
    step = rows_per_chunk(vocabulary, chunk_rows, x.device)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        logits = x[rows] if weight is None else torch.nn.functional.linear(x[rows], weight, bias)
        log_p = torch.log_softmax(logits, -1, dtype=dtype)
        given = None if labels is None else labels[rows].unsqueeze(-1)
        if keys is not None:
            given = vocabulary_noise(keys[rows], vocabulary, dtype).add_(logits).argmax(-1, keepdim=True)
        picked = None if given is None else log_p.gather(-1, given)
        p = log_p.clamp_(min=floor).exp_()
        if given is None:
            assert uniform is not None
            given = _sample(p, uniform[rows], math.exp(floor)).unsqueeze(-1)
            picked = p.gather(-1, given).log()
        assert picked is not None
        out_labels[rows], out_nll[rows] = given.squeeze(-1), -picked.squeeze(-1)
        p.scatter_add_(-1, given, -torch.ones_like(picked))
        grad[rows] = p if weight is None else p.to(weight.dtype) @ weight
    return out_labels, grad, out_nll


def refuses(x: Tensor, *_: object) -> str | None:
    return None if x.device.type in ("cpu", "cuda") else f"x is on {x.device}"


def configuration(
    x: Tensor, weight: Tensor | None, bias: object, uniform: object, labels: object, keys: object, chunk_rows: int
) -> str:
    vocabulary = x.shape[1] if weight is None else weight.shape[0]
    return f"chunks of {rows_per_chunk(vocabulary, chunk_rows, x.device)} rows × {vocabulary} words"

"""`sampled_cross_entropy` on a CPU: a few hundred rows at a time, in one reused block of logits.

The sample is found in two steps: the probabilities are summed in blocks of `BLOCK` words (the same
pass yields the normaliser), the uniform picks a block, and only that block is scanned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import compute_dtype

BLOCK = 256
CHUNK_BYTES = 64 << 20


def rows_per_chunk(vocabulary: int, chunk_rows: int) -> int:
    """Rows of one chunk: as asked, or what keeps a float32 block of logits within `CHUNK_BYTES`."""
    return chunk_rows if chunk_rows > 0 else max(16, CHUNK_BYTES // (4 * vocabulary))


def _sample(exponentials: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Labels `[N]` and normalisers `[N]` from unnormalised probabilities `[N, V]`."""
    rows, vocabulary = exponentials.shape
    whole = vocabulary // BLOCK * BLOCK
    sums = exponentials[:, :whole].reshape(rows, -1, BLOCK).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, exponentials[:, whole:].sum(-1, keepdim=True)], dim=-1)
    ends = sums.cumsum(-1)
    total = ends[:, -1]
    target = (uniform.to(total.dtype) * total).unsqueeze(-1)
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[-1] - 1)
    before = torch.where(block > 0, ends.gather(-1, (block - 1).clamp(min=0)), 0.0)
    word = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = exponentials.gather(-1, word.clamp(max=vocabulary - 1)).masked_fill_(word >= vocabulary, 0.0)
    step = torch.searchsorted(before + inside.cumsum(-1), target, right=True).clamp_(max=BLOCK - 1)
    return (block * BLOCK + step).squeeze(-1).clamp_(max=vocabulary - 1), total


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    uniform: Tensor | None,
    labels: Tensor | None,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    vocabulary = x.shape[1] if weight is None else weight.shape[0]
    dtype = compute_dtype(x.dtype)
    out_labels = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    out_nll = torch.empty(x.shape[0], dtype=dtype, device=x.device)
    grad = torch.empty_like(x)
    step = rows_per_chunk(vocabulary, chunk_rows)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        block = x[rows] if weight is None else torch.nn.functional.linear(x[rows], weight, bias)
        # The block is ours to overwrite, unless it is still the caller's logits.
        block = block.to(dtype, copy=weight is None)
        largest = block.amax(-1)
        if labels is None:
            exponentials = block.sub_(largest.unsqueeze(-1)).exp_()
            assert uniform is not None
            chosen, total = _sample(exponentials, uniform[rows])
            column = chosen.unsqueeze(-1)
            nll = total.log() - exponentials.gather(-1, column).squeeze(-1).log()
        else:
            chosen = labels[rows]
            column = chosen.unsqueeze(-1)
            picked = block.gather(-1, column).squeeze(-1)
            exponentials = block.sub_(largest.unsqueeze(-1)).exp_()
            total = exponentials.sum(-1)
            nll = total.log() + largest - picked
        out_labels[rows], out_nll[rows] = chosen, nll
        probabilities = exponentials.div_(total.unsqueeze(-1))
        probabilities.scatter_add_(-1, column, -torch.ones_like(probabilities[:, :1]))
        if weight is None:
            grad[rows] = probabilities
        else:
            grad[rows] = probabilities.to(weight.dtype) @ weight
    return out_labels, grad, out_nll


def refuses(x: Tensor, *_: object) -> str | None:
    return None if x.device.type == "cpu" else f"x is on {x.device}"


def configuration(
    x: Tensor, weight: Tensor | None, bias: object, uniform: object, labels: object, chunk_rows: int
) -> str:
    vocabulary = x.shape[1] if weight is None else weight.shape[0]
    return f"chunks of {rows_per_chunk(vocabulary, chunk_rows)} rows × {vocabulary} words"

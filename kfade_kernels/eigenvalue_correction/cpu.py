"""`eigenvalue_correction_` in C++ (`csrc/cpu/squares.cpp`): a sequence's product is squared in registers.

Tokens are rotated first, by PyTorch (see `rotation`). FLOPs of the rest: `2·N·d_out·d_in`. Bytes: tokens once, Λ
read and written once for every chunk of sequences. Memory: a chunk of both sides, in 32-bit cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu_support as support
from .. import native
from ..rotation import rotate, rotates_tokens
from ..rotation.reference import result_dtype
from ..triton_support import rows_of
from .pytorch import TILE_ELEMENTS, describe_sides
from .reference import sequences, tokens_of

# Into a Λ that is one tile to PyTorch, float32 gains 1.4 with 32 tokens a sequence, and nothing from so many on.
MANY_TOKENS = 256


def _in_pairs(g: Tensor, a: Tensor, q_out: Tensor | None, q_in: Tensor | None) -> bool:
    """Whether both sides are bfloat16 once they are rotated, and multiplied in pairs."""
    return support.in_pairs([x.dtype if q is None else result_dtype(x, q) for x, q in ((g, q_out), (a, q_in))])


def run(
    lam: Tensor,
    g: Tensor,
    a: Tensor,
    q_out: Tensor | None,
    q_in: Tensor | None,
    mask: Tensor | None,
    ones_column: bool,
    cu_seqlens: Tensor | None,
) -> None:
    parts = sequences(g.shape[0], g.shape[:-1].numel(), cu_seqlens)
    if q_out is not None:
        g = rotate(g, q_out)
    if q_in is not None:
        a, ones_column = rotate(a, q_in, ones_column=ones_column), False
    left, right, out = (rows_of(g), False), (rows_of(a), ones_column), lam
    if out.stride(1) != 1:
        left, right, out = right, left, out.T
    # A single row lies where it lies, whatever its stride says.
    stride = out.stride(0) if out.shape[0] > 1 else out.shape[1]
    isa = support.isa()
    keep = None if mask is None else mask.contiguous()
    native.module.squares(
        isa, support.blocks(isa), out.data_ptr(), stride, support.matrix(*left), support.matrix(*right),
        [0, *(stop for _, stop in parts)], support.address(keep), torch.get_num_threads(),
    )  # fmt: skip


def refuses(
    lam: Tensor,
    g: Tensor,
    a: Tensor,
    q_out: Tensor | None,
    q_in: Tensor | None,
    mask: Tensor | None,
    ones_column: bool,
    cu_seqlens: Tensor | None,
) -> str | None:
    reason = support.refusal("lam", [x for x in (lam, g, a, q_out, q_in) if x is not None], lam.dtype)
    if reason is not None:
        return reason
    if 1 not in lam.stride():
        return "lam is stored neither by rows nor by columns"
    tokens = tokens_of(g, cu_seqlens)
    for side, q, width in (("output", q_out, lam.shape[1]), ("input", q_in, lam.shape[0])):
        if q is not None and not rotates_tokens(tokens, width):
            return f"the {side} side is rotated as gradient"
    if support.enabled():
        return None
    if tokens == 1 and cu_seqlens is None:
        return "squares of single tokens are one product"
    in_pairs = _in_pairs(g, a, q_out, q_in)
    if not in_pairs and tokens >= MANY_TOKENS and lam.numel() <= TILE_ELEMENTS:
        return f"{tokens} tokens of float32 into {lam.numel()} elements are one product to PyTorch too"
    return support.slower(in_pairs)


def configuration(
    lam: Tensor,
    g: Tensor,
    a: Tensor,
    q_out: Tensor | None,
    q_in: Tensor | None,
    mask: Tensor | None,
    ones_column: bool,
    cu_seqlens: Tensor | None,
) -> str:
    return ", ".join(
        [support.describe(_in_pairs(g, a, q_out, q_in)), *describe_sides(lam, tokens_of(g, cu_seqlens), q_out, q_in)]
    )

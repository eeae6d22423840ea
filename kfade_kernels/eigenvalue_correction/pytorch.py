"""`eigenvalue_correction_` on a CPU: squares taken tile by tile, while the product is in cache.

`Λ` is walked in row tiles of about `TILE_ELEMENTS`. For each tile the loop over sequences is inside:
one GEMM writes this sequence's tile of `gᵀa` to a small buffer, and its square is added to the tile of
Λ, which stays in cache (L2 and L3) as well. Nothing of size `B·d_out·d_in` exists.

Each side is rotated where that is cheaper, and the two choices do not depend on each other:

    output side: rotate tokens `g Q_out`  2·T·d_out²    or the gradient `Q_outᵀ G`  2·d_out²·d_in
    input side:  rotate tokens `a Q_in`   2·T·d_in²     or the gradient `G Q_in`    2·d_in²·d_out

so tokens on the output side when `T < d_in`, on the input side when `T < d_out`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import HAS_BF16_OPERANDS, bf16_operands, multiplies_as_they_are
from ..rotation import rotate, rotates_tokens
from ..rotation.reference import basis
from ..syrk.reference import append_ones
from .reference import batch_of, sequences, tokens_of

TILE_ELEMENTS = 1 << 20


def _product(g: Tensor, a: Tensor, out: Tensor) -> None:
    """`out = gᵀ a`; a GPU multiplies 16-bit rows as they are, with float32 sums."""
    if g.dtype == out.dtype:
        torch.mm(g.T, a, out=out)
    else:
        out.copy_(torch.mm(g.T, a, out_dtype=out.dtype))


def _accumulate_tiles(lam: Tensor, g: Tensor, a: Tensor, parts: list[tuple[int, int]]) -> None:
    """`lam += Σ_b (g_bᵀ a_b)∘²`, by row tiles of `lam`."""
    d_out, d_in = lam.shape
    rows = max(1, min(d_out, TILE_ELEMENTS // d_in))
    buffer = lam.new_empty(rows, d_in)
    for start in range(0, d_out, rows):
        tile = lam[start : start + rows]
        product = buffer[: tile.shape[0]]
        columns = g[:, start : start + rows]
        for first, last in parts:
            _product(columns[first:last], a[first:last], product)
            tile.addcmul_(product, product)


def _accumulate_rotated(
    lam: Tensor, g: Tensor, a: Tensor, q_out: Tensor | None, q_in: Tensor | None, parts: list[tuple[int, int]]
) -> None:
    """The same, with the sides that are left rotated as gradients, one sequence at a time."""
    for first, last in parts:
        gradient = g[first:last].T @ a[first:last]
        if q_out is not None:
            gradient = q_out.T @ gradient
        if q_in is not None:
            gradient = gradient @ q_in
        lam.addcmul_(gradient, gradient)


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
    batch, rows = batch_of(g, cu_seqlens), g.shape[:-1].numel()
    if batch == 0 or rows == 0:
        return
    # A sequence without tokens adds nothing.
    parts = [(start, stop) for start, stop in sequences(batch, rows, cu_seqlens) if start < stop]
    tokens = tokens_of(g, cu_seqlens)
    g, a = g.flatten(0, -2), a.flatten(0, -2)
    # Looking at the mask would wait for a GPU longer than dropping nothing takes.
    if mask is not None and (mask.is_cuda or not bool(mask.all())):
        dropped = ~mask.unsqueeze(1)
        g, a = g.masked_fill(dropped, 0), a.masked_fill(dropped, 0)
    d_out, d_in = lam.shape
    if q_out is not None and rotates_tokens(tokens, d_in):
        g, q_out = rotate(g, q_out), None
    if q_in is not None and rotates_tokens(tokens, d_out):
        a, q_in = rotate(a, q_in, ones_column=ones_column), None
    elif ones_column:
        a = append_ones(a)
    narrow = g.dtype == a.dtype == torch.bfloat16 and lam.dtype == torch.float32
    whole = q_out is None and q_in is None
    if not (multiplies_as_they_are(g, lam.dtype) and g.dtype == a.dtype and whole and rows != batch):
        g, a = g.to(lam.dtype), a.to(lam.dtype)
    if rows == batch and whole and cu_seqlens is None:
        # A single token factorises: (g aᵀ)∘² = g∘² (a∘²)ᵀ, so all sequences are one product.
        lam.addmm_(g.square().T, a.square())
        return
    if whole:
        with bf16_operands(narrow):
            _accumulate_tiles(lam, g, a, parts)
        return
    left, right = (None if q is None else basis(q, lam.dtype) for q in (q_out, q_in))
    _accumulate_rotated(lam, g, a, left, right, parts)


def refuses(lam: Tensor, *_: object) -> str | None:
    return None if lam.device.type in ("cpu", "cuda") else f"lam is on {lam.device}"


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
    narrow = g.dtype == a.dtype == torch.bfloat16 and HAS_BF16_OPERANDS
    rows = max(1, min(lam.shape[0], TILE_ELEMENTS // lam.shape[1]))
    sides = describe_sides(lam, tokens_of(g, cu_seqlens), q_out, q_in)
    return ", ".join([f"tiles of {rows} rows", *sides, "bf16 operands" if narrow else str(lam.dtype)])


def describe_sides(lam: Tensor, tokens: int, q_out: Tensor | None, q_in: Tensor | None) -> list[str]:
    """How each side that has a basis is rotated, in words."""
    return [
        f"{side} rotated as {'tokens' if rotates_tokens(tokens, width) else 'gradient'}"
        for side, q, width in (("output", q_out, lam.shape[1]), ("input", q_in, lam.shape[0]))
        if q is not None
    ]

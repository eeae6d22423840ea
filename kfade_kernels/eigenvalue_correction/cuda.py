"""`eigenvalue_correction_` in CUDA (`csrc/cuda/`): squares of products of 16-bit tokens, taken in registers.

Tokens are rotated first, by whatever serves `rotate`; where a side would rather rotate gradients, where rotated
tokens come in float32, and for sequences of one token, other backends serve. FLOPs of the kernel: `2·N·d_out·d_in`.
Bytes at least: the tokens once a group of block rows, Λ read and written once. Where tiles are fewer than blocks,
sequences are split in a fixed way and a second kernel adds the parts in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda_support as cuda
from ..rotation import rotate, rotates_tokens
from ..rotation.reference import result_dtype
from ..triton_support import address, as_bytes, short
from .reference import batch_of, tokens_of
from .triton import SMALLEST_WIDTH, splits_of


def _parts(lam: Tensor, batch: int, rows: int, form: cuda.Form) -> int:
    """Into how many parts the sequences go."""
    c = form.configuration()
    tiles = -(-lam.shape[0] // form.rows) * form.cluster * -(-lam.shape[1] // form.columns)
    return splits_of(tiles, batch, -(-rows // batch), c, cuda.device_at(lam.device), 2)


def _apart(x: Tensor) -> bool:
    """Whether the sequences of `x [B, T, ·]` lie whole rows apart, as tensor maps have it; packed ones do."""
    if x.ndim < 3 or x.shape[0] < 2:
        return True
    return x.stride(0) % x.stride(1) == 0 and x.stride(0) >= x.shape[1] * x.stride(1)


def add_squares(lam: Tensor, g: Tensor, a: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """`lam += Σ_b (g_bᵀ a_b)∘²`; g and a dense `[B, T, ·]`, or packed `[N, ·]` with `cu_seqlens [B + 1]`."""
    packed = cu_seqlens is not None
    batch, rows = batch_of(g, cu_seqlens), g.shape[:-1].numel()
    if batch == 0 or rows == 0:
        return
    library, where = cuda.library(), lam.device
    form, dtype = cuda.form_at("eigenvalue_correction", where), short(g.dtype)
    keep = as_bytes(mask)
    ends = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    data, items, partial_tiles, split_tiles = library.cuda_squares_table(
        kernel=form.kernel, dtype=dtype, left=g.data_ptr(), right=a.data_ptr(), out=lam.data_ptr(), mask=address(keep),
        sequences=address(ends), left_stride=g.stride(-2), right_stride=a.stride(-2),
        left_batch=0 if packed else g.stride(0), right_batch=0 if packed else a.stride(0), out_stride=lam.stride(0),
        rows=lam.shape[0], columns=lam.shape[1], tokens=rows if packed else g.shape[1], batch=batch,
        part=cuda.part_of(batch, _parts(lam, batch, rows, form)),
    )  # fmt: skip
    table = cuda.on_device(data, where)
    partials = cuda.workspace(partial_tiles * form.rows * form.columns, where)
    stream = cuda.stream_at(where)
    with cuda.at(where):
        library.cuda_squares(
            kernel=form.kernel, dtype=dtype, table=table.data_ptr(), items=items, partials=partials.data_ptr(),
            alpha=1.0, flush=form.flush, masked=packed or mask is not None, group=form.group,
            blocks=form.blocks(items, cuda.device_at(where)), stream=stream,
        )  # fmt: skip
        if split_tiles:
            library.cuda_ordered_sum(
                "squares", form.kernel, table.data_ptr(), split_tiles, partials.data_ptr(), 1.0, form.group, stream
            )


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
    if g.shape[:-1].numel() == 0:
        return
    g = g if q_out is None else rotate(g, q_out)
    a = a if q_in is None else rotate(a, q_in)
    add_squares(lam, g, a, mask, cu_seqlens)


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
    multiplied = [x.dtype if q is None else result_dtype(x, q) for x, q in ((g, q_out), (a, q_in))]
    reason = cuda.refusal("eigenvalue_correction_", "eigenvalue_correction", "lam", lam, [g, a], multiplied)
    if reason is not None:
        return reason
    if min(lam.shape) < SMALLEST_WIDTH:
        return f"{list(lam.shape)} is below {SMALLEST_WIDTH}"
    if ones_column or lam.shape[0] % 8 or lam.shape[1] % 8:
        return "rows of tokens do not end on 16 bytes"
    if lam.stride(1) != 1 or any(q is None and not cuda.aligned(x) for x, q in ((g, q_out), (a, q_in))):
        return "rows do not begin and end on 16 bytes"
    if any(q is None and not _apart(x) for x, q in ((g, q_out), (a, q_in))):
        return "sequences overlap, or are not whole rows apart"
    tokens = tokens_of(g, cu_seqlens)
    if tokens <= 1 and cu_seqlens is None:
        return "sequences of one token are a product of squares"
    for q, width in ((q_out, lam.shape[1]), (q_in, lam.shape[0])):
        if q is not None and not rotates_tokens(tokens, width):
            return f"gradients of {tokens} tokens are rotated, not tokens"
    return None


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
    form = cuda.form_at("eigenvalue_correction", lam.device)
    batch, rows = batch_of(g, cu_seqlens), g.shape[:-1].numel()
    if batch == 0 or rows == 0:
        return "no rows"
    parts = _parts(lam, batch, rows, form)
    return f"{form}{f', sequences in {parts} parts' if parts > 1 else ''}"

"""The kernel of `eigenvalue_correction_`: tiles of Λ, with the loop over sequences inside.

`out += Σ_b (A_b B_b)∘²`. Two float32 tiles are kept: this sequence's product and the running sum of squares,
so nothing of the size of all products exists. A_b `[M, K]` and B_b `[K, N]` are a sequence's tokens
(A stored `[K, M]`), or a gradient and an eigenbasis that all sequences share (batch stride 0).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import as_operand, rectangular_tile, write_tile


@triton.jit
def _operands(
    left, left_stride, right, right_stride, mask, k, inner, row0, rows, col0, columns,
    A_T: tl.constexpr, MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    at = k + tl.arange(0, BK)
    keep = at < inner
    if MASKED:
        keep = keep & (tl.load(mask + at, mask=keep, other=0) != 0)
    m = row0 + tl.arange(0, BM)
    n = col0 + tl.arange(0, BN)
    line = at.to(tl.int64)
    if A_T:
        # Addressed the other way round, not transposed: see the outer products.
        where = left + (m[:, None] + line[None, :] * left_stride)
    else:
        where = left + (m.to(tl.int64)[:, None] * left_stride + at[None, :])
    a = tl.load(where, mask=(m < rows)[:, None] & keep[None, :], other=0.0)
    where = right + (line[:, None] * right_stride + n[None, :])
    b = tl.load(where, mask=keep[:, None] & (n < columns)[None, :], other=0.0)
    return a, b


# What varies from call to call, also where a caller's mask and offsets begin: one compiled form serves all.
_INTEGERS = ["batch", "inner", "rows", "columns", "batches_a_split"]
_STRIDES = ["left_batch", "left_stride", "right_batch", "right_stride", "out_split", "out_stride"]


@triton.jit(do_not_specialize=_INTEGERS + _STRIDES, do_not_specialize_on_alignment=["mask", "cu_seqlens"])
def squares_kernel(
    left,
    right,
    out,
    mask,
    cu_seqlens,
    batch,
    inner,
    rows,
    columns,
    left_batch,
    left_stride,
    right_batch,
    right_stride,
    out_split,
    out_stride,
    batches_a_split,
    ADD: tl.constexpr,
    PACKED: tl.constexpr,
    A_T: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the sum over one part of the sequences.

    Dense: sequence b begins `b · left_batch` and `b · right_batch` elements in, and has `inner` summed rows.
    Packed: it has rows `cu_seqlens[b] … cu_seqlens[b + 1]` of both. The mask has one entry a summed row.
    `ALIGNED`: strides are given in pieces of 16 bytes, so that the compiler sees that they are whole ones.
    """
    OUT_STEP: tl.constexpr = 16 // (out.dtype.element_ty.primitive_bitwidth // 8)
    A_STEP: tl.constexpr = 16 // (left.dtype.element_ty.primitive_bitwidth // 8)
    B_STEP: tl.constexpr = 16 // (right.dtype.element_ty.primitive_bitwidth // 8)
    WIDEN: tl.constexpr = left.dtype.element_ty != right.dtype.element_ty
    # A stride that fits 32 bits comes as an int32, and what it is multiplied with need not fit.
    left_stride = left_stride.to(tl.int64)
    left_batch = left_batch.to(tl.int64)
    right_stride = right_stride.to(tl.int64)
    right_batch = right_batch.to(tl.int64)
    out_split = out_split.to(tl.int64)
    if ALIGNED:
        left_stride *= A_STEP
        left_batch *= A_STEP
        out_split *= OUT_STEP
        out_stride *= OUT_STEP
        right_stride *= B_STEP
        right_batch *= B_STEP
        columns = columns // B_STEP * B_STEP
        if A_T:
            rows = rows // A_STEP * A_STEP
        else:
            inner = inner // A_STEP * A_STEP
    row, column = rectangular_tile(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(columns, BN), GROUP)
    row0 = row * BM
    col0 = column * BN
    first = tl.program_id(1) * batches_a_split
    last = tl.minimum(first + batches_a_split, batch)
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM, BN), tl.float32)
    if PACKED:
        for b in range(first, last):
            begin = tl.load(cu_seqlens + b).to(tl.int64)
            length = (tl.load(cu_seqlens + b + 1) - begin).to(tl.int32)
            for k in range(0, length, BK):
                x, y = _operands(
                    left + begin * left_stride, left_stride, right + begin * right_stride, right_stride, mask + begin,
                    k, length, row0, rows, col0, columns, A_T, MASKED, BM, BN, BK,
                )  # fmt: skip
                acc = tl.dot(as_operand(x, WIDEN), as_operand(y, WIDEN), acc, input_precision=PRECISION)
            total += acc * acc
            acc = tl.zeros((BM, BN), tl.float32)
    else:
        # One flat loop over the steps of all sequences, so that the loads of the next sequence are
        # under way while this one ends: with short sequences the ends are a large part of the time.
        steps = tl.cdiv(inner, BK)
        for step in range(first * steps, last * steps):
            b = (step // steps).to(tl.int64)
            k = step % steps * BK
            x, y = _operands(
                left + b * left_batch, left_stride, right + b * right_batch, right_stride, mask + b * inner,
                k, inner, row0, rows, col0, columns, A_T, MASKED, BM, BN, BK,
            )  # fmt: skip
            acc = tl.dot(as_operand(x, WIDEN), as_operand(y, WIDEN), acc, input_precision=PRECISION)
            if k + BK >= inner:
                total += acc * acc
                acc = tl.zeros((BM, BN), tl.float32)
    place = out + tl.program_id(1).to(tl.int64) * out_split + row0.to(tl.int64) * out_stride + col0
    write_tile(total, place, out_stride, rows - row0, columns - col0, 1.0, ADD, BM, BN)

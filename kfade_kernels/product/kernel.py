"""One persistent kernel for many products `C = finish(A B)` of unequal shapes.

A problem is one row of a table. Each operand is stored with unit stride along one of its two
dimensions, whichever: `A_T` means that A `[M, K]` is stored as `[K, M]`, `B_T` that B `[K, N]` is stored as
`[N, K]`. B may be a bfloat16 pair, high and low part, which then share the loads of A.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import as_operand, halves, rectangular_tile

# Columns of the table.
FIELDS = 14  # end, a, b, low part of b, c, m, n, k, strides of a, b, c, first and second vector or matrix, its stride


@triton.jit
def _tile(base, stride, row0, col0, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr):
    """A tile `[ROWS, COLUMNS]` of a matrix `[rows, columns]`, zero outside; `T`: stored by columns.

    What is stored by columns is addressed so, not transposed: a tile that was transposed in registers
    would not be loaded asynchronously on sm_80.
    """
    r = row0 + tl.arange(0, ROWS)
    c = col0 + tl.arange(0, COLUMNS)
    if T:
        where = base + (r[:, None] + c.to(tl.int64)[None, :] * stride)
    else:
        where = base + (r.to(tl.int64)[:, None] * stride + c[None, :])
    return tl.load(where, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)


@triton.jit
def _finish(
    x, row0, col0, rows, columns, c, c_stride, first, second, e_stride, damping,
    FINISH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = row0 + tl.arange(0, BM)
    n = col0 + tl.arange(0, BN)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    if FINISH == "row":
        x += tl.load(first + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if FINISH == "row of a pair":
        x += tl.load(first + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        x += tl.load(second + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if FINISH == "divide by a matrix":
        values = tl.load(first + (m.to(tl.int64)[:, None] * e_stride + n[None, :]), mask=inside, other=1.0)
        x = x / (values + damping)
    if FINISH == "divide by a pair":
        left = tl.load(first + m, mask=m < rows, other=1.0)
        right = tl.load(second + n, mask=n < columns, other=1.0)
        x = x / (left[:, None] * right[None, :] + damping)
    where = c + (m.to(tl.int64)[:, None] * c_stride + n[None, :])
    tl.store(where, x.to(c.dtype.element_ty), mask=inside)


# The number of problems varies from call to call: one compiled form serves all.
@triton.jit(do_not_specialize=["problems"])
def product_kernel(
    table,
    dampings,
    problems,
    A_TYPE: tl.constexpr,
    B_TYPE: tl.constexpr,
    C_TYPE: tl.constexpr,
    E_TYPE: tl.constexpr,
    A_T: tl.constexpr,
    B_T: tl.constexpr,
    PAIR: tl.constexpr,
    FINISH: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    FIELDS: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    A_STEP: tl.constexpr = 16 // (A_TYPE.primitive_bitwidth // 8)
    B_STEP: tl.constexpr = 16 // (B_TYPE.primitive_bitwidth // 8)
    C_STEP: tl.constexpr = 16 // (C_TYPE.primitive_bitwidth // 8)
    WIDEN: tl.constexpr = A_TYPE != B_TYPE
    start = tl.zeros((), tl.int64)
    for p in range(problems):
        entry = table + p * FIELDS
        end = tl.load(entry)
        first_item = start + (pid - start % programs + programs) % programs
        if first_item < end:
            a = tl.load(entry + 1).to(tl.pointer_type(A_TYPE))
            b = tl.load(entry + 2).to(tl.pointer_type(B_TYPE))
            low = tl.load(entry + 3).to(tl.pointer_type(B_TYPE))
            c = tl.load(entry + 4).to(tl.pointer_type(C_TYPE))
            rows = tl.load(entry + 5).to(tl.int32)
            columns = tl.load(entry + 6).to(tl.int32)
            inner = tl.load(entry + 7).to(tl.int32)
            a_stride = tl.load(entry + 8)
            b_stride = tl.load(entry + 9)
            c_stride = tl.load(entry + 10)
            first = tl.load(entry + 11).to(tl.pointer_type(E_TYPE))
            second = tl.load(entry + 12).to(tl.pointer_type(E_TYPE))
            e_stride = tl.load(entry + 13)
            damping = tl.load(dampings + p)
            if ALIGNED:
                a = tl.multiple_of(a, 16)
                b = tl.multiple_of(b, 16)
                low = tl.multiple_of(low, 16)
                a_stride = tl.multiple_of(a_stride, A_STEP)
                b_stride = tl.multiple_of(b_stride, B_STEP)
                # Of each operand the dimension in which it is stored consists of whole pieces of 16 bytes.
                if A_T:
                    rows = tl.multiple_of(rows, A_STEP)
                else:
                    inner = tl.multiple_of(inner, A_STEP)
                if B_T:
                    inner = tl.multiple_of(inner, B_STEP)
                c = tl.multiple_of(c, 16)
                c_stride = tl.multiple_of(c_stride, C_STEP)
                first = tl.multiple_of(first, 16)
                second = tl.multiple_of(second, 16)
                if FINISH == "divide by a matrix":
                    e_stride = tl.multiple_of(e_stride, 4)
                columns = tl.multiple_of(columns, C_STEP if B_T else B_STEP)
            tiles_m = tl.cdiv(rows, BM)
            tiles_n = tl.cdiv(columns, BN)
            for work in range(first_item, end, programs):
                row, column = rectangular_tile((work - start).to(tl.int32), tiles_m, tiles_n, GROUP)
                row0 = row * BM
                col0 = column * BN
                acc = tl.zeros((BM, BN), tl.float32)
                for k in range(0, inner, BK):
                    left = as_operand(_tile(a, a_stride, row0, k, rows, inner, BM, BK, A_T), WIDEN)
                    right = as_operand(_tile(b, b_stride, k, col0, inner, columns, BK, BN, B_T), WIDEN)
                    acc = tl.dot(left, right, acc, input_precision=PRECISION)
                    if PAIR:
                        rest = _tile(low, b_stride, k, col0, inner, columns, BK, BN, B_T)
                        acc = tl.dot(left, rest, acc, input_precision=PRECISION)
                # In quarters: what the end needs would not fit in registers beside the whole tile.
                H: tl.constexpr = BN // 2
                Q: tl.constexpr = BN // 4
                left_half, right_half = halves(acc, BM, BN)
                one, two = halves(left_half, BM, H)
                three, four = halves(right_half, BM, H)
                _finish(one, row0, col0, rows, columns, c, c_stride, first, second, e_stride, damping, FINISH, BM, Q)
                col0 += Q
                _finish(two, row0, col0, rows, columns, c, c_stride, first, second, e_stride, damping, FINISH, BM, Q)
                col0 += Q
                _finish(three, row0, col0, rows, columns, c, c_stride, first, second, e_stride, damping, FINISH, BM, Q)
                col0 += Q
                _finish(four, row0, col0, rows, columns, c, c_stride, first, second, e_stride, damping, FINISH, BM, Q)
        start = end

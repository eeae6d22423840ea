"""The kernels of `syrk_` and `accumulate_factors_`: tiles of packed lower triangles, for many problems in one launch.

A problem is one row of a table: `packed += alpha · xᵀ diag(mask) x`. A work item is one tile of
one problem and one part of its rows. Programs are persistent: program p takes items p, p + programs, ...
Both operands of a tile are column blocks of the same row-major x, so nothing is copied or transposed in
memory; on a diagonal tile they are loaded twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import triangular_tile, write_tile

# Columns of the table.
FIELDS = 11  # end, x, packed, mask, rows, width, order, row stride, splits, first partial tile, end of tiles


@triton.jit
def _tile_place(tile, side, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile. A square of `BN` is walked as `BN // BM` tiles of `BM` rows."""
    PARTS: tl.constexpr = BN // BM
    row, column = triangular_tile(tile // PARTS, side, GROUP)
    return row * BN + tile % PARTS * BM, column * BN


@triton.jit
def _packed_place(packed, row0, col0, order, PANEL: tl.constexpr):
    """Pointer to element (row0, col0) of a packed triangle, and the length of a row of its panel."""
    panel = row0 // PANEL
    length = tl.minimum(PANEL * (panel + 1), order)
    offset = PANEL * PANEL // 2 * panel.to(tl.int64) * (panel + 1)
    return packed + offset + (row0 - PANEL * panel).to(tl.int64) * length + col0, length


# The number of problems varies from call to call: one compiled form serves all.
@triton.jit(do_not_specialize=["problems"])
def syrk_kernel(
    table,
    problems,
    partials,
    alpha,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    FLUSH: tl.constexpr,
    FIELDS: tl.constexpr,
    PANEL: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    STEP: tl.constexpr = 16 // (DTYPE.primitive_bitwidth // 8)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    r = tl.arange(0, BK)
    start = tl.zeros((), tl.int64)
    for p in range(problems):
        entry = table + p * FIELDS
        end = tl.load(entry)
        first = start + (pid - start % programs + programs) % programs
        if first < end:
            x = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
            packed = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
            mask = tl.load(entry + 3).to(tl.pointer_type(tl.uint8))
            rows = tl.load(entry + 4).to(tl.int32)
            width = tl.load(entry + 5).to(tl.int32)
            order = tl.load(entry + 6).to(tl.int32)
            stride = tl.load(entry + 7)
            splits = tl.load(entry + 8).to(tl.int32)
            partial = tl.load(entry + 9)
            if ALIGNED:
                x = tl.multiple_of(x, 16)
                stride = tl.multiple_of(stride, STEP)
                width = tl.multiple_of(width, STEP)
            # Rows of the triangle begin on 16 bytes: it is then read and written four elements at a time.
            if WHOLE:
                packed = tl.multiple_of(packed, 16)
                order = tl.multiple_of(order, 4)
            if DESCRIPTORS:
                left_tiles = tl.make_tensor_descriptor(x, [rows, width], [stride, 1], [BK, BM])
                right_tiles = tl.make_tensor_descriptor(x, [rows, width], [stride, 1], [BK, BN])
            side = tl.cdiv(width, BN)
            tiles = side * (side + 1) // 2 * (BN // BM)
            rows_a_split = tl.cdiv(tl.cdiv(rows, BK), splits) * BK
            chunks = tl.cdiv(rows_a_split, FLUSH)
            mine = tl.cdiv((end - first).to(tl.int32), programs)
            # One flat loop over items and chunks: what the end of a chunk needs is then computed there,
            # and not kept in registers through the products.
            for step in range(mine * chunks):
                item = (first - start).to(tl.int32) + step // chunks * programs
                row0, col0 = _tile_place(item % tiles, side, BM, BN, GROUP)
                begin = item // tiles * rows_a_split
                finish = tl.minimum(begin + rows_a_split, rows)
                begin += step % chunks * FLUSH
                finish = tl.minimum(begin + FLUSH, finish)
                # The lower half of the last square may lie below the matrix.
                finish = tl.where(row0 < width, finish, begin)
                acc = tl.zeros((BM, BN), tl.float32)
                for k in range(begin, finish, BK):
                    if DESCRIPTORS:
                        left = tl.trans(left_tiles.load([k, row0]))
                        right = right_tiles.load([k, col0])
                    else:
                        at = k + r
                        keep = at < finish
                        if MASKED:
                            keep = keep & (tl.load(mask + at, mask=keep, other=0) != 0)
                        # Left is addressed the other way round, not transposed: a tile that was transposed in
                        # registers would not be loaded asynchronously on sm_80.
                        line = x + at.to(tl.int64) * stride
                        left_keep = (row0 + m < width)[:, None] & keep[None, :]
                        right_keep = keep[:, None] & (col0 + n < width)[None, :]
                        left = tl.load(line[None, :] + (row0 + m)[:, None], mask=left_keep, other=0.0)
                        right = tl.load(line[:, None] + (col0 + n)[None, :], mask=right_keep, other=0.0)
                    acc = tl.dot(left, right, acc, input_precision=PRECISION)
                out, length = _packed_place(packed, row0, col0, order, PANEL)
                row_limit = width - row0
                col_limit = tl.minimum(width, length) - col0
                scale = alpha
                if splits > 1:
                    out = partials + (partial + item) * (BM * BN)
                    length = tl.full((), BN, tl.int32)
                    row_limit = tl.full((), BM, tl.int32)
                    col_limit = tl.full((), BN, tl.int32)
                    scale = tl.full((), 1.0, tl.float32)
                write_tile(acc, out, length, row_limit, col_limit, scale, True, BM, BN)
        start = end


@triton.jit(do_not_specialize=["problems"])
def syrk_reduce_kernel(
    table,
    problems,
    partials,
    alpha,
    STRIP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    FIELDS: tl.constexpr,
    PANEL: tl.constexpr,
):
    """The ordered second pass: add up the parts of each tile, first to last, and add the sum to its triangle.

    A program takes a strip of `STRIP` rows of a tile.
    """
    pid = tl.program_id(0)
    strip = tl.program_id(1) * STRIP
    p = 0
    start = tl.zeros((), tl.int64)
    while tl.load(table + p * FIELDS + 10) <= pid:
        start = tl.load(table + p * FIELDS + 10)
        p += 1
    entry = table + p * FIELDS
    packed = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    width = tl.load(entry + 5).to(tl.int32)
    order = tl.load(entry + 6).to(tl.int32)
    splits = tl.load(entry + 8).to(tl.int32)
    partial = tl.load(entry + 9)
    side = tl.cdiv(width, BN)
    tiles = side * (side + 1) // 2 * (BN // BM)
    tile = (pid - start).to(tl.int32)
    row0, col0 = _tile_place(tile, side, BM, BN, GROUP)
    row0 += strip
    if row0 < width:
        at = (strip + tl.arange(0, STRIP))[:, None] * BN + tl.arange(0, BN)[None, :]
        acc = tl.zeros((STRIP, BN), tl.float32)
        for split in range(splits):
            acc += tl.load(partials + (partial + split * tiles + tile) * (BM * BN) + at)
        out, length = _packed_place(packed, row0, col0, order, PANEL)
        write_tile(acc, out, length, width - row0, tl.minimum(width, length) - col0, alpha, True, STRIP, BN)


@triton.jit(do_not_specialize=["problems"])
def column_sum_kernel(
    table,
    problems,
    alpha,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FIELDS: tl.constexpr,
    PANEL: tl.constexpr,
):
    """The last row of a triangle whose x stands for itself with a column of ones: column sums, and the row count."""
    pid = tl.program_id(0)
    p = 0
    start = tl.zeros((), tl.int64)
    while tl.load(table + p * FIELDS) <= pid:
        start = tl.load(table + p * FIELDS)
        p += 1
    entry = table + p * FIELDS
    x = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    packed = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    mask = tl.load(entry + 3).to(tl.pointer_type(tl.uint8))
    rows = tl.load(entry + 4).to(tl.int32)
    width = tl.load(entry + 5).to(tl.int32)
    order = tl.load(entry + 6).to(tl.int32)
    stride = tl.load(entry + 7)
    columns = (pid - start).to(tl.int32) * BN + tl.arange(0, BN)
    r = tl.arange(0, BK)
    acc = tl.zeros((BN,), tl.float32)
    for k in range(0, rows, BK):
        at = k + r
        keep = at < rows
        if MASKED:
            keep = keep & (tl.load(mask + at, mask=keep, other=0) != 0)
        line = x + at.to(tl.int64)[:, None] * stride
        inside = keep[:, None] & (columns < width)[None, :]
        # Column `width` is the ones themselves: its sum counts the rows.
        part = tl.load(line + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        part = tl.where(keep[:, None] & (columns == width)[None, :], 1.0, part)
        acc += tl.sum(part, 0)
    last, _ = _packed_place(packed, order - 1, 0, order, PANEL)
    tl.store(
        last + columns, tl.load(last + columns, mask=columns < order, other=0.0) + alpha * acc, mask=columns < order
    )

"""Device functions that kernels share: the walk over tiles, and products of float32 operands.

Import this only where Triton is installed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def triangular_root(t):
    """The largest r with `r (r + 1) / 2 ≤ t`, for int32 t below 2³⁰; the square root may be off by one."""
    r = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    r = tl.where(r * (r + 1) // 2 > t, r - 1, r)
    return tl.where((r + 1) * (r + 2) // 2 <= t, r + 1, r)


@triton.jit
def triangular_tile(t, side, GROUP: tl.constexpr):
    """Block row and column of tile t of a lower triangle of `side` block rows.

    Groups of `GROUP` block rows are walked column by column, so that programs that run together
    share both operands in L2: each group is a rectangle and, at its end, a small triangle. The tiles
    before a group that begins at block row f are those of the triangle of f rows.
    """
    first = triangular_root(t) // GROUP * GROUP
    inside = t - first * (first + 1) // 2
    rows = tl.minimum(GROUP, side - first)
    corner = inside - first * rows
    row_of_corner = triangular_root(tl.maximum(corner, 0))
    rectangle = corner < 0
    row = first + tl.where(rectangle, inside % rows, row_of_corner)
    column = tl.where(rectangle, inside // rows, corner - row_of_corner * (row_of_corner + 1) // 2 + first)
    return row, column


@triton.jit
def rectangular_tile(t, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Block row and column of tile t of a rectangle, `GROUP` block rows walked together."""
    first = t // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(GROUP, tiles_m - first)
    inside = t - first * tiles_n
    return first + inside % rows, inside // rows


@triton.jit
def as_operand(x, WIDEN: tl.constexpr):
    """`x` in float32 where the two operands of a product have different dtypes."""
    if WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of the columns of a tile `[BM, BN]`."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _write_columns(x, out, length, row_limit, col_limit, scale, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    where = out + (m[:, None] * length + n[None, :])
    inside = (m < row_limit)[:, None] & (n < col_limit)[None, :]
    x = scale * x
    if ADD:
        x += tl.load(where, mask=inside, other=0.0)
    tl.store(where, x, mask=inside)


@triton.jit
def write_tile(x, out, length, row_limit, col_limit, scale, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """`out = scale · x`, or `out += scale · x`, for a tile at `out` with rows of `length`, inside the limits.

    In pieces of at most 64 columns: the whole tile's addresses and old values would not fit in registers
    beside it.
    """
    if BN <= 64:
        _write_columns(x, out, length, row_limit, col_limit, scale, ADD, BM, BN)
    else:
        H: tl.constexpr = BN // 2
        left, right = halves(x, BM, BN)
        if H <= 64:
            _write_columns(left, out, length, row_limit, col_limit, scale, ADD, BM, H)
            _write_columns(right, out + H, length, row_limit, col_limit - H, scale, ADD, BM, H)
        else:
            Q: tl.constexpr = BN // 4
            first, second = halves(left, BM, H)
            third, fourth = halves(right, BM, H)
            _write_columns(first, out, length, row_limit, col_limit, scale, ADD, BM, Q)
            _write_columns(second, out + Q, length, row_limit, col_limit - Q, scale, ADD, BM, Q)
            _write_columns(third, out + 2 * Q, length, row_limit, col_limit - 2 * Q, scale, ADD, BM, Q)
            _write_columns(fourth, out + 3 * Q, length, row_limit, col_limit - 3 * Q, scale, ADD, BM, Q)

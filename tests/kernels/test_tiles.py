"""The index maps of the kernels' grids: every tile once, whatever the order and the grouping."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from kfade_kernels.tiles import rectangular_tile, triangular_root, triangular_tile  # noqa: E402
from kfade_kernels.triton_support import interpreted  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 before Triton is imported")
BLOCK = 4096
GROUPS = [1, 3, 8, 2048]


@triton.jit
def _roots(t, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, triangular_root(tl.load(t + at, mask=at < n, other=0)), mask=at < n)


@triton.jit
def _triangle(rows, columns, side, n, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = triangular_tile(tl.minimum(t, n - 1), side, GROUP)
    tl.store(rows + t, row, mask=t < n)
    tl.store(columns + t, column, mask=t < n)


@triton.jit
def _rectangle(rows, columns, tiles_m, tiles_n, n, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = rectangular_tile(tl.minimum(t, n - 1), tiles_m, tiles_n, GROUP)
    tl.store(rows + t, row, mask=t < n)
    tl.store(columns + t, column, mask=t < n)


def triangle(side: int, group: int) -> torch.Tensor:
    """Row · side + column of each tile of the walk."""
    count = side * (side + 1) // 2
    rows, columns = torch.full((2, count), -1, dtype=torch.int32).unbind()
    _triangle[(-(-count // BLOCK),)](rows, columns, side, count, GROUP=group, BLOCK=min(BLOCK, 1 << count.bit_length()))
    return rows.long() * side + columns


def lower(side: int) -> torch.Tensor:
    at = torch.tril_indices(side, side)
    return at[0] * side + at[1]


@pytest.mark.parametrize("group", GROUPS)
def test_a_small_triangle_has_every_tile_once(group: int) -> None:
    for side in range(1, 101):
        walk = triangle(side, group)
        assert torch.equal(walk.sort().values, lower(side)), f"{side} block rows in groups of {group}"


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("side", [255, 700])
def test_a_large_triangle_has_every_tile_once(side: int, group: int) -> None:
    assert torch.equal(triangle(side, group).sort().values, lower(side))


def test_groups_are_walked_column_by_column() -> None:
    walk = triangle(6, 3)
    assert [divmod(int(t), 6) for t in walk[6:10]] == [(3, 0), (4, 0), (5, 0), (3, 1)]


@pytest.mark.parametrize("group", GROUPS)
def test_a_rectangle_has_every_tile_once(group: int) -> None:
    sides = [(m, n) for m in (1, 2, 3, 7, 8, 9, 31, 64, 100) for n in (1, 2, 5, 8, 33)] + [(300, 70), (70, 300)]
    for m, n in sides:
        rows, columns = torch.full((2, m * n), -1, dtype=torch.int32).unbind()
        _rectangle[(-(-m * n // BLOCK),)](rows, columns, m, n, m * n, GROUP=group, BLOCK=BLOCK)
        walk = rows.long() * n + columns
        assert torch.equal(walk.sort().values, torch.arange(m * n)), f"{m} × {n} in groups of {group}"


def roots(t: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(t, -1)
    _roots[(-(-t.numel() // BLOCK),)](t, out, t.numel(), BLOCK=BLOCK)
    return out


def test_roots_of_all_small_numbers() -> None:
    t = torch.arange(200_000, dtype=torch.int32)
    r = roots(t).long()
    assert bool((r * (r + 1) // 2 <= t).all()) and bool(((r + 1) * (r + 2) // 2 > t).all())


def test_roots_around_triangular_numbers() -> None:
    """Where the float32 square root is off by one: both sides of every triangular number up to 2²⁸."""
    r = torch.arange(1, 23_170)
    edges = r * (r + 1) // 2
    assert edges[-1] < 2**28 <= edges[-1] + 23_170, "the next one is beyond"
    assert torch.equal(roots(edges.int()).long(), r)
    assert torch.equal(roots((edges - 1).int()).long(), r - 1)
    squares = (torch.arange(1, 16_384) ** 2)[:, None] + torch.tensor([-1, 0, 1])
    t = squares.reshape(-1)
    found = roots(t.int()).long()
    assert bool((found * (found + 1) // 2 <= t).all()) and bool(((found + 1) * (found + 2) // 2 > t).all())

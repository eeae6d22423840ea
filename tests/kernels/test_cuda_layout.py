"""What the CUDA kernels compute on the way: tiles, places in packed storage, shared memory, descriptors, fragments."""

from __future__ import annotations

from typing import Any

import pytest
from emulated import emulated_module
from kfade_kernels import cuda_support
from kfade_kernels.packed import packed_elements, panels


@pytest.fixture(scope="module")
def emulated() -> Any:
    return emulated_module()


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_every_tile_of_a_triangle_once(emulated: Any, group: int) -> None:
    for side in (*range(1, 40), 127):
        tiles = [emulated.triangular_tile(t, side, group) for t in range(side * (side + 1) // 2)]
        assert sorted(tiles) == [(i, j) for i in range(side) for j in range(i + 1)], side


def test_tiles_of_a_large_triangle(emulated: Any) -> None:
    # Tile numbers beyond what a float32 holds exactly when it is multiplied by eight.
    side = 700
    seen = {emulated.triangular_tile(t, side, 8) for t in range(side * (side + 1) // 2)}
    assert len(seen) == side * (side + 1) // 2 and all(0 <= j <= i < side for i, j in seen)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_tile_of_a_rectangle_once(emulated: Any, group: int) -> None:
    for m in range(1, 12):
        for n in range(1, 12):
            tiles = [emulated.rectangular_tile(t, m, n, group) for t in range(m * n)]
            assert sorted(tiles) == [(i, j) for i in range(m) for j in range(n)]


@pytest.mark.parametrize("kernel", ["hopper", "ampere"])
@pytest.mark.parametrize("ones", [0, 1])
@pytest.mark.parametrize("width", [8, 120, 128, 136, 256, 264, 384, 520, 1000])
def test_every_element_of_a_triangle_is_written_once(emulated: Any, kernel: str, width: int, ones: int) -> None:
    order = width + ones
    counts = emulated.writes(kernel, width, order, 2)
    assert len(counts) == packed_elements(order)
    for panel in panels(order):
        for row in range(panel.rows):
            line = counts[panel.offset + row * panel.stop : panel.offset + (row + 1) * panel.stop]
            inside = min(panel.stop, width) if panel.start + row < width else 0
            # To the end of the panel: what is above the diagonal there is scratch. The last row of a bias is not
            # the tiles'.
            assert line == [1] * inside + [0] * (panel.stop - inside)


def test_swizzled_boxes_are_what_descriptors_describe(emulated: Any) -> None:
    """The copy engine's place of (column, summed row) is the one that a product reads, by the PTX ISA's tables."""
    box = 64 * 128
    for address in (1024, 16384 + 1024, 229_376):
        for step in range(4):
            d = emulated.descriptor(address, step)
            start, leading, stride = (d & 0x3FFF) << 4, (d >> 16 & 0x3FFF) << 4, (d >> 32 & 0x3FFF) << 4
            # 128-byte swizzle, no base offset, and nothing in the bits between.
            assert d >> 62 == 1 and d >> 49 & 7 == 0 and d & 0x3FFF_C000_C000_C000 == 0
            for column in range(256):
                for k in range(16):
                    # Canonical layout, 128-byte swizzle, M or N contiguous: ((8, n), (8, k)) pieces of 16 bytes.
                    read = start + column // 64 * leading + column % 64 * 2 + k // 8 * stride + k % 8 * 128
                    read ^= (read >> 7 & 7) << 4
                    line = address + column // 64 * box + (16 * step + k) * 128
                    written = emulated.swizzle(line + column % 64 * 2)
                    assert read == written
                    # What the swizzle means: a row keeps its 128 bytes, its pieces are exchanged by the row number.
                    assert written // 128 == line // 128
                    assert written % 128 // 16 == (column % 64 // 8) ^ (line // 128 % 8)


def test_pieces_of_ampere_have_no_bank_conflicts(emulated: Any) -> None:
    offsets = {emulated.piece_offset(row, piece) for row in range(32) for piece in range(16)}
    assert offsets == {16 * i for i in range(512)}
    for piece in range(16):
        for first in range(0, 32, 8):
            # Eight rows that one matrix load reads together lie in different banks (of 16 bytes).
            assert len({emulated.piece_offset(first + r, piece) // 16 % 8 for r in range(8)}) == 8


@pytest.mark.parametrize("columns", [8, 128, 256])
def test_fragments_hold_every_element_once(emulated: Any, columns: int) -> None:
    held = []
    for lane in range(32):
        row, column = emulated.fragment(lane)
        held += [(row + 8 * (i // 2 % 2), column + 8 * (i // 4) + i % 2) for i in range(columns // 2)]
    assert sorted(held) == [(r, c) for r in range(16) for c in range(columns)]


@pytest.mark.parametrize(("kernel", "facts"), [("syrk", "outer"), ("eigenvalue_correction", "squares")])
def test_forms_are_what_is_compiled(emulated: Any, kernel: str, facts: str) -> None:
    for form in cuda_support.forms(kernel):
        compiled = getattr(emulated, f"cuda_{facts}_facts")(form.kernel)
        shared = compiled.pop("shared")
        assert {name: getattr(form, name) for name in compiled} == compiled
        assert form.programs * shared <= (227 if form.device == "sm_90" else 163) * 1024
        assert form.flush % form.depth == 0

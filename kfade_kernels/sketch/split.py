"""How the rows of a sketch are split: its result is narrow, and has too few tiles to fill a GPU."""

from __future__ import annotations

from ..configurations import Configuration
from ..devices import Device

# Beyond so many rows a sum in a matrix unit loses digits; below so few a part costs more traffic than it saves.
MOST_ROWS, LEAST_ROWS = 8192, 256


def part_rows(rows: int, order: int, columns: int, c: Configuration, device: Device) -> int:
    """Rows of one part of the product `[order, rows] × [rows, columns]`, a multiple of a step of its loop.

    As many parts as fill the programs that run at once, a function of shapes and device alone.
    """
    tiles = -(-order // c.block_m) * -(-columns // c.block_n)
    wanted = max(1, c.programs * device.multiprocessors // tiles)
    step = min(MOST_ROWS, max(LEAST_ROWS, -(-rows // wanted)))
    return -(-step // c.block_k) * c.block_k

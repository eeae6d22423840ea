"""`syrk_` and `accumulate_factors_` by Triton: all problems of a call in one launch.

FLOPs: `N·n²` a problem plus the upper parts of diagonal tiles. Bytes at least: x once a group of block
rows, the packed triangle read and written once every `flush` rows. Where tiles are fewer than
programs, rows are split in a fixed way and a second kernel adds the parts in order: no atomics, equal bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from .. import triton_support as support
from ..configurations import Configuration, choose, has_descriptors
from ..devices import Device, of_tensors
from ..packed import PANEL_ROWS

# Below so many rows and orders a launch is not worth its latency.
SMALLEST_ORDER, FEWEST_ROWS = 64, 16
# A split must be worth its share of the second pass, and its workspace is bounded.
ROWS_A_SPLIT = 512
WORKSPACE_BYTES = 256 << 20
MOST_PARTS = 64
# Share of the peak that tiles are assumed to reach when parts are weighed against their traffic.
ATTAINED = 0.6
# Rows that do not begin on 16 bytes are loaded element by element, which takes registers.
ANY_ROWS = Configuration(block_m=64, block_n=64, block_k=32, warps=4, stages=2)
REDUCE, REDUCE_ROWS = Configuration(warps=4, stages=2), 16
# Narrow, so that one factor has many programs, and long, so that each has many loads under way.
COLUMN_SUM = Configuration(block_m=1, block_n=32, block_k=256, warps=8, stages=1)


@dataclass(frozen=True)
class Problem:
    """One outer product: `packed += alpha · xᵀ diag(mask) x`, x `[N, width]` with unit column stride."""

    packed: Tensor
    order: int
    x: Tensor
    mask: Tensor | None
    ones_column: bool

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def width(self) -> int:
        return self.x.shape[1]

    @property
    def whole(self) -> bool:
        """Whether every row of the triangle begins on 16 bytes; only of interest where those of x do."""
        return support.aligned(self.x) and self.order % 4 == 0 and self.packed.data_ptr() % 16 == 0


def problem(packed: Tensor, order: int, x: Tensor, mask: Tensor | None, ones_column: bool) -> Problem:
    return Problem(packed, order, support.rows_of(x), support.as_bytes(mask), ones_column)


def rounds(problems: Sequence[Problem]) -> Iterator[list[Problem]]:
    """Problems in launches that never add to one accumulator twice: tiles are not updated atomically."""
    left = [p for p in problems if p.rows]
    while left:
        seen: set[int] = set()
        now: list[Problem] = []
        later: list[Problem] = []
        for p in left:
            (later if p.packed.data_ptr() in seen else now).append(p)
            seen.add(p.packed.data_ptr())
        # Longest first: the programs that finish early then have short tiles left to take.
        yield sorted(now, key=lambda p: -p.rows)
        left = later


def alike(problems: Sequence[Problem]) -> list[list[Problem]]:
    """Problems that one launch serves: same device, dtype, alignment and masking."""
    groups: dict[tuple[torch.device, torch.dtype, bool, bool, bool], list[Problem]] = {}
    for p in problems:
        groups.setdefault((p.x.device, p.x.dtype, support.aligned(p.x), p.whole, p.mask is not None), []).append(p)
    return list(groups.values())


def tiles_of(width: int, configuration: Configuration) -> int:
    """Tiles of a triangle of this width, those of the last square below the matrix included."""
    side = -(-width // configuration.block_n)
    return side * (side + 1) // 2 * (configuration.block_n // configuration.block_m)


def splits_of(
    rows: Sequence[int], tiles: Sequence[int], configuration: Configuration, device: Device, itemsize: int
) -> list[int]:
    """In how many parts the rows of each problem are summed: what fills the device, and no more.

    A function of shapes and device alone, so that equal calls add in equal order.
    """
    total = sum(tiles)
    if total == 0:
        return [1] * len(rows)
    programs = configuration.programs * device.multiprocessors
    tile = configuration.block_m * configuration.block_n
    mean_rows = sum(count * n for count, n in zip(tiles, rows, strict=True)) / total
    rate = ATTAINED * device.product_flops(itemsize) / programs
    most = min(MOST_PARTS, WORKSPACE_BYTES // (4 * tile * total), max(rows) // ROWS_A_SPLIT)
    # A part is cleared, added to and read: four passes over its tile.
    wanted = support.parts_of(total, programs, most, 2 * tile * mean_rows / rate, 16 * tile / device.bandwidth)
    return [max(1, min(wanted, n // ROWS_A_SPLIT)) for n in rows]


def configure(problems: Sequence[Problem], allow_tf32: bool) -> Configuration:
    """The configuration of one launch."""
    x = problems[0].x
    device = of_tensors(x.device)
    order = max(p.width for p in problems)
    found = choose("syrk", device, x.dtype, order, support.triton_version())
    if allow_tf32 and x.dtype == torch.float32 and device.architecture.startswith("sm_"):
        found = replace(found, precision="tf32")
    return adapt(found, device, support.aligned(x), problems[0].mask is not None)


def adapt(found: Configuration, device: Device, is_aligned: bool, masked: bool) -> Configuration:
    """A configuration for these rows: no descriptors with a mask, and a small tile where loads are element-wise."""
    if not is_aligned:
        return replace(ANY_ROWS, precision=found.precision, group=found.group)
    return replace(found, descriptors=found.descriptors and has_descriptors(device) and not masked)


def add_outer_products(problems: Sequence[Problem], alpha: float, allow_tf32: bool) -> None:
    """Add all problems to their triangles."""
    for together in rounds(problems):
        for group in alike(together):
            _launch(group, alpha, configure(group, allow_tf32))


def _launch(problems: list[Problem], alpha: float, c: Configuration) -> None:
    from .kernel import FIELDS, column_sum_kernel, syrk_kernel, syrk_reduce_kernel

    where = problems[0].x.device
    device = of_tensors(where)
    dtype = support.triton_type(problems[0].x.dtype)
    tiles = [tiles_of(p.width, c) for p in problems]
    splits = splits_of([p.rows for p in problems], tiles, c, device, problems[0].x.element_size())
    table = support.Table(FIELDS)
    partial = split_tiles = 0
    for p, count, parts in zip(problems, tiles, splits, strict=True):
        split_tiles += count if parts > 1 else 0
        table.add(
            count * parts, *place(p), p.rows, p.width, p.order, p.x.stride(0), parts, partial, split_tiles,
        )  # fmt: skip
        partial += count * parts if parts > 1 else 0
    partials = torch.zeros(partial * c.block_m * c.block_n, dtype=torch.float32, device=where)
    shape = {"BM": c.block_m, "BN": c.block_n, "GROUP": c.group, "FIELDS": FIELDS, "PANEL": PANEL_ROWS}
    rows = table.to(where)
    common = {"table": rows, "problems": len(problems), "partials": partials, "alpha": alpha}
    if table.work:
        support.launch(
            syrk_kernel, support.grid(table.work, c, device), c, where, **common, **shape, DTYPE=dtype,
            MASKED=problems[0].mask is not None, ALIGNED=support.aligned(problems[0].x), DESCRIPTORS=c.descriptors,
            WHOLE=problems[0].whole, PRECISION=c.precision, BK=c.block_k,
            FLUSH=max(c.block_k, c.flush // c.block_k * c.block_k),
        )  # fmt: skip
    if split_tiles:
        strip = min(REDUCE_ROWS, c.block_m)
        support.launch(
            syrk_reduce_kernel, (split_tiles, c.block_m // strip), REDUCE, where, **common, **shape, STRIP=strip
        )
    biased = [p for p in problems if p.ones_column]
    if biased:
        sums = support.Table(FIELDS)
        for p in biased:
            blocks = -(-p.order // COLUMN_SUM.block_n)
            sums.add(blocks, *place(p), p.rows, p.width, p.order, p.x.stride(0))
        support.launch(
            column_sum_kernel, sums.work, COLUMN_SUM, where, table=sums.to(where), problems=len(biased), alpha=alpha,
            DTYPE=dtype, MASKED=biased[0].mask is not None, BN=COLUMN_SUM.block_n, BK=COLUMN_SUM.block_k,
            FIELDS=FIELDS, PANEL=PANEL_ROWS,
        )  # fmt: skip


def place(p: Problem) -> tuple[int, int, int]:
    """Addresses of x, of the triangle, and of the mask or 0."""
    return p.x.data_ptr(), p.packed.data_ptr(), support.address(p.mask)


def run(
    packed: Tensor, order: int, x: Tensor, mask: Tensor | None, alpha: float, ones_column: bool, allow_tf32: bool
) -> None:
    add_outer_products([problem(packed, order, x, mask, ones_column)], alpha, allow_tf32)


def gate(operation: str, packed: Sequence[Tensor], orders: Sequence[int], rows: Mapping[str, Tensor]) -> str | None:
    """Why problems are not served, or None; `rows` by their names. Small ones are served with one that is not."""
    for matrix, (name, x) in zip(packed, rows.items(), strict=True):
        reason = support.refusal(operation, name, x.device, (x.dtype, matrix.dtype))
        if reason is not None:
            return reason
    sizes = [(order, x.shape[:-1].numel()) for order, x in zip(orders, rows.values(), strict=True)]
    if support.interpreted() or any(order >= SMALLEST_ORDER and n >= FEWEST_ROWS for order, n in sizes):
        return None
    order, n = max(sizes)
    return f"order {order} with {n} rows is below {SMALLEST_ORDER} and {FEWEST_ROWS}"


def refuses(packed: Tensor, order: int, x: Tensor, *_: object) -> str | None:
    return gate("syrk_", [packed], [order], {"x": x})


def configuration(
    packed: Tensor, order: int, x: Tensor, mask: Tensor | None, alpha: float, ones_column: bool, allow_tf32: bool
) -> str:
    return describe([problem(packed, order, x, mask, ones_column)], allow_tf32)


def describe(problems: Sequence[Problem], allow_tf32: bool) -> str:
    """Problems and launches of a call, and the configuration of the first launch."""
    groups = [group for together in rounds(problems) for group in alike(together)]
    if not groups:
        return "no rows"
    c = configure(groups[0], allow_tf32)
    tiles = [tiles_of(p.width, c) for p in groups[0]]
    x = groups[0][0].x
    splits = splits_of([p.rows for p in groups[0]], tiles, c, of_tensors(x.device), x.element_size())
    parts = f", rows in {max(splits)} parts" if max(splits) > 1 else ""
    return f"{len(problems)} problems in {len(groups)} launches, {sum(tiles)} tiles of {c}{parts}"


def variants(device: Device) -> list[support.Variant]:
    """Every compiled form that shipped configurations can ask for on a device."""
    from .kernel import FIELDS, column_sum_kernel, syrk_kernel, syrk_reduce_kernel

    found = {}
    pointers = {"table": "*i64", "problems": "i32", "partials": "*fp32", "alpha": "fp32"}
    for dtype, shipped in support.shipped_configurations("syrk", device):
        tensor_cores = device.architecture.startswith("sm_") and dtype == torch.float32
        for precision in (shipped.precision, *(("tf32",) if tensor_cores else ())):
            for masked, is_aligned, whole in product((False, True), (True, False), (True, False)):
                if whole and not is_aligned:
                    continue
                c = adapt(replace(shipped, precision=precision), device, is_aligned, masked)
                shape = {"BM": c.block_m, "BN": c.block_n, "GROUP": c.group, "FIELDS": FIELDS, "PANEL": PANEL_ROWS}
                loads = "descriptors" if c.descriptors else "pointers" if is_aligned else "any rows"
                order = "" if whole else ", any order"
                one = support.Variant(
                    f"syrk {support.short(dtype)} {loads}{' masked' if masked else ''}{order}", syrk_kernel, pointers,
                    {**shape, "DTYPE": support.triton_type(dtype), "MASKED": masked, "ALIGNED": is_aligned,
                     "DESCRIPTORS": c.descriptors, "WHOLE": whole, "PRECISION": c.precision, "BK": c.block_k,
                     "FLUSH": c.flush},
                    c, itemsizes=(dtype.itemsize, dtype.itemsize), pipelined=is_aligned,
                )  # fmt: skip
                found[one.name, c] = one
                strip = min(REDUCE_ROWS, c.block_m)
                two = support.Variant(
                    f"syrk reduce {c.block_m}×{c.block_n}", syrk_reduce_kernel, pointers, {**shape, "STRIP": strip},
                    REDUCE, products=False,
                )  # fmt: skip
                found[two.name, REDUCE] = two
        for masked in (False, True):
            sums = support.Variant(
                f"column sums {support.short(dtype)}{' masked' if masked else ''}", column_sum_kernel,
                {"table": "*i64", "problems": "i32", "alpha": "fp32"},
                {"DTYPE": support.triton_type(dtype), "MASKED": masked, "BN": COLUMN_SUM.block_n,
                 "BK": COLUMN_SUM.block_k, "FIELDS": FIELDS, "PANEL": PANEL_ROWS},
                COLUMN_SUM, products=False,
            )  # fmt: skip
            found[sums.name, COLUMN_SUM] = sums
    return list(found.values())

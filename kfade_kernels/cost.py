"""What an operation costs, and the time that a device should need for it.

Each operation has a pure function from sizes to a `Cost`: FLOPs, bytes of device memory, tiles and
launches. `predict` turns a cost into seconds on a device, from the vendor's peaks (`devices`) and one
constant, `ATTAINABLE`. Nothing here is fitted to a measurement of ours, so the distance of a measurement
from its prediction says something.

FLOPs count a multiplication and an addition as two. *Flops* are those that the operation needs, with
symmetry; *effective flops* are those of the plain full product that it replaces, so that their rate can be
compared with a library's. What tiles add at the edges is in `Part.tile_flops`, not in `flops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .configurations import Configuration
from .devices import Device
from .packed import packed_elements
from .rotation import rotates_tokens
from .sketch.split import part_rows
from .syrk.triton import splits_of, tiles_of

# Share of a peak that large products and copies reach. H100: cuBLAS reaches about 800 of 990 TFLOP/s in
# bfloat16. The others of its vendor are assumed to be like it; public measurements of hipBLASLt on an
# MI300X lie between 600 and 750 of 1,307.
ATTAINABLE = {"sm_": 0.81, "gfx": 0.5}
SIXTEEN_BIT, PAIR, NONE = "16-bit", "pair", "none"
_STATE_BYTES = 4


@dataclass(frozen=True)
class Part:
    """One launch (or a few alike) of an operation.

    Attributes:
        name: what it does.
        flops: on the matrix units, those needed.
        effective_flops: those of the plain full product.
        bytes: of device memory that must be moved at least, each operand once.
        precision: class of its products: `16-bit`, `pair` (16-bit times a bfloat16 pair), `tf32`,
            `tf32x3`, `bf16x6`, `ieee`, or `none`.
        tiles: work items of its grid; 0 where it streams, and where a library's product does it.
        tile_flops: of one of them, with what lies outside the matrix.
        programs: that are resident on a multiprocessor.
        launches: kernels started.
    """

    name: str
    flops: float
    effective_flops: float
    bytes: float
    precision: str = NONE
    tiles: int = 0
    tile_flops: float = 0.0
    programs: int = 1
    launches: int = 1


@dataclass(frozen=True)
class Cost:
    """What one call costs: its parts, and their sums."""

    operation: str
    parts: tuple[Part, ...]

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)

    @property
    def effective_flops(self) -> float:
        return sum(part.effective_flops for part in self.parts)

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def tiles(self) -> int:
        return sum(part.tiles for part in self.parts)

    @property
    def launches(self) -> int:
        return sum(part.launches for part in self.parts)

    @property
    def precision(self) -> str:
        """Class of the part with the most FLOPs."""
        return max(self.parts, key=lambda part: part.flops).precision


@dataclass(frozen=True)
class Prediction:
    """Time that a device should need.

    Attributes:
        seconds: of the whole call: the slower of arithmetic and memory in each part, and the launches.
        arithmetic_seconds, memory_seconds, launch_seconds: summed over the parts.
        waves: of tiles over the programs that run at once, summed over the parts.
        quantisation: share of the arithmetic time in which programs of a last wave stand idle.
        limit: what takes longest: `arithmetic`, `memory` or `launches`.
    """

    seconds: float
    arithmetic_seconds: float
    memory_seconds: float
    launch_seconds: float
    waves: float
    quantisation: float
    limit: str


def precision_of(dtype: torch.dtype, configuration: Configuration) -> str:
    """Class of the products of operands of this dtype."""
    return SIXTEEN_BIT if dtype.itemsize == 2 else configuration.precision


def attainable(device: Device) -> float:
    """Share of the peak that is counted on."""
    return next((share for prefix, share in ATTAINABLE.items() if device.architecture.startswith(prefix)), 0.5)


def product_rate(device: Device, precision: str) -> float:
    """Peak FLOP/s of products of a class, dense; a float32-grade product takes three TF32 or six bfloat16 ones."""
    if precision in (SIXTEEN_BIT, PAIR, "bf16x6"):
        return device.bf16_flops / {SIXTEEN_BIT: 1, PAIR: 2, "bf16x6": 6}[precision]
    if precision in ("tf32", "tf32x3"):
        return device.tf32_flops / {"tf32": 1, "tf32x3": 3}[precision]
    if precision == "ieee":
        # AMD's matrix units multiply float32 as it is; NVIDIA's do not.
        return device.tf32_flops if device.architecture.startswith("gfx") else device.float32_flops
    raise ValueError(f"precision is {precision!r}; it must be 16-bit, pair, tf32, tf32x3, bf16x6 or ieee")


def waves(part: Part, device: Device) -> float:
    """Tiles over the programs that a persistent grid runs at once."""
    return part.tiles / (part.programs * device.multiprocessors)


def predict(cost: Cost, device: Device) -> Prediction:
    """The time that a call should take.

    Arithmetic: `⌈waves⌉` rounds of one tile on each program, each at its share of the attainable peak.
    Memory: bytes over the attainable bandwidth. The two overlap within a part; parts follow each other.
    """
    share = attainable(device)
    total = arithmetic = memory = idle = rounds = 0.0
    for part in cost.parts:
        if part.tiles:
            programs = part.programs * device.multiprocessors
            whole = -(-part.tiles // programs)
            spent = whole * programs * part.tile_flops / (share * product_rate(device, part.precision))
            rounds += waves(part, device)
            idle += spent * (1 - part.tiles / (whole * programs))
        else:
            spent = part.flops / (share * product_rate(device, part.precision)) if part.flops else 0.0
        moved = part.bytes / (share * device.bandwidth)
        arithmetic, memory, total = arithmetic + spent, memory + moved, total + max(spent, moved)
    launching = cost.launches * device.launch_seconds
    limit = max((arithmetic, "arithmetic"), (memory, "memory"), (launching, "launches"))[1]
    return Prediction(
        total + launching, arithmetic, memory, launching, rounds, idle / arithmetic if arithmetic else 0.0, limit
    )


def _blocks(extent: int, block: int) -> int:
    return -(-extent // block)


def product(
    name: str, rows: int, columns: int, inner: int, precision: str, configuration: Configuration, **moved: float
) -> Part:
    """`[rows, inner] × [inner, columns]`: `2 · rows · columns · inner` FLOPs; the bytes are the caller's."""
    c = configuration
    flops = 2.0 * rows * columns * inner
    tile_flops = 2.0 * c.block_m * c.block_n * _blocks(inner, c.block_k) * c.block_k
    tiles = _blocks(rows, c.block_m) * _blocks(columns, c.block_n)
    return Part(name, flops, flops, sum(moved.values()), precision, tiles, tile_flops, c.programs)


def syrk(
    rows: int,
    order: int,
    dtype: torch.dtype,
    configuration: Configuration,
    device: Device | None = None,
    *,
    ones_column: bool = False,
) -> Cost:
    """`syrk_`: one problem of `accumulate_factors`."""
    width = order - int(ones_column)
    return Cost("syrk_", _outer_products([(rows, width, order)], dtype, configuration, device))


def accumulate_factors(
    problems: Sequence[tuple[int, int]], dtype: torch.dtype, configuration: Configuration, device: Device | None = None
) -> Cost:
    """`accumulate_factors_` of problems `(rows N, order n)`, all in one launch.

    FLOPs of a problem: `N·n²`, half of the full product's `2·N·n²`. Bytes at least: x once, and the packed
    triangle read and written. The tiles are those of the lower triangle, in squares of `block_n`; with
    `device`, rows are split as the kernel splits them where tiles are few, which adds the parts' way through memory.
    """
    return Cost("accumulate_factors_", _outer_products([(n, m, m) for n, m in problems], dtype, configuration, device))


def _outer_products(
    problems: Sequence[tuple[int, int, int]], dtype: torch.dtype, c: Configuration, device: Device | None
) -> tuple[Part, ...]:
    rows = [n for n, _, _ in problems]
    tiles = [tiles_of(width, c) for _, width, _ in problems]
    splits = [1] * len(problems) if device is None else splits_of(rows, tiles, c, device, dtype.itemsize)
    flops = float(sum(n * width**2 for n, width, _ in problems))
    moved = sum(n * width * dtype.itemsize + 2 * _STATE_BYTES * packed_elements(order) for n, width, order in problems)
    items = sum(count * parts for count, parts in zip(tiles, splits, strict=True))
    summed = sum(count * n for count, n in zip(tiles, rows, strict=True))
    tile_flops = 2.0 * c.block_m * c.block_n * summed / max(1, items)
    found = [Part("triangles", flops, 2 * flops, moved, precision_of(dtype, c), items, tile_flops, c.programs)]
    split = sum(count * parts for count, parts in zip(tiles, splits, strict=True) if parts > 1)
    if split:
        found.append(Part("ordered sum", 0.0, 0.0, 2.0 * _STATE_BYTES * split * c.block_m * c.block_n))
    ones = sum(n * width * dtype.itemsize for n, width, order in problems if order > width)
    if ones:
        found.append(Part("column sums", 0.0, 0.0, ones))
    return tuple(found)


def rotate(
    rows: int, width: int, dtype: torch.dtype, configuration: Configuration, *, name: str = "rotate tokens"
) -> Part:
    """`x Q` with x `[rows, width]`: `2·rows·width²` FLOPs, with a pair for bfloat16 rows, else in float32 grade.

    Bytes at least: x read, Q in 4 bytes an element (float32 or the pair), the result written.
    """
    precision = PAIR if dtype == torch.bfloat16 else configuration.precision
    return product(
        name, rows, width, width, precision, configuration,
        x=2.0 * rows * width * dtype.itemsize, q=float(_STATE_BYTES * width**2),
    )  # fmt: skip


def sketch(
    rows: int, order: int, columns: int, dtype: torch.dtype, configuration: Configuration, device: Device | None = None
) -> Cost:
    """`sketch_` of `x [N, n]` with Ω `[n, l]`: two products, `4·N·n·l` FLOPs in float32 grade.

    Bytes at least: x once for each product and once for the trace, `x Ω` written and read, Ω, and the parts of the
    result (as many as the rows are split in on the device, one without) written, then read and added to y.
    """
    c = configuration
    x, projected, state = (float(n) for n in (
        rows * order * dtype.itemsize, _STATE_BYTES * rows * columns, _STATE_BYTES * order * columns,
    ))  # fmt: skip
    step = part_rows(rows, order, columns, c, device) if device is not None else max(1, rows)
    parts = _blocks(rows, step)
    one = product("back", order, columns, min(step, rows), c.precision, c)
    flops = 2.0 * rows * order * columns
    return Cost("sketch_", (
        product("project", rows, columns, order, c.precision, c, x=x, omega=state, p=projected),
        replace(one, flops=flops, effective_flops=flops, bytes=x + projected + parts * state, tiles=parts * one.tiles),
        Part("ordered sum", 0.0, 0.0, (parts + 2) * state),
        Part("trace", 0.0, 0.0, x),
    ))  # fmt: skip


def eigenvalue_correction(
    sequences: int,
    tokens: int,
    d_out: int,
    d_in: int,
    dtype: torch.dtype,
    configuration: Configuration,
    rotations: Configuration | None = None,
    *,
    rotated: bool = False,
) -> Cost:
    """`eigenvalue_correction_` of B sequences of T tokens, N = B·T.

    Each side is rotated where that is cheaper: its tokens, `2·N·d²` FLOPs, or the gradient of each
    sequence, `2·B·d²·d'` with d' the other side's width (tokens when `T < d'`). The outer products are
    `2·N·d_out·d_in`. So with tokens rotated on both sides `2·N·(d_out² + d_in²) + 2·N·d_out·d_in`.
    Bytes at least: tokens in and out of each rotation, Λ read and written once; a gradient that is rotated
    also goes through memory, once for each product that makes or takes it.

    Args:
        sequences, tokens: B and T.
        d_out, d_in: widths.
        dtype: of g and a.
        configuration: of the tiles of Λ.
        rotations: of the rotations; the same where there is none.
        rotated: g and a are in the eigenbasis already.
    """
    c, turning, count = configuration, rotations or configuration, sequences * tokens
    state = float(_STATE_BYTES * d_out * d_in)
    if dtype == torch.float16 and not rotated:
        dtype = torch.float32  # eigenvectors come in float32 or as a bfloat16 pair, and the products are in their dtype
    by_tokens = {"output": rotates_tokens(tokens, d_in), "input": rotates_tokens(tokens, d_out)}
    parts = [
        rotate(count, width, dtype, turning, name=f"rotate {side} tokens")
        for side, width in (("output", d_out), ("input", d_in))
        if by_tokens[side] and not rotated
    ]
    by_gradient = [side for side in by_tokens if not by_tokens[side] and not rotated]
    read = float(count * (d_out + d_in) * dtype.itemsize)
    flops = 2.0 * count * d_out * d_in
    tiles = _blocks(d_out, c.block_m) * _blocks(d_in, c.block_n)
    padded = sequences * _blocks(tokens, c.block_k) * c.block_k
    precision = precision_of(dtype, c)
    if not by_gradient:
        tile_flops = 2.0 * c.block_m * c.block_n * padded
        parts.append(
            Part("products and squares", flops, flops, read + 2 * state, precision, tiles, tile_flops, c.programs)
        )
        return Cost("eigenvalue_correction_", tuple(parts))
    one = product("gradients", d_out, d_in, tokens, precision, turning)
    parts.append(_repeated(one, sequences, read + sequences * state))
    for side in by_gradient:
        width = d_out if side == "output" else d_in
        one = product(f"rotate gradients, {side} side", d_out, d_in, width, turning.precision, turning)
        parts.append(_repeated(one, sequences, 2 * sequences * state + _STATE_BYTES * width**2))
    return Cost("eigenvalue_correction_", tuple(parts))


def _repeated(part: Part, times: int, moved: float) -> Part:
    """A part done so many times in one launch."""
    flops, effective = times * part.flops, times * part.effective_flops
    return replace(part, flops=flops, effective_flops=effective, bytes=moved, tiles=times * part.tiles)


def kron_solve(
    d_out: int,
    d_in: int,
    configuration: Configuration,
    *,
    batch: int = 1,
    pair: bool = False,
    tokens: int | None = None,
) -> Cost:
    """`kron_solve` in float32 grade: `4·d_out·d_in·(d_out + d_in)` FLOPs a right-hand side.

    Two products rotate, `2·d_out²·d_in + 2·d_out·d_in²`, and two rotate back; the division is in the
    second. Bytes at least: what each product reads and writes, and Λ.

    Args:
        d_out, d_in: shape of a right-hand side.
        configuration: of the products.
        batch: right-hand sides.
        pair: Λ is the outer product of two vectors.
        tokens: the right-hand side is given as factors g and a of so many tokens N: these are rotated
            instead, `2·N·(d_out² + d_in²)`, and multiplied, `2·N·d_out·d_in`.
    """
    c = configuration
    v = 2.0 * _STATE_BYTES * batch * d_out * d_in
    q_out, q_in = float(_STATE_BYTES * d_out**2), float(_STATE_BYTES * d_in**2)
    values = float(_STATE_BYTES * (d_out + d_in if pair else d_out * d_in))
    rows = batch * d_out
    if tokens is None:
        first = [
            product("rotate rows", rows, d_in, d_out, c.precision, c, v=v, q=q_out),
            product("rotate columns, divide", rows, d_in, d_in, c.precision, c, v=v, q=q_in, values=values),
        ]
    else:
        first = [
            rotate(tokens, d_out, torch.float32, c, name="rotate output tokens"),
            rotate(tokens, d_in, torch.float32, c, name="rotate input tokens"),
            product(
                "multiply, divide", d_out, d_in, tokens, c.precision, c,
                tokens=float(_STATE_BYTES * tokens * (d_out + d_in)), v=v / 2, values=values,
            ),
        ]  # fmt: skip
    back = [
        product("rotate rows back", rows, d_in, d_out, c.precision, c, v=v, q=q_out),
        product("rotate columns back", rows, d_in, d_in, c.precision, c, v=v, q=q_in),
    ]
    return Cost("kron_solve", (*first, *back))


def sampled_cross_entropy(rows: int, vocabulary: int, dtype: torch.dtype, *, hidden: int | None = None) -> Cost:
    """`sampled_cross_entropy` of logits `[N, V]`, or of hidden states `[N, d]` with the projection fused in.

    Logits: no products; one read and one write of `N·V`. Fused: the logits `2·N·V·d` and the gradient
    `2·N·V·d`, together `4·N·d·V` FLOPs by the library's products; bytes at least are the hidden states in
    and out and the weight once for each product, since a chunk of logits may stay in the last-level cache.
    """
    if hidden is None:
        return Cost("sampled_cross_entropy", (Part("stream", 0.0, 0.0, 2.0 * rows * vocabulary * dtype.itemsize),))
    precision = SIXTEEN_BIT if dtype.itemsize == 2 else "ieee"
    flops, moved = 2.0 * rows * vocabulary * hidden, float((rows + vocabulary) * hidden * dtype.itemsize)
    return Cost(
        "sampled_cross_entropy",
        tuple(Part(name, flops, flops, moved, precision) for name in ("logits", "gradient")),
    )


def together(costs: Sequence[Cost]) -> Cost:
    """Equal steps of several calls, each step in one launch."""
    steps = []
    for parts in zip(*(cost.parts for cost in costs), strict=True):
        tiles = sum(part.tiles for part in parts)
        summed = sum(part.tiles * part.tile_flops for part in parts)
        steps.append(
            replace(
                parts[0],
                flops=sum(part.flops for part in parts),
                effective_flops=sum(part.effective_flops for part in parts),
                bytes=sum(part.bytes for part in parts),
                tiles=tiles,
                tile_flops=summed / max(1, tiles),
            )
        )
    return Cost(costs[0].operation, tuple(steps))


def apply_update(
    elements: int, dtype: torch.dtype, delta_dtype: torch.dtype, *, gradient_dtype: torch.dtype | None = None
) -> Cost:
    """Adding an update to weights: each weight read and written, each delta (and gradient) read once."""
    each = 2 * dtype.itemsize + delta_dtype.itemsize + (gradient_dtype.itemsize if gradient_dtype else 0)
    return Cost("apply_update_", (Part("stream", 0.0, 0.0, float(elements * each)),))


def eigh(order: int, dtype: torch.dtype, *, batch: int = 1) -> Cost:
    """A floor for a symmetric eigendecomposition (Golub and Van Loan, Matrix Computations, §8.3).

    Reduction to a tridiagonal matrix: `4/3·n³` FLOPs, half of them in products of the trailing matrix
    with one vector, which read it from memory for each of n columns, `n³/3` elements. Back-transformation
    of the eigenvectors: `2·n³`. The tridiagonal problem between them is left out. Not one of our kernels:
    it says how far the library is from what memory allows.
    """
    n3 = float(batch) * order**3
    return Cost(
        "eigh",
        (
            Part("reduction", 4 / 3 * n3, 4 / 3 * n3, n3 / 3 * dtype.itemsize, "ieee", launches=order),
            Part("back-transformation", 2 * n3, 2 * n3, 3.0 * batch * order**2 * dtype.itemsize, "ieee"),
        ),
    )


def model_pass(parameters: int, tokens: int, *, weight_gradients: bool = False) -> Cost:
    """Forward and backward of a model in 16 bit: 4 FLOPs a parameter and token, 6 with weight gradients.

    Two forward, two for the gradient of the activations, and two for that of the weights, which a fit
    leaves out. `parameters` counts those of linear layers, the output projection included; attention
    scores are not counted. Bytes at least: each parameter once forward and once backward.
    """
    flops = (6.0 if weight_gradients else 4.0) * parameters * tokens
    return Cost("model", (Part("forward and backward", flops, flops, 4.0 * parameters, SIXTEEN_BIT),))

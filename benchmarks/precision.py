"""What the ways to multiply float32 operands on matrix units lose: the study behind the float32-grade mode.

    python benchmarks/precision.py                # half a minute on a CPU; no GPU is used
    python benchmarks/precision.py --no-record    # print only

Each mode is emulated as Triton compiles it and as the hardware defines it: operands are split, rounded or cut,
and the products of what is left are exact. Only what a matrix unit drops inside a step is left out. Three questions
are asked, against float64: an outer product `xᵀ x`, a rotation of rows into the eigenbasis of a steep spectrum, and a
sum over very many rows in an accumulator that truncates. Beside that the peak rates of each mode.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from kfade_kernels.configurations import choose
from kfade_kernels.cost import product_rate
from kfade_kernels.devices import DEVICES
from kfade_kernels.precision import bf16_pair
from kfade_kernels.triton_support import triton_version
from records import append
from torch import Tensor

ROWS, ORDER = 4096, 512
# Summed rows between two additions to the accumulator: `block_k` of the shipped float32 configurations.
STEP = 32
# Standard deviation along the last direction; 1 along the first.
STEEPEST = 1e-6
SUMMED_ROWS, BLOCK_ROWS, FLUSH = 1_000_000, 16, 8192
# Bits of a float32 that TF32 does not have.
_DROPPED = 13
Products = list[tuple[Tensor, Tensor]]


def truncate_tf32(x: Tensor) -> Tensor:
    """x in the 11 significant bits of TF32, toward zero: what matrix units read of a float32 operand."""
    return (x.view(torch.int32) & -(1 << _DROPPED)).view(torch.float32)


def round_tf32(x: Tensor) -> Tensor:
    """x in the 11 significant bits of TF32, to nearest, ties away from zero: `cvt.rna.tf32.f32`."""
    return ((x.view(torch.int32) + (1 << (_DROPPED - 1))) & -(1 << _DROPPED)).view(torch.float32)


def bf16_parts(x: Tensor, count: int) -> list[Tensor]:
    """So many bfloat16 parts of x, the largest first, in float32; three of them are all of x."""
    parts = []
    for _ in range(count):
        parts.append(x.bfloat16().float())
        x = x - parts[-1]
    return parts


def _tf32x3(a: Tensor, b: Tensor) -> Products:
    a_big, b_big = round_tf32(a), round_tf32(b)
    a_small, b_small = truncate_tf32(a - a_big), truncate_tf32(b - b_big)
    return [(a_small, b_big), (a_big, b_small), (a_big, b_big)]


def _bf16(a: Tensor, b: Tensor, count: int) -> Products:
    """All products of so many bfloat16 parts but the smallest: three of two parts, six of three."""
    left, right = bf16_parts(a, count), bf16_parts(b, count)
    return [(left[i], right[j]) for i in range(count) for j in range(count - i)]


# The products of a mode, of operands in float32.
MODES: Mapping[str, Callable[[Tensor, Tensor], Products]] = {
    "tf32, rounded": lambda a, b: [(round_tf32(a), round_tf32(b))],
    "tf32": lambda a, b: [(truncate_tf32(a), truncate_tf32(b))],
    "tf32x3": _tf32x3,
    "bf16x3": lambda a, b: _bf16(a, b, 2),
    "bf16x6": lambda a, b: _bf16(a, b, 3),
    "right in bf16": lambda a, b: [(a, b.bfloat16().float())],
    "right as a bf16 pair": lambda a, b: [(a, part.float()) for part in bf16_pair(b)],
}


def multiply(mode: str, a: Tensor, b: Tensor) -> Tensor:
    """`a b` in float32 by one of `MODES`, or by the processor's own `float32` products.

    What a step of `STEP` summed rows gives is exact, and rounded when it is added to the accumulator.
    """
    if mode == "float32":
        return a @ b
    products = MODES[mode](a, b)
    acc = torch.zeros(a.shape[0], b.shape[1])
    for k in range(0, a.shape[1], STEP):
        step = [left[:, k : k + STEP].double() @ right[k : k + STEP].double() for left, right in products]
        acc += torch.stack(step).sum(0).float()
    return acc


@dataclass(frozen=True)
class Found:
    """One number: what a mode did in a case."""

    case: str
    mode: str
    measure: str
    value: float


def steep_rows(rows: int, order: int) -> tuple[Tensor, Tensor]:
    """Rows `[rows, order]` whose standard deviation falls from 1 to `STEEPEST` over directions; these, in columns.

    Both float32, the directions rounded from float64.
    """
    directions, _ = torch.linalg.qr(torch.randn(order, order, dtype=torch.float64))
    scales = torch.logspace(0, torch.tensor(STEEPEST).log10().item(), order, dtype=torch.float64)
    rows_in_basis = torch.randn(rows, order, dtype=torch.float64) * scales
    return (rows_in_basis @ directions.T).float(), directions.float()


def relative(value: Tensor, truth: Tensor) -> float:
    """Frobenius distance from the truth, relative to it."""
    return float(torch.linalg.norm(value.double() - truth) / torch.linalg.norm(truth))


def outer_product(case: str, x: Tensor) -> Iterator[Found]:
    """`xᵀ x` by every mode: the error of the whole, and what is lost of the diagonal on the average."""
    truth = x.double().T @ x.double()
    for mode in ("float32", *MODES):
        value = multiply(mode, x.T.contiguous(), x).double()
        yield Found(case, mode, "relative error", relative(value, truth))
        yield Found(case, mode, "bias of the trace", float(value.trace() / truth.trace() - 1))


def rotation(case: str, x: Tensor, q: Tensor) -> Iterator[Found]:
    """`x q` by every mode: the error of the mean square of a column, median over the half of smallest ones."""
    truth = (x.double() @ q.double()).square().mean(0)
    small = truth.argsort()[: truth.numel() // 2]
    for mode in ("float32", *MODES):
        rotated = multiply(mode, x, q)
        kept = {mode: rotated} | ({f"{mode}, result in bf16": rotated.bfloat16()} if "pair" in mode else {})
        for name, value in kept.items():
            error = (value.double().square().mean(0) / truth - 1).abs()[small].median()
            yield Found(case, name, "median error of small directions", float(error))


def _truncated(x: Tensor) -> Tensor:
    """Float64 numbers in 24 significant bits, toward zero."""
    return (x.view(torch.int64) & -(1 << 29)).view(torch.float64)


def accumulated(blocks: Tensor, flush: int, *, truncate: bool) -> Tensor:
    """Sum exact sums of blocks `[blocks, sums]` one after another in an accumulator of 24 bits.

    Args:
        blocks: float64.
        flush: blocks between two additions of the accumulator to a float32 sum; these are to nearest.
        truncate: the accumulator drops bits; else it rounds to nearest.
    """
    count, sums = blocks.shape
    padded = torch.cat([blocks, blocks.new_zeros(-count % flush, sums)])
    chunks = padded.view(-1, flush, sums)
    acc = blocks.new_zeros(chunks.shape[0], sums)
    for step in range(flush):
        acc += chunks[:, step]
        acc = _truncated(acc) if truncate else acc.float().double()
    total = torch.zeros(sums, dtype=torch.float32)
    for chunk in acc:
        total += chunk.float()
    return total


def accumulation(rows: int, columns: int = 64) -> Iterator[Found]:
    """Squares of bfloat16 numbers, such as a factor's diagonal sums: what is lost of them on the average."""
    x = torch.randn(rows // BLOCK_ROWS, BLOCK_ROWS, columns).bfloat16().double()
    blocks = x.square_().sum(1)
    truth = blocks.sum(0)
    for name, flush, truncate in (
        ("to nearest, one accumulator", blocks.shape[0], False),
        ("truncating, one accumulator", blocks.shape[0], True),
        (f"truncating, flushed every {FLUSH} rows", FLUSH // BLOCK_ROWS, True),
    ):
        bias = (accumulated(blocks, flush, truncate=truncate).double() / truth - 1).mean()
        yield Found(f"diagonal, {rows} rows", name, "bias", float(bias))


def study(rows: int = ROWS, order: int = ORDER, summed_rows: int = SUMMED_ROWS) -> Iterator[Found]:
    """All cases."""
    yield from outer_product("xᵀx, normal rows", torch.randn(rows, order))
    x, q = steep_rows(rows, order)
    yield from outer_product("xᵀx, steep spectrum", x)
    yield from rotation("rotation, steep spectrum, float32 rows", x, q)
    # Rounding gives 16-bit rows a floor along every direction, which is then part of them.
    narrow = x.bfloat16().float()
    _, basis = torch.linalg.eigh(narrow.double().T @ narrow.double())
    yield from rotation("rotation, steep spectrum, bf16 rows", narrow, basis.float())
    yield from accumulation(summed_rows)


def rates() -> None:
    """Print what ships for float32 products on each device, and the peak of each mode in TFLOP/s."""
    modes = ("ieee", "tf32", "tf32x3", "bf16x6")
    print(f"\n{'peak TFLOP/s':20}{'ships':>10}" + "".join(f"{mode:>10}" for mode in modes))
    for device in DEVICES:
        shipped = choose("syrk", device, torch.float32, 4096, triton_version()).precision
        amd = device.architecture.startswith("gfx")
        peaks = ("–" if amd and mode != "ieee" else f"{product_rate(device, mode) * 1e-12:.0f}" for mode in modes)
        print(f"{device.name:20}{shipped:>10}" + "".join(f"{peak:>10}" for peak in peaks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    torch.manual_seed(0)
    found = []
    print(f"{'case':40}{'mode':40}{'measure':34}{'value':>9}")
    for one in study():
        print(f"{one.case:40}{one.mode:40}{one.measure:34}{one.value:9.1e}", flush=True)
        found.append(one)
    rates()
    if not options.no_record:
        path = append("precision", [asdict(one) | {"value": f"{one.value:.3e}"} for one in found], packages=("torch",))
        print(f"recorded in {path}")


if __name__ == "__main__":
    main()

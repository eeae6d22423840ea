"""Compile every kernel for every target, without a GPU, and say what came out.

    python -m kfade_kernels.ahead_of_time                       # all targets, a table
    python -m kfade_kernels.ahead_of_time --target sm_90 --only syrk
    python -m kfade_kernels.ahead_of_time --out compiled.csv    # registers, shared memory, occupancy

Each variant of a kernel that a shipped configuration can ask for is compiled for each architecture and
checked: the matrix instruction of that target is there, nothing is spilled, no trap was compiled in, the
shared memory fits, products have the precision that was asked for, and loads are asynchronous. The exit
status is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .devices import ARCHITECTURES, Device, by_architecture
from .triton_support import Variant, triton_version

# Folders whose `triton.py` says which variants there are.
KERNELS = ("apply_update", "eigenvalue_correction", "product", "sampled_cross_entropy", "syrk")

# A multiprocessor: registers, threads, programs.
_REGISTERS, _THREADS, _PROGRAMS = 65536, 2048, 32
# The matrix instruction of a family of architectures.
_PRODUCT = {
    "sm_8": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_10": "tcgen05.mma",
    "gfx": "v_mfma_",
}
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global [^;]*, 0x([0-9a-f]+)[,;]")
_TILE_COPY = "cp.async.bulk.tensor"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one variant for one architecture.

    Attributes:
        target: architecture.
        kernel: name of the variant.
        tile: rows × columns × summed rows, of the configuration.
        warps, stages: of the configuration.
        precision: of its products, as compiled; empty where it has none.
        registers: a thread.
        spills: bytes of local memory a thread.
        shared: bytes a program.
        programs: that fit on one multiprocessor at once (0: unknown).
        faults: what is wrong, separated by semicolons.
    """

    target: str
    kernel: str
    tile: str
    warps: int
    stages: int
    precision: str
    registers: int
    spills: int
    shared: int
    programs: int
    faults: str


def _target(device: Device) -> Any:
    from triton.backends.compiler import GPUTarget

    if device.architecture.startswith("gfx"):
        return GPUTarget("hip", device.architecture, device.threads)
    return GPUTarget("cuda", int(device.architecture[3:]), device.threads)


def _tool(name: str) -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else name


def _resources(compiled: Any, device: Device) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory that hold spilled ones."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def value(name: str) -> int:
            found = re.search(rf"\.{name}:\s*(\d+)", text)
            return int(found.group(1)) if found else 0

        # Scalar registers spill to lanes of vector registers, not to memory.
        return value("vgpr_count"), 4 * value("vgpr_spill_count")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = re.search(r"REG:(\d+)", text)
    stack = re.search(r"STACK:(\d+)", text)
    local = re.search(r"LOCAL:(\d+)", text)
    if registers is None or stack is None or local is None:
        raise RuntimeError(f"cuobjdump printed no resources: {text!r}")
    return int(registers.group(1)), int(stack.group(1)) + int(local.group(1))


def _occupancy(registers: int, shared: int, warps: int, device: Device) -> int:
    if device.architecture.startswith("gfx"):
        return 0
    by_registers = _REGISTERS // (warps * -(-registers * device.threads // 256) * 256)
    by_shared = device.multiprocessor_shared_bytes // (shared + 1024)
    return min(by_registers, by_shared, _THREADS // (warps * device.threads), _PROGRAMS)


def _precisions(ttir: str) -> set[str]:
    """Precision of each product of float32 operands, and `16-bit` for the others."""
    found = set()
    for line in ttir.splitlines():
        if "tt.dot " in line:
            operands = line.rsplit(" : ", 1)[1]
            asked = re.search(r"inputPrecision = (\w+)", line)
            found.add("16-bit" if "xf32> *" not in operands else asked.group(1) if asked else "ieee")
    return found


def _is_asynchronous(ptx: str, variant: Variant, device: Device) -> bool:
    """Whether both operands' tiles are copied asynchronously, once a stage of the pipeline."""
    c = variant.configuration
    if variant.constants.get("DESCRIPTORS"):
        return ptx.count(_TILE_COPY) >= 2 * c.stages
    copied = sum(int(size, 16) for size in _COPY.findall(ptx)) * c.warps * device.threads
    left, right = variant.itemsizes
    return copied >= c.stages * (c.block_m * left + c.block_n * right) * c.block_k


def compile_variant(variant: Variant, architecture: str) -> Compiled:
    """Compile one variant for one architecture and check the result."""
    import triton
    from triton.compiler import ASTSource

    device = by_architecture(architecture)
    c = variant.configuration
    names = variant.kernel.arg_names
    pointers = variant.aligned
    if pointers is None:
        pointers = tuple(name for name, kind in variant.signature.items() if kind.startswith("*"))
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    tile = f"{c.block_m}×{c.block_n}×{c.block_k}"
    try:
        compiled = triton.compile(
            source, target=_target(device), options={"num_warps": c.warps, "num_stages": c.stages}
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return Compiled(architecture, variant.name, tile, c.warps, c.stages, "", 0, 0, 0, 0, f"not compiled: {reason}")
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    precisions = _precisions(compiled.asm["ttir"])
    registers, spills = _resources(compiled, device)
    shared = int(compiled.metadata.shared)
    faults = []
    product = next(name for prefix, name in _PRODUCT.items() if architecture.startswith(prefix))
    if variant.products and product not in text:
        faults.append(f"no {product}")
    if re.search(r"\btrap;|s_trap", text):
        faults.append("a trap")
    if spills:
        faults.append(f"{spills} bytes spilled")
    if shared > device.shared_bytes:
        faults.append(f"{shared} bytes of shared memory of {device.shared_bytes}")
    expected = {"16-bit"} if max(variant.itemsizes) == 2 else {c.precision}
    if variant.products and precisions != expected:
        faults.append(f"products are {sorted(precisions)}, not {sorted(expected)}")
    if variant.pipelined and architecture.startswith("sm_") and not _is_asynchronous(text, variant, device):
        faults.append("loads are not asynchronous")
    if variant.pipelined and architecture.startswith("gfx") and not re.search(r"load_dwordx4", text):
        faults.append("loads are not 16 bytes wide")
    return Compiled(
        architecture,
        variant.name,
        tile,
        c.warps,
        c.stages,
        "/".join(sorted(precisions)) if variant.products else "",
        registers,
        spills,
        shared,
        _occupancy(registers, shared, c.warps, device),
        "; ".join(faults),
    )


def variants(architecture: str) -> list[Variant]:
    """Every variant of every kernel for one architecture."""
    device = by_architecture(architecture)
    return [v for name in KERNELS for v in import_module(f"kfade_kernels.{name}.triton").variants(device)]


def _compile_numbered(architecture: str, number: int) -> Compiled:
    return compile_variant(variants(architecture)[number], architecture)


def compile_all(targets: Sequence[str] = ARCHITECTURES, only: str = "", processes: int = 0) -> list[Compiled]:
    """Compile all variants whose name contains `only`, in a few processes.

    Raises:
        RuntimeError: Triton's interpreter is on: it replaces what would be compiled.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET is 1; it must be unset to compile kernels")
    jobs = [(target, number) for target in targets for number, v in enumerate(variants(target)) if only in v.name]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(processes or min(usable, 8)) as pool:
        return list(pool.map(_compile_numbered, *zip(*jobs, strict=True), chunksize=4)) if jobs else []


COLUMNS = ("target", "kernel", "tile", "warps", "stages", "precision", "registers", "spills", "shared", "programs")


def write_table(path: Path, results: Iterable[Compiled]) -> None:
    """Write registers, shared memory and occupancy as CSV; the first line says for which Triton."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# Triton {triton_version()}; python -m kfade_kernels.ahead_of_time --out {path.name}\n")
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=ARCHITECTURES, action="append", help="an architecture; may be repeated")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--out", type=Path, help="write the table as CSV")
    options = parser.parse_args()
    results = compile_all(options.target or ARCHITECTURES, options.only)
    print(
        f"{'target':8}{'kernel':44}{'tile':>14}{'warps':>7}{'stages':>8}{'registers':>11}{'shared':>9}{'programs':>10}"
    )
    for r in results:
        print(
            f"{r.target:8}{r.kernel:44}{r.tile:>14}{r.warps:>7}{r.stages:>8}{r.registers:>11}{r.shared:>9}"
            f"{r.programs or '–':>10}  {r.faults}"
        )
    if options.out:
        write_table(options.out, results)
    return int(any(r.faults for r in results))


if __name__ == "__main__":
    sys.exit(main())

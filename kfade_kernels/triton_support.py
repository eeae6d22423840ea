"""What the Triton backends share: when they may serve, tables of problems, and the launch.

A kernel whose correctness has not been seen on an architecture stays off there: `verified.json` lists
what has been, and `KFADE_ENABLE=triton` switches the rest on. Under Triton's interpreter
(`TRITON_INTERPRET=1`, set before Triton is imported) the kernels run on CPU tensors.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .configurations import SIZE_EXAMPLES, Configuration, choose
from .devices import Device, of_tensors

ENABLE = "KFADE_ENABLE"
VERIFIED = "verified.json"


@functools.cache
def triton_version() -> str:
    """Version of the installed Triton, or an empty text."""
    installed = (_version(package) for package in ("triton", "pytorch-triton", "pytorch-triton-rocm"))
    return next((found for found in installed if found), "")


def _version(package: str) -> str:
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return ""


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Verdict:
    """One line of `verified.json`: an operation whose kernels were seen correct on an architecture.

    Attributes:
        operation: public name.
        architecture: `sm_90`, ...
        version: of what compiled them, Triton or CUDA.
        date: when.
        backend: `triton` or `cuda`.
    """

    operation: str
    architecture: str
    version: str
    date: str
    backend: str = "triton"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.backend, self.operation, self.architecture


def verdicts(path: Path | None = None) -> list[Verdict]:
    """What the correctness part of the GPU benchmark has passed on, from this file or the shipped one."""
    path = path or Path(str(resources.files("kfade_kernels"))) / VERIFIED
    return [Verdict(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def record_verdict(path: Path, verdict: Verdict, passed: bool) -> None:
    """Put a verdict in the place of an older one of the same kernels and architecture; remove it if it failed."""
    kept = [v for v in verdicts(path) if v.key != verdict.key] + ([verdict] if passed else [])
    text = ",\n".join("  " + json.dumps(asdict(v)) for v in kept)
    temporary = path.with_suffix(".part")
    temporary.write_text(f"[\n{text}\n]\n" if text else "[]\n", encoding="utf-8")
    temporary.replace(path)
    verified.cache_clear()


@functools.cache
def verified() -> frozenset[tuple[str, str, str]]:
    """What the correctness part of the GPU benchmark has passed on: backend, operation, architecture."""
    return frozenset(verdict.key for verdict in verdicts())


def refusal(operation: str, name: str, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
    """Why no Triton kernel may serve a call of this operation, or None.

    Args:
        operation: public name.
        name: of the argument that says where the call runs.
        device: where it is.
        dtypes: of all floating-point arguments.
    """
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"{name} is on {device}"
    if not triton_version():
        return "Triton is not installed"
    kinds = set(dtypes)
    if torch.float64 in kinds:
        return "float64"
    if device.type == "cuda" and interpreted():
        return "Triton's interpreter reads addresses of the CPU alone"
    if device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and would replay the addresses of this call"
    enabled = "triton" in os.environ.get(ENABLE, "").split(",")
    if device.type == "cpu":
        if torch.bfloat16 in kinds:
            return "Triton's interpreter multiplies bfloat16 wrongly"
        return None if enabled else f"the interpreter serves only with {ENABLE}=triton"
    architecture = of_tensors(device).architecture
    if enabled or ("triton", operation, architecture) in verified():
        return None
    return f"not yet seen correct on {architecture} ({ENABLE}=triton switches it on)"


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel, as a configuration and a call would ask for it.

    Attributes:
        name: for tables, e.g. `syrk bfloat16 descriptors`.
        kernel: the jitted function.
        signature: Triton's type of each argument that is not a compile-time constant.
        constants: the compile-time constants.
        configuration: what it was made from; warps, stages and the precision of float32 products.
        products: it multiplies on the matrix units.
        itemsizes: bytes of an element of each operand of its products.
        pipelined: its loads must be asynchronous where the target can do that.
        aligned: names of pointer arguments that are not known to begin on 16 bytes are left out here.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    configuration: Configuration
    products: bool = True
    itemsizes: tuple[int, int] = (2, 2)
    pipelined: bool = False
    aligned: tuple[str, ...] | None = None


def shipped_configurations(kernel: str, device: Device) -> list[tuple[torch.dtype, Configuration]]:
    """The dtypes and configurations that a device may be given, without repetition."""
    found: dict[tuple[torch.dtype, Configuration], None] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for extent in SIZE_EXAMPLES:
            found[dtype, choose(kernel, device, dtype, extent, triton_version())] = None
    return list(found)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Table:
    """Problems of one grouped launch: rows of int64 fields, the first the end of the problem's work items.

    Pointers in it are addresses, so whoever launches keeps the tensors alive until then.
    """

    fields: int
    rows: list[list[int]] = field(default_factory=list)
    work: int = 0

    def add(self, items: int, *values: int) -> None:
        """Add a problem of `items` work items."""
        self.work += items
        row = [self.work, *values]
        assert len(row) <= self.fields
        self.rows.append(row + [0] * (self.fields - len(row)))

    def to(self, device: torch.device) -> Tensor:
        """`[problems, fields]` int64 on the device; the copy is asynchronous."""
        return to_device(torch.tensor(self.rows, dtype=torch.int64), device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on a device, copied asynchronously."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rows_of(x: Tensor) -> Tensor:
    """`x [..., n]` as `[N, n]` with unit column stride: a view where strides allow, else a copy."""
    flat = x.flatten(0, -2)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def aligned(x: Tensor) -> bool:
    """Whether rows of `x [N, n]` do not overlap and begin and end on 16 bytes: loads can then be asynchronous."""
    step = 16 // x.element_size()
    apart = x.stride(0) >= x.shape[1] and x.stride(0) % step == 0
    return apart and x.data_ptr() % 16 == 0 and x.shape[1] % step == 0


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A flat boolean mask as the bytes that kernels read."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def grid(work: int, configuration: Configuration, device: Device) -> int:
    """Programs of a persistent launch."""
    return max(1, min(work, configuration.programs * device.multiprocessors))


def parts_of(tiles: int, programs: int, most: int, tile_seconds: float, part_seconds: float) -> int:
    """In how many parts to sum each of `tiles` tiles: what should take least time, a function of its arguments alone.

    With few tiles, or just more than programs, a launch leaves most of a device idle in its last round. Parts
    fill it, but each goes through memory.

    Args:
        tiles: work items of one part.
        programs: that run at once.
        most: parts at most.
        tile_seconds: of one tile, summed whole by one program.
        part_seconds: that each part of each tile costs the device in memory traffic.
    """
    best, least = 1, -(-tiles // programs) * tile_seconds
    for parts in range(2, most + 1):
        seconds = -(-tiles * parts // programs) * tile_seconds / parts + tiles * parts * part_seconds
        # More parts must be worth more than the error of this estimate.
        if seconds < 0.95 * least:
            best, least = parts, seconds
    return best


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def _scratch(size: int, _alignment: int, _stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch(
    kernel: Any, programs: int | Sequence[int], configuration: Configuration, device: torch.device, **arguments: Any
) -> None:
    """Launch a kernel; keyword arguments are those of the kernel."""
    import triton

    size = (programs,) if isinstance(programs, int) else tuple(programs)
    if device.type == "cpu":
        kernel[size](**arguments, num_warps=configuration.warps, num_stages=configuration.stages)
        return
    if arguments.get("DESCRIPTORS"):
        triton.set_allocator(_scratch)
    with torch.cuda.device(device):
        kernel[size](**arguments, num_warps=configuration.warps, num_stages=configuration.stages)

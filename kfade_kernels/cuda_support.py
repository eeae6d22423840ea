"""What the backends in CUDA share: when they may serve, what is compiled, and tables on the device.

The kernels are in `csrc/cuda/`, in the native module. Those whose correctness has not been seen on an architecture stay
off there, as Triton's do: `verified.json` lists what has been, and `KFADE_ENABLE=cuda` switches the rest on.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import native
from .configurations import Configuration
from .devices import Device, of_tensors
from .triton_support import ENABLE, short, to_device, verified

FILE = "cuda.json"
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Form:
    """A compiled kernel, and how it is launched: a line of `cuda.json`.

    Attributes:
        device: architecture that is given this form.
        kernel: `hopper` or `ampere`.
        rows, columns: of the result, in one work item: the tile of a cluster of blocks.
        depth: summed rows of one step.
        stages: steps in shared memory.
        cluster: blocks of a work item.
        programs: blocks that one multiprocessor has room for.
        threads: of a block.
        group: block rows of tiles that are walked together.
        flush: rows between two additions to float32 memory.
        source: `unmeasured`, or a date.
    """

    device: str
    kernel: str
    rows: int
    columns: int
    depth: int
    stages: int
    cluster: int
    programs: int
    threads: int
    group: int
    flush: int
    source: str

    def __str__(self) -> str:
        pair = f", clusters of {self.cluster}" if self.cluster > 1 else ""
        return f"{self.kernel}, {self.rows}×{self.columns}×{self.depth}, {self.stages} stages{pair}"

    def configuration(self) -> Configuration:
        """The same for one block, as the cost model counts it."""
        return Configuration(
            block_m=self.rows // self.cluster, block_n=self.columns, block_k=self.depth, warps=self.threads // 32,
            stages=self.stages, group=self.group, programs=self.programs, flush=self.flush,
        )  # fmt: skip

    def blocks(self, items: int, device: Device) -> int:
        """Blocks of a persistent launch."""
        most = self.programs * device.multiprocessors // self.cluster
        return self.cluster * max(1, min(items, most))


@functools.cache
def forms(kernel: str) -> tuple[Form, ...]:
    """The forms of one kernel, by its folder."""
    path = Path(str(resources.files("kfade_kernels"))) / kernel / FILE
    names = {field.name for field in fields(Form)}
    entries = json.loads(path.read_text(encoding="utf-8"))
    for number, entry in enumerate(entries):
        if set(entry) != names:
            raise ValueError(f"entry {number} of {kernel}/{FILE} has {sorted(entry)}; it must have {sorted(names)}")
    return tuple(Form(**entry) for entry in entries)


def form_of(kernel: str, device: Device) -> Form | None:
    """What a device is given, or None: nothing was compiled for it."""
    return next((form for form in forms(kernel) if form.device == device.architecture), None)


def form_at(kernel: str, where: torch.device) -> Form:
    """The same, of a call that was not refused."""
    found = form_of(kernel, device_at(where))
    assert found is not None
    return found


def library() -> Any:
    """The native module."""
    return native.module


def device_at(where: torch.device) -> Device:
    return of_tensors(where)


@functools.cache
def _module_refusal() -> str | None:
    if native.module is None:
        return native.missing
    if native.module.cuda_version is None:
        return "the native module is built without CUDA"
    return native.module.cuda_refusal() or None


def refusal(
    operation: str, kernel: str, name: str, state: Tensor, rows: Iterable[Tensor], dtypes: Iterable[torch.dtype] = ()
) -> str | None:
    """Why no kernel in CUDA may serve a call of this operation, or None.

    Args:
        operation: public name.
        kernel: folder of the forms.
        name: of the argument that says where the call runs.
        state: what is added to.
        rows: 16-bit operands.
        dtypes: what they are when they are multiplied, if not what they are now.
    """
    where = state.device
    if where.type != "cuda" or torch.version.hip is not None:
        return f"{name} is on {where}"
    if state.dtype != torch.float32:
        return short(state.dtype)
    operands = list(rows)
    kinds = set(dtypes) or {x.dtype for x in operands}
    if len(kinds) > 1 or not kinds <= set(SIXTEEN_BIT):
        return f"{' and '.join(sorted(map(short, kinds)))}: the operands must be 16-bit, and of one dtype"
    missing = _module_refusal()
    if missing is not None:
        return missing
    device = device_at(where)
    if form_of(kernel, device) is None:
        return f"nothing is compiled for {device.architecture}"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and would replay the addresses of this call"
    if "cuda" not in os.environ.get(ENABLE, "").split(",") and (
        ("cuda", operation, device.architecture) not in verified()
    ):
        return f"not yet seen correct on {device.architecture} ({ENABLE}=cuda switches it on)"
    return None


def aligned(x: Tensor) -> bool:
    """Whether the rows of `x [..., n]`, 16-bit, begin and end on 16 bytes and do not overlap."""
    if x.data_ptr() % 16 or x.shape[-1] % 8 or x.stride(-1) != 1:
        return False
    return all(stride % 8 == 0 for stride in x.stride()[:-1]) and x.stride(-2) >= x.shape[-1]


def part_of(summed: int, splits: int, step: int = 1) -> int:
    """Summed rows of one part, whole steps: none is left empty."""
    steps = -(-summed // step)
    return -(-steps // splits) * step


def on_device(table: bytes, where: torch.device) -> Tensor:
    """A table of problems on the device; whoever launches keeps it, and what it points at, alive until then."""
    # Its rows, and the tensor maps in them, begin on 128 bytes, as does what a device allocates.
    memory = torch.empty(len(table) + 128, dtype=torch.uint8)
    begin = -memory.data_ptr() % 128
    host = memory[begin : begin + len(table)]
    host.copy_(torch.frombuffer(bytearray(table), dtype=torch.uint8))
    return to_device(host, where)


def workspace(elements: int, where: torch.device) -> Tensor:
    """Uninitialised float32 memory."""
    return torch.empty(elements, dtype=torch.float32, device=where)


def at(where: torch.device) -> AbstractContextManager[Any]:
    """Context in which launches go to a device."""
    return torch.cuda.device(where) if where.type == "cuda" else nullcontext()


def stream_at(where: torch.device) -> int:
    """Address of the current stream of a device."""
    return int(torch.cuda.current_stream(where).cuda_stream) if where.type == "cuda" else 0

"""What the backends in C++ share: the instruction set, sizes of blocks, and how tensors are handed over.

`KFADE_CPU_ISA` (`avx2`, `avx512`, `avx512_bf16`) lowers the instruction set below the processor's; it is read at
every call. `KFADE_ENABLE=cpu` has the kernels serve also where they are not faster.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from importlib import resources

import torch
from torch import Tensor

from . import native
from .triton_support import ENABLE

ISA = "KFADE_CPU_ISA"
ISAS = ("avx2", "avx512", "avx512_bf16")
Matrix = tuple[int, str, int, int, bool]


@functools.cache
def _supported() -> tuple[str, ...]:
    return () if native.module is None else tuple(native.module.isas())


@functools.cache
def _blocks() -> dict[str, tuple[int, int]]:
    text = resources.files("kfade_kernels").joinpath("cpu_blocks.json").read_text(encoding="utf-8")
    return {isa: (sizes["lines"], sizes["columns"]) for isa, sizes in json.loads(text).items()}


def isa() -> str:
    """The widest instruction set that the processor has and `KFADE_CPU_ISA` allows; empty if there is none.

    Raises:
        ValueError: `KFADE_CPU_ISA` is not the name of one.
    """
    most = os.environ.get(ISA, "")
    if most and most not in ISAS:
        raise ValueError(f"{ISA} is {most!r}; it must be one of {', '.join(ISAS)}")
    allowed = ISAS[: ISAS.index(most) + 1] if most else ISAS
    return next((name for name in reversed(_supported()) if name in allowed), "")


def blocks(name: str) -> tuple[int, int]:
    """Lines of packed rows at a time, and columns of a tile, of an instruction set."""
    return _blocks()[name]


def enabled() -> bool:
    """Whether the kernels are to serve also where they are not faster."""
    return "cpu" in os.environ.get(ENABLE, "").split(",")


def refusal(name: str, tensors: Iterable[Tensor], state: torch.dtype) -> str | None:
    """Why no kernel can serve a call, or None.

    Args:
        name: of the argument that says where the call runs, the first of `tensors`.
        tensors: all floating-point arguments.
        state: dtype of what is added to.
    """
    if native.missing is not None:
        return native.missing
    tensors = list(tensors)
    if tensors[0].device.type != "cpu":
        return f"{name} is on {tensors[0].device}"
    if torch.float64 in (state, *(x.dtype for x in tensors)):
        return "float64"
    if not isa():
        return "there is no kernel for this processor"
    return None


def in_pairs(dtypes: Iterable[torch.dtype]) -> bool:
    """Whether rows of these dtypes are multiplied as pairs of bfloat16; they are widened to float32 otherwise."""
    return isa() == "avx512_bf16" and all(dtype == torch.bfloat16 for dtype in dtypes)


def slower(pairs: bool) -> str | None:
    """Why PyTorch is faster on pairs of bfloat16, whatever the sizes; or None."""
    if pairs and not enabled() and native.module.has_amx():
        return "PyTorch multiplies bfloat16 in AMX's matrix units"
    return None


def describe(pairs: bool) -> str:
    """Instruction set, operands, tile and threads of a call, in words."""
    lines, columns = blocks(isa())
    operands, rows = ("bfloat16", 2 * lines) if pairs else ("float32", lines)
    threads = torch.get_num_threads()
    return f"{isa()}, {operands} operands, tiles of 128×{columns}, {rows} rows at a time, {threads} threads"


def matrix(rows: Tensor, ones_column: bool) -> Matrix:
    """Rows `[N, n]` of unit column stride (see `rows_of`) as the module takes them; they must outlive the call."""
    return rows.data_ptr(), str(rows.dtype).removeprefix("torch."), rows.stride(0), rows.shape[1], ones_column


def address(mask: Tensor | None) -> int:
    """Address of a flat contiguous boolean mask, or 0."""
    return 0 if mask is None else mask.data_ptr()

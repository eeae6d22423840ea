"""Checks of arguments, shared by all operations: each error names the argument, its value and the rule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .packed import PackedSymmetric

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STATES = (torch.float32, torch.float64)


def tensor(name: str, value: object, *, dtypes: Sequence[torch.dtype] = FLOATS, ndim: Sequence[int]) -> Tensor:
    """A strided tensor of one of these dtypes and numbers of dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor")
    if value.layout != torch.strided:
        raise ValueError(f"{name} has layout {value.layout}; it must be a dense (strided) tensor")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} is {value.dtype}; it must be one of {wanted}")
    if value.ndim not in ndim:
        wanted = " or ".join(str(n) for n in ndim)
        raise ValueError(f"{name} has shape {list(value.shape)}; it must have {wanted} dimensions")
    return value


def accumulator(name: str, value: object) -> PackedSymmetric:
    if not isinstance(value, PackedSymmetric):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a PackedSymmetric")
    return value


def shape(name: str, value: Tensor, expected: Sequence[int], why: str) -> None:
    if list(value.shape) != list(expected):
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be {list(expected)} ({why})")


def same_device(name: str, value: Tensor, other_name: str, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device} like {other_name}")


def not_wider(name: str, dtype: torch.dtype, state_name: str, state: torch.dtype) -> None:
    """float64 data must not be summed into a float32 state."""
    if dtype == torch.float64 and state != torch.float64:
        raise TypeError(f"{name} is {dtype}, but {state_name} is {state}; it must be torch.float64 too")


def finite(name: str, value: object, *, minimum: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} is {value}; it must be at least {minimum}")
    return float(value)


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be True or False")
    return value


def row_mask(name: str, mask: object, rows: Sequence[int], device: torch.device) -> Tensor:
    """A 0/1 mask over rows, as a flat boolean tensor `[N]`."""
    value = tensor(name, mask, dtypes=(torch.bool, torch.uint8, torch.int32, torch.int64), ndim=(len(rows),))
    shape(name, value, rows, "one entry for each row of x")
    same_device(name, value, "x", device)
    return value.reshape(-1) != 0

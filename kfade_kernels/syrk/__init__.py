"""`syrk_`: add an outer product of rows to a symmetric matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import arguments as check
from ..dispatch import Backend, declare
from ..packed import PackedSymmetric
from . import cpu, cuda, pytorch, reference, triton


def check_rows(acc_name: str, acc: PackedSymmetric, x_name: str, x: Tensor, ones_column: bool) -> None:
    """Check one accumulator against its rows."""
    check.accumulator(acc_name, acc)
    check.tensor(x_name, x, ndim=(2, 3))
    check.same_device(x_name, x, acc_name, acc.device)
    check.not_wider(x_name, x.dtype, acc_name, acc.dtype)
    width = acc.n - int(ones_column)
    if x.shape[-1] != width:
        ones = " and a column of ones" if ones_column else ""
        raise ValueError(
            f"{x_name} has shape {list(x.shape)}; its last dimension must be {width}"
            f" ({acc_name} has order {acc.n}{ones})"
        )


def _prepare(
    acc: PackedSymmetric,
    x: Tensor,
    mask: Tensor | None = None,
    alpha: float = 1.0,
    *,
    ones_column: bool = False,
    allow_tf32: bool = False,
) -> tuple[Any, ...]:
    check_rows("acc", acc, "x", x, ones_column)
    rows = None if mask is None else check.row_mask("mask", mask, x.shape[:-1], x.device)
    return acc.data, acc.n, x, rows, check.finite("alpha", alpha), ones_column, check.flag("allow_tf32", allow_tf32)


_syrk = declare(
    "syrk_",
    "(Tensor(a!) packed, int order, Tensor x, Tensor? mask, float alpha, bool ones_column, bool allow_tf32) -> ()",
    _prepare,
    lambda *_: None,
    [
        Backend("cuda", cuda.run, cuda.refuses, cuda.configuration),
        Backend("triton", triton.run, triton.refuses, triton.configuration),
        Backend("cpu", cpu.run, cpu.refuses, cpu.configuration),
        Backend("pytorch", pytorch.run, pytorch.refuses, pytorch.configuration),
        Backend("reference", reference.run),
    ],
    labels={"packed": "acc"},
)


def syrk_(
    acc: PackedSymmetric,
    x: Tensor,
    mask: Tensor | None = None,
    alpha: float = 1.0,
    *,
    ones_column: bool = False,
    allow_tf32: bool = False,
) -> PackedSymmetric:
    """Add `alpha · xᵀ diag(mask) x` to `acc`, in place; only the lower triangle is computed.

    Args:
        acc: accumulator of order n, float32 or float64.
        x: rows `[N, n]` or `[B, T, n]`, of any float dtype; 16-bit rows are accumulated in the
            dtype of `acc`.
        mask: 0/1 `[N]` or `[B, T]`, boolean or integer. A row whose mask is 0 is left out whatever
            it holds. A weight other than 0 and 1 has no place here: see `alpha`.
        alpha: scale of the whole update.
        ones_column: x is `[..., n - 1]` and stands for x with one last column of ones (the input
            column of a bias); the widened copy is never made.
        allow_tf32: products of float32 rows may use TF32 operands (11 significant bits) where the device has
            them: about 7e-4 relative, and a trace too small by as much where operands are cut, not rounded. Never
            done unless asked for here.

    Returns:
        `acc`.

    Raises:
        TypeError: an argument is not of its type or dtype, or float64 rows meet a float32 `acc`.
        ValueError: shapes, devices or layouts do not agree, `alpha` is not finite, or a tensor requires a
            gradient while gradients are recorded.

    Cost: `N·n²` FLOPs (half of a full product), no temporary of size n².
    """
    _syrk(*_prepare(acc, x, mask, alpha, ones_column=ones_column, allow_tf32=allow_tf32))
    return acc

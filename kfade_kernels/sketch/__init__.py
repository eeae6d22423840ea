"""`sketch_`: add the products of an outer-product sum with a few test vectors, and its trace."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import arguments as check
from ..dispatch import Backend, declare
from . import pytorch, reference, triton


def _prepare(
    y: Tensor, trace: Tensor, x: Tensor, omega: Tensor, mask: Tensor | None = None, *, ones_column: bool = False
) -> tuple[Any, ...]:
    check.tensor("y", y, dtypes=check.STATES, ndim=(2,))
    check.tensor("trace", trace, dtypes=check.STATES, ndim=(0,))
    check.tensor("x", x, ndim=(2, 3))
    check.tensor("omega", omega, dtypes=(y.dtype,), ndim=(2,))
    check.shape("omega", omega, list(y.shape), "as y")
    for name, value in (("trace", trace), ("x", x), ("omega", omega)):
        check.same_device(name, value, "y", y.device)
    check.not_wider("x", x.dtype, "y", y.dtype)
    check.not_wider("x", x.dtype, "trace", trace.dtype)
    width = y.shape[0] - int(check.flag("ones_column", ones_column))
    if x.shape[-1] != width:
        ones = " and a column of ones" if ones_column else ""
        raise ValueError(
            f"x has shape {list(x.shape)}; its last dimension must be {width} (y has {y.shape[0]} rows{ones})"
        )
    rows = None if mask is None else check.row_mask("mask", mask, x.shape[:-1], x.device)
    return y, trace, x, omega, rows, ones_column


_sketch = declare(
    "sketch_",
    "(Tensor(a!) y, Tensor(b!) trace, Tensor x, Tensor omega, Tensor? mask, bool ones_column) -> ()",
    _prepare,
    lambda *_: None,
    [
        Backend("triton", triton.run, triton.refuses, triton.configuration),
        Backend("pytorch", pytorch.run, pytorch.refuses, pytorch.configuration),
        Backend("reference", reference.run),
    ],
)


def sketch_(
    y: Tensor, trace: Tensor, x: Tensor, omega: Tensor, mask: Tensor | None = None, *, ones_column: bool = False
) -> Tensor:
    """Add `xᵀ diag(mask) x Ω` to `y` and `Σ ‖x‖²` to `trace`, in place; `xᵀx` is never formed.

    What a single pass over the rows must keep to know the largest eigenpairs of their sum of outer products
    (`kfade_kernels.low_rank.nystrom`).

    Args:
        y: `[n, l]`, float32 or float64.
        trace: float32 or float64, no dimensions. Sums over many calls are kept best in float64.
        x: rows `[N, n]` or `[B, T, n]`, of any float dtype; they are multiplied and summed in the dtype of `y`.
        omega: test vectors `[n, l]`, in the dtype of `y`, the same at every call.
        mask: 0/1 `[N]` or `[B, T]`. A row whose mask is 0 is left out whatever it holds.
        ones_column: x is `[..., n - 1]` and stands for x with one last column of ones (the input column of a bias);
            the widened copy is never made.

    Returns:
        `y`.

    Raises:
        TypeError: an argument is not of its type or dtype, or float64 rows meet float32 state.
        ValueError: shapes, devices or layouts do not agree, or a tensor requires a gradient while gradients are
            recorded.

    Cost: `4·N·n·l` FLOPs, less than the `N·n²` of `syrk_` where `l < n/4`; beside a few rows in the dtype of `y`
    the only temporary is `[rows, l]`.
    """
    _sketch(*_prepare(y, trace, x, omega, mask, ones_column=ones_column))
    return y

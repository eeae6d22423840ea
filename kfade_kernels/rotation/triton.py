"""`rotate` by Triton: with a pair both products share the loads of x, and the sum is rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import triton_support as support
from ..product.triton import Product, configure, multiply, operand
from .reference import basis, result_dtype


def _product(x: Tensor, q: Tensor, ones_column: bool, result: Tensor) -> Product:
    """Rows `[N, n]` times a basis, as one product into `result [N, m]`."""
    pair = q.ndim == 3 and x.dtype == torch.bfloat16
    if pair:
        high, low = (operand(part) for part in q.unbind(0))
        if low.stride() != high.stride():
            high, low = high.contiguous(), low.contiguous()
    else:
        high, low = operand(basis(q, torch.float32)), None
    rows = high.shape[0] - int(ones_column)
    last = high[rows].contiguous() if ones_column else None
    last_low = low[rows].contiguous() if low is not None and ones_column else None
    finish = "" if not ones_column else "row of a pair" if pair else "row"
    return Product(operand(x), high[:rows], result, None if low is None else low[:rows], finish, last, last_low)


def run(x: Tensor, q: Tensor, ones_column: bool) -> Tensor:
    rows = support.rows_of(x if x.ndim > 1 else x.unsqueeze(0))
    result = torch.empty(rows.shape[0], q.shape[-1], dtype=result_dtype(x, q), device=x.device)
    multiply([_product(rows, q, ones_column, result)])
    return result.view(*x.shape[:-1], q.shape[-1])


def refuses(x: Tensor, q: Tensor, *_: object) -> str | None:
    reason = support.refusal("rotate", "x", x.device, (x.dtype, q.dtype))
    if reason is None and x.shape[-1] == 0:
        return "x has no columns"
    return reason


def configuration(x: Tensor, q: Tensor, ones_column: bool) -> str:
    pair = q.ndim == 3 and x.dtype == torch.bfloat16
    basis_dtype = torch.bfloat16 if pair else torch.float32
    is_aligned = all(width % 8 == 0 for width in (x.shape[-1], q.shape[-1]))
    c = configure(x.device, x.dtype, basis_dtype, max(x.shape[:-1].numel(), q.shape[-1]), is_aligned)
    return f"{'a pair' if pair else 'one product'}, tiles of {c}"

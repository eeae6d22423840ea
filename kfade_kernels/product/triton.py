"""The host side of grouped products: shapes to a table, and one launch for products of one kind.

FLOPs: `2·M·N·K` a problem (twice that with a pair). Bytes at least: each operand and the result once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import triton_support as support
from ..configurations import Configuration, choose
from ..devices import Device, of_tensors

# Operands that do not lie on 16 bytes are loaded element by element, which takes registers.
ANY_ROWS = Configuration(block_m=64, block_n=32, block_k=32, warps=8, stages=2)
FINISHES = ("", "row", "row of a pair", "divide by a matrix", "divide by a pair")


@dataclass(frozen=True)
class Product:
    """One product `c = finish(a b)`.

    Attributes:
        a: `[M, K]`, unit stride along either dimension.
        b: `[K, N]`, unit stride along either dimension.
        c: `[M, N]`, unit column stride, overwritten.
        low: the low part of a bfloat16 pair whose high part is b, strides as b.
        finish: what happens to the product before it is stored:
            `row`: the vector `first [N]` is added to each row; `row of a pair`: and `second [N]` too;
            `divide by a matrix`: by `first [M, N] + damping`;
            `divide by a pair`: by `first [M] · second [N] + damping`.
        first, second: see finish; float32, or the dtype of b for rows.
        damping: see finish.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    low: Tensor | None = None
    finish: str = ""
    first: Tensor | None = None
    second: Tensor | None = None
    damping: float = 0.0

    @property
    def a_transposed(self) -> bool:
        return not _is_row_major(self.a)

    @property
    def b_transposed(self) -> bool:
        return not _is_row_major(self.b)

    @property
    def aligned(self) -> bool:
        """Whether what is stored together, of operands, result and divisor, begins and ends on 16 bytes."""
        matrices = [self.a, self.b, self.c] + [x for x in (self.low, self.first) if x is not None and x.ndim == 2]
        vectors = [x for x in (self.first, self.second) if x is not None and x.ndim == 1]
        return all(support.aligned(x if _is_row_major(x) else x.T) for x in matrices) and all(
            x.data_ptr() % 16 == 0 for x in vectors
        )


def _is_row_major(x: Tensor) -> bool:
    return x.stride(1) == 1 and (x.shape[0] == 1 or x.stride(0) >= x.shape[1])


def operand(x: Tensor) -> Tensor:
    """x `[M, N]` with unit stride along one dimension and none overlapping: itself, or a copy."""
    return x if _is_row_major(x) or _is_row_major(x.T) else x.contiguous()


def adapt(found: Configuration, is_aligned: bool) -> Configuration:
    return found if is_aligned else replace(ANY_ROWS, precision=found.precision, group=found.group)


def configure(
    device: torch.device, left: torch.dtype, right: torch.dtype, extent: int, is_aligned: bool
) -> Configuration:
    """The configuration of products of operands of these dtypes whose results are up to `extent` wide or high."""
    dtype = left if left == right else torch.float32
    return adapt(choose("product", of_tensors(device), dtype, extent, support.triton_version()), is_aligned)


def multiply(products: Sequence[Product]) -> None:
    """Run all products: one launch for those of one kind.

    The products must be independent: no result is another's operand.
    """
    kinds: dict[tuple[object, ...], list[Product]] = {}
    for p in products:
        if p.c.numel():
            first = torch.float32 if p.first is None else p.first.dtype
            kind = (
                p.a.device, p.a.dtype, p.b.dtype, p.c.dtype, first, p.a_transposed, p.b_transposed, p.low is not None,
                p.finish, p.aligned,
            )  # fmt: skip
            kinds.setdefault(kind, []).append(p)
    for alike in kinds.values():
        _launch(alike)


def _launch(products: list[Product]) -> None:
    from .kernel import FIELDS, product_kernel

    one = products[0]
    where = one.a.device
    # Largest first: programs that finish early then have small tiles left to take.
    products = sorted(products, key=lambda p: -p.a.shape[1])
    c = configure(where, one.a.dtype, one.b.dtype, max(max(p.c.shape) for p in products), one.aligned)
    table = support.Table(FIELDS)
    for p in products:
        (m, k), n = p.a.shape, p.b.shape[1]
        tiles = -(-m // c.block_m) * -(-n // c.block_n)
        table.add(
            tiles, p.a.data_ptr(), p.b.data_ptr(), support.address(p.low), p.c.data_ptr(), m, n, k,
            p.a.stride(int(p.a_transposed)), p.b.stride(int(p.b_transposed)), p.c.stride(0),
            support.address(p.first), support.address(p.second), 0 if p.first is None else p.first.stride(0),
        )  # fmt: skip
    dampings = torch.tensor([p.damping for p in products], dtype=torch.float32)
    first = torch.float32 if one.first is None else one.first.dtype
    support.launch(
        product_kernel, support.grid(table.work, c, of_tensors(where)), c, where,
        table=table.to(where), dampings=support.to_device(dampings, where), problems=len(products),
        A_TYPE=support.triton_type(one.a.dtype), B_TYPE=support.triton_type(one.b.dtype),
        C_TYPE=support.triton_type(one.c.dtype), E_TYPE=support.triton_type(first),
        A_T=one.a_transposed, B_T=one.b_transposed, PAIR=one.low is not None, FINISH=one.finish, ALIGNED=one.aligned,
        PRECISION=c.precision, BM=c.block_m, BN=c.block_n, BK=c.block_k, GROUP=c.group, FIELDS=FIELDS,
    )  # fmt: skip


def variants(device: Device) -> list[support.Variant]:
    """The kinds of product that operations ask for, in every shipped configuration of a device."""
    from .kernel import FIELDS, product_kernel

    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    # a, b, c, first, a stored transposed, b stored transposed, pair, finish
    kinds = [
        (f32, f32, f32, f32, True, False, False, ""),
        (f32, f32, f32, f32, False, False, False, ""),
        (f32, f32, f32, f32, False, True, False, ""),
        (f32, f32, f32, f32, False, False, False, "row"),
        (f32, f32, f32, f32, False, False, False, "divide by a matrix"),
        (f32, f32, f32, f32, False, False, False, "divide by a pair"),
        (f32, f32, f32, f32, True, False, False, "divide by a matrix"),
        (f32, f32, f32, f32, True, False, False, "divide by a pair"),
        (bf16, f32, f32, f32, False, False, False, ""),
        (bf16, f32, f32, f32, False, False, False, "row"),
        (bf16, f32, f32, f32, True, False, False, ""),
        (f32, bf16, f32, f32, True, False, False, ""),
        (f16, f32, f32, f32, False, False, False, ""),
        (f16, f32, f32, f32, False, False, False, "row"),
        (f16, f32, f32, f32, True, False, False, ""),
        (bf16, bf16, bf16, bf16, False, False, True, ""),
        (bf16, bf16, bf16, bf16, False, False, True, "row of a pair"),
        (bf16, bf16, f32, f32, True, False, False, ""),
        (f16, f16, f32, f32, True, False, False, ""),
    ]
    found = {}
    for dtype, shipped in support.shipped_configurations("product", device):
        for a, b, c_type, e, a_t, b_t, pair, finish in kinds:
            if dtype != (a if a == b else f32):
                continue
            for is_aligned in (True, False):
                c = adapt(shipped, is_aligned)
                stored = f"{'aᵀ' if a_t else 'a'}{'bᵀ' if b_t else 'b'}"
                dtypes = "·".join(support.short(x) for x in (a, b))
                loads = "" if is_aligned else " any rows"
                one = support.Variant(
                    f"product {dtypes} {stored}{' pair' if pair else ''} {finish}{loads}", product_kernel,
                    {"table": "*i64", "dampings": "*fp32", "problems": "i32"},
                    {"A_TYPE": support.triton_type(a), "B_TYPE": support.triton_type(b),
                     "C_TYPE": support.triton_type(c_type), "E_TYPE": support.triton_type(e), "A_T": a_t, "B_T": b_t,
                     "PAIR": pair, "FINISH": finish, "ALIGNED": is_aligned, "PRECISION": c.precision,
                     "BM": c.block_m, "BN": c.block_n, "BK": c.block_k, "GROUP": c.group, "FIELDS": FIELDS},
                    c, itemsizes=(a.itemsize, b.itemsize), pipelined=is_aligned,
                )  # fmt: skip
                found[one.name, c] = one
    return list(found.values())

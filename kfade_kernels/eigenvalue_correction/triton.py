"""`eigenvalue_correction_` by Triton: products of a sequence are squared where they were summed, in registers.

Below the crossover of a side its tokens are rotated first (see `rotation`); then one kernel walks tiles of Λ
with the loop over sequences inside. Where tokens outnumber the other side's width, the gradient of a few
sequences is formed, rotated, and squared as the end of its last rotation. FLOPs: `2·N·d_out·d_in`, and for each
side the cheaper of `2·N·d²` and `2·B·d_out·d_in·d`. Bytes at least: the tokens once a group of block rows, Λ
read and written once. Where tiles are fewer than programs, sequences are split in a fixed way and the parts are
added in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import triton_support as support
from ..configurations import Configuration, choose
from ..devices import Device, of_tensors
from ..product.triton import Product, adapt, multiply, operand
from ..rotation import rotate, rotates_tokens
from ..rotation.reference import basis
from ..syrk.reference import append_ones
from ..syrk.triton import ATTAINED
from .pytorch import describe_sides
from .reference import batch_of, sequences, tokens_of

# Gradients of sequences in float32 that exist at once beyond the crossover.
GRADIENT_BYTES = 256 << 20
# Parts of Λ that exist at once where sequences are split.
WORKSPACE_BYTES = 256 << 20
SMALLEST_WIDTH = 64


@dataclass(frozen=True)
class Squares:
    """`Σ_b (A_b B_b)∘²`, as the kernel takes it.

    Attributes:
        left: `[B, K, M]` (`a_t`) or `[B, M, K]`; packed, `[N, M]`.
        right: `[B, K, N]`; packed, `[N, N]`. A batch stride of 0 shares one matrix among all.
        a_t: left is stored by summed rows.
        mask: bytes, one a summed row, or None.
        cu_seqlens: packed sequences, or None.
    """

    left: Tensor
    right: Tensor
    a_t: bool
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def batch(self) -> int:
        return batch_of(self.left, self.cu_seqlens)

    @property
    def inner(self) -> int:
        return self.right.shape[-2]

    @property
    def aligned(self) -> bool:
        return all(_aligned(x) for x in (self.left, self.right))


def _aligned(x: Tensor) -> bool:
    """Whether every row of every sequence begins and ends on 16 bytes."""
    step = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in (*x.stride()[:-1], x.shape[-1]))


def configure(left: Tensor, right: Tensor, is_aligned: bool) -> Configuration:
    device = of_tensors(left.device)
    dtype = left.dtype if left.dtype == right.dtype else torch.float32
    extent = max(right.shape[-1], left.shape[-1])
    return adapt(choose("eigenvalue_correction", device, dtype, extent, support.triton_version()), is_aligned)


def splits_of(tiles: int, batch: int, inner: int, c: Configuration, device: Device, itemsize: int) -> int:
    """Into how many parts the sequences go, a function of shapes and device alone.

    Args:
        tiles: of Λ.
        batch: sequences.
        inner: summed rows of one of them.
        c: configuration.
        device: where it runs.
        itemsize: bytes of an element of the operands.
    """
    programs = c.programs * device.multiprocessors
    tile = c.block_m * c.block_n
    rate = ATTAINED * device.product_flops(itemsize) / programs
    most = min(batch, WORKSPACE_BYTES // (4 * tile * tiles))
    # A part is written and read.
    return support.parts_of(tiles, programs, most, 2 * tile * batch * inner / rate, 8 * tile / device.bandwidth)


def add_squares(lam: Tensor, s: Squares) -> None:
    """Add one sum of squared products to `lam [M, N]`."""
    from .kernel import squares_kernel

    rows, columns = lam.shape
    if not (s.batch and s.inner):
        return
    is_aligned = s.aligned and _aligned(lam)
    c = configure(s.left, s.right, is_aligned)
    device = of_tensors(lam.device)
    tiles = -(-rows // c.block_m) * -(-columns // c.block_n)
    inner = s.inner if s.cu_seqlens is None else -(-s.inner // s.batch)
    splits = splits_of(tiles, s.batch, inner, c, device, max(s.left.element_size(), s.right.element_size()))
    out = lam if splits == 1 else torch.empty(splits, rows, columns, dtype=torch.float32, device=lam.device)
    packed = s.cu_seqlens is not None
    a_step, b_step, out_step = (16 // x.element_size() if is_aligned else 1 for x in (s.left, s.right, lam))
    # Arguments that a variant does not read still have a type.
    mask = s.left.new_empty(0, dtype=torch.uint8) if s.mask is None else s.mask
    cu_seqlens = s.left.new_empty(0, dtype=torch.int64) if s.cu_seqlens is None else s.cu_seqlens.to(torch.int64)
    support.launch(
        squares_kernel, (tiles, splits), c, lam.device, left=s.left, right=s.right, out=out, mask=mask,
        cu_seqlens=cu_seqlens, batch=s.batch, inner=s.inner, rows=rows, columns=columns,
        left_batch=0 if packed else s.left.stride(0) // a_step, left_stride=s.left.stride(-2) // a_step,
        right_batch=0 if packed else s.right.stride(0) // b_step, right_stride=s.right.stride(-2) // b_step,
        out_split=out.stride(0) // out_step if splits > 1 else 0, out_stride=out.stride(-2) // out_step,
        batches_a_split=-(-s.batch // splits), ADD=splits == 1, PACKED=packed, A_T=s.a_t,
        MASKED=s.mask is not None, ALIGNED=is_aligned, PRECISION=c.precision, BM=c.block_m, BN=c.block_n, BK=c.block_k,
        GROUP=c.group,
    )  # fmt: skip
    if splits > 1:
        lam.add_(out.sum(0))


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _add_rotated(
    lam: Tensor, g: Tensor, a: Tensor, q_out: Tensor | None, q_in: Tensor | None, parts: list[tuple[int, int]]
) -> None:
    """Beyond the crossover: gradients of a few sequences at a time, rotated on the sides that are left.

    g `[N, d_out]` and a `[N, d_in]` are rows of all sequences, `parts` their first and last ones.
    """
    d_out, d_in = g.shape[1], a.shape[1]
    chunk = max(1, GRADIENT_BYTES // (4 * d_out * d_in))
    for start in range(0, len(parts), chunk):
        now = parts[start : start + chunk]
        gradients = torch.empty(len(now), d_out, d_in, dtype=torch.float32, device=lam.device)
        multiply([Product(operand(g[i:j].T), operand(a[i:j]), out) for (i, j), out in zip(now, gradients, strict=True)])
        if q_out is not None and q_in is not None:
            rotated = torch.empty_like(gradients)
            left = operand(q_out.T)
            multiply([Product(left, x, out) for x, out in zip(gradients, rotated, strict=True)])
            gradients = rotated
        if q_in is not None:
            add_squares(lam, Squares(gradients, _unit_columns(q_in).expand(len(now), -1, -1), a_t=False))
        else:
            assert q_out is not None
            add_squares(lam, Squares(_unit_columns(q_out).expand(len(now), -1, -1), gradients, a_t=True))


def run(
    lam: Tensor,
    g: Tensor,
    a: Tensor,
    q_out: Tensor | None,
    q_in: Tensor | None,
    mask: Tensor | None,
    ones_column: bool,
    cu_seqlens: Tensor | None,
) -> None:
    batch, rows = batch_of(g, cu_seqlens), g.shape[:-1].numel()
    if batch == 0 or rows == 0:
        return
    d_out, d_in = lam.shape
    tokens = tokens_of(g, cu_seqlens)
    if q_out is not None and rotates_tokens(tokens, d_in):
        g, q_out = rotate(g, q_out), None
    if q_in is not None and rotates_tokens(tokens, d_out):
        a, q_in, ones_column = rotate(a, q_in, ones_column=ones_column), None, False
    if ones_column:
        a = append_ones(a)
    # Rows of one dtype multiply at its rate; the other side of a mixed pair is widened with it.
    if g.dtype != a.dtype:
        g, a = g.to(torch.float32), a.to(torch.float32)
    if q_out is None and q_in is None:
        if tokens == 1 and cu_seqlens is None:
            _add_single_tokens(lam, g[:, 0], a[:, 0], mask)
            return
        add_squares(lam, Squares(_unit_columns(g), _unit_columns(a), True, support.as_bytes(mask), cu_seqlens))
        return
    g, a = g.flatten(0, -2), a.flatten(0, -2)
    if mask is not None:
        dropped = ~mask.unsqueeze(1)
        g, a = g.masked_fill(dropped, 0), a.masked_fill(dropped, 0)
    parts = sequences(batch, rows, cu_seqlens)
    q_out, q_in = (None if q is None else basis(q, torch.float32) for q in (q_out, q_in))
    _add_rotated(lam, g, a, q_out, q_in, parts)


def _add_single_tokens(lam: Tensor, g: Tensor, a: Tensor, mask: Tensor | None) -> None:
    """A single token factorises: `(g aᵀ)∘² = g∘² (a∘²)ᵀ`, so all sequences are one product of squares."""
    if mask is not None:
        dropped = ~mask.unsqueeze(1)
        g, a = g.masked_fill(dropped, 0), a.masked_fill(dropped, 0)
    lam.addmm_(g.to(lam.dtype).square().T, a.to(lam.dtype).square())


def refuses(lam: Tensor, g: Tensor, a: Tensor, q_out: Tensor | None, q_in: Tensor | None, *_: object) -> str | None:
    dtypes = [x.dtype for x in (lam, g, a, q_out, q_in) if x is not None]
    reason = support.refusal("eigenvalue_correction_", "lam", lam.device, dtypes)
    if reason is not None:
        return reason
    if lam.stride(1) != 1:
        return "lam is not stored by rows"
    if min(lam.shape) < SMALLEST_WIDTH and not support.interpreted():
        return f"lam has a side of {min(lam.shape)}, below {SMALLEST_WIDTH}"
    return None


def configuration(
    lam: Tensor,
    g: Tensor,
    a: Tensor,
    q_out: Tensor | None,
    q_in: Tensor | None,
    mask: Tensor | None,
    ones_column: bool,
    cu_seqlens: Tensor | None,
) -> str:
    batch, tokens = batch_of(g, cu_seqlens), tokens_of(g, cu_seqlens)
    sides = describe_sides(lam, tokens, q_out, q_in)
    c = configure(g, a, all(_aligned(x) for x in (lam, g, a)))
    tiles = -(-lam.shape[0] // c.block_m) * -(-lam.shape[1] // c.block_n)
    splits = splits_of(tiles, batch, tokens, c, of_tensors(lam.device), max(g.element_size(), a.element_size()))
    parts = [f"sequences in {splits} parts"] if splits > 1 else []
    layout = "dense" if cu_seqlens is None else "packed"
    return ", ".join([f"{tiles} tiles of {c}", layout, *sides, *parts])


def variants(device: Device) -> list[support.Variant]:
    """Every compiled form that shipped configurations can ask for on a device."""
    from .kernel import squares_kernel

    # Strides too are 32-bit in a call, unless one does not fit.
    integers = dict.fromkeys(
        ("batch", "inner", "rows", "columns", "batches_a_split", "left_batch", "left_stride", "right_batch",
         "right_stride", "out_split", "out_stride"), "i32",
    )  # fmt: skip
    found = {}
    for dtype, shipped in support.shipped_configurations("eigenvalue_correction", device):
        element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
        # by summed rows, packed, masked, aligned, added to Λ at once
        forms = [
            (True, False, False, True, True), (True, False, True, True, True), (True, True, False, True, True),
            (True, True, True, True, False), (True, False, False, True, False), (True, False, False, False, True),
        ]  # fmt: skip
        if dtype == torch.float32:
            forms.append((False, False, False, True, True))
        for a_t, packed, masked, is_aligned, add in forms:
            c = adapt(shipped, is_aligned)
            kind = " ".join(
                word
                for word, said in (
                    ("packed", packed), ("gradient", not a_t), ("masked", masked), ("any rows", not is_aligned),
                    ("part", not add),
                )
                if said
            )  # fmt: skip
            one = support.Variant(
                f"squares {support.short(dtype)} {kind}".strip(), squares_kernel,
                {"left": element, "right": element, "out": "*fp32", "mask": "*u8", "cu_seqlens": "*i64", **integers},
                {"ADD": add, "PACKED": packed, "A_T": a_t, "MASKED": masked, "ALIGNED": is_aligned,
                 "PRECISION": c.precision, "BM": c.block_m, "BN": c.block_n, "BK": c.block_k, "GROUP": c.group},
                c, itemsizes=(dtype.itemsize, dtype.itemsize), pipelined=is_aligned,
                aligned=("left", "right", "out") if is_aligned else ("out",),
            )  # fmt: skip
            found[one.name, c] = one
    return list(found.values())

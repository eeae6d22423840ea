"""`apply_update_` by Triton: all tensors of a call in one launch, each weight read and written once.

Bytes an element: weight twice, delta and gradient once. With gradients each block's two sums are float32 (a
square below 1e-38 counts as zero there) and are added in float64 in their order: no atomics, equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import triton_support as support
from ..configurations import Configuration, choose
from ..devices import Device, of_tensors
from .reference import no_sums, require_distinct, zero_sums

# A block, whatever the device: threads without elements to work on are wasted.
SMALLEST_BLOCK = 1024
# Element by element each load takes registers for its address and its mask.
ANY_ELEMENTS = Configuration(block_n=1024, warps=4, programs=8)
# Elements of 16 bytes of the narrowest weight.
STEP = 8


@dataclass(frozen=True)
class _Entry:
    """One tensor of a launch."""

    weight: Tensor
    delta: Tensor
    gradient: Tensor | None

    @property
    def aligned(self) -> bool:
        """Whether all loads may be 16 bytes wide."""
        given = (x for x in (self.weight, self.delta, self.gradient) if x is not None)
        return self.weight.numel() % STEP == 0 and all(x.data_ptr() % 16 == 0 for x in given)


def _alike(weights: list[Tensor], deltas: list[Tensor], gradients: list[Tensor] | None) -> list[list[_Entry]]:
    """Entries that one compiled kernel serves: same dtype and alignment."""
    groups: dict[tuple[torch.dtype, bool], list[_Entry]] = {}
    for i, (weight, delta) in enumerate(zip(weights, deltas, strict=True)):
        if weight.numel():
            entry = _Entry(weight, delta, gradients[i] if gradients else None)
            groups.setdefault((weight.dtype, entry.aligned), []).append(entry)
    return list(groups.values())


def _adapt(found: Configuration, is_aligned: bool) -> Configuration:
    return replace(found, block_n=max(found.block_n, SMALLEST_BLOCK)) if is_aligned else ANY_ELEMENTS


def _configure(entries: list[_Entry]) -> Configuration:
    weight = entries[0].weight
    extent = max(entry.weight.numel() for entry in entries)
    found = choose("apply_update", of_tensors(weight.device), weight.dtype, extent, support.triton_version())
    return _adapt(found, entries[0].aligned)


def _launch(entries: list[_Entry], scale: float, *, measured: bool) -> Tensor:
    """Add one group; returns its two unscaled sums `[2]` float64, which are zero if they are not `measured`."""
    from .kernel import FIELDS, apply_update_kernel

    c = _configure(entries)
    where = entries[0].weight.device
    table = support.Table(FIELDS)
    for e in entries:
        table.add(
            -(-e.weight.numel() // c.block_n), e.weight.data_ptr(), e.delta.data_ptr(), support.address(e.gradient),
            e.weight.numel(),
        )  # fmt: skip
    partials = torch.empty(table.work if measured else 0, 2, dtype=torch.float32, device=where)
    support.launch(
        apply_update_kernel, support.grid(table.work, c, of_tensors(where)), c, where, table=table.to(where),
        tensors=len(entries), partials=partials, scale=scale, DTYPE=support.triton_type(entries[0].weight.dtype),
        GRADIENTS=measured, ALIGNED=entries[0].aligned, BLOCK=c.block_n, STEP=STEP,
        FIELDS=FIELDS,
    )  # fmt: skip
    return partials.sum(0, dtype=torch.float64)


def run(weights: list[Tensor], deltas: list[Tensor], scale: float, gradients: list[Tensor] | None) -> Tensor:
    require_distinct(weights)
    groups = _alike(weights, deltas, gradients)
    if gradients is None:
        for group in groups:
            _launch(group, scale, measured=False)
        return no_sums(weights)
    total = sum((_launch(group, scale, measured=True) for group in groups), zero_sums(weights))
    return torch.stack([total[0] * scale**2, total[1] * scale])


def refuses(weights: list[Tensor], deltas: list[Tensor], _scale: float, gradients: list[Tensor] | None) -> str | None:
    if not weights:
        return "there are no weights"
    reason = support.refusal("apply_update_", "weights", weights[0].device, (x.dtype for x in weights + deltas))
    if reason is not None:
        return reason
    for name, tensors in (("weights", weights), ("deltas", deltas), ("gradients", gradients or [])):
        for i, x in enumerate(tensors):
            if not x.is_contiguous():
                return f"{name}[{i}] is not contiguous"
            if name == "gradients" and x.dtype != torch.float32:
                return f"{name}[{i}] is {x.dtype}"
    return None


def configuration(weights: list[Tensor], deltas: list[Tensor], _scale: float, gradients: list[Tensor] | None) -> str:
    groups = _alike(weights, deltas, gradients)
    if not groups:
        return "no elements"
    c = _configure(groups[0])
    return f"{len(weights)} tensors in {len(groups)} launches, blocks of {c.block_n}, {c.warps} warps"


def variants(device: Device) -> list[support.Variant]:
    """Every compiled form that shipped configurations can ask for on a device."""
    from .kernel import FIELDS, apply_update_kernel

    found = {}
    for dtype, shipped in support.shipped_configurations("apply_update", device):
        for gradients in (False, True):
            for is_aligned in (True, False):
                c = _adapt(shipped, is_aligned)
                one = support.Variant(
                    f"apply_update {support.short(dtype)}{' gradients' if gradients else ''}"
                    f"{'' if is_aligned else ' any elements'}",
                    apply_update_kernel,
                    {"table": "*i64", "tensors": "i32", "partials": "*fp32", "scale": "fp32"},
                    {"DTYPE": support.triton_type(dtype), "GRADIENTS": gradients, "ALIGNED": is_aligned,
                     "BLOCK": c.block_n, "STEP": STEP, "FIELDS": FIELDS},
                    c, products=False,
                )  # fmt: skip
                found[one.name, c] = one
    return list(found.values())

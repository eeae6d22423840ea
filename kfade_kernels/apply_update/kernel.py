"""The kernel of `apply_update_`: a stream over the elements of many tensors in one launch.

A tensor is one row of a table; a work item is one block of its elements. Programs are persistent: program p
takes items p, p + programs, ... With gradients each item leaves its two sums in a place of its own, so that
they can be added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the table.
FIELDS = 5  # end, weight, delta, gradient, elements


@triton.jit(do_not_specialize=["tensors"])
def apply_update_kernel(
    table,
    tensors,
    partials,
    scale,
    DTYPE: tl.constexpr,
    GRADIENTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    FIELDS: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    n = tl.arange(0, BLOCK)
    start = tl.zeros((), tl.int64)
    for t in range(tensors):
        entry = table + t * FIELDS
        end = tl.load(entry)
        first = start + (pid - start % programs + programs) % programs
        if first < end:
            weight = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
            delta = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
            gradient = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
            elements = tl.load(entry + 4)
            if ALIGNED:
                weight = tl.multiple_of(weight, 16)
                delta = tl.multiple_of(delta, 16)
                gradient = tl.multiple_of(gradient, 16)
                elements = tl.multiple_of(elements, STEP)
            mine = tl.cdiv((end - first).to(tl.int32), programs)
            for step in range(mine):
                item = first + step * programs
                at = (item - start) * BLOCK
                # The mask must be known to change on steps only, or loads are element by element.
                keep = n < elements - at
                d = tl.load(delta + at + n, mask=keep, other=0.0)
                w = tl.load(weight + at + n, mask=keep, other=0.0)
                tl.store(weight + at + n, (w.to(tl.float32) + scale * d).to(DTYPE), mask=keep)
                if GRADIENTS:
                    tl.store(partials + 2 * item, tl.sum(d * d, 0))
                    g = tl.load(gradient + at + n, mask=keep, other=0.0)
                    tl.store(partials + 2 * item + 1, tl.sum(d * g, 0))
        start = end

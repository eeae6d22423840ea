"""`syrk_` in C++ (`csrc/cpu/syrk.cpp`): rows are packed once and serve as both operands of every tile.

FLOPs: `N·n²` plus what blocks of at most 8×48 on the diagonal have above it. Bytes: x read once, the packed
triangle read and written once every `lines` lines of rows (a line is two rows of bfloat16). Memory: those lines, in
32-bit cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu_support as support
from .. import native
from ..triton_support import rows_of


def run(
    packed: Tensor, order: int, x: Tensor, mask: Tensor | None, alpha: float, ones_column: bool, allow_tf32: bool
) -> None:
    isa = support.isa()
    rows = rows_of(x)
    keep = None if mask is None else mask.contiguous()
    native.module.syrk(
        isa, support.blocks(isa), packed.data_ptr(), order, support.matrix(rows, ones_column), rows.shape[0],
        support.address(keep), alpha, torch.get_num_threads(),
    )  # fmt: skip


def refuses(packed: Tensor, order: int, x: Tensor, *_: object) -> str | None:
    return support.refusal("x", [x], packed.dtype) or support.slower(support.in_pairs([x.dtype]))


def configuration(packed: Tensor, order: int, x: Tensor, *_: object) -> str:
    return support.describe(support.in_pairs([x.dtype]))

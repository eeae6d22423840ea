"""Products of 16-bit data on a CPU, accumulated in float32.

PyTorch's own CPU product of two bfloat16 matrices rounds its *result* to bfloat16. But oneDNN can be
told to read float32 operands as bfloat16, accumulate in float32 and return float32. For operands
whose values are bfloat16 already that is exact: the same digits as a float32 product, at the rate
of the bfloat16 dot-product units (AVX-512 BF16, AMX). On a processor without them the mode has no
effect, and the product is an ordinary float32 one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_mkldnn_matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
HAS_BF16_OPERANDS = hasattr(_mkldnn_matmul, "fp32_precision")


@contextmanager
def bf16_operands(enabled: bool) -> Iterator[None]:
    """Within this block float32 CPU products may read their operands as bfloat16.

    Only for operands that hold bfloat16 values. The setting is the process's own (oneDNN has no
    other), so the block must hold products of this library and nothing else.
    """
    if not (enabled and HAS_BF16_OPERANDS):
        yield
        return
    before = _mkldnn_matmul.fp32_precision
    _mkldnn_matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        _mkldnn_matmul.fp32_precision = before


def bf16_pair(q: Tensor) -> Tensor:
    """Split `q [n, m]` into bfloat16 `[2, n, m]`, high and low part, whose sum is q to about 2⁻¹⁷.

    Takes the memory of float32 and keeps rotations on the 16-bit units. Plain bfloat16 eigenvectors
    are not good enough: they smear large directions over small ones.
    """
    high = q.to(torch.bfloat16)
    return torch.stack([high, (q - high.to(q.dtype)).to(torch.bfloat16)])

"""What products of float32 round: 16-bit data on a CPU accumulated in float32, and no TF32 unless it is asked for.

PyTorch's own CPU product of two bfloat16 matrices rounds its *result* to bfloat16. But oneDNN can be
told to read float32 operands as bfloat16, accumulate in float32 and return float32. For operands
whose values are bfloat16 already that is exact: the same digits as a float32 product, at the rate
of the bfloat16 dot-product units (AVX-512 BF16, AMX). On a processor without them the mode has no
effect, and the product is an ordinary float32 one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_mkldnn_matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
HAS_BF16_OPERANDS = hasattr(_mkldnn_matmul, "fp32_precision")


@functools.cache
def multiplies_bf16(device: str) -> bool:
    """Whether products of bfloat16 are fast on a kind of device.

    On a CPU that oneDNN does not multiply bfloat16 on (AVX2 alone), PyTorch's own product is a hundred
    times slower than float32.
    """
    if device != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported is not None and supported())


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


@contextmanager
def float32_products(*, allow_tf32: bool = False) -> Iterator[None]:
    """Within this block PyTorch multiplies float32 as float32, or on a GPU as TF32 where that is allowed.

    `torch.set_float32_matmul_precision` and its like are for whole programs, and would let the sums and
    rotations here lose half of their digits, or most of them on a CPU ("medium" is bfloat16 there). The
    setting is the process's own, so other threads may meanwhile multiply more precisely than they asked for.
    """
    wanted = ((torch.backends.cuda.matmul, "tf32" if allow_tf32 else "ieee"), (_mkldnn_matmul, "ieee"))
    before = [backend.fp32_precision for backend, _ in wanted]
    # What is not set is float32, and is left alone: a call then writes no setting.
    changed = [
        (backend, was, now)
        for (backend, now), was in zip(wanted, before, strict=True)
        if (was if was in ("tf32", "bf16") else "ieee") != now
    ]
    for backend, _, now in changed:
        backend.fp32_precision = now
    try:
        yield
    finally:
        for backend, was, _ in changed:
            # It may have been a wider setting's, and is then to follow that again.
            backend.fp32_precision = "none"
            if backend.fp32_precision != was:
                backend.fp32_precision = was


def multiplies_as_they_are(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies 16-bit rows into results of this dtype: on a GPU, into float32 and no wider."""
    return x.is_cuda and x.dtype.itemsize == 2 and dtype == torch.float32


def bf16_pair(q: Tensor) -> Tensor:
    """Split `q [n, m]` into bfloat16 `[2, n, m]`, high and low part, whose sum is q to about 2⁻¹⁷.

    Takes the memory of float32 and keeps rotations on the 16-bit units. Plain bfloat16 eigenvectors
    are not good enough: they smear large directions over small ones.
    """
    high = q.to(torch.bfloat16)
    return torch.stack([high, (q - high.to(q.dtype)).to(torch.bfloat16)])

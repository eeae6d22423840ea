"""Each operation beside the plain PyTorch expression that it replaces: `make bench ARGS="-k syrk"`."""

from __future__ import annotations

from collections.abc import Callable

import kfade_kernels as kk
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

Work = Callable[[], object]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _syrk(dtype: torch.dtype, order: int) -> dict[str, Work]:
    x = torch.randn(2048, order).to(dtype)
    acc, dense = kk.PackedSymmetric(order), torch.zeros(order, order)
    return {
        "kfade": lambda: kk.syrk_(acc, x),
        "addmm_": lambda: dense.addmm_(x.float().T, x.float()),
        "mm, rounded": lambda: dense.add_(x.T @ x),
    }


def _correction(dtype: torch.dtype, tokens: int) -> dict[str, Work]:
    d_out, d_in, size = 1536, 576, 8
    g, a = torch.randn(size, tokens, d_out).to(dtype), torch.randn(size, tokens, d_in).to(dtype)
    q_out, q_in = (torch.linalg.qr(torch.randn(n, n))[0] for n in (d_out, d_in))
    lam = torch.zeros(d_out, d_in)
    bases = (q_out, q_in) if dtype == torch.float32 else (kk.bf16_pair(q_out), kk.bf16_pair(q_in))

    def plain() -> None:
        gradient = torch.einsum("bto,bti->boi", g, a).float()
        lam.add_((q_out.T @ gradient @ q_in).square().sum(0))

    return {"kfade": lambda: kk.eigenvalue_correction_(lam, g, a, *bases), "einsum": plain}


def _solve(dtype: torch.dtype, order: int) -> dict[str, Work]:
    d_out, d_in = order, order // 2
    q_out, q_in = (torch.linalg.qr(torch.randn(n, n))[0] for n in (d_out, d_in))
    v, values = torch.randn(d_out, d_in).to(dtype), torch.rand(d_out, d_in)
    return {
        "kfade": lambda: kk.kron_solve(v, q_out, q_in, values, 0.1),
        "matmul": lambda: q_out @ ((q_out.T @ v.float() @ q_in) / (values + 0.1)) @ q_in.T,
    }


def _cross_entropy(dtype: torch.dtype, vocabulary: int) -> dict[str, Work]:
    hidden, weight = torch.randn(1024, 576).to(dtype), (0.05 * torch.randn(vocabulary, 576)).to(dtype)
    uniform = torch.rand(1024)

    def plain() -> object:
        p = (hidden @ weight.T).float().softmax(-1)
        labels = torch.multinomial(p, 1)
        return (p - torch.zeros_like(p).scatter_(-1, labels, 1.0)).to(dtype) @ weight

    return {"kfade": lambda: kk.sampled_cross_entropy(hidden, uniform, weight=weight), "softmax": plain}


CASES = {
    "syrk_": (_syrk, (576, 1536, 4096)),
    "eigenvalue_correction_": (_correction, (128, 512)),
    "kron_solve": (_solve, (1536, 4096)),
    "sampled_cross_entropy": (_cross_entropy, (8192, 49152)),
}
GRID = [
    pytest.param(operation, dtype, size, provider, id=f"{operation}-{dtype}-{size}-{provider}")
    for operation, (make, sizes) in CASES.items()
    for dtype in DTYPES
    for size in sizes
    for provider in make(DTYPES[dtype], 256 if operation != "eigenvalue_correction_" else 1)
]


@pytest.mark.parametrize(("operation", "dtype", "size", "provider"), GRID)
def test_operation(benchmark: BenchmarkFixture, operation: str, dtype: str, size: int, provider: str) -> None:
    torch.manual_seed(0)
    work = CASES[operation][0](DTYPES[dtype], size)[provider]
    benchmark.group = f"{operation} {dtype} {size}"
    benchmark.pedantic(work, rounds=5, iterations=1, warmup_rounds=2)

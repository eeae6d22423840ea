"""The factored solve by Cholesky against a dense inverse in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kfade_kernels import PackedSymmetric
from kfade_kernels.cholesky import balance, factored_solve
from oracles import assert_close
from torch import Tensor


def factor(n: int, rows: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[PackedSymmetric, Tensor]:
    """A sum of outer products, packed in a dtype, and dense in float64."""
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dense = x.T @ x
    return PackedSymmetric.from_dense(dense.to(dtype)), dense


def truth(v: Tensor, s: Tensor, a: Tensor, damping: float) -> Tensor:
    """By the inverse of the Kronecker product itself."""
    pi = math.sqrt((a.trace() / len(a)) / (s.trace() / len(s)))
    eye = [torch.eye(len(m), dtype=torch.float64) for m in (s, a)]
    whole = torch.kron(s + math.sqrt(damping) / pi * eye[0], a + pi * math.sqrt(damping) * eye[1])
    return (torch.linalg.inv(whole) @ v.double().reshape(-1)).reshape(v.shape)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("d_out, d_in", [(1, 1), (1, 5), (6, 1), (7, 13), (24, 17)])
def test_agrees_with_a_dense_inverse(d_out: int, d_in: int, dtype: torch.dtype, tolerance: float) -> None:
    """Tolerances: a condition number of at most 10³ times the rounding of each dtype."""
    s, s_dense = factor(d_out, 40, 1, dtype)
    a, a_dense = factor(d_in, 50, 2, dtype)
    v = torch.randn(d_out, d_in, dtype=dtype)
    found = factored_solve(v, s, a, 0.1, s_count=40, a_count=50)
    assert found.dtype == dtype and found.is_contiguous()
    assert_close(found, truth(v, s_dense / 40, a_dense / 50, 0.1), tolerance)


def test_a_batch_and_narrow_matrices() -> None:
    (s, _), (a, _) = factor(6, 20, 1, torch.float32), factor(9, 20, 2, torch.float32)
    v = torch.randn(3, 6, 9, dtype=torch.bfloat16)
    together = factored_solve(v, s, a, 0.5)
    assert together.dtype == torch.float32
    for one, matrix in zip(together, v, strict=True):
        assert_close(one, factored_solve(matrix.float(), s, a, 0.5), 1e-5)  # the order of sums in a batched product
    assert factored_solve(v[:0], s, a, 0.5).shape == (0, 6, 9)


def test_without_damping_it_is_the_inverse() -> None:
    (s, s_dense), (a, a_dense) = factor(5, 30, 1), factor(4, 30, 2)
    v = torch.randn(5, 4, dtype=torch.float64)
    assert_close(factored_solve(v, s, a, 0.0), torch.linalg.inv(s_dense) @ v @ torch.linalg.inv(a_dense), 1e-10)


def test_the_damping_is_balanced() -> None:
    """Scaling S by c and A by 1/c changes no solution: π takes it up."""
    (_, s), (_, a) = factor(5, 30, 1), factor(4, 30, 2)
    v = torch.randn(5, 4, dtype=torch.float64)
    plain = factored_solve(v, PackedSymmetric.from_dense(s), PackedSymmetric.from_dense(a), 0.3)
    scaled = factored_solve(v, PackedSymmetric.from_dense(s * 1e6), PackedSymmetric.from_dense(a * 1e-6), 0.3)
    assert_close(scaled, plain, 1e-10)
    assert balance(0.0, 2.0) == balance(2.0, 0.0) == 1.0


def test_a_factor_that_saw_nothing() -> None:
    """Its damping alone is left: π is 1."""
    (a, a_dense), v = factor(4, 30, 2), torch.randn(5, 4, dtype=torch.float64)
    found = factored_solve(v, PackedSymmetric(5, dtype=torch.float64), a, 0.25)
    assert_close(found, v / 0.5 @ torch.linalg.inv(a_dense + 0.5 * torch.eye(4, dtype=torch.float64)), 1e-10)


def test_a_singular_factor_is_an_error() -> None:
    (s, _), (a, _) = factor(40, 3, 1), factor(4, 30, 2)
    v = torch.randn(40, 4, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"s of order 40 with 0 added is not positive definite in torch.float64; damping"
    ):
        factored_solve(v, s, a, 0.0)
    assert bool(torch.isfinite(factored_solve(v, s, a, 1e-6)).all())


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"v": [[1.0]]}, TypeError, "v is a list"),
        ({"v": torch.zeros(5)}, ValueError, "v has"),
        ({"v": torch.zeros(5, 5)}, ValueError, "a has order 4; it must be 5"),
        ({"v": torch.zeros(4, 4)}, ValueError, "s has order 5; it must be 4"),
        ({"s": torch.eye(5)}, TypeError, "s is a Tensor; it must be a PackedSymmetric"),
        ({"a": PackedSymmetric(4, dtype=torch.float64)}, TypeError, "a is torch.float64; it must be torch.float32"),
        ({"v": torch.zeros(5, 4, dtype=torch.float64)}, TypeError, "v is torch.float64"),
        ({"damping": -1.0}, ValueError, "damping is -1.0; it must be at least 0"),
        ({"damping": math.nan}, ValueError, "damping is nan"),
        ({"s_count": 0.0}, ValueError, "s_count is 0.0; it must be greater than 0"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"v": torch.zeros(5, 4), "s": PackedSymmetric(5), "a": PackedSymmetric(4), "damping": 0.1}
    with pytest.raises(error, match=message):
        factored_solve(**{**good, **changes})

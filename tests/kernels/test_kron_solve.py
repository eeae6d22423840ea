"""`kron_solve` against a dense solve in float64, for each backend."""

from __future__ import annotations

from typing import Any

import kfade_kernels as kk
import pytest
import torch
from kfade_kernels.kron_solve import pytorch
from oracles import Sizes, assert_as_accurate, assert_close, dense_solve, orthogonal
from torch import Tensor

STATES = [torch.float64, torch.float32]
SHAPES = [(1, 1), (1, 5), (5, 1), (7, 13), (24, 17)]
PAIRS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def problem(d_out: int, d_in: int, dtype: torch.dtype, pair: bool) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Two bases, eigenvalues as they are given, and all of them."""
    left, right = torch.rand(d_out, dtype=dtype), torch.rand(d_in, dtype=dtype)
    full = torch.outer(left, right) if pair else torch.rand(d_out, d_in, dtype=dtype)
    return orthogonal(d_out, dtype), orthogonal(d_in, dtype), (left, right) if pair else full, full


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("dtype", STATES, ids=str)
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_agrees_with_a_dense_solve(backend: str, d_out: int, d_in: int, dtype: torch.dtype, pair: bool) -> None:
    q_out, q_in, values, full = problem(d_out, d_in, dtype, pair)
    v = torch.randn(d_out, d_in, dtype=dtype)
    plain = q_out @ ((q_out.T @ v @ q_in) / (full + 0.1)) @ q_in.T
    truth = dense_solve(v, q_out, q_in, full, 0.1)
    result = kk.kron_solve(v, q_out, q_in, values, 0.1)
    assert result.dtype == dtype
    # A float32 basis is orthogonal to rounding only, so the dense inverse differs by a condition number.
    assert_as_accurate(result, plain, truth, times=8)


@pytest.mark.parametrize("v_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("pair", [False, True])
def test_batches_and_16_bit_gradients(backend: str, v_dtype: torch.dtype, pair: bool) -> None:
    dtype = torch.float64 if v_dtype == torch.float64 else torch.float32
    q_out, q_in, values, _ = problem(130, 9, dtype, pair)
    v = torch.randn(3, 130, 9).to(v_dtype)
    result = kk.kron_solve(v, q_out, q_in, values, 0.01)
    assert result.dtype == dtype
    for one, expected in zip(result, v.to(dtype), strict=True):
        alone = kk.kron_solve(expected, q_out, q_in, values, 0.01)
        assert_close(one, alone, 64 * torch.finfo(dtype).eps)
    assert kk.kron_solve(v[:0], q_out, q_in, values, 0.01).shape == (0, 130, 9)


@pytest.mark.parametrize("pair", [False, True])
def test_solution_times_matrix_is_the_right_hand_side(backend: str, pair: bool) -> None:
    q_out, q_in, values, full = problem(33, 20, torch.float64, pair)
    v = torch.randn(33, 20, dtype=torch.float64)
    x = kk.kron_solve(v, q_out, q_in, values, 0.3)
    assert_close(q_out @ ((q_out.T @ x @ q_in) * (full + 0.3)) @ q_in.T, v, 1e-12)


@pytest.mark.parametrize("pair", [False, True])
def test_any_strides_and_inputs_stay(backend: str, pair: bool) -> None:
    q_out, q_in, values, full = problem(7, 5, torch.float64, pair)
    v = torch.randn(5, 7, dtype=torch.float64).T
    given = [v.clone(), q_out.clone(), q_in.clone(), full.clone()]
    strided = kk.kron_solve(v, q_out.T.contiguous().T, q_in.T.contiguous().T, values, 0.1)
    assert_close(strided, kk.kron_solve(v.contiguous(), q_out, q_in, values, 0.1), 1e-14)
    assert all(torch.equal(x, y) for x, y in zip(given[:3], (v, q_out, q_in), strict=True))


def test_zero_damping_is_allowed_and_same_bits_come_twice(backend: str) -> None:
    q_out, q_in, values, full = problem(6, 4, torch.float64, False)
    v = torch.randn(6, 4, dtype=torch.float64)
    twice = [kk.kron_solve(v, q_out, q_in, values + 1, 0.0) for _ in "ab"]
    assert torch.equal(*twice)
    assert_close(twice[0], dense_solve(v, q_out, q_in, full + 1, 0.0), 1e-12)


def test_a_pair_is_never_multiplied_out() -> None:
    q_out, q_in, values, _ = problem(200, 100, torch.float32, True)
    sizes = Sizes()
    with sizes:
        pytorch.solve(torch.randn(200, 100), None, q_out, q_in, *values, 0.1)
    assert torch.Size([200, 100]) not in sizes.shapes_of("mul", "outer", "add", "ger")


@pytest.mark.parametrize("tokens", [1, 3, 8, 60])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("dtype", PAIRS, ids=str)
def test_gradient_as_factors(backend: str, dtype: torch.dtype, pair: bool, tokens: int) -> None:
    """Few tokens are rotated, many are multiplied out: the solution is that of the gradient itself."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q_out, q_in, values, full = problem(20, 13, wide, pair)
    g, a = torch.randn(tokens, 20).to(dtype), torch.randn(tokens, 13).to(dtype)
    gradient = g.to(wide).T @ a.to(wide)
    plain = q_out @ ((q_out.T @ gradient @ q_in) / (full + 0.1)) @ q_in.T
    truth = dense_solve(g.double().T @ a.double(), q_out, q_in, full, 0.1)
    assert_as_accurate(kk.kron_solve((g, a), q_out, q_in, values, 0.1), plain, truth, times=8)


@pytest.mark.parametrize("dtype", STATES, ids=str)
def test_lists_of_unequal_problems(backend: str, dtype: torch.dtype) -> None:
    shapes = [(7, 13), (130, 9), (1, 5), (24, 17)]
    problems = [problem(*shape, dtype, pair) for shape, pair in zip(shapes, (False, True, True, False), strict=True)]
    v: list[Any] = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    v[1] = torch.randn(2, *shapes[1], dtype=dtype)
    v[3] = (torch.randn(4, 24, dtype=dtype), torch.randn(4, 17, dtype=dtype))
    q_out, q_in, values = ([p[i] for p in problems] for i in range(3))
    dampings = [0.1, 0.2, 0.3, 1e-3]
    together = kk.kron_solve(v, q_out, q_in, values, dampings)
    assert isinstance(together, list)
    for i, solution in enumerate(together):
        alone = kk.kron_solve(v[i], q_out[i], q_in[i], values[i], dampings[i])
        assert_close(solution, alone, 64 * torch.finfo(dtype).eps)
    common = kk.kron_solve(v[:2], q_out[:2], q_in[:2], values[:2], 0.2)
    assert torch.equal(common[1], together[1])
    assert kk.kron_solve([], [], [], [], 0.1) == []


def test_a_bad_entry_of_a_list_is_named() -> None:
    with pytest.raises(ValueError, match=r"q_in\[1\] has shape"):
        kk.kron_solve([V, V], [Q6, Q6], [Q5, Q6], [L, L], 0.1)
    with pytest.raises(ValueError, match="q_out has 1 entries"):
        kk.kron_solve([V, V], [Q6], [Q5, Q5], [L, L], 0.1)
    with pytest.raises(TypeError, match="q_out is a Tensor; it must be a list"):
        kk.kron_solve([V], Q6, [Q5], [L], 0.1)
    with pytest.raises(ValueError, match=r"damping\[1\] is -1.0"):
        kk.kron_solve([V, V], [Q6, Q6], [Q5, Q5], [L, L], [0.1, -1.0])


V, Q6, Q5, L = torch.zeros(6, 5), torch.eye(6), torch.eye(5), torch.ones(6, 5)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("v one-dimensional", {"v": V[0]}, ValueError, "v has shape"),
    ("v integers", {"v": V.int()}, TypeError, "v is torch.int32"),
    ("v a triple", {"v": (V, V, V)}, TypeError, "v is a tuple of 3"),
    ("v factors of two dtypes", {"v": (V.new_zeros(4, 6), V.new_zeros(4, 5).half())}, TypeError, r"v\[1\] is torch"),
    ("v factors unequal", {"v": (V.new_zeros(4, 6), V.new_zeros(3, 5))}, ValueError, r"v\[1\] has shape"),
    ("v wider", {"v": V.double()}, TypeError, "v is torch.float64"),
    ("v sparse", {"v": V.to_sparse()}, ValueError, "v has layout"),
    ("v elsewhere", {"v": V.to("meta")}, ValueError, "q_out is on cpu"),
    ("v transposed", {"v": V.T}, ValueError, "q_out has shape"),
    ("q_out not square", {"q_out": Q6[:, :5]}, ValueError, "q_out has shape"),
    ("q_out 16-bit", {"q_out": Q6.bfloat16()}, TypeError, "q_out is torch.bfloat16"),
    ("q_in other order", {"q_in": Q6}, ValueError, "q_in has shape"),
    ("q_in other dtype", {"q_in": Q5.double()}, TypeError, "q_in is torch.float64"),
    ("q_in elsewhere", {"q_in": Q5.to("meta")}, ValueError, "q_in is on meta"),
    ("eigenvalues transposed", {"eigenvalues": L.T}, ValueError, "eigenvalues has shape"),
    ("eigenvalues one vector", {"eigenvalues": L[0]}, ValueError, "eigenvalues has shape"),
    ("eigenvalues other dtype", {"eigenvalues": L.double()}, TypeError, "eigenvalues is torch.float64"),
    ("eigenvalues a number", {"eigenvalues": 1.0}, TypeError, "eigenvalues is a float"),
    ("pair of three", {"eigenvalues": (L[0], L[0], L[0])}, TypeError, "eigenvalues is a tuple"),
    ("pair swapped", {"eigenvalues": (L[0], L[:, 0])}, ValueError, r"eigenvalues\[0\] has shape"),
    ("pair of numbers", {"eigenvalues": (1.0, 2.0)}, TypeError, r"eigenvalues\[0\] is a float"),
    ("damping negative", {"damping": -1e-9}, ValueError, "damping is -1e-09"),
    ("damping NaN", {"damping": float("nan")}, ValueError, "damping is nan"),
    ("damping infinite", {"damping": float("inf")}, ValueError, "damping is inf"),
    ("damping a string", {"damping": "0.1"}, TypeError, "damping is a str"),
    ("damping a bool", {"damping": True}, TypeError, "damping is a bool"),
    ("damping a tensor", {"damping": torch.tensor(0.1)}, TypeError, "damping is a Tensor"),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kk.kron_solve(**{"v": V, "q_out": Q6, "q_in": Q5, "eigenvalues": L, "damping": 0.1, **change})

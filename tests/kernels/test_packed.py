"""Packed storage: what it keeps, what it costs, what it refuses."""

from __future__ import annotations

import pytest
import torch
from kfade_kernels import PackedSymmetric

ORDERS = [1, 5, 127, 128, 129, 300]


def symmetric(n: int) -> torch.Tensor:
    x = torch.randn(n, n, dtype=torch.float64)
    return x + x.T


@pytest.mark.parametrize("n", ORDERS)
def test_round_trip_is_exact_and_symmetric(n: int) -> None:
    dense = symmetric(n)
    again = PackedSymmetric.from_dense(dense).to_dense()
    assert torch.equal(again, dense)
    assert torch.equal(again, again.T)


@pytest.mark.parametrize("n", [*ORDERS, 1000, 4096])
def test_storage_is_half_and_128_columns_at_most(n: int) -> None:
    matrix = PackedSymmetric(n)
    assert matrix.nbytes == 4 * matrix.data.numel()
    assert matrix.data.numel() <= n * n / 2 + 128 * n
    assert matrix.data.numel() <= n * n


@pytest.mark.parametrize("n", ORDERS)
def test_what_is_above_the_diagonal_is_never_read(n: int) -> None:
    dense = symmetric(n)
    poisoned = dense.masked_fill(torch.ones(n, n).triu(1).bool(), torch.nan)
    matrix = PackedSymmetric.from_dense(poisoned)
    assert torch.equal(matrix.to_dense(), dense)
    assert torch.equal(matrix.diagonal(), dense.diagonal())
    torch.testing.assert_close(matrix.trace(), dense.trace())


def test_views_and_zero() -> None:
    matrix = PackedSymmetric.from_dense(symmetric(5))
    wrapped = PackedSymmetric.from_packed(matrix.data, 5)
    assert wrapped.data is matrix.data
    assert wrapped.zero_() is wrapped
    assert not matrix.to_dense().any()
    assert (matrix.dtype, matrix.device) == (torch.float64, torch.device("cpu"))
    assert "n=5" in repr(matrix)


def test_is_zero_at_first() -> None:
    assert torch.equal(PackedSymmetric(130).to_dense(), torch.zeros(130, 130))


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"n": 0}, ValueError, "n is 0"),
        ({"n": -3}, ValueError, "n is -3"),
        ({"n": 2.0}, TypeError, "n is a float"),
        ({"n": True}, TypeError, "n is a bool"),
        ({"n": 4, "dtype": torch.bfloat16}, TypeError, "dtype"),
        ({"n": 4, "dtype": torch.float16}, TypeError, "dtype"),
        ({"n": 4, "dtype": torch.int64}, TypeError, "dtype"),
    ],
)
def test_refuses(arguments: dict[str, object], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        PackedSymmetric(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [torch.zeros(24), torch.zeros(5, 5), torch.zeros(50)[::2]])
def test_from_packed_refuses_a_buffer_that_does_not_fit(data: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="data has shape"):
        PackedSymmetric.from_packed(data, 5)


@pytest.mark.parametrize("dense", [torch.zeros(4, 5), torch.zeros(4), torch.zeros(2, 4, 4)])
def test_from_dense_refuses_what_is_not_square(dense: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="dense has shape"):
        PackedSymmetric.from_dense(dense)

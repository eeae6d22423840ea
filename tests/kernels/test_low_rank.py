"""Thin bases: eigenpairs from a sketch, eigenvalues on blocks and the solve, against dense float64 definitions."""

from __future__ import annotations

import pytest
import torch
from kfade_kernels import low_rank
from oracles import Sizes, assert_close, orthogonal, squared_gradients
from torch import Tensor

N = 60
RANKS = (1, 8, 20, 59)


def spectrum(kind: str, n: int = N) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "steep": i**-3,
        "flat": 1 - 0.5 * i / n,
        # Two plateaus; no rank tried lies between them but 8 and 20 at their ends.
        "clustered": torch.where(i <= 8, 1.0, torch.where(i <= 20, 1e-2, 1e-5)).double(),
        "rank 5": torch.where(i <= 5, 1.0, 0.0).double(),
    }[kind]


def matrix(kind: str, n: int = N) -> Tensor:
    q = orthogonal(n)
    return (q * spectrum(kind, n)) @ q.T


def completed(q: Tensor) -> Tensor:
    """A thin basis with the rest of the space behind it: any basis of that does, for what is the same in all of it."""
    return torch.cat([q, torch.linalg.svd(q, full_matrices=True).U[:, q.shape[1] :]], 1)


def expanded(block: Tensor, d_out: int, d_in: int) -> Tensor:
    """A block as the whole `[d_out, d_in]`, the tail repeated."""
    rows = torch.arange(d_out).clamp(max=block.shape[0] - 1)
    return block[rows][:, torch.arange(d_in).clamp(max=block.shape[1] - 1)]


def thin(n: int, k: int) -> Tensor:
    return orthogonal(n)[:, :k].contiguous()


# -------------------------------------------------------------------------------------- the eigenpairs


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["steep", "flat", "clustered", "rank 5"])
def test_nystrom(kind: str, rank: int, dtype: torch.dtype) -> None:
    """Orthonormal, ascending, nothing negative, never above the truth, the trace exact, and near the best there is."""
    m, eps = matrix(kind), torch.finfo(dtype).eps
    columns = min(N, rank + 10)
    omega = low_rank.random_basis(N, columns, 0).to(dtype)
    values, q = low_rank.nystrom((m @ omega.double()).to(dtype), omega, float(m.trace()), rank)
    assert values.shape == (rank + 1,) and q.shape == (N, rank) and values.dtype == q.dtype == dtype
    assert_close(q.double().T @ q.double(), torch.eye(rank), 4 * eps * rank)
    assert bool((values >= 0).all()) and bool((values[:-1].diff() >= 0).all())
    total = float(values[:-1].double().sum() + (N - rank) * values[-1].double())
    assert total == pytest.approx(float(m.trace()), rel=N * eps)
    # The approximation lies below M but for the shift.
    rounding = 8 * N * eps * float(torch.linalg.norm(m))
    exact = spectrum(kind)[:rank].flip(0)
    assert float((values[:-1].double() - exact).max()) < rounding
    captured = float((q.double() * (m @ q.double())).sum())
    # Halko, Martinsson, Tropp 2011: with ten more vectors the expected excess is (1 + k/9) times what no rank-k keeps.
    lost = float(exact.sum()) - captured
    assert lost <= (1 + rank / 9) * float(spectrum(kind)[rank:].sum()) + rounding


@pytest.mark.parametrize("kind", ["steep", "clustered", "rank 5"])
def test_nystrom_with_as_many_vectors_as_dimensions_is_exact(kind: str) -> None:
    m, rank = matrix(kind), 50
    omega = low_rank.random_basis(N, N, 0)
    values, q = low_rank.nystrom(m @ omega, omega, float(m.trace()), rank)
    # The shift is √n roundings of the norm.
    assert_close(values[:-1], spectrum(kind)[:rank].flip(0), 1e-12)
    assert_close((q * values[:-1]) @ q.T, (q @ q.T) @ m, 1e-6)


def test_nystrom_of_nothing_and_of_rounding() -> None:
    omega = low_rank.random_basis(N, 12, 0)
    values, q = low_rank.nystrom(torch.zeros(N, 12, dtype=torch.float64), omega, 0.0, 4)
    assert not values.any() and q.shape == (N, 4)
    assert_close(q.T @ q, torch.eye(4), 1e-13)
    # Sums that are indefinite by far more than their rounding, so that no shift makes a Cholesky factor of them.
    broken = matrix("rank 5") @ omega - 1e-8 * omega
    values, q = low_rank.nystrom(broken, omega, 5.0, 4)
    assert bool(torch.isfinite(values).all()) and float((values[:-1] - 1).abs().max()) < 1e-5
    assert_close(q.T @ q, torch.eye(4), 1e-12)


def test_random_basis_is_a_function_of_its_arguments() -> None:
    first, second = low_rank.random_basis(30, 7, 3), low_rank.random_basis(30, 7, 3)
    assert torch.equal(first, second) and not torch.equal(first, low_rank.random_basis(30, 7, 4))
    assert_close(first.T @ first, torch.eye(7), 1e-14)


# ------------------------------------------------------------------------------- eigenvalues on blocks


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("k_out", "k_in"), [(3, 4), (17, 4), (3, 12), (1, 1), (16, 11)])
@pytest.mark.parametrize("tokens", [1, 4, 6, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_blocks_are_means_of_the_whole(tokens: int, k_out: int, k_in: int, ones: bool, dtype: torch.dtype) -> None:
    """Sequences shorter and longer than where inner products of tokens stop being cheaper than the gradient."""
    g, a = torch.randn(3, tokens, 17).to(dtype), torch.randn(3, tokens, 12 - ones).to(dtype)
    g[1, tokens // 2 :], a[1, tokens // 2 :] = 0, 0
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    q_out, q_in = thin(17, k_out).to(kind), thin(12, k_in).to(kind)
    lam = torch.ones(low_rank.entries(q_out), low_rank.entries(q_in), dtype=kind)
    low_rank.correct_(lam, g, a, q_out, q_in, ones_column=ones)
    whole = squared_gradients(g, a, completed(q_out.double()), completed(q_in.double()), ones=ones)
    sides = [torch.arange(n).clamp(max=k) for n, k in ((17, k_out), (12, k_in))]
    sums = torch.zeros(k_out + 1, k_in + 1, dtype=torch.float64)
    sums.index_put_((sides[0][:, None], sides[1][None, :]), whole, accumulate=True)
    counts = torch.outer(low_rank.multiplicities(q_out), low_rank.multiplicities(q_in))
    truth = sums[: lam.shape[0], : lam.shape[1]] / counts + 1
    # What float32 loses: differences of squares, a few roundings of the largest.
    assert_close(lam, truth, 1e-12 if kind == torch.float64 else 1e-5)
    assert float((lam.double() * counts).sum()) == pytest.approx(float(whole.sum() + counts.sum()), rel=1e-5)


def test_a_shared_input_is_taken_as_given() -> None:
    g, a = torch.randn(2, 3, 17), torch.randn(2, 3, 12)
    q_out, q_in = thin(17, 3).float(), thin(12, 4).float()
    alone = low_rank.correct_(torch.zeros(4, 5), g, a, q_out, q_in)
    top = a @ q_in
    given = low_rank.correct_(
        torch.zeros(4, 5), g, a, q_out, q_in, rotated_in=top, gram_in=low_rank.gram(a, top)
    )  # fmt: skip
    assert_close(given, alone, 1e-6)


# --------------------------------------------------------------------------------------------- the solve


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("k_out", "k_in"), [(3, 4), (17, 4), (3, 12), (17, 12), (16, 11)])
@pytest.mark.parametrize("kind", ["steep", "flat", "clustered"])
def test_solve_is_the_dense_inverse(kind: str, k_out: int, k_in: int, batch: tuple[int, ...]) -> None:
    q_out, q_in = thin(17, k_out), thin(12, k_in)
    block = torch.outer(
        spectrum(kind, 17)[: low_rank.entries(q_out)], spectrum(kind, 12)[: low_rank.entries(q_in)]
    )  # fmt: skip
    v = torch.randn(*batch, 17, 12, dtype=torch.float64)
    solved = low_rank.apply(v, q_out, q_in, 1 / (block + 1e-3))
    q = torch.kron(completed(q_out), completed(q_in))
    dense = q @ torch.diag(expanded(block, 17, 12).reshape(-1)) @ q.T + 1e-3 * torch.eye(17 * 12, dtype=torch.float64)
    truth = torch.linalg.solve(dense, v.reshape(-1, 17 * 12).T).T.reshape(v.shape)
    assert_close(solved, truth, 1e-10)


def test_solve_keeps_large_directions_small_in_float32() -> None:
    """The tail's factor is 10⁵ times that of the top: its rounding must not fill the directions that must not move."""
    q_out, q_in = thin(80, 10), thin(70, 10)
    scale = torch.outer(torch.tensor([1e-3] * 10 + [1.0]), torch.tensor([1e-2] * 10 + [1.0])).double()
    # A gradient that lies almost wholly in the top directions.
    v = q_out @ torch.randn(10, 10, dtype=torch.float64) @ q_in.T + 1e-3 * torch.randn(80, 70, dtype=torch.float64)
    truth = q_out.T @ low_rank.apply(v, q_out, q_in, scale) @ q_in
    found = low_rank.apply(v.float(), q_out.float(), q_in.float(), scale.float()).double()
    # Rounding of the tail, 6e-8 of a norm of 0.07, is at most that of the top, 1e-5 · 10, times 1e-3.
    assert_close(q_out.T @ found @ q_in, truth, 1e-3)


def test_nothing_square_is_made() -> None:
    n, m, k, sizes = 400, 300, 5, Sizes()
    q_out, q_in = thin(m, k).float(), thin(n, k).float()
    omega = low_rank.random_basis(n, k + 10, 0).float()
    v, g, a = torch.randn(m, n), torch.randn(2, 6, m), torch.randn(2, 6, n)
    with sizes:
        low_rank.nystrom(torch.randn(n, k + 10), omega, 1.0, k)
        low_rank.correct_(torch.zeros(k + 1, k + 1), g, a, q_out, q_in)
        assert sizes.largest <= n * (k + 10)
        low_rank.apply(v, q_out, q_in, torch.ones(k + 1, k + 1))
    assert sizes.largest <= n * m and not any(s[-2:] in ((n, n), (m, m)) for _, shapes in sizes.calls for s in shapes)

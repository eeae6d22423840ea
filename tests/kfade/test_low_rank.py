"""`FitConfig(rank=k)`: what is fitted, solved, saved and refused, against dense float64 definitions by autograd."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kfade_kernels import low_rank
from models import PADDINGS, batch, hand_made, loss_positions, tiny
from oracles import Sizes, Truth, assert_close, autograd_truth, relative
from pages import run_examples
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kfade
from kfade import FactorTracker, FitConfig, InfluenceConfig, KFACConfig, StorageError, UnlearnConfig
from kfade.factors import OVERSAMPLING, SKETCH_SEED
from kfade.fit import fit_factors
from kfade.laplace import Laplace
from kfade.operators import CurvatureOperator
from kfade.optim import KFAC

# float64 through a small model: products of a few thousand terms.
EXACT = 1e-9
# Llama's sides are 16, 17, 24 and 25 wide, GPT-2's 16, 17, 64 and 65: thin on all, on some, on one.
RANK = 5
BATCHES = [batch("right"), batch("left", sequences=2, tokens=6, seed=1)]


def fitted(
    model: nn.Module, rank: int | None = RANK, batches: Sequence[Mapping[str, Tensor]] = BATCHES, **options: Any
) -> kfade.Curvature:
    return kfade.fit(model, batches, FitConfig(**{"fisher": "empirical", "rank": rank, **options}))


def completed(q: Tensor) -> Tensor:
    """A thin basis, and behind it any basis of the rest: the tail is the same in all of them."""
    return torch.cat([q, torch.linalg.svd(q, full_matrices=True).U[:, q.shape[1] :]], 1)


def places(q: Tensor) -> Tensor:
    """Of each direction its entry in a block."""
    return torch.arange(q.shape[0]).clamp(max=q.shape[1])


def whole(layer: kfade.LayerCurvature) -> tuple[Tensor, Tensor, Tensor]:
    """Square bases, and Λ as a whole matrix."""
    q_out, q_in = layer.output_eigenvectors(), layer.input_eigenvectors()
    return completed(q_out), completed(q_in), layer.eigenvalues()[places(q_out)][:, places(q_in)]


def dense(layer: kfade.LayerCurvature) -> Tensor:
    q_out, q_in, values = whole(layer)
    q = torch.kron(q_out, q_in)
    return q @ torch.diag(values.reshape(-1)) @ q.T


def by_definition(matrix: Tensor, rank: int) -> Tensor:
    """The low-rank approximation of a dense factor with its isotropic tail, by pseudo-inverse."""
    n = len(matrix)
    if n <= rank:
        return matrix
    omega = low_rank.random_basis(n, min(n, rank + OVERSAMPLING), SKETCH_SEED)
    y = matrix @ omega
    values, vectors = torch.linalg.eigh(y @ torch.linalg.pinv(omega.T @ y, hermitian=True, rtol=1e-13) @ y.T)
    values, vectors = values[-rank:], vectors[:, -rank:]
    tail = (matrix.trace() - values.sum()) / (n - rank)
    return (vectors * (values - tail)) @ vectors.T + tail * torch.eye(n, dtype=torch.float64)


def mean_over_tail(values: Tensor, layer: kfade.LayerCurvature) -> Tensor:
    """A matrix `[d_out, d_in (+ 1)]` in square bases as a block of means."""
    rows, columns = places(layer.output_eigenvectors()), places(layer.input_eigenvectors())
    sums, counts = (torch.zeros_like(layer.lambda_sum) for _ in "ab")
    index = (rows[:, None].expand_as(values), columns[None].expand_as(values))
    return sums.index_put_(index, values, accumulate=True) / counts.index_put_(
        index, torch.ones_like(values), accumulate=True
    )


def assert_is_truth(curvature: kfade.Curvature, truths: Mapping[str, Truth], losses: int, rank: int = RANK) -> None:
    """Bases, their eigenvalues, traces and Λ of every layer are those of the dense definitions."""
    for name, layer in curvature.items():
        truth = truths[name]
        assert (layer.positions, layer.losses) == (truth.positions, losses), name
        factors = (
            (truth.a_sum / truth.positions, layer.q_in, layer.lambda_in, "A"),
            (truth.s_sum / losses, layer.q_out, layer.lambda_out, "S"),
        )
        for matrix, q, values, what in factors:
            n = len(matrix)
            assert q.shape == (n, min(n, rank)) and len(values) == low_rank.entries(q), name
            assert_close(q.T @ q, torch.eye(q.shape[1]), 1e-12, f"basis of {what} of {name}")
            approximation = completed(q) @ torch.diag(values[places(q).clamp(max=len(values) - 1)]) @ completed(q).T
            # A shift of √n roundings, over the smallest eigenvalue that the sketch resolves.
            assert_close(approximation, by_definition(matrix, rank), 1e-6, f"{what} of {name}")
            assert float(approximation.trace()) == pytest.approx(float(matrix.trace()), rel=1e-12)
        if layer.lambda_sum is not None:
            q_out, q_in, _ = whole(layer)
            assert_close(layer.lambda_sum, mean_over_tail(truth.corrected(q_out, q_in), layer), EXACT, f"Λ of {name}")
            total = sum(float(g.square().sum()) for g in truth.gradients) / losses
            assert float((layer.eigenvalues() * layer.multiplicities()).sum()) == pytest.approx(total, rel=EXACT)
            assert layer.mean_eigenvalue() == pytest.approx(total / (layer.d_out * layer.width_in), rel=EXACT)


# ------------------------------------------------------------------------------------------------ the fit


@pytest.mark.parametrize("rank", [RANK, 16, 20])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_fit_is_the_dense_definition(family: str, padding: str, rank: int) -> None:
    """Shared inputs, biases, Conv1D; sides that are thin and sides that are whole in one layer."""
    model, data = tiny(family), [batch(padding), batch(padding, sequences=2, tokens=6, seed=1)]
    curvature = fitted(model, rank, data)
    assert_is_truth(curvature, autograd_truth(model, list(curvature), data), loss_positions(data), rank)
    assert any(layer.low_rank for layer in curvature.values())


@pytest.mark.parametrize("sharing", ["twice", "tied"])
def test_several_calls_are_one_layer(sharing: str) -> None:
    model = hand_made(sharing)
    curvature = fitted(model, modules="first|gate|up|down" + ("|second" if sharing == "tied" else ""))
    members = {name: [name] for name in curvature}
    members |= {"first": ["first", "second"]} if sharing == "tied" else {}
    assert_is_truth(curvature, autograd_truth(model, members, BATCHES), loss_positions(BATCHES))


def test_tied_embeddings_of_gpt2() -> None:
    """The head shares its weight with the embeddings and is left out; all else is fitted."""
    model = tiny("gpt2", tie_word_embeddings=True)
    curvature = fitted(model, modules="all-linear")
    assert_is_truth(curvature, autograd_truth(model, list(curvature), BATCHES), loss_positions(BATCHES))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    plain = fitted(hand_made("twice"), modules="first|gate|up|down")
    recomputed = fitted(hand_made("twice", reentrant), modules="first|gate|up|down")
    for name, layer in plain.items():
        for field in ("q_in", "lambda_in", "q_out", "lambda_out", "lambda_sum"):
            assert_close(getattr(recomputed[name], field), getattr(layer, field), 1e-7, f"{field} of {name}")


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_at_the_full_rank_nothing_is_another_way(curvature: str) -> None:
    """From the largest order on every bit is that of the whole fit."""
    model = tiny("llama")
    full, same = fitted(model, None, curvature=curvature), fitted(model, 25, curvature=curvature)
    for name, layer in full.items():
        assert not same[name].low_rank
        for field in ("q_in", "lambda_in", "q_out", "lambda_out", "lambda_sum"):
            assert getattr(layer, field) is None or torch.equal(getattr(same[name], field), getattr(layer, field))
        assert torch.equal(same[name].a_sum.data, layer.a_sum.data)


def test_nearer_the_whole_solve_with_the_rank() -> None:
    """One direction short of all the tail is a single direction, and only the rest of its row is averaged."""
    model, v = tiny("llama"), torch.randn(24, 17, dtype=torch.float64)
    full = next(iter(fitted(model, None).values())).solve(v, 1e-2)
    errors = [relative(next(iter(fitted(model, k).values())).solve(v, 1e-2), full) for k in (2, 12, 16, 24)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-10 < errors[-2], errors


def test_same_bits_twice_and_by_passes() -> None:
    first, second = fitted(tiny("llama")), fitted(tiny("llama"), layers_per_pass=2)
    for name, layer in first.items():
        for field in ("q_in", "lambda_in", "q_out", "lambda_out", "lambda_sum"):
            assert torch.equal(getattr(second[name], field), getattr(layer, field)), f"{field} of {name}"


def test_layers_that_share_an_input_share_its_basis() -> None:
    curvature = fitted(tiny("llama"))
    gate, up = (curvature[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up"))
    assert up.group == gate.name and up.q_in is gate.q_in and up.lambda_in is gate.lambda_in
    assert up.positions == gate.positions > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_models_have_wide_states(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    narrow, wide = fitted(model), fitted(tiny("llama", dtype).double())
    for name, layer in narrow.items():
        fields = [layer.q_in, layer.q_out, layer.lambda_in, layer.lambda_sum]
        assert all(x.dtype == torch.float32 and bool(torch.isfinite(x).all()) for x in fields)
        # A bfloat16 model rounds its activations and gradients to 2⁻⁹ again and again.
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        assert layer.mean_eigenvalue() == pytest.approx(wide[name].mean_eigenvalue(), rel=tolerance)


def test_under_autocast() -> None:
    curvature = fitted(tiny("llama", torch.float32), autocast="bfloat16")
    assert all(bool(torch.isfinite(layer.lambda_sum).all()) for layer in curvature.values())


@pytest.mark.parametrize("samples", [1, 2])
def test_sampled_fisher(samples: int) -> None:
    """Inputs are sketched once however many label samples there are."""
    model = tiny("llama")
    one, some = (fitted(model, rank, fisher="sampled", samples=samples) for rank in (RANK, None))
    for name, layer in one.items():
        assert (layer.positions, layer.losses) == (some[name].positions, some[name].losses)
        assert layer.mean_eigenvalue() == pytest.approx(some[name].mean_eigenvalue(), rel=EXACT)
        trace = float(layer.lambda_in[:-1].sum() + layer.lambda_in[-1] * (layer.width_in - RANK))
        assert trace == pytest.approx(float(some[name].lambda_in.sum()), rel=EXACT)


def test_nothing_square_is_made() -> None:
    """Neither in the state nor on the way. Orders of 24 and more; 16 is the width of everything in the model."""
    model, sizes = tiny("llama"), Sizes()
    data = [batch("right", sequences=3, tokens=9)]
    with sizes:
        curvature = fitted(model, batches=data)
        solved = curvature.solve({n: torch.randn(s.d_out, s.width_in).double() for n, s in curvature.items()})
    assert solved
    square = [shape for _, shapes in sizes.calls for shape in shapes if shape[-2:] in ((17, 17), (24, 24), (25, 25))]
    packed = [kfade_packed(n) for n in (17, 24, 25)]
    flat = [shape for _, shapes in sizes.calls for shape in shapes if len(shape) == 1 and shape[0] in packed]
    assert not square and not flat
    for layer in curvature.values():
        assert layer.a_sum is None and layer.s_sum is None and layer.a_sketch is None and layer.s_sketch is None
        assert layer.q_in.shape == (layer.width_in, RANK) and layer.q_out.shape == (layer.d_out, RANK)
        assert layer.lambda_sum.shape == (RANK + 1, RANK + 1)


def kfade_packed(n: int) -> int:
    from kfade_kernels.packed import packed_elements

    return packed_elements(n)


def test_a_bad_batch_is_named() -> None:
    class Spoilt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = hand_made()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            found = self.inner(input_ids, attention_mask)
            found.logits = found.logits * torch.where(input_ids == 50, torch.nan, 1.0).unsqueeze(-1)
            return found

    data = [batch("none"), batch("none", seed=1)]
    data[0]["input_ids"].clamp_(max=49)
    data[1]["input_ids"][0, 3] = 50
    with pytest.raises(kfade.NonFiniteError, match="batch 1"):
        fitted(Spoilt(), batches=data, modules="gate")


# ---------------------------------------------------------------------------------------------- the solve


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("rank", [RANK, 20])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_solve_and_product_are_those_of_the_dense_matrix(family: str, rank: int, curvature: str) -> None:
    model = tiny(family, **({"n_embd": 4} if family == "gpt2" else {}))
    fit = fitted(model, min(rank, 3) if family == "gpt2" else rank, curvature=curvature)
    layers = dict(list(fit.items())[:3])
    assert any(layer.low_rank for layer in layers.values())
    v, w = ({n: torch.randn(s.d_out, s.width_in).double() for n, s in layers.items()} for _ in "ab")
    solved = fit.solve(v, 0.1)
    for name, layer in layers.items():
        f = dense(layer)
        damped = f + 0.1 * f.trace() / len(f) * torch.eye(len(f), dtype=torch.float64)
        truth = torch.linalg.solve(damped, v[name].reshape(-1)).reshape(v[name].shape)
        parts = solved[name] if isinstance(solved[name], tuple) else (solved[name],)
        weight = truth[:, : layer.d_in]
        assert_close(parts[0], weight.T if layer.transposed else weight, 1e-10, name)
        if layer.has_bias:
            assert_close(parts[1], truth[:, -1], 1e-10, name)
        absolute = 0.1 * float(f.trace()) / len(f)
        assert layer.damping(0.1, "relative") == pytest.approx(absolute, rel=1e-10)
        both = torch.stack([v[name], w[name]])
        assert_close(layer.solve(both, absolute)[0], truth, 1e-10, name)
        product = float(v[name].reshape(-1) @ f @ w[name].reshape(-1))
        assert layer.product(v[name], w[name]) == pytest.approx(product, rel=1e-9, abs=1e-12)


def test_kfac_eigenvalues_are_outer_products() -> None:
    for layer in fitted(tiny("llama"), curvature="kfac").values():
        assert layer.lambda_sum is None
        assert torch.equal(layer.eigenvalues(), torch.outer(layer.lambda_out, layer.lambda_in))


def test_factors_that_are_not_kept_are_asked_for() -> None:
    layer = next(iter(fitted(tiny("llama")).values()))
    with pytest.raises(ValueError, match="has no input factor: it was fitted with a rank"):
        layer.input_factor()


# ------------------------------------------------------------------------------------------- what uses it


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("rank", [3, 18])
def test_operators(curvature: str, rank: int) -> None:
    fit = fitted(hand_made(bias=False), rank, modules="first|gate|down", curvature=curvature)
    assert any(layer.low_rank for layer in fit.values())
    matrix = torch.block_diag(*(dense(layer) for layer in fit.values()))
    matrix += 0.02 * torch.eye(len(matrix), dtype=torch.float64)
    x = torch.randn(len(matrix), 2, dtype=torch.float64)
    operator = CurvatureOperator(fit, damping=0.02, kind="absolute")
    values, vectors = torch.linalg.eigh(matrix)
    for given, truth in (
        (operator, matrix), (operator.inverse(), matrix.inverse()),
        (operator.inverse_sqrt(), (vectors * values**-0.5) @ vectors.T),
    ):  # fmt: skip
        assert_close(given @ x, truth @ x, EXACT)
        assert given.trace() == pytest.approx(float(truth.trace()), rel=EXACT)
        assert given.frobenius_norm() == pytest.approx(float(torch.linalg.norm(truth)), rel=EXACT)
    assert operator.logdet() == pytest.approx(float(values.log().sum()), rel=EXACT)


@pytest.mark.parametrize("query_rank", [None, 2])
def test_influence(query_rank: int | None) -> None:
    model, asked = hand_made(), [batch("left", sequences=2, seed=5)]
    fit = fitted(model, 3, modules="first|gate|up|down")
    found = kfade.influence(model, fit, asked, BATCHES, InfluenceConfig(query_rank=query_rank)).scores
    truths = [autograd_truth(model, list(fit), data) for data in (asked, BATCHES)]
    scores = torch.zeros_like(found)
    for name, layer in fit.items():
        f = dense(layer)
        f += 0.1 * f.trace() / len(f) * torch.eye(len(f), dtype=torch.float64)
        rows = torch.stack([g.reshape(-1) for g in truths[1][name].gradients])
        for q, gradient in enumerate(truths[0][name].gradients):
            solved = torch.linalg.solve(f, gradient.reshape(-1)).reshape(gradient.shape)
            if query_rank is not None:
                u, s, vt = torch.linalg.svd(solved, full_matrices=False)
                solved = (u[:, :query_rank] * s[:query_rank]) @ vt[:query_rank]
            scores[q] += rows @ solved.reshape(-1)
    # The rank-k solution comes from an iteration, the whole one from products.
    assert_close(found, scores, 1e-9 if query_rank is None else 1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_unlearn(steps: int) -> None:
    """A refit, steps with conjugate gradients on top, and a fit given beforehand."""
    model, forget, retain = hand_made(), [batch("left", seed=3)], [batch("right", seed=s) for s in (4, 5)]
    config = UnlearnConfig.published(
        fit=FitConfig(rank=3, modules="gate|up|down"), steps=steps, kl_budget=0.01,
        refit_every=2 if steps > 1 else 0, cg_iterations=2 if steps > 1 else 0,
    )  # fmt: skip
    update = kfade.unlearn(model, forget, retain, config)
    outcome = update.report.outcome
    assert outcome is not None and 0 < outcome.measured_kl <= 0.01
    assert outcome.forget_nll > update.report.forget_nll
    assert update.report.config["fit"]["rank"] == 3


def test_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny("llama"), FitConfig(curvature="kfac", rank=4)
    fit = fitted(model, 4, curvature="kfac")
    for name in ("identity", "diagonal"):
        with pytest.raises(ValueError, match=f"rank is 4; {name} has no factors: it must be None"):
            FitConfig(curvature=name, rank=4)
    for value, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError), ("auto", TypeError)):
        with pytest.raises(error, match=f"rank is {value!r}"):
            FitConfig(rank=value)
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("began"))
    with pytest.raises(ValueError, match="curvature was fitted with rank 4"):
        Laplace(model, fit)
    with pytest.raises(ValueError, match=r"config.rank is 4; it must be None"):
        FactorTracker(model, config)
    with pytest.raises(ValueError, match=r"config.rank is 4; it must be None"):
        KFAC(model, KFACConfig(fit=config))
    with pytest.raises(ValueError, match=r"config.rank is 4; whole factors are asked for"):
        fit_factors(model, BATCHES, config, kfade.Progress())


def test_curvlinops_is_refused() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    from kfade.integrations import curvlinops as ours

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(ours, "_check_operator", lambda _: None)
        with pytest.raises(ValueError, match="curvature was fitted with rank 4; it must be fitted with rank None"):
            ours.set_factors_(curvlinops, fitted(tiny("llama"), 4, curvature="kfac"), tiny("llama"))


# ---------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("rank", [RANK, 16, 20])
def test_saved_and_loaded(tmp_path: Path, rank: int, curvature: str) -> None:
    model = tiny("llama")
    fit = fitted(model, rank, curvature=curvature)
    fit.save(tmp_path)
    loaded = kfade.Curvature.load(tmp_path, model)
    assert loaded.config == fit.config and loaded.config.rank == rank
    for name, layer in fit.items():
        for field in ("q_in", "lambda_in", "q_out", "lambda_out", "lambda_sum"):
            one, other = getattr(layer, field), getattr(loaded[name], field)
            assert (one is None) == (other is None) and (one is None or torch.equal(one, other)), f"{field} of {name}"
        assert (loaded[name].a_sum is None) == (layer.a_sum is None) == (layer.width_in > rank)
        v = torch.randn(layer.d_out, layer.width_in).double()
        assert torch.equal(layer.solve(v, 0.1), loaded[name].solve(v, 0.1))
    up, gate = (loaded[f"model.layers.0.mlp.{n}_proj"] for n in ("up", "gate"))
    assert up.q_in is gate.q_in


def test_a_file_of_another_rank_is_refused(tmp_path: Path) -> None:
    fitted(tiny("llama")).save(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["config"]["rank"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(StorageError, match=r"of shape \[[^\]]*[56]\]; .* takes \[[^\]]*[78]\]"):
        kfade.Curvature.load(tmp_path)
    content["config"]["rank"] = "many"
    path.write_text(json.dumps(content))
    with pytest.raises(StorageError, match="rank is 'many'"):
        kfade.Curvature.load(tmp_path)


def test_a_missing_basis_is_refused(tmp_path: Path) -> None:
    from kfade.storage import sha256

    fitted(tiny("llama")).save(tmp_path)
    file = sorted(tmp_path.glob("*.decomposition.safetensors"))[0]
    save_file({k: v for k, v in load_file(file).items() if k != "q_out"}, file)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][file.name]["sha256"] = sha256(file)
    path.write_text(json.dumps(content))
    with pytest.raises(StorageError, match=r"q_out of .* is missing"):
        kfade.Curvature.load(tmp_path)


def test_examples_run() -> None:
    run_examples("low-rank.md")

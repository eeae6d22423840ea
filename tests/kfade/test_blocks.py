"""Fits with block-diagonal factors: against autograd and dense matrices in float64, and all that uses such a fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kfade_kernels import PackedSymmetric
from kfade_kernels.blocks import BlockBasis, PackedBlocks, slices, split
from manifests import manifest, rewrite
from models import batch, hand_made, loss_positions, tiny
from oracles import Sizes, Truth, assert_close, autograd_truth
from pages import run_examples
from torch import Tensor, nn

import kfade
import kfade.decomposition
import kfade.resume
from kfade import CurvatureOperator, FactorTracker, FitConfig, Laplace, StorageError, UnlearnConfig
from kfade.capture import Pair
from kfade.correction import CorrectionCollector
from kfade.decomposition import ALONE, decompose_states
from kfade.distributed import owners_of
from kfade.layer_curvature import new_states
from kfade.layers import select
from kfade.loss import Head, check_batch
from kfade.optim import KFAC

# Float64 against float64: sums of a few hundred terms in another order.
EXACT = 1e-10
# Of orders 16 (and 17), 24 (and 25): blocks of unequal order, two and three and four of them.
LIMIT = 7
BATCHES = [batch("right"), batch("left", sequences=2, tokens=6, seed=1)]


def fitted(
    model: nn.Module, limit: int | None = LIMIT, batches: Sequence[Mapping[str, Tensor]] = BATCHES, **options: Any
) -> kfade.Curvature:
    return kfade.fit(model, batches, FitConfig(**{"fisher": "empirical", "max_factor_order": limit, **options}))


def without_rest(dense: Tensor, limit: int) -> Tensor:
    """A dense factor with zeros between blocks."""
    same = torch.cat([torch.full((m,), i) for i, m in enumerate(split(len(dense), limit))])
    return dense * (same[:, None] == same)


def matrix(layer: kfade.LayerCurvature) -> Tensor:
    """F of a layer written out, by its public pieces."""
    q = torch.kron(layer.output_eigenvectors(), layer.input_eigenvectors())
    return q @ torch.diag(layer.eigenvalues().reshape(-1)) @ q.T


def raw(value: Any) -> Any:
    return value.data if isinstance(value, (PackedSymmetric, PackedBlocks, BlockBasis)) else value


def require_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Every field of every state, bit for bit."""
    assert list(found) == list(expected)
    for name, state in expected.items():
        for field in fields(state):
            ours, theirs = (getattr(x, field.name) for x in (found[name], state))
            assert type(ours) is type(theirs), (name, field.name)
            ours, theirs = raw(ours), raw(theirs)
            assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs, (name, field.name)


def assert_is_truth(curvature: kfade.Curvature, truths: Mapping[str, Truth], losses: int, limit: int = LIMIT) -> None:
    for name, layer in curvature.items():
        truth = truths[name]
        assert (layer.positions, layer.losses) == (truth.positions, losses), name
        sides = (
            (truth.a_sum / truth.positions, layer.input_factor(), layer.input_eigenvectors(), layer.lambda_in),
            (truth.s_sum / losses, layer.output_factor(), layer.output_eigenvectors(), layer.lambda_out),
        )
        for dense, factor, q, values in sides:
            kept = without_rest(dense, limit)
            assert_close(factor, kept, EXACT, name)
            assert_close(q @ torch.diag(values) @ q.T, kept, EXACT, name)
            assert_close(q.T @ q, torch.eye(len(q)), 1e-12, name)
            assert torch.equal(q, without_rest(q, limit)), "eigenvectors do not mix blocks"
            assert all(bool((values[s].diff() >= 0).all()) for s in slices(split(len(q), limit))) and values.min() >= 0
        if layer.lambda_sum is not None:
            corrected = truth.corrected(layer.output_eigenvectors(), layer.input_eigenvectors())
            assert_close(layer.lambda_sum, corrected, EXACT, f"Λ of {name}")


# ------------------------------------------------------------------------------------------------ the fit


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("limit", [LIMIT, 16])
def test_factors_and_eigenvalues(family: str, padding: str, limit: int) -> None:
    """At 16 some sides are whole and some not; the long sequences are longer than any side is wide."""
    batches = [batch(padding), batch(padding, sequences=2, tokens=30, seed=1)]
    model = tiny(family)
    curvature = fitted(model, limit, batches, modules="all-linear")
    truths = autograd_truth(model, list(curvature), batches)
    assert_is_truth(curvature, truths, loss_positions(batches), limit)
    kinds = {type(q) for layer in curvature.values() for q in (layer.q_in, layer.q_out)}
    assert BlockBasis in kinds and (limit == LIMIT or Tensor in kinds)


@pytest.mark.parametrize("sharing", ["twice", "tied"])
def test_layers_that_are_called_twice(sharing: str) -> None:
    model = hand_made(sharing)
    names = {"twice": {"first": ["first"]}, "tied": {"first": ["first", "second"]}}[sharing]
    curvature = fitted(model, 5, modules="first" if sharing == "twice" else "first|second")
    assert_is_truth(curvature, autograd_truth(model, names, BATCHES), loss_positions(BATCHES), 5)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_block_is_the_whole_fit_to_the_bit(family: str, curvature: str) -> None:
    model = tiny(family, torch.float32)
    order = max(layer.width_in for layer in fitted(model, None).values())
    same, plain = fitted(model, max(order, 64), curvature=curvature), fitted(model, None, curvature=curvature)
    assert not any(layer.in_blocks for layer in same.values())
    limits = {name: replace(layer, max_factor_order=None) for name, layer in same.items()}
    require_same(limits, plain)
    v = {name: torch.randn(x.d_out, x.width_in) for name, x in plain.items()}
    ours, theirs = (fit.solve_matrices(v, 0.1, "relative") for fit in (same, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in v)


def test_same_bits_twice_and_by_passes() -> None:
    model = tiny("llama", torch.float32)
    plain = fitted(model)
    require_same(fitted(model), plain)
    require_same(fitted(model, layers_per_pass=2), plain)


def test_layers_that_share_an_input_share_its_blocks() -> None:
    curvature = fitted(tiny("llama"))
    gate, up = (curvature[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up"))
    assert up.group == gate.name and up.q_in is gate.q_in and up.a_sum is gate.a_sum and up.lambda_in is gate.lambda_in


def test_sampled_labels_and_one_pass() -> None:
    model = tiny("llama")
    curvature = fitted(model, fisher="sampled", samples=2)
    assert all(layer.losses == 2 * loss_positions(BATCHES) for layer in curvature.values())
    whole = fitted(model, None, fisher="sampled", samples=2)
    for name, layer in curvature.items():
        assert_close(layer.input_factor(), without_rest(whole[name].input_factor(), LIMIT), EXACT)
        # The trace of F does not depend on the basis.
        assert layer.mean_eigenvalue() == pytest.approx(whole[name].mean_eigenvalue(), rel=EXACT)
    once = fitted(model, basis_share=0.5)
    assert all(layer.lambda_losses == loss_positions(BATCHES[:1]) for layer in once.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_models_have_wide_states(autocast: bool) -> None:
    """By bfloat16 pairs of each block; a wrong block would be off by all."""
    model = tiny("llama", torch.float32 if autocast else torch.bfloat16)
    narrow = fitted(model, autocast="bfloat16" if autocast else "off")
    for layer in narrow.values():
        tensors = [raw(layer.a_sum), raw(layer.q_in), raw(layer.q_out), layer.lambda_in, layer.lambda_sum]
        assert all(x.dtype == torch.float32 and bool(torch.isfinite(x).all()) for x in tensors)
    wide = fitted(tiny("llama", torch.bfloat16 if not autocast else torch.float32).double())
    for name, layer in narrow.items():
        # A bfloat16 model rounds its activations and gradients to 2⁻⁹ again and again.
        assert layer.mean_eigenvalue() == pytest.approx(wide[name].mean_eigenvalue(), rel=0.1)


@pytest.mark.parametrize("ones", [False, True])
def test_eigenvalues_in_bfloat16_are_those_of_pairs(ones: bool) -> None:
    """The same tokens and bases in bfloat16 and in float64: what is left is the rounding of rotated tokens."""
    model = tiny("llama", torch.bfloat16, mlp_bias=ones)
    layer = replace(select(model, "up_proj")[0], group="model.layers.0.mlp.up_proj")
    (wide,) = list(fitted(tiny("llama", mlp_bias=ones), modules="layers.0.mlp.up_proj").values())
    rows = check_batch(batch("none"), 0, torch.device("cpu"))
    g, a = torch.randn(4, 9, 24).bfloat16(), torch.randn(4, 9, 16).bfloat16()
    found = []
    for dtype, state in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        q_in, q_out = (BlockBasis(q.data.to(state), q.orders) for q in (wide.q_in, wide.q_out))
        one = replace(wide, q_in=q_in, q_out=q_out, lambda_sum=None)
        collector = CorrectionCollector({layer.name: one}, [layer], state, torch.device("cpu"))
        collector(layer, [Pair(layer, a.to(dtype), g.to(dtype), dtype)], rows)
        found.append(one.lambda_sum)
    # Tokens are rotated by pairs and then rounded to 2⁻⁹; so are the entries that they are multiplied to.
    assert_close(found[0], found[1], 2**-6)


def test_nothing_of_the_square_of_a_cut_side_is_made() -> None:
    model, sizes = tiny("llama", intermediate_size=40), Sizes()
    data = [batch("right", sequences=3, tokens=9)]
    with sizes:
        curvature = fitted(model, 20, data, modules="mlp")
        assert curvature.solve({n: torch.randn(s.d_out, s.width_in).double() for n, s in curvature.items()})
    square = [shape for _, shapes in sizes.calls for shape in shapes if shape[-2:] in ((40, 40), (41, 41))]
    flat = [shape for _, shapes in sizes.calls for shape in shapes if len(shape) == 1 and shape[0] in (40**2, 41**2)]
    assert not square and not flat


def test_where_factors_really_are_in_blocks_nothing_is_lost() -> None:
    """Inputs and gradients of which at each token only one block is not zero: the dense factors are block-diagonal."""
    torch.manual_seed(3)
    (name, state), limit = next(iter(new_states(select(hand_made(bias=False), "down"), 40).items())), 4
    g, a = torch.zeros(2, 20, 12).double(), torch.zeros(2, 20, 20).double()
    for t in range(40):
        rows, columns = slices(split(12, limit))[t % 3], slices(split(20, limit))[t % 5]
        g[t // 20, t % 20, rows], a[t // 20, t % 20, columns] = torch.randn(4).double(), torch.randn(4).double()
    found = []
    for at_most in (limit, None):
        one = replace(state, max_factor_order=at_most, positions=40)
        for field, x in (("a_sum", a), ("s_sum", g)):
            dense = x.flatten(0, 1).T @ x.flatten(0, 1)
            orders = split(len(dense), at_most)
            blocks = [PackedSymmetric.from_dense(dense[s, s]).data for s in slices(orders)]
            setattr(one, field, PackedBlocks.from_packed(torch.cat(blocks), orders) if at_most else
                    PackedSymmetric.from_packed(blocks[0], *orders))  # fmt: skip
        decompose_states({name: one})
        found.append(one)
    ours, theirs = found
    assert ours.in_blocks and not theirs.in_blocks
    assert_close(matrix(ours), matrix(theirs), EXACT)
    v = torch.randn(12, 20).double()
    assert_close(ours.solve(v, 0.01), theirs.solve(v, 0.01), EXACT)
    assert ours.product(v, v) == pytest.approx(theirs.product(v, v), rel=EXACT)


# ---------------------------------------------------------------------------------------------- the solve


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("limit", [LIMIT, 16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_solve_and_product_are_those_of_the_dense_matrix(family: str, limit: int, curvature: str) -> None:
    model = tiny(family, **({"n_embd": 8} if family == "gpt2" else {}))
    fit = fitted(model, min(limit, 5) if family == "gpt2" else limit, curvature=curvature)
    layers = dict(list(fit.items())[:3])
    assert any(layer.in_blocks for layer in layers.values())
    v, w = ({n: torch.randn(s.d_out, s.width_in).double() for n, s in layers.items()} for _ in "ab")
    solved = fit.solve(v, 0.1)
    for name, layer in layers.items():
        f = matrix(layer)
        if curvature == "kfac":
            assert_close(f, torch.kron(layer.output_factor(), layer.input_factor()), EXACT, name)
        absolute = 0.1 * float(f.trace()) / len(f)
        damped = f + absolute * torch.eye(len(f), dtype=torch.float64)
        truth = torch.linalg.solve(damped, v[name].reshape(-1)).reshape(v[name].shape)
        assert_close(layer.join(solved[name]), truth, 1e-10, name)
        assert layer.damping(0.1, "relative") == pytest.approx(absolute, rel=1e-10)
        both = torch.stack([v[name], w[name]])
        assert_close(layer.solve(both, absolute)[0], truth, 1e-10, name)
        product = float(v[name].reshape(-1) @ f @ w[name].reshape(-1))
        assert layer.product(v[name], w[name]) == pytest.approx(product, rel=1e-9, abs=1e-12)


def test_without_eigenvectors() -> None:
    """`(S + √λ/π I)⁻¹ V (A + π√λ I)⁻¹` of the block-diagonal factors, with the one π of the layer."""
    fit = fitted(tiny("llama"), curvature="kfac", decomposition="cholesky")
    other = fitted(tiny("llama"), curvature="kfac")
    for name, layer in fit.items():
        assert layer.factors_alone and layer.in_blocks
        v, damping = torch.randn(layer.d_out, layer.width_in).double(), layer.damping(0.1, "relative")
        s, a = layer.output_factor(), layer.input_factor()
        pi = ((a.trace() / len(a)) / (s.trace() / len(s))).sqrt()
        shifts = damping**0.5 / pi, damping**0.5 * pi
        left, right = (
            torch.linalg.inv(m + x * torch.eye(len(m)).double()) for m, x in zip((s, a), shifts, strict=True)
        )
        assert_close(layer.solve(v, damping), left @ v @ right, EXACT)
        assert layer.product(v, v) == pytest.approx(other[name].product(v, v), rel=EXACT)


# ------------------------------------------------------------------------------------------- what uses it


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_operators(curvature: str) -> None:
    fit = fitted(hand_made(bias=False), 5, modules="first|gate|down", curvature=curvature)
    dense = torch.block_diag(*(matrix(layer) for layer in fit.values()))
    dense += 0.02 * torch.eye(len(dense), dtype=torch.float64)
    x = torch.randn(len(dense), 2, dtype=torch.float64)
    operator = CurvatureOperator(fit, damping=0.02, kind="absolute")
    values, vectors = torch.linalg.eigh(dense)
    for given, truth in (
        (operator, dense), (operator.inverse(), dense.inverse()),
        (operator.inverse_sqrt(), (vectors * values**-0.5) @ vectors.T),
    ):  # fmt: skip
        assert_close(given @ x, truth @ x, EXACT)
        assert given.trace() == pytest.approx(float(truth.trace()), rel=EXACT)
    assert operator.logdet() == pytest.approx(float(values.log().sum()), rel=EXACT)


@pytest.mark.parametrize("query_rank", [None, 2])
def test_influence(query_rank: int | None) -> None:
    model, asked = hand_made(), [batch("left", sequences=2, seed=5)]
    fit = fitted(model, 5, modules="first|gate|up|down")
    found = kfade.influence(model, fit, asked, BATCHES, kfade.InfluenceConfig(query_rank=query_rank)).scores
    truths = [autograd_truth(model, list(fit), data) for data in (asked, BATCHES)]
    scores = torch.zeros_like(found)
    for name, layer in fit.items():
        f = matrix(layer)
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
    """A refit, and steps with conjugate gradients on top."""
    model, forget, retain = hand_made(), [batch("left", seed=3)], [batch("right", seed=s) for s in (4, 5)]
    config = UnlearnConfig.published(
        fit=FitConfig(max_factor_order=5, modules="gate|up|down"), steps=steps, kl_budget=0.01,
        refit_every=2 if steps > 1 else 0, cg_iterations=2 if steps > 1 else 0,
    )  # fmt: skip
    update = kfade.unlearn(model, forget, retain, config)
    outcome = update.report.outcome
    assert outcome is not None and 0 < outcome.measured_kl <= 0.01
    assert outcome.forget_nll > update.report.forget_nll
    assert update.report.config["fit"]["max_factor_order"] == 5


def test_a_basis_that_is_given() -> None:
    model = tiny("llama")
    first = fitted(model)
    again = fitted(model, basis_share=None, batches=BATCHES[:1])
    given = kfade.fit(model, BATCHES[:1], FitConfig(fisher="empirical", max_factor_order=LIMIT), basis=first)
    truths = autograd_truth(model, list(given), BATCHES[:1])
    for name, layer in given.items():
        assert torch.equal(layer.q_in.data, first[name].q_in.data) and layer.lambda_losses == again[name].losses
        q_out, q_in = first[name].output_eigenvectors(), first[name].input_eigenvectors()
        assert_close(layer.lambda_sum, truths[name].corrected(q_out, q_in), EXACT)
    for limit in (None, 8):
        with pytest.raises(ValueError, match=f"max_factor_order 7, and config has {limit}, which cuts its factors"):
            kfade.fit(model, BATCHES, FitConfig(max_factor_order=limit), basis=first)


def test_owners_weigh_blocks() -> None:
    """One factor of order 40 in four blocks costs as much as four of order 10."""
    layers = select(hand_made(), "gate|up|down")
    whole, cut = (owners_of(layers, 2, FitConfig(max_factor_order=limit)) for limit in (None, 10))
    assert whole.outputs.keys() == cut.outputs.keys()
    for owners, limit in ((whole, None), (cut, 10)):
        loads = [0, 0]
        for layer in layers:
            loads[owners.outputs[layer.name]] += sum(m**3 for m in split(layer.d_out, limit))
            loads[owners.inputs[layer.name]] += sum(m**3 for m in split(layer.width_in, limit))
        largest = max(sum(m**3 for m in split(x.width_in, limit)) for x in layers)
        assert max(loads) - min(loads) <= largest


def test_only_blocks_beyond_memory_are_decomposed_alone() -> None:
    cost = kfade.decomposition._cost
    meta = [PackedBlocks(split(2 * ALONE, limit), device="meta") for limit in (ALONE, ALONE // 2)]
    # A tensor of shapes alone is no CPU's; only the orders are looked at here.
    assert [cost(total, None, total.device)[0] for total in meta] == [2 * ALONE**3, 4 * (ALONE // 2) ** 3]


def test_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny("llama"), FitConfig(curvature="kfac", max_factor_order=LIMIT)
    fit = fitted(model, curvature="kfac")
    for name in ("identity", "diagonal"):
        with pytest.raises(ValueError, match=f"max_factor_order is 4; {name} has no factors: it must be None"):
            FitConfig(curvature=name, max_factor_order=4)
    with pytest.raises(ValueError, match="rank is 3 and max_factor_order is 4; at most one must be given"):
        FitConfig(rank=3, max_factor_order=4)
    for value, error in ((1, ValueError), (0, ValueError), (2.5, TypeError), (True, TypeError), ("all", TypeError)):
        with pytest.raises(error, match=f"max_factor_order is {value!r}"):
            FitConfig(max_factor_order=value)
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("began"))
    with pytest.raises(ValueError, match="curvature was fitted with max_factor_order 7"):
        Laplace(model, fit)
    for use in (lambda: FactorTracker(model, config), lambda: KFAC(model, kfade.KFACConfig(fit=config))):
        with pytest.raises(ValueError, match=r"config.max_factor_order is 7; it must be None: running factors"):
            use()


def test_curvlinops_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    from kfade.integrations import curvlinops as ours

    monkeypatch.setattr(ours, "_check_operator", lambda _: None)
    with pytest.raises(ValueError, match="curvature was fitted with max_factor_order 7; it must be fitted with"):
        ours.set_factors_(curvlinops, fitted(tiny("llama"), curvature="kfac"), tiny("llama"))


def test_kronfluence_gets_dense_factors(tmp_path: Path) -> None:
    pytest.importorskip("kronfluence")
    from kfade.integrations.kronfluence_files import export_factors, import_factors

    model = tiny("llama")
    fit = fitted(model)
    export_factors(fit, tmp_path, sequences=6)
    back = import_factors(tmp_path, model, losses=loss_positions(BATCHES))
    for name, layer in fit.items():
        assert torch.equal(back[name].q_in, layer.input_eigenvectors()) and not back[name].in_blocks
        v = torch.randn(layer.d_out, layer.width_in).double()
        assert_close(back[name].solve(v, 0.1), layer.solve(v, 0.1), EXACT, name)


# ---------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("decomposition", ["eigh", "cholesky"])
@pytest.mark.parametrize("limit", [LIMIT, 16])
def test_saved_and_loaded(tmp_path: Path, limit: int, curvature: str, decomposition: str) -> None:
    if (curvature, decomposition) == ("ekfac", "cholesky"):
        return
    model = tiny("llama", torch.float32)
    fit = fitted(model, limit, curvature=curvature, decomposition=decomposition)
    fit.save(tmp_path)
    loaded = kfade.Curvature.load(tmp_path, model)
    assert loaded.config == fit.config and loaded.config.max_factor_order == limit
    require_same(loaded, fit)
    v = {name: torch.randn(x.d_out, x.width_in) for name, x in fit.items()}
    ours, theirs = (x.solve_matrices(v, 0.1, "relative") for x in (loaded, fit))
    # A block begins anywhere in a file, and products round by where in memory they begin.
    assert all(torch.allclose(ours[n], theirs[n], rtol=1e-4, atol=1e-5 * float(theirs[n].abs().max())) for n in v)
    gate, up = (loaded[f"model.layers.0.mlp.{n}_proj"] for n in ("gate", "up"))
    assert up.q_in is gate.q_in and up.a_sum is gate.a_sum


def test_the_format_says_so(tmp_path: Path) -> None:
    """What knows no blocks refuses version 2; whole factors are still version 1, and version 1 is still read."""
    model = tiny("llama", torch.float32)
    for name, limit in (("blocks", LIMIT), ("whole", None)):
        fitted(model, limit).save(tmp_path / name)
    assert [manifest(tmp_path / name)["version"] for name in ("blocks", "whole")] == [2, 1]

    def older(content: dict[str, Any]) -> None:
        content["config"].pop("max_factor_order")
        for counts in content["layers"].values():
            counts.pop("max_factor_order")

    rewrite(tmp_path / "whole", older)
    assert kfade.Curvature.load(tmp_path / "whole").config.max_factor_order is None


def test_files_of_another_layout_are_refused(tmp_path: Path) -> None:
    fitted(tiny("llama")).save(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    for counts in content["layers"].values():
        counts["max_factor_order"] = 9
    path.write_text(json.dumps(content))
    with pytest.raises(StorageError, match=r"has [a-z_]+ of shape \[\d+\]; .* takes \[\d+\]"):
        kfade.Curvature.load(tmp_path)


class Cut(Exception):
    """Ends a fit from within."""


@pytest.mark.parametrize("options", [
    {}, {"layers_per_pass": 2, "samples": 2, "fisher": "sampled"}, {"curvature": "kfac"}, {"basis_share": 0.5},
    {"curvature": "kfac", "decomposition": "cholesky"},
], ids=str)  # fmt: skip
def test_a_fit_that_is_cut_off_anywhere_goes_on(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after every batch and every factor in turn."""
    monkeypatch.setattr(kfade.resume, "CHECKPOINT_SHARE", 1e9)
    model, data = tiny("llama", torch.float32), [batch("right", seed=i) for i in range(4)]
    settings = {"checkpoint_seconds": 0, **options}
    plain = fitted(model, LIMIT, data, **settings)
    config = FitConfig(**{"fisher": "empirical", "max_factor_order": LIMIT, **settings})
    done: list[str] = []

    def cutting(function: Any, every: int) -> Any:
        def call(*arguments: Any) -> Any:
            done.append(function.__name__)
            if len(done) % every == 0:
                raise Cut
            return function(*arguments)

        return call

    monkeypatch.setattr(Head, "rows", cutting(Head.rows, 3))
    monkeypatch.setattr(kfade.decomposition, "decompose_blocks", cutting(kfade.decomposition.decompose_blocks, 3))
    cuts = 0
    while True:
        try:
            found = kfade.fit(tiny("llama", torch.float32), data, config, store=tmp_path / "s")
            break
        except Cut:
            cuts += 1
    require_same(found, plain)
    require_same(kfade.Curvature.load(tmp_path / "s", model), plain)
    assert cuts >= 3 and manifest(tmp_path / "s")["version"] == 2


def test_another_limit_is_another_fit(tmp_path: Path) -> None:
    model = tiny("llama", torch.float32)
    kfade.fit(model, BATCHES, FitConfig(max_factor_order=8), store=tmp_path / "s")
    for limit in (None, 9):
        with pytest.raises(StorageError, match=f"max_factor_order is {limit} and was 8"):
            kfade.fit(model, BATCHES, FitConfig(max_factor_order=limit), store=tmp_path / "s")


def test_examples_run() -> None:
    run_examples("blocks.md")

"""Fits that go through the data once: the basis from a share of it, or from an earlier fit, and Λ from the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, hand_made, loss_positions, sampled_labels, tiny
from oracles import assert_close, autograd_truth, relative
from pages import run_examples
from torch import Tensor
from transformers import LlamaConfig

import kfade
from kfade import Curvature, FitConfig
from kfade.loss import Head
from kfade.plan import Plan, plan
from kfade.rates import UNTIMED

BATCHES = [batch(padding, seed=seed) for seed, padding in enumerate(("right", "none", "left", "right", "none"))]
# Batch i gives the basis where the whole part of 0.4·i goes up: the third and the last of five.
FIRST, SECOND = [BATCHES[2], BATCHES[4]], [BATCHES[0], BATCHES[1], BATCHES[3]]
EXACT = 1e-9


def fitted(model: Any, batches: Any = BATCHES, basis: Curvature | None = None, **options: Any) -> Curvature:
    return kfade.fit(model, batches, FitConfig(**options), basis=basis)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("samples", [1, 2])
def test_each_part_of_the_data_gives_its_own_sums(kind: str, samples: int) -> None:
    model = tiny(kind)
    curvature = fitted(model, basis_share=0.4, samples=samples, modules="all-linear")
    first, second = (
        [autograd_truth(model, list(curvature), part, sampled_labels(model, part, 0, i)) for i in range(samples)]
        for part in (FIRST, SECOND)
    )
    total = samples * loss_positions(SECOND)
    for name, layer in curvature.items():
        assert (layer.losses, layer.lambda_losses) == (samples * loss_positions(FIRST), total)
        assert layer.positions == first[0][name].positions
        assert_close(layer.a_sum.to_dense(), first[0][name].a_sum, EXACT)
        assert_close(layer.s_sum.to_dense(), sum(t[name].s_sum for t in first), EXACT)
        values = sum(t[name].corrected(layer.q_out, layer.q_in) for t in second) / total
        assert_close(layer.eigenvalues(), values, EXACT)
        assert layer.mean_eigenvalue() == pytest.approx(float(values.mean()), rel=1e-12)
        v = torch.randn(layer.d_out, layer.width_in, dtype=torch.float64)
        rotated = layer.q_out.T @ v @ layer.q_in / (values + 0.3)
        assert_close(layer.solve(v, 0.3), layer.q_out @ rotated @ layer.q_in.T, EXACT)


def test_every_batch_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, seen = Head.rows, []

    def watched(self: Head, one: Any) -> Tensor:
        seen.append(one.index)
        return rows(self, one)

    model = tiny("llama", torch.float32)
    monkeypatch.setattr(Head, "rows", watched)
    fitted(model, basis_share=0.4)
    # The first of all is for the groups of layers that share an input.
    assert seen == [0, 2, 4, 0, 1, 3]


def test_the_basis_of_an_earlier_fit_is_taken_as_it_is() -> None:
    model = tiny("llama", torch.float32)
    one = fitted(model, basis_share=0.4)
    apart = fitted(model, SECOND, fitted(model, FIRST, curvature="kfac"))
    for name, state in one.items():
        for field in ("q_in", "q_out", "lambda_in", "lambda_out", "lambda_sum"):
            assert torch.equal(getattr(apart[name], field), getattr(state, field)), (name, field)
        assert torch.equal(apart[name].a_sum.to_dense(), state.a_sum.to_dense())
        assert (apart[name].positions, apart[name].losses) == (state.positions, state.losses)
        assert apart[name].lambda_losses == state.lambda_losses
    # On the data of the earlier fit it gives the earlier fit.
    whole = fitted(model)
    again = fitted(model, BATCHES, whole)
    for name, state in whole.items():
        assert torch.equal(again[name].eigenvalues(), state.eigenvalues())


def test_the_solve_comes_near_that_of_two_passes() -> None:
    """With the basis of 4 of 12 batches it is less than half as far off as in the parameters' own basis."""
    model, many = tiny("llama"), [batch("none", sequences=8, seed=seed) for seed in range(12)]
    whole = fitted(model, many)
    truths = autograd_truth(model, list(whole), BATCHES[:1])
    errors = {}
    for name, options in (("share", {"basis_share": 1 / 3}), ("diagonal", {"curvature": "diagonal"})):
        other = fitted(model, many, **options)
        solved = []
        for n, layer in whole.items():
            v = truths[n].gradients[0]
            damping = layer.damping(0.1, "relative")
            solved.append(relative(other[n].solve(v, damping), layer.solve(v, damping)))
        errors[name] = max(solved)
    assert errors["share"] < 0.5 * errors["diagonal"]


@pytest.mark.parametrize("per_pass", [None, 2])
@pytest.mark.parametrize("rank", [None, 6])
def test_with_passes_over_layers_and_a_rank(per_pass: int | None, rank: int | None) -> None:
    model = tiny("llama", torch.float32)
    plain = fitted(model, basis_share=0.4, rank=rank)
    split = fitted(model, basis_share=0.4, rank=rank, layers_per_pass=per_pass)
    for name, state in plain.items():
        assert state.low_rank == (rank is not None)
        assert torch.equal(split[name].eigenvalues(), state.eigenvalues())
    thin = fitted(model, BATCHES, plain, rank=rank)
    assert all(torch.equal(thin[n].q_in, state.q_in) for n, state in plain.items())
    assert thin[name].eigenvalues().shape == state.eigenvalues().shape


def test_saving_keeps_on_what_each_part_rests(tmp_path: Path) -> None:
    model = tiny("llama", torch.float32)
    curvature = fitted(model, basis_share=0.4)
    curvature.save(tmp_path / "c")
    loaded = Curvature.load(tmp_path / "c", model)
    assert loaded.config.basis_share == 0.4
    for name, state in curvature.items():
        assert loaded[name].lambda_losses == state.lambda_losses
        assert torch.equal(loaded[name].eigenvalues(), state.eigenvalues())
    # A loaded one gives a basis too.
    again = fitted(model, SECOND, loaded)
    assert all(torch.equal(again[n].eigenvalues(), s.eigenvalues()) for n, s in curvature.items())


def test_laplace_counts_all_data() -> None:
    model = tiny("llama")
    data = {"tokens": None, "prior_precision": 1.0}
    assert kfade.Laplace(model, fitted(model, basis_share=0.4), **data).tokens == loss_positions(BATCHES)
    basis = fitted(model, FIRST)
    assert kfade.Laplace(model, fitted(model, SECOND, basis), **data).tokens == loss_positions(SECOND)


def test_unlearning_takes_one_pass() -> None:
    model = tiny("llama", torch.float32)
    config = kfade.UnlearnConfig.published(fit=FitConfig(basis_share=0.5), kl_budget=0.01)
    progress = kfade.Progress()
    update = kfade.unlearn(model, BATCHES[:1], BATCHES[1:], config, progress=progress)
    assert update.report.outcome.measured_kl <= 0.01
    costs = {cost.name: cost.units for cost in progress.costs}
    retain = sum(int(b["attention_mask"].sum()) for b in BATCHES[1:])
    assert costs["factors A, S"] + costs["eigenvalues Λ"] <= retain


# ---- the plan


def test_the_plan_goes_through_the_data_once(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=100
    ).save_pretrained(tmp_path)
    two, one = (plan(tmp_path, 4096, 64, FitConfig(basis_share=s), rates=UNTIMED) for s in (None, 0.25))
    assert one.stage("forward and backward").flops == two.stage("forward and backward").flops / 2
    assert one.stage("factors").flops == two.stage("factors").flops / 4
    assert one.stage("correction").flops == two.stage("correction").flops * 3 / 4
    assert one.stage("decomposition") == two.stage("decomposition")
    assert [one.stage("forward and backward").runs, two.stage("forward and backward").runs] == [1, 2]
    assert Plan.from_json(one.to_json()) == one
    costs = [
        kfade.progress.StageCost(name, 1.0, 1, "token", 1)
        for name in ("factors A, S", "eigendecomposition", "eigenvalues Λ")
    ]
    beside = {b.stage: b.planned_seconds for b in one.beside(costs)}
    model = one.stage("forward and backward").seconds
    assert beside["factors A, S"] == pytest.approx(one.stage("factors").seconds + model / 4)
    assert beside["eigenvalues Λ"] == pytest.approx(one.stage("correction").seconds + model * 3 / 4)


# ---- what is refused


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"basis_share": 0.0}, ValueError, "basis_share is 0.0; it must be greater than 0"),
        ({"basis_share": 1.0}, ValueError, "basis_share is 1.0; it must be below 1"),
        ({"basis_share": float("nan")}, ValueError, "basis_share is nan; it must be finite"),
        ({"basis_share": "half"}, TypeError, "basis_share is 'half'; it must be a number"),
        ({"basis_share": 0.5, "curvature": "kfac"}, ValueError, "basis_share is 0.5; kfac takes one pass anyway"),
        ({"basis_share": 0.5, "curvature": "diagonal"}, ValueError, "diagonal takes one pass anyway"),
    ],
)
def test_bad_shares(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FitConfig(**options)


def test_a_part_without_loss_is_refused_before_any_work() -> None:
    model, progress = tiny("llama"), kfade.Progress()
    with pytest.raises(ValueError, match=r"basis_share is 0.1 and there are 5 batches: none .* is left for A and S"):
        kfade.fit(model, BATCHES, FitConfig(basis_share=0.1), progress=progress)
    silent = [{**b, "labels": torch.full_like(b["labels"], -100)} for b in SECOND]
    mixed = [silent[0], silent[1], FIRST[0], silent[2], FIRST[1]]
    with pytest.raises(ValueError, match="is left for Λ"):
        kfade.fit(model, mixed, FitConfig(basis_share=0.4), progress=progress)
    assert not progress.costs


def test_a_basis_that_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    model, progress = tiny("llama", torch.float32), kfade.Progress()
    basis = fitted(model, FIRST)
    without = Curvature(basis.config, "m", {n: replace(s, q_out=None) for n, s in basis.items()})
    wider = fitted(tiny("llama", torch.float32, intermediate_size=20), FIRST)
    cases: list[tuple[Curvature, dict[str, Any], str]] = [
        (basis, {"curvature": "kfac"}, "config.curvature is 'kfac'; it must be 'ekfac'"),
        (basis, {"basis_share": 0.5}, "config.basis_share is 0.5; give one of them"),
        (
            basis,
            {"modules": "attention"},
            "basis has other layers than the model: not alike are model.layers.0.mlp.down",
        ),
        (wider, {}, "basis has other layers"),
        (basis, {"rank": 3}, "basis has as q_in of .* of a kfac or ekfac curvature with rank 3"),
        (fitted(model, FIRST, rank=3), {}, "basis has as q_in of .* with rank None"),
        (without, {}, "basis has as q_out of model.layers.0.mlp.*none"),
        (fitted(tiny("llama"), FIRST), {}, r"of torch.float64; it must be .* of torch.float32"),
    ]
    for given, options, message in cases:
        with pytest.raises(ValueError, match=message):
            kfade.fit(model, BATCHES, FitConfig(**options), progress=progress, basis=given, store=None)
    with pytest.raises(ValueError, match="basis has other layers"):
        kfade.fit(hand_made(), BATCHES, FitConfig(modules="gate|up"), progress=progress, basis=basis)
    assert not progress.costs


def test_kronfluence_files_need_one_set_of_sequences(tmp_path: Path) -> None:
    from kfade.integrations.kronfluence_files import export_factors

    with pytest.raises(ValueError, match="has Λ of other sequences than S"):
        export_factors(fitted(tiny("llama"), basis_share=0.4), tmp_path, 20)


def test_the_examples_of_the_page_run() -> None:
    found = run_examples("decomposition.md")
    assert found["solved"][found["up"].name].shape == (160, 64)

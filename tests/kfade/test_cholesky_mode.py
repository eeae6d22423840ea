"""K-FAC without eigenvectors: solves by Cholesky factorisations, with a factored damping."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, tiny
from oracles import assert_close
from torch import Tensor
from transformers import LlamaConfig

import kfade
from kfade import Curvature, FitConfig
from kfade.plan import plan
from kfade.rates import UNTIMED

BATCHES = [batch(padding, sequences=8, seed=seed) for seed, padding in enumerate(("right", "none", "left"))]
CHOLESKY = FitConfig(curvature="kfac", decomposition="cholesky")
EXACT = 1e-9


def both(model: Any) -> tuple[Curvature, Curvature]:
    """Factors alone, and the same decomposed."""
    return tuple(kfade.fit(model, BATCHES, replace(CHOLESKY, decomposition=d)) for d in ("cholesky", "eigh"))  # type: ignore[return-value]


def definition(layer: Any, v: Tensor, damping: float) -> Tensor:
    """`(S + √λ/π I)⁻¹ V (A + π√λ I)⁻¹` by dense inverses."""
    s, a = layer.output_factor(), layer.input_factor()
    pi, root = math.sqrt((a.trace() / len(a)) / (s.trace() / len(s))), math.sqrt(damping)
    inverses = [torch.linalg.inv(m + x * torch.eye(len(m), dtype=m.dtype)) for m, x in ((s, root / pi), (a, pi * root))]
    return inverses[0] @ v @ inverses[1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_solves_are_those_of_the_definition(kind: str) -> None:
    model = tiny(kind)
    curvature, decomposed = both(model)
    for name, layer in curvature.items():
        assert layer.q_in is None and layer.q_out is None and layer.factors_alone
        v = torch.randn(layer.d_out, layer.width_in, dtype=torch.float64)
        # Relative damping is a share of the same mean eigenvalue.
        assert layer.mean_eigenvalue() == pytest.approx(decomposed[name].mean_eigenvalue(), rel=1e-9)
        damping = layer.damping(0.1, "relative")
        truth = definition(layer, v, damping)
        assert_close(layer.solve(v, damping), truth, EXACT)
        solved = curvature.solve({name: v if layer.has_bias else layer.part(v)}, 0.1)
        assert_close(layer.join(solved[name]), truth, EXACT)
        assert layer.product(v, truth) == pytest.approx(decomposed[name].product(v, truth), rel=1e-9)


def test_with_little_damping_it_is_the_solve_by_eigenvectors() -> None:
    """What they differ by are cross terms of the order √λ."""
    curvature, decomposed = both(tiny("llama"))
    name = next(n for n, layer in curvature.items() if n.endswith("up_proj"))
    layer, other = curvature[name], decomposed[name]
    smallest = float(other.eigenvalues().min())
    v = torch.randn(layer.d_out, layer.width_in, dtype=torch.float64)
    gaps = [
        float((layer.solve(v, x) - other.solve(v, x)).norm() / other.solve(v, x).norm())
        for x in (1e-6 * smallest, 1e-8 * smallest)
    ]
    assert smallest > 0 and gaps[0] < 0.01 and gaps[1] == pytest.approx(gaps[0] / 10, rel=0.1)


def test_no_stage_decomposes_and_no_file_has_eigenvectors(tmp_path: Path) -> None:
    model, progress = tiny("llama", torch.float32), kfade.Progress()
    plain = kfade.fit(model, BATCHES, CHOLESKY, progress=progress)
    assert [cost.name for cost in progress.costs] == ["factors A, S"]
    stored = kfade.fit(model, BATCHES, replace(CHOLESKY, layers_per_pass=2, checkpoint_seconds=0), store=tmp_path / "s")
    plain.save(tmp_path / "p")
    v = {n: torch.randn(x.d_out, x.width_in) for n, x in plain.items()}
    truth = plain.solve_matrices(v, 0.1, "relative")
    for found in (stored, Curvature.load(tmp_path / "s", model), Curvature.load(tmp_path / "p", model)):
        assert found.config.decomposition == "cholesky"
        assert all(torch.equal(x, truth[n]) for n, x in found.solve_matrices(v, 0.1, "relative").items())
    kinds = {path.name.split(".")[1] for path in (tmp_path / "s").glob("*.safetensors")}
    assert kinds == {"factors", "input_factors"}
    # A finished fit is only read.
    progress = kfade.Progress()
    kfade.fit(model, BATCHES, replace(CHOLESKY, layers_per_pass=2), store=tmp_path / "s", progress=progress)
    assert not progress.costs


@pytest.mark.parametrize("options", [{}, {"steps": 2, "retain_weight": 1.0}, {"cg_iterations": 2}], ids=str)
def test_unlearning(options: dict[str, Any]) -> None:
    model = tiny("llama", torch.float32)
    config = kfade.UnlearnConfig.published(fit=CHOLESKY, kl_budget=0.01, **options)
    outcome = kfade.unlearn(model, BATCHES[:1], BATCHES[1:], config).report.outcome
    assert outcome is not None and 0 < outcome.measured_kl <= 0.01 and outcome.scale > 0


def test_factors_of_a_training_need_no_decomposition() -> None:
    model = tiny("llama", torch.float32)
    tracker = kfade.FactorTracker(model, CHOLESKY)
    tracker.update(BATCHES[0])
    curvature = tracker.curvature()
    layer = next(iter(curvature.values()))
    assert layer.factors_alone
    assert bool(torch.isfinite(layer.solve(torch.randn(layer.d_out, layer.width_in), 0.1)).all())


def test_the_plan_has_no_decomposition(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=100
    ).save_pretrained(tmp_path)
    fast, full = (
        plan(tmp_path, 4096, 64, replace(CHOLESKY, decomposition=d), rates=UNTIMED) for d in ("cholesky", "eigh")
    )
    names = {stage.name for stage in full.stages}
    assert {stage.name for stage in fast.stages} == names - {"decomposition"}
    assert [m.stage for m in fast.memory] == ["factors A, S"]
    assert fast.stage("factors") == full.stage("factors")
    assert fast.stage("saving").disk_bytes < full.stage("saving").disk_bytes
    extra = fast.stage("solve").flops - full.stage("solve").flops
    assert extra == pytest.approx(3 * (64**3 + 128**3) / 3)


# ---- what is refused


def test_what_needs_eigenvalues_refuses() -> None:
    model = tiny("llama")
    curvature = kfade.fit(model, BATCHES, CHOLESKY)
    layer = next(iter(curvature.values()))
    with pytest.raises(ValueError, match="has no eigenvalues: nothing was decomposed; fit with decomposition 'eigh'"):
        layer.eigenvalues()
    with pytest.raises(ValueError, match="has no input eigenvectors"):
        layer.input_eigenvectors()
    for use in (
        lambda: kfade.CurvatureOperator(curvature, damping=0.1),
        lambda: kfade.Laplace(model, curvature, prior_precision=1.0),
        lambda: kfade.influence(model, curvature, BATCHES[:1], BATCHES[1:]),
    ):
        with pytest.raises(
            ValueError, match="factors and no eigenvalues, and these are needed: it must be fitted with"
        ):
            use()
    with pytest.raises(ValueError, match=r"basis has as q_in of .* none"):
        kfade.fit(model, BATCHES, basis=curvature)


def test_a_singular_factor_is_named() -> None:
    layer = next(iter(kfade.fit(tiny("llama"), [batch("none", 1, 3)], CHOLESKY).values()))
    with pytest.raises(
        ValueError, match=r"layer model.layers.0.mlp.* of order \d+ with 0 added is not positive definite"
    ):
        layer.solve(torch.zeros(layer.d_out, layer.width_in, dtype=torch.float64), 0.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decomposition": "svd"}, "decomposition is 'svd'; it must be one of eigh, cholesky"),
        ({"decomposition": "cholesky"}, "decomposition is 'cholesky', curvature is 'ekfac' and rank is None"),
        ({"decomposition": "cholesky", "curvature": "kfac", "rank": 4}, "rank is 4; without eigenvectors they must be"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitConfig(**options)
    with pytest.raises(ValueError, match=r"fit.decomposition is 'cholesky'; it must be 'eigh'"):
        kfade.KFACConfig(fit=CHOLESKY)

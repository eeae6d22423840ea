"""The step: search, budget, retain-KL term, and the predicted against the measured KL."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import kfade
from kfade.capture import deterministic_mode
from kfade.fit import check_batches
from kfade.layers import select
from kfade.loss import Head
from kfade.unlearn import Trial, _Quadratic, _Run, npo_weights, search_step_size, split_holdout

WORDS = 31
Batches = list[dict[str, Tensor]]


@functools.cache
def _trained() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = _llama()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        for batch in batches(1, count=1) + batches(2, count=4):
            model(**batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    return model.state_dict()


def _llama() -> LlamaForCausalLM:
    config = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2, num_key_value_heads=2)).eval()


def llama() -> LlamaForCausalLM:
    """A tiny model that has learnt the forget and the retain batches."""
    model = _llama()
    model.load_state_dict(_trained())
    return model


def batches(seed: int, count: int = 3, size: int = 4, tokens: int = 7) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(1, WORDS, (size, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, tokens - 2 :] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def measured_kl(model: nn.Module, other: nn.Module, data: Batches) -> float:
    """Token-mean KL(other ‖ model) by plain PyTorch."""
    total = count = 0.0
    with torch.no_grad():
        for batch in check_batches(data, torch.device("cpu")):
            logs = [m(input_ids=batch.input_ids, attention_mask=batch.attention.long()).logits for m in (model, other)]
            log_p, log_q = (x[batch.loss_mask].double().log_softmax(-1) for x in logs)
            total += float((log_q.exp() * (log_q - log_p)).sum())
            count += len(log_p)
    return total / count


@pytest.mark.parametrize("curvature", ["identity", "diagonal", "kfac", "ekfac"])
def test_the_budget_is_met_as_measured_and_the_model_is_left_alone(curvature: str) -> None:
    torch.manual_seed(0)
    model = llama()
    before = weights(model)
    forget, retain = batches(1, count=1), batches(2, count=4)
    config = kfade.UnlearnConfig(fit=kfade.FitConfig(curvature=curvature), steps=1, kl_budget=0.01, holdout=0.25)
    update = kfade.unlearn(model, forget, retain, config)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    (step,) = update.report.steps
    assert step.accepted and 0.5 * 0.01 < step.measured_kl <= 0.01
    assert step.forget_nll > update.report.forget_nll
    # What the report says of held-out sequences is what plain PyTorch measures on them.
    original = llama()
    original.load_state_dict(model.state_dict())
    _, held = split_holdout(check_batches(retain, torch.device("cpu")), 0.25)
    plain = [{"input_ids": b.input_ids, "attention_mask": b.attention.long(), "labels": b.labels} for b in held]
    update.apply_(model)
    assert measured_kl(model, original, plain) == pytest.approx(step.measured_kl, rel=1e-3)


def test_later_steps_use_the_retain_gradient_and_share_the_budget() -> None:
    torch.manual_seed(0)
    config = kfade.UnlearnConfig(steps=3, kl_budget=0.3)
    report = kfade.unlearn(llama(), batches(1, count=1), batches(2, count=4), config).report
    assert [step.number for step in report.accepted] == [1, 2, 3]
    for step in report.steps:
        assert step.measured_kl <= 0.3 * step.number / 3
    assert report.steps[0].retain_weight == 0
    assert any(step.retain_weight > 0 for step in report.steps[1:])
    assert report.steps[-1].forget_nll > report.steps[0].forget_nll
    without = kfade.unlearn(
        llama(), batches(1, count=1), batches(2, count=4), kfade.UnlearnConfig(steps=2, retain_term=False)
    ).report
    assert all(step.retain_weight == 0 for step in without.steps)


def test_a_given_step_size_is_taken_and_is_the_formula() -> None:
    """Δ = η (F + λI)⁻¹ ∇L, against autograd and the dense solve of the fitted curvature."""
    torch.manual_seed(0)
    model = llama().double()
    forget, retain = batches(1, count=2), batches(2, count=4)
    config = kfade.UnlearnConfig(steps=1, kl_budget=None, step_size=0.3, damping=0.5)
    _, fitted = reversed(split_holdout(check_batches(retain, torch.device("cpu")), config.holdout))
    data = [{"input_ids": b.input_ids, "attention_mask": b.attention.long(), "labels": b.labels} for b in fitted]
    curvature = kfade.fit(model, data)
    update = kfade.unlearn(model, forget, retain, config, curvature=curvature)
    model.zero_grad()
    tokens = sum(int(b.loss_mask.sum()) for b in check_batches(forget, torch.device("cpu")))
    for batch in check_batches(forget, torch.device("cpu")):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention.long()).logits
        nn.functional.cross_entropy(logits[batch.loss_mask], batch.targets, reduction="sum").div(tokens).backward()
    gradients = {name: model.get_submodule(name).weight.grad for name in curvature}
    for name, direction in curvature.solve(gradients, damping=0.5).items():
        torch.testing.assert_close(update.tensors[f"{name}.weight"], 0.3 * direction, rtol=1e-9, atol=1e-12)


def test_what_cannot_meet_its_budget_is_rolled_back_and_reported() -> None:
    torch.manual_seed(0)
    model = llama()
    # The prediction of this block-diagonal matrix is too small, so that its first trial overshoots.
    config = kfade.UnlearnConfig(steps=2, kl_budget=1e-3, trials=1)
    update = kfade.unlearn(model, batches(1, count=1), batches(2, count=4), config)
    (step,) = update.report.steps
    assert step.measured_kl == 0 and not step.accepted and "budget" in step.reason
    assert update.norm() == 0
    assert any("rolled back" in warning for warning in update.report.warnings)


def test_refit_says_so_and_a_stale_curvature_is_warned_of() -> None:
    torch.manual_seed(0)
    fresh = kfade.unlearn(llama(), batches(1, 1), batches(2, 4), kfade.UnlearnConfig(steps=2, refit_every=1)).report
    assert [step.refitted for step in fresh.steps] == [False, True]
    assert not any("stale" in warning for warning in fresh.warnings)
    stale = kfade.unlearn(llama(), batches(1, 1), batches(2, 4), kfade.UnlearnConfig(steps=2)).report
    assert any("stale" in warning for warning in stale.warnings)


def test_bounded_objective_weighs_what_is_still_remembered() -> None:
    start = torch.tensor([3.0, 3.0])
    torch.testing.assert_close(npo_weights(start, start, 0.1), torch.ones(2))
    assert float(npo_weights(torch.tensor([300.0]), start[:1], 0.1)) < 1e-9
    # It is the gradient of (2/β) log(1 + (p/p₀)^β) with respect to log p, by autograd.
    log_ratio = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (2 / 0.3 * torch.log1p(torch.exp(0.3 * log_ratio))).backward()
    weight = npo_weights(torch.tensor(-0.7, dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0.3)
    torch.testing.assert_close(weight, log_ratio.grad)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("first", [1e-4, 1.0, 1e4])
def test_search_finds_the_largest_step_within_the_target(power: float, first: float) -> None:
    eta, trials = search_step_size(lambda x: 0.01 + x**power, lambda x: x, first, 0.01, 0.05, 40)
    exact = 0.04 ** (1 / power)
    assert 0.9 * exact <= eta <= exact
    assert all(isinstance(trial, Trial) for trial in trials)


def test_search_ends_where_kl_saturates() -> None:
    eta, trials = search_step_size(lambda x: 0.01 * min(x, 3.0), lambda x: x, 1.0, 0.0, 0.05, 20)
    assert eta <= 10 and len(trials) < 6


def test_search_survives_infinite_kl() -> None:
    eta, _ = search_step_size(lambda x: math.inf if x > 0.5 else x * x, lambda x: x, 8.0, 0.0, 0.01, 20)
    assert 0 < eta <= 0.1


class OneMatrix(nn.Module):
    """Softmax regression on a one-token context: the Fisher of its weight is exact in one Kronecker product."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, WORDS, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        x = torch.ones(*input_ids.shape, 3, dtype=self.first.weight.dtype) * torch.tensor([1.0, -2.0, 0.5])
        return type("Output", (), {"logits": self.first(x)})()


def test_predicted_kl_tends_to_the_measured_one_where_the_fisher_is_exact() -> None:
    """One constant input: F = S ⊗ a aᵀ exactly, but for the sampling of S, which many samples make small."""
    torch.manual_seed(0)
    model = OneMatrix().double()
    data = batches(3, count=4, size=8)
    curvature = kfade.fit(model, data, kfade.FitConfig(curvature="kfac", modules="first", samples=200))
    checked = check_batches(data, torch.device("cpu"))
    layers = select(model, "first")
    run = _Run(model, layers, Head(model, checked[0], [model.first]), kfade.UnlearnConfig())
    direction = {"first": torch.randn(WORDS, 3, dtype=torch.float64)}
    zero = {"first": torch.zeros(WORDS, 3, dtype=torch.float64)}
    predicted = _Quadratic(curvature, zero, direction)
    ratios = []
    with deterministic_mode(model), kfade.Progress().stage("") as stage:
        references = run.references(checked, stage)
        for eta in (1.0, 0.1, 0.01):
            run.set_change({"first": eta * direction["first"]})
            ratios.append(run.measure(checked, references, stage)[0] / predicted(eta))
    assert abs(ratios[-1] - 1) < 0.02  # 200 samples of some 180 positions: 1 % of sampling error
    assert abs(ratios[1] - ratios[2]) < abs(ratios[0] - ratios[2])


def test_layers_with_biases_and_transposed_weights() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    config = kfade.UnlearnConfig(fit=kfade.FitConfig(modules="all-linear"), steps=2, kl_budget=0.01)
    update = kfade.unlearn(model, batches(1, 1), batches(2, 4), config)
    assert update.report.steps[-1].accepted
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert all(tensor.shape == shapes[name] for name, tensor in update.tensors.items())
    assert any(name.endswith(".bias") for name in update.tensors)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kl_budget": None}, "step_size"),
        ({"kl_budget": 0.1, "step_size": 0.1}, "step_size"),
        ({"kl_budget": -1.0}, "kl_budget"),
        ({"damping": math.nan}, "damping"),
        ({"damping_kind": "both"}, "damping_kind"),
        ({"steps": 0}, "steps"),
        ({"objective": "max"}, "objective"),
        ({"holdout": 1.0}, "holdout"),
        ({"retain_weight": -1.0}, "retain_weight"),
    ],
)
def test_bad_options_are_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        kfade.UnlearnConfig(**changes)  # type: ignore[arg-type]


def test_a_curvature_of_other_layers_and_too_few_sequences_are_refused() -> None:
    torch.manual_seed(0)
    model = llama()
    curvature = kfade.fit(model, batches(2), kfade.FitConfig(modules="attention", curvature="identity"))
    with pytest.raises(ValueError, match="curvature has layers"):
        kfade.unlearn(model, batches(1), batches(2), curvature=curvature)
    with pytest.raises(ValueError, match="holdout"):
        kfade.unlearn(model, batches(1), batches(2, count=1, size=2))

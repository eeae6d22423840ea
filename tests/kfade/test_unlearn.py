"""The step: search, budget, retain-KL term, and the predicted against the measured KL."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import kfade
from kfade.batches import as_batches, split_holdout
from kfade.capture import deterministic_mode
from kfade.evaluate import references, scores
from kfade.layers import select
from kfade.loss import Head, Ignorance, check_batches
from kfade.moved import MovedModel
from kfade.outcome import Trial
from kfade.step_size import search_step_size
from kfade.unlearn import _half_square, _scaled, npo_weights

# The package has the function under this name.
unlearning = sys.modules["kfade.unlearn"]

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
@pytest.mark.parametrize("steps", [1, 6])
def test_the_budget_is_met_as_measured_and_the_model_is_left_alone(curvature: str, steps: int) -> None:
    torch.manual_seed(0)
    model = llama()
    before = weights(model)
    forget, retain = batches(1, count=1), batches(2, count=4)
    changes = {"kl_budget": 0.01, "holdout": 0.25, "fit": kfade.FitConfig(curvature=curvature)}
    make = kfade.UnlearnConfig.published if steps == 1 else kfade.UnlearnConfig
    config = make(steps=steps, **changes)
    update = kfade.unlearn(model, forget, retain, config)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    report = update.report
    end = report.outcome
    assert end.scale > 0 and not end.reason and end.measured_kl <= 0.01
    assert end.forget_nll > report.forget_nll
    assert [step.number for step in report.steps] == ([] if steps == 1 else [1, 2, 3, 5, 6])
    if steps == 1:
        assert end.measured_kl > 0.5 * 0.01
    # What the report says of held-out sequences is what plain PyTorch measures on them.
    original = llama()
    original.load_state_dict(model.state_dict())
    _, held = split_holdout(check_batches(retain, torch.device("cpu")), 0.25)
    plain = [{"input_ids": b.input_ids, "attention_mask": b.attention.long(), "labels": b.labels} for b in held]
    update.apply_(model)
    assert measured_kl(model, original, plain) == pytest.approx(end.measured_kl, rel=1e-3)


def test_many_steps_forget_more_than_one_at_the_same_budget() -> None:
    forget, retain = batches(1, count=1), batches(2, count=4)
    ends = [
        kfade.unlearn(llama(), forget, retain, config).report.outcome
        for config in (kfade.UnlearnConfig.published(kl_budget=0.1), kfade.UnlearnConfig(kl_budget=0.1))
    ]
    assert all(end.measured_kl <= 0.1 for end in ends)
    assert ends[1].forget_nll > ends[0].forget_nll


def dense_direction(
    model: nn.Module, curvature: kfade.Curvature, loss: Tensor, damping: float
) -> dict[str, Tensor | kfade.WeightAndBias]:
    """(F + λI)⁻¹ ∇loss, the gradient by autograd."""
    model.zero_grad()
    loss.backward()
    gradients = {name: model.get_submodule(name).weight.grad for name in curvature}
    model.zero_grad()
    return curvature.solve(gradients, damping=damping)


def test_a_given_step_size_is_taken_and_is_the_formula() -> None:
    """Δ = η (F + λI)⁻¹ ∇L, against autograd and the dense solve of the fitted curvature."""
    torch.manual_seed(0)
    model = llama().double()
    forget, retain = batches(1, count=2), batches(2, count=4)
    config = kfade.UnlearnConfig.published(kl_budget=None, step_size=0.3, damping=0.5)
    _, fitted = reversed(split_holdout(check_batches(retain, torch.device("cpu")), config.holdout))
    data = [{"input_ids": b.input_ids, "attention_mask": b.attention.long(), "labels": b.labels} for b in fitted]
    curvature = kfade.fit(model, data)
    update = kfade.unlearn(model, forget, retain, config, curvature=curvature)
    checked = check_batches(forget, torch.device("cpu"))
    total = sum(
        nn.functional.cross_entropy(
            model(input_ids=b.input_ids, attention_mask=b.attention.long()).logits[b.loss_mask], b.targets,
            reduction="sum",
        )
        for b in checked
    )  # fmt: skip
    assert isinstance(total, Tensor)
    loss = total / sum(int(b.loss_mask.sum()) for b in checked)
    for name, direction in dense_direction(model, curvature, loss, 0.5).items():
        torch.testing.assert_close(update.tensors[f"{name}.weight"], 0.3 * direction, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pull_back", [False, True])
def test_a_step_of_many_is_the_formula(pull_back: bool) -> None:
    """Δ = −η (F + λI)⁻¹ (∇KL(q ‖ p) + c ∇KL(p₀ ‖ p)) from a moved state, in float64, against plain autograd.

    Of KL(q ‖ p) the rows alone whose label is likelier than under q, or all.
    """
    torch.manual_seed(0)
    model = llama().double()
    forget, retain = batches(1, count=1), batches(2, count=1, size=8)
    config = kfade.UnlearnConfig(
        steps=2, kl_budget=None, step_size=0.2, margin=3.0, target_temperature=1.5, damping=0.1, pull_back=pull_back
    )
    fitted, _ = split_holdout(check_batches(retain, torch.device("cpu")), config.holdout)
    data = [{"input_ids": b.input_ids, "attention_mask": b.attention.long(), "labels": b.labels} for b in fitted]
    curvature = kfade.fit(model, data, config.fit)
    update = kfade.unlearn(model, forget, retain, config, curvature=curvature)

    def logits(batch: object) -> Tensor:
        rows: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention.long()).logits
        return rows[batch.loss_mask]

    (batch,), (kept,) = check_batches(forget, torch.device("cpu")), fitted
    with torch.no_grad():
        lowered = logits(batch) - 3.0 * nn.functional.one_hot(batch.targets, WORDS)
        q, p0 = (lowered / 1.5).softmax(-1), logits(kept).softmax(-1)
    start = weights(model)
    for _ in range(2):
        log_p = logits(batch).log_softmax(-1)
        counted = likelier(log_p, q, batch.targets) | pull_back
        loss = nn.functional.kl_div(log_p[counted], q[counted], reduction="sum") / len(q)
        loss = loss + 10.0 * nn.functional.kl_div(logits(kept).log_softmax(-1), p0, reduction="sum") / len(p0)
        for name, direction in dense_direction(model, curvature, loss, 0.1).items():
            model.get_submodule(name).weight.data.sub_(0.2 * direction)
    for name in curvature:
        moved = model.get_submodule(name).weight - start[f"{name}.weight"]
        torch.testing.assert_close(update.tensors[f"{name}.weight"], moved.detach(), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("share, shortened", [(0.1, False), (8.0, True)])
def test_steps_predict_what_the_first_was_measured_to_cost(share: float, shortened: bool) -> None:
    """The first costs share · budget; others have its `½ η² dᵀ(F + λI)d`, shrinking, and less far over the budget."""
    torch.manual_seed(0)
    model = llama().double()
    seen: list[dict[str, Tensor]] = []
    config = kfade.UnlearnConfig(
        steps=4,
        kl_budget=0.005,
        step_share=share,
        tokens_per_step=1,
        damping=0.0,
        retain_weight=0.0,
        target_temperature=2.0,
    )
    fitted, _ = split_holdout(check_batches(batches(2, 4), torch.device("cpu")), config.holdout)
    data = [{"input_ids": b.input_ids, "attention_mask": b.attention.long(), "labels": b.labels} for b in fitted]
    # Each matrix has far fewer rows than the data, so F is invertible without damping.
    curvature = kfade.fit(model, data, config.fit)
    start = weights(model)
    report = kfade.unlearn(
        model, batches(1, 2), batches(2, 4), config, curvature=curvature, every=1,
        observe=lambda number, seconds: seen.append({n: p - start[n] for n, p in weights(model).items()}),
    ).report  # fmt: skip
    assert len(seen) == len(report.steps) == 4
    # The search is content within 8 % below its target.
    assert 0.9 * share * 0.005 < report.steps[0].measured_kl <= share * 0.005
    before = {name: torch.zeros(s.d_out, s.d_in, dtype=torch.float64) for name, s in curvature.items()}
    expected, factor = 0.0, 1.0
    for number, state in enumerate(seen):
        now = {name: state[f"{name}.weight"] for name in curvature}
        predicted = _half_square(curvature, {name: now[name] - before[name] for name in now})
        expected = expected or predicted
        # The change is read back from weights of size 1, of which it is a thousandth.
        assert predicted == pytest.approx(expected * factor * (1 - number / 4) ** 2, rel=1e-6)
        before = now
        factor *= min(1.0, 4 * 0.005 / report.steps[number].measured_kl)
    assert (factor < 1) == shortened


# Of a model that is to lose what it knows at any price.
RUTHLESS = kfade.UnlearnConfig(
    steps=40, kl_budget=5.0, step_share=0.02, tokens_per_step=1, retain_weight=0.1, damping=0.1
)


@pytest.mark.parametrize("growth, rise", [(2.0, math.inf), (math.inf, 1.1), (2.0, 1.3)])
def test_steps_do_not_grow_as_what_they_descend_vanishes(
    growth: float, rise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """η of the predicted length, but at most so many times the first, and so many times more a step; both fall to 0."""
    monkeypatch.setattr(unlearning, "LEFT", 0.0)
    monkeypatch.setattr(unlearning, "LOOKS", 8)
    config, runs = replace(RUTHLESS, steps=8), []
    for limits in ((growth, rise), (math.inf, math.inf)):
        for name, value in zip(("GROWTH", "RISE"), limits, strict=True):
            monkeypatch.setattr(unlearning, name, value)
        steps = kfade.unlearn(llama(), batches(1, count=1), batches(2, 4), config).report.steps
        assert len(steps) == 8
        runs.append([step.eta / (1 - i / 8) for i, step in enumerate(steps)])
    kept, free = runs
    assert max(free) > 10 * free[0]
    longest = [free[0] * min(growth, rise**i) for i in range(8)]
    first = next(i for i, eta in enumerate(free) if eta > longest[i])
    assert kept[:first] == free[:first] and kept[first] == pytest.approx(longest[first])
    assert all(eta < most or eta == pytest.approx(most) for eta, most in zip(kept, longest, strict=True))


def test_a_run_ends_where_nothing_is_left_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pass that found a hundredth of what the first found, if retain batches are within the budget."""
    (learnt,) = batches(1, count=1)
    forget, retain = [{k: v[i : i + 2] for k, v in learnt.items()} for i in (0, 2)], batches(2, count=4)

    def observed() -> list[int]:
        seen: list[int] = []
        update = kfade.unlearn(llama(), forget, retain, RUTHLESS, every=4, observe=lambda n, _: seen.append(n))
        assert update.norm() > 0 and update.report.steps[-1].number == seen[-1]
        return seen

    *others, end = observed()
    assert 2 < end < 40 and end % 4 and others == [*range(4, end, 4)]
    monkeypatch.setattr(unlearning, "LEFT", 0.0)
    assert observed()[-1] == 40
    monkeypatch.undo()
    follow = unlearning._Stepper._follow

    def over(self: object, divergence: float, count: float) -> None:
        follow(self, divergence, count)
        self._spent = 1.5

    monkeypatch.setattr(unlearning._Stepper, "_follow", over)
    assert observed()[-1] == 40


@pytest.mark.parametrize("share, longer", [(1e-4, True), (1.0, False)])
def test_steps_that_leave_much_of_the_budget_are_made_longer_together(share: float, longer: bool) -> None:
    config = kfade.UnlearnConfig(steps=4, kl_budget=0.02, step_share=share)
    end = kfade.unlearn(llama(), batches(1, 2), batches(2, 4), config).report.outcome
    assert end is not None and end.trials[0].eta == 1.0
    assert (end.trials[0].measured_kl < 0.5 * 0.02) == longer == (end.scale > 1)
    assert end.measured_kl <= 0.02 and (not longer or end.measured_kl >= 0.9 * 0.02)


def test_steps_that_leave_nothing_are_not_made_longer() -> None:
    config = replace(RUTHLESS, kl_budget=50.0, step_share=0.002)
    report = kfade.unlearn(llama(), batches(1, count=1), batches(2, 4), config).report
    assert report.outcome is not None and report.steps[-1].number < 40
    assert report.outcome.scale == 1 and report.outcome.measured_kl < 25 and len(report.outcome.trials) == 1


def test_steps_that_are_pulled_back_to_their_target_are_not_made_longer() -> None:
    config = kfade.UnlearnConfig(steps=4, kl_budget=0.02, step_share=1e-4, pull_back=True)
    end = kfade.unlearn(llama(), batches(1, 2), batches(2, 4), config).report.outcome
    assert end is not None and end.scale == 1 and end.measured_kl < 0.5 * 0.02


@pytest.mark.parametrize(
    "tokens, size, given, pulled", [(9, 4, None, False), (10, 4, None, True), (10, 4, False, False), (9, 2, True, True)]
)
def test_long_answers_are_pulled_back_to_their_target(tokens: int, size: int, given: bool | None, pulled: bool) -> None:
    """Of more than 8 labelled tokens on average; the report says which it was."""
    forget = [{"input_ids": batch["input_ids"]} for batch in batches(1, count=1, size=size, tokens=tokens)]
    config = kfade.UnlearnConfig(steps=1, pull_back=given)
    assert kfade.unlearn(llama(), forget, batches(2, 4), config).report.config["pull_back"] is pulled


def test_steps_are_as_many_as_the_forget_set_asks_for() -> None:
    config = kfade.UnlearnConfig()
    # Batches of 32 short answers, or of 8 long ones.
    assert [config.steps_over([256] * n, 32 * n) for n in (1, 3, 8, 40, 41, 500)] == [1, 30, 80, 80, 82, 1000]
    assert [config.steps_over([256] * n, 8 * n) for n in (1, 3, 8, 40, 41, 500)] == [10, 30, 80, 80, 82, 1000]
    # Eight batches a step, of which there may be fewer.
    assert [config.steps_over([32] * n, 4 * n) for n in (1, 8, 9, 64, 500)] == [1, 1, 12, 80, 125]
    published = kfade.UnlearnConfig.published(steps=None)
    assert [published.steps_over([256] * n, 8 * n) for n in (1, 3)] == [1, 1]
    assert [config.batches_in_step(tokens) for tokens in ([], [7], [7, 300], [300, 700], [100] * 3)] == [0, 1, 2, 1, 3]
    assert kfade.UnlearnConfig(tokens_per_step=None).steps_over([256] * 500, 500 * 32) == 1
    assert kfade.UnlearnConfig(steps=7).steps_over([256] * 500, 500) == 7
    for tokens, steps in ((1, 30), (256, 1)):
        found = replace(config, tokens_per_step=tokens)
        report = kfade.unlearn(llama(), batches(1, count=3), batches(2, count=4), found).report
        assert report.config["steps"] == steps


@pytest.mark.parametrize("steps", [8, 32])
def test_weight_of_the_retain_term_follows_what_is_spent(steps: int) -> None:
    """c of a step, from the KL of all retain batches before each earlier one."""
    model, budget = llama(), 0.01
    config = kfade.UnlearnConfig(steps=steps, kl_budget=budget, step_share=1.0, tokens_per_step=None)
    fitted, _ = split_holdout(check_batches(batches(2, 4), torch.device("cpu")), config.holdout)
    data = as_batches(fitted)
    original, spent = references(model, data), []
    report = kfade.unlearn(
        model, batches(1, 2), batches(2, 4), config, every=1,
        observe=lambda number, seconds: spent.append(scores(model, data, original).kl / budget),
    ).report  # fmt: skip
    weights, total, count = [10.0, 10.0], 0.0, 0.0
    for share in spent[:-2]:
        total, count = total / 2 + share, count / 2 + 1
        weights.append(weights[-1] * min(4.0, max(0.5, total / count)) ** min(1.0, 16 / steps))
    assert [look.number for look in report.steps] == sorted({1, *range(steps // 4, steps + 1, steps // 4)})
    for look in report.steps:
        # KL is a small difference in float32, and a run multiplies by it at each step.
        assert look.retain_weight == pytest.approx(weights[look.number - 1], rel=1e-3)
    assert max(weights) > 10.0


@pytest.mark.parametrize("probability", [0.99, 0.2])
def test_target_is_flattened_by_how_much_is_memorised(probability: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def of(self: Ignorance, logits: Tensor, part: slice) -> Tensor:
        seen.append(self.temperature)
        return logits

    monkeypatch.setattr(Ignorance, "of", of)
    monkeypatch.setattr(MovedModel, "mean_nll", lambda *_: -math.log(probability))
    kfade.unlearn(llama(), batches(1, 2), batches(2, 4), kfade.UnlearnConfig.published(objective="distil"))
    assert seen == pytest.approx([1 + probability**4] * len(seen))
    assert seen


def test_what_cannot_meet_its_budget_is_dropped_and_reported() -> None:
    torch.manual_seed(0)
    model = llama()
    # The prediction of this block-diagonal matrix is too small, so that its only trial overshoots.
    update = kfade.unlearn(
        model, batches(1, count=1), batches(2, count=4), kfade.UnlearnConfig.published(kl_budget=1e-3, trials=1)
    )
    end = update.report.outcome
    assert end.measured_kl == 0 and end.scale == 0 and "budget" in end.reason
    assert update.norm() == 0
    assert any("nothing was changed" in warning for warning in update.report.warnings)


@pytest.mark.parametrize(("ratio", "stride"), [(None, 1), (1e4, 1), (1.2, 2), (1e-3, 4)])
def test_a_fit_on_enough_tokens_sees_every_so_many_of_the_batches(ratio: float | None, stride: int) -> None:
    forget, retain = batches(1, count=1), batches(2, count=4)
    config = kfade.UnlearnConfig(steps=2, tokens_per_dimension=ratio)
    fitted, _ = split_holdout(check_batches(retain, torch.device("cpu")), config.holdout)
    # Factors of order 24 at most, and four batches of some twenty tokens.
    assert 72 <= sum(batch.tokens for batch in fitted) <= 86 and len(fitted) == 4
    curvature = kfade.fit(llama(), as_batches(fitted)[::stride], config.fit)
    first = kfade.unlearn(llama(), forget, retain, config)
    second = kfade.unlearn(llama(), forget, retain, config, curvature=curvature)
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


def test_refits_are_counted() -> None:
    torch.manual_seed(0)
    config = kfade.UnlearnConfig(steps=4, refit_every=2)
    report = kfade.unlearn(llama(), batches(1, 1), batches(2, 4), config).report
    assert [step.refitted for step in report.steps] == [0, 0, 1, 1]


@pytest.mark.parametrize("objective", ["distil", "npo", "cross_entropy"])
def test_same_seed_same_bits_and_every_objective_forgets(objective: str) -> None:
    config = kfade.UnlearnConfig(steps=6, objective=objective, kl_budget=0.1, tokens_per_step=1)
    (learnt,) = batches(1, count=1)
    forget, retain = [{k: v[i : i + 2] for k, v in learnt.items()} for i in (0, 2)], batches(2, count=4)
    first, second = (kfade.unlearn(llama(), forget, retain, config) for _ in range(2))
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    assert first.report.outcome.forget_nll > first.report.forget_nll
    other = kfade.unlearn(
        llama(), forget, retain, kfade.UnlearnConfig(fit=kfade.FitConfig(seed=1, temperature=3.0), steps=6)
    )
    assert not all(torch.equal(tensor, other.tensors[name]) for name, tensor in first.tensors.items())


def test_an_interrupted_run_leaves_the_model_as_it_was() -> None:
    model = llama()
    before = weights(model)

    def interrupt(number: int, seconds: float) -> None:
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kfade.unlearn(model, batches(1), batches(2, 4), kfade.UnlearnConfig(steps=3), every=2, observe=interrupt)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_an_observer_and_its_interval_go_together() -> None:
    with pytest.raises(ValueError, match="every is 3 and observe is None"):
        kfade.unlearn(llama(), batches(1), batches(2, 4), every=3)


def test_temperature_is_the_fisher_of_softened_outputs() -> None:
    """With the labels of the data, S at temperature T is that of a model whose output projection is divided by T."""
    model, softened = llama().double(), llama().double()
    softened.lm_head.weight = nn.Parameter(softened.lm_head.weight.detach() / 3)
    config = {"fisher": "empirical", "curvature": "ekfac"}
    found = kfade.fit(model, batches(2), kfade.FitConfig(**config, temperature=3.0))
    expected = kfade.fit(softened, batches(2), kfade.FitConfig(**config))
    for name, layer in expected.items():
        torch.testing.assert_close(found[name].output_factor(), layer.output_factor(), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(found[name].eigenvalues(), layer.eigenvalues(), rtol=1e-8, atol=1e-14)


def likelier(log_p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    """Rows `[N]` whose label is likelier under p than under q."""
    rows = torch.arange(len(labels))
    return log_p[rows, labels].exp() > q[rows, labels]


@pytest.mark.parametrize("pull_back", [False, True])
@pytest.mark.parametrize("projected", [True, False])
def test_the_target_does_not_know_the_label(projected: bool, pull_back: bool) -> None:
    """Value and gradient of KL(q ‖ p) on rows, float64, against autograd; hidden rows and rows that are logits.

    A row whose label is no likelier than under q has no gradient if it is not to be pulled back.
    """
    torch.manual_seed(0)
    model = llama().double()
    (batch,) = check_batches(batches(1, count=1), torch.device("cpu"))
    head = Head(model, batch, () if projected else [model.lm_head])
    assert (head.weight is not None) == projected
    rows = head.rows(batch).detach()
    reference = rows + 0.1 * torch.randn_like(rows)
    # Every other label is far likelier than under p, even when lowered.
    towards = model.lm_head.weight.detach() if projected else torch.eye(WORDS, dtype=torch.float64)
    raised = towards[batch.targets[::2]]
    reference[::2] += 20 * raised / (raised * raised).sum(1, keepdim=True)
    target = Ignorance(batch.targets, 4.0, 2.0, pull_back)
    value, grad = head.kl(rows, reference, target=target)
    leaf = rows.clone().requires_grad_()
    project = (lambda x: x @ model.lm_head.weight.T) if projected else (lambda x: x)
    lowered = project(reference).detach() - 4.0 * nn.functional.one_hot(batch.targets, WORDS)
    plain = nn.functional.kl_div(project(leaf).log_softmax(-1), (lowered / 2).softmax(-1), reduction="none").sum(-1)
    known = likelier(project(leaf).log_softmax(-1).detach(), (lowered / 2).softmax(-1), batch.targets)
    assert known.any() and not known.all()
    counted = known | pull_back
    plain[counted].sum().backward()
    torch.testing.assert_close(value, plain.detach() * counted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-10, atol=1e-12)


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


def test_search_never_goes_beyond_its_limit() -> None:
    eta, trials = search_step_size(lambda x: 0.01 * x, lambda x: x, 1.0, 0.0, 0.05, 20, limit=1.0)
    assert eta == 1.0 and len(trials) == 1
    eta, trials = search_step_size(lambda x: 0.5 * x * x, lambda x: x, 1.0, 0.0, 0.05, 20, limit=1.0)
    assert 0.9 * math.sqrt(0.1) <= eta <= math.sqrt(0.1) and all(trial.eta <= 1 for trial in trials)


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
    run = MovedModel(model, layers, Head(model, checked[0], [model.first]), kfade.UnlearnConfig())
    direction = {"first": torch.randn(WORDS, 3, dtype=torch.float64)}
    ratios = []
    with deterministic_mode(model), kfade.Progress().stage("") as stage:
        references = run.references(checked, stage)
        for eta in (1.0, 0.1, 0.01):
            change = _scaled(direction, eta)
            run.set_change(change)
            ratios.append(run.measure(checked, references, stage)[0] / _half_square(curvature, change))
    assert abs(ratios[-1] - 1) < 0.02  # 200 samples of some 180 positions: 1 % of sampling error
    assert abs(ratios[1] - ratios[2]) < abs(ratios[0] - ratios[2])


def test_layers_with_biases_and_transposed_weights() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    config = kfade.UnlearnConfig(fit=kfade.FitConfig(modules="all-linear"), steps=2, kl_budget=0.01)
    update = kfade.unlearn(model, batches(1, 1), batches(2, 4), config)
    assert update.report.outcome.scale > 0
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
        ({"margin": -1.0}, "margin"),
        ({"target_temperature": 0.0}, "target_temperature"),
        ({"tokens_per_step": 0}, "tokens_per_step"),
        ({"step_share": 0.0}, "step_share"),
        ({"tokens_per_dimension": 0.0}, "tokens_per_dimension"),
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

"""Factors collected while a model trains: what they are, and that training does not notice."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import Batch, batch, hand_made, sampled_labels, tiny
from oracles import assert_close, autograd_truth
from pages import run_examples
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import kfade
from kfade import FactorTracker, FitConfig, LayerCurvature, NonFiniteError, StorageError
from kfade.fit import fit_factors
from kfade.integrations.transformers import FILE, FactorCallback
from kfade.progress import Progress
from kfade.training import unwrapped, update_seed

# Sums of the same float64 products in the same order, or in another one.
TOLERANCE = 1e-12
CONFIG = FitConfig("kfac", modules="all-linear")


def fresh(model: nn.Module, batches: Sequence[Batch], config: FitConfig, number: int = 0) -> dict[str, LayerCurvature]:
    """What `fit` collects at these weights with the labels of update `number`."""
    return fit_factors(model, batches, replace(config, seed=update_seed(config, number)), Progress())


def sums(states: Mapping[str, LayerCurvature]) -> dict[str, Tensor]:
    found = {}
    for name, state in states.items():
        assert state.a_sum is not None and state.s_sum is not None
        found[f"{name}.a"], found[f"{name}.s"] = state.a_sum.to_dense(), state.s_sum.to_dense()
        found[f"{name}.counts"] = torch.tensor([state.positions, state.losses], dtype=torch.float64)
    return found


def assert_same(found: Mapping[str, LayerCurvature], expected: Mapping[str, LayerCurvature]) -> None:
    ours, theirs = sums(found), sums(expected)
    assert ours.keys() == theirs.keys() and len(ours) > 2
    for name, value in ours.items():
        assert_close(value, theirs[name], TOLERANCE, name)


def assert_same_bits(found: Mapping[str, LayerCurvature], expected: Mapping[str, LayerCurvature]) -> None:
    ours, theirs = sums(found), sums(expected)
    assert ours.keys() == theirs.keys() and ours
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    after: Callable[[], Any] = lambda: None,
    *,
    lr: float = 0.05,
    accumulate: int = 1,
    still: Sequence[nn.Module] = (),
) -> torch.optim.Optimizer:
    """A bare loop of AdamW, with some modules left in evaluation mode; `after` is called once a step."""
    model.train()
    for module in still:
        module.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for number, one in enumerate(batches, 1):
        model(**one).loss.backward()
        if number % accumulate == 0:
            optimizer.step()
            after()
            optimizer.zero_grad()
    return optimizer


# --------------------------------------------------------------------------------------- what is collected


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("gemma2", {})],
    ids=["llama", "tied", "gpt2", "soft-capped"],
)
def test_factors_are_those_of_a_fit_at_the_new_weights(family: str, options: dict[str, Any], padding: str) -> None:
    model = tiny(family, **options)
    data = [batch(padding, seed=seed) for seed in range(3)]
    seen = []
    with FactorTracker(model, CONFIG, every=1, decay=0.0) as tracker:

        def after() -> None:
            assert tracker.step()
            number = tracker.updates - 1
            assert_same(tracker.factors, fresh(model, [data[number]], CONFIG, number))
            seen.append(sums(tracker.factors))

        # A large step: factors of the weights before it would be far off.
        train(model, data, after, lr=0.3)
    assert len(seen) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_running_sums_against_autograd(family: str) -> None:
    model, decay = tiny(family), 0.75
    data = [batch("right", seed=seed) for seed in range(3)]
    tracker = FactorTracker(model, FitConfig("kfac", modules="mlp", seed=5), every=1, decay=decay)
    total: dict[str, Tensor] = {}

    def after() -> None:
        one = data[tracker.updates]
        labels = sampled_labels(model, [one], update_seed(tracker.config, tracker.updates))
        tracker.step()
        reference = copy.deepcopy(model)
        reference.zero_grad()
        for name, truth in autograd_truth(reference, list(tracker.factors), [one], labels).items():
            counts = torch.tensor([truth.positions, int((labels[0] != -100).sum())], dtype=torch.float64)
            for key, value in {"a": truth.a_sum, "s": truth.s_sum, "counts": counts}.items():
                total[f"{name}.{key}"] = decay * total.get(f"{name}.{key}", 0.0) + value

    train(model, data, after, lr=0.1)
    found = sums(tracker.factors)
    assert found.keys() == total.keys()
    for name, value in found.items():
        assert_close(value, total[name], TOLERANCE, name)


def test_a_decay_of_one_is_the_fit_of_all_batches() -> None:
    model, data = tiny("llama"), [batch("right", seed=1), batch("left", sequences=2, tokens=6, seed=2)]
    config = FitConfig("kfac", fisher="empirical", modules="all-linear")
    tracker = FactorTracker(model, config, decay=1)
    for one in data:
        tracker.update(one)
    assert_same(tracker.factors, fresh(model, data, config))


def test_counts_are_weighted_like_sums() -> None:
    """So that a mean of equal batches does not depend on the decay."""
    model, config = tiny("llama"), FitConfig("kfac", fisher="empirical")
    tracker, truth = FactorTracker(model, config, decay=0.3), fresh(model, [batch()], config)
    for _ in range(4):
        tracker.update(batch())
    name, layer = next(iter(tracker.factors.items()))
    assert layer.positions == pytest.approx(truth[name].positions * (1 + 0.3 + 0.09 + 0.027))
    assert_close(layer.input_factor(), truth[name].input_factor(), TOLERANCE)
    assert_close(layer.output_factor(), truth[name].output_factor(), TOLERANCE)


def test_a_sequence_that_comes_again_gets_other_labels() -> None:
    tracker = FactorTracker(tiny("llama"), CONFIG, decay=0)
    found = []
    for _ in range(2):
        tracker.update(batch())
        found.append(sums(tracker.factors))
    changed = {name for name in found[0] if not torch.equal(found[0][name], found[1][name])}
    assert changed == {name for name in found[0] if name.endswith(".s")}


def test_several_label_samples() -> None:
    model, config = tiny("llama"), replace(CONFIG, samples=3)
    tracker = FactorTracker(model, config)
    tracker.update(batch())
    assert_same(tracker.factors, fresh(model, [batch()], config))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        tracker = FactorTracker(model, CONFIG, every=1)
        train(model, [batch(seed=s) for s in range(2)], tracker.step)
        assert all(module.training for module in model.modules())
        found.append(tracker.factors)
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_other_dtypes_are_float32(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    tracker = FactorTracker(model, CONFIG, every=1, decay=0.5)
    train(model, [batch(seed=s) for s in range(2)], tracker.step, lr=1e-3)
    states = tracker.factors
    assert {total.dtype for s in states.values() for total in (s.a_sum, s.s_sum) if total is not None} == {
        torch.float32
    }
    expected = fresh(model, [batch(seed=1)], CONFIG, 1)
    tracker = FactorTracker(model, CONFIG, decay=0)
    tracker._updates = 1
    tracker.update(batch(seed=1))
    assert_same_bits(tracker.factors, expected)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["off", "bfloat16"])
def test_autocast_is_that_of_the_configuration(kind: str, inside: bool) -> None:
    """Whatever region the step is called in, and whatever casts that region has cached."""
    model, config = tiny("llama", torch.float32).train(), replace(CONFIG, autocast=kind)
    tracker = FactorTracker(model, config, every=1)
    with torch.autocast("cpu", dtype=torch.bfloat16) if inside else nullcontext():
        model(**batch())
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        assert tracker.step()
    assert_same_bits(tracker.factors, fresh(model, [batch()], config))


# ------------------------------------------------------------------------------- what training does not notice


def dropping(family: str) -> nn.Module:
    rates = {
        "llama": {"attention_dropout": 0.2},
        "gpt2": {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2},
    }
    model: nn.Module = tiny(family, torch.float32, **rates[family])
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_keeps_its_bits(family: str, checkpointing: bool) -> None:
    """Dropout, accumulation, a frozen parameter, gradients that wait: all as without."""
    ends = []
    for tracked in (False, True):
        model = dropping(family)
        if checkpointing:
            model.gradient_checkpointing_enable()
        next(model.parameters()).requires_grad_(False)
        still = [model.get_submodule("model.norm" if family == "llama" else "transformer.ln_f")]
        tracker = FactorTracker(model, CONFIG, every=1) if tracked else None
        modes, flags, gradients = [], [], []

        def after(
            tracker: FactorTracker | None = tracker,
            model: nn.Module = model,
            noted: tuple[list[Any], ...] = (modes, flags, gradients),
        ) -> None:
            if tracker is not None:
                tracker.step()
            noted[0].append([m.training for m in model.modules()])
            noted[1].append([p.requires_grad for p in model.parameters()])
            noted[2].append([None if p.grad is None else p.grad.clone() for p in model.parameters()])

        torch.manual_seed(3)
        optimizer = train(model, [batch("right", seed=s) for s in range(6)], after, accumulate=2, still=still)
        ends.append(
            (model.state_dict(), optimizer.state_dict()["state"], torch.get_rng_state(), modes, flags, gradients)
        )
        if tracker is not None:
            assert tracker.updates == 3
            assert all(p.grad is None for p in model.parameters())
    (weights, moments, random, *rest), (weights2, moments2, random2, *rest2) = ends
    assert all(torch.equal(value, weights2[name]) for name, value in weights.items())
    assert moments.keys() == moments2.keys() and moments
    assert all(torch.equal(moments[p][key], moments2[p][key]) for p in moments for key in moments[p])
    assert torch.equal(random, random2)
    assert rest[:2] == rest2[:2] and False in rest[1][0] and False in rest[0][0]
    for ours, theirs in zip(rest[2], rest2[2], strict=True):
        assert [g is None for g in ours] == [g is None for g in theirs] and any(g is not None for g in ours)
        assert all(torch.equal(g, h) for g, h in zip(ours, theirs, strict=True) if g is not None)


def test_accumulation_takes_the_last_micro_batch() -> None:
    model, data = tiny("llama"), [batch(seed=s) for s in range(4)]
    tracker = FactorTracker(model, CONFIG, every=2, decay=0)
    found = []
    train(model, data, lambda: found.append(tracker.step()), accumulate=2, lr=0.0)
    assert found == [True, False]
    assert_same(tracker.factors, fresh(model, [data[1]], CONFIG))


def test_every_counts_from_the_first_step() -> None:
    model = tiny("llama")
    tracker = FactorTracker(model, every=3)
    found = []
    train(model, [batch(seed=s) for s in range(7)], lambda: found.append(tracker.step()))
    assert found == [True, False, False, True, False, False, True]
    assert tracker.updates == 3


def test_only_training_is_remembered_and_arguments_may_be_positional() -> None:
    model = tiny("llama").train()
    tracker = FactorTracker(model, CONFIG, every=1)
    one, other = batch("left"), batch(seed=9)
    model(one["input_ids"], one["attention_mask"], labels=one["labels"])
    with torch.no_grad():
        model(**other)
    model.eval()
    model(**other)
    assert tracker.step()
    assert_same(tracker.factors, fresh(model, [one], CONFIG))


def test_a_model_whose_own_forward_is_the_pass_does_not_take_it_for_training() -> None:
    """Without a base model our pass calls the model itself, here with its root in training mode."""
    model = hand_made(recompute=True)
    model.gradient_checkpointing = True
    model.train()
    config = FitConfig("kfac", modules="up|down")
    tracker = FactorTracker(model, config, every=1, decay=0)
    labels = batch()["labels"].clone()
    labels[0] = -100
    for number in range(2):
        given = tracker._last.batch = {**batch(), "labels": labels}
        assert tracker.step()
        assert tracker._last.batch is given
        assert_same(tracker.factors, fresh(model, [{**batch(), "labels": labels}], config, number))


def test_closing_removes_the_hook() -> None:
    model = tiny("llama").train()
    with FactorTracker(model, every=1) as tracker:
        assert len(model._forward_pre_hooks) == 1
        model(**batch())
        tracker.step()
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    tracker.close()
    assert tracker.curvature()
    with pytest.raises(RuntimeError, match="no batch was seen"):
        tracker.step()


def test_a_tracked_model_can_be_copied_and_pickled() -> None:
    model = tiny("llama").train()
    tracker = FactorTracker(model, every=1)
    model(**batch())
    tracker.step()
    twin = copy.deepcopy(model)
    assert len(pickle.dumps(twin)) < 2 * sum(p.nbytes for p in model.parameters())
    twin(**batch(seed=4))
    assert torch.equal(tracker._last.batch["input_ids"], batch()["input_ids"])  # type: ignore[index]


@pytest.mark.parametrize("given", ["outer", "inner"])
def test_compiled_models(given: str) -> None:
    model = tiny("llama").train()
    compiled: Any = torch.compile(model, backend="eager")
    if given == "inner":
        compiled(**batch(seed=8)).loss.backward()
    assert unwrapped(compiled) is model
    tracker = FactorTracker(compiled if given == "outer" else model, CONFIG, every=1, decay=0)
    for number in range(2):
        compiled(**batch(seed=number)).loss.backward()
        assert tracker.step()
        assert_same(tracker.factors, fresh(model, [batch(seed=number)], CONFIG, number))


@pytest.fixture
def _no_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.usefixtures("_no_accelerator")
def test_accelerate(precision: str) -> None:
    """Its mixed precision is inside the model's forward; the output projection is found all the same."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    config = replace(CONFIG, autocast="bfloat16" if precision == "bf16" else "off")
    model = tiny("llama", torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    tracker = FactorTracker(model, config, every=1, decay=0)
    for number in range(2):
        accelerator.backward(model(**batch(seed=number)).loss)
        optimizer.step()
        optimizer.zero_grad()
        assert tracker.step()
    plain = tiny("llama", torch.float32)
    plain.load_state_dict(accelerator.unwrap_model(model).state_dict())
    assert_same_bits(tracker.factors, fresh(plain, [batch(seed=1)], config, 1))


# ------------------------------------------------------------------------------------------------ bad batches


def nan_weights(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = torch.nan


def test_a_batch_that_is_not_finite_is_left_out() -> None:
    model = tiny("llama").train()
    tracker = FactorTracker(model, CONFIG, every=1)
    model(**batch())
    tracker.step()
    before, kept = tracker.factors, sums(tracker.factors)
    good = copy.deepcopy(model.state_dict())
    nan_weights(model)
    with pytest.warns(RuntimeWarning, match=r"left out of the tracked factors: batch 1: .* NaN or infinite"):
        assert not tracker.step()
    with pytest.raises(NonFiniteError, match="batch 1: "):
        tracker.update(batch())
    assert tracker.updates == 1
    assert_same_bits(tracker.factors, before)
    assert all(torch.equal(value, kept[name]) for name, value in sums(tracker.factors).items())
    model.load_state_dict(good)
    assert tracker.step()
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_without_loss_is_left_out(first: bool) -> None:
    model, empty = tiny("llama").train(), {**batch(), "labels": torch.full_like(batch()["labels"], -100)}
    tracker = FactorTracker(model, CONFIG, every=1)
    if not first:
        tracker.update(batch())
    before = tracker.factors
    model(**empty)
    with pytest.warns(RuntimeWarning, match=r"left out .* has no loss position"):
        assert not tracker.step()
    with pytest.raises(ValueError, match="no loss position"):
        tracker.update(empty)
    assert tracker.factors == before and tracker.updates == len(before and [1])
    tracker.update(batch())
    assert tracker.updates == 1 + (not first)


def test_an_interruption_leaves_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").train()
    tracker = FactorTracker(model, CONFIG)
    tracker.update(batch())
    before, state = sums(tracker.factors), tracker.factors

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kfade.factors.FactorCollector.end_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tracker.update(batch(seed=1))
    assert all(torch.equal(value, before[name]) for name, value in sums(tracker.factors).items())
    assert_same_bits(tracker.factors, state)
    assert tracker._last.listening and all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"config": FitConfig(modules="mlp")}, ValueError, r"config.curvature is 'ekfac'; it must be 'kfac'"),
        ({"config": replace(CONFIG, layers_per_pass=2)}, ValueError, r"config.layers_per_pass is 2; it must be None"),
        ({"config": {"curvature": "kfac"}}, TypeError, "config is a dict; it must be a FitConfig"),
        ({"config": FitConfig("kfac", modules="nothing")}, ValueError, "matches no linear layer"),
        ({"every": 0}, ValueError, "every is 0; it must be at least 1"),
        ({"every": 2.0}, TypeError, r"every is 2\.0; it must be an integer"),
        ({"decay": 1.5}, ValueError, r"decay is 1\.5; it must be at most 1"),
        ({"decay": -0.1}, ValueError, r"decay is -0\.1; it must be at least 0"),
        ({"decay": "much"}, TypeError, "decay is 'much'; it must be a number"),
    ],
)
def test_options_are_checked_first(options: dict[str, Any], error: type[Exception], text: str) -> None:
    model = tiny("llama")
    with pytest.raises(error, match=text):
        FactorTracker(model, **options)
    assert not model._forward_pre_hooks
    if "modules" not in repr(options) or "'nothing'" not in repr(options):
        with pytest.raises(error, match=text):
            FactorCallback(**options)


def test_misuse_is_named() -> None:
    with pytest.raises(TypeError, match="model is a str; it must be"):
        FactorTracker("llama")  # type: ignore[arg-type]
    model = tiny("llama").train()
    tracker = FactorTracker(model)
    with pytest.raises(RuntimeError, match="no batch was seen: model must have been called, in training mode"):
        tracker.step()
    with pytest.raises(RuntimeError, match="nothing was collected yet"):
        tracker.curvature()
    with pytest.raises(RuntimeError, match="nothing was collected yet"):
        FactorCallback().curvature()
    with pytest.raises(ValueError, match="it must have input_ids"):
        tracker.update({})
    assert tracker.factors == {}


# ------------------------------------------------------------------------------------- curvature and state


def test_curvature_solves_saves_and_stands_still(tmp_path: Path) -> None:
    model, config = tiny("llama"), FitConfig("kfac", fisher="empirical")
    tracker = FactorTracker(model, config, decay=0.6)
    for seed in range(2):
        tracker.update(batch(seed=seed))
    curvature = tracker.curvature()
    assert tracker.factors["model.layers.0.mlp.up_proj"].q_in is None
    gradients = {n: torch.randn(s.d_out, s.width_in, dtype=torch.float64) for n, s in curvature.items()}
    solved = curvature.solve(gradients)
    curvature.save(tmp_path)
    tracker.update(batch(seed=7))
    loaded = kfade.Curvature.load(tmp_path, model)
    for name, layer in curvature.items():
        factor = layer.input_factor()
        q = layer.input_eigenvectors()
        assert layer.lambda_in is not None
        assert_close(q @ torch.diag(layer.lambda_in) @ q.T, factor, 1e-9, name)
        assert not float(layer.positions).is_integer()
        assert (loaded[name].positions, loaded[name].losses) == (layer.positions, layer.losses)
        assert torch.equal(loaded[name].input_factor(), factor)
    again = loaded.solve(gradients)
    for name, value in solved.items():
        assert all(torch.equal(x, y) for x, y in zip(value, again[name], strict=True))


def test_a_single_update_is_a_fit() -> None:
    model, config = tiny("gpt2"), FitConfig("kfac")
    tracker = FactorTracker(model)
    tracker.update(batch())
    ours, theirs = tracker.curvature(), kfade.fit(model, [batch()], config)
    assert ours.config == theirs.config and ours.model_id == theirs.model_id
    for name, layer in ours.items():
        assert torch.equal(layer.eigenvalues(), theirs[name].eigenvalues())
        assert torch.equal(layer.output_eigenvectors(), theirs[name].output_eigenvectors())


@pytest.mark.parametrize("through", ["dictionary", "torch", "file"])
def test_resuming_gives_the_same_bits(through: str, tmp_path: Path) -> None:
    data = [batch(seed=s) for s in range(5)]

    def run(model: nn.Module, tracker: FactorTracker, part: Sequence[Batch]) -> None:
        for one in part:
            loss = model(**one).loss
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=0.1)
                    p.grad = None
            tracker.step()

    whole = tiny("llama", torch.float32).train()
    straight = FactorTracker(whole, CONFIG, every=2, decay=0.7)
    run(whole, straight, data)

    model = tiny("llama", torch.float32).train()
    first = FactorTracker(model, CONFIG, every=2, decay=0.7)
    run(model, first, data[:3])
    first.close()
    second = FactorTracker(model, CONFIG, every=2, decay=0.7)
    if through == "file":
        first.save(tmp_path / "factors.safetensors")
        second.load(tmp_path / "factors.safetensors")
    elif through == "torch":
        torch.save(first.state_dict(), tmp_path / "factors.pt")
        second.load_state_dict(torch.load(tmp_path / "factors.pt", weights_only=True))
    else:
        second.load_state_dict(first.state_dict())
    assert_same_bits(second.factors, first.factors)
    run(model, second, data[3:])
    assert second.updates == straight.updates == 3
    assert_same_bits(second.factors, straight.factors)


def test_an_empty_state_can_be_resumed() -> None:
    model = tiny("llama")
    tracker = FactorTracker(model)
    tracker.load_state_dict(FactorTracker(model).state_dict())
    assert tracker.factors == {} and tracker.updates == 0
    tracker.update(batch())
    assert tracker.factors


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    tracker = FactorTracker(model, CONFIG)
    tracker.update(batch())
    state, before = tracker.state_dict(), tracker.factors

    def refused(text: str, changed: Mapping[str, Any], config: FitConfig = CONFIG) -> None:
        with pytest.raises(ValueError, match=text):
            FactorTracker(model, config).load_state_dict(changed)
        if config is CONFIG:
            with pytest.raises(ValueError, match=text):
                tracker.load_state_dict(changed)
            assert_same_bits(tracker.factors, before)

    refused("state has no calls, factors", {k: v for k, v in state.items() if k not in ("calls", "factors")})
    refused("config.fisher is 'empirical'", state, replace(CONFIG, fisher="empirical"))
    refused("state has other layers than the model", state, replace(CONFIG, modules="mlp"))
    short = {**state["factors"], "model.layers.0.mlp.up_proj.s_sum": torch.zeros(3)}
    refused(r"up_proj.s_sum of shape \[3\]; it must be \[576\]", {**state, "factors": short})
    name = "model.layers.0.mlp.up_proj"
    groups = copy.deepcopy(state["layers"])
    groups[name]["group"] = "elsewhere"
    refused("in the group 'elsewhere'", {**state, "layers": groups})
    groups[name]["group"] = name
    extra = {**state["factors"], f"{name}.a_sum": state["factors"]["model.layers.0.mlp.gate_proj.a_sum"]}
    with pytest.raises(ValueError, match="other input groups"):
        tracker.load_state_dict({**state, "layers": groups, "factors": extra})
    untraced = FactorTracker(model, CONFIG)
    untraced.load_state_dict({**state, "layers": groups, "factors": extra})
    with pytest.raises(ValueError, match=r"other input groups .*up_proj"):
        untraced.update(batch())

    tracker.save(tmp_path / "factors.safetensors")
    whole = (tmp_path / "factors.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    kfade.Update({"a": torch.zeros(2)}).save(tmp_path / "update.safetensors")
    for file, text in {"cut": "cannot be read", "missing": "cannot be read", "update": "has format"}.items():
        with pytest.raises(StorageError, match=text):
            tracker.load(tmp_path / f"{file}.safetensors")
    assert_same_bits(tracker.factors, before)


# ------------------------------------------------------------------------------------------- several processes

WORKER = """
import os, sys, warnings
import torch, torch.distributed as dist
from dataclasses import replace
from models import batch, tiny
from torch.nn.parallel import DistributedDataParallel
from kfade import FactorTracker, FitConfig
from kfade.fit import fit_factors
from kfade.progress import Progress
from kfade.training import update_seed

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
config = FitConfig("kfac", modules="all-linear")
empty = batch(seed=9)
empty["labels"] = torch.full_like(empty["labels"], -100)
data = [[batch("right", seed=0), batch(seed=1)], [batch("left", sequences=3, tokens=7, seed=5), empty]]

def fresh(model, one, number):
    return fit_factors(model, [one], replace(config, seed=update_seed(config, number)), Progress())

def run(tracked):
    inner = tiny("llama").train()
    model = DistributedDataParallel(inner)
    tracker = FactorTracker(model, config, every=1, decay=0.5) if tracked else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    expected = {}
    for number in range(2):
        # The empty batch has no loss to go back from; its gradients are zero.
        loss = model(**{**data[rank][number], "labels": data[rank][number]["labels"]}).logits.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if tracker is None:
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert tracker.step()
        skipped = [w for w in caught if "left out of the tracked factors" in str(w.message)]
        assert len(skipped) == (rank == number == 1), caught
        parts = [fresh(inner, data[r][number], number) for r in range(2) if (r, number) != (1, 1)]
        for name, state in tracker.factors.items():
            new = {
                "a": sum(p[name].a_sum.to_dense() for p in parts), "s": sum(p[name].s_sum.to_dense() for p in parts),
                "positions": sum(p[name].positions for p in parts), "losses": sum(p[name].losses for p in parts),
            }
            for key, value in new.items():
                expected[name, key] = value + 0.5 * expected.get((name, key), 0)
            torch.testing.assert_close(state.a_sum.to_dense(), expected[name, "a"], rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(state.s_sum.to_dense(), expected[name, "s"], rtol=1e-11, atol=1e-13)
            assert (state.positions, state.losses) == (expected[name, "positions"], expected[name, "losses"])
            for total in (state.a_sum.data, state.s_sum.data):
                other = total.clone()
                dist.broadcast(other, 0)
                assert torch.equal(other, total)
    return inner.state_dict()

plain, tracked = run(False), run(True)
assert all(torch.equal(value, tracked[name]) for name, value in plain.items())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_one_set_of_factors(tmp_path: Path) -> None:
    """Each adds its own batch; one that has none takes part, and the other is not kept waiting."""
    script, tests = tmp_path / "worker.py", Path(__file__).parent.parent
    script.write_text(WORKER)
    where = {"PYTHONPATH": os.pathsep.join([str(tests.parent / "python"), str(tests.parent), str(tests)])}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            env={**os.environ, **where, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)


# -------------------------------------------------------------------------------------- the Trainer's callback


class Rows(torch.utils.data.Dataset[Batch]):
    """Sequences of equal length, some of them padded."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, n: int) -> Batch:
        return {key: value[0] for key, value in batch("right" if n % 2 else "none", sequences=1, seed=n).items()}


def trainer(folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    AcceleratorState._reset_state(True)
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "learning_rate": 0.05,
            "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 3, **options,
        },
    )  # fmt: skip
    model = dropping("llama")
    return Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=list(callbacks))


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=repr)
@pytest.mark.usefixtures("_no_accelerator")
def test_a_trainer_ends_with_the_same_weights(options: dict[str, Any], tmp_path: Path) -> None:
    plain = trainer(tmp_path, **options)
    plain.train()
    callback = FactorCallback(CONFIG, every=2)
    tracked = trainer(tmp_path, callback, **options)
    tracked.train()
    ours, theirs = tracked.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not torch.equal(ours["model.norm.weight"], dropping("llama").state_dict()["model.norm.weight"])
    assert callback.tracker is not None and callback.tracker.updates == 3
    assert callback.tracker.config.autocast == ("bfloat16" if options.get("bf16") else "off")
    assert not tracked.model._forward_pre_hooks
    assert set(callback.curvature()) == set(kfade.fit(plain.model, [batch()], CONFIG))
    # The last step that was due is no. 5; its micro-batch is unknown here, but its counts are not.
    assert next(iter(callback.tracker.factors.values())).positions > 16


@pytest.mark.parametrize("way", ["argument", "found", "said"])
@pytest.mark.usefixtures("_no_accelerator")
def test_a_resumed_trainer_has_the_same_bits(way: str, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    straight = FactorCallback(CONFIG, every=2, decay=0.8)
    trainer(tmp_path / "run", straight, **saving).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert (checkpoint / FILE).is_file()
    resumed = FactorCallback(CONFIG, every=2, decay=0.8, resume=checkpoint if way == "said" else None)
    options = {"resume_from_checkpoint": str(checkpoint)} if way == "argument" else {}
    folder = tmp_path / ("run" if way == "found" else "elsewhere")
    again = trainer(folder, resumed, **saving, **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert straight.tracker is not None and resumed.tracker is not None
    assert resumed.tracker.updates == straight.tracker.updates == 3
    assert_same_bits(resumed.tracker.factors, straight.tracker.factors)


@pytest.mark.usefixtures("_no_accelerator")
def test_a_checkpoint_without_factors(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    callback = FactorCallback(CONFIG, every=1)
    with pytest.warns(RuntimeWarning, match=r"does not exist: the tracked factors begin anew"):
        trainer(tmp_path, callback).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.tracker is not None and callback.tracker.updates == 3
    with pytest.raises(FileNotFoundError, match=r"resume is .*; it must be a checkpoint with kfade-factors"):
        trainer(tmp_path, FactorCallback(resume=tmp_path / "checkpoint-3")).train()


@pytest.mark.usefixtures("_no_accelerator")
def test_a_run_after_one_that_failed(tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise RuntimeError("out of luck")

    callback = FactorCallback(CONFIG, every=1)
    first = trainer(tmp_path, callback, Failing())
    with pytest.raises(RuntimeError, match="out of luck"):
        first.train()
    first.remove_callback(Failing)
    first.train()
    assert callback.tracker is not None and callback.tracker.updates == 6
    assert not first.model._forward_pre_hooks


@pytest.mark.usefixtures("_no_accelerator")
def test_the_page_says_what_runs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = run_examples("training.md")
    assert found["callback"].curvature()

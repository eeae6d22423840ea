"""The baselines: gradients against their published formulas, and the loop against plain training."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Batch, batch, hand_made, roughen, tiny
from oracles import assert_close
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

import kfade
from kfade import baselines
from kfade.baselines import METHODS, BaselineConfig, Context, TrainConfig, finetune, loop, retrain, run_baseline
from kfade.batches import cycled
from kfade.loss import check_batches

CPU = torch.device("cpu")
FORGET = [batch("right", seed=1), batch("left", seed=2)]
RETAIN = [batch("right", seed=3), batch("left", seed=4), batch("none", seed=5)]


def config(method: str, **options: Any) -> BaselineConfig:
    """Steps that a tiny model feels; RMU steers the layer below the last."""
    steered = {"layer": 0} if method == "rmu" else {}
    return BaselineConfig(method=method, **{"learning_rate": 1e-3, "epochs": 2, **steered, **options})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ------------------------------------------------------------------------------------ the published formulas


def alone(data: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of each sequence, without its padding."""
    for n in range(len(data["input_ids"])):
        kept = data["attention_mask"][n].bool()
        yield data["input_ids"][n][kept], data["labels"][n][kept]


def log_p(model: nn.Module, data: Batch) -> list[tuple[Tensor, Tensor]]:
    """For each sequence, log-softmax `[n, V]` at its loss positions, and the labels there."""
    found = []
    for ids, labels in alone(data):
        logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, :-1]
        carries = labels[1:] != -100
        found.append((logits[carries].log_softmax(-1), labels[1:][carries]))
    return found


def token_nll(model: nn.Module, data: Batch) -> list[Tensor]:
    return [-logs[torch.arange(len(labels)), labels] for logs, labels in log_p(model, data)]


def distance(model: nn.Module, data: Batch, targets: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over sequences of the mean square over labelled tokens and width, of the outputs of layer 0."""
    found = []
    for ids, labels in alone(data):
        hidden = hidden_states(model, ids)
        found.append((hidden - targets(ids))[labels != -100].square().mean())
    return torch.stack(found).mean()


def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    states = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], output_hidden_states=True)
    hidden: Tensor = states.hidden_states[1][0]
    return hidden


def control_vector(seed: int, length: float) -> Tensor:
    vector = torch.rand(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return length * vector / vector.norm()


def published(method: str, options: BaselineConfig, model: nn.Module, original: nn.Module) -> Tensor:
    """γ · forget + α · retain on the first batches, written out a sequence at a time."""
    forget, retain = FORGET[0], RETAIN[1]
    nll = token_nll(model, forget)
    beta = options.beta
    if method in ("gradient_ascent", "gradient_difference"):
        value = -torch.cat(nll).mean()
    elif method == "npo":
        before = [n.sum().detach() for n in token_nll(original, forget)]
        ratio = [(b - n.sum()) for n, b in zip(nll, before, strict=True)]
        value = torch.stack([2 / beta * torch.log1p(torch.exp(beta * r)) for r in ratio]).mean()
    elif method == "simnpo":
        value = torch.stack([-2 / beta * torch.log(torch.sigmoid(beta * (n.mean() - options.delta))) for n in nll])
        value = value.mean()
    elif method == "undial":
        terms = []
        for (logs, labels), (teacher, _) in zip(log_p(model, forget), log_p(original, forget), strict=True):
            lowered = teacher - beta * nn.functional.one_hot(labels, logs.shape[1])
            terms.append(-(lowered.softmax(-1).detach() * logs).sum(-1))
        value = torch.cat(terms).mean()
    elif method == "wga":
        value = -torch.cat([torch.exp(-n).detach() ** beta * n for n in nll]).mean()
    elif method == "rmu":
        control = control_vector(options.seed, options.steering)
        value = distance(model, forget, lambda ids: control)
    else:
        value = torch.cat(nll).mean()
    value = (1.0 if options.forget_weight is None else options.forget_weight) * value
    if not options.retain_weight:
        return value
    if options.retain_loss == "activation":
        kept = distance(model, retain, lambda ids: hidden_states(original, ids).detach())
    elif options.retain_loss == "kl":
        both = zip(log_p(original, retain), log_p(model, retain), strict=True)
        kept = torch.cat([(p.exp().detach() * (p.detach() - q)).sum(-1) for (p, _), (q, _) in both]).mean()
    else:
        kept = torch.cat(token_nll(model, retain)).mean()
    return value + options.retain_weight * kept


@contextmanager
def ready(model: nn.Module, options: BaselineConfig) -> Iterator[Context]:
    """A context whose references are those of the model as it is here."""
    parameters = baselines.trained_parameters(model, options)
    originals = {id(p): p.detach().clone() for p in parameters.values()}
    forget, retain = check_batches(FORGET, CPU), check_batches(RETAIN, CPU)
    with (
        kfade.Progress().stage("") as stage,
        loop._training(model, parameters, partial=options.layer is not None),
    ):
        context = Context(model, forget[0], options, originals)
        context.prepare(forget, retain, METHODS[options.method].needs, stage)
        yield context


def gradients(context: Context, model: nn.Module) -> dict[str, Tensor]:
    """Of the loss on the first batches, for the parameters that are trained."""
    model.zero_grad()
    retain = check_batches(RETAIN, CPU)[1] if context.config.uses_retain else None
    method = METHODS[context.config.method]
    context.loss(method.objective, check_batches(FORGET, CPU)[0], retain).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = [
    ("gradient_ascent", {}),
    ("gradient_difference", {"forget_weight": 0.5, "retain_weight": 3.0}),
    ("gradient_difference", {"retain_loss": "kl"}),
    ("npo", {}),
    ("npo", {"beta": 0.7, "retain_loss": "kl"}),
    ("simnpo", {}),
    ("simnpo", {"delta": 0.3, "beta": 1.0}),
    ("undial", {"beta": 2.0}),
    ("undial", {"retain_weight": 1.0, "retain_loss": "kl"}),
    ("wga", {"beta": 0.5}),
    ("rmu", {"retain_weight": 2.0}),
    ("rmu", {"retain_loss": "nll"}),
    ("task_vector", {}),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(("method", "options"), CASES, ids=[f"{m}-{i}" for i, (m, _) in enumerate(CASES)])
def test_gradients_are_those_of_the_published_formulas(method: str, options: dict[str, Any], family: str) -> None:
    """GPT-2 ties its head to the embeddings, so the head is trained; Gemma 2 caps its logits."""
    model = tiny(family)
    original = copy.deepcopy(model)
    chosen = config(method, **options)
    if method == "rmu" and chosen.retain_loss == "nll":
        # The NLL also reaches what lies above the steered layer.
        chosen = config(method, **options, modules="mlp")
    with ready(model, chosen) as context:
        roughen(model, 0.05, seed=7)
        ours = gradients(context, model)
    model.zero_grad()
    published(method, chosen, model, original).backward()
    assert ours
    if chosen.modules == "all":
        assert set(ours) == {name for name, _ in model.named_parameters()}
    truth = dict(model.named_parameters())
    for name, gradient in ours.items():
        # float64 twice, along different roads through the padding; the norms of Gemma compute in float32.
        assert_close(gradient, truth[name].grad, 1e-5 if family == "gemma2" else 1e-9, name)


def test_npo_is_ascent_at_the_original_model_and_for_a_small_beta() -> None:
    """By sequence: `2σ(0) = 1`, so NPO is ascent on each sequence's sum, N/B times that on the token mean."""
    # A family all of whose parts compute in float64.
    model = tiny("gpt2")
    (first, *_) = check_batches(FORGET, CPU)
    factor = len(first.loss_index) / len(first.input_ids)

    def scaled(moved: float, **options: Any) -> None:
        found = []
        for method, extra in (("gradient_ascent", {}), ("npo", {"retain_weight": 0.0, **options})):
            net = copy.deepcopy(model)
            with ready(net, config(method, **extra)) as context:
                roughen(net, moved, seed=7)
                found.append(gradients(context, net))
        for name, gradient in found[1].items():
            # The weight differs from 1 by β/2 times a log ratio, below 100 here.
            assert_close(gradient, factor * found[0][name], 1e-9 + 50 * options.get("beta", 0.0) * (moved > 0), name)

    scaled(0.0, beta=0.5)
    scaled(0.05, beta=1e-6)


def test_the_control_vector_has_its_length_and_follows_the_seed() -> None:
    model = tiny("llama")

    def vector(seed: int) -> Tensor:
        with ready(model, config("rmu", seed=seed, steering=3.0)) as context:
            return context.control(16, CPU)

    assert torch.equal(vector(0), vector(0)) and not torch.equal(vector(0), vector(1))
    assert float(vector(0).norm()) == pytest.approx(3.0)
    assert_close(vector(1), control_vector(1, 3.0), 1e-12)


# --------------------------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was_and_the_same_seed_gives_the_same_bits(
    method: str, family: str, dtype: torch.dtype
) -> None:
    model = tiny(family, dtype).train()
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    updates = [run_baseline(model, FORGET, RETAIN, config(method, seed=seed)) for seed in (0, 0, 1)]
    assert same(model, before) and model.training
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    one, again, other = (update.tensors for update in updates)
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in one.values())
    assert updates[0].norm() > 0 and not updates[0].report.warnings
    # The optimiser's steps reach every parameter that is named, and no other.
    assert set(one) == set(baselines.trained_parameters(model, config(method)))


def test_rmu_trains_the_down_projections_below_its_layer_alone() -> None:
    model = tiny("llama", num_hidden_layers=5)
    update = run_baseline(model, FORGET, RETAIN, config("rmu", layer=3))
    names = {f"model.layers.{i}.mlp.down_proj.{part}" for i in (1, 2, 3) for part in ("weight", "bias")}
    assert set(update.tensors) == names and all(float(t.norm()) > 0 for t in update.tensors.values())
    assert model(**FORGET[0]).loss.isfinite()


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", r"transformer\.h\.[01]\.mlp\.c_proj\.(weight|bias)"),
        ("neox", r"gpt_neox\.layers\.[01]\.mlp\.dense_4h_to_h\.(weight|bias)"),
        ("phi", r"model\.layers\.[01]\.mlp\.fc2\.(weight|bias)"),
        ("opt", r"model\.decoder\.layers\.[01]\.fc2\.(weight|bias)"),
        ("gemma", r"model\.layers\.[01]\.mlp\.down_proj\.weight"),
    ],
)
def test_rmu_finds_the_down_projections_of_every_family(family: str, names: str) -> None:
    model = tiny(family)
    update = run_baseline(model, FORGET, RETAIN, config("rmu", layer=1))
    assert set(update.tensors) == {name for name, _ in model.named_parameters() if re.fullmatch(names, name)}
    assert all(float(tensor.norm()) > 0 for tensor in update.tensors.values())


@functools.cache
def learnt() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model that knows both sets."""
    model = tiny("llama", torch.float32, scale=0.0)
    finetune(model, FORGET + RETAIN, TrainConfig(learning_rate=1e-2, epochs=40))
    return model, weights(model)


def mean_nll(model: nn.Module, data: list[Batch]) -> float:
    with torch.no_grad():
        return float(torch.cat([nll for one in data for nll in token_nll(model, one)]).mean())


@pytest.mark.parametrize("method", METHODS)
def test_what_was_learnt_is_unlearnt(method: str) -> None:
    model, before = learnt()
    forget, retain = mean_nll(model, FORGET), mean_nll(model, RETAIN)
    assert forget < 0.2 and retain < 0.2
    # Of so narrow a model all weights take part in everything: RMU gets weights at which both sets feel it.
    options = {"layer": 1, "retain_weight": 1.0, "steering": 20.0} if method == "rmu" else {}
    update = run_baseline(model, FORGET, RETAIN, config(method, learning_rate=1e-2, epochs=10, **options))
    update.apply_(model)
    after = mean_nll(model, FORGET), mean_nll(model, RETAIN)
    update.remove_(model)
    assert same(model, before)
    # The NLL of a model that knows nothing is log 97 = 4.6.
    assert after[0] > forget + 1
    if METHODS[method].defaults.retain_loss == "nll" and METHODS[method].defaults.uses_retain:
        assert after[1] < 0.5


@pytest.mark.parametrize(("modules", "part"), [("mlp", ".mlp."), ("attention", ".self_attn."), ("up_proj", ".up_proj")])
def test_modules_chooses_what_is_trained(modules: str, part: str) -> None:
    model = tiny("llama")
    update = run_baseline(model, FORGET, RETAIN, config("npo", modules=modules))
    assert update.tensors and all(part in name for name in update.tensors)
    assert set(update.tensors) == {name for name, _ in model.named_parameters() if part in name}


@pytest.mark.parametrize("recompute", ["reentrant", "not reentrant"])
@pytest.mark.parametrize(("method", "modules"), [("npo", "all"), ("npo", "mlp"), ("rmu", "down-projections")])
def test_gradient_checkpointing_changes_nothing(method: str, modules: str, recompute: str) -> None:
    model = tiny("llama")
    plain = run_baseline(model, FORGET, RETAIN, config(method, modules=modules))
    model.gradient_checkpointing_enable({"use_reentrant": recompute == "reentrant"})
    again = run_baseline(model.train(), FORGET, RETAIN, config(method, modules=modules))
    for name, tensor in plain.tensors.items():
        assert_close(again.tensors[name], tensor, 1e-9, name)


def test_a_16_bit_model_is_trained_in_float32() -> None:
    """Steps that bfloat16 would round away add up, and the model observed is the rounded one."""
    model = tiny("llama", torch.bfloat16)
    before = weights(model)
    seen: dict[str, Tensor] = {}
    options = config("gradient_ascent", learning_rate=1e-6, epochs=8, warmup=0, schedule="constant", weight_decay=0.0)
    update = run_baseline(model, FORGET, None, options, observe=lambda *_: seen.update(weights(model)))
    changed = torch.cat([t.flatten() for t in update.tensors.values()]).abs()
    # 16 steps of Adam of 1e-6 each, mostly in one direction.
    assert 1e-6 < float(changed.median()) <= 1.7e-5
    for name, value in seen.items():
        assert torch.equal(value, (before[name].float() + update.tensors[name]).bfloat16())


def test_autocast_runs_and_stays_near_float32() -> None:
    model = tiny("llama", torch.float32)
    plain = run_baseline(model, FORGET, RETAIN, config("npo", retain_loss="kl", epochs=0.5))
    auto = run_baseline(model, FORGET, RETAIN, config("npo", retain_loss="kl", epochs=0.5, autocast="bfloat16"))
    # One step: rounding of 2^-8 a product, through two layers.
    assert auto.report.steps[0].loss == pytest.approx(plain.report.steps[0].loss, rel=0.05)


def test_the_update_reaches_what_was_observed_last_and_can_be_saved(tmp_path: Path) -> None:
    model = tiny("llama", torch.float32)
    steps: list[int] = []
    last: dict[str, Tensor] = {}

    def observe(step: int, seconds: float) -> None:
        assert seconds > 0 and not torch.is_grad_enabled()
        steps.append(step)
        last.update(weights(model))

    update = run_baseline(model, FORGET, RETAIN, config("npo", epochs=2.5), every=2, observe=observe)
    assert steps == [2, 4, 5] and [step.number for step in update.report.steps] == [1, 2, 3, 4, 5]
    loaded = kfade.Update.load(update.save(tmp_path / "run"))
    loaded.apply_(model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, last[name], rtol=1e-6, atol=1e-7)
    loaded.remove_(model)
    summary = json.loads(json.dumps(update.report.summary()))
    assert summary["config"]["method"] == "npo" and summary["seconds"] > 0
    forget, retain = (sum(b.tokens for b in check_batches(data, CPU)) for data in (FORGET, RETAIN))
    # Two and a half rounds of two forget batches, with five of the retain batches, of which no two rounds differ.
    assert 2 * forget + retain < summary["tokens"] < 3 * forget + 2 * retain


def test_observers_are_not_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("kfade.baselines.loop.time.perf_counter", lambda: now[0])
    model, seen = tiny("llama", torch.float32), []

    def training(*_: object) -> None:
        now[0] += 1.0

    def observe(step: int, seconds: float) -> None:
        seen.append((step, seconds))
        now[0] += 100.0

    handle = model.register_forward_hook(training)
    body = model.model.register_forward_hook(training)
    report = run_baseline(model, FORGET, None, config("gradient_ascent"), every=1, observe=observe).report
    handle.remove()
    body.remove()
    start = seen[0][1] - 1.0
    assert seen == [(k, start + k) for k in (1, 2, 3, 4)] and report.seconds == start + 4


def test_without_a_retain_weight_no_retain_batch_runs() -> None:
    model = tiny("llama")
    tokens = 2 * sum(b.tokens for b in check_batches(FORGET, CPU))
    for method in ("gradient_ascent", "undial", "task_vector"):
        assert run_baseline(model, FORGET, None, config(method)).report.tokens == tokens
    plain = run_baseline(model, FORGET, None, config("gradient_ascent"))
    without = run_baseline(model, FORGET, None, config("gradient_difference", retain_weight=0.0))
    assert all(torch.equal(t, without.tensors[name]) for name, t in plain.tensors.items())


def test_every_round_has_every_batch_once_and_another_order() -> None:
    checked = check_batches(RETAIN, CPU)
    numbers = [b.index for b in cycled(checked, 30, "retain 0")]
    rounds = [tuple(numbers[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(r) == [0, 1, 2] for r in rounds) and len(set(rounds)) > 1
    assert len(cycled(checked, 4, "retain 0")) == 4


def test_a_task_vector_is_what_training_adds_the_other_way() -> None:
    model = tiny("llama")
    before = weights(model)
    options = {"learning_rate": 1e-3, "epochs": 2, "seed": 3}
    trained = copy.deepcopy(model)
    finetune(trained, FORGET, TrainConfig(**options))
    seen: list[tuple[int, float]] = []

    def observe(number: int, _: float) -> None:
        learnt = dict(trained.named_parameters())
        scale = (0.25, 1.5)[number - 1]
        for name, p in model.named_parameters():
            assert_close(p, before[name] - scale * (learnt[name] - before[name]), 1e-12, name)
        seen.append((number, scale))

    chosen = BaselineConfig(method="task_vector", scales=(0.25, 1.5), **options)
    update = run_baseline(model, FORGET, None, chosen, every=1, observe=observe)
    assert seen == [(1, 0.25), (2, 1.5)] and same(model, before)
    for name, p in trained.named_parameters():
        # The difference of two nearly equal numbers keeps fewer digits.
        assert_close(update.tensors[name], -1.5 * (p - before[name]), 1e-9, name)


# ----------------------------------------------------------------------------------------- plain training


def test_finetune_is_plain_training() -> None:
    """AdamW with decay on matrices, clipping, a warm-up and a cosine, as transformers and PyTorch have them."""
    model = tiny("gpt2")
    other = copy.deepcopy(model)
    data = FORGET + RETAIN
    options = TrainConfig(learning_rate=3e-3, epochs=3, schedule="cosine", weight_decay=0.1, clip=0.5, seed=4)
    report = finetune(model, data, options)
    order = [b.index for b in cycled(check_batches(data, CPU), 15, "forget 4")]
    groups = [
        {"params": [p for p in other.parameters() if p.ndim == n], "weight_decay": decay}
        for n, decay in ((2, 0.1), (1, 0.0))
    ]
    optimiser = torch.optim.AdamW(groups, lr=3e-3, foreach=False)
    schedule = get_cosine_schedule_with_warmup(optimiser, 5, 15)
    losses = []
    for number in order:
        optimiser.zero_grad()
        nll = torch.cat(token_nll(other, data[number])).mean()
        nll.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimiser.step()
        schedule.step()
        losses.append(float(nll.detach()))
    assert [step.loss for step in report.steps] == pytest.approx(losses, rel=1e-9)
    assert any(step.gradient_norm > 0.5 for step in report.steps)
    for name, p in other.named_parameters():
        # Adam divides by the root of a variance: small gradients magnify rounding.
        assert_close(dict(model.named_parameters())[name], p, 1e-7, name)


def test_retraining_is_an_update_to_the_model_that_never_saw_the_forget_set() -> None:
    base = tiny("llama")
    options = TrainConfig(learning_rate=1e-3, epochs=2)
    model, truth = copy.deepcopy(base), copy.deepcopy(base)
    finetune(model, FORGET + RETAIN, options)
    finetune(truth, RETAIN, options)
    before = weights(base), weights(model)
    update = retrain(model, base, RETAIN, options)
    assert same(base, before[0]) and same(model, before[1])
    update.apply_(model)
    for name, p in truth.named_parameters():
        assert_close(dict(model.named_parameters())[name], p, 1e-12, name)
    with pytest.raises(ValueError, match="base differs from model in"):
        retrain(tiny("gpt2"), base, RETAIN, options)


# ------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("how", ["observer", "model"])
@pytest.mark.parametrize("method", ["npo", "rmu", "task_vector", "finetune"])
def test_an_interrupted_run_leaves_the_model_as_it_was(method: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before = weights(model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    observe = interrupt if how == "observer" else None
    if how == "model":
        steps: list[int] = []
        step = loop._Loop._step

        def failing(self: Any, number: int, loss: Tensor) -> str:
            steps.append(number)
            return interrupt() or "" if number == 3 else step(self, number, loss)

        monkeypatch.setattr(loop._Loop, "_step", failing)
    options = config(method, epochs=4) if method in METHODS else TrainConfig(learning_rate=1e-2)
    run = (
        functools.partial(run_baseline, model, FORGET, RETAIN)
        if method in METHODS
        else functools.partial(finetune, model, FORGET)
    )
    with pytest.raises(KeyboardInterrupt):
        run(options, every=3, observe=observe)
    assert same(model, before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_with_a_warning(what: str) -> None:
    model = tiny("llama", torch.float32)
    before = weights(model)
    options: dict[str, Any] = {"warmup": 0, "schedule": "constant", "epochs": 5}
    if what == "loss":
        # Weights of 1e30 are finite, and their products are not.
        options["learning_rate"] = 1e30
    else:
        seen: list[Tensor] = []

        def spoil(gradient: Tensor) -> Tensor:
            seen.append(gradient)
            return gradient * math.nan if len(seen) == 3 else gradient

        model.model.norm.weight.register_hook(spoil)
    observed: list[int] = []
    update = run_baseline(
        model, FORGET, RETAIN, config("npo", **options), every=4, observe=lambda step, _: observed.append(step)
    )
    report = update.report
    taken = len(report.steps)
    assert taken == (2 if what == "gradient" else 1) and observed == [taken]
    assert report.warnings == [
        warning
        for warning in report.warnings
        if warning.startswith(f"step {taken + 1} was not taken") and what in warning
    ]
    assert len(report.warnings) == 1 and same(model, before)
    assert all(bool(t.isfinite().all()) for t in update.tensors.values()) and update.norm() > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "magic"}, ValueError, "method is 'magic'; it must be one of gradient_ascent"),
        ({"method": "npo", "beta": 0.0}, ValueError, "beta is 0.0; it must be greater than 0"),
        ({"method": "npo", "delta": 0.1}, ValueError, "delta is 0.1; the method npo has no delta"),
        ({"method": "gradient_ascent", "retain_weight": 1.0}, ValueError, "gradient_ascent has no retain_weight"),
        ({"method": "npo", "retain_loss": "l2"}, ValueError, "retain_loss is 'l2'"),
        ({"method": "npo", "retain_loss": "activation"}, ValueError, "retain_loss is 'activation'; only"),
        ({"method": "npo", "modules": "down-projections"}, ValueError, "modules is 'down-projections'; only"),
        ({"method": "npo", "retain_weight": -1.0}, ValueError, "retain_weight is -1.0"),
        ({"method": "npo", "learning_rate": math.nan}, ValueError, "learning_rate is nan"),
        ({"method": "npo", "epochs": 0}, ValueError, "epochs is 0"),
        ({"method": "npo", "warmup": -1}, ValueError, "warmup is -1"),
        ({"method": "npo", "schedule": "step"}, ValueError, "schedule is 'step'"),
        ({"method": "npo", "clip": 0.0}, ValueError, "clip is 0.0"),
        ({"method": "npo", "modules": ""}, ValueError, "modules is ''"),
        ({"method": "npo", "autocast": "float16"}, ValueError, "autocast is 'float16'"),
        ({"method": "npo", "seed": 1.5}, TypeError, "seed is 1.5"),
        ({"method": "rmu", "layer": -1}, ValueError, "layer is -1"),
        ({"method": "task_vector", "scales": [1.0]}, TypeError, "scales is"),
        ({"method": "task_vector", "scales": (1.0, 0.0)}, ValueError, "scales is 0.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BaselineConfig(**options)


def test_bad_arguments_are_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("the model ran"))
    good = config("npo")
    for arguments, error, message in (
        ((model, [], RETAIN, good), ValueError, "forget is empty"),
        ((model, FORGET, [], good), ValueError, "retain is empty"),
        ((model, FORGET, None, good), ValueError, "retain is None"),
        ((model, FORGET, RETAIN, TrainConfig()), TypeError, "config is a TrainConfig; it must be a BaselineConfig"),
        ((model, FORGET, RETAIN, config("rmu", layer=7)), ValueError, "layer is 7; the model has the layers 0 to 1"),
        ((model, FORGET, RETAIN, config("npo", modules="none")), ValueError, "modules is 'none' and matches no"),
        ((hand_made(), FORGET, RETAIN, config("rmu")), ValueError, "layer is 0; the model has no list of decoder"),
    ):
        with pytest.raises(error, match=message):
            run_baseline(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every is -1"):
        run_baseline(model, FORGET, RETAIN, good, every=-1)
    with pytest.raises(TypeError, match="observe is a int"):
        run_baseline(model, FORGET, RETAIN, good, observe=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config is a BaselineConfig; it must be a TrainConfig"):
        finetune(model, FORGET, good)


def test_parameters_without_a_part_in_the_loss_and_labels_out_of_the_vocabulary_are_named() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"modules is 'layers\.1\.mlp'; none of these parameters has a part"):
        run_baseline(model, FORGET, RETAIN, config("rmu", modules="layers.1.mlp"))
    bad = {**FORGET[0], "labels": FORGET[0]["labels"].clone()}
    bad["labels"][2, 5] = 5_000
    with pytest.raises(ValueError, match=r"labels of batch 1 range from .* to 5000"):
        run_baseline(model, [FORGET[0], bad], RETAIN, config("npo"))


def test_the_table_has_the_published_values() -> None:
    assert METHODS["npo"].defaults.beta == 0.1 and METHODS["npo"].defaults.learning_rate == 1e-5
    assert (METHODS["simnpo"].defaults.beta, METHODS["simnpo"].defaults.forget_weight) == (4.5, 0.125)
    assert (METHODS["undial"].defaults.beta, METHODS["undial"].defaults.learning_rate) == (10.0, 1e-4)
    rmu = METHODS["rmu"].defaults
    assert (rmu.layer, rmu.steering, rmu.retain_weight, rmu.learning_rate) == (7, 6.5, 1200.0, 5e-5)
    assert METHODS["gradient_ascent"].defaults.epochs == 10 and METHODS["gradient_ascent"].defaults.beta is None
    assert all(m.source and m.description and m.name == name for name, m in METHODS.items())

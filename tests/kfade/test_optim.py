"""K-FAC as an optimiser: against dense inverses, a plain implementation, torch's own Adam; resumed, and in loops."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import Batch, batch, hand_made, sampled_labels, tiny
from optimisers import PlainKFAC
from oracles import assert_close, autograd_truth, weight_gradient
from pages import run_examples
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

import kfade
from kfade.config import KFACConfig
from kfade.optim import KFAC
from kfade.training import update_seed

# Eigenvectors of float64 against a dense inverse of a matrix whose condition damping keeps below 1e4.
TOLERANCE = 1e-9
CONFIG = KFACConfig(lr=0.3, damping=0.1, kl_clip=0.01, adam_lr=0.01, factor_every=2, refresh_every=4)
EMPIRICAL = kfade.FitConfig(curvature="kfac", fisher="empirical", modules="all-linear")


def model_of(kind: str, **options: Any) -> Any:
    return tiny(kind, **options).train()


def loss_of(model: nn.Module, data: Batch) -> Tensor:
    """The mean cross-entropy of the next tokens, also of models that compute no loss themselves."""
    if hasattr(model, "config"):
        return model(**data).loss  # type: ignore[no-any-return]
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    loss: Tensor = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten())
    return loss


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    """Losses of some steps, each on a batch of its own."""
    losses = []
    for number in range(first, first + steps):
        data = batch("right", seed=number)
        optimiser.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))


def layout(layer: kfade.LayerCurvature, matrix: Tensor) -> list[Tensor]:
    """`[d_out, d_in (+ 1)]` as the parameters of a layer have it: the weight, and the bias if there is one."""
    weight = matrix[:, : layer.d_in]
    weight = weight.T if layer.transposed else weight
    return [weight, matrix[:, layer.d_in]] if layer.has_bias else [weight]


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("damping_kind", ["relative", "absolute"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_step_is_that_of_the_dense_inverse(kind: str, damping_kind: str, fisher: str) -> None:
    model, data = model_of(kind, num_hidden_layers=1) if kind == "llama" else model_of(kind, n_layer=1), batch("right")
    model_before = copy.deepcopy(model)
    fit = kfade.FitConfig(curvature="kfac", fisher=fisher, modules="mlp")
    optimiser = KFAC(model, CONFIG, damping_kind=damping_kind, fit=fit, damping=0.02, weight_decay=0.1)
    loss_of(model, data).backward()
    rest = optimiser.param_groups[1]["params"]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    names = [n.removesuffix(".weight") for n, p in model.named_parameters() if ".mlp." in n and p.ndim > 1]
    joint = {n: weight_gradient(model.get_submodule(n)) for n in names}
    optimiser.step()
    factors = optimiser.tracker.factors

    labels = [data["labels"]] if fisher == "empirical" else sampled_labels(model_before, [data], update_seed(fit, 0))
    truth = autograd_truth(model_before, names, [data], labels)
    solved = {}
    for name, one in truth.items():
        losses = int(((labels[0][:, 1:] != -100) & (data["attention_mask"][:, :-1] != 0)).sum())
        a, s = one.a_sum / one.positions, one.s_sum / losses
        fisher_block = torch.kron(s, a)
        size = len(fisher_block)
        unit = float(fisher_block.trace()) / size if damping_kind == "relative" else 1.0
        damped = fisher_block + 0.02 * unit * torch.eye(size, dtype=torch.float64)
        solved[name] = torch.linalg.solve(damped, joint[name].reshape(-1)).reshape(joint[name].shape)
    total = sum(float((x * joint[n]).sum()) for n, x in solved.items())
    scale = min(1.0, math.sqrt(CONFIG.kl_clip / (CONFIG.lr**2 * total)))
    assert scale < 1  # the clip is at work
    for name, x in solved.items():
        module, before = model.get_submodule(name), model_before.get_submodule(name)
        wanted = layout(factors[name], x)
        for part, p, old in zip(wanted, module.parameters(), before.parameters(), strict=True):
            shrink = 1 - 0.1 * CONFIG.lr if p.ndim > 1 else 1
            assert_close(p.detach(), shrink * old.detach() - CONFIG.lr * scale * part, TOLERANCE, name)

    # What is not tracked takes the step of torch's AdamW, without decay where there is one dimension.
    plain = [copy.deepcopy(p) for n, p in model_before.named_parameters() if n.rpartition(".")[0] not in names]
    untracked = [n for n, _ in model_before.named_parameters() if n.rpartition(".")[0] not in names]
    groups = [{"params": [p for p in plain if (p.ndim > 1) == wide], "weight_decay": 0.1 * wide} for wide in (0, 1)]
    adam = torch.optim.AdamW(groups, lr=CONFIG.adam_lr)
    for p, name in zip(plain, untracked, strict=True):
        p.grad = gradients[name]
    adam.step()
    assert len(rest) == len(plain)
    for p, name in zip(plain, untracked, strict=True):
        assert_close(model.get_parameter(name).detach(), p.detach(), TOLERANCE, name)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_many_steps_are_those_of_a_plain_implementation(momentum: float) -> None:
    config = KFACConfig(
        lr=0.05, momentum=momentum, damping=1.0, kl_clip=1e-4, adam_lr=0.01, factor_every=2, refresh_every=4,
        decay=0.7, fit=EMPIRICAL,
    )  # fmt: skip
    ours = model_of("llama", attention_bias=False, mlp_bias=False)
    theirs = copy.deepcopy(ours)
    optimiser, plain = KFAC(ours, config), PlainKFAC(theirs, config)
    clipped = 0
    for number in range(9):
        ids = batch("none", seed=number)["input_ids"]
        data = {"input_ids": ids, "labels": ids}
        loss = ours(**data).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        plain.train(theirs, data)
        clipped += plain.scale < 1
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert_close(p.detach(), q.detach(), TOLERANCE, f"{name} after {number + 1} steps")
    assert clipped


def test_the_clip_bounds_the_step_exactly() -> None:
    for kl_clip in (1e-6, None):
        model = model_of("llama")
        data = batch("none")
        optimiser = KFAC(model, CONFIG, momentum=0.0, kl_clip=kl_clip)
        before = parameters(model)
        loss_of(model, data).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimiser.step()
        tracked = {id(p) for p in optimiser.param_groups[0]["params"]}
        size = sum(
            float(((before[n] - p.detach()) * gradients[n]).sum()) * CONFIG.lr
            for n, p in model.named_parameters()
            if id(p) in tracked
        )
        if kl_clip is not None:
            # lr² ⟨νG̃, νG⟩ = kl_clip; one ν is in the step already.
            unclipped = size
            bound = kl_clip
        else:
            assert unclipped**2 / size == pytest.approx(bound, rel=1e-9)


def test_a_scheduler_scales_both_groups() -> None:
    model = model_of("llama")
    optimiser = KFAC(model, CONFIG)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5**step)
    for _ in range(2):
        train(model, optimiser, 1)
        scheduler.step()
    assert [g["lr"] for g in optimiser.param_groups] == [CONFIG.lr / 4, CONFIG.adam_lr / 4]
    # With a learning rate of zero, as at the first step of a warm-up, nothing moves.
    for group in optimiser.param_groups:
        group["lr"] = 0.0
    before = parameters(model)
    train(model, optimiser, 1)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert get_cosine_schedule_with_warmup(optimiser, 2, 10).get_last_lr() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    # Seven steps, so that it goes on between two refreshes and the factors have moved on since.
    whole = model_of("gpt2", dtype=dtype, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    optimiser = KFAC(whole, CONFIG)
    train(whole, optimiser, 7)
    halved = copy.deepcopy(whole)
    torch.save({"model": whole.state_dict(), "optimiser": optimiser.state_dict()}, tmp_path / "state.pt")
    losses = train(whole, optimiser, 5, first=7)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = KFAC(halved, lr=7.0, factor_every=2, refresh_every=4)
    fresh.load_state_dict(saved["optimiser"])
    assert all(s["momentum_buffer"].dtype == torch.float32 for s in fresh.state.values() if "momentum_buffer" in s)
    assert train(halved, fresh, 5, first=7) == losses
    assert same(whole, halved)
    # What was loaded is a copy.
    again = torch.load(tmp_path / "state.pt", weights_only=True)["optimiser"]
    assert str(again) == str(saved["optimiser"])


def test_state_before_the_first_step_can_be_loaded() -> None:
    model = model_of("llama")
    twin = copy.deepcopy(model)
    optimiser, other = KFAC(model, CONFIG), KFAC(twin, CONFIG)
    other.load_state_dict(optimiser.state_dict())
    assert train(model, optimiser, 3) == train(twin, other, 3)
    assert same(model, twin)


def test_what_has_no_gradient_is_left_alone() -> None:
    model = model_of("llama")
    frozen = "model.layers.0.mlp.up_proj"
    model.get_submodule(frozen).requires_grad_(False)
    model.get_parameter("model.layers.1.mlp.down_proj.bias").requires_grad_(False)
    model.model.norm.requires_grad_(False)
    optimiser, before = KFAC(model, CONFIG, weight_decay=0.1), parameters(model)
    train(model, optimiser, 3)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    # A step without any gradient at all is none.
    optimiser.zero_grad()
    before = parameters(model)
    optimiser.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("sharing", ["tied", "twice"])
def test_layers_that_share_a_weight_are_stepped_once(sharing: str) -> None:
    model = hand_made(sharing).train()
    modules = "first|second|gate|up|down" if sharing == "tied" else "first|gate|up|down"
    optimiser = KFAC(model, CONFIG, fit=kfade.FitConfig(curvature="kfac", modules=modules))
    sizes = [len(g["params"]) for g in optimiser.param_groups]
    assert sum(sizes) == len(list(model.parameters()))
    losses = train(model, optimiser, 30)
    assert all(map(math.isfinite, losses))


def test_a_closure_is_evaluated_with_gradients() -> None:
    model, twin = model_of("llama"), model_of("llama")
    data = batch("right")
    optimiser, other = KFAC(model, CONFIG), KFAC(twin, CONFIG)
    expected = loss_of(twin, data)
    expected.backward()
    other.step()

    def closure() -> float:
        optimiser.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return float(loss.detach())

    assert optimiser.step(closure) == float(expected.detach())
    assert same(model, twin)


def test_loss_scaling_skips_an_overflowed_step_and_changes_no_other() -> None:
    model, twin = model_of("llama", dtype=torch.float32), model_of("llama", dtype=torch.float32)
    optimiser, other = KFAC(model, CONFIG), KFAC(twin, CONFIG)
    # A power of two, which rounds nothing.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for number in range(3):
        data = batch("right", seed=number)
        for m, o in ((model, optimiser), (twin, other)):
            o.zero_grad()
            loss = loss_of(m, data)
            (scaler.scale(loss) if m is model else loss).backward()
            if m is model:
                scaler.unscale_(o)
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
        scaler.step(optimiser)
        scaler.update()
        other.step()
        assert same(model, twin)
    optimiser.zero_grad()
    scaler.scale(loss_of(model, data)).backward()
    model.lm_head.weight.grad[0, 0] = math.inf
    before = parameters(model)
    scaler.step(optimiser)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimiser.steps == 3


def test_a_nan_goes_where_adamw_would_take_it() -> None:
    model = model_of("llama")
    optimiser = KFAC(model, CONFIG)
    train(model, optimiser, 1)
    optimiser.zero_grad()
    loss_of(model, batch("right")).backward()
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.grad[0, 0] = math.nan
    optimiser.step()
    assert weight.isnan().any()


def test_a_first_batch_that_cannot_be_collected_moves_no_tracked_layer() -> None:
    model = model_of("llama")
    optimiser, before = KFAC(model, CONFIG, factor_every=10), parameters(model)
    data = {**batch("right"), "labels": torch.full((4, 9), -100)}
    model(**data)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(RuntimeWarning, match="has no loss position"):
        optimiser.step()
    tracked = {id(p) for p in optimiser.param_groups[0]["params"]}
    assert all(torch.equal(p, before[n]) is (id(p) in tracked) for n, p in model.named_parameters())
    # The next batch is collected, due or not.
    assert all(map(math.isfinite, train(model, optimiser, 2)))
    assert optimiser.tracker.updates == 1


def test_bf16_parameters_have_float32_state() -> None:
    model = model_of("llama", dtype=torch.bfloat16)
    optimiser = KFAC(model, CONFIG)
    assert all(map(math.isfinite, train(model, optimiser, 4)))
    tensors = [x for state in optimiser.state.values() for x in state.values() if isinstance(x, Tensor)]
    assert tensors and all(x.dtype == torch.float32 for x in tensors)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


class Softmax(nn.Module):
    """Softmax regression as a language model: fixed features of each token, of very different scales."""

    def __init__(self, words: int = 20, width: int = 12) -> None:
        super().__init__()
        features = torch.randn(words, width, dtype=torch.float64) * torch.logspace(0, -2, width, dtype=torch.float64)
        self.embed = nn.Embedding.from_pretrained(features)
        self.linear = nn.Linear(width, words, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.linear.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.linear(self.embed(input_ids)))


def test_ill_conditioned_features_take_few_steps() -> None:
    model = Softmax().train()
    # Each token is followed by the token that another weight of this kind finds most likely.
    truth = torch.randn_like(model.linear.weight) / model.embed.weight.std(0)
    words = len(model.embed.weight)
    following = (model.embed.weight @ truth.T).argmax(1)
    ids = torch.stack([torch.arange(words), following], dim=1)
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    best = {}
    for name in ("kfac", "sgd"):
        found = []
        for lr in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0):
            nn.init.zeros_(model.linear.weight)
            optimiser: torch.optim.Optimizer
            if name == "kfac":
                fit = kfade.FitConfig(curvature="kfac", modules="linear", samples=8)
                optimiser = KFAC(
                    model, lr=lr, momentum=0.0, damping=1e-3, kl_clip=None, factor_every=1, refresh_every=1, fit=fit
                )
            else:
                optimiser = torch.optim.SGD(model.linear.parameters(), lr=lr)
            for _ in range(20):
                optimiser.zero_grad()
                loss = loss_of(model, data)
                loss.backward()
                optimiser.step()
            found.append(float(loss_of(model, data).detach()))
        best[name] = min(x for x in found if math.isfinite(x))
    assert best["kfac"] < 0.25 * best["sgd"]


def test_a_wrapped_model_is_trained_as_if_it_were_not() -> None:
    model, twin = model_of("llama"), model_of("llama")
    wrapped = nn.DataParallel(model)
    optimiser, other = KFAC(wrapped, CONFIG), KFAC(twin, CONFIG)
    for number in range(3):
        data = batch("right", seed=number)
        optimiser.zero_grad()
        wrapped(**data).loss.backward()
        optimiser.step()
    train(twin, other, 3)
    assert same(model, twin)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_trains_with_it_and_resumes(accumulate: int, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    rows = [
        {"input_ids": x, "labels": x} for x in torch.randint(3, 97, (16, 8), generator=torch.Generator().manual_seed(3))
    ]

    def trainer(steps: int) -> Trainer:
        model = model_of("llama", dtype=torch.float32)
        optimiser = KFAC(model, CONFIG)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, save_steps=3, report_to=[],
            gradient_accumulation_steps=accumulate, use_cpu=True, disable_tqdm=True, max_grad_norm=1.0,
        )  # fmt: skip
        made = Trainer(
            model,
            arguments,
            train_dataset=rows,
            optimizers=(optimiser, get_cosine_schedule_with_warmup(optimiser, 2, 6)),
        )
        if steps:
            made.train()
        return made

    whole = trainer(6)
    assert whole.state.global_step == 6
    resumed = trainer(0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(whole.model, resumed.model)


def test_accelerate_prepares_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, twin = model_of("llama", dtype=torch.float32), model_of("llama", dtype=torch.float32)
    optimiser, other = KFAC(model, CONFIG), KFAC(twin, CONFIG)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model, optimiser)
    for number in range(3):
        wrapped.zero_grad()
        accelerator.backward(loss_of(prepared, batch("right", seed=number)))
        wrapped.step()
    train(twin, other, 3)
    assert same(model, twin)
    other.load_state_dict(wrapped.state_dict())


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"lr": -1.0}, ValueError, "lr is -1.0; it must be at least 0"),
        ({"lr": "fast"}, TypeError, "lr is 'fast'; it must be a number"),
        ({"momentum": 1.0}, ValueError, "momentum is 1.0; it must be below 1"),
        ({"damping": math.nan}, ValueError, "damping is nan; it must be finite"),
        ({"damping_kind": "none"}, ValueError, "damping_kind is 'none'; it must be one of relative, absolute"),
        ({"kl_clip": 0.0}, ValueError, "kl_clip is 0.0; it must be greater than 0"),
        ({"factor_every": 0}, ValueError, "factor_every is 0; it must be at least 1"),
        ({"refresh_every": 2.5}, TypeError, "refresh_every is 2.5; it must be an integer"),
        ({"decay": 1.5}, ValueError, "decay is 1.5; it must be at most 1"),
        ({"fit": "mlp"}, TypeError, "fit is a str; it must be a FitConfig"),
        ({"fit": kfade.FitConfig()}, ValueError, "fit.curvature is 'ekfac'; it must be 'kfac'"),
        ({"adam_betas": 0.9}, TypeError, "adam_betas is 0.9; it must be a pair of numbers"),
        ({"adam_betas": (0.9, 1.0)}, ValueError, "adam_betas[1] is 1.0; it must be below 1"),
        ({"learning_rate": 1.0}, TypeError, "KFAC has no options ['learning_rate']; it has ['adam_betas'"),
        ({"config": 0.1}, TypeError, "config is a float; it must be a KFACConfig"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    model = model_of("llama")
    with pytest.raises(kind) as error:
        KFAC(model, **options)
    assert text in str(error.value)
    assert not model._forward_pre_hooks


def test_other_misuse_is_refused() -> None:
    model = model_of("llama")
    optimiser = KFAC(model, CONFIG)
    with pytest.raises(ValueError, match="KFAC has its two parameter groups from its model"):
        optimiser.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(RuntimeError, match="no batch was seen"):
        optimiser.step()
    plain = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="it must be that of a KFAC, which has 'kfac'"):
        optimiser.load_state_dict(plain.state_dict())
    train(model, optimiser, 1)
    other = KFAC(model_of("llama", num_hidden_layers=1), CONFIG)
    with pytest.raises(ValueError, match="state_dict is of layers"):
        other.load_state_dict(optimiser.state_dict())


def test_examples_run() -> None:
    found = run_examples("optimisers.md")
    for losses in (found["losses"], found["soap_losses"]):
        assert losses[-1] < 0.8 * losses[0]

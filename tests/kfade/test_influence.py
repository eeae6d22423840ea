"""Influence scores, against per-sequence gradients by autograd, kronfluence, and retraining without a sequence."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import VOCABULARY, Batch, batch, hand_made, loss_positions, tiny
from oracles import Sizes, assert_close, autograd_truth, dense_solve, relative
from pages import run_examples
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import kfade
from kfade import influence as _function  # the function hides its module of the same name
from kfade.cli import app
from kfade.data import make_batches, read_records

module = __import__("sys").modules[_function.__module__]

TOLERANCE = 1e-9
DAMPING = 0.1


def queries(padding: str) -> list[Batch]:
    return [batch(padding, sequences=3, tokens=7, seed=5), batch("none", sequences=2, tokens=4, seed=6)]


def training(padding: str) -> list[Batch]:
    return [batch(padding, seed=7), batch(padding, sequences=3, tokens=6, seed=8)]


def alone(batches: Sequence[Batch]) -> list[Batch]:
    """Every sequence as a batch of its own."""
    return [{k: v[n : n + 1] for k, v in one.items()} for one in batches for n in range(len(one["input_ids"]))]


def cut(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def by_autograd(
    model: nn.Module,
    curvature: kfade.Curvature,
    asked: Sequence[Batch],
    trained: Sequence[Batch],
    members: Mapping[str, Sequence[str]] | None = None,
    damping: float = DAMPING,
    rank: int | None = None,
) -> Tensor:
    """The scores from one gradient a sequence and F written out as a matrix; solved queries cut to a rank, or not."""
    layers = members or {name: [name] for name in curvature}
    left, right = (autograd_truth(model, layers, data) for data in (asked, trained))
    scores = torch.zeros(len(next(iter(left.values())).gradients), len(next(iter(right.values())).gradients)).double()
    for name, layer in curvature.items():
        q_out = torch.eye(layer.d_out, dtype=torch.float64) if layer.q_out is None else layer.q_out
        q_in = torch.eye(layer.width_in, dtype=torch.float64) if layer.q_in is None else layer.q_in
        spectrum = layer.eigenvalues().double()
        absolute = damping * float(spectrum.mean())
        rows = torch.stack([g.reshape(-1) for g in right[name].gradients])
        for q, gradient in enumerate(left[name].gradients):
            solved = dense_solve(gradient, q_out, q_in, spectrum, absolute)
            if rank is not None and rank * (layer.d_out + layer.d_in) < layer.d_out * layer.d_in:
                solved = cut(solved, rank)
            scores[q] += rows @ solved.reshape(-1)
    return scores


MODELS = {
    "llama": (r"layers\.1\.(mlp|self_attn)", None),
    "gpt2": ("h.0", None),
    "hand-made": ("first|second|gate|up|down", None),
    "hand-made twice": ("first|gate|up|down", None),
    "hand-made tied": ("first|second|gate", {"first": ["first", "second"], "gate": ["gate"]}),
}


def model_of(kind: str) -> nn.Module:
    name, _, sharing = kind.partition(" ")
    if name == "hand-made":
        return hand_made(sharing or "none")
    return tiny(name, **({"n_embd": 8} if name == "gpt2" else {}))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_scores_are_those_of_per_sequence_gradients(kind: str, padding: str) -> None:
    model, (modules, members) = model_of(kind), MODELS[kind]
    curvature = kfade.fit(model, training(padding), kfade.FitConfig(modules=modules))
    found = kfade.influence(model, curvature, queries(padding), training(padding))
    truth = by_autograd(model, curvature, queries(padding), training(padding), members)
    assert found.scores.dtype == torch.float64
    assert_close(found.scores, truth, TOLERANCE)
    assert found.losses == loss_positions(training(padding))


@pytest.mark.parametrize("curvature", ["identity", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("damping", [0.1, 2.0])
def test_every_curvature(curvature: str, damping: float) -> None:
    model = tiny("gpt2", n_embd=8)
    fitted = kfade.fit(model, training("right"), kfade.FitConfig(curvature=curvature, modules="h.1.mlp"))
    config = kfade.InfluenceConfig(damping=damping)
    found = kfade.influence(model, fitted, queries("right"), training("right"), config)
    truth = by_autograd(model, fitted, queries("right"), training("right"), damping=damping)
    assert_close(found.scores, truth, TOLERANCE)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_low_rank_queries_are_cut_singular_value_decompositions(kind: str, padding: str) -> None:
    model, (modules, members) = model_of(kind), MODELS[kind]
    curvature = kfade.fit(model, training(padding), kfade.FitConfig(modules=modules))
    config = kfade.InfluenceConfig(query_rank=3)
    found = kfade.influence(model, curvature, queries(padding), training(padding), config)
    truth = by_autograd(model, curvature, queries(padding), training(padding), members, rank=3)
    assert_close(found.scores, truth, TOLERANCE)
    whole = kfade.influence(model, curvature, queries(padding), training(padding))
    assert relative(found.scores, whole.scores) > 1e-3


@pytest.mark.parametrize("curvature", ["identity", "diagonal", "kfac", "ekfac"])
def test_low_rank_queries_of_every_curvature(curvature: str) -> None:
    """With so few rows that the solve rotates them, with many, with one and with none."""
    model = tiny("gpt2")
    fitted = kfade.fit(model, training("right"), kfade.FitConfig(curvature=curvature, modules="h.1.mlp.c_fc"))
    (layer,) = fitted.values()
    rows = [(torch.randn(n, layer.d_out).double(), torch.randn(n, layer.width_in).double()) for n in (2, 50, 1, 0)]
    found = list(module.solve_rows_to_rank(layer, rows, 0.3, 3))
    for (left, right), (g, a) in zip(found, rows, strict=True):
        assert left.shape == (3, layer.d_out) and right.shape == (3, layer.width_in)
        assert_close(left.T @ right, cut(layer.solve(g.T @ a, 0.3), 3), TOLERANCE)


def test_a_rank_that_saves_nothing_keeps_queries_whole() -> None:
    model = tiny("llama")
    curvature = kfade.fit(model, training("right"), kfade.FitConfig(modules="mlp|self_attn"))
    shapes = {(state.d_out, state.d_in) for state in curvature.values()}
    assert shapes == {(24, 16), (16, 24), (16, 16)}
    whole = kfade.influence(model, curvature, queries("right"), training("right")).scores
    scores = {}
    # 16·16 / (16 + 16) = 8 for attention, and 16·24 / (16 + 24) = 9.6 for the MLP.
    for rank in (1, 2, 4, 7, 9, 10, 1000):
        config = kfade.InfluenceConfig(query_rank=rank)
        kept = {module.rank_kept(state, rank) for state in curvature.values()}
        assert kept == ({rank} if rank < 8 else {rank, None} if rank < 9.6 else {None})
        scores[rank] = kfade.influence(model, curvature, queries("right"), training("right"), config).scores
    assert torch.equal(scores[10], whole) and torch.equal(scores[1000], whole)
    errors = [relative(scores[rank], whole) for rank in (1, 4, 9)]
    assert errors[0] > errors[1] > errors[2] > 0
    agreement = [float(correlation(scores[rank], whole).mean()) for rank in (1, 4)]
    # Gradients of few tokens have few large directions; measured: 0.90 and 0.994.
    assert 0.8 < agreement[0] < agreement[1] and agreement[1] > 0.98


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (300, 700), (700, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_matrix_of_a_rank(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Singular values that fall like those of a solved gradient of random weights, slowly: the hard case."""
    u, v = (torch.linalg.qr(torch.randn(n, min(shape), dtype=torch.float64)).Q for n in shape)
    values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -0.5
    matrix = ((u * values) @ v.T).to(dtype)
    state = torch.get_rng_state()
    for rank in (1, 8, 12):
        left, right = module.to_rank(matrix, rank)
        assert left.dtype == right.dtype == dtype
        assert left.shape == (rank, shape[0]) and right.shape == (rank, shape[1])
        error, tail = float((matrix - left.T @ right).double().norm()), float(values[rank:].norm())
        # Above EXACT_SIDE it is found in a subspace, which the docstring promises to three digits.
        assert error < tail * (1 + (1e-6 if min(shape) <= module.EXACT_SIDE else 1e-3))
        assert_close(left @ left.T, torch.eye(rank, dtype=dtype), 1e-5)
        again = module.to_rank(matrix.clone(), rank)
        assert torch.equal(again[0], left) and torch.equal(again[1], right)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(40, 30), (300, 400)])
def test_a_matrix_of_the_rank_is_kept_as_it_is(shape: tuple[int, int]) -> None:
    for matrix in (torch.randn(shape[0], 3).double() @ torch.randn(3, shape[1]).double(), torch.zeros(shape).double()):
        left, right = module.to_rank(matrix, 5)
        assert float((left.T @ right - matrix).norm()) <= 1e-12 * float(matrix.norm())


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("number", "rank"), [(1, 1), (2, 3), (9, 1), (9, 2), (60, 4)])
def test_low_rank_scores_are_the_formula(
    monkeypatch: pytest.MonkeyPatch, number: int, rank: int, bias: bool, tokens: int
) -> None:
    """On both routes: few queries meet tokens, many meet gradients."""
    monkeypatch.setattr(module, "SLAB", 100)
    g, a = torch.randn(4, tokens, 11).double(), torch.randn(4, tokens, 7).double()
    left, right = torch.randn(number, rank, 11).double(), torch.randn(number, rank, 7).double()
    side = torch.randn(number, 11).double() if bias else None
    truth = torch.einsum("qko,qki,bto,bti->qb", left, right, g, a)
    truth += 0 if side is None else torch.einsum("qo,bto->qb", side, g)
    assert_close(module.sequence_scores(module.Solved(right, left, side), g, a), truth, 1e-13)


@pytest.mark.parametrize(("number", "forms"), [(2, False), (60, True)])
def test_low_rank_scores_form_neither_gradients_nor_queries(
    monkeypatch: pytest.MonkeyPatch, number: int, forms: bool
) -> None:
    monkeypatch.setattr(module, "SLAB", 4096)
    sequences, tokens, d_out, d_in = 8, 40, 64, 32
    g, a = torch.randn(sequences, tokens, d_out), torch.randn(sequences, tokens, d_in)
    solved = module.Solved(torch.randn(number, 4, d_in), torch.randn(number, 4, d_out))
    with Sizes() as sizes:
        module.sequence_scores(solved, g, a)
    assert bool(sizes.shapes_of("bmm")) == forms
    given = max(x.numel() for x in (g, a, solved.weight, solved.left))
    assert sizes.largest <= max(given, 4096)
    # Less than the gradients of the sequences, and of many queries less than those.
    assert sizes.largest < (number if forms else sequences * 2) * d_out * d_in


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("number", [1, 2, 9])
def test_sequence_scores_are_the_formula(monkeypatch: pytest.MonkeyPatch, number: int, bias: bool, tokens: int) -> None:
    monkeypatch.setattr(module, "SLAB", 100)
    g, a = torch.randn(4, tokens, 11).double(), torch.randn(4, tokens, 7).double()
    weight, side = torch.randn(number, 11, 7).double(), torch.randn(number, 11).double() if bias else None
    truth = torch.einsum("qoi,bto,bti->qb", weight, g, a)
    truth += 0 if side is None else torch.einsum("qo,bto->qb", side, g)
    assert_close(module.sequence_scores(module.Solved(weight, None, side), g, a), truth, 1e-13)


@pytest.mark.parametrize("number", [1, 6])
def test_no_per_sequence_gradient_is_kept(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(module, "SLAB", 1024)
    sequences, tokens, d_out, d_in = 8, 5, 64, 32
    g, a, weight = torch.randn(sequences, tokens, d_out), torch.randn(sequences, tokens, d_in), None
    weight = torch.randn(number, d_out, d_in)
    with Sizes() as sizes:
        module.sequence_scores(module.Solved(weight), g, a)
    # Less than the gradient of one sequence.
    assert sizes.largest <= max(1024, sequences * tokens * d_out, number * d_in * 4)
    assert sizes.largest < sequences * d_out * d_in / 4


@pytest.mark.parametrize("curvature", ["identity", "diagonal", "kfac", "ekfac"])
def test_queries_are_solved_from_their_rows(curvature: str) -> None:
    """With so few rows that the solve rotates them, with many, with one and with none."""
    model = tiny("gpt2")
    fitted = kfade.fit(model, training("right"), kfade.FitConfig(curvature=curvature, modules="h.1.mlp.c_fc"))
    (layer,) = fitted.values()
    rows = [(torch.randn(n, layer.d_out).double(), torch.randn(n, layer.width_in).double()) for n in (2, 50, 1, 0)]
    for solution, (g, a) in zip(module.solve_rows(layer, rows, 0.3), rows, strict=True):
        assert_close(solution, layer.solve(g.T @ a, 0.3), TOLERANCE)


def test_batches_and_groups_change_nothing() -> None:
    model = tiny("llama")
    curvature = kfade.fit(model, training("right"), kfade.FitConfig())
    whole = kfade.influence(model, curvature, queries("right"), training("right")).scores
    assert whole.shape == (5, 7)
    single = kfade.influence(model, curvature, alone(queries("right")), alone(training("right"))).scores
    assert_close(single, whole, TOLERANCE)
    size = sum(s.d_out * s.width_in for s in curvature.values()) * 8
    for kept in (1, 2 * size, 2 * size + size // 2, 4 * size, 100 * size):
        progress = kfade.Progress()
        config = kfade.InfluenceConfig(solved_bytes=kept)
        found = kfade.influence(model, curvature, queries("right"), training("right"), config, progress=progress)
        assert_close(found.scores, whole, TOLERANCE, f"{kept} bytes")
        passes = -(-5 // max(1, kept // size))
        assert len(progress.costs) == 2 * passes
        assert progress.costs[1].units == sum(int(b["attention_mask"].sum()) for b in training("right"))
    turned = kfade.influence(model, curvature, queries("right")[::-1], training("right")[::-1]).scores
    assert_close(turned[[2, 3, 4, 0, 1]][:, [3, 4, 5, 6, 0, 1, 2]], whole, TOLERANCE)
    again = kfade.influence(model, curvature, queries("right"), training("right")).scores
    assert torch.equal(again, whole)


def test_low_rank_queries_take_less_room() -> None:
    model = tiny("gpt2")
    curvature = kfade.fit(model, training("right"), kfade.FitConfig())
    size = 8 * sum(2 * (s.d_out + s.d_in) + s.d_out for s in curvature.values())
    assert 3 * size < 8 * sum(s.d_out * s.width_in for s in curvature.values())
    config = kfade.InfluenceConfig(query_rank=2)
    whole = kfade.influence(model, curvature, queries("right"), training("right"), config).scores
    for kept in (2 * size, 5 * size - 1, 5 * size):
        progress = kfade.Progress()
        config = kfade.InfluenceConfig(query_rank=2, solved_bytes=kept)
        found = kfade.influence(model, curvature, alone(queries("right")), training("right"), config, progress=progress)
        assert_close(found.scores, whole, TOLERANCE)
        assert len(progress.costs) == 2 * -(-5 // (kept // size))
    again = kfade.influence(
        model, curvature, queries("right"), training("right"), replace(config, solved_bytes=1 << 30)
    )
    assert torch.equal(again.scores, whole)


@pytest.mark.parametrize("recompute", [True, False])
def test_gradient_checkpoints_change_nothing(recompute: bool) -> None:
    scores = []
    for how in (None, recompute):
        model = hand_made(recompute=how)
        curvature = kfade.fit(model, training("left"), kfade.FitConfig(modules="first|gate|down"))
        scores.append(kfade.influence(model, curvature, queries("left"), training("left")).scores)
    assert_close(scores[1], scores[0], TOLERANCE)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama").train()
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    curvature = kfade.fit(model, training("right"), kfade.FitConfig())
    kfade.influence(model, curvature, queries("right"), training("right"))
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert model.training
    assert [p.requires_grad for p in model.parameters()][:2] == [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    # 16-bit gradients carry 8 digits (bits) each, and F, whose eigenvalues damping holds above a tenth, is theirs too.
    [(torch.float32, "off", 1e-4), (torch.bfloat16, "off", 0.1), (torch.float32, "bfloat16", 0.1)],
)
@pytest.mark.parametrize("rank", [None, 4])
def test_other_dtypes_are_near(rank: int | None, dtype: torch.dtype, autocast: str, tolerance: float) -> None:
    options = kfade.InfluenceConfig(query_rank=rank)
    config = kfade.FitConfig(fisher="empirical", autocast=autocast)
    exact = tiny("llama", torch.bfloat16).double()
    truth = kfade.influence(
        exact, kfade.fit(exact, training("right"), kfade.FitConfig(fisher="empirical")), queries("right"),
        training("right"), options,
    ).scores  # fmt: skip
    model = tiny("llama", torch.bfloat16).to(dtype)
    curvature = kfade.fit(model, training("right"), config)
    found = kfade.influence(model, curvature, queries("right"), training("right"), options).scores
    assert found.dtype == torch.float32
    assert relative(found, truth) < tolerance


def test_a_saved_curvature_gives_the_same_scores(tmp_path: Path) -> None:
    model = tiny("gpt2")
    curvature = kfade.fit(model, training("right"), kfade.FitConfig())
    curvature.save(tmp_path)
    loaded = kfade.Curvature.load(tmp_path, model)
    before, after = (kfade.influence(model, c, queries("right"), training("right")).scores for c in (curvature, loaded))
    assert torch.equal(before, after)


# ----------------------------------------------------------------------------------------- kronfluence


class Rows(torch.utils.data.Dataset):
    """Sequences of one batch, each a mapping."""

    def __init__(self, one: Batch) -> None:
        self.one = one

    def __len__(self) -> int:
        return len(self.one["input_ids"])

    def __getitem__(self, n: int) -> Batch:
        return {k: v[n] for k, v in self.one.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("strategy", ["ekfac", "kfac", "diagonal"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_scores_are_those_of_kronfluence(padding: str, strategy: str, rank: int | None) -> None:
    """On the same factors, after its division by sequences where ours is by loss positions."""
    pytest.importorskip("kronfluence")
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.score.pairwise import compute_pairwise_scores_with_loaders
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class Given(Task):
        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            logits = model(**inputs, position_ids=places).logits[:, :-1].reshape(-1, VOCABULARY)
            targets = batch["labels"].masked_fill(batch["attention_mask"].roll(1, 1) == 0, -100)[:, 1:]
            return nn.functional.cross_entropy(logits, targets.reshape(-1), reduction="sum")

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(curvature)

        def get_attention_mask(self, batch: Batch) -> Tensor:
            return batch["attention_mask"]

    model = tiny("llama", torch.float32)
    train, asked = batch(padding, sequences=6, seed=7), batch(padding, sequences=3, tokens=7, seed=5)
    curvature = kfade.fit(model, [train], kfade.FitConfig(curvature=strategy))
    ours = kfade.influence(model, curvature, [asked], [train], kfade.InfluenceConfig(query_rank=rank))
    factors: dict[str, dict[str, Tensor]] = {
        "lambda_matrix": {n: s.lambda_sum for n, s in curvature.items()},
        "num_lambda_processed": {n: torch.tensor([len(train["input_ids"])]) for n in curvature},
    }
    if strategy != "diagonal":
        factors |= {
            "activation_eigenvectors": {n: s.q_in for n, s in curvature.items()},
            "gradient_eigenvectors": {n: s.q_out for n, s in curvature.items()},
            "activation_eigenvalues": {n: s.lambda_in for n, s in curvature.items()},
            # It divides S by what is not padding.
            "gradient_eigenvalues": {n: s.lambda_out * (s.losses / s.positions) for n, s in curvature.items()},
        }
    if strategy == "kfac":
        factors = {k: v for k, v in factors.items() if "lambda" not in k}
    loaders = [torch.utils.data.DataLoader(Rows(one), batch_size=3) for one in (asked, train)]
    theirs = compute_pairwise_scores_with_loaders(
        loaded_factors=factors, model=prepare_model(copy.deepcopy(model), Given()), state=State(cpu=True),
        task=Given(), query_loader=loaders[0], per_device_query_batch_size=3, train_loader=loaders[1],
        score_args=ScoreArguments(damping_factor=None, query_gradient_low_rank=rank, use_full_svd=True),
        factor_args=FactorArguments(strategy=strategy),
        tracked_module_names=None, disable_tqdm=True,
    )["all_modules"]  # fmt: skip
    # Their heuristic damping is 0.1 × the mean, which is our default.
    layer = next(iter(curvature.values()))
    divisor = layer.positions if strategy == "kfac" else len(train["input_ids"])
    assert_close(ours.scores * (divisor / layer.losses), theirs, 1e-4)


# ------------------------------------------------------------------------------------ leaving one out

WORDS, WIDTH, DECAY = 12, 8, 1.0


class Regression(nn.Module):
    """Softmax regression on fixed features of the last two tokens: convex, so that it can be retrained exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Embedding(WORDS * WORDS, WIDTH)
        self.project = nn.Linear(WIDTH, WORDS, bias=False)

    def hidden(self, input_ids: Tensor) -> Tensor:
        before = torch.cat([input_ids[:, :1], input_ids[:, :-1]], 1)
        return self.features(input_ids * WORDS + before)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.project(self.hidden(input_ids)))


def inputs_of(model: Regression, ids: Tensor) -> Tensor:
    return model.hidden(ids)[:, :-1].reshape(-1, WIDTH).detach()


def hessian_of(model: Regression, w: Tensor, ids: Tensor) -> Tensor:
    """Of the objective below."""
    x = inputs_of(model, ids)
    p = (x @ w.T).softmax(1)
    curve = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    hessian = torch.einsum("nij,na,nb->iajb", curve, x, x).reshape(w.numel(), -1)
    return hessian + DECAY * torch.eye(w.numel(), dtype=torch.float64)


def trained_on(model: Regression, ids: Tensor) -> Tensor:
    """The weight that minimises the summed loss of these sequences plus `DECAY / 2 ‖W‖²`, by Newton's method."""
    x = inputs_of(model, ids)
    y = nn.functional.one_hot(ids[:, 1:].reshape(-1), WORDS).double()
    w = torch.zeros(WORDS, WIDTH, dtype=torch.float64)
    for _ in range(50):
        gradient = ((x @ w.T).softmax(1) - y).T @ x + DECAY * w
        w = w - torch.linalg.solve(hessian_of(model, w, ids), gradient.reshape(-1)).reshape(w.shape)
        if float(gradient.norm()) < 1e-9:
            return w
    raise AssertionError("Newton's method did not converge")


def losses_of(model: Regression, weight: Tensor, ids: Tensor) -> Tensor:
    """Summed loss of each sequence."""
    logits = model.hidden(ids)[:, :-1] @ weight.T
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.sum(1).detach()


def ranks(x: Tensor) -> Tensor:
    return x.argsort(1).argsort(1).double()


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Of the rows of two matrices."""
    x, y = (v - v.mean(1, keepdim=True) for v in (x, y))
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))


def test_scores_predict_what_retraining_without_a_sequence_does(record_property: Any) -> None:
    torch.manual_seed(3)
    # A sparse Markov chain, so that there is something to learn and some sequences matter to a query and some do not.
    chain = torch.softmax(3 * torch.randn(WORDS, WORDS), 1)
    ids = torch.randint(0, WORDS, (56, 1))
    for _ in range(7):
        ids = torch.cat([ids, torch.multinomial(chain[ids[:, -1]], 1)], 1)
    train, asked = ids[:48], ids[48:]
    model = Regression().double()
    whole = trained_on(model, train)
    with torch.no_grad():
        model.project.weight.copy_(whole)
    before = losses_of(model, whole, asked)
    change = torch.stack(
        [
            losses_of(model, trained_on(model, torch.cat([train[:n], train[n + 1 :]])), asked) - before
            for n in range(len(train))
        ],
        dim=1,
    )
    # The penalty is part of the objective: in the unit of F, of the token mean, it is its weight divided by T.
    losses = train.shape[0] * (train.shape[1] - 1)
    config = kfade.InfluenceConfig(damping=DECAY / losses, damping_kind="absolute")
    found = {}
    for curvature in ("identity", "kfac", "ekfac"):
        options = kfade.FitConfig(curvature=curvature, modules="project", samples=20)
        fitted = kfade.fit(model, [{"input_ids": train}], options)
        result = kfade.influence(model, fitted, [{"input_ids": asked}], [{"input_ids": train}], config)
        assert result.losses == losses
        predicted = result.removal()
        found[curvature] = {
            "Pearson": float(correlation(predicted, change).mean()),
            "Spearman": float(correlation(ranks(predicted), ranks(change)).mean()),
            "slope": float((predicted * change).sum() / (predicted * predicted).sum()),
        }
    record_property("leave-one-out, mean over queries", found)
    # Measured: Pearson 0.79, 0.90, 0.92 and Spearman 0.75, 0.82, 0.84. What is missing to 1 is what a Kronecker
    # product misses of F: the exact Hessian gives 0.996 (below).
    assert found["identity"]["Pearson"] < found["kfac"]["Pearson"] < found["ekfac"]["Pearson"]
    assert found["kfac"]["Pearson"] > 0.85 and found["kfac"]["Spearman"] > 0.75
    assert found["ekfac"]["Pearson"] > 0.88 and found["ekfac"]["Spearman"] > 0.80
    # First order, so lengths are right within some tenths, in the unit of the loss.
    assert 0.6 < found["kfac"]["slope"] < 1.2 and 0.7 < found["ekfac"]["slope"] < 1.2

    truth = [autograd_truth(model, ["project"], [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x}])
             for x in (asked, train)]  # fmt: skip
    left, right = (torch.stack([g.reshape(-1) for g in t["project"].gradients]) for t in truth)
    exact = left @ torch.linalg.solve(hessian_of(model, whole, train), right.T)
    assert float(correlation(exact, change).mean()) > 0.99


# ------------------------------------------------------------------------------------- what is written


def test_top_and_order() -> None:
    scores = torch.tensor([[0.5, -2.0, 3.0], [1.0, 0.0, -1.0]])
    found = kfade.Influence(scores, 10, kfade.InfluenceConfig())
    values, indices = found.top(2)
    assert indices.tolist() == [[2, 0], [0, 1]]
    assert values.tolist() == [[3.0, 0.5], [1.0, 0.0]]
    assert found.top(9).indices.shape == (2, 3)
    assert torch.equal(found.removal(), scores / 10)
    turned = found.in_order([1, 0], [2, 0, 1])
    assert turned.scores.tolist() == [[0.0, -1.0, 1.0], [-2.0, 3.0, 0.5]]


def test_saved_scores_come_back_whole_or_not_at_all(tmp_path: Path) -> None:
    config = kfade.InfluenceConfig(damping=0.3, damping_kind="absolute", solved_bytes=5, query_rank=7)
    found = kfade.Influence(torch.randn(2, 30), 17, config, "a model")
    found.save(tmp_path / "new", k=3)
    loaded = kfade.Influence.load(tmp_path / "new")
    assert torch.equal(loaded.scores, found.scores)
    assert (loaded.losses, loaded.config, loaded.model_id) == (17, config, "a model")
    summary = json.loads((tmp_path / "new" / "influence.json").read_text())
    assert [[x["train"] for x in row] for row in summary["top"]] == found.top(3).indices.tolist()
    assert summary["shape"] == [2, 30]
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"influence.json", "influence.safetensors"}

    def changed(**values: Any) -> Path:
        (tmp_path / "new" / "influence.json").write_text(json.dumps({**summary, **values}))
        return tmp_path / "new"

    with pytest.raises(kfade.StorageError, match="does not exist"):
        kfade.Influence.load(tmp_path / "none")
    for values, message in [
        ({"format": "other"}, "has format 'other'; it must be 'kfade-influence'"),
        ({"version": 2}, "has version 2; this kfade reads 1"),
        ({"sha256": "0"}, "is corrupt: its SHA-256 is not that of influence.json"),
        ({"config": {"damping": -1}}, "cannot be read: damping is -1; it must be at least 0"),
    ]:
        with pytest.raises(kfade.StorageError, match=message):
            kfade.Influence.load(changed(**values))
    (tmp_path / "new" / "influence.safetensors").unlink()
    with pytest.raises(kfade.StorageError, match="cannot be read"):
        kfade.Influence.load(changed())


# ------------------------------------------------------------------------------------------- bad input


def test_bad_options_are_named() -> None:
    for options, error, message in [
        ({"damping": -0.1}, ValueError, r"damping is -0\.1; it must be at least 0"),
        ({"damping": "a"}, TypeError, "damping is 'a'; it must be a number"),
        ({"damping_kind": "mean"}, ValueError, "damping_kind is 'mean'; it must be one of relative, absolute"),
        ({"solved_bytes": 0}, ValueError, "solved_bytes is 0; it must be at least 1"),
        ({"solved_bytes": 1.5}, TypeError, r"solved_bytes is 1\.5; it must be an integer"),
        ({"query_rank": 0}, ValueError, "query_rank is 0; it must be at least 1"),
        ({"query_rank": "4"}, TypeError, "query_rank is '4'; it must be an integer"),
    ]:
        with pytest.raises(error, match=message):
            kfade.InfluenceConfig(**options)
    found = kfade.Influence(torch.zeros(1, 1), 1, kfade.InfluenceConfig())
    for k, error, message in [
        (0, ValueError, "k is 0; it must be at least 1"),
        (1.0, TypeError, r"k is 1\.0; it must"),
    ]:
        with pytest.raises(error, match=message):
            found.top(k)


def test_bad_arguments_are_named() -> None:
    model, one = hand_made(), batch("right")
    curvature = kfade.fit(model, [one], kfade.FitConfig(modules="gate|up"))
    mute = {**one, "labels": one["labels"].clone()}
    mute["labels"][[0, 2]] = -100
    wide = {**one, "labels": torch.full_like(one["labels"], VOCABULARY)}
    for arguments, error, message in [
        ((model, model, [one], [one]), TypeError, "curvature is a HandMade; it must be a Curvature"),
        ((model, curvature, [one], [one], 0.1), TypeError, "config is a float; it must be a InfluenceConfig"),
        ((model, curvature, [], [one]), ValueError, "queries is empty; it must hold at least one batch"),
        ((model, curvature, [one], []), ValueError, "train is empty; it must hold at least one batch"),
        ((model, curvature, [mute], [one]), ValueError, r"queries \[0, 2\] have no loss position"),
        ((model, curvature, [one], [wide]), ValueError, "labels of batch 0 range from 97 to 97"),
        (
            (hand_made(bias=False), curvature, [one], [one]),
            ValueError,
            "curvature does not fit the model: gate, up differ",
        ),
    ]:
        with pytest.raises(error, match=message):
            kfade.influence(*arguments)
    singular = kfade.fit(model, [one], kfade.FitConfig(curvature="diagonal", modules="gate"))
    singular["gate"].lambda_sum.zero_()
    with pytest.raises(ValueError, match=r"which is 0\.0 for layer gate, and that has an eigenvalue 0"):
        kfade.influence(model, singular, [one], [one])


def test_a_nan_is_blamed_on_its_side() -> None:
    model, one = hand_made(), batch("right")
    curvature = kfade.fit(model, [one], kfade.FitConfig(modules="gate"))
    with torch.no_grad():
        model.embed.weight[one["input_ids"][0, 0]] = float("nan")
    other = {k: v[2:] for k, v in one.items()}
    assert not bool((other["input_ids"] == one["input_ids"][0, 0]).any())
    for asked, trained in [([one], [other]), ([other], [other, one])]:
        for config in (kfade.InfluenceConfig(), kfade.InfluenceConfig(query_rank=2)):
            with pytest.raises(kfade.NonFiniteError, match=rf"batch {len(trained) - 1}"):
                kfade.influence(model, curvature, asked, trained, config)


# ----------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, `factors/`, `train.jsonl` and `query.jsonl`, whose records have different lengths."""
    folder = tmp_path_factory.mktemp("influence")
    train = [{"question": f"is {w} red ?", "answer": " ".join([w] * n)} for n, w in enumerate("abcdefg", 1)]
    asked = [{"question": "is b red ?", "answer": "b"}, {"question": "is f red ?", "answer": "f f f"}]
    for name, records in (("train", train), ("query", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    words = ["<pad>", "<unk>", *"abcdefg", "is", "red", "?", "Question", "Answer", ":"]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    done("fit", "--model", folder / "model", "--retain", folder / "train.jsonl", "--out", folder / "factors", "--quiet")
    return folder


def done(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def options(home: Path, out: Path) -> list[object]:
    named = [["--model", "model"], ["--query", "query.jsonl"], ["--train", "train.jsonl"], ["--factors", "factors"]]
    return ["influence", *[x for flag, name in named for x in (flag, home / name)], "--out", out, "--top-k", 3]


def test_the_command_writes_scores_in_the_order_of_the_records(home: Path, tmp_path: Path) -> None:
    values = json.loads(done(*options(home, tmp_path), "--json", "--batch-size", 2))
    assert values["shape"] == [2, 7]
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", "influence.json", "influence.safetensors"}
    found = kfade.Influence.load(tmp_path)
    assert [[x["train"] for x in row] for row in values["top"]] == found.top(3).indices.tolist()
    model = LlamaForCausalLM.from_pretrained(home / "model").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "model")
    curvature = kfade.Curvature.load(home / "factors")
    asked, trained = (
        [b for r in read_records(home / f"{n}.jsonl") for b in make_batches(tokenizer, [r])] for n in ("query", "train")
    )
    # The batches here hold one record each, in the order of the file.
    truth = kfade.influence(model, curvature, asked, trained)
    assert_close(found.scores, truth.scores, 1e-5)
    assert found.losses == truth.losses
    shown = done(*options(home, tmp_path), "--quiet", "--config", tmp_path / "config.yaml", "--batch-size", 2)
    few = json.loads(done(*options(home, tmp_path / "few"), "--json", "--query-rank", 2))
    assert few["config"]["query_rank"] == 2
    truth = kfade.influence(model, curvature, asked, trained, kfade.InfluenceConfig(query_rank=2))
    assert_close(kfade.Influence.load(tmp_path / "few").scores, truth.scores, 1e-5)
    best = values["top"][1][0]["train"]
    assert f"{best}: is {'abcdefg'[best]} red ?" in shown


def test_the_command_refuses_what_it_cannot_use(home: Path, tmp_path: Path) -> None:
    for wrong, message in [
        (["--factors", home / "nowhere"], "manifest.json does not exist"),
        (["--damping", -1], "damping is -1.0; it must be at least 0"),
        (["--query-rank", 0], "query_rank is 0; it must be at least 1"),
        (["--loss-on", "prompt"], "loss_on is 'prompt'; it must be one of response, answer"),
        (["--query", home / "nothing.jsonl"], "nothing.jsonl cannot be read"),
    ]:
        result = CliRunner().invoke(app, [str(a) for a in [*options(home, tmp_path), *wrong]])
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stdout == ""
    assert "solved query gradients" in " ".join(done("influence", "--help").split())


# ------------------------------------------------------------------------------------ the documentation


def test_the_examples_of_the_page_run() -> None:
    assert run_examples("influence.md")["found"].scores.shape == (2, 32)

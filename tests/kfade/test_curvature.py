"""The four curvatures and their solve against autograd and dense algebra, and what must not change them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kfade_kernels import PackedSymmetric
from models import batch, hand_made, loss_positions, sampled_labels, tiny
from oracles import assert_close, autograd_truth, orthogonal, relative
from torch import Tensor, nn

import kfade
from kfade.decomposition import decompose, decompose_states
from kfade.layer_curvature import LayerCurvature
from kfade.layers import WeightAndBias

EXACT = 1e-9
Batches = Sequence[Mapping[str, Tensor]]


def fitted(model: nn.Module, batches: Batches, **options: object) -> kfade.Curvature:
    return kfade.fit(model, batches, kfade.FitConfig(**{"modules": "all-linear", **options}))


def labels_of(model: nn.Module, batches: Batches, fisher: str) -> list[Tensor]:
    return sampled_labels(model, batches) if fisher == "sampled" else [b["labels"] for b in batches]


# ------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_factors_and_eigenvalues(family: str, padding: str, fisher: str) -> None:
    model, batches = tiny(family), [batch(padding), batch(padding, sequences=3, tokens=7, seed=5)]
    curvature = fitted(model, batches, fisher=fisher)
    truths = autograd_truth(model, list(curvature), batches, labels_of(model, batches, fisher))
    total = loss_positions(batches)
    for name, layer in curvature.items():
        truth = truths[name]
        a, s = truth.a_sum / truth.positions, truth.s_sum / total
        q_in, q_out = layer.input_eigenvectors(), layer.output_eigenvectors()
        assert_close(layer.input_factor(), a, EXACT, "A")
        assert_close(layer.output_factor(), s, EXACT, "S")
        assert_close(q_in @ torch.diag(layer.lambda_in) @ q_in.T, a, EXACT, "A rebuilt")
        assert_close(q_out @ torch.diag(layer.lambda_out) @ q_out.T, s, EXACT, "S rebuilt")
        assert_close(q_in.T @ q_in, torch.eye(layer.width_in), 1e-12, "orthogonal")
        assert bool((layer.lambda_in.diff() >= 0).all() and (layer.lambda_in >= 0).all())
        assert_close(layer.eigenvalues(), truth.corrected(q_out, q_in) / total, EXACT, "Λ")


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_diagonal_is_the_mean_of_squared_sequence_gradients(fisher: str) -> None:
    model, batches = tiny("gpt2"), [batch("left")]
    curvature = fitted(model, batches, curvature="diagonal", fisher=fisher)
    truths = autograd_truth(model, list(curvature), batches, labels_of(model, batches, fisher))
    for name, layer in curvature.items():
        truth = sum(g**2 for g in truths[name].gradients) / loss_positions(batches)
        assert_close(layer.eigenvalues(), truth, EXACT)
        v = torch.randn(layer.d_out, layer.width_in, dtype=torch.float64)
        assert_close(layer.solve(v, 0.3), v / (truth + 0.3), EXACT)


def test_identity_divides_by_one_plus_damping() -> None:
    curvature = fitted(tiny("llama"), [batch()], curvature="identity")
    layer = curvature["model.layers.0.mlp.up_proj"]
    v = torch.randn(layer.d_out, layer.width_in, dtype=torch.float64)
    assert torch.equal(layer.eigenvalues(), torch.ones_like(layer.eigenvalues()))
    assert_close(layer.solve(v, 0.5), v / 1.5, 1e-15)
    with pytest.raises(ValueError, match="up_proj has no input factor"):
        layer.input_factor()


def test_several_samples_are_summed_and_counted() -> None:
    model, batches = tiny("llama"), [batch("left")]
    curvature = fitted(model, batches, samples=3, modules="mlp", seed=7)
    truths = [autograd_truth(model, list(curvature), batches, sampled_labels(model, batches, 7, i)) for i in range(3)]
    assert relative(truths[0][next(iter(curvature))].s_sum, truths[1][next(iter(curvature))].s_sum) > 0.01
    for name, layer in curvature.items():
        few = [t[name] for t in truths]
        assert (layer.losses, layer.positions) == (3 * loss_positions(batches), few[0].positions)
        assert_close(layer.s_sum.to_dense(), sum(t.s_sum for t in few), EXACT)
        assert_close(layer.a_sum.to_dense(), few[0].a_sum, EXACT)
        assert_close(layer.lambda_sum, sum(t.corrected(layer.q_out, layer.q_in) for t in few), EXACT)


def test_samples_converge_to_the_gauss_newton_matrix() -> None:
    """For the output layer the expectation is known: `diag(p) − p pᵀ`, averaged over loss positions."""
    model, one = hand_made(), batch("right")
    with torch.no_grad():
        p = model(one["input_ids"], one["attention_mask"]).logits.softmax(-1)[:, :-1]
    p = p[one["labels"][:, 1:] != -100]
    truth = torch.diag(p.mean(0)) - p.T @ p / p.shape[0]
    errors = [
        relative(fitted(model, [one], curvature="kfac", modules="^head$", samples=n)["head"].output_factor(), truth)
        for n in (2, 200)
    ]
    # A hundred times the samples: a tenth of the error, and half of it again in doubt.
    assert errors[1] < 0.15 * errors[0]
    assert errors[1] < 0.2


def test_sampled_labels_respect_what_is_ignored_and_depend_on_the_seed() -> None:
    model, batches = tiny("llama"), [batch("left")]
    first, again, other = (sampled_labels(model, batches, seed)[0] for seed in (0, 0, 1))
    ignored = batches[0]["labels"][:, 1:] == -100
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert bool((first[:, 1:][ignored] == -100).all())
    assert bool((first[:, 1:][~ignored & (batches[0]["attention_mask"][:, :-1] == 1)] >= 0).all())


# ---------------------------------------------------------------------------- when K-FAC is not approximate


class OneLayer(nn.Module):
    """`logits = W e(token)` with fixed embeddings: one linear layer, each token on its own."""

    def __init__(self, embeddings: Tensor, vocabulary: int, *, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(embeddings)
        self.linear = nn.Linear(embeddings.shape[1], vocabulary, bias=bias, dtype=embeddings.dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(self.embed(input_ids)))


def pairs(words: int) -> dict[str, Tensor]:
    """Every (token, next token) pair once: sequences of one loss position each."""
    ids = torch.tensor(list(itertools.product(range(words), repeat=2)))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("bias", [False, True])
def test_exact_when_inputs_and_gradients_form_a_full_product(curvature: str, bias: bool) -> None:
    """W = 0, so p is uniform and `g = p − 1_y` depends on the label alone; every input meets every label once.

    Then `Σ (g gᵀ) ⊗ (a aᵀ) / T = S ⊗ A` without remainder. Each token is as often first as second, so
    that A over all positions is A over loss positions.
    """
    words = 6
    model = OneLayer(torch.randn(words, 4, dtype=torch.float64), words, bias=bias)
    nn.init.zeros_(model.linear.weight)
    if bias:
        nn.init.zeros_(model.linear.bias)
    assert_close(*block_and_truth(model, [pairs(words)], curvature, "empirical"), EXACT)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_exact_when_the_input_is_constant(curvature: str, fisher: str) -> None:
    """With one input vector a for all tokens, `Σ (g gᵀ) ⊗ (a aᵀ) = (Σ g gᵀ) ⊗ a aᵀ` for any labels."""
    model = OneLayer(torch.randn(1, 5, dtype=torch.float64).expand(7, -1).clone(), 7, bias=True)
    assert_close(*block_and_truth(model, [pairs(7)], curvature, fisher), EXACT)


def test_kfac_is_not_exact_otherwise() -> None:
    """So that the two tests above can fail."""
    model = OneLayer(torch.randn(6, 4, dtype=torch.float64), 6)
    assert relative(*block_and_truth(model, [pairs(6)], "kfac", "empirical")) > 0.01


def dense(layer: kfade.LayerCurvature) -> Tensor:
    q = torch.kron(layer.q_out, layer.q_in)
    return q @ torch.diag(layer.eigenvalues().reshape(-1)) @ q.T


def block_and_truth(model: nn.Module, batches: Batches, curvature: str, fisher: str) -> tuple[Tensor, Tensor]:
    layer = fitted(model, batches, curvature=curvature, fisher=fisher, modules="linear")["linear"]
    truth = autograd_truth(model, ["linear"], batches, labels_of(model, batches, fisher))["linear"]
    return dense(layer), truth.fisher(loss_positions(batches))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_correction_never_moves_away_from_the_exact_block(fisher: str, seed: int) -> None:
    """EK-FAC's Λ is the diagonal of the exact block in the same basis, so no other is nearer to it."""
    model = hand_made()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype) * 0.5)
    batches = [batch("left", seed=seed)]
    fits = {kind: fitted(model, batches, curvature=kind, fisher=fisher) for kind in ("kfac", "ekfac")}
    truths = autograd_truth(model, list(fits["ekfac"]), batches, labels_of(model, batches, fisher))
    for name in fits["ekfac"]:
        truth = truths[name].fisher(loss_positions(batches))
        near, far = relative(dense(fits["ekfac"][name]), truth), relative(dense(fits["kfac"][name]), truth)
        assert near <= far * (1 + 1e-12)
        torch.testing.assert_close(fits["ekfac"][name].eigenvalues().sum(), truth.trace(), rtol=1e-9, atol=0)


# --------------------------------------------------------------------------------------------- the solve


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_solve_is_the_dense_inverse(curvature: str, fisher: str) -> None:
    model, batches = hand_made(), [batch("left"), batch("right", seed=3)]
    fit = fitted(model, batches, curvature=curvature, fisher=fisher, modules="first|down")
    truths = autograd_truth(model, list(fit), batches, labels_of(model, batches, fisher))
    total, damping = loss_positions(batches), 1e-3
    for name, layer in fit.items():
        truth = truths[name]
        if curvature == "kfac":
            matrix = torch.kron(truth.s_sum / total, truth.a_sum / truth.positions)
        else:
            q = torch.kron(layer.q_out, layer.q_in)
            matrix = q @ torch.diag(truth.corrected(layer.q_out, layer.q_in).reshape(-1) / total) @ q.T
        v = torch.randn(2, layer.d_out, layer.width_in, dtype=torch.float64)
        damped = matrix + damping * torch.eye(matrix.shape[0], dtype=torch.float64)
        solved = torch.linalg.solve(damped, v.reshape(2, -1).T).T.reshape(v.shape)
        assert_close(layer.solve(v, damping), solved, EXACT)
        assert_close(layer.solve(v[0], damping), solved[0], EXACT)
        quadratic = v[0].reshape(-1) @ matrix @ v[1].reshape(-1)
        assert layer.product(v[0], v[1]) == pytest.approx(float(quadratic), rel=1e-9)


@pytest.mark.parametrize("curvature", ["identity", "diagonal", "kfac", "ekfac"])
def test_relative_damping_is_a_share_of_the_mean_eigenvalue(curvature: str) -> None:
    fit = fitted(tiny("gpt2"), [batch()], curvature=curvature)
    for name, layer in fit.items():
        mean = float(layer.eigenvalues().double().mean())
        assert layer.mean_eigenvalue() == pytest.approx(mean, rel=1e-9)
        v = torch.randn(layer.d_out, layer.width_in, dtype=torch.float64)
        ours = fit.solve({name: v}, damping=0.25, kind="relative")[name]
        theirs = fit.solve({name: v}, damping=0.25 * mean, kind="absolute")[name]
        assert_close(ours.weight, theirs.weight, 1e-12)
        assert_close(ours.bias, theirs.bias, 1e-12)


@pytest.mark.parametrize("curvature", ["identity", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_gradients_in_the_layout_of_parameters(family: str, curvature: str) -> None:
    """Weight and bias go in apart or joined, and come out apart, each in its parameter's shape."""
    model, batches = tiny(family), [batch()]
    fit = fitted(model, batches, curvature=curvature)
    for name, layer in fit.items():
        module = model.get_submodule(name)
        weight, bias = torch.randn_like(module.weight), getattr(module, "bias", None)
        matrix = weight.T if layer.transposed else weight
        if bias is None:
            result = fit.solve({name: weight}, damping=0.1)[name]
            assert isinstance(result, Tensor) and result.shape == weight.shape
            expected = layer.solve(matrix, layer.damping(0.1, "relative"))
            assert torch.equal(result, expected.T if layer.transposed else expected)
            continue
        gradient = WeightAndBias(weight, torch.randn_like(bias))
        joined = torch.cat([matrix, gradient.bias.unsqueeze(1)], 1)
        apart, whole = (fit.solve({name: v}, damping=0.1)[name] for v in (gradient, joined))
        assert (apart.weight.shape, apart.bias.shape) == (weight.shape, bias.shape)
        assert torch.equal(apart.weight, whole.weight) and torch.equal(apart.bias, whole.bias)
        expected = layer.solve(joined, layer.damping(0.1, "relative"))
        assert torch.equal(apart.weight.T if layer.transposed else apart.weight, expected[:, :-1])
        assert torch.equal(apart.bias, expected[:, -1])


@pytest.mark.parametrize(
    ("gradients", "options", "message"),
    [
        ({"up": torch.zeros(3, 3)}, {}, "gradient of up has shape"),
        ({"nothing": torch.zeros(3, 3)}, {}, "unknown layers.*nothing"),
        ({}, {"kind": "large"}, "kind is 'large'"),
        ({"up": torch.zeros(20, 13)}, {"damping": -1.0, "kind": "absolute"}, "damping is -1"),
        ({"up": torch.zeros(20, 13)}, {"damping": float("nan")}, "damping is nan"),
    ],
)
@pytest.mark.parametrize("curvature", ["identity", "diagonal", "kfac", "ekfac"])
def test_solve_refuses(curvature: str, gradients: dict[str, Tensor], options: dict[str, object], message: str) -> None:
    fit = fitted(hand_made(), [batch()], curvature=curvature, modules="up")
    with pytest.raises(ValueError, match=message):
        fit.solve(gradients, **options)  # type: ignore[arg-type]


def test_curvature_is_a_mapping() -> None:
    fit = fitted(tiny("llama"), [batch()], modules="layers.0.mlp")
    assert isinstance(fit, Mapping)
    assert len(fit) == 3 and set(fit) == set(fit.keys())
    with pytest.raises(KeyError):
        fit["nothing"]


# --------------------------------------------------------------------------------------- decomposition


def packed(dtype: torch.dtype = torch.float32) -> tuple[PackedSymmetric, Tensor]:
    x = torch.randn(60, 24, dtype=torch.float64)
    total = (x.T @ x).to(dtype)
    return PackedSymmetric.from_dense(total), total.double() / 60


def failing(times: int, result: Callable[[Tensor], tuple[Tensor, Tensor]] | None) -> Callable[[Tensor], object]:
    """`eigh` that fails (or returns `result`) on float32, and counts what it is asked."""
    original = torch.linalg.eigh

    def eigh(matrix: Tensor) -> object:
        asked.append(matrix.dtype)
        if len(asked) > times:
            return original(matrix)
        if result is None:
            raise torch.linalg.LinAlgError("did not converge")
        return result(matrix)

    asked: list[torch.dtype] = []
    eigh.asked = asked  # type: ignore[attr-defined]
    return eigh


@pytest.mark.parametrize(
    "result",
    [
        None,
        lambda m: (torch.zeros(24), torch.eye(24)),
        lambda m: (torch.full((24,), torch.nan), torch.eye(24)),
        lambda m: (torch.zeros(24), torch.zeros(24, 24)),
    ],
    ids=["raises", "large residual", "NaN", "not orthogonal"],
)
def test_float64_is_tried_when_float32_fails(monkeypatch: pytest.MonkeyPatch, result: object) -> None:
    total, truth = packed()
    eigh = failing(1, result)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    values, vectors = decompose(total, 60)
    assert eigh.asked == [torch.float32, torch.float64]  # type: ignore[attr-defined]
    assert values.dtype == vectors.dtype == torch.float32
    assert_close(vectors.double() @ torch.diag(values.double()) @ vectors.double().T, truth, 1e-5)


def test_a_good_float32_result_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = failing(0, None)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    decompose(packed()[0], 60)
    assert eigh.asked == [torch.float32]  # type: ignore[attr-defined]


def test_failing_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", failing(2, None))
    with pytest.raises(RuntimeError, match="order 24 failed in float64 too"):
        decompose(packed()[0], 60)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_factor_that_is_not_finite_is_an_error(value: float) -> None:
    """A sum may overflow though every addend was finite."""
    total = packed()[0]
    total.data[0] = value
    with pytest.raises((RuntimeError, ValueError)):
        decompose(total, 60)


def test_negative_eigenvalues_are_clamped() -> None:
    q = orthogonal(5)
    total = PackedSymmetric.from_dense(q @ torch.diag(torch.tensor([-1e-12, 0, 1, 2, 3], dtype=torch.float64)) @ q.T)
    values, _ = decompose(total, 1)
    assert float(values.min()) >= 0
    assert_close(values, torch.tensor([0.0, 0, 1, 2, 3]), 1e-10)


def factors(orders: Sequence[int]) -> dict[str, LayerCurvature]:
    """Layers with an input factor of one order and an output factor of the next, every second layer in a group."""
    states = {}
    for i, (n, m) in enumerate(itertools.pairwise(orders)):
        state = LayerCurvature(f"l{i}", m, n, False, False, f"l{i}", positions=3 * n, losses=3 * m)
        generator = torch.Generator().manual_seed(i)
        rows = [torch.randn(3 * k, k, generator=generator) for k in (n, m)]
        state.a_sum, state.s_sum = (PackedSymmetric.from_dense(x.T @ x) for x in rows)
        states[state.name] = state
    twin = replace(states["l0"], name="twin", s_sum=states["l0"].s_sum)
    return {**states, "twin": twin}


def decomposed(threads: int, orders: Sequence[int] = (40, 200, 130, 70, 160)) -> tuple[dict[str, Any], list[str]]:
    states, seen, before = factors(orders), [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decompose_states(states, lambda name, stage: seen.append(f"{name} {stage}"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    return states, seen


def test_factors_have_the_same_bits_whatever_is_decomposed_beside_them() -> None:
    one, two = decomposed(1), decomposed(2)
    for name, state in one[0].items():
        for field in ("q_in", "q_out", "lambda_in", "lambda_out"):
            assert torch.equal(getattr(two[0][name], field), getattr(state, field))
    # One thread goes by cost: 200, 200, 160, 130, 130, 70, 70, 40, and the twin's own 200.
    assert sorted(one[1]) == sorted(two[1]) and one[1][-1] == "l0 input_decomposition"
    assert one[1][:3] == ["l1 input_decomposition", "l0 decomposition", "twin decomposition"]
    assert one[0]["twin"].q_in is one[0]["l0"].q_in


def test_new_threads_find_their_number_as_it_was() -> None:
    decomposed(2)
    found: list[int] = []
    before = torch.get_num_threads()
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_error_ends_a_decomposition(threads: int) -> None:
    states = factors((40, 200, 130, 70, 160))
    assert states["l1"].a_sum is not None
    states["l1"].a_sum.data[0] = torch.inf
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(kfade.NonFiniteError, match="order 200 has a NaN or infinite entry"):
            decompose_states(states)
    finally:
        torch.set_num_threads(before)
    done = sum(x.q_out is not None for x in states.values()) + sum(x.q_in is not None for x in states.values())
    # What the other thread had in hand.
    assert done <= threads - 1


def test_a_large_factor_is_decomposed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh, seen = torch.linalg.eigh, []

    def watched(a: Tensor) -> Any:
        seen.append((len(a), torch.get_num_threads(), threading.current_thread() is threading.main_thread()))
        return eigh(a)

    monkeypatch.setattr("kfade.decomposition.ALONE", 160)
    monkeypatch.setattr(torch.linalg, "eigh", watched)
    decomposed(2)
    assert seen[:4] == [(200, 2, True)] * 3 + [(160, 2, True)]
    assert sorted(seen[4:]) == [(40, 1, False), (70, 1, False), (70, 1, False), (130, 1, False), (130, 1, False)]


# ------------------------------------------------------------------------------------------ invariances


def sequences() -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of seven sequences of other lengths; the first ones with a prompt."""
    generator = torch.Generator().manual_seed(11)
    result = []
    for number, length in enumerate((9, 5, 7, 3, 8, 2, 6)):
        ids = torch.randint(3, 97, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 2 if number < 3 else 0] = -100
        result.append((ids, labels))
    return result


def collated(
    size: int = 4, side: str = "right", order: Sequence[int] = range(7), extra: int = 0
) -> list[dict[str, Tensor]]:
    """The same sequences in batches of `size`, in this order, padded on this side."""
    rows, batches = [sequences()[i] for i in order], []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(len(ids) for ids, _ in part) + extra
        fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        one = {name: torch.full((len(part), width), fill) for name, fill in fills.items()}
        for row, (ids, labels) in enumerate(part):
            at = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
            one["input_ids"][row, at], one["attention_mask"][row, at], one["labels"][row, at] = ids, 1, labels
        batches.append(one)
    return batches


CHANGES = {
    "batch size 1": ({"size": 1}, {}),
    "batch size 7": ({"size": 7}, {}),
    "padding side": ({"side": "left"}, {}),
    "more padding": ({"extra": 9}, {}),
    "sequence order": ({"order": [3, 6, 1, 0, 5, 2, 4]}, {}),
    "one layer a pass": ({}, {"layers_per_pass": 1}),
    "three layers a pass": ({}, {"layers_per_pass": 3}),
    "a run again": ({}, {}),
}


def assert_same(ours: kfade.Curvature, theirs: kfade.Curvature, exact: bool = False) -> None:
    assert list(ours) == list(theirs)
    generator = torch.Generator().manual_seed(3)
    for name in ours:
        one, two = ours[name], theirs[name]
        assert (one.positions, one.losses, one.group) == (two.positions, two.losses, two.group)
        v = torch.randn(one.d_out, one.width_in, dtype=torch.float64, generator=generator)
        damping = one.damping(0.1, "relative")
        if one.a_sum is not None:
            assert_close(two.a_sum.to_dense(), one.a_sum.to_dense(), 0.0 if exact else 1e-12, f"A of {name}")
            assert_close(two.s_sum.to_dense(), one.s_sum.to_dense(), 0.0 if exact else 1e-12, f"S of {name}")
        # Eigenvectors turn by rounding / gap, and the solve with them: hence no more than 1e-7.
        assert_close(two.eigenvalues(), one.eigenvalues(), 0.0 if exact else 1e-7, f"Λ of {name}")
        assert_close(two.solve(v, damping), one.solve(v, damping), 0.0 if exact else 1e-7, f"solve of {name}")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_beyond_rounding(family: str, fisher: str, change: str) -> None:
    data, options = CHANGES[change]
    model = tiny(family)
    base = fitted(model, collated(), fisher=fisher)
    other = fitted(model, collated(**data), fisher=fisher, **options)
    assert_same(base, other, exact=change == "a run again")


@pytest.mark.parametrize("curvature", ["identity", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("passes", [1, 2])
def test_passes_with_every_curvature(curvature: str, passes: int) -> None:
    model = hand_made("tied")
    whole = fitted(model, [batch()], curvature=curvature)
    assert_same(whole, fitted(model, [batch()], curvature=curvature, layers_per_pass=passes))


def test_sampled_labels_do_not_depend_on_batches_or_padding() -> None:
    model = tiny("llama")
    drawn = []
    for options in ({}, {"size": 1}, {"size": 7, "side": "left", "extra": 5}):
        batches = collated(**options)
        rows = zip(batches, sampled_labels(model, batches), strict=True)
        drawn.append([lab[i][b["attention_mask"][i] == 1] for b, lab in rows for i in range(lab.shape[0])])
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(*drawn, strict=True))


@pytest.mark.parametrize("curvature", ["identity", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_saved_and_loaded(curvature: str, dtype: torch.dtype, tmp_path: Path) -> None:
    fit = fitted(tiny("gpt2", dtype), [batch("left")], curvature=curvature, fisher="sampled", seed=4)
    fit.save(tmp_path / "c")
    loaded = kfade.Curvature.load(tmp_path / "c")
    assert (loaded.config, loaded.model_id) == (fit.config, fit.model_id)
    if dtype == torch.float64:
        assert_same(fit, loaded, exact=True)
    for name in fit:
        for field in ("q_in", "q_out", "lambda_in", "lambda_out", "lambda_sum"):
            ours, theirs = getattr(fit[name], field), getattr(loaded[name], field)
            assert (ours is None) == (theirs is None)
            assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))

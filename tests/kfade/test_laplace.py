"""The Laplace posterior, against dense matrices, explicit Jacobians, and evidences that are known."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Batch, batch, hand_made, loss_positions, tiny
from oracles import Sizes, assert_close, is_transposed
from pages import run_examples
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import kfade
from kfade import calibration, laplace
from kfade.laplace.evidence import best_precision, precision_evidence
from kfade.linearise import linearised_rows

TOLERANCE = 1e-9
KINDS = ["identity", "diagonal", "kfac", "ekfac"]
TAU = 0.7


def data(padding: str = "right") -> list[Batch]:
    return [batch(padding, seed=7), batch(padding, sequences=3, tokens=6, seed=8)]


def fitted(model: nn.Module, modules: str, curvature: str = "ekfac", **options: Any) -> kfade.Curvature:
    return kfade.fit(model, data(), kfade.FitConfig(curvature=curvature, modules=modules, **options))


def posterior(model: nn.Module, modules: str, curvature: str = "ekfac", **options: Any) -> kfade.Laplace:
    options = {"prior_precision": TAU, "tokens": 50.0, **options}
    return kfade.Laplace(model, fitted(model, modules, curvature), **options)


def dense_precision(state: kfade.LayerCurvature, tokens: float, precision: float) -> Tensor:
    """`N F + τ I` on row-major `[d_out, d_in (+ 1)]`; K-FAC from its factors."""
    size = state.d_out * state.width_in
    if state.q_out is None or state.q_in is None:
        f = torch.diag(state.eigenvalues().double().flatten())
    elif state.lambda_sum is None:
        f = torch.kron(state.output_factor(), state.input_factor())
    else:
        q = torch.kron(state.q_out, state.q_in)
        f = q @ torch.diag(state.eigenvalues().flatten()) @ q.T
    return tokens * f + precision * torch.eye(size, dtype=torch.float64)


def joined(state: kfade.LayerCurvature, tensors: dict[str, Tensor]) -> Tensor:
    """A layer's parameters as a row-major vector of `[d_out, d_in (+ 1)]`."""
    weight = tensors[f"{state.name}.weight"]
    weight = weight.T if state.transposed else weight
    if state.has_bias:
        weight = torch.cat([weight, tensors[f"{state.name}.bias"].unsqueeze(1)], dim=1)
    return weight.reshape(-1)


def alone(model: nn.Module, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits `[n, V]` at the loss positions of each sequence, without its padding, and labels `[n]`."""
    for one in batches:
        for ids, mask, labels in zip(one["input_ids"], one["attention_mask"], one["labels"], strict=True):
            kept = mask.bool()
            x, wanted = ids[kept].unsqueeze(0), labels[kept][1:]
            logits = model(input_ids=x, attention_mask=torch.ones_like(x)).logits[0, :-1]
            yield logits[wanted != -100], wanted[wanted != -100]


# --------------------------------------------------------------------------------------------- the posterior


@pytest.mark.parametrize("curvature", KINDS)
@pytest.mark.parametrize(("kind", "modules"), [("gpt2", r"h\.1\.mlp\.c_fc"), ("qwen2", r"layers\.1\.mlp\.down_proj")])
def test_draws_have_the_covariance_of_the_dense_inverse(kind: str, modules: str, curvature: str) -> None:
    model = tiny(kind, **({"n_embd": 8} if kind == "gpt2" else {}))
    ours = posterior(model, modules, curvature)
    ((name, state),) = ours.curvature.items()
    size = state.d_out * state.width_in
    # A draw is linear in its noise, so the noise's unit vectors give the matrix whose square is the covariance.
    root = torch.stack([joined(state, ours._coloured(name, e)) for e in torch.eye(size).double()])
    assert_close(root.T @ root, torch.linalg.inv(dense_precision(state, 50.0, TAU)), TOLERANCE)


def test_draws_are_standard_normal_in_the_metric_of_the_posterior() -> None:
    model = tiny("llama")
    ours = posterior(model, "mlp")
    total, size, draws = 0.0, 0, 100
    for seed in range(draws):
        change = ours.sample(seed).tensors
        for name in ours.layers:
            precision = kfade.CurvatureOperator(ours.curvature, name, damping=TAU / 50, kind="absolute")
            part = {n: change[n] for n in precision.names}
            total += 50 * float(precision.to_vector(part) @ (precision @ precision.to_vector(part)))
            size += precision.shape[0]
    # A sum of χ² with `size` degrees of freedom: five standard deviations.
    assert abs(total - size) < 5 * math.sqrt(2 * size)


def test_a_draw_is_a_function_of_its_seed() -> None:
    ours = posterior(tiny("gpt2"), "mlp")
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = ours.sample(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    again, other = ours.sample(3), ours.sample(4)
    assert first.tensors.keys() == again.tensors.keys() == set(ours_names(ours))
    assert all(torch.equal(first.tensors[n], again.tensors[n]) for n in first.tensors)
    assert not any(torch.equal(first.tensors[n], other.tensors[n]) for n in first.tensors)


def ours_names(ours: kfade.Laplace) -> list[str]:
    return kfade.CurvatureOperator(ours.curvature, ours.layers).names


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_draw_leaves_no_trace(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    ours = posterior(model, "mlp|lm_head")
    before = copy.deepcopy(model.state_dict())
    with suppress(KeyboardInterrupt), ours.drawn(5) as drawn:
        assert drawn is model
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
        raise KeyboardInterrupt
    ours.predictive(data(), "sampled", samples=2)
    ours.predictive(data(), samples=2)
    ours.logit_variance(data(), 2)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_draw_can_be_saved(tmp_path: Path) -> None:
    draw = posterior(tiny("gpt2"), "mlp").sample(1)
    loaded = kfade.Update.load(draw.save(tmp_path))
    assert all(torch.equal(x, loaded.tensors[n]) for n, x in draw.tensors.items())


def test_the_number_of_tokens_is_that_of_the_fit() -> None:
    model = tiny("llama")
    for samples in (1, 3):
        curvature = fitted(model, "mlp", samples=samples)
        assert kfade.Laplace(model, curvature).tokens == loss_positions(data())
    assert kfade.Laplace(model, curvature, tokens=10**6).tokens == 1e6


def test_damping_is_precision_over_tokens() -> None:
    model = tiny("llama")
    ours = posterior(model, "mlp.up_proj")
    name = ours.layers[0]
    state = ours.curvature[name]
    gradient = torch.randn(state.d_out, state.width_in, dtype=torch.float64)
    solved = ours.curvature.solve({name: gradient}, ours.dampings[name], "absolute")[name]
    truth = torch.linalg.solve(dense_precision(state, 50.0, TAU), gradient.flatten()).view_as(gradient)
    assert_close(torch.cat([solved.weight, solved.bias.unsqueeze(1)], 1) / 50, truth, TOLERANCE)


# ------------------------------------------------------------------------------------- variance of the logits

MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama, head": (lambda: tiny("llama"), "lm_head"),
    "llama, head and mlp": (lambda: tiny("llama"), r"lm_head|layers\.1\.mlp\.(up|down)_proj"),
    "phi, head with bias": (lambda: tiny("phi"), "lm_head"),
    "gpt2": (lambda: tiny("gpt2", n_embd=8), r"h\.1\.mlp"),
    "gemma2, capped": (lambda: tiny("gemma2"), r"layers\.1\.mlp\.down_proj"),
    "hand-made twice": (lambda: hand_made("twice"), "first|head"),
    "hand-made tied": (lambda: hand_made("tied"), "first|second"),
    "hand-made, checkpointed": (lambda: hand_made(recompute=True), "first|gate"),
}


def jacobian_variance(model: nn.Module, ours: kfade.Laplace, batches: Sequence[Batch], tokens: Tensor) -> Tensor:
    """`J P⁻¹ Jᵀ` from one gradient a logit and dense precisions."""
    covariances = {
        name: torch.linalg.inv(dense_precision(ours.curvature[name], ours.tokens, ours.prior_precision[name]))
        for name in ours.layers
    }
    parameters = {n: model.get_parameter(n) for n in ours_names(ours)}
    rows = []
    for logits, _ in alone(model, batches):
        for row in logits:
            for c in tokens[len(rows) // tokens.shape[1]]:
                found = torch.autograd.grad(row[c], list(parameters.values()), retain_graph=True, allow_unused=True)
                tensors = dict(zip(parameters, found, strict=True))
                variance = 0.0
                for name, covariance in covariances.items():
                    vector = joined(ours.curvature[name], tensors)
                    variance += float(vector @ covariance @ vector)
                rows.append(variance)
    return torch.tensor(rows, dtype=torch.float64).view(tokens.shape)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_variance_is_that_of_explicit_jacobians(kind: str, padding: str) -> None:
    make, modules = MODELS[kind]
    model = make()
    ours = posterior(model, modules)
    asked = [batch(padding, sequences=3, tokens=5, seed=3), batch("none", sequences=1, tokens=4, seed=4)]
    found = ours.logit_variance(asked, 2)
    logits = torch.cat([x.detach() for x, _ in alone(model, asked)])
    # A padded sequence and its tokens alone differ by rounding, where a norm is float32 in float64 models.
    assert_close(found.logits, logits.topk(2).values, 1e-7)
    assert torch.equal(found.tokens, logits.topk(2).indices)
    # A reentrant checkpoint cannot be differentiated by torch.autograd.grad; the same weights without it can.
    plain = hand_made() if "checkpointed" in kind else model
    assert_close(found.variance, jacobian_variance(plain, ours, asked, found.tokens), TOLERANCE)
    listed = ours.logit_variance(asked, [5, 90, 5])
    assert listed.tokens.tolist() == [[5, 90, 5]] * len(logits)
    assert_close(listed.variance, jacobian_variance(plain, ours, asked, listed.tokens), TOLERANCE)


@pytest.mark.parametrize("curvature", KINDS)
def test_variance_under_every_curvature(curvature: str) -> None:
    model = tiny("llama")
    ours = posterior(model, r"lm_head|layers\.1\.mlp\.up_proj", curvature)
    asked = [batch("left", sequences=2, tokens=6, seed=3)]
    found = ours.logit_variance(asked, [3, 4])
    assert_close(found.variance, jacobian_variance(model, ours, asked, found.tokens), TOLERANCE)


def test_the_head_has_no_jacobian() -> None:
    """No backward pass, and nothing as large as a gradient for each position."""
    model = tiny("llama", torch.float32, vocab_size=500)
    ours = posterior(model, "lm_head")
    with Sizes() as sizes:
        found = ours.logit_variance(data(), 4)
    assert not any("backward" in name for name, _ in sizes.calls)
    assert sizes.largest <= max(500 * 500, len(found.tokens) * 500) < len(found.tokens) * 500 * 16


# --------------------------------------------------------------------------------------------- predictions


def assert_predictive(found: kfade.Predictive, draws: Sequence[Tensor], labels: Tensor, tolerance: float) -> None:
    """`found` is the mean of the softmax of each draw's logits `[n, V]`."""
    p = torch.stack([x.double().softmax(-1) for x in draws])
    mean = p.mean(0)
    entropy = -(p * p.log()).sum(-1)
    assert torch.equal(found.labels, labels)
    assert_close(found.log_probabilities, mean.gather(1, labels.unsqueeze(1)).squeeze(1).log(), tolerance)
    assert torch.equal(found.predicted, mean.argmax(-1))
    assert_close(found.confidence, mean.amax(-1), tolerance)
    assert_close(found.squares, mean.square().sum(-1), tolerance)
    assert_close(found.total, -(mean * mean.log()).sum(-1), tolerance)
    assert_close(found.aleatoric, entropy.mean(0), tolerance)
    assert torch.equal(found.epistemic, (found.total - found.aleatoric).clamp(min=0))


PREDICTED = {
    "llama": (lambda: tiny("llama"), "mlp"),
    "llama, with head": (lambda: tiny("llama"), "mlp|lm_head"),
    "phi, with head": (lambda: tiny("phi"), "mlp|lm_head"),
    "gpt2": (lambda: tiny("gpt2"), "mlp"),
    "gemma2, capped": (lambda: tiny("gemma2"), "mlp"),
    "hand-made twice": (lambda: hand_made("twice"), "first|gate|head"),
    "hand-made tied": (lambda: hand_made("tied", False), "first|second|down"),
}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", list(PREDICTED))
def test_sampled_is_the_mean_over_drawn_models(kind: str, padding: str) -> None:
    make, modules = PREDICTED[kind]
    model = make()
    ours = posterior(model, modules, prior_precision=20.0)
    draws, labels = [], torch.empty(0)
    for seed in (4, 5, 6):
        with ours.drawn(seed), torch.no_grad():
            rows, targets = zip(*alone(model, data(padding)), strict=True)
        draws.append(torch.cat(rows))
        labels = torch.cat(targets)
    found = ours.predictive(data(padding), "sampled", samples=3, seed=4)
    # Norms in float32 see other roundings in another batch.
    assert_predictive(found, draws, labels, 1e-6)
    plain = torch.cat([x.detach() for x, _ in alone(model, data(padding))])
    assert_predictive(ours.predictive(data(padding), "map"), [plain], labels, 1e-6)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", [k for k in PREDICTED if not k.startswith(("llama", "gemma"))])
def test_linearised_is_the_mean_over_linear_models(kind: str, padding: str) -> None:
    make, modules = PREDICTED[kind]
    model = make()
    ours = posterior(model, modules, prior_precision=20.0)
    draws, labels, step = [], torch.empty(0), 1e-5
    for seed in (4, 5):
        sides = []
        for scale in (0.0, step, -step):
            moved = copy.deepcopy(model)
            ours.sample(seed).apply_(moved, scale)
            with torch.no_grad():
                rows, targets = zip(*alone(moved, data(padding)), strict=True)
            sides.append(torch.cat(rows))
            labels = torch.cat(targets)
        middle, up, down = sides
        draws.append(middle + (up - down) / (2 * step))
    found = ours.predictive(data(padding), samples=2, seed=4)
    # A central difference is off by step² and by 1e-16 / step.
    assert_predictive(found, draws, labels, 1e-7)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_spread_of_linearised_logits_is_their_variance(kind: str) -> None:
    """Models with float32 norms, where differences say little: forward mode against reverse mode, by the variance."""
    model = tiny(kind)
    ours = posterior(model, r"layers\.1\.mlp\.(up|down)_proj")
    asked = [batch("left", sequences=2, tokens=5, seed=3)]
    truth = ours.logit_variance(asked, 3)
    draws = 300
    checked = laplace.check_batches(asked, torch.device("cpu"))
    total = torch.zeros_like(truth.variance)
    with torch.no_grad():
        head = laplace.Head(model, checked[0])
        layers, _ = ours._parts(head)
        for seed in range(draws):
            _, tangent = linearised_rows(ours.model, head, layers, checked[0], ours.sample(seed).tensors)
            logits = tangent if head.weight is None else tangent @ head.weight.T
            total += logits.gather(1, truth.tokens).square()
    # The mean of squares of `draws` normal numbers is off by √(2 / draws) at one standard deviation; six for the
    # largest of some dozens, three for their mean, were they all one number.
    ratio, sigma = total / draws / truth.variance, math.sqrt(2 / draws)
    assert (ratio - 1).abs().max() < 6 * sigma
    assert abs(ratio.mean() - 1) < 3 * sigma


def test_in_the_head_alone_both_ways_are_one() -> None:
    ours = posterior(tiny("llama"), "lm_head")
    linear, sampled = (ours.predictive(data(), method, samples=3) for method in ("linearised", "sampled"))
    assert_close(linear.log_probabilities, sampled.log_probabilities, 1e-13)
    assert linear.epistemic.max() > 0.01


@pytest.mark.parametrize("method", ["linearised", "sampled", "map"])
def test_groups_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    ours = posterior(tiny("gpt2"), "mlp")
    whole = ours.predictive(data(), method, samples=3)
    again = ours.predictive(data(), method, samples=3)
    assert torch.equal(whole.log_probabilities, again.log_probabilities)
    # Room for the distributions of one sequence.
    monkeypatch.setattr(laplace, "MEAN_BYTES", 9 * 97 * 8)
    progress = kfade.Progress()
    with Sizes() as sizes:
        parts = ours.predictive(data(), method, samples=3, progress=progress)
    assert_close(parts.log_probabilities, whole.log_probabilities, 1e-12)
    assert_close(parts.aleatoric, whole.aleatoric, 1e-12)
    tokens = sum(int(b["attention_mask"].sum()) for b in data())
    assert progress.costs[0].units == tokens * (1 if method == "map" else 3)
    rows = [s for shapes in (shapes for _, shapes in sizes.calls) for s in shapes if len(s) == 2 and s[1] == 97]
    assert max(s[0] for s in rows) <= 16  # what the head is compared on; all positions are three times as many


def test_a_narrow_posterior_is_the_map() -> None:
    ours = posterior(tiny("llama"), "mlp|lm_head", prior_precision=1e16)
    plain = ours.predictive(data(), "map")
    assert plain.epistemic.max() == 0
    for method in ("linearised", "sampled"):
        found = ours.predictive(data(), method, samples=2)
        # Draws of 1e-8, and float32 norms.
        assert_close(found.log_probabilities, plain.log_probabilities, 1e-5)
        assert found.epistemic.max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, "off"), (torch.bfloat16, "off"), (torch.float32, "bfloat16")]
)
def test_other_dtypes_are_near(dtype: torch.dtype, autocast: str) -> None:
    exact = tiny("llama", torch.bfloat16, scale=0.1).double()
    model = tiny("llama", torch.bfloat16, scale=0.1).to(dtype)
    config = kfade.FitConfig(fisher="empirical", modules="mlp|lm_head", autocast=autocast)
    curvature = kfade.fit(model, data(), config)
    assert kfade.Laplace(model, curvature).sample().tensors["lm_head.weight"].dtype == torch.float32
    truth = kfade.Laplace(exact, kfade.fit(exact, data(), kfade.FitConfig(fisher="empirical", modules="mlp|lm_head")))
    ours = kfade.Laplace(model, curvature)
    tolerance = 1e-4 if dtype == torch.float32 and autocast == "off" else 0.05  # 8 bits a number
    assert_close(ours.predictive(data(), "map").total, truth.predictive(data(), "map").total, tolerance)
    assert_close(ours.logit_variance(data(), [3]).variance, truth.logit_variance(data(), [3]).variance, tolerance)
    # Draws of float32 and float64 are other numbers, so their means are only statistically the same.
    for method in ("linearised", "sampled"):
        mean, other = (x.predictive(data(), method, samples=40).total.mean() for x in (ours, truth))
        assert abs(mean / other - 1) < 0.05


def test_a_change_below_the_resolution_of_the_weights_is_not_lost() -> None:
    """Between two draws linearised logits of a bfloat16 model move by less than bfloat16 can show."""
    moved = []
    for dtype in (torch.bfloat16, torch.float32):
        ours = posterior(tiny("llama", torch.bfloat16).to(dtype), "mlp|lm_head", prior_precision=1e10)
        one, two = (ours.predictive(data(), samples=1, seed=seed).log_probabilities for seed in (0, 1))
        moved.append(one - two)
    assert moved[0].abs().max() < 2e-3  # of logits of several units, whose bfloat16 neighbours are 1e-2 apart
    # The prior alone makes these draws, the same ones in both; the Jacobians are of 8 bits.
    assert_close(moved[0], moved[1], 0.05)


# ------------------------------------------------------------------------------------- marginal likelihood


def test_evidence_is_the_dense_formula() -> None:
    model = tiny("llama")
    original = tiny("llama", scale=0.1).state_dict()
    curvature = fitted(model, "mlp.(up|down)_proj")
    precisions = {name: 0.5 + i for i, name in enumerate(curvature)}
    for mean in (None, original):
        ours = kfade.Laplace(model, curvature, prior_precision=precisions, prior_mean=mean)
        labelled = [(x.detach().log_softmax(-1), y) for x, y in alone(model, data())]
        nll = -sum(float(x.gather(1, y.unsqueeze(1)).sum()) for x, y in labelled)
        truth = -nll
        for name, state in curvature.items():
            tensors = {n: p.detach() for n, p in model.named_parameters()}
            theta = joined(state, tensors) - (0 if mean is None else joined(state, mean))
            deviation = torch.tensor(precisions[name], dtype=torch.float64) ** -0.5
            prior = torch.distributions.Normal(torch.zeros_like(deviation), deviation)
            truth += float(prior.log_prob(theta).sum()) + len(theta) / 2 * math.log(2 * math.pi)
            truth -= 0.5 * float(torch.logdet(dense_precision(state, ours.tokens, precisions[name])))
        assert ours.log_marginal_likelihood(nll) == pytest.approx(truth, rel=1e-10)
        # The summed loss in a batch: rounding of float32 norms.
        assert ours.log_marginal_likelihood(data()) == pytest.approx(truth, rel=1e-6)
        flat = ours.with_prior_precision(TAU)
        assert ours.log_marginal_likelihood(nll, TAU) == flat.log_marginal_likelihood(nll)


def test_evidence_is_exact_for_a_gaussian() -> None:
    """Linear regression with unit noise: `log N(y; 0, I + X Xᵀ / τ)`."""
    x, y = torch.randn(30, 5).double(), torch.randn(30).double()
    for tau in (0.1, 3.0):
        weights = torch.linalg.solve(x.T @ x + tau * torch.eye(5), x.T @ y)
        nll = float(0.5 * (y - x @ weights).square().sum() + 15 * math.log(2 * math.pi))
        spectrum = torch.linalg.eigvalsh(x.T @ x)
        found = precision_evidence([spectrum], float(weights.square().sum()), tau) - nll
        covariance = torch.eye(30).double() + x @ x.T / tau
        truth = torch.distributions.MultivariateNormal(torch.zeros(30).double(), covariance).log_prob(y)
        assert found == pytest.approx(float(truth), rel=1e-12)


@pytest.mark.parametrize("count", [50, 500, 5000])
def test_evidence_approaches_the_integral_of_a_softmax(count: int) -> None:
    """Two words and one weight: logits (w x, 0)."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(1)).double()
    y = (torch.rand(count, generator=torch.Generator().manual_seed(2)) < torch.sigmoid(0.8 * x)).double()

    def nll(w: Tensor) -> Tensor:
        z = w.unsqueeze(-1) * x
        return (nn.functional.softplus(z) - y * z).sum(-1)

    w = torch.zeros((), dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(w * x)
        hessian = (p * (1 - p) * x * x).sum()
        w = w - (((p - y) * x).sum() + TAU * w) / (hessian + TAU)
    found = precision_evidence([hessian.reshape(1)], float(w**2), TAU) - float(nll(w))
    grid = w + torch.linspace(-12, 12, 4001).double() / (hessian + TAU).sqrt()
    logs = -nll(grid) - TAU / 2 * grid**2 + 0.5 * math.log(TAU / (2 * math.pi))
    truth = float(torch.logsumexp(logs, 0) + (grid[1] - grid[0]).log())
    # The next term of the expansion is of the order of 1 / count.
    assert abs(found - truth) < 1 / count


@pytest.mark.parametrize("curvature", KINDS)
def test_the_best_precision_is_a_maximum(curvature: str) -> None:
    model = tiny("gpt2")
    ours = posterior(model, "mlp", curvature)
    best = ours.fit_prior_precision()
    (tau,) = set(best.prior_precision.values())
    top = ours.log_marginal_likelihood(0.0, tau)
    assert best.log_marginal_likelihood(0.0) == top
    grid = [tau * 2.0 ** (k / 8) for k in range(-200, 201)]
    assert all(ours.log_marginal_likelihood(0.0, x) <= top for x in grid)
    sides = [ours.log_marginal_likelihood(0.0, tau * (1 + e)) for e in (-1e-3, 1e-3)]
    # A parabola in log τ: both sides fall alike.
    assert abs(sides[0] - sides[1]) < 0.05 * (top - max(sides))
    layerwise = ours.fit_prior_precision(per_layer=True)
    assert layerwise.log_marginal_likelihood(0.0) >= top
    for name in ours.layers:
        one = kfade.Laplace(model, ours.curvature, name, tokens=50).fit_prior_precision()
        assert one.prior_precision[name] == layerwise.prior_precision[name]


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e12])
@pytest.mark.parametrize("distance", [1e-12, 1.0, 1e12])
def test_the_best_precision_solves_its_equation(scale: float, distance: float) -> None:
    spectra = [scale * torch.logspace(-12, 3, 40).double(), torch.zeros(7).double()]
    tau = best_precision(spectra, distance)
    determined = sum(float((x / (x + tau)).sum()) for x in spectra)
    assert tau * distance == pytest.approx(determined, rel=1e-9)


def test_there_may_be_no_best_precision() -> None:
    model = tiny("llama")
    ours = posterior(model, "mlp", prior_mean=model.state_dict())
    with pytest.raises(ValueError, match="prior_precision has no best value, since the weights are the prior mean"):
        ours.fit_prior_precision()
    with pytest.raises(ValueError, match="since the curvature is 0"):
        best_precision([torch.zeros(3).double()], 1.0)


# -------------------------------------------------------------------------------------------- calibration


def test_calibration_counts() -> None:
    labels = torch.tensor([0, 1, 1, 0, 2, 0])
    p = torch.tensor(
        [[0.9, 0.1, 0], [0.2, 0.8, 0], [0.7, 0.2, 0.1], [1, 0, 0], [0.4, 0.3, 0.3], [0.76, 0.24, 0]]
    ).double()
    mixture = calibration.Mixture(labels, 3, torch.float64)
    mixture.add(slice(0, 4), p[:4].log())
    mixture.add(slice(4, 6), p[4:].log())
    found = mixture.mean(1)
    counts, confidence, accuracy = found.calibration(4)
    assert counts.tolist() == [0, 1, 1, 4]
    assert confidence[1:].tolist() == pytest.approx([0.4, 0.7, (0.9 + 0.8 + 1 + 0.76) / 4])
    assert accuracy[1:].tolist() == [0, 0, 1]
    assert math.isnan(confidence[0]) and math.isnan(accuracy[0])
    assert found.ece(4) == pytest.approx((0.4 + 0.7 + (0.1 + 0.2 + 0 + 0.24)) / 6)
    assert found.ece(1) == pytest.approx(abs(float(p.amax(-1).mean()) - 4 / 6))
    assert found.accuracy() == pytest.approx(4 / 6)
    assert found.nll() == pytest.approx(-float(p.gather(1, labels.unsqueeze(1)).log().mean()))
    assert found.brier() == pytest.approx(float((p - nn.functional.one_hot(labels)).square().sum(-1).mean()))
    for bins, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="bins is"):
            found.calibration(bins)


def test_probabilities_too_small_for_their_dtype_have_logarithms() -> None:
    mixture = calibration.Mixture(torch.tensor([1]), 2, torch.float32)
    for gap in (900.0, 1000.0):
        mixture.add(slice(0, 1), torch.tensor([[gap, 0.0]]))
    found = mixture.mean(2)
    assert found.log_probabilities.item() == pytest.approx(-900 - math.log(2))
    assert found.total.item() == found.aleatoric.item() == 0


# ------------------------------------------------------------------------------------------- what is refused


def test_the_head_can_be_fitted() -> None:
    model = tiny("llama")
    curvature = fitted(model, "lm_head")
    assert list(curvature) == ["lm_head"]
    assert "lm_head" not in fitted(model, "all-linear")
    with pytest.raises(kfade.UnsupportedLayerError, match="its weight is tied to"):
        fitted(tiny("gpt2"), "lm_head")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prior_precision": 0.0}, ValueError, "prior_precision is 0.0; it must be greater than 0"),
        ({"prior_precision": math.nan}, ValueError, "prior_precision is nan; it must be finite"),
        ({"prior_precision": "1"}, TypeError, "prior_precision is a str"),
        ({"prior_precision": {"x": 1.0}}, ValueError, r"prior_precision has layers \['x'\]"),
        ({"tokens": -5}, ValueError, "tokens is -5.0; it must be greater than 0"),
        ({"tokens": True}, TypeError, "tokens is a bool"),
        ({"layers": "nowhere"}, ValueError, "layers has unknown names"),
        ({"prior_mean": {}}, ValueError, "prior_mean has no model.layers.0.mlp.gate_proj.weight"),
        (
            {"prior_mean": {"model.layers.0.mlp.gate_proj.weight": torch.zeros(3)}},
            ValueError,
            r"prior_mean has model.layers.0.mlp.gate_proj.weight of shape \[3\]",
        ),
    ],
)
def test_bad_posteriors_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    ours = some_posterior()
    with pytest.raises(error, match=message):
        kfade.Laplace(ours.model, ours.curvature, **options)


def test_other_models_are_refused() -> None:
    model = tiny("llama")
    curvature = fitted(model, "mlp")
    with pytest.raises(TypeError, match="model is a str"):
        kfade.Laplace("llama", curvature)
    with pytest.raises(TypeError, match="curvature is a dict"):
        kfade.Laplace(model, {})
    with pytest.raises(ValueError, match="curvature does not fit the model"):
        kfade.Laplace(tiny("llama", num_hidden_layers=1), curvature)
    with pytest.raises(ValueError, match="tokens is None and the identity curvature counts no loss positions"):
        kfade.Laplace(model, fitted(model, "mlp", "identity"))


@cache
def some_posterior() -> kfade.Laplace:
    return posterior(tiny("llama"), "mlp", "diagonal")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: x.predictive(data(), "mcmc"), ValueError, "method is 'mcmc'; it must be one of linearised"),
        (lambda x: x.predictive(data(), samples=0), ValueError, "samples is 0; it must be at least 1"),
        (lambda x: x.predictive(data(), seed=1.5), TypeError, "seed is 1.5; it must be an integer"),
        (lambda x: x.predictive([]), ValueError, "batches is empty"),
        (
            lambda x: x.predictive([{"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 97]])}]),
            ValueError,
            "labels of batch 0 range from 97 to 97",
        ),
        (lambda x: x.sample(-1), ValueError, "seed is -1; it must be at least 0"),
        (lambda x: x.logit_variance(data(), 0), ValueError, "candidates is 0; it must be at least 1"),
        (lambda x: x.logit_variance(data(), []), ValueError, "candidates is empty"),
        (lambda x: x.logit_variance(data(), [97]), ValueError, r"candidates is \[97\]; the vocabulary has 97 tokens"),
        (lambda x: x.logit_variance(data(), 98), ValueError, "candidates is 98; the vocabulary has 97 tokens"),
        (lambda x: x.logit_variance(data(), "the"), TypeError, "candidates is 't'; it must be an integer"),
        (lambda x: x.log_marginal_likelihood(data()), ValueError, "data has 32 loss positions and tokens is 50"),
        (lambda x: x.log_marginal_likelihood(math.inf), ValueError, "data is inf; it must be finite"),
    ],
)
def test_bad_calls_are_refused(call: Callable[[kfade.Laplace], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(some_posterior())


def test_what_forward_mode_does_not_reach_is_refused() -> None:
    for modules in ("first", "down"):
        ours = posterior(hand_made(recompute=True), modules)
        with pytest.raises(kfade.UnsupportedLayerError, match=f"layer {modules} cannot be linearised"):
            ours.predictive(data())
        ours.predictive(data(), "sampled", samples=1)
    whole = posterior(hand_made(recompute=False), "first|down").predictive(data(), samples=2)
    plain = posterior(hand_made(), "first|down").predictive(data(), samples=2)
    assert_close(whole.log_probabilities, plain.log_probabilities, 1e-12)


def test_training_mode_and_checkpoints_of_transformers() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, attention_dropout=0.5, **shape)).double()
    plain = posterior(model.eval(), "mlp")
    truth = [plain.predictive(data(), method, samples=2) for method in ("linearised", "sampled")]
    variance = plain.logit_variance(data(), 2).variance
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for method, expected in zip(("linearised", "sampled"), truth, strict=True):
        found = plain.predictive(data(), method, samples=2)
        assert_close(found.log_probabilities, expected.log_probabilities, 1e-12)
    assert_close(plain.logit_variance(data(), 2).variance, variance, TOLERANCE)
    assert model.training and all(m.training for m in model.modules())


def test_nan_names_the_batch() -> None:
    ours = posterior(tiny("llama"), "mlp")
    with torch.no_grad():
        ours.model.model.norm.weight[0] = math.nan
    for method in laplace.METHODS:
        with pytest.raises(kfade.NonFiniteError, match="batch 0: what enters the softmax"):
            ours.predictive(data(), method)
    assert not ours.model.model.layers[0].mlp.up_proj.weight.isnan().any()


def test_conv1d_is_what_it_says() -> None:
    """The Conv1D cases above are cases of it."""
    assert is_transposed(tiny("gpt2").transformer.h[1].mlp.c_fc)


def test_documentation() -> None:
    run_examples("laplace.md")

"""The curvature as an operator, against dense matrices, against samples, and inside SciPy and curvlinops."""

from __future__ import annotations

import builtins
import copy
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from models import batch, hand_made, sampled_labels, tiny
from oracles import assert_close
from pages import run_examples
from torch import Tensor, nn

import kfade
from kfade import CurvatureOperator
from kfade.fit import fit_factors
from kfade.integrations import UnsupportedPeerError
from kfade.integrations import curvlinops as integration
from kfade.integrations.curvlinops import collect_factors_, set_factors_

TOLERANCE = 1e-9
KINDS = ["identity", "diagonal", "kfac", "ekfac"]
# GPT-2 has Conv1D layers and biases; the hand-made model has linear ones, here without biases.
MODELS = {"gpt2": "h.0.mlp", "hand-made": "first|gate|down"}


def model_of(name: str) -> nn.Module:
    return tiny("gpt2", n_embd=4) if name == "gpt2" else hand_made(bias=False)


def fitted(name: str, kind: str) -> tuple[nn.Module, kfade.Curvature]:
    model = model_of(name)
    config = kfade.FitConfig(curvature=kind, modules=MODELS[name])
    return model, kfade.fit(model, [batch("right", sequences=12)], config)


def dense_block(layer: kfade.LayerCurvature, kind: str) -> Tensor:
    """F of one layer in the order of its flat parameters, from its stored sums."""
    size = layer.d_out * layer.width_in
    if kind == "identity":
        block = torch.eye(size, dtype=torch.float64)
    elif kind == "diagonal":
        block = torch.diag(layer.lambda_sum.reshape(-1) / layer.losses)
    elif kind == "kfac":
        block = torch.kron(layer.output_factor(), layer.input_factor())
    else:
        basis = torch.kron(layer.q_out, layer.q_in)
        block = basis @ torch.diag(layer.lambda_sum.reshape(-1) / layer.losses) @ basis.T
    # Entry [o, i] of the gradient stands where the parameter has it: weight first, in its own layout, then bias.
    places = torch.arange(size).reshape(layer.d_out, layer.width_in)
    weight = places[:, : layer.d_in]
    order = [(weight.T if layer.transposed else weight).reshape(-1)]
    order += [places[:, layer.d_in]] if layer.has_bias else []
    order = torch.cat(order)
    return block[order][:, order]


def dense(curvature: kfade.Curvature, damping: float = 0.0, kind: str = "absolute") -> Tensor:
    blocks = []
    for layer in curvature.values():
        block = dense_block(layer, curvature.config.curvature)
        unit = float(block.trace()) / len(block) if kind == "relative" else 1.0
        blocks.append(block + damping * unit * torch.eye(len(block), dtype=torch.float64))
    return torch.block_diag(*blocks)


@pytest.fixture(scope="module", params=[(m, k) for m in MODELS for k in KINDS], ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, kfade.Curvature]:
    torch.manual_seed(0)
    return fitted(*request.param)


@pytest.mark.parametrize(("damping", "kind"), [(0.3, "relative"), (0.02, "absolute")])
def test_every_operation_is_that_of_the_dense_matrix(
    case: tuple[nn.Module, kfade.Curvature], damping: float, kind: str
) -> None:
    _, curvature = case
    damped, plain = dense(curvature, damping, kind), dense(curvature)
    size = len(damped)
    x, columns = torch.randn(size, dtype=torch.float64), torch.randn(size, 3, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(damped)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    undamped, operator = CurvatureOperator(curvature), CurvatureOperator(curvature, damping=damping, kind=kind)
    assert operator.shape == (size, size)
    assert operator.dtype == (torch.float64 if curvature.config.curvature != "identity" else torch.float32)
    assert operator.T is operator
    pairs = [(undamped, plain), (operator, damped), (operator.inverse(), damped.inverse())]
    for given, matrix in [*pairs, (operator.inverse_sqrt(), root)]:
        assert_close(given @ x, matrix @ x, TOLERANCE, repr(given))
        assert_close(given @ columns, matrix @ columns, TOLERANCE, repr(given))
        assert_close(given.T @ x, matrix.T @ x, TOLERANCE, repr(given))
        assert given.trace() == pytest.approx(float(matrix.trace()), rel=TOLERANCE)
        assert given.frobenius_norm() == pytest.approx(float(torch.linalg.norm(matrix)), rel=TOLERANCE)
    assert operator.logdet() == pytest.approx(float(torch.linalg.slogdet(damped).logabsdet), rel=TOLERANCE)
    assert operator.inverse().logdet() == pytest.approx(-operator.logdet(), rel=TOLERANCE)
    assert (operator @ columns[:, :0]).shape == (size, 0)


def test_squaring_the_inverse_root_gives_the_inverse(case: tuple[nn.Module, kfade.Curvature]) -> None:
    operator = CurvatureOperator(case[1], damping=0.1)
    root, x = operator.inverse_sqrt(), torch.randn(operator.shape[0], dtype=torch.float64)
    assert_close(root @ (root @ x), operator.inverse() @ x, TOLERANCE)
    assert_close(operator.inverse().inverse() @ x, operator @ x, TOLERANCE)
    assert_close(operator @ (operator.inverse() @ x), x, TOLERANCE)


def test_parameters_stand_in_the_order_of_the_model(case: tuple[nn.Module, kfade.Curvature]) -> None:
    model, curvature = case
    operator = CurvatureOperator(curvature, damping=0.2)
    tracked = {n: p.detach() for n, p in model.named_parameters() if n.rpartition(".")[0] in curvature}
    assert operator.names == list(tracked)
    vector = nn.utils.parameters_to_vector(tracked.values())
    assert torch.equal(operator.to_vector(tracked), vector)
    assert all(torch.equal(x, tracked[n]) for n, x in operator.to_mapping(vector).items())
    product = operator @ tracked
    assert list(product) == list(tracked)
    assert {n: x.shape for n, x in product.items()} == {n: x.shape for n, x in tracked.items()}
    assert_close(operator.to_vector(product), dense(curvature, 0.2, "relative") @ vector, TOLERANCE)


def test_the_inverse_is_the_solve_of_the_curvature(case: tuple[nn.Module, kfade.Curvature]) -> None:
    model, curvature = case
    tracked = {n: torch.randn_like(p) for n, p in model.named_parameters() if n.rpartition(".")[0] in curvature}
    gradients = {
        n: (tracked[f"{n}.weight"], tracked[f"{n}.bias"]) if s.has_bias else tracked[f"{n}.weight"]
        for n, s in curvature.items()
    }
    solved = curvature.solve(gradients, damping=0.05)
    ours = CurvatureOperator(curvature, damping=0.05).inverse() @ tracked
    for name, value in solved.items():
        weight, bias = value if isinstance(value, tuple) else (value, None)
        assert_close(ours[f"{name}.weight"], weight, TOLERANCE)
        if bias is not None:
            assert_close(ours[f"{name}.bias"], bias, TOLERANCE)


def test_some_layers_are_a_block_of_all() -> None:
    _, curvature = fitted("hand-made", "ekfac")
    whole, start = dense(curvature), 0
    for name, layer in curvature.items():
        part = slice(start, start + layer.d_out * layer.d_in)
        start = part.stop
        operator = CurvatureOperator(curvature, name)
        x = torch.randn(operator.shape[0], dtype=torch.float64)
        assert_close(operator @ x, whole[part, part] @ x, TOLERANCE)
    backwards = CurvatureOperator(curvature, ["down", "gate"])
    assert backwards.names == ["gate.weight", "down.weight"]


def test_samples_have_the_inverse_as_their_covariance() -> None:
    _, curvature = fitted("hand-made", "ekfac")
    operator = CurvatureOperator(curvature, "first", damping=0.1)
    number, size = 40_000, operator.shape[0]
    samples = operator.inverse_sqrt() @ torch.randn(size, number, dtype=torch.float64)
    covariance = samples @ samples.T / number
    inverse = operator.inverse() @ torch.eye(size, dtype=torch.float64)
    # An entry ij of a sample covariance has standard deviation √((C_ii C_jj + C_ij²) / n); 6 of them, for D² entries.
    variance = inverse.diagonal()
    deviation = ((torch.outer(variance, variance) + inverse**2) / number).sqrt()
    assert float(((covariance - inverse).abs() / deviation).max()) < 6
    # And all entries together are off by what chance gives: the ratio of the norms is 1 within a few percent.
    assert float((covariance - inverse).norm() / deviation.norm()) == pytest.approx(1, abs=0.1)


def test_vectors_of_narrower_dtypes_are_widened() -> None:
    _, curvature = fitted("hand-made", "ekfac")
    operator = CurvatureOperator(curvature)
    x = torch.randn(operator.shape[0]).bfloat16()
    assert (operator @ x).dtype == torch.float64
    assert torch.equal(operator @ x, operator @ x.double())


def test_a_float32_fit_is_as_good_as_float32() -> None:
    model = model_of("gpt2").float()
    config = kfade.FitConfig(modules=MODELS["gpt2"])
    narrow = kfade.fit(model, [batch("right", sequences=12)], config)
    operator = CurvatureOperator(narrow, damping=0.1)
    matrix = dense_as_double(narrow, 0.1)
    x = torch.randn(operator.shape[0])
    for given, truth in [(operator, matrix), (operator.inverse(), matrix.inverse())]:
        # float32 products of order 16, with a spectrum that damping leaves within some thousands
        assert_close(given @ x, truth @ x.double(), 1e-5, repr(given))
    assert (operator @ x).dtype == torch.float32


def dense_as_double(curvature: kfade.Curvature, damping: float) -> Tensor:
    wide = copy.deepcopy(curvature)
    for layer in wide.values():
        for name in ("q_in", "q_out", "lambda_sum"):
            setattr(layer, name, getattr(layer, name).double())
    return dense(wide, damping, "relative")


# ------------------------------------------------------------------------------------------------ SciPy


def test_scipy_multiplies_solves_and_decomposes(case: tuple[nn.Module, kfade.Curvature]) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    curvature = case[1]
    if curvature.config.curvature == "identity":
        torch.set_default_dtype(torch.float64)  # what an identity operator works in there
    try:
        operator = CurvatureOperator(curvature, damping=0.3)
        wrapped, matrix = operator.to_scipy(), dense(curvature, 0.3, "relative")
        assert wrapped.shape == operator.shape
        assert str(wrapped.dtype) == "float64"
        x, columns = torch.randn(len(matrix), dtype=torch.float64), torch.randn(len(matrix), 3, dtype=torch.float64)
        for product, truth in [
            (wrapped @ x.numpy(), matrix @ x), (wrapped.T @ x.numpy(), matrix @ x), (wrapped.H @ x.numpy(), matrix @ x),
            (wrapped @ columns.numpy(), matrix @ columns), (wrapped @ x[:, None].numpy(), matrix @ x[:, None]),
        ]:  # fmt: skip
            assert_close(torch.from_numpy(product), truth, TOLERANCE)
        solution, failed = linalg.cg(wrapped, x.numpy(), rtol=1e-12, maxiter=5_000)
        assert failed == 0
        assert_close(torch.from_numpy(solution), operator.inverse() @ x, TOLERANCE)
        if curvature.config.curvature != "identity":
            largest = linalg.eigsh(wrapped, k=3, which="LA", return_eigenvectors=False)
            truth = torch.linalg.eigvalsh(matrix)[-3:]
            assert_close(torch.from_numpy(largest).sort().values, truth, TOLERANCE)
    finally:
        torch.set_default_dtype(torch.float32)


def test_scipy_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError("No module named 'scipy'")
        return real(name, *rest)

    operator = CurvatureOperator(fitted("hand-made", "kfac")[1])
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="to_scipy needs SciPy, which is not installed: `pip install scipy`"):
        operator.to_scipy()


# ------------------------------------------------------------------------------------------- curvlinops


class Classes(nn.Module):
    """Logits in the layout of `CrossEntropyLoss`: classes before tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits.transpose(1, 2)


class Sampling(nn.CrossEntropyLoss):
    """Their loss on our sampled labels, in the place of those that they drew."""

    def __init__(self, labels: list[Tensor]) -> None:
        super().__init__(reduction="sum", ignore_index=-100)
        self.labels = [x.reshape(-1) for x in labels]

    def forward(self, output: Tensor, _drawn: Tensor) -> Tensor:
        return super().forward(output, self.labels.pop(0))


def shifted(labels: Tensor) -> Tensor:
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def their_operator(model: nn.Module, names: list[str], batches: list[Any], **options: Any) -> Any:
    curvlinops = pytest.importorskip("curvlinops")
    labels = [shifted(one["labels"]) for one in batches]
    settings = {
        "loss_func": nn.CrossEntropyLoss(reduction="sum", ignore_index=-100),
        "fisher_type": "empirical",
        "num_per_example_loss_terms": labels[0].shape[1],
        "num_data": sum(len(x) for x in labels),
        "check_deterministic": False,
    }
    parameters = [p for name in names for p in model.get_submodule(name).parameters()]
    data = [(one["input_ids"], x) for one, x in zip(batches, labels, strict=True)]
    return curvlinops.KFACLinearOperator(Classes(model), params=parameters, data=data, **{**settings, **options})


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("samples", [0, 1, 3])
def test_curvlinops_operator_is_the_one_that_it_would_make(samples: int, separate: bool) -> None:
    """With `samples` label samples; 0 is the empirical Fisher."""
    model, batches = tiny("llama"), [batch("none"), batch("none", sequences=2, seed=1)]
    fisher = {"fisher": "sampled", "samples": samples} if samples else {"fisher": "empirical"}
    curvature = kfade.fit(model, batches, kfade.FitConfig(curvature="kfac", **fisher))
    options: dict[str, Any] = {"separate_weight_and_bias": separate}
    if samples:
        drawn = [[shifted(x) for x in sampled_labels(model, batches, sample=i)] for i in range(samples)]
        loss = Sampling([drawn[i][j] for j in range(len(batches)) for i in range(samples)])
        options |= {"fisher_type": "mc", "mc_samples": samples, "loss_func": loss}
    theirs = their_operator(model, list(curvature), batches, **options)
    theirs.compute_kronecker_factors()
    if samples:
        options["loss_func"] = nn.CrossEntropyLoss(reduction="sum")
    given = their_operator(model, list(curvature), batches, **options)
    given.compute_kronecker_factors = None  # it must not have to
    set_factors_(given, curvature, model)
    x = torch.randn(given.shape[0], 2, dtype=torch.float64)
    assert_close(given @ x, theirs @ x, TOLERANCE)
    set_factors = given._input_covariances
    collect_factors_(given, model, batches)
    assert given._input_covariances is not set_factors
    assert_close(given @ x, theirs @ x, TOLERANCE)
    for name in ("trace", "frobenius_norm"):
        assert_close(getattr(given, name), getattr(theirs, name), TOLERANCE, name)
    from curvlinops import KFACInverseLinearOperator

    inverses = [KFACInverseLinearOperator(o, damping=0.1, use_exact_damping=not separate) for o in (given, theirs)]
    # The condition of F + 0.1 I is what separates this from a product.
    assert_close(inverses[0] @ x, inverses[1] @ x, 1e-8)


def test_padding_and_parts_of_layers_reach_curvlinops() -> None:
    """Their own sums count padding as text: here A is compared with ours, divided by the padded length."""
    model, one = tiny("llama"), batch("right")
    curvature = kfade.fit(model, [one], kfade.FitConfig(fisher="empirical"))
    name = next(iter(curvature))
    module = model.get_submodule(name)
    for parameters, order in [([module.weight], module.in_features), ([module.bias], 0)]:
        given = their_operator(model, [], [one])
        given._mapping = given.compute_parameter_mapping(parameters, given._model_func)
        given._params = parameters
        set_factors_(given, curvature, model)
        a, s = given._input_covariances, given._gradient_covariances
        assert_close(s[f"model.{name}"], curvature[name].s_sum.to_dense(), TOLERANCE)
        assert bool(a) == bool(order)
        if order:
            truth = curvature[name].a_sum.to_dense()[:order, :order] / one["input_ids"].numel()
            assert_close(a[f"model.{name}"], truth, TOLERANCE)


def test_curvlinops_is_refused_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("curvlinops")
    model, one = hand_made(), batch("none")
    curvature = kfade.fit(model, [one], kfade.FitConfig(curvature="kfac", fisher="empirical", modules="gate"))
    operator = their_operator(model, ["gate"], [one])
    with monkeypatch.context() as patch:
        patch.setattr(integration, "version", lambda _: "3.1.0")
        with pytest.raises(
            UnsupportedPeerError, match=r"curvlinops-for-pytorch has version 3\.1\.0; supported is 3\.0\.1"
        ):
            set_factors_(operator, curvature, model)

    def absent(_name: str) -> str:
        raise PackageNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(integration, "version", absent)
        with pytest.raises(UnsupportedPeerError, match="curvlinops-for-pytorch is not installed"):
            set_factors_(operator, curvature, model)
    del operator._mapping
    with pytest.raises(
        UnsupportedPeerError, match=r"KFACLinearOperator of curvlinops-for-pytorch 3\.0\.1 has no _mapping"
    ):
        set_factors_(operator, curvature, model)


def test_operators_that_mean_something_else_are_refused() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, one = hand_made(), batch("none")
    curvature = kfade.fit(model, [one], kfade.FitConfig(curvature="kfac", fisher="empirical", modules="gate"))
    diagonal = kfade.fit(model, [one], kfade.FitConfig(curvature="diagonal", fisher="empirical", modules="gate"))
    gate = their_operator(model, ["gate"], [one])
    mean = their_operator(model, ["gate"], [one], loss_func=nn.CrossEntropyLoss())
    squares = their_operator(model, ["gate"], [one], loss_func=nn.MSELoss())
    drawn = their_operator(model, ["gate"], [one], fisher_type="mc")
    exact = their_operator(model, ["gate"], [one], fisher_type="type-2")
    reduced = their_operator(model, ["gate"], [one], kfac_approx="reduce")
    other = their_operator(model, ["up"], [one])
    assert issubclass(curvlinops.EKFACLinearOperator, curvlinops.KFACLinearOperator)
    subclass = copy.copy(gate)
    subclass.__class__ = curvlinops.EKFACLinearOperator
    for operator, fit, whose, error, message in [
        (model, curvature, model, TypeError, "operator is a HandMade; it must be a KFACLinearOperator"),
        (subclass, curvature, model, TypeError, "operator is a EKFACLinearOperator"),
        (gate, gate, model, TypeError, "curvature is a KFACLinearOperator; it must be a Curvature"),
        (gate, diagonal, model, ValueError, "curvature is 'diagonal'; it must be 'kfac' or 'ekfac' to have factors"),
        (mean, curvature, model, ValueError, "reduction 'mean'; it must be 'sum'"),
        (squares, curvature, model, ValueError, "it must be a CrossEntropyLoss"),
        (drawn, curvature, model, ValueError, "operator has the sampled Fisher and the curvature the empirical one"),
        (exact, curvature, model, ValueError, "operator has fisher_type 'type-2'; it must be one of mc, empirical"),
        (reduced, curvature, model, ValueError, "kfac_approx 'reduce'; it must be 'expand'"),
        (other, curvature, model, ValueError, r"operator has the layers \['up'\], which the curvature lacks"),
        (gate, curvature, nn.Linear(2, 2), ValueError, "operator has the layer model.gate, which is not in model"),
    ]:
        with pytest.raises(error, match=message):
            set_factors_(operator, fit, whose)


def test_factors_alone_are_those_of_a_fit() -> None:
    model, one = hand_made(), batch("right")
    config = kfade.FitConfig(curvature="kfac", modules="gate|up")
    alone, fitted = fit_factors(model, [one], config, kfade.Progress()), kfade.fit(model, [one], config)
    for name, state in fitted.items():
        assert torch.equal(alone[name].input_factor(), state.input_factor())
        assert torch.equal(alone[name].output_factor(), state.output_factor())
        assert alone[name].q_in is None
    with pytest.raises(ValueError, match=r"config\.curvature is 'ekfac'; it must be 'kfac'"):
        fit_factors(model, [one], kfade.FitConfig(), kfade.Progress())


def test_layers_with_one_weight_are_refused_by_collecting() -> None:
    """curvlinops itself gives each of them the whole product."""
    model, one = hand_made("tied"), batch("none")
    operator = their_operator(model, ["first"], [one])
    with pytest.raises(ValueError, match=r"operator has the layers \['second'\], whose weight is that of an earlier"):
        collect_factors_(operator, model, [one])


# ------------------------------------------------------------------------------------------- bad input


def test_bad_arguments_are_named() -> None:
    model, curvature = fitted("hand-made", "ekfac")
    for arguments, options, error, message in [
        ((model,), {}, TypeError, "curvature is a HandMade; it must be a Curvature"),
        ((curvature, "firs"), {}, ValueError, r"layers has unknown names \['firs'\]; the curvature has"),
        ((curvature, []), {}, ValueError, "layers is empty; it must name at least one layer"),
        ((curvature, ["gate", "gate"]), {}, ValueError, "it must name each layer once"),
        ((curvature,), {"damping": -1.0}, ValueError, "damping is -1.0; it must be at least 0.0"),
        ((curvature,), {"damping": float("nan")}, ValueError, "damping is nan; it must be finite"),
        ((curvature,), {"damping": "a"}, TypeError, "damping is a str; it must be a number"),
        ((curvature,), {"kind": "mean"}, ValueError, "kind is 'mean'; it must be one of relative, absolute"),
        ((curvature,), {"power": float("inf")}, ValueError, "power is inf; it must be finite"),
    ]:
        with pytest.raises(error, match=message):
            CurvatureOperator(*arguments, **options)


def test_bad_operands_are_named() -> None:
    _, curvature = fitted("hand-made", "ekfac")
    operator = CurvatureOperator(curvature)
    size = operator.shape[0]
    x = torch.zeros(size, dtype=torch.float64)
    parts = operator.to_mapping(x)
    few = {n: t for n, t in parts.items() if n != "gate.weight"}
    for other, error, message in [
        ([1.0], TypeError, "other is a list; it must be a tensor or a mapping by parameter name"),
        (x[1:], ValueError, rf"other has shape \[{size - 1}\]; it must be \[{size}\] or \[{size}, K\]"),
        (x[None, :, None], ValueError, r"other has shape \[1, "),
        (x.long(), TypeError, "other is torch.int64; it must be of a float dtype"),
        (x.to("meta"), ValueError, "other is on meta; it must be on cpu like the curvature"),
        (few, ValueError, r"tensors lacks \['gate.weight'\] and has unknown \[\]"),
        ({**parts, "head.weight": x}, ValueError, r"has unknown \['head.weight'\]"),
        ({**parts, "gate.weight": x[:240].reshape(12, 20)}, ValueError, r"gate.weight has shape \[12, 20\]"),
    ]:
        with pytest.raises(error, match=message):
            operator @ other
    with pytest.raises(ValueError, match=r"vector has shape \[1\]; it must be"):
        operator.to_mapping(x[:1])


def test_float64_is_not_rounded_to_a_float32_fit() -> None:
    curvature = kfade.fit(hand_made().float(), [batch()], kfade.FitConfig(modules="gate"))
    operator = CurvatureOperator(curvature)
    with pytest.raises(TypeError, match=r"other is torch.float64; it must not be wider than the torch.float32"):
        operator @ torch.zeros(operator.shape[0], dtype=torch.float64)


def test_a_singular_curvature_has_no_inverse_without_damping() -> None:
    curvature = kfade.fit(hand_made(), [batch(sequences=1)], kfade.FitConfig(curvature="diagonal", modules="gate"))
    curvature["gate"].lambda_sum[0, 0] = 0
    operator = CurvatureOperator(curvature)
    message = r"damping is 0.0 \(relative\), which is 0.0 for layer gate, and that has an eigenvalue 0: power -1"
    with pytest.raises(ValueError, match=message):
        operator.inverse()
    with pytest.raises(ValueError, match=r"power -0\.5 does not exist"):
        operator.inverse_sqrt()
    assert operator.logdet() == -float("inf")
    assert torch.isfinite(CurvatureOperator(curvature, damping=0.1).inverse() @ torch.ones(260).double()).all()


# ------------------------------------------------------------------------------------ the documentation


def test_the_examples_of_the_page_run() -> None:
    pytest.importorskip("curvlinops")
    pytest.importorskip("scipy")
    found = run_examples("operators.md")
    operator, v = found["F"], found["v"]
    assert_close(torch.from_numpy(found["solution"]), operator.inverse() @ v, 1e-6)

"""`apply_update_` against float64, for each backend."""

from __future__ import annotations

from typing import Any

import kfade_kernels as kk
import pytest
import torch
from oracles import assert_as_accurate, orthogonal
from torch import Tensor, nn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (7,), (1024,), (1025,), (3, 5), (64, 64), (33, 130), (2, 3, 4), ()]


def tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype, wide: torch.dtype = torch.float32) -> list[Any]:
    """Weights, deltas and gradients of these shapes."""
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    deltas = [0.1 * torch.randn(shape, dtype=wide) for shape in shapes]
    return [weights, deltas, [torch.randn(shape, dtype=wide) for shape in shapes]]


def sums(deltas: list[Tensor], gradients: list[Tensor], scale: float, dtype: torch.dtype) -> Tensor:
    """`‖sΔ‖²` and `s⟨Δ, g⟩` in one dtype."""
    flat, along = (torch.cat([x.reshape(-1).to(dtype) for x in part]) for part in (deltas, gradients))
    return torch.stack([(scale * flat).square().sum(), scale * (flat * along).sum()]).double()


@pytest.mark.parametrize("given", [True, False], ids=["gradients", "none"])
@pytest.mark.parametrize("scale", [1.0, -0.37])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(backend: str, dtype: torch.dtype, wide: torch.dtype, scale: float, given: bool) -> None:
    weights, deltas, gradients = tensors(SHAPES, dtype, wide)
    before = [w.clone() for w in weights]
    found = kk.apply_update_(weights, deltas, scale, gradients if given else None)
    computed = torch.promote_types(dtype, wide)
    for weight, old, delta in zip(weights, before, deltas, strict=True):
        assert weight.dtype == dtype
        plain = (old.to(computed) + scale * delta.to(computed)).to(dtype)
        truth = old.double() + scale * delta.double()
        assert_as_accurate(weight, plain, truth)
        # Rounded once: half a unit of the weight's dtype, and what the wider sum itself is off by. PyTorch
        # converts float64 to 16 bit by way of float32.
        exponent = truth.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor()
        half_unit = 0.5 * torch.finfo(dtype).eps * 2**exponent
        off = (
            2
            * torch.finfo(torch.float32 if dtype.itemsize == 2 else computed).eps
            * (old.abs().double() + (scale * delta).abs().double())
        )
        assert bool(((weight.double() - truth).abs() <= half_unit + off).all())
    assert found.dtype == torch.float64 and found.shape == (2 if given else 0,)
    if not given:
        return
    truth, plain = sums(deltas, gradients, scale, torch.float64), sums(deltas, gradients, scale, wide)
    # float32 sums of blocks, whose products are rounded like those of the plain expression.
    size = torch.stack([truth[0], (scale * torch.cat([d.reshape(-1) for d in deltas]).double()).norm() * 80])
    allowed = 4 * (plain - truth).abs() + 4 * torch.finfo(wide).eps * size
    assert bool(((found - truth).abs() <= allowed).all()), (found, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_blocks(backend: str, dtype: torch.dtype) -> None:
    """More blocks than programs, in tensors that are aligned and that are not, between empty ones."""
    shapes = [(0,), (150, 128), (4099,), (3, 0), (16384,), (12345,), (0, 5)]
    weights, deltas, gradients = tensors(shapes, dtype)
    truths = [w.double() + 0.5 * d.double() for w, d in zip(weights, deltas, strict=True)]
    found = kk.apply_update_(weights, deltas, 0.5, gradients)
    for weight, truth in zip(weights, truths, strict=True):
        torch.testing.assert_close(weight.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)
    truth = sums(deltas, gradients, 0.5, torch.float64)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-4)


def test_nothing_to_add_to(backend: str) -> None:
    empty = [torch.zeros(0, 3)]
    for weights in ([], empty):
        assert kk.apply_update_(weights, weights).shape == (0,)
        assert torch.equal(kk.apply_update_(weights, weights, 2.0, weights), torch.zeros(2, dtype=torch.float64))


def test_measuring_changes_nothing_of_the_weights(backend: str) -> None:
    weights, deltas, _ = tensors([(9, 130), (7,), (160, 1000)], torch.float16)
    poisoned = [torch.full(w.shape, torch.nan) for w in weights]
    copies = [w.clone() for w in weights]
    assert bool(torch.isnan(kk.apply_update_(copies, deltas, 0.3, poisoned)[1]))
    kk.apply_update_(weights, deltas, 0.3)
    assert all(torch.equal(x, y) for x, y in zip(copies, weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    weights, deltas, gradients = tensors([(9, 13)], torch.float32)
    gradients = [g.to(dtype) for g in gradients]
    found = kk.apply_update_(weights, deltas, 2.0, gradients)
    torch.testing.assert_close(found, sums(deltas, gradients, 2.0, torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_inputs_same_bits(backend: str, dtype: torch.dtype) -> None:
    weights, deltas, gradients = tensors([(70, 130), (5,), (9001,)], dtype)
    results = []
    for _ in range(2):
        copies = [w.clone() for w in weights]
        results.append([*copies, kk.apply_update_(copies, deltas, 0.3, gradients)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[1:],
        lambda x: x.reshape(-1)[3:],
        lambda x: x.reshape(2, 4, -1).transpose(0, 1),
    ],
    ids=["transposed", "column stride", "offset", "not on 16 bytes", "batch transposed"],
)
@pytest.mark.parametrize("which", ["weights", "deltas", "gradients"])
def test_any_strides(backend: str, view: Any, which: str) -> None:
    bases = {name: torch.randn(8, 26) for name in ("weights", "deltas", "gradients")}
    views = {name: view(x) for name, x in bases.items()}
    one = {name: [v if name == which else v.contiguous()] for name, v in views.items()}
    truth = one["weights"][0].double() + 0.5 * one["deltas"][0].double()
    outside = bases["weights"].clone()
    view(outside).zero_()
    expected = sums(one["deltas"], one["gradients"], 0.5, torch.float64)
    found = kk.apply_update_(one["weights"], one["deltas"], 0.5, one["gradients"])
    torch.testing.assert_close(one["weights"][0].double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # What the view leaves out is left alone.
    view(bases["weights"]).zero_()
    assert torch.equal(bases["weights"], outside)


def test_an_expanded_delta_is_read_as_it_stands(backend: str) -> None:
    weight = torch.zeros(6, 4)
    delta = torch.ones(1, 4).expand(6, 4)
    found = kk.apply_update_([weight], [delta], 2.0, [delta])
    assert torch.equal(weight, torch.full((6, 4), 2.0)) and found.tolist() == [4 * 24, 2 * 24]


def test_parameters_are_changed_in_place_and_autograd_sees_nothing(backend: str) -> None:
    layer = nn.Linear(5, 3)
    before = layer.weight.detach().clone()
    result = kk.apply_update_([layer.weight, layer.bias], [torch.ones(3, 5), torch.ones(3)])
    torch.testing.assert_close(layer.weight.detach(), before + 1)
    assert layer.weight.is_leaf and layer.weight.grad_fn is None and not result.requires_grad


def test_norm_and_product_predict_the_kl(backend: str) -> None:
    """`½ ΔᵀFΔ = ½ (⟨Δ, v⟩ − λ‖Δ‖²)` for `Δ = (F + λI)⁻¹ v`, here of two layers with one λ."""
    damping, scale = 0.2, 0.7
    vs, deltas, truth = [], [], 0.0
    for m, n in ((6, 5), (4, 9)):
        q_out, q_in, values = orthogonal(m), orthogonal(n), torch.rand(m, n, dtype=torch.float64)
        v = torch.randn(m, n, dtype=torch.float64)
        delta = kk.kron_solve(v, q_out, q_in, values, damping)
        vs.append(v)
        deltas.append(delta)
        truth += 0.5 * scale**2 * float((values * (q_out.T @ delta @ q_in) ** 2).sum())
    weights = [torch.randn(d.shape, dtype=torch.float64) for d in deltas]
    squared, product = kk.apply_update_(weights, deltas, scale, vs).tolist()
    assert 0.5 * (scale * product - damping * squared) == pytest.approx(truth, rel=1e-10)


W, D = torch.zeros(4, 5), torch.zeros(4, 5)
SHARED = torch.zeros(10, 5)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("one weight", {"weights": W}, TypeError, "weights is a Tensor"),
    ("one delta", {"deltas": D}, TypeError, "deltas is a Tensor"),
    ("weight a list", {"weights": [[0.0]]}, TypeError, r"weights\[0\] is a list"),
    ("integer weight", {"weights": [W.int()]}, TypeError, r"weights\[0\] is torch.int32"),
    ("16-bit delta", {"deltas": [D.half()]}, TypeError, r"deltas\[0\] is torch.float16"),
    ("integer gradient", {"gradients": [D.long()]}, TypeError, r"gradients\[0\] is torch.int64"),
    ("sparse", {"deltas": [D.to_sparse()]}, ValueError, r"deltas\[0\] has layout"),
    ("fewer deltas", {"deltas": []}, ValueError, "deltas has 0 entries; it must have 1"),
    ("more gradients", {"gradients": [D, D]}, ValueError, "gradients has 2 entries"),
    ("no gradients", {"gradients": []}, ValueError, "gradients has 0 entries"),
    ("delta of other shape", {"deltas": [D.T]}, ValueError, r"deltas\[0\] has shape \[5, 4\]; it must be \[4, 5\]"),
    ("gradient of other shape", {"gradients": [D[0]]}, ValueError, r"gradients\[0\] has shape"),
    ("delta elsewhere", {"deltas": [D.to("meta")]}, ValueError, r"deltas\[0\] is on meta"),
    ("weights apart", {"weights": [W, W.to("meta")]}, ValueError, r"weights\[1\] is on meta"),
    ("scale NaN", {"scale": float("nan")}, ValueError, "scale is nan"),
    ("scale infinite", {"scale": float("inf")}, ValueError, "scale is inf"),
    ("scale a tensor", {"scale": torch.tensor(1.0)}, TypeError, "scale is a Tensor"),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kk.apply_update_(**{"weights": [W], "deltas": [D], **change})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([W, torch.ones(2), W], r"weights\[0\] and weights\[2\] overlap"),
        ([SHARED[4:], torch.ones(2), SHARED[:5]], r"weights\[0\] and weights\[2\] overlap"),
        ([torch.ones(2), SHARED.view(-1)[7:9], SHARED], r"weights\[1\] and weights\[2\] overlap"),
        ([torch.ones(2), torch.zeros(1, 5).expand(4, 5)], r"weights\[1\] has strides \[0, 1\]"),
    ],
    ids=["twice", "halves", "inside", "expanded"],
)
def test_weights_that_overlap(backend: str, weights: list[Tensor], message: str) -> None:
    deltas = [torch.ones(w.shape) for w in weights]
    before = [w.clone() for w in weights]
    with pytest.raises(ValueError, match=message):
        kk.apply_update_(weights, deltas)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


def test_neighbours_in_one_storage_are_served(backend: str) -> None:
    joint = torch.zeros(10, 5)
    kk.apply_update_([joint[6:], joint[:4], joint[4:6], joint[:0]], [torch.ones(n, 5) for n in (4, 4, 2, 0)])
    assert torch.equal(joint, torch.ones(10, 5))


def test_triton_says_why_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("KFADE_ENABLE", "triton")
    assert kk.explain("apply_update_", [W], [D]).backend == "triton"
    for weights, deltas, gradients, reason in (
        ([W.T], [D.T.contiguous()], None, "weights[0] is not contiguous"),
        ([W.T.contiguous()], [D.T], None, "deltas[0] is not contiguous"),
        ([W], [D.double()], None, "float64"),
        ([W], [D], [D.half()], "gradients[0] is torch.float16"),
        ([], [], None, "there are no weights"),
    ):
        said = kk.explain("apply_update_", weights, deltas, 1.0, gradients)
        assert said.backend == "pytorch" and dict(said.refused)["triton"] == reason

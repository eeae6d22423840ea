"""`sampled_cross_entropy`: the right labels with the right probabilities, and the gradient they give."""

from __future__ import annotations

from typing import Any

import kfade_kernels as kk
import pytest
import torch
from oracles import Sizes, assert_as_accurate, assert_close
from torch import Tensor
from torch.nn import functional as F

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [1, 5, 127, 256, 257, 700]


def uniforms(rows: int, key: int = 0) -> Tensor:
    return kk.counter_uniform(torch.tensor(key), torch.arange(rows))


def differentiated(x: Tensor, labels: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The gradient on x that autograd finds, in the dtype of x."""
    x = x.detach().requires_grad_()
    logits = x if weight is None else F.linear(x, weight, bias)
    F.cross_entropy(logits, labels, reduction="sum").backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_gradient_of_given_labels(backend: str, vocabulary: int, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(33, vocabulary)).to(dtype)
    labels = torch.randint(vocabulary, (33,))
    result = kk.sampled_cross_entropy(x, labels=labels)
    assert result.grad.dtype == dtype
    assert torch.equal(result.labels, labels)
    assert_as_accurate(result.grad, differentiated(x, labels), differentiated(x.double(), labels))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.nll.dtype == wide
    truth = F.cross_entropy(x.double(), labels, reduction="none")
    assert_as_accurate(result.nll, F.cross_entropy(x.to(wide), labels, reduction="none"), truth)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_through_a_projection(backend: str, dtype: torch.dtype, biased: bool) -> None:
    h, weight, labels = torch.randn(33, 20).to(dtype), torch.randn(257, 20).to(dtype), torch.randint(257, (33,))
    bias = torch.randn(257).to(dtype) if biased else None
    result = kk.sampled_cross_entropy(h, labels=labels, weight=weight, bias=bias)
    wide = [None if t is None else t.double() for t in (weight, bias)]
    truth = differentiated(h.double(), labels, *wide)
    assert_as_accurate(result.grad, differentiated(h, labels, weight, bias), truth)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_weight_form_is_the_logits_form(backend: str, vocabulary: int) -> None:
    h, weight = torch.randn(40, 9, dtype=torch.float64), torch.randn(vocabulary, 9, dtype=torch.float64)
    bias, u = torch.randn(vocabulary, dtype=torch.float64), uniforms(40)
    fused = kk.sampled_cross_entropy(h, u, weight=weight, bias=bias)
    apart = kk.sampled_cross_entropy(F.linear(h, weight, bias), u)
    assert torch.equal(fused.labels, apart.labels)
    assert_close(fused.grad, apart.grad @ weight, 1e-13)
    assert_close(fused.nll, apart.nll, 1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_change_nothing(backend: str, dtype: torch.dtype, weighted: bool) -> None:
    x = torch.randn(29, 6 if weighted else 300).to(dtype)
    weight = torch.randn(300, 6).to(dtype) if weighted else None
    whole = kk.sampled_cross_entropy(x, uniforms(29), weight=weight)
    for rows in (1, 4, 28, 29, 1000):
        part = kk.sampled_cross_entropy(x, uniforms(29), weight=weight, chunk_rows=rows)
        assert torch.equal(part.labels, whole.labels)
        # A product of other shape may round a 16-bit logit the other way.
        assert_close(part.grad, whole.grad, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("vocabulary", [7, 300, 600])
def test_labels_follow_the_softmax(backend: str, vocabulary: int) -> None:
    """Chi-square of 40,000 draws from one distribution, cells of few expected draws pooled."""
    draws = 40_000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 1.5
    labels = kk.sampled_cross_entropy(logits.expand(draws, -1), uniforms(draws, key=5)).labels
    expected = draws * logits.double().softmax(-1)
    seen = torch.bincount(labels, minlength=vocabulary).double()
    rare = expected < 20
    cells = [torch.cat([t[~rare], t[rare].sum(0, keepdim=True)]) for t in (seen, expected)]
    degrees = len(cells[0]) - 1
    statistic = float(((cells[0] - cells[1]) ** 2 / cells[1].clamp(min=1e-9)).sum())
    # Mean `degrees`, variance `2·degrees`: five standard deviations, with a fixed seed.
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("vocabulary", [1, 256, 613])
def test_labels_invert_the_cumulative_sum(backend: str, vocabulary: int) -> None:
    """Each word is drawn from the one end of its interval to the other, at the borders of blocks too."""
    x = torch.randn(vocabulary, dtype=torch.float64)
    ends = x.softmax(-1).cumsum(-1)
    for u in (torch.cat([torch.zeros(1), ends[:-1]]) + 1e-9, ends - 1e-9):
        labels = kk.sampled_cross_entropy(x.expand(vocabulary, -1), u).labels
        assert torch.equal(labels, torch.arange(vocabulary))


def test_a_word_of_probability_zero_is_never_drawn(backend: str) -> None:
    x = torch.full((300, 520), -torch.inf)
    x[:, [3, 260, 519]] = torch.tensor([0.1, 0.0, 0.3])
    u = torch.linspace(0, 1 - 2.0**-24, 300)
    result = kk.sampled_cross_entropy(x, u)
    assert set(result.labels.tolist()) == {3, 260, 519}
    assert bool(torch.isfinite(result.grad).all() and torch.isfinite(result.nll).all())


def test_large_logits_do_not_overflow(backend: str) -> None:
    x = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]])
    result = kk.sampled_cross_entropy(x, torch.tensor([0.99, 0.0]))
    assert result.labels.tolist() == [0, 0]
    assert_close(result.grad, torch.tensor([[0.0, 0, 0], [-2 / 3, 1 / 3, 1 / 3]]), 1e-6)


def test_the_callers_logits_stay(backend: str) -> None:
    for dtype in DTYPES:
        x = torch.randn(5, 9).to(dtype)
        before = x.clone()
        kk.sampled_cross_entropy(x, uniforms(5))
        kk.sampled_cross_entropy(x, labels=torch.zeros(5, dtype=torch.int64))
        assert torch.equal(x, before)


@pytest.mark.parametrize("view", [lambda x: x.T.contiguous().T, lambda x: torch.stack([x, x], 2)[..., 0]])
def test_any_strides(backend: str, view: Any) -> None:
    x = torch.randn(6, 11, dtype=torch.float64)
    ours, straight = (kk.sampled_cross_entropy(t, uniforms(6)) for t in (view(x), x))
    assert torch.equal(ours.labels, straight.labels)
    assert_close(ours.grad, straight.grad, 1e-14)


@pytest.mark.parametrize("weighted", [False, True])
def test_no_rows(backend: str, weighted: bool) -> None:
    weight = torch.randn(9, 4) if weighted else None
    result = kk.sampled_cross_entropy(torch.zeros(0, 4), torch.zeros(0), weight=weight)
    assert (result.labels.shape, result.grad.shape, result.nll.shape) == ((0,), (0, 4), (0,))


def test_same_inputs_same_bits(backend: str) -> None:
    h, weight = torch.randn(20, 8).bfloat16(), torch.randn(300, 8).bfloat16()
    first, second = (kk.sampled_cross_entropy(h, uniforms(20), weight=weight) for _ in "ab")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_memory_does_not_grow_with_rows_times_vocabulary() -> None:
    """No tensor is larger than a chunk of logits, however many rows there are."""
    from kfade_kernels.sampled_cross_entropy import pytorch

    weight = torch.randn(1_000, 8)
    largest = []
    for rows in (64, 1024):
        sizes = Sizes()
        with sizes:
            pytorch.run(torch.randn(rows, 8), weight, None, uniforms(rows), None, 32)
        largest.append(sizes.largest)
    assert largest[0] == largest[1] <= max(32 * 1_000, 1024 * 8)


def test_default_chunk_is_within_64_mib() -> None:
    weight = torch.zeros(128_000, 4)
    said = kk.explain("sampled_cross_entropy", torch.zeros(3, 4), torch.zeros(3), weight=weight).configuration
    rows = int(said.split()[2])
    assert rows * 128_000 * 4 <= 64 << 20


# ---------------------------------------------------------------------------------- the random numbers


def test_uniform_numbers_are_uniform_and_independent() -> None:
    u = kk.counter_uniform(torch.arange(400).unsqueeze(1), torch.arange(500)).double()
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    assert float(((counts - 2_000) ** 2 / 2_000).sum()) < 99 + 5 * (2 * 99) ** 0.5
    for other in (u.roll(1, 0), u.roll(1, 1)):
        correlation = float(torch.corrcoef(torch.stack([u.reshape(-1), other.reshape(-1)]))[0, 1])
        assert abs(correlation) < 5 / u.numel() ** 0.5


def test_uniform_numbers_depend_on_key_and_counter_only() -> None:
    key, counter = torch.tensor([3, -7, 2**62]), torch.tensor([0, 5, 1_000_000])
    grid = kk.counter_uniform(key.unsqueeze(1), counter)
    assert grid.dtype == torch.float32
    assert all(grid[i, j] == kk.counter_uniform(key[i], counter[j]) for i in range(3) for j in range(3))


X, U, W = torch.zeros(4, 5), torch.zeros(4), torch.zeros(7, 5)
LABELS = torch.zeros(4, dtype=torch.int64)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("neither", {"uniform": None}, ValueError, "uniform and labels"),
    ("both", {"labels": LABELS}, ValueError, "uniform and labels"),
    ("x three-dimensional", {"x": X[None]}, ValueError, "x has shape"),
    ("x integers", {"x": X.long()}, TypeError, "x is torch.int64"),
    ("x sparse", {"x": X.to_sparse()}, ValueError, "x has layout"),
    ("x a list", {"x": [[1.0]]}, TypeError, "x is a list"),
    ("uniform too long", {"uniform": torch.zeros(5)}, ValueError, "uniform has shape"),
    ("uniform 16-bit", {"uniform": U.half()}, TypeError, "uniform is torch.float16"),
    ("uniform elsewhere", {"uniform": U.to("meta")}, ValueError, "uniform is on meta"),
    ("labels too short", {"uniform": None, "labels": LABELS[:3]}, ValueError, "labels has shape"),
    ("labels int32", {"uniform": None, "labels": LABELS.int()}, TypeError, "labels is torch.int32"),
    ("labels elsewhere", {"uniform": None, "labels": LABELS.to("meta")}, ValueError, "labels is on meta"),
    ("weight other width", {"weight": torch.zeros(7, 6)}, ValueError, "weight has shape"),
    ("weight other dtype", {"weight": W.double()}, TypeError, "weight is torch.float64"),
    ("weight elsewhere", {"weight": W.to("meta")}, ValueError, "weight is on meta"),
    ("bias alone", {"bias": torch.zeros(5)}, ValueError, "bias is given without weight"),
    ("bias too short", {"weight": W, "bias": torch.zeros(5)}, ValueError, "bias has shape"),
    ("bias other dtype", {"weight": W, "bias": torch.zeros(7).half()}, TypeError, "bias is torch.float16"),
    ("chunk negative", {"chunk_rows": -1}, ValueError, "chunk_rows is -1"),
    ("chunk fractional", {"chunk_rows": 2.5}, ValueError, "chunk_rows is 2.5"),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kk.sampled_cross_entropy(**{"x": X, "uniform": U, **change})


@pytest.mark.parametrize("label", [-100, -1, 5])
def test_refuses_labels_out_of_range(backend: str, label: int) -> None:
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        kk.sampled_cross_entropy(X, labels=torch.full((4,), label))

"""`sampled_cross_entropy`: the right labels with the right probabilities, and the gradient they give."""

from __future__ import annotations

from typing import Any

import kfade_kernels as kk
import pytest
import torch
from kfade_kernels.configurations import Configuration
from kfade_kernels.sampled_cross_entropy import noise, triton
from oracles import Sizes, assert_as_accurate, assert_close
from torch import Tensor
from torch.nn import functional as F

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [1, 5, 127, 256, 257, 700]


def uniforms(rows: int, key: int = 0) -> Tensor:
    return kk.counter_uniform(torch.tensor(key), torch.arange(rows))


def row_keys(rows: int, key: int = 0) -> Tensor:
    return kk.counter_bits(torch.tensor(key), torch.arange(rows))


def scores(logits: Tensor, keys: Tensor) -> Tensor:
    """Logits and noise in float64."""
    words = torch.arange(logits.shape[1])
    return logits.double() + kk.gumbel_noise(keys.unsqueeze(1), words, torch.float64)


def blocks(monkeypatch: pytest.MonkeyPatch, words: int, chunk: int = 256) -> None:
    """Triton kernels in blocks of `words`, fused ones in chunks of `chunk` words."""
    monkeypatch.setattr(triton, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(triton, "choose", lambda *_: Configuration(block_n=words))
    monkeypatch.setattr(triton, "chunks_of", lambda x, v, rows: (rows or len(x), min(chunk, v)))


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


@pytest.mark.parametrize("choice", ["uniform", "keys"])
@pytest.mark.parametrize("vocabulary", [7, 300, 600])
def test_labels_follow_the_softmax(backend: str, vocabulary: int, choice: str) -> None:
    """Chi-square of many draws from one distribution, cells of few expected draws pooled."""
    if backend == "triton" and choice == "keys" and vocabulary > 7:
        pytest.skip("the interpreter takes 20 ms a row; what it draws is compared word by word below")
    draws = {"uniform": 40_000, "keys": 200 if backend == "triton" else 8_000}[choice]
    random = uniforms(draws, key=5) if choice == "uniform" else row_keys(draws, key=5)
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 1.5
    labels = kk.sampled_cross_entropy(logits.expand(draws, -1), **{choice: random}).labels
    assert chi_square(torch.bincount(labels, minlength=vocabulary), draws * logits.double().softmax(-1))


def chi_square(seen: Tensor, expected: Tensor) -> bool:
    """Whether counts are within five standard deviations (mean `degrees`, variance `2·degrees`)."""
    rare = expected < 20
    cells = [torch.cat([t[~rare], t[rare].sum(0, keepdim=True)]) for t in (seen.double(), expected)]
    degrees = len(cells[0]) - 1
    statistic = float(((cells[0] - cells[1]) ** 2 / cells[1].clamp(min=1e-9)).sum())
    return statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_neighbouring_rows_are_independent() -> None:
    """Pairs of labels of successive keys, keys that count up included, against the product of two softmaxes."""
    draws = 8_000
    logits = torch.tensor([0.5, 0.0, -0.7, 0.3, 0.1])
    p = logits.double().softmax(0)
    for keys in (row_keys(draws, key=3), torch.arange(draws), torch.arange(draws) << 32):
        labels = kk.sampled_cross_entropy(logits.expand(draws, -1), keys=keys).labels
        for step in (1, 2):
            pairs = torch.bincount(5 * labels[:-step] + labels[step:], minlength=25)
            assert chi_square(pairs, (draws - step) * (p.unsqueeze(1) * p).reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_keys_draw_the_best_perturbed_word(backend: str, vocabulary: int, dtype: torch.dtype) -> None:
    x, keys = (2 * torch.randn(24, vocabulary)).to(dtype), row_keys(24)
    result = kk.sampled_cross_entropy(x, keys=keys)
    perturbed = scores(x, keys)
    chosen = perturbed.gather(1, result.labels.unsqueeze(1)).squeeze(1)
    # Where two scores are within rounding, either may win.
    assert bool((chosen >= perturbed.max(1).values - 1e-5).all())
    given = kk.sampled_cross_entropy(x, labels=result.labels)
    assert_close(result.grad, given.grad, 1e-6)
    assert_close(result.nll, given.nll, 1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_through_a_projection(backend: str, dtype: torch.dtype, biased: bool) -> None:
    h, weight, keys = torch.randn(24, 20).to(dtype), torch.randn(257, 20).to(dtype), row_keys(24, 1)
    bias = torch.randn(257).to(dtype) if biased else None
    result = kk.sampled_cross_entropy(h, keys=keys, weight=weight, bias=bias)
    apart = kk.sampled_cross_entropy(F.linear(h, weight, bias), keys=keys)
    assert torch.equal(result.labels, apart.labels)
    assert_close(result.nll, apart.nll, 4 * torch.finfo(dtype).eps)
    wide = [None if t is None else t.double() for t in (weight, bias)]
    truth = differentiated(h.double(), result.labels, *wide)
    assert_as_accurate(result.grad, differentiated(h, result.labels, weight, bias), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_and_chunks_change_no_label(monkeypatch: pytest.MonkeyPatch, weighted: bool, dtype: torch.dtype) -> None:
    """Same keys, same labels: whatever the block, the chunk of rows, the chunk of the vocabulary and the backend."""
    pytest.importorskip("triton")
    monkeypatch.setenv("KFADE_ENABLE", "triton")
    x, keys = torch.randn(10, 6 if weighted else 700).to(dtype), row_keys(10, 2)
    weight, bias = (torch.randn(700, 6).to(dtype), torch.randn(700).to(dtype)) if weighted else (None, None)
    monkeypatch.setenv("KFADE_DISABLE", "triton,pytorch")
    truth = kk.sampled_cross_entropy(x, keys=keys, weight=weight, bias=bias)
    monkeypatch.setenv("KFADE_DISABLE", "triton")
    pytorch = kk.sampled_cross_entropy(x, keys=keys, weight=weight, bias=bias, chunk_rows=3)
    assert torch.equal(pytorch.labels, truth.labels)
    monkeypatch.setenv("KFADE_DISABLE", "")
    for block, chunk, rows in ((64, 256, 0), (1024, 512, 0), (256, 1024, 3)):
        blocks(monkeypatch, block, chunk)
        ours = kk.sampled_cross_entropy(x, keys=keys, weight=weight, bias=bias, chunk_rows=rows)
        assert torch.equal(ours.labels, truth.labels)
        assert_close(ours.grad, truth.grad, max(2e-6, 4 * torch.finfo(dtype).eps))
        assert_close(ours.nll, truth.nll, 1e-6)


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


@pytest.mark.parametrize("weighted", [False, True])
def test_keys_never_draw_a_word_of_probability_zero(
    backend: str, monkeypatch: pytest.MonkeyPatch, weighted: bool
) -> None:
    """Also where whole blocks and chunks, the first among them, hold nothing but such words."""
    blocks(monkeypatch, 128, 256)
    bias = torch.full((800,), -torch.inf)
    bias[[300, 519]] = torch.tensor([0.1, 0.3])
    x, weight = (torch.zeros(16, 3), torch.zeros(800, 3)) if weighted else (bias.repeat(16, 1), None)
    result = kk.sampled_cross_entropy(x, keys=row_keys(16), weight=weight, bias=bias if weighted else None)
    assert set(result.labels.tolist()) == {300, 519}
    assert bool(torch.isfinite(result.grad).all() and torch.isfinite(result.nll).all())


@pytest.mark.parametrize("choice", ["uniform", "keys", "labels"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_alone(backend: str, bad: float, choice: str) -> None:
    """It must be seen in the gradient, and nowhere in the other rows."""
    x = torch.randn(3, 300)
    x[1, 200] = bad
    random = {"uniform": uniforms(3), "keys": row_keys(3), "labels": torch.tensor([5, 6, 7])}[choice]
    result = kk.sampled_cross_entropy(x, **{choice: random})
    assert bool(result.grad[1].isnan().any() and result.nll[1].isnan())
    assert bool(torch.isfinite(result.grad[[0, 2]]).all() and torch.isfinite(result.nll[[0, 2]]).all())
    assert bool(((result.labels >= 0) & (result.labels < 300)).all())


def test_keys_of_large_logits(backend: str) -> None:
    x = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4 - 1e3, -3e38]])
    result = kk.sampled_cross_entropy(x, keys=row_keys(2))
    assert result.labels.tolist() == [0, 0]
    assert_close(result.grad, torch.zeros(2, 3), 1e-6)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x, x], 2)[..., 0],
        lambda x: F.pad(x, (5, 3))[:, 5:-3],
        lambda x: F.pad(x, (0, 8))[:, :-8],
        lambda x: torch.stack([x, x], 1)[:, 0],
    ],
    ids=["transposed", "every second column", "any rows", "aligned rows", "every second row"],
)
@pytest.mark.parametrize("choice", ["keys", "labels"])
def test_any_strides_in_any_dtype(backend: str, view: Any, dtype: torch.dtype, choice: str) -> None:
    x, random = torch.randn(6, 96).to(dtype), row_keys(6) if choice == "keys" else torch.arange(6)
    ours, straight = (kk.sampled_cross_entropy(t, **{choice: random}) for t in (view(x), x))
    assert torch.equal(ours.labels, straight.labels)
    assert_close(ours.grad, straight.grad, 1e-6)
    assert_close(ours.nll, straight.nll, 1e-6)


def test_one_row_for_many_keys(backend: str) -> None:
    x = torch.randn(70)
    ours, straight = (kk.sampled_cross_entropy(t, keys=row_keys(6)) for t in (x.expand(6, -1), x.repeat(6, 1)))
    assert all(torch.equal(a, b) for a, b in zip(ours, straight, strict=True))


@pytest.mark.parametrize("vocabulary", [1, 5, 257, 1024])
def test_every_element_is_written_and_no_other(monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> None:
    """The kernel on outputs full of NaN, in the middle of a larger tensor."""
    pytest.importorskip("triton")
    blocks(monkeypatch, 256)
    x, keys = torch.randn(7, vocabulary), row_keys(7)
    around = torch.full((9, vocabulary + 8), torch.nan)
    grad, nll, labels = around[1:-1, 4:-4], torch.full((7,), torch.nan), torch.full((7,), -7)
    triton.on_logits(x, labels, keys, grad, nll)
    monkeypatch.setenv("KFADE_DISABLE", "triton,pytorch")
    truth = kk.sampled_cross_entropy(x, keys=keys)
    assert torch.equal(labels, truth.labels)
    assert_close(grad, truth.grad, 1e-6)
    assert_close(nll, truth.nll, 1e-6)
    assert int(around.isnan().sum()) == around.numel() - grad.numel()


@pytest.mark.parametrize("weighted", [False, True])
def test_no_rows_of_keys(backend: str, weighted: bool) -> None:
    weight = torch.randn(9, 4) if weighted else None
    result = kk.sampled_cross_entropy(torch.zeros(0, 4), keys=torch.zeros(0, dtype=torch.int64), weight=weight)
    assert (result.labels.shape, result.grad.shape, result.nll.shape) == ((0,), (0, 4), (0,))


@pytest.mark.parametrize("weighted", [False, True])
def test_no_rows(backend: str, weighted: bool) -> None:
    weight = torch.randn(9, 4) if weighted else None
    result = kk.sampled_cross_entropy(torch.zeros(0, 4), torch.zeros(0), weight=weight)
    assert (result.labels.shape, result.grad.shape, result.nll.shape) == ((0,), (0, 4), (0,))


def test_same_inputs_same_bits(backend: str) -> None:
    h, weight = torch.randn(20, 8).bfloat16(), torch.randn(300, 8).bfloat16()
    first, second = (kk.sampled_cross_entropy(h, uniforms(20), weight=weight) for _ in "ab")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_same_keys_same_bits(backend: str, weighted: bool) -> None:
    x, weight = torch.randn(20, 8 if weighted else 300).half(), torch.randn(300, 8).half() if weighted else None
    first, second = (kk.sampled_cross_entropy(x, keys=row_keys(20), weight=weight) for _ in "ab")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_memory_of_the_fused_kernel_does_not_grow_with_rows_times_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(triton, "CHUNK_BYTES", 8 * 256 * 4)
    largest = []
    for rows, vocabulary in ((8, 500), (24, 500), (8, 1500)):
        weight = torch.randn(vocabulary, 1)
        sizes = Sizes()
        with sizes:
            triton.run(torch.randn(rows, 1), weight, None, None, None, row_keys(rows), 8)
        largest.append(sizes.largest)
    # The interpreter looks at tensors as bytes.
    assert largest[0] == largest[1] == largest[2] <= 8 * 256 * 4


@pytest.mark.parametrize("choice", ["uniform", "keys"])
def test_memory_does_not_grow_with_rows_times_vocabulary(choice: str) -> None:
    """No tensor is larger than a chunk of logits, however many rows there are."""
    from kfade_kernels.sampled_cross_entropy import pytorch

    weight = torch.randn(1_000, 8)
    largest = []
    for rows in (64, 1024):
        sizes = Sizes()
        with sizes:
            random = (uniforms(rows), None, None) if choice == "uniform" else (None, None, row_keys(rows))
            pytorch.run(torch.randn(rows, 8), weight, None, *random, 32)
        largest.append(sizes.largest)
    assert largest[0] == largest[1] <= max(32 * 1_000, 1024 * 8)


def test_default_chunk_is_within_64_mib() -> None:
    weight = torch.zeros(128_000, 4)
    said = kk.explain("sampled_cross_entropy", torch.zeros(3, 4), torch.zeros(3), weight=weight).configuration
    rows = int(said.split()[2])
    assert rows * 128_000 * 4 <= 64 << 20


def test_who_serves_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("KFADE_ENABLE", "triton")
    x, keys = torch.zeros(3, 300), row_keys(3)
    said = kk.explain("sampled_cross_entropy", x, keys=keys)
    assert said.backend == "triton" and "blocks of" in said.configuration
    assert kk.explain("sampled_cross_entropy", x, labels=keys).backend == "triton"
    refused = [
        (kk.explain("sampled_cross_entropy", x, uniforms(3)), "uniform draws by inverse CDF; give keys"),
        (kk.explain("sampled_cross_entropy", x.double(), keys=keys), "float64"),
        (kk.explain("sampled_cross_entropy", x.bfloat16(), keys=keys), "bfloat16"),
    ]
    for said, why in refused:
        assert said.backend == "pytorch" and why in dict(said.refused)["triton"]
    monkeypatch.setattr(triton.support, "interpreted", lambda: False)
    monkeypatch.setattr(triton.support, "refusal", lambda *_: None)
    said = kk.explain("sampled_cross_entropy", x, keys=keys)
    assert "vocabulary of 300 words is below 1024" in dict(said.refused)["triton"]


def test_a_chunk_is_bounded_and_begins_at_whole_counters() -> None:
    for rows, width, vocabulary in ((1, 8, 5), (100, 8, 152_000), (100_000, 8, 152_000), (8_192, 8, 300)):
        for dtype in (torch.float32, torch.float16):
            x = torch.zeros(1, width, dtype=dtype).expand(rows, -1)
            chunk_rows, words = triton.chunks_of(x, vocabulary, 0)
            assert words == vocabulary or words % 256 == 0
            assert chunk_rows * words * x.element_size() <= 256 << 20
    assert triton.chunks_of(torch.zeros(100, 8), 152_000, 7)[0] == 7


# ---------------------------------------------------------------------------------- the random numbers


# kat_vectors of Random123 1.14: rounds, counter, key, result.
KNOWN = """
7 00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
7 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
7 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN.strip().splitlines())
def test_philox_gives_the_published_words(line: str) -> None:
    rounds, *words = line.split()
    numbers = [int(word, 16) for word in words]
    key = numbers[4] | numbers[5] << 32
    key -= 1 << 64 if key >> 63 else 0
    found = noise.philox(torch.tensor(key), [torch.tensor(n) for n in numbers[:4]], int(rounds))
    assert [int(n) for n in found] == numbers[6:]


def test_noise_is_gumbel_and_independent() -> None:
    """Its cumulative distribution is exp(−exp(−G)); neighbours are keys, words, and numbers of one counter."""
    g = kk.gumbel_noise(torch.arange(400).unsqueeze(1), torch.arange(500), torch.float64)
    assert abs(float(g.mean()) - 0.5772156649) < 5 * 1.2826 / g.numel() ** 0.5
    u = torch.exp(-torch.exp(-g))
    assert chi_square(torch.histc(u, bins=100, min=0, max=1), torch.full((100,), 2_000.0).double())
    for other in (u.roll(1, 0), *(u.roll(step, 1) for step in (1, 2, 3, 4))):
        correlation = float(torch.corrcoef(torch.stack([u.reshape(-1), other.reshape(-1)]))[0, 1])
        assert abs(correlation) < 5 / u.numel() ** 0.5


def test_noise_keeps_the_precision_of_winners() -> None:
    """The smallest numbers win: 32 bits of them, relative; the largest must not round to an infinite noise."""
    bits = torch.tensor([0, 1, 2, 1000, 2**20, 2**28 - 1, 2**28, 2**31, 2**32 - 1])
    exact = -torch.log(-torch.log1p(-((bits.double() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)))
    assert_close(noise._gumbel(bits, torch.float64), exact, 1e-14)
    assert float((noise._gumbel(bits, torch.float32) - exact).abs().max()) < 2e-6
    assert bool(torch.isfinite(noise._gumbel(bits, torch.float32)).all())


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_noise_depends_on_key_and_word_only(vocabulary: int) -> None:
    keys, words = torch.tensor([0, 3, -7, 2**62, 1 << 32]), torch.arange(vocabulary)
    whole = noise.vocabulary_noise(keys, vocabulary)
    assert whole.dtype == torch.float32
    assert torch.equal(whole, kk.gumbel_noise(keys.unsqueeze(1), words))
    assert float(kk.gumbel_noise(keys[1], words[-1])) == float(whole[1, -1])
    assert len(set(whole[:, 0].tolist())) == len(keys)


@pytest.mark.parametrize("rounds", [7, 10])
def test_kernel_noise_is_the_noise(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """Read off the labels: with two finite logits, word w wins exactly below a known difference of the logits."""
    pytest.importorskip("triton")
    monkeypatch.setattr(triton, "ROUNDS", rounds)
    words, keys = torch.tensor([1, 2, 3, 4, 255, 256, 511, 699]), row_keys(8, 9)
    zero = keys.new_zeros(())
    four = [torch.stack(noise.philox(keys, (w // 4, zero, zero, zero), rounds), -1) for w in (words, zero)]
    own, first = (noise._gumbel(f.gather(-1, (w % 4).unsqueeze(-1)).squeeze(-1), torch.float64)
                  for f, w in zip(four, (words, zero.expand(8)), strict=True))  # fmt: skip
    for margin, wins in ((1e-5, True), (-1e-5, False)):
        x = torch.full((8, 700), -torch.inf)
        x[:, 0] = 0
        x[torch.arange(8), words] = (first - own + margin).float()
        labels = torch.full((8,), -7)
        triton.on_logits(x, labels, keys, torch.empty_like(x), torch.empty(8))
        assert torch.equal(labels, words if wins else torch.zeros_like(words))


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
    ("none", {"uniform": None}, ValueError, "nothing is given of uniform, labels and keys; it must be exactly one"),
    ("both", {"labels": LABELS}, ValueError, "uniform and labels is given of uniform, labels and keys"),
    ("keys too", {"keys": LABELS}, ValueError, "uniform and keys is given of"),
    ("all three", {"keys": LABELS, "labels": LABELS}, ValueError, "uniform and labels and keys is given of"),
    ("keys too short", {"uniform": None, "keys": LABELS[:3]}, ValueError, "keys has shape"),
    ("keys of two dimensions", {"uniform": None, "keys": LABELS[:, None]}, ValueError, "keys has shape"),
    ("keys int32", {"uniform": None, "keys": LABELS.int()}, TypeError, "keys is torch.int32"),
    ("keys a list", {"uniform": None, "keys": [1, 2, 3, 4]}, TypeError, "keys is a list"),
    ("keys elsewhere", {"uniform": None, "keys": LABELS.to("meta")}, ValueError, "keys is on meta"),
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

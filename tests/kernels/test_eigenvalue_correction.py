"""`eigenvalue_correction_` against float64, for each backend."""

from __future__ import annotations

from typing import Any

import kfade_kernels as kk
import pytest
import torch
from kfade_kernels.eigenvalue_correction import pytorch
from kfade_kernels.rotation import pytorch as rotation
from oracles import Sizes, assert_as_accurate, assert_close, orthogonal, squared_gradients
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Tokens below, between and above the widths, so that each side is rotated as tokens and as gradient.
SHAPES = [(1, 5, 7), (4, 1, 129), (6, 13, 4), (40, 13, 7), (3, 127, 128), (2, 300, 5)]


def state(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "d_out", "d_in"), SHAPES)
def test_agrees_with_float64(backend: str, tokens: int, d_out: int, d_in: int, dtype: torch.dtype, ones: bool) -> None:
    g, a = torch.randn(3, tokens, d_out).to(dtype), torch.randn(3, tokens, d_in).to(dtype)
    mask = torch.rand(3, tokens) > 0.3
    mask[0] = True
    g[~mask], a[~mask] = torch.nan, torch.inf
    q_out, q_in = orthogonal(d_out, state(dtype)), orthogonal(d_in + ones, state(dtype))
    arguments = (g, a, q_out, q_in, mask)
    lam = torch.zeros(d_out, d_in + ones, dtype=state(dtype))
    assert kk.eigenvalue_correction_(lam, *arguments, ones_column=ones) is lam
    plain = squared_gradients(*arguments, ones=ones, dtype=state(dtype))
    # The three orders of multiplication round differently, and squares double an error.
    assert_as_accurate(lam, plain, squared_gradients(*arguments, ones=ones), times=8)


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("rotate_out", "rotate_in"), [(True, False), (False, True), (False, False)])
def test_sides_without_a_basis(backend: str, rotate_out: bool, rotate_in: bool, ones: bool) -> None:
    g, a = torch.randn(3, 6, 9, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    q_out, q_in = (orthogonal(9) if rotate_out else None), (orthogonal(4 + ones) if rotate_in else None)
    lam = torch.full((9, 4 + ones), 2.0, dtype=torch.float64)
    kk.eigenvalue_correction_(lam, g, a, q_out, q_in, ones_column=ones)
    assert_close(lam, squared_gradients(g, a, q_out, q_in, ones=ones) + 2, 1e-13)


@pytest.mark.parametrize("tokens", [1, 4, 60])
@pytest.mark.parametrize("ones", [False, True])
def test_bfloat16_pair_of_eigenvectors(backend: str, tokens: int, ones: bool) -> None:
    """On a steep spectrum the pair stays near float64 in every direction, where plain bfloat16 does not."""
    width = 24 + ones
    q_out, q_in = orthogonal(33, torch.float32), orthogonal(width, torch.float32)
    # Far fewer sequences than directions, so that rounding a itself does not fill the small ones evenly.
    a = ((torch.randn(8, tokens, width) * torch.logspace(2, -3, width)) @ q_in.T)[..., :24].bfloat16()
    g = torch.randn(8, tokens, 33).bfloat16()

    def median_error(basis_out: Tensor, basis_in: Tensor) -> float:
        lam = torch.zeros(33, width)
        kk.eigenvalue_correction_(lam, g, a, basis_out, basis_in, ones_column=ones)
        truth = squared_gradients(g, a, q_out, q_in, ones=ones)
        return float(((lam - truth).abs() / truth).median())

    # Rotated tokens are rounded to bfloat16 once (2⁻⁹ a number), which squaring doubles.
    assert median_error(kk.bf16_pair(q_out), kk.bf16_pair(q_in)) < 4 * 2.0**-9
    if not ones:  # a column of ones lies across all directions, and hides the small ones
        high = [torch.stack([q.bfloat16(), torch.zeros_like(q).bfloat16()]) for q in (q_out, q_in)]
        assert median_error(*high) > 4 * 2.0**-9, "the low part of the pair must matter here"


def test_a_pair_is_as_good_as_float32() -> None:
    q = orthogonal(50, torch.float32)
    assert kk.bf16_pair(q).shape == (2, 50, 50)
    assert_close(kk.bf16_pair(q).float().sum(0), q, 2.0**-16)


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("ones", [False, True])
def test_rotate(ones: bool, units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without fast products of bfloat16, the pair is rounded once."""
    monkeypatch.setattr(rotation, "multiplies_bf16", lambda _: units)
    x, q = torch.randn(2, 3, 6, dtype=torch.float64), orthogonal(6 + ones)
    widened = torch.cat([x, torch.ones(2, 3, 1, dtype=torch.float64)], -1) if ones else x
    assert_close(kk.rotate(x, q, ones_column=ones), widened @ q, 1e-14)
    pair = kk.bf16_pair(q.float())
    assert_close(kk.rotate(x.float(), pair, ones_column=ones), widened @ q, 1e-4)
    low = kk.rotate(x.bfloat16(), pair, ones_column=ones)
    assert low.dtype == torch.bfloat16
    assert_close(low, widened @ q, 2.0**-7)


@pytest.mark.parametrize(
    ("shape", "mask"),
    [((0, 4), None), ((3, 0), None), ((3, 4), torch.zeros(3, 4, dtype=torch.bool))],
    ids=["no sequences", "no tokens", "all masked"],
)
def test_nothing_adds_nothing(backend: str, shape: tuple[int, int], mask: Tensor | None) -> None:
    g, a = torch.full((*shape, 6), torch.nan), torch.full((*shape, 5), torch.nan)
    lam = torch.rand(6, 6)
    before = lam.clone()
    kk.eigenvalue_correction_(lam, g, a, orthogonal(6, torch.float32), None, mask, ones_column=True)
    assert torch.equal(lam, before)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.stack([x, x], 3)[..., 0],
        lambda x: x[:, :1].expand(-1, 5, -1),
        lambda x: x[1:, 1:, :],
    ],
    ids=["transposed", "column stride", "expanded", "offset"],
)
@pytest.mark.parametrize("bases", [False, True])
def test_any_strides(backend: str, view: Any, bases: bool) -> None:
    g, a = view(torch.randn(3, 5, 7, dtype=torch.float64)), view(torch.randn(3, 5, 4, dtype=torch.float64))
    q = (orthogonal(7).T, orthogonal(4).T) if bases else (None, None)
    lam = torch.zeros(4, 7, dtype=torch.float64).T
    kk.eigenvalue_correction_(lam, g, a, *q)
    assert_close(lam, squared_gradients(g, a, *q), 1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_inputs_same_bits(backend: str, dtype: torch.dtype) -> None:
    g, a = torch.randn(4, 9, 33).to(dtype), torch.randn(4, 9, 20).to(dtype)
    q_out, q_in = orthogonal(33, state(dtype)), orthogonal(20, state(dtype))
    twice = [kk.eigenvalue_correction_(torch.zeros(33, 20, dtype=state(dtype)), g, a, q_out, q_in) for _ in "ab"]
    assert torch.equal(*twice)


def packed(lengths: list[int], width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of sequences of these lengths, padded `[B, T, width]` with NaN and laid end to end `[N, width]`."""
    padded = torch.full((len(lengths), max(lengths), width), torch.nan, dtype=dtype)
    for row, length in zip(padded, lengths, strict=True):
        row[:length] = torch.randn(length, width).to(dtype)
    return padded, torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])


LENGTHS = [5, 1, 0, 40, 7, 0, 3, 64, 2]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_out", "d_in"), [(33, 20), (5, 7), (130, 70)])
def test_packed_sequences(
    backend: str, d_out: int, d_in: int, dtype: torch.dtype, masked: bool, index: torch.dtype
) -> None:
    """Unequal lengths, some of them 0, give what padding and a mask give; long and short against the widths."""
    g_padded, g = packed(LENGTHS, d_out, dtype)
    a_padded, a = packed(LENGTHS, d_in, dtype)
    keep = torch.arange(g_padded.shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)
    mask = None
    if masked:
        mask = torch.rand(len(g)) > 0.3
        keep[keep.clone()] = mask
        a[~mask], a_padded[~keep] = torch.inf, torch.inf
    q_out, q_in = orthogonal(d_out, state(dtype)), orthogonal(d_in + 1, state(dtype))
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(index)
    lam = torch.zeros(d_out, d_in + 1, dtype=state(dtype))
    kk.eigenvalue_correction_(lam, g, a, q_out, q_in, mask, ones_column=True, cu_seqlens=cu_seqlens)
    plain, truth = (
        squared_gradients(g_padded, a_padded, q_out, q_in, keep, ones=True, dtype=kind)
        for kind in (state(dtype), torch.float64)
    )
    assert_as_accurate(lam, plain, truth, times=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_rotated_already(backend: str, dtype: torch.dtype) -> None:
    """No basis at all, packed and dense, wide enough for several tiles and for sequences split in parts."""
    lengths = [6] * 9
    g_padded, g = packed(lengths, 72, dtype)
    a_padded, a = packed(lengths, 40, dtype)
    dense, laid = (torch.zeros(72, 40, dtype=state(dtype)) for _ in "ab")
    kk.eigenvalue_correction_(dense, g_padded, a_padded)
    kk.eigenvalue_correction_(laid, g, a, cu_seqlens=torch.arange(0, 55, 6))
    plain, truth = (squared_gradients(g_padded, a_padded, None, None, dtype=t) for t in (state(dtype), torch.float64))
    for lam in (dense, laid):
        assert_as_accurate(lam, plain, truth, times=8)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0, 3, 7]), ValueError, r"cu_seqlens is \[0, 3, 7\]; it must rise from 0 to 6"),
        (torch.tensor([1, 3, 6]), ValueError, "cu_seqlens is"),
        (torch.tensor([0, 4, 3, 6]), ValueError, "cu_seqlens is"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "cu_seqlens is empty"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, "cu_seqlens has shape"),
        (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens is torch.float32"),
        (torch.tensor([0, 6], device="meta"), ValueError, "cu_seqlens is on meta"),
        ([0, 6], TypeError, "cu_seqlens is a list"),
    ],
)
def test_refuses_bad_sequence_ends(cu_seqlens: Any, error: type[Exception], message: str) -> None:
    lam = torch.zeros(6, 5)
    with pytest.raises(error, match=message):
        kk.eigenvalue_correction_(lam, torch.zeros(6, 6), torch.zeros(6, 5), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="g has shape"):
        kk.eigenvalue_correction_(lam, torch.zeros(2, 3, 6), torch.zeros(2, 3, 5), cu_seqlens=torch.tensor([0, 6]))


def test_tiles_do_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFADE_DISABLE", "cpu")
    g, a = torch.randn(3, 4, 50), torch.randn(3, 4, 8)
    whole = kk.eigenvalue_correction_(torch.zeros(50, 8), g, a)
    monkeypatch.setattr(pytorch, "TILE_ELEMENTS", 56)
    assert_close(kk.eigenvalue_correction_(torch.zeros(50, 8), g, a), whole, 1e-6)


def test_no_tensor_of_all_gradients() -> None:
    g, a = torch.randn(16, 3, 64), torch.randn(16, 3, 64)
    sizes = Sizes()
    with sizes:
        pytorch.run(torch.zeros(64, 64), g, a, orthogonal(64, torch.float32), None, None, False, None)
    assert sizes.largest <= 64 * 64


LAM, G, A = torch.zeros(6, 5), torch.zeros(2, 3, 6), torch.zeros(2, 3, 5)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("lam is a list", {"lam": [1.0]}, TypeError, "lam is a list"),
    ("lam 16-bit", {"lam": LAM.bfloat16()}, TypeError, "lam is torch.bfloat16"),
    ("lam three-dimensional", {"lam": LAM[None]}, ValueError, "lam has shape"),
    ("lam too wide", {"lam": torch.zeros(6, 6)}, ValueError, "a has shape"),
    ("lam too high", {"lam": torch.zeros(7, 5)}, ValueError, "g has shape"),
    ("g two-dimensional", {"g": G[0]}, ValueError, "g has shape"),
    ("g integers", {"g": G.long()}, TypeError, "g is torch.int64"),
    ("g wider", {"g": G.double()}, TypeError, "g is torch.float64"),
    ("a wider", {"a": A.double()}, TypeError, "a is torch.float64"),
    ("a sparse", {"a": A.to_sparse()}, ValueError, "a has layout"),
    ("a elsewhere", {"a": A.to("meta")}, ValueError, "a is on meta"),
    ("other tokens", {"a": torch.zeros(2, 4, 5)}, ValueError, "a has shape"),
    ("other sequences", {"a": torch.zeros(3, 3, 5)}, ValueError, "a has shape"),
    ("no column for ones", {"ones_column": True}, ValueError, "a has shape"),
    ("q_out too small", {"q_out": torch.eye(5)}, ValueError, "q_out has shape"),
    ("q_in too large", {"q_in": torch.eye(6)}, ValueError, "q_in has shape"),
    ("q_in, no ones", {"lam": torch.zeros(6, 6), "q_in": torch.eye(5), "ones_column": True}, ValueError, "q_in has"),
    ("q_out plain bfloat16", {"q_out": torch.eye(6).bfloat16()}, TypeError, "q_out is torch.bfloat16"),
    ("q_out float32 pair", {"q_out": torch.zeros(2, 6, 6)}, TypeError, "q_out is torch.float32"),
    ("q_in float16", {"q_in": torch.eye(5).half()}, TypeError, "q_in is torch.float16"),
    ("q_in wider", {"q_in": torch.eye(5).double()}, TypeError, "q_in is torch.float64"),
    ("q_in elsewhere", {"q_in": torch.eye(5, device="meta")}, ValueError, "q_in is on meta"),
    ("mask flat", {"mask": torch.ones(6, dtype=torch.bool)}, ValueError, "mask has shape"),
    ("mask of weights", {"mask": torch.ones(2, 3)}, TypeError, "mask is torch.float32"),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kk.eigenvalue_correction_(**{"lam": LAM, "g": G, "a": A, **change})


def test_sequences_further_apart_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of 2³¹ elements and more; the memory between is never touched."""
    monkeypatch.setenv("KFADE_ENABLE", "triton")
    monkeypatch.setenv("KFADE_DISABLE", "pytorch,cpu")
    apart = 1 << 31
    g = torch.empty(apart + 64, dtype=torch.float16).as_strided((2, 3, 8), (apart, 8, 1))
    g.copy_(torch.randn(2, 3, 8))
    a, lam = torch.randn(2, 3, 8).half(), torch.zeros(8, 8)
    assert kk.explain("eigenvalue_correction_", lam, g, a).backend == "triton"
    kk.eigenvalue_correction_(lam, g, a)
    assert_close(lam, squared_gradients(g, a, None, None), 1e-6)

"""`accumulate_factors_`: many factors in one call are what `syrk_` makes of each."""

from __future__ import annotations

from typing import Any

import kfade_kernels as kk
import pytest
import torch
from kfade_kernels.syrk import pytorch as syrk_pytorch
from oracles import assert_as_accurate, outer_sum
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def state(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 5), (127, 129), (300, 1), (128, 300)])
def test_one_layer(backend: str, d_in: int, d_out: int, dtype: torch.dtype, ones: bool) -> None:
    a, g = torch.randn(2, 7, d_in).to(dtype), torch.randn(2, 7, d_out).to(dtype)
    mask = torch.rand(2, 7) > 0.3
    a[~mask], g[~mask] = torch.nan, torch.inf
    acc_a, acc_s = (kk.PackedSymmetric(n, dtype=state(dtype)) for n in (d_in + ones, d_out))
    kk.accumulate_factors_(acc_a, acc_s, a, g, mask, ones_column=ones)
    # Upcasting 16-bit rows is exact: the plain expression is the one in the state's dtype.
    for acc, x, column in ((acc_a, a, ones), (acc_s, g, False)):
        plain = outer_sum(x, mask, ones=column, dtype=state(dtype))
        assert_as_accurate(acc.to_dense(), plain, outer_sum(x, mask, ones=column))


def test_lists_are_many_calls_to_the_bit(backend: str) -> None:
    widths_in, widths_out = [5, 129], [130, 3, 64]
    a = [torch.randn(9, n) for n in widths_in]
    g = [torch.randn(9, n) for n in widths_out]
    mask, ones = torch.rand(9) > 0.4, [True, False]
    acc_a = [kk.PackedSymmetric(n + one) for n, one in zip(widths_in, ones, strict=True)]
    acc_s = [kk.PackedSymmetric(n) for n in widths_out]
    kk.accumulate_factors_(acc_a, acc_s, a, g, mask, ones_column=ones)
    for acc, x, one in zip(acc_a + acc_s, a + g, [*ones, False, False, False], strict=True):
        alone = kk.syrk_(kk.PackedSymmetric(acc.n), x, mask, ones_column=one)
        assert torch.equal(acc.to_dense(), alone.to_dense())


def test_rows_may_differ_between_layers_and_lists_be_empty(backend: str) -> None:
    acc = [kk.PackedSymmetric(4), kk.PackedSymmetric(6)]
    g = [torch.randn(3, 4), torch.randn(2, 5, 6)]
    kk.accumulate_factors_([], acc, [], g, ones_column=[])
    for matrix, x in zip(acc, g, strict=True):
        torch.testing.assert_close(matrix.to_dense(), outer_sum(x, dtype=torch.float32))
    kk.accumulate_factors_([], [], [], [])


def test_same_inputs_same_bits(backend: str) -> None:
    a, g = torch.randn(40, 130), torch.randn(40, 257)
    results = []
    for _ in range(2):
        acc_a, acc_s = kk.PackedSymmetric(130), kk.PackedSymmetric(257)
        kk.accumulate_factors_(acc_a, acc_s, a, g)
        results.append((acc_a.data, acc_s.data))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


A, G = torch.zeros(4, 5), torch.zeros(4, 3)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("accumulator is a tensor", {"acc_a": torch.zeros(5, 5)}, TypeError, r"acc_a\[0\] is a Tensor"),
    ("output accumulator", {"acc_s": torch.zeros(3, 3)}, TypeError, r"acc_s\[0\] is a Tensor"),
    ("wrong input width", {"a": G}, ValueError, r"a\[0\] has shape"),
    ("wrong output width", {"g": A}, ValueError, r"g\[0\] has shape"),
    ("integers", {"a": A.int()}, TypeError, r"a\[0\] is torch.int32"),
    ("wider", {"g": G.double()}, TypeError, r"g\[0\] is torch.float64"),
    ("sparse", {"g": G.to_sparse()}, ValueError, r"g\[0\] has layout"),
    ("other device", {"a": A.to("meta")}, ValueError, r"a\[0\] is on meta"),
    ("fewer inputs", {"a": []}, ValueError, "a has 0 entries"),
    ("more outputs", {"g": [G, G]}, ValueError, "g has 2 entries"),
    ("fewer ones", {"ones_column": []}, ValueError, "ones_column has 0 entries"),
    ("mask", {"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask has shape"),
    ("mask of weights", {"mask": torch.ones(4)}, TypeError, "mask is torch.float32"),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"acc_a": kk.PackedSymmetric(5), "acc_s": kk.PackedSymmetric(3), "a": A, "g": G}
    with pytest.raises(error, match=message):
        kk.accumulate_factors_(**{**good, **change})
    for name in ("acc_a", "acc_s"):
        assert not good[name].to_dense().any(), "a refused call must change nothing"


def test_a_mask_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look makes the host wait for a GPU."""
    looks = []
    kept_rows = syrk_pytorch.kept_rows

    def counted(mask: Tensor | None) -> Tensor | None:
        looks.append(mask)
        return kept_rows(mask)

    monkeypatch.setenv("KFADE_DISABLE", "cpu")
    monkeypatch.setattr(syrk_pytorch, "kept_rows", counted)
    acc_a, acc_s = ([kk.PackedSymmetric(5) for _ in range(4)] for _ in range(2))
    a, g = ([torch.randn(2, 9, 5) for _ in range(4)] for _ in range(2))
    kk.accumulate_factors_(acc_a, acc_s, a, g, torch.rand(2, 9) > 0.4)
    assert len(looks) == 1

"""The native module itself: every instruction set against float64, bits whatever the threads, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfade_kernels as kk
import pytest
import torch
from kfade_kernels import cpu_support as support
from kfade_kernels import native
from kfade_kernels.packed import packed_elements
from oracles import assert_as_accurate, assert_close, outer_sum, squared_gradients
from torch import Tensor

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.missing))
ISAS = [] if native.module is None else native.module.isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with each instruction set that this processor has, also where PyTorch would be faster."""
    monkeypatch.setenv(support.ISA, request.param)
    monkeypatch.setenv("KFADE_ENABLE", "cpu")
    monkeypatch.setenv("KFADE_DISABLE", "triton,pytorch")
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def small_blocks(monkeypatch: pytest.MonkeyPatch, lines: int) -> None:
    """So few lines and columns that small problems have many chunks and tiles."""
    columns = {"avx2": 8, "avx512": 16, "avx512_bf16": 16}
    monkeypatch.setattr(support, "_blocks", lambda: {name: (lines, count) for name, count in columns.items()})


def test_packed_storage_is_that_of_python() -> None:
    for order in [*range(1, 400), 4096, 11_009, 100_000]:
        assert native.module.packed_elements(order) == packed_elements(order)


def test_threads_are_pytorchs_own() -> None:
    """One OpenMP runtime in the process: the one that PyTorch's operators are linked with."""
    found = native.module.parallel_runtime()
    assert found is not None
    assert found in Path("/proc/self/maps").read_text()
    assert "omp" in Path(found).name


# Around the lanes (8, 16), their halves, three of them (24, 48), and a block row (128).
ORDERS = [1, 3, 4, 7, 8, 9, 15, 16, 17, 24, 25, 31, 33, 47, 48, 49, 63, 65, 127, 128, 129, 257]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outer_products(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for lines in (3, 512):
        small_blocks(monkeypatch, lines)
        for order in ORDERS:
            for ones in (False, True):
                if order == ones:
                    continue
                x, mask = torch.randn(13, order - ones).to(dtype), torch.rand(13) > 0.4
                x[~mask] = torch.nan
                acc = kk.PackedSymmetric.from_dense(torch.eye(order))
                assert kk.explain("syrk_", acc, x, ones_column=ones).backend == "cpu"
                kk.syrk_(acc, x, mask, -0.5, ones_column=ones)
                plain = torch.eye(order) - 0.5 * outer_sum(x, mask, ones=ones, dtype=torch.float32)
                truth = torch.eye(order).double() - 0.5 * outer_sum(x, mask, ones=ones)
                assert_as_accurate(acc.to_dense(), plain, truth)


@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
def test_squares(isa: str, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that end between two rows of a pair, and that no chunk holds."""
    lengths = [1, 0, 5, 2, 30, 3]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    for lines in (4, 512):
        small_blocks(monkeypatch, lines)
        for d_out, d_in in zip(ORDERS, reversed(ORDERS), strict=True):
            g, a = (torch.randn(sum(lengths), n).to(t) for n, t in zip((d_out, d_in), dtypes, strict=True))
            mask = torch.rand(sum(lengths)) > 0.3
            g[~mask] = torch.inf
            lam = torch.rand(d_out, d_in + 1)
            before = lam.clone()
            said = kk.explain("eigenvalue_correction_", lam, g, a, mask=mask, ones_column=True, cu_seqlens=ends)
            assert said.backend == "cpu"
            kk.eigenvalue_correction_(lam, g, a, mask=mask, ones_column=True, cu_seqlens=ends)
            parts = [
                squared_gradients(
                    g[None, i:j].to(t), a[None, i:j].to(t), None, None, mask[None, i:j], ones=True, dtype=t
                )
                for t in (torch.float32, torch.float64)
                for i, j in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
            ]
            plain, truth = before + sum(parts[: len(lengths)]), before.double() + sum(parts[len(lengths) :])
            assert_as_accurate(lam, plain, truth, times=8)


@pytest.mark.parametrize("view", [lambda lam: lam, lambda lam: lam.T.contiguous().T, lambda lam: lam[:, :1]])
def test_squares_into_any_layout(isa: str, view: Any) -> None:
    lam = view(torch.rand(40, 50))
    around = lam.clone()
    g, a = torch.randn(2, 6, lam.shape[0]), torch.randn(2, 6, lam.shape[1])
    kk.eigenvalue_correction_(lam, g, a)
    assert_close(lam, around + squared_gradients(g, a, None, None), 1e-6)
    one_row = torch.zeros(50, 1).T
    kk.eigenvalue_correction_(one_row, g[..., :1], torch.ones(2, 6, 50))
    assert_close(one_row, squared_gradients(g[..., :1], torch.ones(2, 6, 50), None, None), 1e-6)


def test_nothing_beside_the_result_is_written(isa: str) -> None:
    whole = torch.full((30, 70), 7.0)
    lam = whole[3:20, 5:38]
    kk.eigenvalue_correction_(lam, torch.randn(2, 9, 17), torch.randn(2, 9, 33))
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[3:20, 5:38] = False
    assert torch.equal(whole[outside], torch.full((int(outside.sum()),), 7.0))
    buffer = torch.full((packed_elements(150) + 64,), 7.0)
    kk.syrk_(kk.PackedSymmetric.from_packed(buffer[32:-32], 150), torch.randn(5, 150))
    assert torch.equal(buffer[:32], buffer[-32:]) and buffer[0] == 7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(isa: str, dtype: torch.dtype, threads: Any) -> None:
    x, mask = torch.randn(1100, 300).to(dtype), torch.rand(1100) > 0.1
    g, a = torch.randn(5, 130, 200).to(dtype), torch.randn(5, 130, 140).to(dtype)
    found: list[tuple[Tensor, Tensor]] = []
    for count in (1, 2, 3, 1, 2):
        threads(count)
        acc = kk.syrk_(kk.PackedSymmetric(301), x, mask, ones_column=True)
        found.append((acc.to_dense(), kk.eigenvalue_correction_(torch.zeros(200, 140), g, a)))
    for one in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], one, strict=True))


def test_pairs_of_bfloat16_are_summed_in_float32() -> None:
    if "avx512_bf16" not in ISAS:
        pytest.skip("this processor has no products of bfloat16")
    acc = kk.PackedSymmetric(3)
    x = torch.tensor([[256.0, 1.0, 0.0]] + [[1.0, 0.0, 0.0]] * 300).bfloat16()
    kk.syrk_(acc, x)
    assert acc.to_dense()[0, 0] == 65_836  # bfloat16 would end at 65,536


@pytest.mark.parametrize("value", ["avx512_bf16", "avx512", "avx2"])
def test_the_instruction_set_can_be_lowered(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(support.ISA, value)
    said = kk.explain("syrk_", kk.PackedSymmetric(40), torch.zeros(9, 40))
    allowed = support.ISAS[: support.ISAS.index(value) + 1]
    widest = [name for name in ISAS if name in allowed][-1:]
    assert [said.configuration.split(",")[0]] == widest or (said.backend == "pytorch" and not widest)
    monkeypatch.setenv(support.ISA, "sse2")
    with pytest.raises(ValueError, match="KFADE_CPU_ISA is 'sse2'; it must be one of avx2, avx512, avx512_bf16"):
        kk.explain("syrk_", kk.PackedSymmetric(40), torch.zeros(9, 40))


def test_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(operation: str, *args: Any, **kwargs: Any) -> str | None:
        return dict(kk.explain(operation, *args, **kwargs).refused).get("cpu")

    x, lam = torch.zeros(2, 9, 40), torch.zeros(40, 40)
    assert refused("syrk_", kk.PackedSymmetric(40), x) is None
    assert refused("syrk_", kk.PackedSymmetric(40, dtype=torch.float64), x) == "float64"
    assert refused("accumulate_factors_", [], [], [], []) == "there are no problems"
    q = torch.eye(40)
    assert refused("eigenvalue_correction_", lam, x, x, q, q) is None
    assert "output side is rotated as gradient" in str(
        refused("eigenvalue_correction_", torch.zeros(40, 5), x, x[..., :5], q, None)
    )
    assert refused("eigenvalue_correction_", lam, x[:, :1], x[:, :1]) == "squares of single tokens are one product"
    many = torch.zeros(1, 300, 40)
    assert "300 tokens of float32" in str(refused("eigenvalue_correction_", lam, many, many))
    monkeypatch.setattr(native, "missing", "the native module is not built")
    assert refused("syrk_", kk.PackedSymmetric(40), x) == "the native module is not built"


SYRK: list[tuple[dict[str, Any], str]] = [
    ({"isa": "mmx"}, "isa is 'mmx'; it must be one of"),
    ({"blocks": (0, 16)}, "lines is 0; it must be between 1"),
    ({"blocks": (4, 12)}, "columns is 12; it must be a multiple of 8"),
    ({"blocks": (4, 0)}, "columns is 0"),
    ({"packed": 0}, "packed is 0; it must be the address of a tensor"),
    ({"packed": 2}, "packed is 2; it must be a multiple of 4 bytes"),
    ({"order": 0}, "order is 0; it must be between 1"),
    ({"order": 9}, "x columns is 8; it must be order"),
    ({"order": 1 << 50}, "order is"),
    ({"x": (0, "float32", 8, 8, False)}, "x is 0; it must be the address"),
    ({"x": (6, "float32", 8, 8, False)}, "x is 6; it must be a multiple of 4"),
    ({"x": (3, "bfloat16", 8, 8, False)}, "x is 3; it must be a multiple of 2"),
    ({"x": (8, "float64", 8, 8, False)}, "dtype is 'float64'; it must be"),
    ({"x": (8, "float32", -1, 8, False)}, "x row stride is -1"),
    ({"x": (8, "float32", 8, -8, False)}, "x columns is -8"),
    ({"count": -1}, "count is -1; it must be between 0"),
    ({"alpha": float("nan")}, "alpha is nan; it must be finite"),
    ({"threads": 0}, "threads is 0; it must be at least 1"),
]


@pytest.mark.parametrize(("change", "message"), SYRK)
def test_the_module_refuses_wrong_outer_products(change: dict[str, Any], message: str) -> None:
    acc, x = torch.zeros(packed_elements(8)), torch.zeros(3, 8)
    good = {
        "isa": ISAS[0], "blocks": (4, 8), "packed": acc.data_ptr(), "order": 8, "count": 3, "mask": 0, "alpha": 1.0,
        "x": (x.data_ptr(), "float32", 8, 8, False), "threads": 1,
    }  # fmt: skip
    native.module.syrk(**good)
    with pytest.raises(ValueError, match=message):
        native.module.syrk(**{**good, **change})


SQUARES: list[tuple[dict[str, Any], str]] = [
    ({"offsets": []}, "offsets length is 0"),
    ({"offsets": [1, 3]}, r"offsets\[0\] is 1; it must be 0"),
    ({"offsets": [0, 3, 2]}, "an entry of offsets is 2; it must be at least the one before it"),
    ({"out": 0}, "out is 0"),
    ({"out": 6}, "out is 6; it must be a multiple of 4 bytes"),
    ({"out_stride": 7}, "out stride is 7; it must be at least the columns of right"),
    ({"left": (0, "float32", 8, 8, False)}, "left is 0"),
    ({"right": (0, "float32", 8, 8, False)}, "right is 0"),
    ({"right": (4, "bfloat16", -8, 8, False)}, "right row stride is -8"),
    ({"threads": -1}, "threads is -1"),
]


@pytest.mark.parametrize(("change", "message"), SQUARES)
def test_the_module_refuses_wrong_squares(change: dict[str, Any], message: str) -> None:
    out, x = torch.zeros(8, 8), torch.zeros(3, 8)
    rows = (x.data_ptr(), "float32", 8, 8, False)
    good = {
        "isa": ISAS[0], "blocks": (4, 8), "out": out.data_ptr(), "out_stride": 8, "left": rows, "right": rows,
        "offsets": [0, 3], "mask": 0, "threads": 1,
    }  # fmt: skip
    native.module.squares(**good)
    with pytest.raises(ValueError, match=message):
        native.module.squares(**{**good, **change})

"""Which calls the kernels in CUDA would serve: asked of tensors without memory, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import kfade_kernels as kk
import pytest
import torch
from kfade_kernels import cuda_support, devices, native, triton_support
from kfade_kernels.eigenvalue_correction import triton as correction_plan
from kfade_kernels.syrk import triton as outer_plan
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
GPU = {"device": "cuda"}
OPERATIONS = ("syrk_", "accumulate_factors_", "eigenvalue_correction_")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[devices.Device]:
    """Tensors on `cuda` are taken to lie on an H100, with a driver and the module."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("KFADE_ENABLE", "cuda")
    monkeypatch.setattr(cuda_support, "_module_refusal", lambda: None)
    for module in (cuda_support, triton_support, outer_plan, correction_plan):
        monkeypatch.setattr(module, "of_tensors", lambda _: devices.H100)
    with FakeTensorMode():
        yield devices.H100


def calls(dtype: torch.dtype = torch.bfloat16, width: int = 1024, tokens: int = 512) -> dict[str, tuple[Any, ...]]:
    g, a = (torch.empty(4, tokens, width, dtype=dtype, **GPU) for _ in range(2))
    acc = kk.PackedSymmetric(width, **GPU)
    return {
        "syrk_": (acc, a),
        "accumulate_factors_": (acc, kk.PackedSymmetric(width, **GPU), a, g),
        "eigenvalue_correction_": (torch.empty(width, width, **GPU), g, a),
    }


def why_not(operation: str, *args: Any, **kwargs: Any) -> str:
    said = kk.explain(operation, *args, **kwargs)
    assert said.backend != "cuda"
    return dict(said.refused)["cuda"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_served_before_triton_where_enabled(gpu: devices.Device, operation: str, dtype: torch.dtype) -> None:
    said = kk.explain(operation, *calls(dtype)[operation])
    assert said.backend == "cuda" and said.refused == ()
    assert "hopper, 256×" in said.configuration and "clusters of 2" in said.configuration


@pytest.mark.parametrize("operation", OPERATIONS)
def test_off_until_seen_correct(gpu: devices.Device, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFADE_ENABLE", "triton")
    args = calls()[operation]
    for seen in ({("triton", operation, "sm_90")}, {("cuda", operation, "sm_80")}, {("cuda", "rotate", "sm_90")}):
        monkeypatch.setattr(cuda_support, "verified", lambda seen=seen: frozenset(seen))
        assert why_not(operation, *args) == "not yet seen correct on sm_90 (KFADE_ENABLE=cuda switches it on)"
    monkeypatch.setattr(cuda_support, "verified", lambda: frozenset({("cuda", operation, "sm_90")}))
    assert kk.explain(operation, *args).backend == "cuda"
    monkeypatch.setenv("KFADE_DISABLE", "cuda")
    assert why_not(operation, *args) == "disabled by KFADE_DISABLE"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_other_dtypes_and_layouts(gpu: devices.Device, operation: str) -> None:
    assert why_not(operation, *calls(torch.float32)[operation]).startswith("float32: the operands must be 16-bit")
    assert "16 bytes" in why_not(operation, *calls(width=1023)[operation])
    assert "below" in why_not(operation, *calls(width=32)[operation])


def test_other_states(gpu: devices.Device) -> None:
    x = torch.empty(512, 1024, dtype=torch.bfloat16, **GPU)
    assert why_not("syrk_", kk.PackedSymmetric(1024, dtype=torch.float64, **GPU), x) == "float64"
    apart = torch.empty_strided((512, 1024), (1028, 1), dtype=torch.bfloat16, **GPU)
    assert "16 bytes" in why_not("syrk_", kk.PackedSymmetric(1024, **GPU), apart)


def test_corrections_that_others_serve(gpu: devices.Device) -> None:
    lam = torch.empty(1024, 512, **GPU)
    g, a = (torch.empty(4, 64, n, dtype=torch.bfloat16, **GPU) for n in (1024, 512))
    q_out, q_in = (torch.empty(2, n, n, dtype=torch.bfloat16, **GPU) for n in (1024, 512))
    name = "eigenvalue_correction_"
    assert kk.explain(name, lam, g, a, q_out, q_in).backend == "cuda"
    assert "float32" in why_not(name, lam, g, a, torch.empty(1024, 1024, **GPU), q_in)
    one_g, one_a = (torch.empty(4, 1, n, dtype=torch.bfloat16, **GPU) for n in (1024, 512))
    assert why_not(name, lam, one_g, one_a) == "sequences of one token are a product of squares"
    long_g, long_a = (torch.empty(2, 2048, n, dtype=torch.bfloat16, **GPU) for n in (1024, 512))
    assert why_not(name, lam, long_g, long_a, q_out, q_in) == "gradients of 2048 tokens are rotated, not tokens"
    overlapping = torch.empty_strided((4, 64, 1024), (1024, 1024, 1), dtype=torch.bfloat16, **GPU)
    assert why_not(name, lam, overlapping, a) == "sequences overlap, or are not whole rows apart"
    biased = torch.empty(1024, 513, **GPU)
    assert "16 bytes" in why_not(name, biased, g, a, ones_column=True)
    ends = torch.empty(5, dtype=torch.int32, **GPU)
    assert kk.explain(name, lam, g.flatten(0, 1), a.flatten(0, 1), cu_seqlens=ends).backend == "cuda"


def test_devices_without_a_form(gpu: devices.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_support, "of_tensors", lambda _: devices.B200)
    assert why_not("syrk_", *calls()["syrk_"]) == "nothing is compiled for sm_100"
    monkeypatch.setattr(cuda_support, "of_tensors", lambda _: devices.A100)
    assert "ampere, 128×128×32" in kk.explain("syrk_", *calls()["syrk_"]).configuration


def test_a_form_that_is_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_support, "FILE", "configurations.json")
    cuda_support.forms.cache_clear()
    with pytest.raises(ValueError, match=r"entry 0 of syrk/configurations\.json has"):
        cuda_support.forms("syrk")
    cuda_support.forms.cache_clear()


@pytest.mark.parametrize("summed", [1, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("splits", [1, 2, 5, 64])
def test_no_part_is_empty(summed: int, splits: int) -> None:
    part = cuda_support.part_of(summed, splits, 64)
    parts = -(-summed // part)
    assert part % 64 == 0 and parts <= splits and (parts - 1) * part < summed <= parts * part


def test_blocks_are_whole_clusters() -> None:
    form = cuda_support.form_of("syrk", devices.H100)
    assert form is not None and form.cluster == 2
    for items, most, blocks in ((1, 132, 2), (66, 132, 132), (1000, 132, 132), (1000, 131, 130), (3, 132, 6)):
        assert form.blocks(items, replace(devices.H100, multiprocessors=most)) == blocks


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(native.module is None or native.module.cuda_version is None, reason="built without CUDA")
def test_without_a_driver_the_module_loads_and_says_why() -> None:
    assert cuda_support._module_refusal()
    row = (1 << 20, 1 << 20, 0, 10, 64, 64, 64, 64)
    with pytest.raises(RuntimeError, match="tensor maps"):
        native.module.cuda_outer_table("hopper", "bfloat16", [row])
    assert native.module.cuda_outer_table("ampere", "bfloat16", [row])[1] == 1
    with pytest.raises(RuntimeError, match="ampere_kernel: "):
        native.module.cuda_outer(
            kernel="ampere", dtype="bfloat16", table=1 << 20, items=1, partials=0, alpha=1.0, flush=8192, masked=False,
            group=8, blocks=1, stream=0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="width is 60"):
        native.module.cuda_outer_table("hopper", "bfloat16", [(1 << 20, 1 << 20, 0, 10, 60, 60, 64, 64)])

"""Who would serve a call on a GPU, and how: asked of tensors without memory, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kfade_kernels as kk
import pytest
import torch

pytest.importorskip("triton")

from kfade_kernels import devices, triton_support
from kfade_kernels.apply_update import triton as apply_update
from kfade_kernels.eigenvalue_correction import triton as eigenvalue_correction
from kfade_kernels.precision import multiplies_as_they_are
from kfade_kernels.product import triton as product
from kfade_kernels.sampled_cross_entropy import triton as sampled_cross_entropy
from kfade_kernels.sketch import triton as sketch
from kfade_kernels.syrk import triton as syrk
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
GPU = {"device": "cuda"}


@pytest.fixture(params=devices.DEVICES, ids=lambda device: device.name)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[devices.Device]:
    """Tensors on `cuda` are taken to lie on this device, in a process without the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("KFADE_ENABLE", "triton")
    for module in (triton_support, syrk, sketch, product, eigenvalue_correction, sampled_cross_entropy, apply_update):
        if hasattr(module, "of_tensors"):
            monkeypatch.setattr(module, "of_tensors", lambda _: request.param)
    with FakeTensorMode():
        yield request.param


def calls(dtype: torch.dtype = torch.bfloat16, width: int = 1024, tokens: int = 512) -> dict[str, tuple[Any, Any]]:
    """A call of each operation, of a size that a GPU is for."""
    g, a = (torch.empty(4, tokens, width, dtype=dtype, **GPU) for _ in range(2))
    q = torch.empty(width, width, **GPU)
    acc = kk.PackedSymmetric(width, **GPU)
    return {
        "syrk_": ((acc, a), {}),
        "accumulate_factors_": ((acc, kk.PackedSymmetric(width, **GPU), a, g), {}),
        "sketch_": ((torch.empty(width, 74, **GPU), torch.empty((), **GPU), a, torch.empty(width, 74, **GPU)), {}),
        "rotate": ((a, q), {}),
        "eigenvalue_correction_": ((torch.empty(width, width, **GPU), g, a, q, q), {}),
        "kron_solve": (
            (torch.empty(width, width, dtype=dtype, **GPU), q, q, torch.empty(width, width, **GPU), 0.1),
            {},
        ),
        "sampled_cross_entropy": (
            (torch.empty(tokens, width, dtype=dtype, **GPU),),
            {
                "keys": torch.empty(tokens, dtype=torch.int64, **GPU),
                "weight": torch.empty(8 * width, width, dtype=dtype, **GPU),
            },
        ),
        "apply_update_": (([torch.empty(width, width, dtype=dtype, **GPU)], [torch.empty(width, width, **GPU)]), {}),
    }


OPERATIONS = (
    "syrk_",
    "accumulate_factors_",
    "sketch_",
    "rotate",
    "eigenvalue_correction_",
    "kron_solve",
    "sampled_cross_entropy",
    "apply_update_",
)


def test_every_operation_is_asked() -> None:
    assert set(OPERATIONS) == set(kk.operations())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_served_by_triton_where_enabled(gpu: devices.Device, operation: str, dtype: torch.dtype) -> None:
    args, kwargs = calls(dtype)[operation]
    said = kk.explain(operation, *args, **kwargs)
    assert said.backend == "triton", said
    assert said.configuration


@pytest.mark.parametrize("operation", OPERATIONS)
def test_off_until_seen_correct(gpu: devices.Device, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFADE_ENABLE", "")
    monkeypatch.setattr(triton_support, "verified", frozenset)
    args, kwargs = calls()[operation]
    said = kk.explain(operation, *args, **kwargs)
    assert said.backend == "pytorch"
    reason = dict(said.refused)["triton"]
    assert reason == f"not yet seen correct on {gpu.architecture} (KFADE_ENABLE=triton switches it on)"
    monkeypatch.setattr(triton_support, "verified", lambda: frozenset({("triton", operation, gpu.architecture)}))
    assert kk.explain(operation, *args, **kwargs).backend == "triton"
    monkeypatch.setattr(triton_support, "verified", lambda: frozenset({("triton", operation, "sm_75")}))
    assert kk.explain(operation, *args, **kwargs).backend == "pytorch"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kill_switch(gpu: devices.Device, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFADE_DISABLE", "triton")
    args, kwargs = calls()[operation]
    said = kk.explain(operation, *args, **kwargs)
    assert said.backend == "pytorch"
    assert dict(said.refused)["triton"] == "disabled by KFADE_DISABLE"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_without_triton_pytorch_serves(gpu: devices.Device, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "triton_version", lambda: "")
    args, kwargs = calls()[operation]
    said = kk.explain(operation, *args, **kwargs)
    assert (said.backend, dict(said.refused)["triton"]) == ("pytorch", "Triton is not installed")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_interpreter_cannot_read_a_gpu(
    gpu: devices.Device, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args, kwargs = calls()[operation]
    said = kk.explain(operation, *args, **kwargs)
    assert said.backend == "pytorch"
    assert "interpreter" in dict(said.refused)["triton"]


@pytest.mark.parametrize("operation", ["syrk_", "accumulate_factors_", "eigenvalue_correction_", "kron_solve"])
def test_small_matrices_are_left_to_pytorch(gpu: devices.Device, operation: str) -> None:
    args, kwargs = calls(width=48)[operation]
    said = kk.explain(operation, *args, **kwargs)
    assert said.backend == "pytorch"
    assert "below 64" in dict(said.refused)["triton"]


def test_double_precision_is_left_to_pytorch(gpu: devices.Device) -> None:
    acc, x = kk.PackedSymmetric(1024, dtype=torch.float64, **GPU), torch.empty(512, 1024, dtype=torch.float64, **GPU)
    said = kk.explain("syrk_", acc, x)
    assert (said.backend, dict(said.refused)["triton"]) == ("pytorch", "float64")


def test_descriptors_need_the_hardware_aligned_rows_and_no_mask(gpu: devices.Device) -> None:
    acc, x = kk.PackedSymmetric(8192, **GPU), torch.empty(4096, 8192, dtype=torch.bfloat16, **GPU)
    mask = torch.empty(4096, dtype=torch.bool, **GPU)
    hopper = gpu.architecture in ("sm_90", "sm_100")
    assert ("descriptors" in kk.explain("syrk_", acc, x).configuration) == hopper
    assert "descriptors" not in kk.explain("syrk_", acc, x, mask).configuration
    # One element less in a row, and none begins on 16 bytes; the tile is then a small one.
    odd = kk.explain("syrk_", kk.PackedSymmetric(8191, **GPU), x.narrow(1, 0, 8191)).configuration
    assert f"tiles of {syrk.ANY_ROWS.block_m}×{syrk.ANY_ROWS.block_n}" in odd


def test_grouping_is_explained(gpu: devices.Device) -> None:
    orders = [1024] * 6 + [2048] * 2
    accumulators = [kk.PackedSymmetric(order, **GPU) for order in orders]
    rows = [torch.empty(4096, order, dtype=torch.bfloat16, **GPU) for order in orders]
    said = kk.explain(
        "accumulate_factors_", accumulators[:4], accumulators[4:], rows[:4], rows[4:], ones_column=[False] * 4
    )
    assert said.configuration.startswith("8 problems in ")
    assert "launch" in said.configuration


def test_sequences_beyond_the_crossover_are_explained(gpu: devices.Device) -> None:
    lam, q = torch.empty(512, 512, **GPU), torch.empty(512, 512, **GPU)
    g = torch.empty(2, 2048, 512, **GPU)
    assert (
        "output rotated as gradient, input rotated as gradient"
        in kk.explain("eigenvalue_correction_", lam, g, g, q, q).configuration
    )
    short = torch.empty(64, 64, 512, **GPU)
    assert "rotated as tokens" in kk.explain("eigenvalue_correction_", lam, short, short, q, q).configuration


def test_small_matrices_are_served_with_a_large_one(gpu: devices.Device) -> None:
    """A router of 8 experts must not take all other layers of its launch from the kernels."""
    acc = [kk.PackedSymmetric(n, **GPU) for n in (1024, 8)]
    g = [torch.empty(512, n, dtype=torch.bfloat16, **GPU) for n in (1024, 8)]
    assert kk.explain("accumulate_factors_", [], acc, [], g, ones_column=[]).backend == "triton"
    assert kk.explain("accumulate_factors_", [], acc[1:], [], g[1:], ones_column=[]).backend == "pytorch"
    v, q = [torch.empty(n, 1024, **GPU) for n in (1024, 8)], [torch.empty(n, n, **GPU) for n in (1024, 8)]
    arguments = v, q, [q[0], q[0]], v, 0.1
    assert kk.explain("kron_solve", *arguments).backend == "triton"
    assert kk.explain("kron_solve", *(x[1:] if isinstance(x, list) else x for x in arguments)).backend == "pytorch"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_graphs_are_not_captured(gpu: devices.Device, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would copy the table of addresses again from memory that was meanwhile given to others."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    args, kwargs = calls()[operation]
    said = kk.explain(operation, *args, **kwargs)
    assert said.backend == "pytorch"
    assert "CUDA graph" in dict(said.refused)["triton"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_in_double_precision_multiply_in_it(gpu: devices.Device, dtype: torch.dtype) -> None:
    """PyTorch refuses a product of 16-bit operands with a float64 result."""
    x = torch.empty(64, 200, dtype=dtype, **GPU)
    assert multiplies_as_they_are(x, torch.float32)
    assert not multiplies_as_they_are(x, torch.float64)
    assert not multiplies_as_they_are(torch.empty(64, 200, **GPU), torch.float32)
    assert not multiplies_as_they_are(torch.empty(64, 200, dtype=dtype), torch.float32)

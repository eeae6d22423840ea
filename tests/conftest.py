"""Fixtures that every test shares."""

from __future__ import annotations

import importlib.util
import os
import signal

# Before anything imports Triton: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from kfade_kernels import native

# A shell ignores Ctrl-C in what it runs in the background, and tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# What is switched off so that a test runs with one kind of backend.
DISABLED = {
    "pytorch": "cpu",
    "reference": "triton,cuda,cpu,pytorch",
    "triton": "cpu,pytorch",
    "cpu": "triton,pytorch",
}


@pytest.fixture(params=list(DISABLED))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with PyTorch's own operations, the plain reference, Triton's kernels, and those in C++.

    Triton's kernels run in its interpreter. What the kernels refuse (float64, and bfloat16 there) the reference
    serves; sizes at which they are not faster they do not refuse here.
    """
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("Triton is not installed")
    if request.param == "cpu" and native.missing is not None:
        pytest.skip(native.missing)
    monkeypatch.setenv("KFADE_ENABLE", request.param if request.param in ("triton", "cpu") else "")
    monkeypatch.setenv("KFADE_DISABLE", DISABLED[request.param])
    return str(request.param)

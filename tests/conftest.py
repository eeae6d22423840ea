"""Fixtures that every test shares."""

from __future__ import annotations

import importlib.util
import os
import signal

# Before anything imports Triton: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# A shell ignores Ctrl-C in what it runs in the background, and tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["fastest", "reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the backend that serves a CPU, with the plain reference, and with Triton's kernels.

    The kernels run in Triton's interpreter; what they refuse there (float64, bfloat16) the reference serves.
    """
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("Triton is not installed")
    monkeypatch.setenv("KFADE_ENABLE", "triton" if request.param == "triton" else "")
    disabled = {"fastest": "", "reference": "pytorch,triton,cuda", "triton": "pytorch"}[request.param]
    monkeypatch.setenv("KFADE_DISABLE", disabled)
    return str(request.param)

"""Fixtures that every test shares."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["fastest", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the backend that would serve the call, and once more with the plain reference."""
    disabled = "cpu,triton,cuda" if request.param == "reference" else ""
    monkeypatch.setenv("KFADE_DISABLE", disabled)
    return str(request.param)

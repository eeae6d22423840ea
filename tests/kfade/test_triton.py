"""A whole fit, its solve and an update with the Triton kernels serving, in the interpreter, beside PyTorch's path."""

from __future__ import annotations

from typing import Any

import kfade_kernels as kk
import pytest
import torch
from models import batch, tiny
from oracles import assert_close
from torch import Tensor, nn

import kfade
from kfade import factors, loss

pytest.importorskip("triton")


def everything(model: nn.Module, config: kfade.FitConfig) -> tuple[kfade.Curvature, dict[str, Tensor]]:
    """The curvature of two batches of unequal padding, and the solution for fixed gradients."""
    curvature = kfade.fit(model, [batch("left", seed=0), batch("right", seed=1, sequences=3, tokens=7)], config)
    generator = torch.Generator().manual_seed(5)
    gradients = {n: torch.randn(x.d_out, x.width_in, generator=generator) for n, x in curvature.items()}
    return curvature, curvature.solve_matrices(gradients, 0.1, "relative")


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_fit_by_the_kernels(kind: str, curvature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = kfade.FitConfig(curvature=curvature, modules="all-linear", seed=3)
    expected, expected_solution = everything(tiny(kind, torch.float32), config)
    served: set[str] = set()
    choose = kk.dispatch.Operation.choose

    def noting(self: Any, *arguments: Any) -> Any:
        found = choose(self, *arguments)
        served.add(f"{self.name} {found[0].name}")
        return found

    monkeypatch.setenv("KFADE_ENABLE", "triton")
    monkeypatch.setattr(kk.dispatch.Operation, "choose", noting)
    monkeypatch.setattr(factors, "gains_from_grouping", lambda _: True)
    monkeypatch.setattr(loss, "runs_ahead", lambda _: True)
    found, solution = everything(tiny(kind, torch.float32), config)
    assert not any(name.endswith("reference") for name in served), served
    if curvature != "diagonal":
        assert {"accumulate_factors_ triton", "kron_solve triton"} <= served
    if curvature != "kfac":
        assert "eigenvalue_correction_ triton" in served
    for name, layer in found.items():
        other = expected[name]
        if curvature != "diagonal":
            assert_close(layer.a_sum.to_dense(), other.a_sum.to_dense(), 1e-5, f"A of {name}")
            assert_close(layer.s_sum.to_dense(), other.s_sum.to_dense(), 1e-5, f"S of {name}")
        # Eigenvectors of close eigenvalues turn with the last bit of a factor, and Λ with them.
        assert_close(solution[name], expected_solution[name], 1e-3, f"solution for {name}")

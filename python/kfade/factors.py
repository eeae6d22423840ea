"""First stage: the Kronecker factors `A_sum = Σ a aᵀ` and `S_sum = Σ g gᵀ` of every layer."""

from __future__ import annotations

import torch
from kfade_kernels import PackedSymmetric, accumulate_factors_
from torch import Tensor

from .capture import Pair
from .curvature import LayerCurvature
from .layers import Layer
from .loss import Batch, require_finite


class FactorCollector:
    """Adds pairs to the factors of their layers.

    Args:
        states: the layers' states, by name.
        dtype: of the accumulators.
        samples: label samples a batch; inputs are added for the first alone.
    """

    def __init__(self, states: dict[str, LayerCurvature], dtype: torch.dtype, device: torch.device) -> None:
        self._states = states
        self.first_sample = True
        for state in states.values():
            state.s_sum = PackedSymmetric(state.d_out, dtype=dtype, device=device)
        for state in states.values():
            if state.group == state.name:
                state.a_sum = PackedSymmetric(state.width_in, dtype=dtype, device=device)

    def __call__(self, layer: Layer, pairs: list[Pair], batch: Batch) -> None:
        state = self._states[layer.name]
        assert state.s_sum is not None
        for pair in pairs:
            g = kept_rows(pair.g, batch)
            require_finite(g, batch, f"the output gradient of {layer.name}")
            if layer.leads and self.first_sample:
                a = kept_rows(pair.a, batch)
                require_finite(a, batch, f"the input of {layer.name}")
                assert state.a_sum is not None
                a = a.to(pair.dtype)
                accumulate_factors_([state.a_sum], [state.s_sum], [a], [g], ones_column=[layer.has_bias])
                state.positions += a.shape[0]
            else:
                accumulate_factors_([], [state.s_sum], [], [g], ones_column=[])

    def finish(self) -> None:
        """Give the members of each input group their leader's factor."""
        for state in self._states.values():
            leader = self._states[state.group]
            state.a_sum, state.positions = leader.a_sum, leader.positions


def kept_rows(x: Tensor, batch: Batch) -> Tensor:
    """The rows `[P, d]` of `x [B, T, d]` that are not padding; a view when none is."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if bool(batch.attention.all()) else flat[batch.attention.reshape(-1)]

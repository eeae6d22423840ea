"""Third stage: the corrected eigenvalues `Λ_sum = Σ_n (Q_Sᵀ G_n Q_A)∘²`, from per-sequence gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from kfade_kernels import bf16_pair, eigenvalue_correction_, low_rank, rotate
from kfade_kernels.blocks import BlockBasis, slices
from kfade_kernels.rotation import rotates_tokens
from torch import Tensor

from .capture import Pair
from .layer_curvature import Basis, LayerCurvature
from .layers import Layer
from .loss import Batch, FiniteCheck
from .placement import Placement


class CorrectionCollector:
    """Adds pairs to Λ of their layers, and to what Λ they have; without eigenvectors this is the diagonal Fisher.

    An input that several layers share is rotated once. Layers that compute in bfloat16 are rotated
    with a bfloat16 pair of eigenvectors, split once and for all. On a side in blocks always the tokens are rotated:
    that takes `2·N·n²/k` FLOPs, of which only sequences longer than the other side is wide could save any.

    Args:
        states: the layers' states, by name; Λ that they have is added to.
        layers: of the pass.
        dtype: of Λ.
        device: of the model.
        placement: where eigenvectors and Λ live; None is on `device`. Eigenvectors that live elsewhere are split into
            pairs at each use: that takes less than to fetch them.

    Attributes:
        finite: what looks for NaN and infinities.
    """

    def __init__(
        self,
        states: Mapping[str, LayerCurvature],
        layers: list[Layer],
        dtype: torch.dtype,
        device: torch.device,
        placement: Placement | None = None,
    ) -> None:
        self._states = states
        self._placement = placement or Placement(device)
        self._members = {layer.name: sum(m.group == layer.name for m in layers) for layer in layers}
        self._outputs = {g: sum(m.d_out for m in layers if m.group == g) for g in {m.group for m in layers}}
        self._rotated: dict[str, tuple[Tensor, int]] = {}
        self._grams: dict[str, tuple[Tensor, Tensor | None, int]] = {}
        self._pairs: dict[tuple[str, str], list[Tensor]] = {}
        self.finite = FiniteCheck(device)
        for state in states.values():
            if state.lambda_sum is None:
                sides = (state.d_out, state.width_in)
                if state.low_rank:
                    sides = low_rank.entries(state.output_eigenvectors()), low_rank.entries(state.input_eigenvectors())
                state.lambda_sum = self._placement.zeros(*sides, dtype=dtype)
            else:
                state.lambda_sum = self._placement.keep(state.lambda_sum)
            state.q_out = self._placement.keep(state.q_out)
            if state.group == state.name:
                state.q_in = self._placement.keep(state.q_in)
        for state in states.values():
            state.q_in = states[state.group].q_in

    def _basis(self, q: Basis | None, key: tuple[str, str], dtype: torch.dtype) -> list[Tensor]:
        """The eigenvectors of a side, one matrix or one a block, or pairs of them; empty where there are none."""
        if q is None:
            return []
        blocks = q.blocks if isinstance(q, BlockBasis) else [q]
        if dtype != torch.bfloat16 or q.dtype != torch.float32:
            return blocks
        if self._placement.moves:
            return [bf16_pair(block) for block in blocks]
        if key not in self._pairs:
            self._pairs[key] = [bf16_pair(block) for block in blocks]
        return self._pairs[key]

    def _shared_input(self, layer: Layer, a: Tensor, q_in: Basis | None) -> Tensor:
        """The rotated input of a group `[B, T, width_in]`, computed for its first member and kept for the rest."""
        found = self._rotated.get(layer.group)
        if found is None:
            basis = self._basis(q_in, (layer.group, "in"), a.dtype)
            found = (_rotated(a, basis, layer.has_bias), self._members[layer.group])
        rotated, uses = found
        if uses > 1:
            self._rotated[layer.group] = (rotated, uses - 1)
        else:
            self._rotated.pop(layer.group, None)
        return rotated

    def _shared_gram(self, layer: Layer, a: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input of a group in its thin basis, and inner products of the rest where these are used."""
        found = self._grams.pop(layer.group, None)
        if found is None:
            a_top = rotate(a, q, ones_column=layer.has_bias)
            cheaper = low_rank.grams_are_cheaper(a.shape[1], self._outputs[layer.group], q.shape[0])
            gram = None
            if q.shape[1] < q.shape[0] and cheaper:
                gram = low_rank.gram(a, a_top, ones_column=layer.has_bias)
            found = a_top, gram, self._members[layer.group]
        a_top, gram, uses = found
        if uses > 1:
            self._grams[layer.group] = a_top, gram, uses - 1
        return a_top, gram

    def __call__(self, layer: Layer, pairs: list[Pair], batch: Batch) -> None:
        state = self._states[layer.name]
        # Calls of one forward pass add up inside the square, so they are laid end to end as tokens.
        g = pairs[0].g if len(pairs) == 1 else torch.cat([p.g for p in pairs], dim=1)
        a = pairs[0].a if len(pairs) == 1 else torch.cat([p.a for p in pairs], dim=1)
        a = a.to(pairs[0].dtype)
        if batch.padded:
            dropped = ~batch.attention.repeat(1, len(pairs)).unsqueeze(-1)
            g, a = g.masked_fill(dropped, 0), a.masked_fill(dropped, 0)
        self.finite.see(g, batch, f"the output gradient of {layer.name}")
        self.finite.see(a, batch, f"the input of {layer.name}")
        # An input that is rotated already needs no eigenvectors any more.
        q_in = None if layer.group in self._rotated else state.q_in
        with self._placement.using(q_in, state.q_out, state.lambda_sum, changes=(False, False, True)) as here:
            self._add(layer, g, a, *here)

    def _add(
        self, layer: Layer, g: Tensor, a: Tensor, q_in: Basis | None, q_out: Basis | None, lambda_sum: Tensor
    ) -> None:
        """Add rows to Λ; q_in is None where there are no eigenvectors, and where the input is rotated already."""
        if self._states[layer.name].low_rank:
            assert isinstance(q_in, Tensor) and isinstance(q_out, Tensor)
            a_top, gram = self._shared_gram(layer, a, q_in)
            low_rank.correct_(
                lambda_sum, g, a, q_out, q_in, ones_column=layer.has_bias, rotated_in=a_top, gram_in=gram
            )  # fmt: skip
            return
        shared = layer.group in self._rotated
        into = [] if shared else self._basis(q_in, (layer.group, "in"), a.dtype)
        out = self._basis(q_out, (layer.name, "out"), g.dtype)
        ones = layer.has_bias
        if shared or len(into) > 1 or (into and rotates_tokens(a.shape[1], self._outputs[layer.group])):
            a, into, ones = self._shared_input(layer, a, q_in), [], False
        if len(out) > 1:
            g, out = _rotated(g, out, False), []
        whole = (q[0] if q else None for q in (out, into))
        eigenvalue_correction_(lambda_sum, g, a, *whole, ones_column=ones)

    def end_batch(self) -> None:
        """Drop what a layer without gradient left behind.

        Raises:
            NonFiniteError: the batch holds a NaN or an infinity.
        """
        self._rotated.clear()
        self._grams.clear()
        self.finite.raise_if_any()
        self._placement.end_batch()

    def clear(self) -> None:
        """Forget all that waits."""
        self._rotated.clear()
        self._grams.clear()
        self.finite.clear()
        self._placement.clear()


def _rotated(x: Tensor, basis: list[Tensor], ones_column: bool) -> Tensor:
    """Rows `[B, T, n]` in a basis that is given by its blocks; a column of ones belongs to the last."""
    if len(basis) == 1:
        return rotate(x, basis[0], ones_column=ones_column)
    columns = slices([q.shape[-1] for q in basis])
    last = basis[-1]
    return torch.cat(
        [rotate(x[..., c], q, ones_column=ones_column and q is last) for c, q in zip(columns, basis, strict=True)],
        dim=-1,
    )

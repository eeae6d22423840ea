"""First stage: the Kronecker factors `A_sum = Σ a aᵀ` and `S_sum = Σ g gᵀ` of every layer, or sketches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from kfade_kernels import PackedSymmetric, accumulate_factors_, low_rank, sketch_
from kfade_kernels.blocks import PackedBlocks, slices
from kfade_kernels.packed import packed_elements
from torch import Tensor

from .capture import Pair
from .config import FitConfig
from .fisher import run_fisher
from .layer_curvature import Factor, LayerCurvature, Sketch
from .layers import Layer
from .loss import Batch, FiniteCheck, Head
from .placement import Placement

# Operands that wait for a common launch keep at most so many bytes, and those of one more layer, from being freed.
WAITING_BYTES = 512 << 20
# Test vectors beyond the rank, without which the last eigenpairs are poor; and the seed of all, which changes little.
OVERSAMPLING = 10
SKETCH_SEED = 0


def gains_from_grouping(device: torch.device) -> bool:
    """Whether one launch for the factors of many layers beats one a layer.

    On a GPU it does: below order 2,048 a layer alone has too few tiles to fill it. A CPU computes one
    product after the other either way, and frees operands sooner.
    """
    return device.type == "cuda"


@dataclass
class _Operands:
    """Arguments of one call of `accumulate_factors_`, all of them rows of one batch.

    Attributes:
        mask: `[B, T]`, False at padding; None where no row is.
        acc_a, acc_s, a, g, ones: of a factor in blocks an entry a block, with the columns of rows that are its own.
        sketches: with the rows of each, and whether they stand for themselves with a column of ones.
        nbytes: of the operands.
    """

    mask: Tensor | None = None
    acc_a: list[PackedSymmetric] = field(default_factory=list)
    acc_s: list[PackedSymmetric] = field(default_factory=list)
    a: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)
    ones: list[bool] = field(default_factory=list)
    sketches: list[tuple[Sketch, Tensor, bool]] = field(default_factory=list)
    nbytes: int = 0


class Sketches:
    """Makes empty sketches, those of one order with the same test vectors.

    Args:
        rank: k: how many eigenpairs are wanted.
        dtype, device: of the sketches.
    """

    def __init__(self, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rank, self._dtype, self._device = rank, dtype, device
        self._omegas: dict[int, Tensor] = {}

    def new(self, n: int) -> Sketch:
        """A sketch of a factor of order n."""
        if n not in self._omegas:
            vectors = low_rank.random_basis(n, min(n, self._rank + OVERSAMPLING), SKETCH_SEED)
            self._omegas[n] = vectors.to(self._device, self._dtype)
        trace = torch.zeros((), dtype=torch.float64, device=self._device)
        return Sketch(self._omegas[n], torch.zeros_like(self._omegas[n]), trace)


class FactorCollector:
    """Adds pairs to the factors of their layers, many layers in one launch where that is faster.

    Args:
        states: the layers' states, by name; sums that they have are added to.
        dtype: of the accumulators.
        device: of the model.
        rank: k: factors of an order beyond are sketched for their k largest eigenpairs; None sums all whole.
        placement: where the accumulators live; None is on `device`.

    Attributes:
        first_sample: the pairs belong to the first label sample of their batch; inputs are added for it alone.
        finite: what looks for NaN and infinities.
    """

    def __init__(
        self,
        states: dict[str, LayerCurvature],
        dtype: torch.dtype,
        device: torch.device,
        rank: int | None = None,
        placement: Placement | None = None,
    ) -> None:
        self._states = states
        self._placement = home = placement or Placement(device)
        self._grouped = gains_from_grouping(device)
        self._waiting = _Operands()
        self.finite = FiniteCheck(device)
        self.first_sample = True
        sketches = None if rank is None else Sketches(rank, dtype, device)

        def room(
            total: Factor | None, sketch: Sketch | None, blocks: tuple[int, ...]
        ) -> tuple[Factor | None, Sketch | None]:
            n = sum(blocks)
            if total is not None:
                return home.keep(total), None
            if len(blocks) > 1:
                return PackedBlocks.from_packed(
                    home.zeros(sum(map(packed_elements, blocks)), dtype=dtype), blocks
                ), None
            if rank is None or sketches is None or n <= rank:
                return PackedSymmetric.from_packed(home.zeros(packed_elements(n), dtype=dtype), n), None
            sketch = sketch or sketches.new(n)
            # Test vectors are shared, and stay with the trace on the device.
            return None, Sketch(sketch.omega.to(device), home.keep(sketch.y), sketch.trace.to(device))

        for state in states.values():
            state.s_sum, state.s_sketch = room(state.s_sum, state.s_sketch, state.output_blocks)
        for state in states.values():
            if state.group == state.name:
                state.a_sum, state.a_sketch = room(state.a_sum, state.a_sketch, state.input_blocks)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of operands that were delivered and not yet added."""
        return self._waiting.nbytes

    def __call__(self, layer: Layer, pairs: list[Pair], batch: Batch) -> None:
        state = self._states[layer.name]
        takes_input = layer.leads and self.first_sample
        sums = [_accumulator(state.s_sum, state.s_sketch)]
        sums.append(_accumulator(state.a_sum, state.a_sketch) if takes_input else None)
        with self._placement.using(*sums, changes=(True, True)) as (s_sum, a_sum):
            self._take(layer, pairs, batch, _usable(s_sum, state.s_sketch), _usable(a_sum, state.a_sketch))

    def _take(
        self, layer: Layer, pairs: list[Pair], batch: Batch, s_sum: Factor | Sketch, a_sum: Factor | Sketch | None
    ) -> None:
        """Add pairs to these accumulators, of which that of the inputs is None where they are not added."""
        state = self._states[layer.name]
        # Dropping rows needs their number on the host, which waits for a GPU; a mask does not.
        mask = batch.attention if self._grouped and batch.padded else None
        for pair in pairs:
            g, a = self._rows(pair.g, batch), None
            self.finite.see(g, batch, f"the output gradient of {layer.name}", mask)
            if a_sum is not None:
                a = self._rows(pair.a, batch)
                self.finite.see(a, batch, f"the input of {layer.name}", mask)
            # Nothing is put down before both are seen to be finite.
            waiting = self._waiting
            waiting.mask = mask
            if isinstance(s_sum, Sketch):
                waiting.sketches.append((s_sum, g, False))
            else:
                for block, columns in zip(s_sum.blocks, slices(state.output_blocks), strict=True):
                    waiting.acc_s.append(block)
                    waiting.g.append(g if block is s_sum else g[..., columns])
            waiting.nbytes += g.nbytes
            if a is not None:
                a = a.to(pair.dtype)
                if isinstance(a_sum, Sketch):
                    waiting.sketches.append((a_sum, a, layer.has_bias))
                else:
                    assert a_sum is not None
                    for block, columns in zip(a_sum.blocks, slices(state.input_blocks), strict=True):
                        waiting.acc_a.append(block)
                        waiting.a.append(a if block is a_sum else a[..., columns])
                        # The ones are the last column of all, so of the last block.
                        waiting.ones.append(layer.has_bias and columns.stop == state.width_in)
                waiting.nbytes += a.nbytes
                state.positions += batch.tokens
            # What was brought here for this layer goes home after it.
            if not self._grouped or self._placement.moves or waiting.nbytes > WAITING_BYTES:
                self._launch()

    def _rows(self, x: Tensor, batch: Batch) -> Tensor:
        return x if self._grouped else kept_rows(x, batch)

    def _launch(self) -> None:
        waiting, self._waiting = self._waiting, _Operands()
        for sketch, rows, ones in waiting.sketches:
            sketch_(sketch.y, sketch.trace, rows, sketch.omega, waiting.mask, ones_column=ones)
        if waiting.g or waiting.a:
            accumulate_factors_(
                waiting.acc_a, waiting.acc_s, waiting.a, waiting.g, waiting.mask, ones_column=waiting.ones
            )

    def end_batch(self) -> None:
        """Add what waits.

        Raises:
            NonFiniteError: the batch holds a NaN or an infinity; what waits is not added.
        """
        # First the flags: the host then prepares the next batch while the device adds this one.
        self.finite.raise_if_any()
        self._launch()
        self._placement.end_batch()

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting = _Operands()
        self.finite.clear()
        self._placement.clear()

    def finish(self) -> None:
        """Give the members of each input group their leader's factor."""
        for state in self._states.values():
            leader = self._states[state.group]
            state.a_sum, state.positions = leader.a_sum, leader.positions


def _accumulator(total: Factor | None, sketch: Sketch | None) -> Factor | Tensor | None:
    """What a pass adds to: the packed sum, or `y` of a sketch."""
    return total if sketch is None else sketch.y


def _usable(total: Any, sketch: Sketch | None) -> Any:
    """The accumulator again, of what is on the device of it."""
    return total if sketch is None or total is None else Sketch(sketch.omega, total, sketch.trace)


def kept_rows(x: Tensor, batch: Batch) -> Tensor:
    """The rows `[P, d]` of `x [B, T, d]` that are not padding; a view when none is."""
    flat = x.reshape(-1, x.shape[-1])
    return flat[batch.attention.reshape(-1)] if batch.padded else flat


def collect_factors(
    head: Head,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    config: FitConfig,
    factors: FactorCollector,
    advance: Callable[[int], None] = lambda tokens: None,
) -> None:
    """One pass that fills A_sum and S_sum of the states of `factors`; `advance(tokens)` is called once a batch."""

    def next_sample(batch: Batch, sample: int) -> None:
        factors.first_sample = sample + 1 == config.samples
        if sample == 0:
            advance(batch.tokens)

    run_fisher(head, layers, batches, config, factors, next_sample)
    factors.finish()

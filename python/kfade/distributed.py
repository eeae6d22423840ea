"""The stages of a fit that ranks share, and who of them has what.

Every rank is given all batches and runs its share of them; a batch is the unit. Sums over batches are added up once a
pass, each at its *owner*: one rank for the factor A of an input group, one for S and Λ of a layer. Owners decompose at
the same time, and the eigenvectors go to all ranks for the pass that measures Λ.

    batches  ─ shared out ─►  A_sum, S_sum   ─ reduce ─►   eigh    ─ broadcast ─►  Λ_sum   ─ reduce ─►  curvature
                              on every rank                owners                  on every rank         owners
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from kfade_kernels.blocks import split
from torch import Tensor, nn

from .config import FitConfig, UnlearnConfig
from .curvature import Curvature
from .layer_curvature import LayerCurvature
from .layers import Layer
from .loss import Batch
from .ranks import Ranks, share_out
from .sharding import is_sharded
from .storage import (
    SHARED,
    STAGES,
    as_kept,
    begin_directory,
    counts_of,
    shapes_of,
    stage_tensors,
    stages_of,
    tensors_sha256,
    write_manifest,
    write_stage,
)


@dataclass(frozen=True)
class Owners:
    """Who decomposes and keeps what.

    Attributes:
        inputs: the rank of the factor A of each input group, by the layer that leads it.
        outputs: the rank of S and Λ of each layer.
    """

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


def made_from(
    model: nn.Module,
    batches: Sequence[Batch],
    config: FitConfig | UnlearnConfig,
    basis: Mapping[str, LayerCurvature] | None = None,
) -> dict[str, str]:
    """What must be the same on all ranks; of weights a sum of their bits, exact in any order; of a basis spectra."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    weights = [] if is_sharded(model) else [p.detach() for p in model.parameters()]
    sums = [int(p.view(kinds[p.itemsize]).sum(dtype=torch.int64)) for p in weights]
    values = [{"input_ids": b.input_ids, "attention": b.attention, "labels": b.labels} for b in batches]
    spectra = [
        {k: v for k in ("lambda_in", "lambda_out") if (v := getattr(state, k)) is not None}
        for state in (basis or {}).values()
    ]
    return {
        "batches": tensors_sha256(values),
        "options": repr(config),
        "the spectra of the basis": tensors_sha256(spectra),
        "the model's weights": hashlib.sha256(repr(sums).encode()).hexdigest(),
    }


def owners_of(layers: Sequence[Layer], ranks: int, config: FitConfig, before: Sequence[Owners] = ()) -> Owners:
    """Owners of the factors of some layers, by the cost of their decomposition.

    Who solves by Cholesky factorisations needs both factors of a layer, so all of an input group are with one rank.

    Args:
        layers: of one pass.
        ranks: how many there are.
        config: of the fit.
        before: owners of earlier passes, whose layers stay with them.
    """

    def cost(n: int) -> float:
        if config.rank is not None:
            return float(n) * min(n, config.rank) ** 2
        return float(sum(m**3 for m in split(n, config.max_factor_order)))

    kept = [float(sum([*o.inputs.values(), *o.outputs.values()].count(r) for o in before)) for r in range(ranks)]
    leaders = [layer for layer in layers if layer.leads]
    costs = [cost(layer.width_in) for layer in leaders]
    if config.decomposition == "cholesky":
        together = [
            a + sum(cost(x.d_out) for x in layers if x.group == g.name) for a, g in zip(costs, leaders, strict=True)
        ]
        inputs = dict(zip((g.name for g in leaders), share_out(together, ranks, kept), strict=True))
        return Owners(inputs, {layer.name: inputs[layer.group] for layer in layers})
    chosen = share_out(costs + [cost(layer.d_out) for layer in layers], ranks, kept)
    names = [layer.name for layer in leaders], [layer.name for layer in layers]
    parts = chosen[: len(leaders)], chosen[len(leaders) :]
    return Owners(*(dict(zip(n, c, strict=True)) for n, c in zip(names, parts, strict=True)))


def reduce_factors(ranks: Ranks, owners: Owners, states: Mapping[str, LayerCurvature]) -> None:
    """Add up A_sum, S_sum (or their sketches) and P over ranks; a sum then is with its owner alone."""
    if ranks.size == 1:
        return
    positions = ranks.gather({name: state.positions for name, state in states.items()})
    summed: list[tuple[Tensor, int]] = []
    for name, state in states.items():
        state.positions = sum(counts[name] for counts in positions)
        sides = [(state.s_sum, state.s_sketch, owners.outputs[name])]
        if state.group == name:
            sides.append((state.a_sum, state.a_sketch, owners.inputs[name]))
        for total, sketch, owner in sides:
            parts = [total.data] if total is not None else [sketch.y, sketch.trace] if sketch is not None else []
            summed += [(part, owner) for part in parts]
    ranks.reduce(summed)
    leave_to_owners(ranks, owners, states)


def leave_to_owners(ranks: Ranks, owners: Owners, states: Mapping[str, LayerCurvature]) -> None:
    """Drop the factors that other ranks own."""
    for name, state in states.items():
        if owners.outputs[name] != ranks.rank:
            state.s_sum = state.s_sketch = None
        if owners.inputs[state.group] != ranks.rank:
            state.a_sum = state.a_sketch = None


def spread_bases(
    ranks: Ranks, owners: Owners, states: Mapping[str, LayerCurvature], config: FitConfig, like: Tensor
) -> None:
    """Give ranks the eigenvectors and eigenvalues that others have computed: to measure Λ, all; else those of A.

    Args:
        ranks: who they are.
        owners: who has computed what.
        states: of one pass.
        config: of the fit.
        like: a tensor of the dtype and on the device of the state.
    """
    if ranks.size == 1:
        return

    def given(state: LayerCurvature, names: Sequence[str], owner: int) -> list[tuple[Tensor, int]]:
        for name in names:
            if getattr(state, name) is None:
                setattr(state, name, as_kept(state, name, like.new_empty(shapes_of(state, config.rank)[name])))
        return [(getattr(state, name).data, owner) for name in names]

    sent = []
    for name, state in states.items():
        if state.group == name:
            sent += given(state, STAGES["input_decomposition"], owners.inputs[name])
        if config.curvature == "ekfac":
            sent += given(state, STAGES["decomposition"], owners.outputs[name])
    ranks.broadcast(sent)
    for state in states.values():
        leader = states[state.group]
        state.q_in, state.lambda_in = leader.q_in, leader.lambda_in


def reduce_corrections(ranks: Ranks, owners: Owners, states: Mapping[str, LayerCurvature]) -> None:
    """Add up Λ_sum over ranks, each at its owner."""
    if ranks.size > 1:
        ranks.reduce((s.lambda_sum, owners.outputs[name]) for name, s in states.items() if s.lambda_sum is not None)


def kept_here(
    ranks: Ranks, owners: Owners, states: Mapping[str, LayerCurvature]
) -> tuple[dict[str, LayerCurvature], dict[str, LayerCurvature]]:
    """Of a finished pass, the layers that this rank owns, and those of whose input group it owns the factor A."""
    layers = {name: state for name, state in states.items() if owners.outputs[name] == ranks.rank}
    inputs = {name: states[name] for name, owner in owners.inputs.items() if owner == ranks.rank}
    for state in layers.values():
        owner = owners.inputs[state.group]
        state.input_owner = None if owner == ranks.rank else owner
    for state in inputs.values():
        if state.name not in layers:
            state.q_out = state.lambda_out = state.lambda_sum = None
    return layers, inputs


class ShardedCurvature(Curvature):
    """A curvature whose layers are shared out to the ranks of a process group.

    As a mapping it has the layers of this rank, with which it solves. `save` makes a directory that every rank can
    `Curvature.load` whole: mapped from its files, they share the memory of their machine.

    Attributes:
        owners: the rank of each layer of the model, in its order.
    """

    def __init__(
        self,
        config: FitConfig,
        model_id: str,
        layers: Mapping[str, LayerCurvature],
        owners: Mapping[str, int],
        group: dist.ProcessGroup,
        inputs: Mapping[str, LayerCurvature],
    ) -> None:
        super().__init__(config, model_id, layers)
        self.owners = dict(owners)
        self._group, self._inputs = group, dict(inputs)

    def __getitem__(self, name: str) -> LayerCurvature:
        if name in self.owners and name not in self.layers:
            raise KeyError(
                f"{name} is with rank {self.owners[name]}; save the curvature and load it to have all layers"
            )
        return super().__getitem__(name)

    def save(self, directory: str | Path) -> None:
        """Write one directory together: each rank its files, and rank 0 the manifest; all ranks call it."""
        directory = Path(directory)
        numbers = {name: number for number, name in enumerate(self.owners)}
        with Ranks(self._group) as ranks:
            if ranks.rank == 0:
                begin_directory(directory)
            ranks.gather(None)
            files = {}
            for states, shared in ((self.layers, False), (self._inputs, True)):
                for name, state in states.items():
                    for stage in (x for x in stages_of(state) if (x in SHARED) == shared):
                        tensors = stage_tensors(state, stage)
                        if tensors:
                            file, entry = write_stage(directory, numbers[name], name, stage, tensors)
                            files[file] = entry
            told = ranks.gather({"files": files, "layers": {n: counts_of(s) for n, s in self.layers.items()}})
            if ranks.rank == 0:
                layers = {name: told[owner]["layers"][name] for name, owner in self.owners.items()}
                named = sorted((file, entry) for values in told for file, entry in values["files"].items())
                write_manifest(self.config, self.model_id, directory, layers, dict(named))


def layer_owners(curvature: Curvature, ranks: Ranks) -> dict[str, int]:
    """Who solves with each layer: its owner, or where every rank has all of them, ranks by the cost of solving."""
    if isinstance(curvature, ShardedCurvature):
        return curvature.owners
    costs = [float(s.d_out * s.width_in) * (s.d_out + s.width_in) for s in curvature.values()]
    return dict(zip(curvature, share_out(costs, ranks.size), strict=True))

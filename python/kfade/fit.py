"""`fit`: capture → factors → decomposition → correction, over the batches of a retain set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .capture import deterministic_mode, frozen, graph_from_embeddings, trace
from .config import FitConfig
from .correction import CorrectionCollector
from .curvature import Curvature
from .decomposition import decompose_states
from .distributed import (
    Owners,
    ShardedCurvature,
    kept_here,
    leave_to_owners,
    made_from,
    owners_of,
    reduce_corrections,
    reduce_factors,
    spread_bases,
)
from .factors import FactorCollector, collect_factors
from .fisher import loss_count, run_fisher
from .layer_curvature import LayerCurvature, new_states
from .layers import Layer, in_passes, select
from .loss import Batch, Head, check_batches, idle_batch
from .models import device_of, model_id, state_dtype
from .placement import Placement, moved
from .plan import plan_fit, require_use_of_basis
from .progress import Progress, return_freed_memory
from .ranks import Ranks
from .resume import FitStore
from .sharding import check_sharding, is_sharded, unwrapped
from .storage import BASES, BASIS, CORRECTION, FACTORS, STAGES, shapes_of

HOST = torch.device("cpu")


def parts_of(batches: Sequence[Batch], share: float | None) -> tuple[list[Batch], list[Batch]]:
    """The batches that give A and S, and those that give Λ; see FitConfig.basis_share.

    Raises:
        ValueError: either part would have no loss position.
    """
    if share is None:
        return list(batches), list(batches)
    first = [math.floor((i + 1) * share) > math.floor(i * share) for i in range(len(batches))]
    parts = ([b for b, x in zip(batches, first, strict=True) if x is wanted] for wanted in (True, False))
    factors, correction = parts
    for what, part in (("A and S", factors), ("Λ", correction)):
        if not any(len(batch.loss_index) for batch in part):
            raise ValueError(
                f"basis_share is {share} and there are {len(batches)} batches: none with a loss position is left for"
                f" {what}; give smaller batches, or another share"
            )
    return factors, correction


@dataclass
class _Fit:
    """What the passes of one fit share.

    Attributes:
        parts: the batches that give A and S, and those that give Λ; of all ranks.
        mine: of these, those of this rank.
        basis: states that give A, S and the eigenvectors instead; None where they are fitted.
        decomposes: whether eigenvectors are wanted.
        ranks: who share the fit.
        placement: where the state lives.
        leaves: whether finished layers are on a CPU, though they may have lived on a GPU: there are several passes.
    """

    model: nn.Module
    head: Head
    config: FitConfig
    progress: Progress
    store: FitStore
    parts: tuple[list[Batch], list[Batch]]
    mine: tuple[list[Batch], list[Batch]]
    basis: Mapping[str, LayerCurvature] | None
    decomposes: bool
    ranks: Ranks
    placement: Placement
    leaves: bool

    def empty(self, layers: Sequence[Layer]) -> dict[str, LayerCurvature]:
        """States without tensors."""
        if self.config.curvature == "identity":
            return new_states(layers, 0)
        states = new_states(layers, loss_count(self.parts[0], self.config), self.config.max_factor_order)
        for name, state in states.items():
            if self.config.basis_share is not None or self.basis is not None:
                state.lambda_losses = loss_count(self.parts[1], self.config)
            if self.basis is not None:
                state.positions, state.losses = self.basis[name].positions, self.basis[name].losses
        return states

    def run(self, layers: list[Layer], suffix: str, owners: Owners) -> dict[str, LayerCurvature]:
        """All stages of some layers."""
        config, store, states = self.config, self.store, self.empty(layers)
        if config.curvature == "identity":
            return states
        store.restore(states, owners)
        self._next_stage()
        if config.curvature in ("kfac", "ekfac"):
            if self.basis is not None:
                self._take_basis(states, layers, self.basis, owners)
            else:
                self._pass(f"factors A, S{suffix}", FACTORS, states, layers, self.mine[0], self._factors, owners)
            if self.decomposes:
                self._decompose(states, layers, suffix, owners)
        self._next_stage()
        if config.curvature in ("diagonal", "ekfac"):
            self._pass(f"eigenvalues Λ{suffix}", CORRECTION, states, layers, self.mine[1], self._correction, owners)
        if self.leaves:
            self._finished(states, tuple(STAGES))
        return states

    def _finished(self, states: Mapping[str, LayerCurvature], stages: Sequence[str]) -> None:
        """Nothing in this fit uses what these stages left any more: it is mapped from files, or goes to the host."""
        self.store.release(states, stages)
        if self.leaves:
            known: dict[int, Any] = {}
            for state in states.values():
                for name, value in moved(state, [n for s in stages for n in STAGES[s]], HOST, known).items():
                    setattr(state, name, value)

    def _next_stage(self) -> None:
        """What a stage has freed is not the next one's peak."""
        if self.config.device_memory is None:
            return_freed_memory(None)
        else:
            return_freed_memory()

    def _pass(
        self,
        title: str,
        stages: tuple[str, ...],
        states: Mapping[str, LayerCurvature],
        layers: Sequence[Layer],
        batches: Sequence[Batch],
        collect: Callable[[dict[str, LayerCurvature], list[Layer], Iterable[Batch], Callable[[int], None]], None],
        owners: Owners,
    ) -> None:
        """One pass over batches for the layers that lack these stages."""
        todo = self.store.unfinished(states, layers, stages)
        if not todo:
            return
        part = {layer.name: states[layer.name] for layer in todo}
        rest = self.store.resume(part, stages, batches)
        with self.progress.stage(title, sum(batch.tokens for batch in rest)) as stage:
            collect(part, todo, self.ranks.watch(self.store.watch(rest)), stage.advance)
            (reduce_factors if stages == FACTORS else reduce_corrections)(self.ranks, owners, part)
        self.store.put(part, stages)

    def _factors(
        self,
        states: dict[str, LayerCurvature],
        layers: list[Layer],
        batches: Iterable[Batch],
        advance: Callable[[int], None],
    ) -> None:
        dtype, placement = state_dtype(self.model), self.placement
        factors = FactorCollector(states, dtype, placement.device, self.config.rank, placement)
        collect_factors(self.head, layers, batches, self.config, factors, advance)

    def _correction(
        self,
        states: dict[str, LayerCurvature],
        layers: list[Layer],
        batches: Iterable[Batch],
        advance: Callable[[int], None],
    ) -> None:
        def after(batch: Batch, sample: int) -> None:
            if sample == 0:
                advance(batch.tokens)

        dtype, placement = state_dtype(self.model), self.placement
        correction = CorrectionCollector(states, layers, dtype, placement.device, placement)
        run_fisher(self.head, layers, batches, self.config, correction, after)

    def _decompose(
        self, states: Mapping[str, LayerCurvature], layers: Sequence[Layer], suffix: str, owners: Owners
    ) -> None:
        here, like = self.ranks.rank, torch.empty(0, dtype=state_dtype(self.model), device=device_of(self.model))
        left = sum(x.q_out is None and owners.outputs[x.name] == here for x in states.values())
        left += sum(states[x.name].q_in is None and owners.inputs[x.name] == here for x in layers if x.leads)
        self._next_stage()
        if left:
            with self.progress.stage(f"eigendecomposition{suffix}", left, "factor") as stage:

                def decomposed(name: str, which: str) -> None:
                    self.ranks.check()
                    stage.advance(1)
                    self.store.put({name: states[name]}, [which])
                    # glibc would keep the workspace of each, between the results.
                    return_freed_memory(None)

                decompose_states(states, decomposed, self.config.rank, self.placement)
                self._finished(states, FACTORS)
        # What was saved before, every rank has read.
        missing = {x.name: states[x.name] for x in self.store.unfinished(states, layers, BASES)}
        spread_bases(self.ranks, owners, missing, self.config, like)

    def _take_basis(
        self,
        states: Mapping[str, LayerCurvature],
        layers: Sequence[Layer],
        basis: Mapping[str, LayerCurvature],
        owners: Owners,
    ) -> None:
        todo = self.store.unfinished(states, layers, BASIS)
        for name in (layer.name for layer in todo):
            for field in (field for stage in BASIS for field in STAGES[stage]):
                value = getattr(basis[name], field)
                setattr(states[name], field, value if value is None else value.to(self.placement.home))
        # What the caller holds anyway is not mapped a second time while Λ is summed.
        self.store.put({layer.name: states[layer.name] for layer in todo}, BASIS)
        leave_to_owners(self.ranks, owners, states)


def _check_basis(
    basis: Mapping[str, LayerCurvature], layers: Sequence[Layer], config: FitConfig, dtype: torch.dtype
) -> None:
    """Raise ValueError unless these states have eigenvectors for all layers, of the wanted rank and dtype."""
    require_use_of_basis(config)
    here = {x.name: (x.d_out, x.d_in, x.has_bias, x.transposed, x.group) for x in layers}
    there = {n: (s.d_out, s.d_in, s.has_bias, s.transposed, s.group) for n, s in basis.items()}
    wrong = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if wrong:
        raise ValueError(
            f"basis has other layers than the model: not alike are {', '.join(wrong[:4])}; it must have been fitted"
            " with the same modules on a model with the same layers"
        )
    for name, state in basis.items():
        ours = replace(state, max_factor_order=config.max_factor_order)
        if (state.input_blocks, state.output_blocks) != (ours.input_blocks, ours.output_blocks):
            raise ValueError(
                f"basis has {name} with max_factor_order {state.max_factor_order}, and config has"
                f" {config.max_factor_order}, which cuts its factors otherwise; they must be the same"
            )
        wanted = shapes_of(ours, config.rank)
        for field in ("q_in", "q_out"):
            value = getattr(state, field)
            shape = None if value is None else list(value.data.shape)
            if shape != wanted[field] or value.dtype != dtype:
                found = "none" if value is None else f"{shape} of {value.dtype}"
                raise ValueError(
                    f"basis has as {field} of {name} {found}; it must be {wanted[field]} of {dtype}: of a kfac or ekfac"
                    f" curvature with rank {config.rank}"
                )


def fit_among(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    config: FitConfig,
    progress: Progress,
    decomposes: bool,
    store: str | Path | None = None,
    ranks: Ranks | None = None,
    basis: Mapping[str, LayerCurvature] | None = None,
) -> Curvature:
    """What `fit`, `fit_factors` and others that have entered `ranks` share."""
    ranks = ranks or Ranks(None)
    if isinstance(basis, ShardedCurvature):
        raise ValueError("basis has the layers of one rank alone; save it and load it to have all of them")
    model = unwrapped(model)
    check_sharding(model, ranks.group)
    placement = Placement.of(config.state_device, device_of(model))
    if config.state_device is not None and ranks.group is not None:
        raise ValueError(
            f"config.state_device is {config.state_device!r} and a group shares the fit, which adds up state where the"
            " model is; it must be None"
        )
    if config.device_memory is not None and is_sharded(model):
        raise ValueError(
            f"config.device_memory is {config.device_memory} and the model is sharded, for which there are no plans; it"
            " must be None: set layers_per_pass"
        )
    layers = select(model, config.modules)
    checked = check_batches(batches, device_of(model))
    parts = parts_of(checked, config.basis_share)
    tracked = {module for layer in layers for module in layer.modules}
    states: dict[str, LayerCurvature] = {}
    inputs: dict[str, LayerCurvature] = {}
    owned: list[Owners] = []
    at_most = config.layers_per_pass
    with ExitStack() as stack:
        if ranks.group is not None:
            ranks.require_same(made_from(model, checked, config, basis))
        if config.device_memory is not None:
            at_most = plan_fit(model, checked, config, stored=store is not None, basis=basis).layers_per_pass
            at_most = min((n for n in ranks.gather(at_most) if n is not None), default=None)
        for context in (deterministic_mode(model), graph_from_embeddings(model)):
            stack.enter_context(context)
        head = Head(model, checked[0], tracked, config.autocast)
        layers = trace(head, layers, checked[0])
        # Not before a forward pass: FSDP2 notes in its first one what is to be trained.
        stack.enter_context(frozen(model))
        if basis is not None:
            _check_basis(basis, layers, config, state_dtype(model))
        idle = idle_batch(device_of(model), attended=False) if is_sharded(model) else None
        kept = stack.enter_context(FitStore(store, config, progress, ranks, idle))
        first, second = (ranks.mine(part, ranks.share(part), idle) for part in parts)
        decomposes = decomposes and config.decomposition == "eigh"
        passes = in_passes(layers, at_most)
        leaves = len(passes) > 1 or placement.home == HOST
        fit = _Fit(
            *(model, head, config, progress, kept, parts, (first, second), basis, decomposes, ranks, placement, leaves)
        )
        kept.open(
            *(model, model_id(model), fit.empty(layers), checked, placement.device, state_dtype(model), basis),
            home=placement.home,
            maps=leaves,
        )
        for number, part in enumerate(passes, 1):
            owned.append(owners_of(part, ranks.size, config, owned))
            found = fit.run(part, f" {number}/{len(passes)}" if len(passes) > 1 else "", owned[-1])
            for states_here, new in zip((states, inputs), kept_here(ranks, owned[-1], found), strict=True):
                states_here.update(new)
        kept.finish()
    ordered = {layer.name: states[layer.name] for layer in layers if layer.name in states}
    if ranks.group is None:
        return Curvature(replace(config), model_id(model), ordered)
    outputs = {name: rank for owners in owned for name, rank in owners.outputs.items()}
    whose = {layer.name: outputs[layer.name] for layer in layers}
    return ShardedCurvature(replace(config), model_id(model), ordered, whose, ranks.group, inputs)


def fit(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    config: FitConfig | None = None,
    *,
    progress: Progress | None = None,
    store: str | Path | None = None,
    group: ProcessGroup | None = None,
    basis: Curvature | None = None,
) -> Curvature:
    """Fit the curvature of a causal language model on a retain set.

    Args:
        model: a causal language model: called with `input_ids` and `attention_mask`, it returns an
            object with `logits [B, T, V]`. It is left as it was: parameters, modes, gradients.
        batches: an iterable of mappings with `input_ids [B, T]`, and optionally `attention_mask`
            (0 is padding, on either side) and `labels` (-100 is no loss; absent, every token counts).
        config: options; see FitConfig.
        progress: where to show progress and record costs.
        store: a directory to save the curvature in as it is fitted. Where the fit is cut off, by whatever, the same
            call goes on with what is there, and ends with the same bits. Ctrl-C then waits for the batch or factor in
            hand, of every rank. On a CPU the states that are returned are mapped from its files, but for thin bases;
            so they are on a GPU where it takes several passes (without a store they are then in host memory).
            With a group it is one directory for all ranks, and as many must go on for the same bits. None saves
            nothing.
        group: the ranks that share the fit; each calls this with the same arguments, all batches among them. None:
            this process alone, whatever is initialised.
        basis: a curvature `kfac` or `ekfac` of the same layers, say of the model before an update: its A, S and
            eigenvectors are taken as they are, and one pass over all batches gives Λ in them. None fits them too. With
            a group each rank gives all layers of it, as a loaded curvature has them.

    Returns:
        A mapping from layer names to their curvature; with a group a `ShardedCurvature`, of the layers that this rank
        owns.

    Raises:
        StorageError: `store` holds something else than this fit, or a corrupt file.
        ValueError: `config.device_memory` is less than the fit needs, however its layers are split into passes; or
            it is not None and the model is sharded; or ranks were given different batches, options or weights;
            or there is no such device as `config.state_device`, or it is given with a group.
        RankError: another rank of the group failed or has ended.
        Interrupted: a KeyboardInterrupt that says how to go on: Ctrl-C with a `store`, or another rank was interrupted.
        OSError: `store` cannot be written, or its disk is too small; what was finished before is kept.
        ValueError: no batch, no loss position, or a selection that matches nothing; `basis` is of other layers, of
            another rank, or has no eigenvectors; or `config.basis_share` leaves no loss position for a part.
        UnsupportedLayerError: a selected layer cannot be handled exactly.
        NonFiniteError: a batch gives a NaN or an infinity; it is named.
    """
    config = config or FitConfig()
    with Ranks(group) as ranks:
        return fit_among(model, batches, config, progress or Progress(), True, store, ranks, basis)


def fit_factors(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], config: FitConfig, progress: Progress
) -> dict[str, LayerCurvature]:
    """The factors A and S alone, by layer name, for other libraries: the states have no eigenvectors to solve with.

    Arguments and errors are those of `fit`; `config.curvature` must be `kfac`.
    """
    if config.curvature != "kfac":
        raise ValueError(f"config.curvature is {config.curvature!r}; it must be 'kfac'")
    if config.rank is not None:
        raise ValueError(f"config.rank is {config.rank}; whole factors are asked for: it must be None")
    return fit_among(model, batches, config, progress, decomposes=False).layers

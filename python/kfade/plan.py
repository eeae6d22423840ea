"""What a fit will take, before anything runs: FLOPs, bytes, seconds and peak memory of each stage, and its passes.

The model is built from its configuration without weights and run on tensors without values (see `simulation`);
the rest is arithmetic on widths. FLOPs count a multiplication and an addition as two. Symbols: N rows of all
batches, B sequences of T tokens a batch, n the order of a factor (a layer's width, one more for a bias), s the bytes
of an element of the state (4, or 8 for a float64 model).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from kfade_kernels import cost
from kfade_kernels.configurations import Configuration
from kfade_kernels.eigenvalue_correction.pytorch import TILE_ELEMENTS
from kfade_kernels.packed import PANEL_ROWS, packed_elements
from kfade_kernels.precision import multiplies_bf16
from kfade_kernels.rotation import rotates_tokens
from kfade_kernels.sampled_cross_entropy.pytorch import rows_per_chunk
from kfade_kernels.syrk.pytorch import CHUNK_ROWS, GPU_PANELS
from torch import nn

from .config import FitConfig
from .decomposition import ALONE
from .factors import OVERSAMPLING, WAITING_BYTES
from .layers import Layer, in_passes, select
from .loss import Batch, check_batch
from .models import DTYPES, configuration_of, outline_model
from .progress import StageCost
from .rates import GIB, TABLE, UNTIMED, Rates, calibrate, rates_of, resident_bytes
from .simulation import Footprint, simulate

FORMAT, VERSION = "kfade-plan", 1
# Dense matrices of a factor's size that its `eigh` needs at once: the factor, the eigenvectors, LAPACK's 2·n² numbers.
EIGH_MATRICES = 4
MACHINE = 8  # devices of one machine


@dataclass(frozen=True)
class StagePlan:
    """One stage, all passes together, on one device of those that share it.

    Attributes:
        name: of the stage.
        runs: how often it is run.
        flops: needed.
        bytes: read and written in device memory at least.
        seconds: estimated.
        disk_bytes: written to disk.
        sent_bytes: sent to other devices.
    """

    name: str
    runs: int
    flops: float
    bytes: float
    seconds: float
    disk_bytes: float = 0.0
    sent_bytes: float = 0.0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes alive at once on one device at the peak of a stage, in the pass where it is highest.

    Attributes:
        stage: as `Progress` names it.
        process: before a model is loaded.
        weights: of the model, and of a copy of the output projection under autocast.
        finished: layers of earlier passes that stay.
        accumulators: A_sum and S_sum, packed triangles (or sketches).
        eigenvectors: of the pass, and their bfloat16 pairs.
        eigenvalues: Λ_sum of the pass.
        activations: what the model keeps for its backward pass, with inputs of layers and temporaries.
        workspace: of the stage's own operations.
    """

    stage: str
    process: float
    weights: float
    finished: float
    accumulators: float
    eigenvectors: float
    eigenvalues: float
    activations: float
    workspace: float

    @property
    def total(self) -> float:
        return float(sum(getattr(self, f.name) for f in fields(self) if f.name != "stage"))


@dataclass(frozen=True)
class Place:
    """Where something is kept.

    Attributes:
        what: is kept.
        where: `device`, `host`, `disk`.
        bytes: of it.
        until: when it leaves.
    """

    what: str
    where: str
    bytes: float
    until: str


@dataclass(frozen=True)
class Plan:
    """What a fit will take.

    Attributes:
        model: name, directory or file.
        curvature: of the fit.
        rank: of low-rank factors; None for full ones.
        basis_share: of a fit in one pass, the share of the data that gives A and S; None where all gives everything.
        dtype: of the weights.
        device, devices: kind, and how many share the work. More than one is an estimate only.
        tokens, sequences, batch_size, seq_len: the data.
        parameters: of the model.
        layers: selected, in order.
        layers_per_pass: of the fit; None for all at once.
        passes: how many.
        stored: whether the fit is given a directory to save in as it goes, from which finished layers are mapped.
        stages, memory, places: see their classes.
        peak_bytes: highest of `memory`, on one device.
        limit_bytes: memory that was given, or that the device has.
        fits: whether the peak is within it.
        reasons: why it is so, in sentences.
        assumptions: what the numbers rest on.
    """

    model: str
    curvature: str
    rank: int | None
    basis_share: float | None
    dtype: str
    device: str
    devices: int
    tokens: int
    sequences: int
    batch_size: int
    seq_len: int
    parameters: int
    layers: tuple[str, ...]
    layers_per_pass: int | None
    passes: int
    stored: bool
    stages: tuple[StagePlan, ...]
    memory: tuple[MemoryPlan, ...]
    places: tuple[Place, ...]
    peak_bytes: float
    limit_bytes: float | None
    fits: bool
    reasons: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of all stages but the solve, one after the other."""
        return sum(stage.seconds for stage in self.stages if stage.name != "solve")

    def stage(self, name: str) -> StagePlan:
        """The stage of this name; nothing is done in one that there is not."""
        return next((stage for stage in self.stages if stage.name == name), StagePlan(name, 0, 0.0, 0.0, 0.0))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, which `from_json` reads."""
        memory = [{**asdict(m), "total": m.total} for m in self.memory]
        return {"format": FORMAT, "version": VERSION, **asdict(self), "memory": memory, "seconds": self.seconds}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """A plan from what `to_json` gave, perhaps by way of a file.

        Raises:
            ValueError: it is no plan of this version.
        """
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            raise ValueError(
                f"values have format {values.get('format')!r} and version {values.get('version')!r};"
                f" they must be {FORMAT!r} and {VERSION}"
            )
        kinds: dict[str, Any] = {"stages": StagePlan, "memory": MemoryPlan, "places": Place}
        try:
            found = {f.name: values[f.name] for f in fields(cls)}
            for name, kind in kinds.items():
                wanted = [f.name for f in fields(kind)]
                found[name] = tuple(kind(**{key: entry[key] for key in wanted}) for entry in found[name])
        except (KeyError, TypeError) as error:
            raise ValueError(f"values are not a plan of version {VERSION}: {error}") from error
        for name in ("layers", "reasons", "assumptions"):
            found[name] = tuple(found[name])
        return cls(**found)

    def beside(self, costs: Iterable[StageCost]) -> list[Beside]:
        """Estimate and reality of each stage of a fit that was run, passes added up.

        Args:
            costs: of the finished stages, as `Progress` records them.
        """
        model = self.stage("forward and backward")
        own = {"factors A, S": "factors", "eigendecomposition": "decomposition", "eigenvalues Λ": "correction"}
        result = []
        for shown, name in own.items():
            found = [c for c in costs if c.name == shown or c.name.startswith(f"{shown} ")]
            if not found:
                continue
            seconds = self.stage(name).seconds
            seconds += model.seconds * self._share_of_model(name)
            peak = max(m.total for m in self.memory if m.stage == shown)
            result.append(Beside(shown, seconds, sum(c.seconds for c in found), peak, max(c.peak_bytes for c in found)))
        return result

    def _share_of_model(self, name: str) -> float:
        """Of the model's own time, what falls into a stage."""
        shares = {"factors": self.basis_share or 1.0, "correction": 1.0 - (self.basis_share or 0.0)}
        total = sum(share for stage, share in shares.items() if self.stage(stage).runs)
        return shares.get(name, 0.0) / total


@dataclass(frozen=True)
class Beside:
    """A stage as planned and as run.

    Attributes:
        stage: as `Progress` names it.
        planned_seconds, seconds: estimate and reality.
        planned_bytes, bytes: peak memory of the process.
    """

    stage: str
    planned_seconds: float
    seconds: float
    planned_bytes: float
    bytes: float


@dataclass(frozen=True)
class Workload:
    """The data of a fit.

    Attributes:
        tokens: that are not padding.
        sequences: of all batches.
        batches: how many.
        size, length: sequences, and tokens a sequence, of the largest batch.
        padded: whether any token is padding.
    """

    tokens: int
    sequences: int
    batches: int
    size: int
    length: int
    padded: bool = False

    @property
    def rows(self) -> int:
        """Of the largest batch."""
        return self.size * self.length

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Workload:
        """Of checked batches."""
        size, length = max((b.input_ids.shape for b in batches), key=math.prod)
        return cls(
            sum(b.tokens for b in batches), sum(len(b.input_ids) for b in batches), len(batches), size, length,
            any(b.padded for b in batches),
        )  # fmt: skip


@dataclass(frozen=True)
class _Side:
    """One factor of a layer: what it takes to keep, fill and decompose, as triangle or as sketch."""

    order: int
    rank: int | None
    itemsize: int

    @property
    def thin(self) -> bool:
        return self.rank is not None and self.rank < self.order

    @property
    def columns(self) -> int:
        """Directions that are kept."""
        assert self.rank is not None or not self.thin
        return self.rank if self.thin and self.rank is not None else self.order

    @property
    def sketched(self) -> int:
        return min(self.order, self.columns + OVERSAMPLING)

    @property
    def accumulator(self) -> int:
        """Bytes: a packed triangle, or `Y [n, k + p]`."""
        return self.itemsize * (self.order * self.sketched if self.thin else packed_elements(self.order))

    @property
    def kept(self) -> int:
        """Bytes of it in a finished state: a sketch is freed."""
        return 0 if self.thin else self.accumulator

    @property
    def eigenvectors(self) -> int:
        return self.itemsize * self.order * self.columns

    @property
    def values(self) -> int:
        """Rows, or columns, of Λ: the directions, and one for the tail."""
        return self.columns + int(self.thin)

    def fill_flops(self, rows: float) -> float:
        """`N·n²` with symmetry, or `4·N·n·(k + p)`: `Y += xᵀ(xΩ)`."""
        return 4.0 * rows * self.order * self.sketched if self.thin else rows * float(self.order) ** 2

    def decompose_flops(self) -> float:
        """The floor of `eigh`, `10/3·n³`; or Nyström: two orthogonalisations, `8·n·(k + p)²`, and one small `eigh`."""
        if not self.thin:
            return cost.eigh(self.order, torch.float32).flops
        return 8.0 * self.order * self.sketched**2 + cost.eigh(self.sketched, torch.float32).flops

    def decompose_seconds(self, rates: Rates, dtype: torch.dtype) -> float:
        if not self.thin:
            return rates.eigh(self.order, dtype)
        return 8.0 * self.order * self.sketched**2 / rates.products(dtype) + rates.eigh(self.sketched, dtype)

    @property
    def decompose_bytes(self) -> int:
        """Workspace: the dense matrices of `eigh`, or three copies of the sketch."""
        if self.thin:
            return 3 * self.itemsize * self.order * self.sketched
        return EIGH_MATRICES * self.itemsize * self.order**2


class _Model:
    """Sizes of the fit of one model: all that a plan computes from."""

    def __init__(
        self, layers: Sequence[Layer], foot: Footprint, config: FitConfig, load: Workload, rates: Rates,
        dtype: torch.dtype, weights: int, vocabulary: int, devices: int, blocks: int, stored: bool,
    ) -> None:  # fmt: skip
        self.layers, self.foot, self.config, self.load, self.rates = layers, foot, config, load, rates
        self.dtype, self.devices, self.vocabulary, self.stored = dtype, devices, vocabulary, stored
        self.compute = dtype if config.autocast == "off" else getattr(torch, config.autocast)
        self.state = torch.float64 if dtype == torch.float64 else torch.float32
        self.itemsize = self.state.itemsize
        self.input = {x.name: _Side(x.width_in, config.rank, self.itemsize) for x in layers if x.leads}
        self.output = {x.name: _Side(x.d_out, config.rank, self.itemsize) for x in layers}
        # Of the data, what each stage that sees data goes through.
        self.factor_share = config.basis_share or 1.0
        self.correction_share = 1.0 - (config.basis_share or 0.0)
        self.has_factors = config.curvature in ("kfac", "ekfac")
        self.decomposes = self.has_factors and config.decomposition == "eigh"
        self.has_correction = config.curvature in ("diagonal", "ekfac")
        self.on_cpu = rates.kind == "cpu"
        self.sharded = devices > 1 and weights > rates.memory / 4
        gathered = 2.0 * weights / blocks if self.sharded and blocks else 0.0
        copies = foot.rows[1] * vocabulary * self.compute.itemsize if self._copies_projection() else 0
        self.whole_weights = float(weights)
        self.weights = (weights / devices if self.sharded else weights) + gathered + copies

    def _copies_projection(self) -> bool:
        return self.foot.projects and self.compute != self.dtype

    # ---- bytes

    def accumulators(self, part: Sequence[Layer]) -> float:
        if not self.has_factors:
            return 0.0
        return float(sum(self.output[x.name].accumulator + self._leading(x, "accumulator") for x in part))

    def eigenvectors(self, part: Sequence[Layer]) -> float:
        if not self.decomposes:
            return 0.0
        return float(sum(self.output[x.name].eigenvectors + self._leading(x, "eigenvectors") for x in part))

    def eigenvalues(self, part: Sequence[Layer]) -> float:
        if not self.has_correction:
            return 0.0
        if not self.has_factors:
            return float(sum(self.itemsize * x.d_out * x.width_in for x in part))
        return float(sum(self.itemsize * self.output[x.name].values * self.input[x.group].values for x in part))

    def _leading(self, layer: Layer, what: str) -> int:
        return int(getattr(self.input[layer.name], what)) if layer.leads else 0

    def state_bytes(self, part: Sequence[Layer]) -> float:
        """What a finished layer keeps."""
        kept = sum(self.output[x.name].kept + self._leading(x, "kept") for x in part) if self.has_factors else 0
        return kept + self.eigenvectors(part) + self.eigenvalues(part)

    def _loss_bytes(self) -> float:
        """Blocks of logits: as they come, as probabilities, and in 16 bit for the product back; and the gradient."""
        rows, width = self.foot.rows
        words = self.vocabulary if self.foot.projects else width
        block = min(rows, rows_per_chunk(words, 0, torch.device(self.rates.kind))) * words
        item = self.compute.itemsize
        wide = max(4, item)
        logits = block * (wide + (item if self.foot.projects else 0) + (item if item == 2 else 0))
        noise = 0 if self.on_cpu else 6 * 8 * block
        return float(logits + noise + 2 * rows * width * item)

    def _factor_bytes(self, layer: Layer) -> float:
        """Of adding the pairs of one layer: kept rows where some are padding, 16-bit rows made wider, GPU blocks."""
        rows, item = self.load.rows, self.compute.itemsize
        widths = layer.d_out + (layer.d_in if layer.leads else 0)
        sketched = max(self.output[layer.name].sketched, self.input[layer.group].sketched)
        thin = self.output[layer.name].thin or self.input[layer.group].thin
        skinny = self.itemsize * (rows + max(layer.d_out, layer.width_in)) * sketched if thin else 0
        if not self.on_cpu:
            blocks = GPU_PANELS * PANEL_ROWS * max(layer.d_out, layer.width_in) * 4
            waiting = sum(x.d_out + (x.d_in if x.leads else 0) for x in self.layers) * rows * item
            return float(min(waiting, WAITING_BYTES + rows * widths * item) + max(blocks, skinny))
        copied = widths * rows * item if self.load.padded else 0
        cast = rows * layer.d_in * item if layer.leads and self.compute != self.dtype else 0
        upcast = min(rows, CHUNK_ROWS) * max(layer.d_in, layer.d_out) * self.itemsize if item == 2 else 0
        return float(copied + cast + max(upcast, skinny))

    def _correction_bytes(self, layer: Layer, group_out: int) -> float:
        """Of adding the pairs of one layer to Λ."""
        rows, item, s = self.load.rows, self.compute.itemsize, self.itemsize
        d_out, width = layer.d_out, layer.width_in
        total = (d_out + layer.d_in) * rows * item if self.load.padded else 0
        total += rows * layer.d_in * item if self.compute != self.dtype else 0
        if not self.has_factors:
            return float(total + (rows * (d_out + layer.d_in) * s if item != s else 0) + self._tile(d_out, width))
        out, into = self.output[layer.name], self.input[layer.group]
        if out.thin or into.thin:
            return float(total + s * rows * (out.columns + into.columns) + 2 * s * out.columns * into.columns)
        paired = item == 2 and multiplies_bf16(self.rates.kind)
        rotated = item if paired else s
        by_tokens = rotates_tokens(self.load.length, group_out), rotates_tokens(self.load.length, width)
        total += rows * width * rotated if by_tokens[0] or rotates_tokens(self.load.length, d_out) else 0
        total += rows * d_out * rotated if by_tokens[1] else 0
        if item == 2:  # a pair is laid end to end, or added up to float32 again where 16 bit is slow
            total += 2 * rows * max(d_out, width) * item if paired else 12 * max(d_out, width) ** 2
        if all(by_tokens):
            total += self._tile(d_out, width)
            return float(total + (rows * (d_out + width) * s if rotated != s and self.on_cpu else 0))
        return float(total + (rows * (d_out + width) * s if rotated != s else 0) + 2 * s * d_out * width)

    def _tile(self, d_out: int, width: int) -> int:
        return self.itemsize * min(d_out, max(1, TILE_ELEMENTS // width)) * width

    def _activations(self, part: Sequence[Layer]) -> tuple[float, float, dict[str, float]]:
        """Bytes alive when the loss is computed, at the peak, and when each layer's gradient arrives, in a pass."""
        foot = self.foot
        held = sum(foot.held.values())
        inside = {x.group for x in part}
        # Inputs that the model's own graph keeps as well are not held twice.
        share = (foot.held_peak - foot.bare_peak) / held if held else 0.0
        outside = {group: share * size for group, size in foot.held.items() if group not in inside}
        others = sum(outside.values())
        order = {x.name: i for i, x in enumerate(self.layers)}
        alive = {
            x.name: foot.alive[x.name] - sum(v for g, v in outside.items() if order[g] <= order[x.name]) for x in part
        }
        return foot.held_after_forward - others, foot.held_peak - others, alive

    def memory(self, passes: Sequence[Sequence[Layer]]) -> list[MemoryPlan]:
        """The peak of each stage, in the pass where it is highest."""
        found: dict[str, MemoryPlan] = {}
        finished = 0.0
        for part in passes:
            for plan in self._pass_memory(part, finished):
                if plan.stage not in found or plan.total > found[plan.stage].total:
                    found[plan.stage] = plan
            finished += 0.0 if self.stored else self.state_bytes(part)
        return list(found.values())

    def _pass_memory(self, part: Sequence[Layer], finished: float) -> list[MemoryPlan]:
        base = (self.rates.process, self.weights, finished)
        after, peak, alive = self._activations(part)
        outputs = {g: sum(x.d_out for x in part if x.group == g) for g in {x.group for x in part}}
        plans = []
        sums, vectors = self.accumulators(part), self.eigenvectors(part)
        if self.has_factors:
            inside = {x.name: self._factor_bytes(x) for x in part}
            live, work = self._data_peak(after, peak, alive, inside)
            plans.append(MemoryPlan("factors A, S", *base, sums, 0.0, 0.0, live, work))
            if self.decomposes:
                plans.append(self._decomposition(part, base))
        if self.has_correction:
            inside = {x.name: self._correction_bytes(x, outputs[x.group]) for x in part}
            live, work = self._data_peak(after, peak, alive, inside)
            pairs = vectors if self.compute == torch.bfloat16 and self.itemsize == 4 else 0.0
            kept = 0.0 if self.stored else sums
            plans.append(MemoryPlan("eigenvalues Λ", *base, kept, vectors + pairs, self.eigenvalues(part), live, work))
        return plans

    def _data_peak(
        self, after: float, peak: float, alive: Mapping[str, float], inside: Mapping[str, float]
    ) -> tuple[float, float]:
        """Activations and workspace where their sum is highest: in the loss, in the model, or in a layer."""
        moments = [(after, self._loss_bytes()), (peak, 0.0), *((alive[name], inside[name]) for name in inside)]
        return max(moments, key=sum)

    def _decomposition(self, part: Sequence[Layer], base: tuple[float, float, float]) -> MemoryPlan:
        """Walks the factors as `decomposition.run` does: the largest first, some at once; eigenvectors add up."""
        sums, vectors = self.accumulators(part), 0.0
        sides = [side for x in part for side in ([self.input[x.name]] if x.leads else []) + [self.output[x.name]]]
        sides.sort(key=lambda side: -side.decompose_flops())
        best: MemoryPlan | None = None
        for i, side in enumerate(sides):
            at_once = 1 if side.order >= ALONE else self.rates.threads
            work = float(sum(s.decompose_bytes for s in sides[i : i + at_once]))
            moment = MemoryPlan("eigendecomposition", *base, sums, vectors, 0.0, 0.0, work)
            if best is None or moment.total > best.total:
                best = moment
            vectors += side.eigenvectors
        assert best is not None
        return best

    # ---- work

    def _seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        return max(flops / self.rates.products(dtype), moved / self.rates.bandwidth)

    def _sending(self, size: float) -> float:
        """Seconds in which each device sends its share of `size` bytes to the others."""
        if self.devices == 1:
            return 0.0
        rate = self.rates.link if self.devices <= MACHINE else self.rates.network
        return size * (self.devices - 1) / self.devices / rate

    def stages(self, passes: Sequence[Sequence[Layer]]) -> list[StagePlan]:
        """Work of all passes, on one device."""
        share = self.factor_share * self.has_factors + self.correction_share * self.has_correction
        runs = round(len(passes) * share)
        found = []
        if runs:
            found.append(self._model_stage(runs))
        if self.has_factors:
            found.append(self._factor_stage(len(passes)))
        if self.decomposes:
            found.append(self._decomposition_stage(len(passes)))
        if self.has_correction:
            found.append(self._correction_stage(len(passes)))
        if self.devices > 1 and runs:
            sent = self.accumulators(self.layers) + (
                self.eigenvectors(self.layers) + self.eigenvalues(self.layers) if self.has_correction else 0.0
            )
            found.append(StagePlan("reduction", len(passes), 0.0, 2 * sent, self._sending(sent), sent_bytes=sent))
        size = self.state_bytes(self.layers)
        machines = -(-self.devices // MACHINE)
        found.append(StagePlan("saving", 1, 0.0, size, size / self.rates.disk / machines, size))
        found.append(self._solve_stage())
        return found

    @property
    def _share(self) -> float:
        """Batches of the largest shape that one device runs."""
        return self.load.sequences / self.load.size / self.devices

    def _model_stage(self, runs: int) -> StagePlan:
        foot, samples = self.foot, self.config.samples
        rows, width = foot.rows
        loss = 4.0 * rows * width * self.vocabulary if foot.projects else 0.0
        flops = foot.forward_flops + samples * (foot.backward_flops + loss)
        moved = foot.forward_bytes + samples * foot.backward_bytes
        weights = 2.0 * self.whole_weights / (self.devices if self.sharded else 1)
        # What is not a product streams through memory after it; weights that are sharded come meanwhile.
        seconds = flops / self.rates.products(self.compute) + moved / self.rates.bandwidth
        sent = 2.0 * self.whole_weights if self.sharded else 0.0
        seconds = max(seconds, self._sending(sent))
        times = runs * self._share
        return StagePlan(
            "forward and backward", runs, times * flops, times * (moved + weights), times * seconds,
            sent_bytes=times * sent,
        )  # fmt: skip

    def _factor_stage(self, runs: int) -> StagePlan:
        load, samples = self.load, self.config.samples
        tokens, share = self.factor_share * load.tokens / self.devices, self.factor_share * self._share
        item = self.compute.itemsize
        flops = moved = seconds = 0.0
        for sides, times in ((self.input, 1), (self.output, samples)):
            for side in sides.values():
                f = times * side.fill_flops(tokens)
                m = times * (tokens * side.order * item + 2.0 * side.accumulator * share)
                flops, moved, seconds = flops + f, moved + m, seconds + self._seconds(f, m, self.compute)
        return StagePlan("factors", runs, flops, moved, seconds)

    def _decomposition_stage(self, runs: int) -> StagePlan:
        sides = [*self.input.values(), *self.output.values()]
        flops = sum(side.decompose_flops() for side in sides)
        moved = sum(cost.eigh(s.sketched if s.thin else s.order, self.state).bytes for s in sides)
        times = sorted((side.decompose_seconds(self.rates, self.state) for side in sides), reverse=True)
        # Longest first, each to the device, or thread, that is free first.
        busy = [0.0] * (self.devices * self.rates.threads)
        for time in times:
            i = busy.index(min(busy))
            busy[i] += time
        return StagePlan("decomposition", runs, flops / self.devices, moved / self.devices, max(busy))

    def _correction_stage(self, runs: int) -> StagePlan:
        times = self.correction_share * self._share * self.config.samples
        parts = [part for x in self.layers for part in self._correction_parts(x)]
        flops = sum(part.flops for part in parts)
        moved = sum(part.bytes for part in parts)
        seconds = sum(
            self._seconds(part.flops * (2 if part.precision == cost.PAIR else 1), part.bytes, self._dtype(part))
            for part in parts
        )
        return StagePlan("correction", runs, times * flops, times * moved, times * seconds)

    def _dtype(self, part: cost.Part) -> torch.dtype:
        return self.compute if part.precision in (cost.PAIR, cost.SIXTEEN_BIT) else self.state

    def _correction_parts(self, layer: Layer) -> list[cost.Part]:
        """For one batch."""
        load, compute = self.load, self.compute
        size, length, rows = load.size, load.length, load.rows
        if not self.has_factors:
            found = cost.eigenvalue_correction(
                size, length, layer.d_out, layer.width_in, compute, Configuration(128, 128, 64), rotated=True
            )
            return list(found.parts)
        out, into = self.output[layer.name], self.input[layer.group]
        if not (out.thin or into.thin):
            found = cost.eigenvalue_correction(
                size, length, layer.d_out, layer.width_in, compute, Configuration(128, 128, 64)
            )
            # An input that several layers share is rotated once.
            return [part for part in found.parts if layer.leads or part.name != "rotate input tokens"]
        k_out, k_in, s = out.columns, into.columns, self.itemsize
        precision = cost.PAIR if compute == torch.bfloat16 else cost.precision_of(compute, Configuration(128, 128, 64))
        flops = 2.0 * rows * out.order * k_out + (2.0 * rows * into.order * k_in if layer.leads else 0.0)
        turned = float(rows * (out.order + into.order) * compute.itemsize + s * (out.order * k_out + into.order * k_in))
        # Norms of the tails, from Gram matrices of the tokens of a sequence or from the rotated gradient.
        tails = min(
            2.0 * rows * length * (out.order + into.order + k_out + k_in),
            2.0 * rows * (k_out * into.order + k_in * out.order),
        )
        inner = 2.0 * rows * k_out * k_in
        return [
            cost.Part("rotate tokens", flops, flops, turned, precision),
            cost.Part("products and squares", inner, inner, 2.0 * self.eigenvalues([layer]), precision),
            cost.Part("norms of the tails", tails, tails, turned, precision),
        ]

    def _solve_stage(self) -> StagePlan:
        """One gradient of each layer, in float32: rotate in and back; a tail is one scalar."""
        flops = moved = 0.0
        for x in self.layers:
            k_out, k_in = x.d_out, x.width_in
            if self.has_factors:
                k_out, k_in = self.output[x.name].columns, self.input[x.group].columns
                flops += 4.0 * x.d_out * x.width_in * (k_out + k_in)
                # Without eigenvectors as much for the triangular solves, after the factorisations.
                flops += 0.0 if self.decomposes else (k_out**3 + k_in**3) / 3
                moved += self.itemsize * (x.d_out * k_out + x.width_in * k_in)
            moved += self.itemsize * (2.0 * x.d_out * x.width_in + k_out * k_in)
        flops, moved = flops / self.devices, moved / self.devices
        return StagePlan("solve", 1, flops, moved, self._seconds(flops, moved, self.state))


# ---- the plan


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"


def _candidates(model: _Model) -> Iterable[int | None]:
    """Layers a pass, fewest passes first."""
    given = model.config.layers_per_pass
    yield given
    if given is not None or model.config.curvature == "identity":
        return
    count, last = len(model.layers), None
    for passes in range(2, count + 1):
        at_most = -(-count // passes)
        if at_most != last:
            last = at_most
            yield at_most


def _choose(model: _Model, limit: float | None) -> tuple[int | None, list[MemoryPlan]]:
    """The fewest passes that fit, else those that need least."""
    best: tuple[int | None, list[MemoryPlan]] | None = None
    for at_most in _candidates(model):
        memory = model.memory(in_passes(model.layers, at_most))
        if best is None or _peak(model, memory) < _peak(model, best[1]):
            best = at_most, memory
        if limit is None or _peak(model, memory) <= limit:
            return at_most, memory
    assert best is not None
    return best


def _peak(model: _Model, memory: Sequence[MemoryPlan]) -> float:
    return max((m.total for m in memory), default=model.rates.process + model.weights)


def _reasons(model: _Model, at_most: int | None, memory: list[MemoryPlan], limit: float | None) -> list[str]:
    passes = in_passes(model.layers, at_most)
    peak, one = _peak(model, memory), _peak(model, model.memory([list(model.layers)]))
    found = []
    if memory:
        worst = max(memory, key=lambda m: m.total)
        size, name = max((getattr(worst, f.name), f.name) for f in fields(worst) if f.name != "stage")
        found.append(
            f"The peak is {_gib(peak)} a device, in the stage {worst.stage}; most of it is {name}, {_gib(size)}."
        )
    if model.config.layers_per_pass is not None:
        found.append(f"{len(passes)} passes, because layers_per_pass is {model.config.layers_per_pass}.")
    elif limit is None:
        found.append("All layers collect in one pass, because no memory limit is given: least passes over the data.")
    elif len(passes) == 1:
        found.append(f"All layers collect in one pass, because {_gib(one)} are within the limit of {_gib(limit)}.")
    elif peak <= limit:
        found.append(
            f"One pass would take {_gib(one)}, more than {_gib(limit)}. {len(passes)} passes of at most {at_most}"
            " layers are the fewest that fit; each costs one more forward and backward of all"
            " data in each stage that sees them."
        )
    if model.stored and memory:
        found.append(
            f"What is finished goes to disk, {_gib(model.state_bytes(model.layers))} in all, and is mapped from there:"
            " factors once their pass is decomposed, eigenvectors and Λ at its end."
        )
    elif len(passes) > 1:
        found.append("Finished layers stay in memory, because the fit has no directory to save them in as it goes.")
    if limit is not None and peak > limit:
        found.append(f"It does not fit: at least {_gib(peak)} are needed on each device, and there are {_gib(limit)}.")
    if model.sharded:
        found.append(
            f"The weights, {_gib(model.whole_weights)}, are sharded over {model.devices} devices and gathered layer by"
            " layer, twice a batch."
        )
    if any(side.thin for side in [*model.input.values(), *model.output.values()]):
        found.append("Low-rank factors are sketched: no matrix of the square of a layer's width exists.")
    return found


def _places(model: _Model, passes: Sequence[Sequence[Layer]]) -> list[Place]:
    where = "host" if model.on_cpu else "device"
    widest = max(passes, key=model.state_bytes) if passes else []
    stays = "the end of their pass, then disk" if model.stored else "the end"
    found = [Place("weights", where, model.weights, "the end")]
    if model.has_factors:
        until = "they are decomposed, then disk" if model.stored else "the end"
        found.append(Place("accumulators of a pass, packed", where, model.accumulators(widest), until))
    if model.decomposes:
        found.append(Place("eigenvectors of a pass", where, model.eigenvectors(widest), stays))
    if model.has_correction:
        found.append(Place("Λ of a pass", where, model.eigenvalues(widest), stays))
    if len(passes) > 1 and not model.stored:
        found.append(Place("finished layers", where, model.state_bytes(model.layers), "the end"))
    found.append(Place("the saved curvature", "disk", model.state_bytes(model.layers), "for good"))
    return found


def _assumptions(model: _Model) -> list[str]:
    rates = model.rates
    found = [f"rates of {rates.name}: {rates.source}"]
    found.append(
        "the model is run without values to count its FLOPs, bytes and activations; products reach their rate, other"
        " operations the bandwidth"
    )
    found.append("no sequence is padded" if not model.load.padded else "batches are padded, and computed as they are")
    found.append(f"eigh needs {EIGH_MATRICES} dense matrices at once, and float32 suffices")
    if rates.threads > 1:
        found.append(f"{rates.threads} factors are decomposed at once, one thread each")
    if not model.on_cpu and model.stored:
        found.append("simulated: finished layers leave the GPU for disk; for now a fit does that on a CPU only")
    if model.devices > 1:
        found.append(
            "simulated: more than one device is not implemented yet. Data are split evenly; triangles are reduced to"
            " owners once, eigenvectors go to all, Λ is reduced; factors are decomposed longest first on the device"
            " that is free; gathering weights overlaps with computing, nothing else does; eight devices a machine"
        )
    return found


def _plan(name: str, model: _Model, parameters: int, limit: float | None) -> Plan:
    at_most, memory = _choose(model, limit)
    passes = in_passes(model.layers, at_most)
    peak, load = _peak(model, memory), model.load
    return Plan(
        name, model.config.curvature, model.config.rank, model.config.basis_share,
        str(model.dtype).removeprefix("torch."), model.rates.name, model.devices,
        load.tokens, load.sequences, load.size, load.length, parameters, tuple(x.name for x in model.layers),
        at_most, len(passes), model.stored, tuple(model.stages(passes)), tuple(memory),
        tuple(_places(model, passes)), peak, limit, limit is None or peak <= limit,
        tuple(_reasons(model, at_most, memory, limit)), tuple(_assumptions(model)),
    )  # fmt: skip


def _weights(model: nn.Module) -> tuple[int, int]:
    """Number of parameters, and bytes of parameters and buffers."""
    buffers = sum(b.nbytes for b in model.buffers())
    return sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in model.parameters()) + buffers


def _vocabulary(model: nn.Module, foot: Footprint) -> int:
    if not foot.projects:
        return foot.rows[1]
    weight: torch.Tensor = model.get_output_embeddings().weight  # type: ignore[operator]
    return int(weight.shape[0])


def plan_model(
    model: nn.Module,
    name: str,
    load: Workload,
    config: FitConfig,
    rates: Rates = UNTIMED,
    *,
    devices: int = 1,
    limit: float | None = None,
    stored: bool = True,
    simulated: tuple[list[Layer], Footprint] | None = None,
) -> Plan:
    """The plan of the fit of a model that is here, with weights or on `meta`.

    Args:
        model: a causal language model.
        name: of the model, for the plan.
        load: the data.
        config: of the fit; its `layers_per_pass` is kept where it is given.
        rates: of the device.
        devices: how many share the work.
        limit: memory of a device in bytes, or None for no limit.
        stored: whether the fit is given a directory to save in as it goes.
        simulated: what `simulate` gave for this model and data, where several plans share it.

    Raises:
        ValueError: the selection matches nothing.
        UnsupportedLayerError: a layer cannot be handled, or what the model does depends on its data.
    """
    layers, foot = simulated or simulate(
        model, select(model, config.modules), load.size, load.length, config.autocast, config.samples
    )
    parameters, weights = _weights(model)
    blocks = int(getattr(getattr(model, "config", None), "num_hidden_layers", 0) or 0)
    dtype = max((p.dtype for p in model.parameters()), key=lambda d: d.itemsize)
    sizes = _Model(
        layers,
        foot,
        config,
        load,
        rates,
        dtype,
        weights,
        _vocabulary(model, foot),
        devices,
        blocks,
        stored,
    )
    return _plan(name, sizes, parameters, limit)


def plan(
    model: str | Path,
    tokens: int,
    seq_len: int,
    config: FitConfig | None = None,
    *,
    batch_size: int = 8,
    device: str = "cpu",
    devices: int = 1,
    dtype: str = "float32",
    rates: Rates | None = None,
) -> Plan:
    """What a fit will take, from the model's configuration alone.

    Args:
        model: a directory, a `config.json`, a .gguf file, or a name on the Hugging Face hub. No weights are read.
        tokens: of the retain set, which is taken for full sequences.
        seq_len: tokens a sequence.
        config: of the fit. Its `device_memory` is the limit, in GiB; without it, a GPU's own memory is.
        batch_size: sequences a batch.
        device: `cpu`, which is measured for two seconds, or a GPU: A100, H100, H200, B200 or L40S.
        devices: how many share the work. More than one is an estimate that no measurement was held to.
        dtype: of the weights.
        rates: of the device, instead of those known by its name.

    Raises:
        TypeError: a number is no integer.
        ValueError: an argument is out of range, the model is not found, or its modules match nothing.
        UnsupportedLayerError: a layer cannot be handled, or what the model does depends on its data.
    """
    config = config or FitConfig()
    for name, value, least in (
        ("tokens", tokens, 2), ("seq_len", seq_len, 2), ("batch_size", batch_size, 1), ("devices", devices, 1),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; it must be an integer")
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if tokens < seq_len:
        raise ValueError(f"tokens is {tokens}; it must be at least seq_len, {seq_len}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    settings = configuration_of(str(model))
    longest = getattr(settings, "max_position_embeddings", None)
    if isinstance(longest, int) and seq_len > longest:
        raise ValueError(f"seq_len is {seq_len}; {model} takes at most {longest}")
    known = rates or rates_of(device)
    sequences = -(-tokens // seq_len)
    size = min(batch_size, sequences)
    load = Workload(tokens, sequences, -(-sequences // size), size, seq_len)
    limit = known.memory if known.kind == "cuda" else None
    if config.device_memory is not None:
        limit = config.device_memory * GIB
    outline = outline_model(settings, dtype)
    return plan_model(outline, str(model), load, config, known, devices=devices, limit=limit)


def plan_fit(
    model: nn.Module,
    batches: Sequence[Batch],
    config: FitConfig,
    *,
    stored: bool,
    name: str = "",
    rates: Rates = UNTIMED,
) -> Plan:
    """The plan of a fit of a loaded model on checked batches; what the device holds now counts as taken.

    Args:
        model, batches, config: of the fit.
        stored: whether it is given a directory to save in as it goes.
        name: of the model.
        rates: of the device; memory alone needs none.

    Raises:
        ValueError: `config.device_memory` is less than the fit needs, however it is split.
    """
    limit = None if config.device_memory is None else config.device_memory * GIB
    device = next(model.parameters()).device
    taken = torch.cuda.memory_reserved(device) if device.type == "cuda" else resident_bytes()
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    now = replace(rates, kind=device.type, process=max(0.0, taken - _weights(model)[1]), threads=threads)
    # On a GPU finished layers stay there: a curvature that is mapped from files is on the CPU.
    stored = stored and device.type == "cpu"
    found = plan_model(model, name, Workload.of(batches), config, now, limit=limit, stored=stored)
    if not found.fits:
        advice = "" if stored else "; finished layers leave memory where the fit has a directory to save them in"
        raise ValueError(
            f"device_memory is {config.device_memory:g} GiB; it must be at least"
            f" {math.ceil(100 * found.peak_bytes / GIB) / 100:g}{advice}. {found.reasons[0]}"
        )
    return found


def plan_run(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], config: FitConfig, name: str, store: Path
) -> Plan:
    """The plan of a run of `kfade fit`, with the rates of its device: a GPU's by its name, a CPU's measured.

    Raises:
        ValueError: as `plan_fit`, or a batch is not as it must be.
    """
    device = next(model.parameters()).device
    checked = [check_batch(batch, i, device) for i, batch in enumerate(batches)]
    if device.type == "cuda":
        known = torch.cuda.get_device_name(device)
        rates = next((rates for key, rates in TABLE.items() if key in known), TABLE["A100"])
    else:
        rates = calibrate(store)
    return plan_fit(model, checked, config, stored=config.rank is None, name=name, rates=rates)


def beside_table(found: Sequence[Beside]) -> tuple[str, list[str], list[list[str]]]:
    """Title, column heads and rows of what was planned beside what was measured."""
    rows = [
        [b.stage, f"{b.planned_seconds:.1f} s", f"{b.seconds:.1f} s", _gib(b.planned_bytes), _gib(b.bytes)]
        for b in found
    ]
    head = ["stage", "time planned", "time", "peak memory planned", "peak memory"]
    return "Planned and measured", head, rows


def tables(value: Plan) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, column heads and rows of each table that shows a plan."""
    from .report import seconds_text

    stages = [
        [
            s.name,
            str(s.runs),
            f"{s.flops / 1e12:,.2f}" if s.flops else "–",
            _gib(s.bytes),
            _gib(s.disk_bytes) if s.disk_bytes else "–",
            seconds_text(s.seconds),
        ]
        for s in value.stages
    ]
    names = [f.name for f in fields(MemoryPlan) if f.name != "stage"]
    memory = [[name, *(f"{getattr(m, name) / GIB:.2f}" for m in value.memory)] for name in (*names, "total")]
    places = [[p.what, p.where, _gib(p.bytes), p.until] for p in value.places]
    count = f"{value.devices} × {value.device}" if value.devices > 1 else value.device
    title = (
        f"{value.curvature} of {len(value.layers)} layers of {value.model} on {count}:"
        f" {seconds_text(value.seconds)} and the solve, {value.passes} pass{'es' if value.passes > 1 else ''}"
    )
    each = " a device" if value.devices > 1 else ""
    return [
        (title, ["stage", "runs", f"TFLOP{each}", f"memory moved{each}", "to disk", "time"], stages),
        (f"Memory at the peak of each stage{each}, GiB", ["", *(m.stage for m in value.memory)], memory),
        ("What is kept where", ["", "where", "size", "until"], places),
        ("Why", [""], [[reason] for reason in value.reasons]),
        ("Assumptions", [""], [[assumption] for assumption in value.assumptions]),
    ]

"""The arithmetic of a plan: FLOPs, bytes and seconds of each stage of a fit, and its memory, from widths of layers.

FLOPs count a multiplication and an addition as two. Symbols: N rows of all batches, B sequences of T tokens a batch, n
the order of a factor (a layer's width, one more for a bias), s the bytes of an element of the state (4, or 8 for a
float64 model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from kfade_kernels import cost
from kfade_kernels.configurations import Configuration
from kfade_kernels.eigenvalue_correction.pytorch import TILE_ELEMENTS
from kfade_kernels.packed import PANEL_ROWS
from kfade_kernels.precision import multiplies_bf16
from kfade_kernels.rotation import rotates_tokens
from kfade_kernels.sampled_cross_entropy.pytorch import rows_per_chunk
from kfade_kernels.syrk.pytorch import CHUNK_ROWS, GPU_PANELS

from ..config import FitConfig
from ..decomposition import ALONE
from ..factors import WAITING_BYTES
from ..layers import Layer
from ..placement import SLOTS
from ..rates import Rates
from ..simulation import Footprint
from .result import MemoryPlan, StagePlan
from .sizes import Basis, Side, Workload

MACHINE = 8  # devices of one machine
# Of activations, the share that glibc keeps after they are freed, between others that are alive: seen were 0.1 to 1.5.
# Blocks above its threshold it never keeps.
RETAINED, MMAP_THRESHOLD = 0.5, 32 * 2**20


class Model:
    """Sizes of the fit of one model: all that a plan computes from."""

    def __init__(
        self, layers: Sequence[Layer], foot: Footprint, config: FitConfig, load: Workload, rates: Rates,
        dtype: torch.dtype, weights: int, vocabulary: int, devices: int, blocks: int, stored: bool,
        basis: Basis | None = None,
    ) -> None:  # fmt: skip
        self.layers, self.foot, self.config, self.load, self.rates = layers, foot, config, load, rates
        self.dtype, self.devices, self.vocabulary = dtype, devices, vocabulary
        self.compute = dtype if config.autocast == "off" else getattr(torch, config.autocast)
        self.state = torch.float64 if dtype == torch.float64 else torch.float32
        self.itemsize = self.state.itemsize
        options = config.rank, self.itemsize, config.max_factor_order
        self.input = {x.name: Side(x.width_in, *options) for x in layers if x.leads}
        self.output = {x.name: Side(x.d_out, *options) for x in layers}
        # Of the data, what each stage that sees data goes through.
        self.factor_share = config.basis_share or 1.0
        self.correction_share = 1.0 - (config.basis_share or 0.0)
        self.has_factors = config.curvature in ("kfac", "ekfac")
        self.decomposes = self.has_factors and config.decomposition == "eigh"
        self.has_correction = config.curvature in ("diagonal", "ekfac")
        self.basis = basis
        self.fits_factors = self.has_factors and basis is None
        self.on_cpu = rates.kind == "cpu"
        self.saved = stored
        # A CPU copies thin bases from files: how products with them round depends on where in memory they lie.
        self.stored = stored and (config.rank is None or not self.on_cpu)
        # Where state lives that is elsewhere than the device: in host memory, or on another GPU.
        kind = None if config.state_device is None or self.on_cpu else config.state_device.partition(":")[0]
        self.away = None if kind is None else "host" if kind == "cpu" else "peer"
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

    def basis_bytes(self, part: Sequence[Layer]) -> float:
        """A, S and eigenvectors of a finished layer."""
        return self.state_bytes(part) - self.eigenvalues(part)

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
            if self.away:
                return float(rows * widths * item + max(blocks, skinny))
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
        cut = len(into.blocks) > 1, len(out.blocks) > 1
        by_tokens = (
            cut[0] or rotates_tokens(self.load.length, group_out), cut[1] or rotates_tokens(self.load.length, width),
        )  # fmt: skip
        total += rows * width * rotated if by_tokens[0] or rotates_tokens(self.load.length, d_out) else 0
        total += rows * d_out * rotated if by_tokens[1] else 0
        # Blocks of rotated tokens are laid side by side.
        total += rows * rotated * max(width * cut[0], d_out * cut[1])
        if item == 2:  # a pair is laid end to end, or added up to float32 again where 16 bit is slow
            widest = max(*into.blocks, *out.blocks)
            total += 2 * rows * widest * item if paired else 12 * widest**2
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
        finished, done = 0.0, list[Layer]()
        for part in passes:
            done += part
            for plan in self._pass_memory(part, finished, done, len(passes)):
                if plan.stage not in found or plan.total > found[plan.stage].total:
                    found[plan.stage] = plan
            finished += self._finished(part)
        return list(found.values())

    def _finished(self, part: Sequence[Layer]) -> float:
        """What layers that are done keep in memory."""
        # They always leave a GPU.
        if self.stored or not self.on_cpu:
            return 0.0
        if self.basis is not None and not (self.basis.copied or self.saved):
            return self.eigenvalues(part)
        return self.state_bytes(part)

    def _most(self, sizes: Callable[[Sequence[Layer]], float], part: Sequence[Layer]) -> float:
        """Bytes on the device at once of what layers of a pass have: all, or of some if they live elsewhere."""
        return SLOTS * max(sizes([x]) for x in part) if self.away else sizes(part)

    def _basis_in_use(self, layers: Sequence[Layer]) -> float:
        """Eigenvectors of both sides of each layer, shared or not."""
        if not self.decomposes:
            return 0.0
        return float(sum(self.output[x.name].eigenvectors + self.input[x.group].eigenvectors for x in layers))

    def _pass_memory(
        self, part: Sequence[Layer], finished: float, done: Sequence[Layer], passes: int
    ) -> list[MemoryPlan]:
        """Of one of some passes, after which the layers `done` are finished."""
        base = (self.rates.process, self.weights, finished)
        after, peak, alive = self._activations(part)
        outputs = {g: sum(x.d_out for x in part if x.group == g) for g in {x.group for x in part}}
        plans = []
        sums, vectors = self.accumulators(part), self.eigenvectors(part)
        if self.fits_factors:
            inside = {x.name: self._factor_bytes(x) for x in part}
            live, work = self._data_peak(after, peak, alive, inside)
            here = self._most(self.accumulators, part)
            plans.append(MemoryPlan("factors A, S", *base, here, 0.0, 0.0, live, work, self._retained(live)))
            if self.decomposes:
                plans.append(self._decomposition(part, base))
        if self.has_correction:
            inside = {x.name: self._correction_bytes(x, outputs[x.group]) for x in part}
            live, work = self._data_peak(after, peak, alive, inside)
            pairs = self.eigenvectors(part) if self.compute == torch.bfloat16 and self.itemsize == 4 else 0.0
            kept = 0.0 if self.stored or (passes > 1 and not self.on_cpu) else sums
            if self.basis is not None:
                kept, vectors = self._basis_memory(part, done)
            if self.away:
                # Pairs are made of what is there, for one layer.
                pairs = max(self._basis_in_use([x]) for x in part) if pairs else 0.0
                kept, vectors = 0.0, self._most(self._basis_in_use, part)
            values = self._most(self.eigenvalues, part)
            plans.append(
                MemoryPlan("eigenvalues Λ", *base, kept, vectors + pairs, values, live, work, self._retained(live))
            )
        return plans

    def _basis_memory(self, part: Sequence[Layer], done: Sequence[Layer]) -> tuple[float, float]:
        """Bytes of A and S, and of eigenvectors, that a basis takes in the pass of `part`."""
        assert self.basis is not None
        if not self.basis.copied and not self.saved:
            # Eigenvectors are read as they are used, A and S not at all.
            return 0.0, max(self.basis.resident, self.eigenvectors(done))
        # A fit that saves itself reads all of it first, to know which basis it was given.
        there = part if self.basis.copied else self.layers
        return self.basis_bytes(there) - self.eigenvectors(there), self.eigenvectors(there)

    def _data_peak(
        self, after: float, peak: float, alive: Mapping[str, float], inside: Mapping[str, float]
    ) -> tuple[float, float]:
        """Activations and workspace where their sum is highest: in the loss, in the model, or in a layer."""
        moments = [(after, self._loss_bytes()), (peak, 0.0), *((alive[name], inside[name]) for name in inside)]
        return max(moments, key=sum)

    def _retained(self, activations: float) -> float:
        """Bytes of freed activations that stay with the process; a fit with a limit gives them back at once."""
        # The residual stream of a batch.
        block = self.load.rows * self.compute.itemsize * max(min(x.d_in, x.d_out) for x in self.layers)
        keeps = self.on_cpu and self.config.device_memory is None and block < MMAP_THRESHOLD
        return RETAINED * activations if keeps else 0.0

    def _decomposition(self, part: Sequence[Layer], base: tuple[float, float, float]) -> MemoryPlan:
        """Walks the factors as `decomposition.run` does: the largest first, some at once; eigenvectors add up."""
        sums, vectors = self.accumulators(part), 0.0
        sides = [side for x in part for side in ([self.input[x.name]] if x.leads else []) + [self.output[x.name]]]
        sides.sort(key=lambda side: -side.decompose_flops())
        best: MemoryPlan | None = None
        for i, side in enumerate(sides):
            at_once = 1 if max(side.blocks) >= ALONE else self.rates.threads
            work = float(sum(s.decompose_bytes for s in sides[i : i + at_once]))
            if self.away:
                sums, vectors = side.accumulator, 0.0
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
        share = self.factor_share * self.fits_factors + self.correction_share * self.has_correction
        runs = round(len(passes) * share)
        found = []
        if runs:
            found.append(self._model_stage(runs))
        if self.basis is not None:
            size = self.basis_bytes(self.layers)
            found.append(StagePlan("basis", 1, 0.0, size, size / self.rates.disk))
        if self.fits_factors:
            found.append(self._factor_stage(len(passes)))
        if self.fits_factors and self.decomposes:
            found.append(self._decomposition_stage(len(passes)))
        if self.has_correction:
            found.append(self._correction_stage(len(passes)))
        if self.devices > 1 and runs:
            sent = self.eigenvalues(self.layers)
            if self.fits_factors:
                sent += self.accumulators(self.layers)
                sent += self.eigenvectors(self.layers) if self.has_correction else 0.0
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
        loss = self._loss_flops
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
        # Inputs are added for one label sample.
        sums = self.accumulators(self.layers) + (samples - 1) * sum(x.accumulator for x in self.output.values())
        return self._moving(StagePlan("factors", runs, flops, moved, seconds), sums, sums, share)

    def _moving(self, stage: StagePlan, fetched: float, returned: float, batches: float) -> StagePlan:
        """A stage whose state, in bytes a batch, may live elsewhere: it moves beside backward and other layers."""
        if not self.away:
            return stage
        fetched, returned = fetched * batches, returned * batches
        moving = max(fetched, returned) / self._home_rate
        seconds = max(stage.seconds, moving - batches * self._backward_seconds())
        return replace(
            stage, seconds=seconds, fetched_bytes=fetched, returned_bytes=returned, moving_seconds=moving
        )  # fmt: skip

    @property
    def _home_rate(self) -> float:
        return self.rates.host if self.away == "host" else self.rates.link

    @property
    def _loss_flops(self) -> float:
        rows, width = self.foot.rows
        return 4.0 * rows * width * self.vocabulary if self.foot.projects else 0.0

    def _backward_seconds(self) -> float:
        """Of one batch through the model: products, then what streams through memory."""
        foot, samples = self.foot, self.config.samples
        flops, moved = samples * (foot.backward_flops + self._loss_flops), samples * foot.backward_bytes
        return flops / self.rates.products(self.compute) + moved / self.rates.bandwidth

    def _decomposition_stage(self, runs: int) -> StagePlan:
        sides = [*self.input.values(), *self.output.values()]
        flops = sum(side.decompose_flops() for side in sides)
        orders = [n for s in sides for n in ([s.sketched] if s.thin else s.blocks)]
        moved = sum(cost.eigh(n, self.state).bytes for n in orders)
        times = sorted((side.decompose_seconds(self.rates, self.state) for side in sides), reverse=True)
        # Longest first, each to the device, or thread, that is free first.
        busy = [0.0] * (self.devices * self.rates.threads)
        for time in times:
            i = busy.index(min(busy))
            busy[i] += time
        stage = StagePlan("decomposition", runs, flops / self.devices, moved / self.devices, max(busy))
        if not self.away:
            return stage
        # One factor after the other, and nothing beside it.
        fetched, returned = self.accumulators(self.layers), self.eigenvectors(self.layers)
        moving = (fetched + returned) / self._home_rate
        return replace(
            stage, seconds=stage.seconds + moving, fetched_bytes=fetched, returned_bytes=returned, moving_seconds=moving
        )

    def _correction_stage(self, runs: int) -> StagePlan:
        times = self.correction_share * self._share * self.config.samples
        parts = [part for x in self.layers for part in self._correction_parts(x)]
        flops = sum(part.flops for part in parts)
        moved = sum(part.bytes for part in parts)
        seconds = sum(
            self._seconds(part.flops * (2 if part.precision == cost.PAIR else 1), part.bytes, self._dtype(part))
            for part in parts
        )
        stage = StagePlan("correction", runs, times * flops, times * moved, times * seconds)
        values = self.eigenvalues(self.layers)
        return self._moving(stage, self._fetched_basis() + values, values, times)

    def _fetched_basis(self) -> float:
        """Bytes of eigenvectors that come to the device a batch: of a shared input that is rotated, once."""
        outputs = {g: sum(x.d_out for x in self.layers if x.group == g) for g in self.input}
        total = 0.0 if not self.decomposes else float(sum(side.eigenvectors for side in self.output.values()))
        for x in self.layers if self.decomposes else ():
            into, out = self.input[x.group], self.output[x.name]
            by_tokens = len(into.blocks) > 1 or rotates_tokens(self.load.length, outputs[x.group])
            shared = by_tokens and not (into.thin or out.thin)
            total += into.eigenvectors if x.leads or not shared else 0.0
        return total

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
        if len(out.blocks) > 1 or len(into.blocks) > 1:
            return self._parts_in_blocks(layer, out, into)
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

    def _parts_in_blocks(self, layer: Layer, out: Side, into: Side) -> list[cost.Part]:
        """For one batch: tokens are rotated block by block, as if those of a whole side were too, shared ones once."""
        load, c = self.load, Configuration(128, 128, 64)
        # Eigenvectors come in float32 or as a bfloat16 pair.
        compute = torch.float32 if self.compute == torch.float16 else self.compute
        sides = [out, into] if layer.leads else [out]
        turned = [cost.rotate(load.rows, m, compute, c) for side in sides for m in side.blocks]
        found = cost.eigenvalue_correction(
            load.size, load.length, layer.d_out, layer.width_in, compute, c, rotated=True
        )
        return [*turned, *found.parts]

    def _solve_stage(self) -> StagePlan:
        """One gradient of each layer, in float32: rotate in and back; a tail is one scalar."""
        flops = moved = 0.0
        for x in self.layers:
            k_out, k_in = x.d_out, x.width_in
            if self.has_factors:
                out, into = self.output[x.name], self.input[x.group]
                k_out, k_in = out.columns, into.columns
                flops += 2 * (out.turn_flops(x.width_in) + into.turn_flops(x.d_out))
                # Without eigenvectors as much for the triangular solves, after the factorisations.
                flops += 0.0 if self.decomposes else sum(m**3 for m in (*out.blocks, *into.blocks)) / 3
                moved += out.eigenvectors + into.eigenvectors
            moved += self.itemsize * (2.0 * x.d_out * x.width_in + k_out * k_in)
        flops, moved = flops / self.devices, moved / self.devices
        return StagePlan("solve", 1, flops, moved, self._seconds(flops, moved, self.state))


def highest(model: Model, memory: Sequence[MemoryPlan]) -> float:
    return max((m.total for m in memory), default=model.rates.process + model.weights)

"""A plan in words: why it is so, what is kept where, what its numbers rest on, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from ..layers import Layer, in_passes
from ..placement import SLOTS
from ..progress import seconds_text
from ..rates import GIB
from .result import Beside, MemoryPlan, Place, Plan
from .sizes import EIGH_MATRICES
from .stages import RETAINED, Model, highest

_AWAY = {"host": "in host memory", "peer": "on another GPU"}


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"


def reasons(model: Model, at_most: int | None, memory: list[MemoryPlan], limit: float | None) -> list[str]:
    passes = in_passes(model.layers, at_most)
    peak, one = highest(model, memory), highest(model, model.memory([list(model.layers)]))
    found = []
    if memory:
        worst = max(memory, key=lambda m: m.total)
        size, name = max((getattr(worst, f.name), f.name) for f in fields(worst) if f.name != "stage")
        found.append(
            f"The peak is {gib(peak)} a device, in the stage {worst.stage}; most of it is {name}, {gib(size)}."
        )
    if model.config.layers_per_pass is not None:
        found.append(f"{len(passes)} passes, because layers_per_pass is {model.config.layers_per_pass}.")
    elif limit is None:
        found.append("All layers collect in one pass, because no memory limit is given: least passes over the data.")
    elif len(passes) == 1:
        found.append(f"All layers collect in one pass, because {gib(one)} are within the limit of {gib(limit)}.")
    elif peak <= limit:
        found.append(
            f"One pass would take {gib(one)}, more than {gib(limit)}. {len(passes)} passes of at most {at_most}"
            " layers are the fewest that fit; each costs one more forward and backward of all"
            " data in each stage that sees them."
        )
    if model.basis is not None:
        found.append("A, S and eigenvectors are those of an earlier fit: the data are gone through for Λ alone.")
    if model.basis is not None and not model.basis.copied:
        found.append(
            f"All of the basis, {gib(model.basis_bytes(model.layers))}, stays where it is while the fit runs, in memory"
            " or mapped from its files; what is read of it takes memory to the end, whatever the passes."
        )
    if model.stored and memory:
        moments = "factors once their pass is decomposed, eigenvectors and Λ at its end"
        found.append(
            f"What is finished goes to disk, {gib(model.state_bytes(model.layers))} in all, and is mapped from there:"
            f" {moments if model.fits_factors else 'at the end of its pass'}."
        )
    elif len(passes) > 1:
        stay = "stay in memory" if model.on_cpu else "go to host memory"
        found.append(f"Finished layers {stay}, because the fit has no directory to save them in as it goes.")
    if model.away:
        found.append(
            f"State lives {_AWAY[model.away]}: {gib(model.state_bytes(model.layers))}. On the device are"
            f" {SLOTS} layers' at once, however many layers there are."
        )
    if limit is not None and peak > limit:
        found.append(f"It does not fit: at least {gib(peak)} are needed on each device, and there are {gib(limit)}.")
    if model.sharded:
        found.append(
            f"The weights, {gib(model.whole_weights)}, are sharded over {model.devices} devices and gathered layer by"
            " layer, twice a batch."
        )
    if any(side.thin for side in [*model.input.values(), *model.output.values()]):
        found.append("Low-rank factors are sketched: no matrix of the square of a layer's width exists.")
    cut = [side for side in [*model.input.values(), *model.output.values()] if len(side.blocks) > 1]
    if cut:
        found.append(
            f"{len(cut)} factors of an order beyond {model.config.max_factor_order} are in blocks: they take"
            f" {gib(sum(side.accumulator + side.eigenvectors for side in cut))} with their eigenvectors, instead of"
            f" {gib(sum(x.accumulator + x.eigenvectors for x in (replace(side, limit=None) for side in cut)))}."
        )
    return found


def places(model: Model, passes: Sequence[Sequence[Layer]]) -> list[Place]:
    here = "host" if model.on_cpu else "device"
    where = model.away or here
    widest = max(passes, key=model.state_bytes) if passes else []
    stays = "the end of their pass, then disk" if model.stored else "the end"
    found = [Place("weights", here, model.weights, "the end")]
    if model.basis is not None:
        size = model.basis_bytes(widest if model.basis.copied else model.layers)
        found.append(Place("A, S and eigenvectors of the basis", where, size, "the end"))
    if model.fits_factors:
        until = "they are decomposed, then disk" if model.stored else "the end"
        found.append(Place("accumulators of a pass, packed", where, model.accumulators(widest), until))
    if model.fits_factors and model.decomposes:
        found.append(Place("eigenvectors of a pass", where, model.eigenvectors(widest), stays))
    if model.has_correction:
        found.append(Place("Λ of a pass", where, model.eigenvalues(widest), stays))
    if len(passes) > 1 and not model.stored:
        found.append(Place("finished layers", "host", model.state_bytes(model.layers), "the end"))
    found.append(Place("the saved curvature", "disk", model.state_bytes(model.layers), "for good"))
    return found


def assumptions(model: Model, memory: Sequence[MemoryPlan]) -> list[str]:
    rates = model.rates
    found = [f"rates of {rates.name}: {rates.source}"]
    found.append(
        "the model is run without values to count its FLOPs, bytes and activations; products reach their rate, other"
        " operations the bandwidth"
    )
    found.append("no sequence is padded" if not model.load.padded else "batches are padded, and computed as they are")
    if model.fits_factors:
        found.append(f"eigh needs {EIGH_MATRICES} dense matrices at once, and float32 suffices")
    if any(m.retained for m in memory):
        found.append(
            f"the allocator keeps {100 * RETAINED:.0f} % of the activations after they are freed, which a fit with a"
            " memory limit gives back"
        )
    if model.basis is not None:
        found.append("the basis is read from its files once, at the rate at which the disk is written")
    if model.fits_factors and rates.threads > 1:
        found.append(f"{rates.threads} factors are decomposed at once, one thread each")
    if not model.on_cpu and model.stored:
        found.append("finished layers leave the GPU for disk, or the host: no fit has been seen to do so on a GPU")
    if model.away:
        link = rates.host if model.away == "host" else rates.link
        found.append(
            f"simulated, and never run on a GPU: state moves at {link / 1e9:.0f} GB/s each way, both ways at once,"
            " beside backward and what is computed with it; "
            + (
                "in page-locked memory, of which PyTorch gives each tensor the next power of two"
                if model.away == "host"
                else "the other GPU does nothing else, and has the room"
            )
        )
    if model.devices > 1:
        found.append(
            "simulated: several devices have only been several CPUs so far. Data are split evenly; triangles are"
            " reduced to owners once, eigenvectors go to all, Λ is reduced; factors are decomposed longest first on"
            " the device that is free; gathering weights overlaps with computing, nothing else does; eight devices"
            " a machine"
        )
    return found


def beside_table(found: Sequence[Beside]) -> tuple[str, list[str], list[list[str]]]:
    """Title, column heads and rows of what was planned beside what was measured."""
    rows = [
        [b.stage, f"{b.planned_seconds:.1f} s", f"{b.seconds:.1f} s", gib(b.planned_bytes), gib(b.bytes)] for b in found
    ]
    head = ["stage", "time planned", "time", "peak memory planned", "peak memory"]
    return "Planned and measured", head, rows


def tables(value: Plan) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, column heads and rows of each table that shows a plan."""
    stages = [
        [
            s.name,
            str(s.runs),
            f"{s.flops / 1e12:,.2f}" if s.flops else "–",
            gib(s.bytes),
            gib(s.disk_bytes) if s.disk_bytes else "–",
            seconds_text(s.seconds),
        ]
        for s in value.stages
    ]
    batches = value.sequences / value.batch_size
    moving = [
        [
            s.name,
            f"{gib(s.fetched_bytes / batches)} and {gib(s.returned_bytes / batches)}",
            gib(s.fetched_bytes + s.returned_bytes),
            seconds_text(s.moving_seconds),
            seconds_text(s.seconds),
        ]
        for s in value.stages
        if s.moving_seconds
    ]
    names = [f.name for f in fields(MemoryPlan) if f.name != "stage"]
    memory = [[name, *(f"{getattr(m, name) / GIB:.2f}" for m in value.memory)] for name in (*names, "total")]
    places = [[p.what, p.where, gib(p.bytes), p.until] for p in value.places]
    count = f"{value.devices} × {value.device}" if value.devices > 1 else value.device
    title = (
        f"{value.curvature} of {len(value.layers)} layers of {value.model} on {count}:"
        f" {seconds_text(value.seconds)} and the solve, {value.passes} pass{'es' if value.passes > 1 else ''}"
    )
    each = " a device" if value.devices > 1 else ""
    return [
        (title, ["stage", "runs", f"TFLOP{each}", f"memory moved{each}", "to disk", "time"], stages),
        *(
            [
                (
                    "State that comes to the device and goes back",
                    ["stage", "a batch, each way", "in all", "time of moving", "time of the stage, backward taken off"],
                    moving,
                )
            ]
            if moving
            else []
        ),
        (f"Memory at the peak of each stage{each}, GiB", ["", *(m.stage for m in value.memory)], memory),
        ("What is kept where", ["", "where", "size", "until"], places),
        ("Why", [""], [[reason] for reason in value.reasons]),
        ("Assumptions", [""], [[assumption] for assumption in value.assumptions]),
    ]

"""A plan: what each stage of a fit takes, as values that are kept in a file and held beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..progress import StageCost

FORMAT, VERSION = "kfade-plan", 1


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
        fetched_bytes, returned_bytes: of state that lives elsewhere, brought to the device and taken back.
        moving_seconds: that this takes, both ways at once, beside what is computed: `seconds` has what is left of it.
    """

    name: str
    runs: int
    flops: float
    bytes: float
    seconds: float
    disk_bytes: float = 0.0
    sent_bytes: float = 0.0
    fetched_bytes: float = 0.0
    returned_bytes: float = 0.0
    moving_seconds: float = 0.0


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
        retained: freed activations that the allocator of a CPU keeps where the fit has no limit.
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
    retained: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(getattr(self, f.name) for f in fields(self) if f.name != "stage"))


@dataclass(frozen=True)
class Place:
    """Where something is kept.

    Attributes:
        what: is kept.
        where: `device`, `host`, `peer` (another GPU), `disk`.
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
        max_factor_order: a factor of a higher order is in blocks; None for whole ones.
        basis_share: of a fit in one pass, the share of the data that gives A and S; None where all gives everything.
        basis: whether A, S and the eigenvectors are those of an earlier fit.
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
    max_factor_order: int | None
    basis_share: float | None
    basis: bool
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

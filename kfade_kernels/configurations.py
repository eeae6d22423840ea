"""Launch configurations as data: which tile, warps and stages a kernel runs with.

Each kernel has a file `configurations.json` beside it, a list of entries

    {"device": "sm_90", "dtype": "16-bit", "size": "large", "triton": "any",
     "configuration": {"block_m": 128, ...}, "source": "unmeasured"}

`choose` takes the entry that says most about the call: a device by its name beats its architecture, a
dtype beats `16-bit`, a size class and a Triton version beat `any`. A device without an entry gets a
small tile that runs anywhere. Nothing is tuned on a user's call; `python -m kfade_kernels.tune`
measures on scratch data, offline, and writes entries.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from .devices import Device

FILE = "configurations.json"
SIZES = (("small", 1024), ("medium", 6144))
LARGEST = "large"
# one extent of each class
SIZE_EXAMPLES = (512, 2048, 8192)
PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16x6")
ANY = "any"
# 32-bit registers of a thread, less what addresses and loop state take.
REGISTERS = 255 - 48


@dataclass(frozen=True)
class Configuration:
    """How one kernel is launched.

    Attributes:
        block_m, block_n: tile of the result; of a streaming kernel, block_n elements a step.
        block_k: summed rows (tokens) a step.
        warps: a program.
        stages: depth of the software pipeline of the loads.
        group: block rows of tiles that are walked together, so that their operands stay in L2.
        programs: resident programs a multiprocessor, for persistent grids.
        descriptors: tiles are loaded by the tensor memory accelerator where operands allow.
        precision: of products of float32: `ieee`, `tf32x3` and `bf16x6` are float32-grade, `tf32` is not.
        flush: rows between two additions to float32 memory.
    """

    block_m: int = 64
    block_n: int = 64
    block_k: int = 32
    warps: int = 4
    stages: int = 2
    group: int = 8
    programs: int = 1
    descriptors: bool = False
    precision: str = "ieee"
    flush: int = 8192

    def __str__(self) -> str:
        precision = "" if self.precision == "ieee" else f", {self.precision}"
        loads = ", descriptors" if self.descriptors else ""
        tile = f"{self.block_m}×{self.block_n}×{self.block_k}"
        return f"{tile}, {self.warps} warps, {self.stages} stages{precision}{loads}"


def size_class(extent: int) -> str:
    """`small`, `medium` or `large`: the class of a matrix order (or of a row's length)."""
    return next((name for name, limit in SIZES if extent < limit), LARGEST)


def dtype_keys(dtype: torch.dtype) -> tuple[str, ...]:
    """Names under which a dtype is looked up, the most telling first."""
    name = str(dtype).removeprefix("torch.")
    return (name, "16-bit", ANY) if dtype.itemsize == 2 else (name, ANY)


@dataclass(frozen=True)
class Entry:
    """One line of a configuration file."""

    device: str
    dtype: str
    size: str
    triton: str
    configuration: Configuration
    source: str

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "entry") -> Entry:
        """Check one line as it is in a file.

        Raises:
            ValueError: a field is missing, unknown, of another type, or out of range.
        """
        expected = {field.name for field in fields(cls)}
        if set(values) != expected:
            raise ValueError(f"{where} has fields {sorted(values)}; they must be {sorted(expected)}")
        for name in expected - {"configuration"}:
            if not isinstance(values[name], str) or not values[name]:
                raise ValueError(f"{name} of {where} is {values[name]!r}; it must be a text")
        known = {field.name: type(field.default) for field in fields(Configuration)}
        given = values["configuration"]
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"configuration of {where} has {name!r}; it must be one of {', '.join(known)}")
            if type(value) is not known[name]:
                raise ValueError(f"{name} of {where} is {value!r}; it must be of type {known[name].__name__}")
        configuration = Configuration(**given)
        for name in ("block_m", "block_n", "block_k", "warps"):
            value = getattr(configuration, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} of {where} is {value}; it must be a power of two")
        for name in ("stages", "group", "programs", "flush"):
            if getattr(configuration, name) < 1:
                raise ValueError(f"{name} of {where} is {getattr(configuration, name)}; it must be at least 1")
        if configuration.precision not in PRECISIONS:
            raise ValueError(f"precision of {where} is {configuration.precision!r}; it must be one of {PRECISIONS}")
        if values["size"] not in (ANY, LARGEST, *(name for name, _ in SIZES)):
            raise ValueError(f"size of {where} is {values['size']!r}; it must be a size class or {ANY}")
        return cls(**{name: values[name] for name in expected - {"configuration"}}, configuration=configuration)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read(path: Path) -> tuple[Entry, ...]:
    """The entries of a configuration file; empty where there is none."""
    if not path.exists():
        return ()
    return tuple(
        Entry.from_json(values, f"entry {number} of {path.name}")
        for number, values in enumerate(json.loads(path.read_text(encoding="utf-8")))
    )


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Write a configuration file, whole or not at all."""
    temporary = path.with_suffix(".part")
    text = ",\n".join("  " + json.dumps(entry.to_json()) for entry in entries)
    temporary.write_text(f"[\n{text}\n]\n" if text else "[]\n", encoding="utf-8")
    temporary.replace(path)


def path_of(kernel: str) -> Path:
    """The file of the entries of one kernel, e.g. `syrk`."""
    return Path(str(resources.files("kfade_kernels"))) / kernel / FILE


@functools.cache
def shipped(kernel: str) -> tuple[Entry, ...]:
    """The entries shipped for one kernel."""
    return read(path_of(kernel))


_forced: ContextVar[Mapping[tuple[str, torch.dtype | None], Configuration]] = ContextVar("kfade_kernels_forced")


@contextmanager
def forced(kernel: str, configuration: Configuration, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within this block, and this thread, `choose` gives one kernel this configuration, whatever is shipped.

    Args:
        kernel: its folder.
        configuration: to be given.
        dtype: only to calls with operands of this dtype; None to all.
    """
    token = _forced.set({**_forced.get({}), (kernel, dtype): configuration})
    try:
        yield
    finally:
        _forced.reset(token)


def kernels() -> tuple[str, ...]:
    """The kernels that have configurations, by the names of their folders."""
    return tuple(sorted(path.parent.name for path in Path(str(resources.files("kfade_kernels"))).glob(f"*/{FILE}")))


def choose(
    kernel: str, device: Device, dtype: torch.dtype, extent: int, triton: str, entries: Sequence[Entry] | None = None
) -> Configuration:
    """The configuration of a call.

    Args:
        kernel: folder of the kernel.
        device: what it runs on.
        dtype: of the operands.
        extent: order of the result, or length of a row; decides the size class.
        triton: version of Triton, `major.minor.patch`.
        entries: in the place of the shipped ones.
    """
    given = _forced.get({}) if entries is None else {}
    if (kernel, dtype) in given or (kernel, None) in given:
        return given.get((kernel, dtype)) or given[kernel, None]
    wanted = (
        (device.name, device.architecture),
        dtype_keys(dtype),
        (size_class(extent), ANY),
        (triton, ".".join(triton.split(".")[:2]), ANY),
    )

    def rank(entry: Entry) -> tuple[int, ...] | None:
        keys = (entry.device, entry.dtype, entry.size, entry.triton)
        if any(key not in names for key, names in zip(keys, wanted, strict=True)):
            return None
        return tuple(names.index(key) for key, names in zip(keys, wanted, strict=True))

    found = shipped(kernel) if entries is None else entries
    ranked = [(rank(entry), number) for number, entry in enumerate(found)]
    best = min(((r, number) for r, number in ranked if r is not None), default=None)
    return Configuration() if best is None else found[best[1]].configuration


def shared_bytes(configuration: Configuration, itemsize: int) -> int:
    """Shared memory that the pipelined operand tiles of a product take."""
    tile = (configuration.block_m + configuration.block_n) * configuration.block_k
    return configuration.stages * tile * itemsize


def accumulator_registers(configuration: Configuration, device: Device, accumulators: int = 1) -> int:
    """32-bit registers a thread that float32 accumulator tiles take."""
    threads = configuration.warps * device.threads
    return accumulators * configuration.block_m * configuration.block_n // threads


def unfit(configuration: Configuration, device: Device, itemsize: int, accumulators: int = 1) -> str | None:
    """Why a configuration cannot run on a device, or None: what prunes the tuner's search."""
    needed = shared_bytes(configuration, itemsize)
    if needed > device.shared_bytes:
        return f"needs {needed} bytes of shared memory; {device.name} has {device.shared_bytes}"
    # Blackwell keeps the accumulator of a product in tensor memory.
    held = accumulator_registers(configuration, device, accumulators - int(device.architecture.startswith("sm_10")))
    limit = 2 * REGISTERS if device.architecture.startswith("gfx") else REGISTERS
    if held > limit:
        return f"keeps {held} registers a thread for accumulators; at most {limit} are free"
    if configuration.warps * device.threads > 1024:
        return f"has {configuration.warps * device.threads} threads; a program may have 1024"
    if configuration.descriptors and not has_descriptors(device):
        return f"loads by descriptors; {device.architecture} has no tensor memory accelerator"
    return None


def has_descriptors(device: Device) -> bool:
    """Whether the device loads tiles by descriptor in hardware."""
    return device.architecture.startswith("sm_") and int(device.architecture[3:].rstrip("a")) >= 90

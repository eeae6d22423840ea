"""What a device does a second: a small table for GPUs, and a measurement of a few seconds for the CPU at hand."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from kfade_kernels import PackedSymmetric
from kfade_kernels.cost import attainable
from kfade_kernels.devices import A100, B200, H100, H200, Device
from torch import Tensor

from .decomposition import decompose

GIB = 1 << 30


@dataclass(frozen=True)
class Rates:
    """Rates that a plan counts on.

    Attributes:
        name: of the device.
        kind: `cpu` or `cuda`.
        memory: bytes that it has.
        process: bytes that a process takes before any model is loaded: libraries, or a GPU's context.
        narrow: FLOP/s of products of 16-bit operands.
        single: FLOP/s of float32 products.
        double: FLOP/s of float64 products.
        bandwidth: of its memory, bytes/s.
        eigh_cubic, eigh_square: α and β of a float32 `eigh` of order n in α·n³ + β·n² seconds.
        eigh_double: how many times longer the cubic term is in float64.
        disk: bytes/s written.
        link, network: bytes/s to the other devices of a machine of eight, and to other machines.
        host: bytes/s to host memory, and as many from it at once; a CPU's own memory is no link away.
        source: where the rates come from.
        threads: that decompose a factor each, at once.
    """

    name: str
    kind: str
    memory: float
    process: float
    narrow: float
    single: float
    double: float
    bandwidth: float
    eigh_cubic: float
    eigh_square: float
    eigh_double: float
    disk: float
    link: float
    network: float
    source: str
    threads: int = 1
    host: float = math.inf

    def products(self, dtype: torch.dtype) -> float:
        """FLOP/s of products of operands of a dtype."""
        if dtype.itemsize == 2:
            return self.narrow
        return self.double if dtype == torch.float64 else self.single

    def eigh(self, order: int, dtype: torch.dtype) -> float:
        """Seconds of one eigendecomposition."""
        cubic = self.eigh_cubic * (self.eigh_double if dtype == torch.float64 else 1.0)
        return cubic * float(order) ** 3 + self.eigh_square * float(order) ** 2


# α and β fitted to the three times that K-FADE's author published for float64 `eigh` on one H100 (32, 137 and 810 s for
# the MLP factors of Qwen2.5-0.5B, 1.5B and 7B, each module with both of its factors); they give 32, 140 and 803 s.
EIGH_CUBIC, EIGH_SQUARE = 5.71e-13, 1.52e-8
_ASSUMED = (
    "data sheets times the share that large products and copies reach; eigh from times published for one H100 in"
    " float64, its cubic term scaled by memory bandwidth and halved in float32; disk 2 GB/s"
)


def _gpu(device: Device, memory: float, double: float, link: float, host: float) -> Rates:
    share = attainable(device)
    return Rates(
        name=device.name, kind="cuda", memory=memory * GIB, process=0.6 * GIB,
        narrow=share * device.bf16_flops, single=share * device.float32_flops, double=share * double,
        bandwidth=share * device.bandwidth,
        eigh_cubic=EIGH_CUBIC / 2 * H100.bandwidth / device.bandwidth, eigh_square=EIGH_SQUARE, eigh_double=2.0,
        disk=2e9, link=share * link, network=share * 50e9, source=_ASSUMED,
        host=share * host,
    )  # fmt: skip


# NVIDIA's data sheet of the L40S; no kernel here is compiled for it, so it is no `Device` of its own there.
_L40S = replace(
    A100, name="L40S", architecture="sm_89", multiprocessors=142, bf16_flops=362e12, tf32_flops=183e12,
    float32_flops=91.6e12, bandwidth=0.864e12, l2_bytes=96 << 20,
)  # fmt: skip
# Memory as the driver shows it (GiB), float64 peak (FLOP/s), NVLink or PCIe in one direction (bytes/s), and PCIe to the
# host in one direction: generation 4 or 5 with 16 lanes, of which NVIDIA's data sheets name both directions together
# (64 and 128 GB/s).
TABLE = {
    rates.name: rates
    for rates in (
        _gpu(A100, 79, 19.5e12, 300e9, 32e9),
        _gpu(H100, 79, 67e12, 450e9, 64e9),
        _gpu(H200, 140, 67e12, 450e9, 64e9),
        _gpu(B200, 178, 40e12, 900e9, 64e9),
        _gpu(_L40S, 44, 1.4e12, 32e9, 32e9),
    )
}


def _seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Least wall time of some calls, after one that is not timed."""
    work()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return min(found)


def _total_memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return 0.0


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not tell (no Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def resident_part(tensors: Iterable[Tensor]) -> int:
    """Bytes of these that take memory now: all of a GPU's, of a CPU's those pages that are resident.

    Of a tensor that is mapped from a file they are the pages that were read through it. 0 on a CPU without Linux.
    """
    unlike = list({x.data_ptr(): x for x in tensors}.values())
    size = sum(x.nbytes for x in unlike if x.device.type != "cpu")
    page = os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError), Path("/proc/self/pagemap").open("rb") as table:
        for x in (x for x in unlike if x.device.type == "cpu"):
            first, end = x.data_ptr() // page, -(-(x.data_ptr() + x.nbytes) // page)
            table.seek(8 * first)
            entries = torch.frombuffer(bytearray(table.read(8 * (end - first))), dtype=torch.int64)
            # The highest bit of an entry says that its page is present.
            size += page * int((entries < 0).sum())
    return size


def _disk_rate(folder: Path | None) -> float:
    block = bytes(8 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        for _ in range(8):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return 8 * len(block) / (time.perf_counter() - begin)


def calibrate(folder: Path | None = None) -> Rates:
    """Rates of this CPU with the threads that PyTorch has, measured in about two seconds; `folder` for the disk."""
    process = float(resident_bytes())
    rates = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        # A bfloat16 product may be a hundred times slower than float32 (no 16-bit units).
        n = 256 if dtype == torch.bfloat16 else 1024
        x = torch.ones(n, n, dtype=dtype)
        rates[dtype] = 2.0 * n**3 / _seconds(lambda x=x: x @ x)  # type: ignore[misc]
    source, target = torch.zeros(16 << 20), torch.empty(16 << 20)
    bandwidth = 2.0 * source.nbytes / _seconds(lambda: target.copy_(source))
    generator = torch.Generator().manual_seed(0)
    times = {}
    for n in (256, 768):
        x = torch.randn(n, n, generator=generator)
        for dtype in (torch.float32, torch.float64):
            packed = PackedSymmetric.from_dense((x @ x.T).to(dtype))
            times[n, dtype] = _seconds(lambda p=packed: decompose(p, 1), 2)  # type: ignore[misc]
    small, large = times[256, torch.float32], times[768, torch.float32]
    # Two equations for α and β; noise must not make either negative.
    cubic = max((large / 768**2 - small / 256**2) / (768 - 256), large / 768**3 / 2)
    square = max(large / 768**2 - cubic * 768, 0.0)
    double = times[768, torch.float64] - square * 768**2
    return Rates(
        name="CPU", kind="cpu", memory=_total_memory(), process=process,
        narrow=rates[torch.bfloat16], single=rates[torch.float32], double=rates[torch.float64], bandwidth=bandwidth,
        eigh_cubic=cubic, eigh_square=square, eigh_double=max(1.0, double / (cubic * 768**3)),
        disk=_disk_rate(folder), link=bandwidth, network=1e9,
        source=f"measured on this CPU with {torch.get_num_threads()} threads", threads=torch.get_num_threads(),
    )  # fmt: skip


# For a plan whose times nobody reads, such as the passes that a fit is split into.
UNTIMED = Rates(
    "CPU", "cpu", 0.0, 0.0, 1e11, 1e11, 5e10, 1e10, 1e-10, 0.0, 2.0, 1e9, 1e10, 1e9, "assumed, since only memory counts"
)


def rates_of(device: str, folder: Path | None = None) -> Rates:
    """Rates of a device by name: one of `TABLE`, or `cpu`, which is measured.

    Raises:
        ValueError: another name.
    """
    if device.lower() == "cpu":
        return calibrate(folder)
    for name, rates in TABLE.items():
        if device.lower() == name.lower():
            return rates
    raise ValueError(f"device is {device!r}; it must be cpu or one of {', '.join(TABLE)}")

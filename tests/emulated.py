"""The CUDA kernels on a CPU: `csrc/emulation`, compiled once for each state of the sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
# Loops are unrolled for GPUs alone; fibres come back to a frame as longjmp does.
QUIET = ("-Wno-unknown-pragmas", "-Wno-clobbered")


@functools.cache
def emulated_module() -> Any:
    """The module `emulated`; skips where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    sources = sorted((ROOT / "csrc").rglob("*"))
    content = b"".join(path.read_bytes() for path in sources if path.suffix in (".h", ".cpp", ".cu"))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folder = ROOT / "build" / "emulation" / hashlib.sha256(content).hexdigest()[:16]
    target = folder / f"emulated{suffix}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        # PyTorch brings pybind11's headers.
        headers = [sysconfig.get_paths()["include"], str(Path(torch.__file__).parent / "include"), str(ROOT / "csrc")]
        command = [compiler, *OPTIONS, *QUIET, *(f"-I{path}" for path in headers), "-x", "c++"]
        source = ROOT / "csrc" / "emulation" / "module.cpp"
        subprocess.run([*command, str(source), "-o", str(part)], check=True)
        part.replace(target)
    spec = importlib.util.spec_from_file_location("emulated", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

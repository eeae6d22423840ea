"""What `setup.py` builds, skips and refuses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HAS_TOOLS = all(importlib.util.find_spec(name) for name in ("setuptools", "pybind11", "cmake", "ninja"))

pytestmark = pytest.mark.skipif(not HAS_TOOLS, reason="setuptools, pybind11, cmake and ninja are not installed")


def build(folder: Path, **environment: str) -> tuple[int, str, list[Path]]:
    """Exit status, output and modules of a build outside of the tree."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, list((folder / "lib").rglob("_C*.so"))


@pytest.mark.parametrize("name", ["KFADE_NATIVE", "KFADE_CUDA"])
def test_other_values_are_refused(name: str, tmp_path: Path) -> None:
    status, output, _ = build(tmp_path, **{name: "maybe"})
    assert status != 0 and f"{name} is 'maybe'; it must be auto, on or off" in output


def test_off_builds_nothing(tmp_path: Path) -> None:
    status, output, found = build(tmp_path, KFADE_NATIVE="off")
    assert status == 0 and not found and "cmake" not in output


@pytest.mark.slow
def test_without_a_compiler(tmp_path: Path) -> None:
    """`auto` goes on without the module and says why; `on` fails with CMake's words."""
    status, output, found = build(tmp_path / "auto", CXX="/nonexistent/c++")
    assert status == 0 and not found
    assert "/nonexistent/c++" in output and "kfade: the native module was not built" in output
    status, output, found = build(tmp_path / "on", CXX="/nonexistent/c++", KFADE_NATIVE="on", KFADE_CUDA="off")
    assert status != 0 and not found and "/nonexistent/c++" in output


@pytest.mark.slow
def test_a_module_that_is_built_loads(tmp_path: Path) -> None:
    status, output, found = build(tmp_path, KFADE_NATIVE="on", KFADE_CUDA="off")
    assert status == 0 and len(found) == 1, output
    script = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {str(found[0])!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.cuda_version is None and module.packed_elements(1) == 1
# Nothing of PyTorch is in the process, and so there is no pool of threads.
assert module.parallel_runtime() is None
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

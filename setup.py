"""Build entry point: all but the native module `kfade_kernels._C` is declared in pyproject.toml.

Two environment variables say what is built of it:

    KFADE_NATIVE  auto (default): the module where it compiles, else the package without it; on: or fail; off: never
    KFADE_CUDA    auto (default): its CUDA part where nvcc is found and compiles it; on: or fail; off: never

What `auto` skips, and why, is printed (`pip install -v` shows it). No PyTorch is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def wanted(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{name} is {value!r}; it must be auto, on or off")
    return value


NATIVE, CUDA = wanted("KFADE_NATIVE"), wanted("KFADE_CUDA")


def tool(name: str) -> str:
    """Path of a build tool: beside the interpreter that runs this, or on the PATH."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise CompileError(f"{name} was not found")
    return found


def run(*command: str) -> None:
    """Run one step; its output is shown, and ends the error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-40:])
        raise CompileError(f"{' '.join(command[:3])} … failed:\n{last}")


class BuildNative(build_ext):
    """Build the module by CMake and ninja, in a folder that later builds go on from."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.attempt(ext, CUDA)
        except CompileError:
            if CUDA != "auto":
                raise
            # nvcc may be there and not work with this compiler.
            self.attempt(ext, "off")

    def attempt(self, ext: Extension, cuda: str) -> None:
        try:
            self.build(ext, cuda)
        except CompileError as error:
            print(f"kfade: the native module was not built (KFADE_CUDA={cuda}): {error}", flush=True)
            raise

    def build(self, ext: Extension, cuda: str) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise CompileError(f"pybind11 is not installed ({error})") from error
        folder = Path(self.build_temp).resolve() / "native"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        run(
            tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DKFADE_CUDA={cuda.upper()}",
            f"-DKFADE_STRICT={'ON' if NATIVE == 'on' else 'OFF'}",
        )  # fmt: skip
        run(tool("cmake"), "--build", str(folder))


if NATIVE == "off":
    setup()
else:
    # With `optional` a build that fails is a warning, and the package is installed without the module.
    native = Extension("kfade_kernels._C", sources=[], optional=NATIVE == "auto")
    setup(ext_modules=[native], cmdclass={"build_ext": BuildNative})

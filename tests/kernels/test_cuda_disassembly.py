"""What the compiler made of the CUDA kernels: read from the machine code of the native module, without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from kfade_kernels import native

if native.module is None or native.module.cuda_version is None:
    pytest.skip("the native module is not built with CUDA", allow_module_level=True)


@functools.cache
def disassembler() -> str:
    """The CUDA toolkit's, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        brought = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(brought) if brought.exists() else None
    if found is None:
        pytest.skip("there is no cuobjdump")
    return found


@functools.cache
def listing(option: str, architecture: str) -> str:
    command = [disassembler(), option, "--gpu-architecture", architecture, native.module.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def functions(architecture: str) -> dict[str, str]:
    """The instructions of each kernel, by its mangled name."""
    parts = re.split(r"\n\s*Function : (\S+)\n", listing("--dump-sass", architecture))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def kernels(architecture: str, *words: str) -> dict[str, str]:
    found = {name: text for name, text in functions(architecture).items() if all(word in name for word in words)}
    assert found, f"no kernel of {architecture} has {words} in its name"
    return found


def resources(architecture: str, name: str) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, as the module declares them."""
    text = listing("--dump-resource-usage", architecture)
    (line,) = re.findall(rf"Function {re.escape(name)}:\s*\n\s*(.+)", text)
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


@pytest.mark.parametrize(("operation", "columns"), [("Outer", 256), ("Squares", 128)])
@pytest.mark.parametrize("element", ["Bf16", "Fp16"])
def test_hopper(operation: str, columns: int, element: str) -> None:
    ((_, text),) = kernels("sm_90a", "hopper_kernel", operation, element).items()
    suffix = r"F32\.BF16" if element == "Bf16" else r"F32 "
    products = re.findall(rf"HGMMA\.64x{columns}x16\.{suffix}.*", text)
    assert products and len(products) == count("HGMMA", text)
    # Both operands from shared memory, both by summed rows: nothing is transposed on the way.
    assert all("gdesc[" in line and "tnspA.tnspB" in line for line in products)
    # One group in four products: a compiler that serialises them closes a group after each.
    assert 4 * sum("gsb0" in line for line in products) == len(products)
    assert count(r"UTMALDG\.3D\.MULTICAST", text) == columns // 128
    assert count(r"UTMALDG\.3D ", text) == 2
    assert count("USETMAXREG", text) == 2
    # Four elements an access on the way to and from the result.
    assert count(r"LDG\.E\.128", text) >= columns // 8 and count(r"STG\.E\.128", text) >= columns // 8


@pytest.mark.parametrize("operation", ["Outer", "Squares"])
@pytest.mark.parametrize("element", ["Bf16", "Fp16"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_ampere(operation: str, element: str, architecture: str) -> None:
    ((_, text),) = kernels(architecture, "ampere_kernel", operation, element).items()
    assert count(r"HMMA\.16816\.F32", text) >= 32
    assert count(r"LDSM\.16\.MT88\.4", text) >= 12
    copies = re.findall(r"^.*LDGSTS.*$", text, re.MULTILINE)
    assert len(copies) >= 4 and all("LDGSTS.E.BYPASS.128" in line for line in copies)
    # What is left out is filled with zeros, so no copy is skipped.
    assert not any("@" in line for line in copies)
    assert count(r"LDG\.E\.128", text) >= 4 and count(r"STG\.E\.128", text) >= 4


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_nothing_is_kept_in_local_memory(architecture: str) -> None:
    threads = {"hopper_kernel": 384, "ampere_kernel": 256, "sum": 256}
    for name, text in functions(architecture).items():
        assert not re.search(r"\b(LDL|STL)\b", text), name
        used = resources(architecture, name)
        assert used["STACK"] == used["LOCAL"] == 0, (name, used)
        (count_of,) = (value for word, value in threads.items() if word in name)
        assert used["REG"] * count_of <= 65536, (name, used)

"""Every kernel is compiled for every target, without a GPU; and the checks on the result can fail.

Triton's interpreter, which the other tests run in, replaces what would be compiled: hence the subprocesses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "compiled.csv"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


@pytest.mark.slow
def test_every_shipped_variant_compiles_for_every_target(tmp_path: Path) -> None:
    """No fault in any of them, and registers, shared memory and occupancy are as recorded."""
    found = python("-m", "kfade_kernels.ahead_of_time", "--out", str(tmp_path / "compiled.csv"))
    assert found.returncode == 0, found.stdout + found.stderr
    fresh = (tmp_path / "compiled.csv").read_text(encoding="utf-8").splitlines()
    recorded = TABLE.read_text(encoding="utf-8").splitlines()
    if fresh[0] != recorded[0]:
        pytest.skip(f"the recorded table is of another compiler: {recorded[0]}")
    changed = sorted(set(fresh) ^ set(recorded))
    assert not changed, "\n".join(["the compiled kernels changed; `make compiled` records them anew:", *changed])


FAULTS = """
import json
from dataclasses import asdict, replace
from kfade_kernels.ahead_of_time import compile_variant, variants

def variant(architecture, name):
    return next(v for v in variants(architecture) if v.name == name)

def changed(v, constants={}, **configuration):
    return replace(v, configuration=replace(v.configuration, **configuration), constants={**v.constants, **constants})

half = variant("sm_90", "syrk bfloat16 pointers")
wide = variant("sm_90", "syrk float32 pointers")
tiny = {"BM": 16, "BN": 16}
answers = {
    "good": compile_variant(half, "sm_90"),
    "spills": compile_variant(changed(half, {"BM": 128, "BN": 256}, warps=4), "sm_90"),
    "no wgmma": compile_variant(changed(half, tiny), "sm_90"),
    "precision": compile_variant(changed(wide, {"PRECISION": "tf32"}), "sm_90"),
    "not asynchronous": compile_variant(changed(half, {"ALIGNED": False, **tiny}), "sm_90"),
    "trap": compile_variant(
        changed(variant("sm_100", "syrk float32 pointers"), {"PRECISION": "bf16x6"}, precision="bf16x6"), "sm_100"),
    "shared memory": compile_variant(changed(variant("sm_80", "syrk bfloat16 pointers"), stages=9), "sm_80"),
    "does not compile": compile_variant(changed(half, {"PRECISION": "bf17"}), "sm_90"),
}
print(json.dumps({name: asdict(answer) for name, answer in answers.items()}))
"""


@pytest.fixture(scope="module")
def answers() -> Any:
    found = python("-c", FAULTS)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_a_good_variant_has_no_fault(answers: Any) -> None:
    good = answers["good"]
    assert good["faults"] == ""
    assert good["precision"] == "16-bit"
    assert 0 < good["registers"] <= 255
    assert good["programs"] >= 1
    assert good["shared"] > 0


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("spills", "bytes spilled"),
        ("no wgmma", "no wgmma.mma_async"),
        ("precision", "products are ['tf32'], not ['tf32x3']"),
        ("not asynchronous", "loads are not asynchronous"),
        ("trap", "a trap"),
        ("shared memory", "bytes of shared memory of"),
        ("does not compile", "not compiled"),
    ],
)
def test_each_check_can_fail(answers: Any, name: str, fault: str) -> None:
    assert fault in answers[name]["faults"]


SPECIALISED = """
from importlib import import_module
from kfade_kernels.ahead_of_time import KERNELS
from kfade_kernels.devices import H100
found = set()
for folder in KERNELS:
    for variant in import_module(f"kfade_kernels.{folder}.triton").variants(H100):
        for parameter in variant.kernel.params:
            if variant.signature.get(parameter.name, "").startswith("i") and not parameter.do_not_specialize:
                found.add((variant.kernel.__name__, parameter.name))
print(sorted(found))
"""


def test_no_kernel_is_compiled_anew_for_another_size() -> None:
    """Triton makes forms of their own for integers that are 1 or divisible by 16, which were not checked here."""
    found = python("-c", SPECIALISED)
    assert found.stdout == "[]\n", found.stdout + found.stderr


def test_the_interpreter_is_refused() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "kfade_kernels.ahead_of_time"],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert found.returncode != 0
    assert "TRITON_INTERPRET is 1; it must be unset" in found.stderr

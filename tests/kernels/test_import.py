"""The kernels alone: what importing and using them brings along, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

# torch is imported before the watch begins, since what it brings is not ours.
SCRIPT = """
import sys

import torch

FORBIDDEN = ("transformers", "kfade", "triton", "safetensors", "tokenizers", "datasets", "yaml", "kronfluence")
asked = []

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            asked.append(name)
            raise ModuleNotFoundError(f"{name} is not there", name=name)

before = set(sys.modules)
assert not before & set(FORBIDDEN), before & set(FORBIDDEN)
sys.meta_path.insert(0, Refusing())

import kfade_kernels as kk

# Not even tried, which a caught ImportError would hide.
assert asked == [], asked
brought = {name.split(".")[0] for name in set(sys.modules) - before}
foreign = brought - set(sys.stdlib_module_names) - {"kfade_kernels"}
assert foreign == set(), foreign

x, q = torch.randn(8, 4), torch.eye(4)
acc = kk.PackedSymmetric(4)
kk.syrk_(acc, x)
kk.accumulate_factors_(acc, kk.PackedSymmetric(4), x, x)
kk.eigenvalue_correction_(torch.zeros(4, 4), x.view(2, 4, 4), x.view(2, 4, 4), q, q)
kk.rotate(x.bfloat16(), kk.bf16_pair(q))
kk.kron_solve(x[:4], q, q, torch.rand(4, 4), 0.1)
kk.sampled_cross_entropy(x, keys=torch.arange(8))
kk.apply_update_([x], [x + 1])
kk.sketch_(torch.zeros(4, 2), torch.zeros(()), x, torch.randn(4, 2))
for name in kk.operations():
    assert getattr(kk, name).__doc__
print(kk.explain("syrk_", acc, x))
assert asked == [], asked
"""


def test_import_brings_torch_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KFADE_", "TRITON_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("syrk_: cpu", "syrk_: pytorch")) and "not triton: x is on cpu" in done.stdout

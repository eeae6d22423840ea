"""A small fit with whatever kfade is installed: what a fresh environment must be able to do.

python packaging/check_install.py native     # and the kernels in C++ must serve
python packaging/check_install.py plain      # and there must be none
"""

from __future__ import annotations

import sys

import kfade_kernels as kk
import torch
from kfade_kernels import native
from transformers import LlamaConfig, LlamaForCausalLM

import kfade

expected = sys.argv[1]
if expected not in ("native", "plain"):
    raise SystemExit(f"the argument is {expected!r}; it must be native or plain")
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
)
batch = {"input_ids": torch.randint(3, 97, (4, 12))}
fitted = kfade.fit(model, [batch], kfade.FitConfig(curvature="ekfac", modules="mlp"))
said = kk.explain("syrk_", kk.PackedSymmetric(64), torch.zeros(9, 64))
cuda = getattr(native.module, "cuda_version", None)
print(f"kfade {kfade.__version__} at {kfade.__file__}: {len(fitted)} layers; {said}; built for CUDA {cuda}")
assert (said.backend == "cpu") == (native.missing is None and bool(native.module.isas())) == (expected == "native"), (
    said
)

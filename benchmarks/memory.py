"""Peak memory of an EK-FAC fit beside kronfluence's, each in a process of its own: same model, data and labels.

    python benchmarks/memory.py                                   # two shapes
    python benchmarks/memory.py --shapes 1024:4096:4 --no-record  # width:MLP width:layers

In float32. Counted is what the process holds beyond the loaded model and data, at the highest. Sequences are few and
short and the vocabulary is small, so that factors and not activations are what is compared. kronfluence keeps every
covariance and eigenvector as a dense matrix, one of each module; we keep triangles, packed, and one A for modules with
one input. Both keep the factors beside the eigenvectors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import fit
import torch
from records import append
from transformers import LlamaConfig, LlamaForCausalLM

from kfade.progress import peak_bytes, reset_peak

PROVIDERS = ("kfade", "kronfluence")


def model_of(shape: str) -> LlamaForCausalLM:
    width, inner, layers = (int(part) for part in shape.split(":"))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8, vocab_size=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def predicted(shape: str) -> dict[str, dict[str, float]]:
    """MiB of the state at the end of each stage, in float32: what each provider keeps, without anything on the way."""
    width, inner, layers = (int(part) for part in shape.split(":"))
    scale = 4 * layers / 2**20

    def triangle(order: int) -> float:
        return order * (order + 1) / 2

    ours = 2 * triangle(width) + 3 * triangle(inner)
    ours_basis = 2 * width**2 + 3 * inner**2
    theirs = 3 * (width**2 + inner**2)
    eigenvalues = 3 * width * inner
    return {
        "kfade": {
            "A, S": scale * ours, "eigh": scale * (ours + ours_basis),
            "eigenvalues": scale * (ours + ours_basis + eigenvalues),
        },
        "kronfluence": {
            "A, S": scale * theirs, "eigh": scale * 2 * theirs, "eigenvalues": scale * (2 * theirs + eigenvalues),
        },
    }  # fmt: skip


def measure(provider: str, shape: str) -> dict[str, float]:
    """MiB of each stage beyond the model and the data, in this process."""
    model, data = model_of(shape), fit.build_data(16, 32, 8, 512)
    names = [name for name, module in model.named_modules() if ".mlp." in name and isinstance(module, torch.nn.Linear)]
    # Both begin from the same: what the first pass allocates for good is there already.
    fit.run_floor(model, data[:1], "off")
    if provider == "kfade":
        stages, _ = fit.run_kfade(model, data, "off")
    else:
        reset_peak()
        clock = fit.Clock(peak_bytes())
        stages, _ = fit.run_kronfluence(model, data, "off", names, with_default=False, clock=clock)
    return {stage: memory for stage, (_, memory) in stages.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["512:2048:12", "1024:4096:3"], help="width:MLP width:layers")
    parser.add_argument("--provider", choices=PROVIDERS, help="measure in this process, and print JSON")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    if options.provider:
        print(json.dumps(measure(options.provider, options.shapes[0])))
        return
    rows = []
    for shape in options.shapes:
        found = {}
        for provider in PROVIDERS:
            command = [sys.executable, __file__, "--provider", provider, "--shapes", shape]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[provider] = json.loads(result.stdout.splitlines()[-1])
        print(f"\n{shape}\n{'stage':14}{'kfade MiB':>11}{'kept':>8}{'kronfl. MiB':>13}{'kept':>8}{'ratio':>7}")
        kept = predicted(shape)
        for stage in found["kfade"]:
            ours, theirs = (found[provider][stage] for provider in PROVIDERS)
            known = [kept[provider].get(stage, max(kept[provider].values())) for provider in PROVIDERS]
            print(f"{stage:14}{ours:11.0f}{known[0]:8.0f}{theirs:13.0f}{known[1]:8.0f}{ours / theirs:7.2f}")
            rows.append({
                "shape": shape, "stage": stage, "kfade_mib": round(ours), "kfade_kept_mib": round(known[0]),
                "kronfluence_mib": round(theirs), "kronfluence_kept_mib": round(known[1]),
                "ratio": round(ours / theirs, 3),
            })  # fmt: skip
    if not options.no_record:
        print(f"\nrecorded in {append('memory', rows)}")


if __name__ == "__main__":
    main()

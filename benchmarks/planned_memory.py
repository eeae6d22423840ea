"""Peak memory of each stage of a fit as planned beside as measured, with a limit and without one.

    OMP_NUM_THREADS=1 python benchmarks/planned_memory.py

Float32 EK-FAC of the MLP layers of Llamas of width 512 and 4,096 words. Each fit is run in processes of its own, which
are counted whole, and the median of the runs is kept. A limit that nothing reaches changes only what a fit does with
memory that it has freed. All of the fits save themselves as they go.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass

import torch
from records import append
from transformers import LlamaConfig, LlamaForCausalLM

import kfade
from kfade.loss import check_batches
from kfade.plan import plan_fit

WORDS, GIB = 4096, 64.0


@dataclass(frozen=True)
class Fit:
    """One fit: blocks of an MLP width, layers a pass, the shape of its batch, padded positions, a limit in GiB."""

    name: str
    blocks: int
    inner: int
    layers_per_pass: int | None
    size: int = 4
    length: int = 128
    padding: int = 0
    limit: float | None = GIB


FITS = (
    Fit("2 blocks of 1536, two passes, a limit", 2, 1536, 3),
    Fit("2 blocks of 1536, one pass, one padded sequence of 1024, a limit", 2, 1536, None, 1, 1024, 9),
    Fit("4 blocks of 2048, one pass, a limit", 4, 2048, None),
    Fit("4 blocks of 2048, one pass, no limit", 4, 2048, None, limit=None),
    Fit("4 blocks of 2048, four passes, a limit", 4, 2048, 3),
    Fit("4 blocks of 2048, four passes, no limit", 4, 2048, 3, limit=None),
)


def llama(width: int, inner: int, blocks: int, words: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=words,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def batch(size: int, length: int, words: int, padding: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, words, (size, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, length - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def measure(fit: Fit) -> list[dict[str, object]]:
    """Of each stage, MiB planned and measured, in this process."""
    torch.set_num_threads(1)
    config = kfade.FitConfig(layers_per_pass=fit.layers_per_pass, device_memory=fit.limit)
    # Code and tables that libraries load at their first use are no part of a plan.
    kfade.fit(llama(64, 128, 1, 256), [batch(2, 32, 256)], config)
    model = llama(512, fit.inner, fit.blocks, WORDS)
    batches = [batch(fit.size, fit.length, WORDS, fit.padding)]
    planned = plan_fit(model, check_batches(batches, torch.device("cpu")), config, stored=True)
    progress = kfade.Progress()
    with tempfile.TemporaryDirectory() as folder:
        kfade.fit(model, batches, config, progress=progress, store=folder)
    return [
        {"stage": b.stage, "planned": b.planned_bytes / 2**20, "measured": b.bytes / 2**20,
         "process": planned.memory[0].process / 2**20}
        for b in planned.beside(progress.costs)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="fits whose names hold this text")
    parser.add_argument("--fit", help="as JSON: measure it in this process, and print JSON")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    if options.fit:
        print(json.dumps(measure(Fit(**json.loads(options.fit)))))
        return
    torch.set_num_threads(1)
    for fit in (fit for fit in FITS if options.only in fit.name):
        command = [sys.executable, __file__, "--fit", json.dumps(asdict(fit))]
        rows, runs = [], []
        for _ in range(options.repeats):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        for stages in zip(*runs, strict=True):
            middle = {key: statistics.median(s[key] for s in stages) for key in ("process", "planned", "measured")}
            row = {
                "fit": fit.name, "stage": stages[0]["stage"], **{f"{key}_mib": round(x) for key, x in middle.items()},
                "ratio": round(middle["measured"] / middle["planned"], 3), "runs": options.repeats,
            }  # fmt: skip
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
        if not options.no_record:
            append("planned_memory", rows)


if __name__ == "__main__":
    main()

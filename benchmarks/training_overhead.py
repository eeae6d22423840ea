"""What collecting factors adds to a training step, with and without taking turns in one run.

    python benchmarks/training_overhead.py                  # about three minutes on two cores
    OMP_NUM_THREADS=1 python benchmarks/training_overhead.py --clock cpu
    python benchmarks/training_overhead.py --rounds 1 --steps 10 --no-record

A Llama is trained by AdamW on random tokens. In each round every setting trains for `--steps` steps (of which its
tracker collects at each `every`-th), beginning with another one each time; the median over rounds of the seconds a
step is set against that of the same loop without a tracker. A tracker has collected once before it is timed. On a
machine that does other things too, `--clock cpu` with OMP_NUM_THREADS=1 counts the seconds that were had. The
prediction counts the FLOPs of products, and nothing of the optimiser.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kfade_kernels.precision import multiplies_bf16
from records import append
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kfade

Batch = dict[str, Tensor]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Setting:
    """A way to train, and what it took.

    Attributes:
        every: interval of the tracker; 0 for none.
        modules: what it tracks.
        autocast: of the training and of the passes.
        seconds: a step, one value a round.
        collecting: of each pass that collected.
    """

    every: int
    modules: str
    autocast: str
    seconds: list[float] = field(default_factory=list)
    collecting: list[float] = field(default_factory=list)


def settings() -> list[Setting]:
    found = [Setting(0, "", "off"), *(Setting(every, "mlp", "off") for every in (5, 10, 20))]
    found.append(Setting(10, "all-linear", "off"))
    # Without units for it a CPU takes a hundred times as long for a product of bfloat16.
    if multiplies_bf16("cpu"):
        found += [Setting(0, "", "bfloat16"), Setting(10, "mlp", "bfloat16")]
    return found


def build(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=options.inner,
            num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
        )
    ).train()  # fmt: skip


def predicted(model: LlamaForCausalLM, modules: str, tokens: int) -> float:
    """FLOPs of a pass that collects, as a share of forward and backward with all gradients."""
    config = model.config
    everything = sum(layer.weight.numel() for layer in kfade.layers.select(model, "all-linear"))
    head = model.lm_head.weight.numel()
    scores = config.num_hidden_layers * 2 * tokens * config.hidden_size
    tracked = kfade.layers.select(model, modules)
    # Nothing below the first tracked layer runs backward: the first attention, if MLP layers are tracked.
    below = sum(p.numel() for p in model.model.layers[0].self_attn.parameters()) if modules == "mlp" else 0
    orders = [layer.d_out for layer in tracked]
    # The inputs of q, k and v are one, and of gate and up.
    shared = ("k_proj", "v_proj", "up_proj")
    orders += [layer.d_in for layer in tracked if not layer.name.endswith(shared)]
    factors = sum(n * n + 128 * n for n in orders)
    return (4 * (everything + head) - 2 * below + 6 * scores + factors) / (6 * (everything + head) + 6 * scores)


def train(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    data: list[Batch],
    options: argparse.Namespace,
    setting: Setting,
) -> None:
    """Train for `options.steps` steps and note the time."""
    now, steps = CLOCKS[options.clock], options.steps
    tracker = None
    if setting.every:
        config = kfade.FitConfig("kfac", modules=setting.modules, autocast=setting.autocast)
        tracker = kfade.FactorTracker(model, config, every=setting.every)
        tracker.update(data[0])
    begin = now()
    for number in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting.autocast != "off"):
            loss = model(**data[number % len(data)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if tracker is not None:
            before = now()
            if tracker.step():
                setting.collecting.append(now() - before)
    setting.seconds.append((now() - begin) / steps)
    if tracker is not None:
        tracker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="of each setting in a round; the intervals divide it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    ways = settings()
    if wrong := [s.every for s in ways if s.every and options.steps % s.every]:
        print(f"note: {options.steps} steps are no multiple of {wrong}, which then collect more often than they say")
    model = build(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    shape = (options.batch, options.tokens)
    tokens = [torch.randint(0, options.vocabulary, shape, generator=generator) for _ in range(4)]
    data = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in tokens]
    for way in ways:
        if not way.every:
            train(model, optimizer, data, options, way)
            way.seconds.clear()
    for number in range(options.rounds):
        for place in range(len(ways)):
            train(model, optimizer, data, options, ways[(number + place) % len(ways)])

    plain = {s.autocast: statistics.median(s.seconds) for s in ways if not s.every}
    rows: list[dict[str, Any]] = []
    print(f"{'modules':12}{'autocast':10}{'every':>6}{'s a step':>10}{'overhead':>10}{'predicted':>10}{'a pass':>8}")
    for s in ways:
        seconds, base = statistics.median(s.seconds), plain[s.autocast]
        guess = predicted(model, s.modules, options.tokens) / s.every if s.every else 0.0
        one = statistics.median(s.collecting) / base if s.collecting else 0.0
        print(
            f"{s.modules or '-':12}{s.autocast:10}{s.every or '-':>6}{seconds:10.3f}"
            f"{seconds / base - 1:10.1%}{guess:10.1%}{one:8.2f}"
        )
        rows.append({
            "layers": options.layers, "width": options.width, "inner": options.inner, "vocabulary": options.vocabulary,
            "batch": options.batch, "tokens": options.tokens, "steps": options.steps, "rounds": options.rounds,
            "clock": options.clock,
            "modules": s.modules, "autocast": s.autocast, "every": s.every, "seconds_a_step": round(seconds, 4),
            "fastest": round(min(s.seconds), 4), "slowest": round(max(s.seconds), 4),
            "overhead": round(seconds / base - 1, 4), "predicted": round(guess, 4), "pass_in_steps": round(one, 3),
        })  # fmt: skip
    if not options.no_record:
        print(f"\nrecorded in {append('training_overhead', rows).relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()

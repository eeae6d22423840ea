"""What the planner says of large models on H100s: the tables of docs/scaling.md, simulated, not measured.

    python benchmarks/scaling.py            # prints the tables
    python benchmarks/scaling.py --write    # and puts them into docs/scaling.md

1,000 sequences of 512 tokens, MLP layers, bfloat16 weights, EK-FAC, one label sample; full factors and rank 512.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, Qwen2Config

from kfade import FitConfig
from kfade.layers import select
from kfade.models import outline_model
from kfade.plan import Plan, Workload, plan_model
from kfade.rates import TABLE
from kfade.simulation import simulate

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- begin: python benchmarks/scaling.py --write -->", "<!-- end -->"
SEQUENCES, LENGTH, BATCH, RANK = 1000, 512, 8, 512
DEVICES = (1, 8, 64)


def _qwen(width: int, inner: int, layers: int, heads: int, groups: int, words: int, tied: bool) -> Any:
    return Qwen2Config(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=words, tie_word_embeddings=tied,
    )  # fmt: skip


# From the models' public configuration files.
MODELS: dict[str, Any] = {
    "Qwen2.5-0.5B": _qwen(896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-7B": _qwen(3584, 18944, 28, 28, 4, 152064, False),
    "Llama-3-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False, max_position_embeddings=8192,
    ),
}  # fmt: skip
CHECKPOINTED = ("Llama-3-70B",)
# Factors, eigh, Λ, saving, total; K-FADE's first author, said to be on 8 H100s.
PUBLISHED = {
    "Qwen2.5-0.5B": (6.6, 32, 8.6, 15, 64),
    "Qwen2.5-1.5B": (21, 137, 35, 59, 256),
    "Qwen2.5-7B": (104, 810, 254, 377, 1575),
}


def plans(name: str) -> list[Plan]:
    """Full and low-rank plans on each number of devices."""
    model = outline_model(MODELS[name], "bfloat16")
    if name in CHECKPOINTED:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config, rates = FitConfig(), TABLE["H100"]
    simulated = simulate(model, select(model, config.modules), BATCH, LENGTH)
    load = Workload(SEQUENCES * LENGTH, SEQUENCES, SEQUENCES // BATCH, BATCH, LENGTH)
    return [
        plan_model(
            model,
            name,
            load,
            replace(config, rank=rank),
            rates,
            devices=devices,
            limit=rates.memory,
            simulated=simulated,
        )
        for rank in (None, RANK)
        for devices in DEVICES
    ]


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}" if value >= 0.095 else f"{value:.1g}"


def row(plan: Plan) -> str:
    """One line of a table: seconds of each stage."""
    names = ("forward and backward", "factors", "decomposition", "correction", "reduction", "saving")
    kind = "full" if plan.rank is None else f"rank {plan.rank}"
    if not plan.fits:
        cells = ["–"] * (len(names) + 2)
        need = f"does not fit: {plan.peak_bytes / 2**30:,.0f} GiB"
        return f"| {kind}, {plan.devices} × H100 | {need} | {' | '.join(cells)} |"
    values = [_seconds(plan.stage(name).seconds) if plan.stage(name).runs else "–" for name in names]
    cells = [str(plan.passes), *values, f"**{_seconds(plan.seconds)}**"]
    return f"| {kind}, {plan.devices} × H100 | {plan.peak_bytes / 2**30:.0f} GiB | {' | '.join(cells)} |"


def table(name: str, found: list[Plan]) -> str:
    """The table of one model, with the published times below."""
    state = [sum(p.bytes for p in plan.places if p.where == "disk") for plan in (found[0], found[len(DEVICES)])]
    lines = [
        f"### {name}, simulated",
        "",
        f"{found[0].parameters / 1e9:.2f}·10⁹ parameters, {len(found[0].layers)} layers selected; the curvature takes"
        f" {state[0] / 2**30:,.1f} GiB in full and {state[1] / 2**30:,.1f} GiB at rank {RANK}. Seconds:",
        "",
        "| | peak a device | passes | forward, backward | A, S | eigh | Λ | reduction | saving | all |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(row(plan) for plan in found),
    ]
    if name in PUBLISHED:
        factors, eigh, correction, saving, total = PUBLISHED[name]
        lines.append(
            f"| *published, 8 × H100* | – | – | *in A, S and Λ* | *{factors}* | *{eigh}* | *{correction}* | –"
            f" | *{saving}* | *{total:,}* |"
        )
    return "\n".join(lines)


# Sequences a batch, and whether blocks are recomputed.
BATCHES = ((8, False), (16, False), (8, True), (16, True), (32, True), (64, True))


def homes(size: int, checkpointed: bool) -> list[Plan]:
    """Full factors of Qwen2.5-7B on one H100, in batches of so many: state there, in host memory, on another H100."""
    model, rates = outline_model(MODELS["Qwen2.5-7B"], "bfloat16"), TABLE["H100"]
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    simulated = simulate(model, select(model, FitConfig().modules), size, LENGTH)
    load = Workload(SEQUENCES * LENGTH, SEQUENCES, -(-SEQUENCES // size), size, LENGTH)
    return [
        plan_model(
            model, "Qwen2.5-7B", load, FitConfig(state_device=home), rates, limit=rates.memory, simulated=simulated
        )
        for home in (None, "cpu", "cuda:1")
    ]  # fmt: skip


def table_of_homes() -> str:
    """Peak, passes and seconds of each, and seconds of moving."""
    lines = [
        "### Qwen2.5-7B in full on one H100, state elsewhere, simulated",
        "",
        "Seconds of the whole fit, and in brackets those that A and S, and Λ, take to move:",
        "",
        "| sequences a batch | passes | seconds | peak with one pass | state in host memory | state on other H100s |",
        "|---|---|---|---|---|---|",
    ]
    for size, checkpointed in BATCHES:
        here, host, peer = homes(size, checkpointed)
        cells = []
        for plan in (host, peer):
            moving = [f"{plan.stage(name).moving_seconds:.0f}" for name in ("factors", "correction")]
            cells.append(f"{plan.seconds:,.0f} ({', '.join(moving)})")
        what = f"{size}, blocks recomputed" if checkpointed else f"{size}"
        peak = f"{host.peak_bytes / 2**30:.0f} GiB"
        lines.append(f"| {what} | {here.passes} | {here.seconds:,.0f} | {peak} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables() -> str:
    """All of them."""
    return "\n\n".join([*(table(name, plans(name)) for name in MODELS), table_of_homes()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    options = parser.parse_args()
    text = tables()
    print(text)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The decomposition stage: factors at once beside one after the other, and K-FAC by Cholesky beside eigenvectors.

    OMP_NUM_THREADS=2 python benchmarks/decomposition.py --part stage
    OMP_NUM_THREADS=1 python benchmarks/decomposition.py --part cholesky

`stage` decomposes factors of SmolLM2-135M's MLP shapes (orders 576 and 1,536), and two of order 4,096, by each number
of threads: one factor after the other with all threads in LAPACK, and as `kfade.fit` does, a factor a thread. The two
take turns, and the least wall and CPU seconds of the rounds are kept. `cholesky` fits K-FAC of the MLP layers of the
last blocks of SmolLM2-135M once, and compares solving with and without eigenvectors: CPU seconds, and what is
forgotten of some capitals at equal measured retain KL.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from kfade_kernels import PackedSymmetric
from low_rank import Search, uphill
from records import append
from torch import Tensor

import kfade
from kfade.data import make_batches
from kfade.decomposition import decompose_states
from kfade.demo import FIT_BATCH, load_data
from kfade.evaluate import scores
from kfade.layer_curvature import LayerCurvature
from kfade.layers import select
from kfade.models import demo_model, load_model

COLUMNS = (
    "part", "case", "way", "threads", "wall_seconds", "cpu_seconds", "load", "gflop", "solve_cpu_seconds", "budget",
    "retain_kl", "forget_nll",
)  # fmt: skip


def record(keep: bool, row: dict[str, Any]) -> None:
    full = {column: row.get(column, "") for column in COLUMNS}
    print(", ".join(f"{name} {value}" for name, value in full.items() if value != ""), flush=True)
    if keep:
        append("decomposition", [full])


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def layers_of(shapes: list[tuple[int, int]]) -> dict[str, LayerCurvature]:
    """Layers `[d_out, d_in]` with random factors."""
    states = {}
    for i, (d_out, d_in) in enumerate(shapes):
        name = f"layer {i}"
        states[name] = state = LayerCurvature(name, d_out, d_in, False, False, name, positions=1, losses=1)
        generator = torch.Generator().manual_seed(i)
        factors = []
        for n in (d_in, d_out):
            # The spectrum falls as those of real factors do.
            x = torch.randn(n, n, generator=generator) * torch.logspace(0, -3, n)
            factors.append(PackedSymmetric.from_dense(x.T @ x))
        state.a_sum, state.s_sum = factors
    return states


def one_by_one(states: dict[str, LayerCurvature]) -> None:
    """What the stage did before: every factor by all threads."""
    for state in states.values():
        for total in (state.a_sum, state.s_sum):
            assert total is not None
            torch.linalg.eigh(total.to_dense())


def stage(options: argparse.Namespace) -> None:
    up, down = (1536, 576), (576, 1536)
    cases = {f"SmolLM2-135M, {options.blocks} blocks": [up, up, down] * options.blocks}
    if options.large:
        cases["two factors of order 4,096"] = [(4096, 4096)]
    for case, shapes in cases.items():
        gflop = 9e-9 * sum(n**3 for shape in shapes for n in shape)
        states = layers_of(shapes)
        best: dict[tuple[str, int], tuple[float, float]] = {}
        for _ in range(options.rounds if len(shapes) > 1 else 1):
            for threads in options.threads:
                for way in ("one by one", "a factor a thread"):
                    torch.set_num_threads(threads)
                    fresh = {name: replace(state) for name, state in states.items()}
                    run = one_by_one if way == "one by one" else decompose_states
                    found = timed(lambda run=run, fresh=fresh: run(fresh))  # type: ignore[misc]
                    best[way, threads] = min(best.get((way, threads), (math.inf, math.inf)), found)
        for (way, threads), (wall, cpu) in best.items():
            record(not options.no_record, {
                "part": "stage", "case": case, "way": way, "threads": threads, "wall_seconds": f"{wall:.2f}",
                "cpu_seconds": f"{cpu:.2f}", "load": f"{os.getloadavg()[0]:.1f}", "gflop": f"{gflop:.0f}",
            })  # fmt: skip


def cholesky(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model(str(demo_model()))
    data, count = load_data(16), model.config.num_hidden_layers
    retain = make_batches(tokenizer, data.retain[:96], batch_size=FIT_BATCH)
    retain += make_batches(tokenizer, data.text[:12], batch_size=FIT_BATCH)
    forget = make_batches(tokenizer, data.forget, batch_size=FIT_BATCH, loss_on="answer")
    numbers = "|".join(str(i) for i in range(count - options.blocks, count))
    config = kfade.FitConfig(curvature="kfac", decomposition="cholesky", modules=rf"layers\.({numbers})\.mlp\.")
    alone = kfade.fit(model, retain, config)
    decomposed = kfade.Curvature(
        replace(config, decomposition="eigh"), "demo", {n: replace(s) for n, s in alone.items()}
    )
    _, seconds = timed(lambda: decompose_states(decomposed.layers))
    layers = select(model, config.modules)
    gradient = uphill(model, layers, forget)
    search = Search(model, layers, make_batches(tokenizer, data.retain_held[::4], batch_size=FIT_BATCH))
    scale = 1.0
    for way, curvature, spent in (("eigh", decomposed, seconds), ("cholesky", alone, 0.0)):
        solved: dict[str, Any] = {}
        _, solving = timed(lambda c=curvature, s=solved: s.update(c.solve(gradient)))  # type: ignore[misc]
        length = math.sqrt(sum(float(x.square().sum()) for x in solved.values()))
        step: dict[str, Tensor] = {n: x / length for n, x in solved.items()}
        for budget in options.budgets:
            scale, kl = search.to(step, budget, scale)
            nll = scores(model, forget).nll
            search.move(step, 0.0)
            record(not options.no_record, {
                "part": "cholesky", "case": f"SmolLM2-135M, the last {options.blocks} blocks", "way": way, "threads": 1,
                "cpu_seconds": f"{spent:.2f}", "solve_cpu_seconds": f"{solving:.2f}", "budget": budget,
                "retain_kl": f"{kl:.5f}", "forget_nll": f"{nll:.3f}",
            })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("stage", "cholesky"), required=True)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--large", action="store_true", help="two factors of order 4,096 as well, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.015])
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    stage(options) if options.part == "stage" else cholesky(options)


if __name__ == "__main__":
    main()

"""EK-FAC in one pass over the data beside two: time, distance of the solve, forgetting at equal measured retain KL.

    OMP_NUM_THREADS=1 python benchmarks/one_pass.py

SmolLM2-135M, the MLP layers of its last blocks, on part of the demo's data. Each fit is a call of `kfade.fit` of its
own, and is timed in CPU seconds of the process; FLOPs are counted before, by the plan. The gradient that is solved for
is that of some capitals. The distance of a solve is that from the solve of two passes over all data,
`‖x − x₂‖ / ‖x₂‖` over all layers, each with relative damping 0.1; what two passes over half of the data differ by is
the measure of what sampling alone does. Rows are written as they are known.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from low_rank import Search, uphill
from records import append
from torch import Tensor

import kfade
from kfade.data import make_batches
from kfade.demo import FIT_BATCH, load_data
from kfade.evaluate import scores
from kfade.layers import select
from kfade.loss import check_batches
from kfade.models import demo_model, load_model
from kfade.plan import plan_fit


@dataclass(frozen=True)
class Case:
    """One way to fit: what it is called, on which of every so many batches, with which share, in whose basis."""

    name: str
    every: int = 1
    share: float | None = None
    basis: str | None = None


CASES = (
    Case("two passes"),
    Case("one pass, basis of 1/2", share=0.5),
    Case("one pass, basis of 1/4", share=0.25),
    Case("one pass, basis of 1/8", share=0.125),
    Case("basis of 1/4, then all for the eigenvalues", basis="one pass, basis of 1/4"),
    Case("two passes over half of the data", every=2),
)


def distance(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[float, float]:
    """`‖x − y‖ / ‖y‖`, and the cosine of x and y, over all layers."""
    x, y = (torch.cat([value.reshape(-1).double() for value in part.values()]) for part in (one, two))
    return float((x - y).norm() / y.norm()), float(x @ y / (x.norm() * y.norm()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6, help="so many of the last blocks")
    parser.add_argument("--retain", type=int, default=96, help="retain questions")
    parser.add_argument("--text", type=int, default=12, help="paragraphs")
    parser.add_argument("--capitals", type=int, default=16)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.015])
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(str(demo_model()))
    data, count = load_data(options.capitals), model.config.num_hidden_layers
    retain = make_batches(tokenizer, data.retain[: options.retain], batch_size=FIT_BATCH)
    retain += make_batches(tokenizer, data.text[: options.text], batch_size=FIT_BATCH)
    forget = make_batches(tokenizer, data.forget, batch_size=FIT_BATCH, loss_on="answer")
    numbers = "|".join(str(i) for i in range(count - options.blocks, count))
    base = kfade.FitConfig(modules=rf"layers\.({numbers})\.mlp\.")
    layers = select(model, base.modules)
    gradient = uphill(model, layers, forget)
    search = Search(model, layers, make_batches(tokenizer, data.retain_held[::4], batch_size=FIT_BATCH))
    checked = check_batches(retain, torch.device("cpu"))
    print(f"{len(layers)} layers, {sum(batch.tokens for batch in checked)} tokens, {len(checked)} batches", flush=True)

    fits: dict[str, kfade.Curvature] = {}
    truth: dict[str, Any] = {}
    scale, first = 1.0, math.nan

    def compare(name: str, curvature: kfade.Curvature, row: Mapping[str, Any]) -> None:
        nonlocal scale
        solved = curvature.solve(gradient)
        truth.setdefault("solved", solved)
        away, cosine = distance(solved, truth["solved"])
        length = math.sqrt(sum(float(x.square().sum()) for x in solved.values()))  # type: ignore[union-attr]
        step: dict[str, Tensor] = {n: x / length for n, x in solved.items()}  # type: ignore[operator]
        for budget in options.budgets:
            scale, kl = search.to(step, budget, scale)
            nll = scores(model, forget).nll
            search.move(step, 0.0)
            found = {
                "fit": name, "layers": len(layers), **row,
                "solve_distance": f"{away:.4f}", "solve_cosine": f"{cosine:.4f}",
                "budget": budget, "retain_kl": f"{kl:.5f}", "forget_nll": f"{nll:.3f}",
            }  # fmt: skip
            print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
            if not options.no_record:
                append("one_pass", [found])

    for case in CASES:
        batches = retain[:: case.every]
        config = replace(base, basis_share=case.share)
        checked = check_batches(batches, torch.device("cpu"))
        basis = None if case.basis is None else fits[case.basis]
        stages = plan_fit(model, checked, config, stored=False, basis=basis).stages
        flops = sum(stage.flops for stage in stages if stage.name != "solve")
        progress = kfade.Progress()
        begin = time.process_time()
        curvature = kfade.fit(model, batches, config, progress=progress, basis=basis)
        seconds = time.process_time() - begin
        fits[case.name] = curvature
        first = seconds if math.isnan(first) else first
        state = next(iter(curvature.values()))
        row = {
            "losses_factors": int(state.losses),
            "losses_eigenvalues": int(state.losses if state.lambda_losses is None else state.lambda_losses),
            "tflop_predicted": f"{flops / 1e12:.2f}", "cpu_seconds": f"{seconds:.1f}",
            "share_of_two_passes": f"{seconds / first:.2f}",
        }  # fmt: skip
        compare(case.name, curvature, row)
        if case.name == "two passes":
            states = {n: replace(state, lambda_sum=None) for n, state in curvature.items()}
            kfac = kfade.Curvature(replace(config, curvature="kfac"), "demo", states)
            compare("K-FAC: the same without eigenvalues", kfac, {**row, "losses_eigenvalues": 0, "tflop_predicted": "",
                    "cpu_seconds": "", "share_of_two_passes": ""})  # fmt: skip


if __name__ == "__main__":
    main()

"""Block-diagonal factors against whole ones, and against low-rank ones of as many bytes: cost, solve, forgetting.

    OMP_NUM_THREADS=1 python benchmarks/blocks.py

MLP layers of the last blocks of SmolLM2-135M on part of the demo's data. All collectors take the same pairs of the same
two passes, and the CPU time of each is what it adds to forward and backward. FLOPs and numbers are counted before. A
solve is that of the mean gradient of some capitals; its distance is that from whole EK-FAC. Forgetting is the NLL of
these capitals after one uphill step, scaled until KL on held-out retain questions is the budget.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from kfade_kernels.blocks import split
from low_rank import EIGH, Search, Shared, predicted, tensors_of, uphill
from one_pass import distance
from records import append
from torch import Tensor

import kfade
from kfade.capture import deterministic_mode, frozen, graph_from_embeddings, trace
from kfade.correction import CorrectionCollector
from kfade.data import make_batches
from kfade.decomposition import decompose_states
from kfade.demo import FIT_BATCH, load_data
from kfade.evaluate import scores
from kfade.factors import FactorCollector, collect_factors
from kfade.fisher import loss_count, run_fisher
from kfade.layer_curvature import new_states
from kfade.layers import Layer, select
from kfade.loss import Head, check_batches
from kfade.models import demo_model, load_model


@dataclass
class Case:
    """A fit: at most one of the two options is given."""

    name: str
    limit: int | None = None
    rank: int | None = None


def numbers_of(layers: list[Layer], limit: int | None) -> float:
    """Numbers kept: triangles and eigenvectors of blocks, eigenvalues, and Λ whole."""

    def side(n: int) -> float:
        return sum(1.5 * m**2 for m in split(n, limit)) + n

    sides = sum(side(x.d_out) + side(x.width_in) * x.leads for x in layers)
    return sides + sum(x.d_out * x.width_in for x in layers)


def flops_of(layers: list[Layer], limit: int | None, tokens: int) -> tuple[float, float, float]:
    """Of the factors, of `eigh` and of Λ, beyond forward and backward."""
    sides = [n for x in layers for n in [x.d_out] + [x.width_in] * x.leads]
    squares = float(sum(m**2 for n in sides for m in split(n, limit)))
    cubes = float(sum(m**3 for n in sides for m in split(n, limit)))
    products = sum(2.0 * tokens * x.d_out * x.width_in for x in layers)
    return tokens * squares, EIGH * cubes, 2 * tokens * squares + products


def rank_of_equal_size(layers: list[Layer], numbers: float) -> int:
    """The largest rank whose state holds no more numbers."""
    rank = 1
    while predicted(layers, rank + 1, 0, 0.0, True)[1] <= numbers:
        rank += 1
    return rank


def fit_all(
    model: Any, data: list[dict[str, Tensor]], modules: str, cases: list[Case]
) -> tuple[dict[str, kfade.Curvature], dict[str, dict[str, Any]]]:
    """EK-FAC of every case from the same two passes, with the CPU seconds of each beyond forward and backward."""
    base, device = kfade.FitConfig(modules=modules), torch.device("cpu")
    layers, checked = select(model, modules), check_batches(data, torch.device("cpu"))
    tokens = sum(batch.tokens for batch in checked)
    with deterministic_mode(model), frozen(model), graph_from_embeddings(model):
        head = Head(model, checked[0], {m for layer in layers for m in layer.modules})
        layers = trace(head, layers, checked[0])
        states = {c.name: new_states(layers, loss_count(checked, base), c.limit) for c in cases}
        factors = Shared({c.name: FactorCollector(states[c.name], torch.float32, device, c.rank) for c in cases})
        collect_factors(head, layers, checked, base, factors)  # type: ignore[arg-type]
        print(f"factors {factors.seconds}", flush=True)
        found: dict[str, dict[str, Any]] = {}
        for case in cases:
            begin = time.process_time()
            decompose_states(states[case.name], rank=case.rank)
            found[case.name] = {"decomposition": time.process_time() - begin, "factors": factors.seconds[case.name]}
            print(f"decomposed {case.name} in {found[case.name]['decomposition']:.1f} s", flush=True)
        corrections = Shared(
            {c.name: CorrectionCollector(states[c.name], layers, torch.float32, device) for c in cases}
        )
        run_fisher(head, layers, checked, base, corrections, lambda *_: None)
        print(f"eigenvalues {corrections.seconds}", flush=True)
    length = tokens / sum(len(batch.input_ids) for batch in checked)
    for case in cases:
        if case.rank is None:
            flops, numbers = sum(flops_of(layers, case.limit, tokens)), numbers_of(layers, case.limit)
        else:
            flops, numbers = predicted(layers, case.rank, tokens, length, True)
        found[case.name] |= {
            "eigenvalues": corrections.seconds[case.name], "state": tensors_of(states[case.name]),
            "flops": flops, "numbers": numbers, "tokens": tokens,
        }  # fmt: skip
    configs = {c.name: replace(base, rank=c.rank, max_factor_order=c.limit) for c in cases}
    return {n: kfade.Curvature(configs[n], "demo", states[n]) for n in states}, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6, help="so many of the model's last blocks")
    parser.add_argument("--limits", type=int, nargs="+", default=[768, 384, 192, 96], help="greatest orders")
    parser.add_argument(
        "--equal", type=int, nargs="*", default=[192, 96], help="of these, a rank of as many numbers too"
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 256], help="beside those of equal size")
    parser.add_argument("--retain", type=int, default=96, help="retain questions")
    parser.add_argument("--text", type=int, default=12, help="paragraphs")
    parser.add_argument("--capitals", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0.015)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(str(demo_model()))
    data, count = load_data(options.capitals), model.config.num_hidden_layers
    retain = make_batches(tokenizer, data.retain[: options.retain], batch_size=FIT_BATCH)
    retain += make_batches(tokenizer, data.text[: options.text], batch_size=FIT_BATCH)
    forget = make_batches(tokenizer, data.forget, batch_size=FIT_BATCH, loss_on="answer")
    modules = rf"layers\.({'|'.join(str(i) for i in range(count - options.blocks, count))})\.mlp\."
    layers = trace_groups(model, retain, modules)
    cases = [Case("whole")]
    cases += [Case(f"blocks of {limit}", limit) for limit in options.limits]
    for limit in options.equal:
        rank = rank_of_equal_size(layers, numbers_of(layers, limit))
        cases.append(Case(f"rank {rank}, as large as blocks of {limit}", None, rank))
    cases += [Case(f"rank {rank}", None, rank) for rank in options.ranks]
    gradient = uphill(model, layers, forget)
    search = Search(model, layers, make_batches(tokenizer, data.retain_held[::4], batch_size=FIT_BATCH))
    fits, costs = fit_all(model, retain, modules, cases)
    truth, scale = fits["whole"].solve(gradient), 1.0
    for kind in ("ekfac", "kfac"):
        for case in (case for case in cases if kind == "ekfac" or case.rank is None):
            curvature, cost = fits[case.name], costs[case.name]
            if kind == "kfac":
                states = {n: replace(state, lambda_sum=None) for n, state in curvature.items()}
                curvature = kfade.Curvature(replace(curvature.config, curvature="kfac"), "demo", states)
            begin = time.process_time()
            solved = curvature.solve(gradient)
            seconds = time.process_time() - begin
            away, cosine = distance(solved, truth)
            size = math.sqrt(sum(float(x.square().sum()) for x in solved.values()))  # type: ignore[union-attr]
            step = {n: x / size for n, x in solved.items()}  # type: ignore[operator]
            scale, kl = search.to(step, options.budget, scale)
            nll = scores(model, forget).nll
            search.move(step, 0.0)
            corrects = kind == "ekfac"
            row = {
                "fit": case.name, "curvature": kind, "max_factor_order": case.limit or "", "rank": case.rank or "",
                "layers": len(layers), "tokens": cost["tokens"],
                "flops_predicted": f"{cost['flops']:.4g}" if corrects else "",
                "cpu_seconds_factors": round(cost["factors"], 1),
                "cpu_seconds_decomposition": round(cost["decomposition"], 2),
                "cpu_seconds_eigenvalues": round(cost["eigenvalues"], 1) if corrects else "",
                "cpu_seconds_solve": round(seconds, 2),
                "numbers_predicted": f"{cost['numbers']:.4g}" if corrects else "",
                "state_bytes": tensors_of(curvature), "solve_distance": f"{away:.4f}", "solve_cosine": f"{cosine:.4f}",
                "budget": options.budget, "retain_kl": f"{kl:.5f}", "forget_nll": f"{nll:.3f}",
            }  # fmt: skip
            print(", ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
            if not options.no_record:
                append("blocks", [row])


def trace_groups(model: Any, data: list[dict[str, Tensor]], modules: str) -> list[Layer]:
    """The layers of a selection, with the groups that share an input."""
    checked, layers = check_batches(data[:1], torch.device("cpu")), select(model, modules)
    with deterministic_mode(model), frozen(model), graph_from_embeddings(model):
        return trace(Head(model, checked[0], {m for x in layers for m in x.modules}), layers, checked[0])


if __name__ == "__main__":
    main()

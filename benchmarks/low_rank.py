"""Low-rank factors against whole ones: error of the solve, fit time and memory, forgetting at equal retain KL.

    python benchmarks/low_rank.py --part spectra
    python benchmarks/low_rank.py --part demo --cache DIR

`spectra` draws two factors of known spectra and compares solves of K-FAC. `demo` fits SmolLM2-135M on part of the
demo's data: all collectors take the same pairs of the same passes, and the CPU time of each is what it adds to
forward and backward. Each row is written as soon as it is known, and a row that is there is not measured again;
`--cache` keeps the fits. FLOPs and numbers are counted beforehand, and stand beside what was measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kfade_kernels import low_rank
from records import RESULTS, append
from torch import Tensor, nn

import kfade
from kfade.batches import as_batches, split_holdout
from kfade.capture import deterministic_mode, frozen, graph_from_embeddings, trace
from kfade.correction import CorrectionCollector
from kfade.data import make_batches
from kfade.decomposition import decompose_states
from kfade.demo import FIT_BATCH, load_data
from kfade.evaluate import references, scores
from kfade.factors import OVERSAMPLING, FactorCollector, collect_factors
from kfade.fisher import loss_count, run_fisher
from kfade.layer_curvature import new_states
from kfade.layers import Layer, select
from kfade.loss import Batch, Head, check_batches
from kfade.models import demo_model, load_model

COLUMNS = (
    "part", "case", "curvature", "rank", "solve_error", "solve_error_exact_basis", "flops_predicted",
    "cpu_seconds_factors", "cpu_seconds_decomposition", "cpu_seconds_eigenvalues", "numbers_predicted", "state_bytes",
    "peak_bytes", "budget", "retain_kl", "forget_nll", "tokens",
)  # fmt: skip
KEY = ("part", "case", "curvature", "rank", "budget")
RANKS = (16, 64, 128, 256)
SPECTRA = ("steep", "flat", "clustered")
# FLOPs of a symmetric eigendecomposition with eigenvectors, over n³, and of a thin SVD of [n, l], over n·l².
EIGH, SVD = 9, 10


def record(done: set[tuple[str, ...]], row: Mapping[str, Any]) -> None:
    """Write and show one row."""
    full = {column: row.get(column, "") for column in COLUMNS}
    append("low_rank", [full])
    done.add(tuple(str(full[name]) for name in KEY))
    print(", ".join(f"{name} {value}" for name, value in full.items() if value != ""), flush=True)


def recorded() -> set[tuple[str, ...]]:
    """Keys of the rows that are there."""
    path = RESULTS / "low_rank.csv"
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[name] for name in KEY) for row in csv.DictReader(file)}


# ------------------------------------------------------------------------------------------- spectra


def spectrum(kind: str, n: int) -> Tensor:
    """Eigenvalues `[n]`, float64, falling from 1."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    if kind == "steep":
        return i**-2
    if kind == "flat":
        return 1 - 0.5 * i / n
    return torch.where(i <= 20, 1.0, torch.where(i <= 100, 1e-2, 1e-4)).double()


def factor(kind: str, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A factor of this spectrum, its eigenvalues and its eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    values = spectrum(kind, n)
    return (q * values) @ q.T, values, q


def spectra(done: set[tuple[str, ...]], d_out: int = 512, d_in: int = 768, share: float = 0.1) -> None:
    """Error of the damped solve of a gradient as the factors would draw it, against whole K-FAC; all in float64."""
    for kind in SPECTRA:
        sides = [factor(kind, n, seed) for seed, n in enumerate((d_out, d_in))]
        (s, s_values, s_vectors), (a, a_values, a_vectors) = sides
        white = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        v = (s_vectors * s_values.sqrt()) @ white @ (a_vectors * a_values.sqrt()).T
        damping = share * float(s_values.mean() * a_values.mean())
        rotated = s_vectors.T @ v @ a_vectors / (torch.outer(s_values, a_values) + damping)
        truth = s_vectors @ rotated @ a_vectors.T
        for rank in (16, 32, 64, 128, 256, 511, 767):
            if ("spectra", kind, "kfac", str(rank), "") in done:
                continue
            errors = []
            for exact in (False, True):
                pairs = []
                for m, values, vectors in ((s, s_values, s_vectors), (a, a_values, a_vectors)):
                    n = m.shape[0]
                    if rank >= n:
                        pairs.append((values, vectors))
                    elif exact:
                        pairs.append((torch.cat([values[:rank], values[rank:].mean()[None]]), vectors[:, :rank]))
                    else:
                        omega = low_rank.random_basis(n, min(n, rank + OVERSAMPLING), 0)
                        pairs.append(low_rank.nystrom(m @ omega, omega, float(m.trace()), rank))
                (out_values, q_out), (in_values, q_in) = pairs
                found = low_rank.apply(v, q_out, q_in, 1 / (torch.outer(out_values, in_values) + damping))
                errors.append(float(torch.linalg.norm(found - truth) / torch.linalg.norm(truth)))
            record(done, {
                "part": "spectra", "case": kind, "curvature": "kfac", "rank": rank,
                "solve_error": f"{errors[0]:.4g}", "solve_error_exact_basis": f"{errors[1]:.4g}",
            })  # fmt: skip


# ---------------------------------------------------------------------------------------------- demo


def predicted(layers: list[Layer], rank: int | None, tokens: int, length: float, corrects: bool) -> tuple[float, float]:
    """FLOPs beyond forward and backward, and numbers in the state, by the formulas of docs/low-rank.md."""
    flops = numbers = 0.0

    def side(n: int) -> tuple[float, float]:
        if rank is None or n <= rank:
            return tokens * n**2 + EIGH * n**3, n**2 / 2 + n**2 + n
        columns = min(n, rank + OVERSAMPLING)
        return 4.0 * tokens * n * columns + SVD * n * columns**2, n * rank + rank + 1

    for layer in layers:
        m, n = layer.d_out, layer.width_in
        for work, kept in [side(m)] + [side(n)] * layer.leads:
            flops, numbers = flops + work, numbers + kept
        if not corrects:
            continue
        k_out, k_in = (min(x, rank or x) for x in (m, n))
        numbers += (k_out + (k_out < m)) * (k_in + (k_in < n))
        flops += 2.0 * tokens * (m * k_out + n * k_in * layer.leads + k_out * k_in)
        if rank is not None:
            flops += 2.0 * tokens * length * (m + n * layer.leads + k_out + k_in)
    return flops, numbers


class Shared:
    """Several collectors, as one; counts the CPU seconds of each."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.parts, self.seconds = parts, dict.fromkeys(parts, 0.0)
        self.finite = next(iter(parts.values())).finite
        self.first_sample = True

    @contextmanager
    def _timed(self, name: str) -> Iterator[Any]:
        begin = time.process_time()
        yield self.parts[name]
        self.seconds[name] += time.process_time() - begin

    def __call__(self, layer: Layer, pairs: list[Any], batch: Batch) -> None:
        for name in self.parts:
            with self._timed(name) as part:
                part(layer, pairs, batch)

    def end_batch(self) -> None:
        for name in self.parts:
            with self._timed(name) as part:
                part.end_batch()

    def clear(self) -> None:
        for part in self.parts.values():
            part.clear()

    def finish(self) -> None:
        for part in self.parts.values():
            part.finish()


def tensors_of(curvature: Mapping[str, kfade.LayerCurvature]) -> int:
    """Bytes of the state, each tensor once."""
    found = {}
    for state in curvature.values():
        for name in ("a_sum", "s_sum", "q_in", "lambda_in", "q_out", "lambda_out", "lambda_sum"):
            value = getattr(state, name)
            if value is not None:
                tensor = getattr(value, "data", value)
                found[tensor.data_ptr()] = tensor.nbytes
        for sketch in (state.a_sketch, state.s_sketch):
            for tensor in (sketch.y, sketch.omega) if sketch is not None else ():
                found[tensor.data_ptr()] = tensor.nbytes
    return sum(found.values())


def fit_all(
    model: Any, data: list[dict[str, Any]], ranks: list[int | None]
) -> tuple[dict[str, kfade.Curvature], dict[str, dict[str, Any]]]:
    """EK-FAC of every rank from the same passes, with the CPU seconds of each beyond forward and backward."""
    base = kfade.FitConfig()
    layers, device = select(model, base.modules), torch.device("cpu")
    checked = check_batches(data, device)
    names = {str(rank): rank for rank in ranks}
    with deterministic_mode(model), frozen(model), graph_from_embeddings(model):
        head = Head(model, checked[0], {m for layer in layers for m in layer.modules})
        layers = trace(head, layers, checked[0])
        states = {name: new_states(layers, loss_count(checked, base)) for name in names}
        begin = time.process_time()
        factors = Shared({n: FactorCollector(states[n], torch.float32, device, rank) for n, rank in names.items()})
        collect_factors(head, layers, checked, base, factors)  # type: ignore[arg-type]
        print(f"factors {factors.seconds}, all {time.process_time() - begin:.0f} s", flush=True)
        found: dict[str, dict[str, Any]] = {}
        for name, rank in names.items():
            before = tensors_of(states[name])
            begin = time.process_time()
            decompose_states(states[name], rank=rank)
            seconds = time.process_time() - begin
            found[name] = {"decomposition": seconds, "factors": factors.seconds[name], "peak": before}
            print(f"decomposed {name} in {seconds:.1f} s", flush=True)
        begin = time.process_time()
        corrections = Shared({n: CorrectionCollector(states[n], layers, torch.float32, device) for n in names})
        run_fisher(head, layers, checked, base, corrections, lambda *_: None)
        print(f"eigenvalues {corrections.seconds}, all {time.process_time() - begin:.0f} s", flush=True)
    tokens = sum(batch.tokens for batch in checked)
    length = tokens / sum(len(batch.input_ids) for batch in checked)
    for name, rank in names.items():
        flops, numbers = predicted(layers, rank, tokens, length, True)
        found[name] |= {
            "eigenvalues": corrections.seconds[name], "state": tensors_of(states[name]), "tokens": tokens,
            "flops": flops, "numbers": numbers, "peak": max(found[name]["peak"], tensors_of(states[name])),
        }  # fmt: skip
    fits = {n: kfade.Curvature(replace(base, rank=rank), "demo", states[n]) for n, rank in names.items()}
    return fits, found


def uphill(model: Any, layers: list[Layer], batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The gradient of the forget set's mean NLL by layer name; `[d_out, d_in]`."""
    weights = [layer.weight for layer in layers]
    total = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        for whole, grad in zip(total, torch.autograd.grad(loss, weights), strict=True):
            whole.add_(grad)
    return {layer.name: grad for layer, grad in zip(layers, total, strict=True)}


class Search:
    """Moves a model along a direction until held-out retain KL is what is wanted."""

    def __init__(self, model: Any, layers: list[Layer], held: list[dict[str, Any]], tolerance: float = 0.02) -> None:
        self.model, self.layers, self.held, self.tolerance = model, layers, held, tolerance
        self.before = {layer.name: layer.weight.detach().clone() for layer in layers}
        self.original = references(model, held)

    def move(self, step: Mapping[str, Any], scale: float) -> None:
        """Set the weights to the original ones and `scale` times a step."""
        for layer in self.layers:
            layer.weight.data.copy_(self.before[layer.name]).add_(step[layer.name], alpha=scale)

    def to(self, step: Mapping[str, Any], budget: float, scale: float) -> tuple[float, float]:
        """Scale and KL; the model is left moved. KL grows about as the square of the scale, so √KL is walked along."""
        lower, upper = 0.0, math.inf
        for _ in range(10):
            self.move(step, scale)
            kl = scores(self.model, self.held, self.original).kl or 0.0
            if abs(kl / budget - 1) < self.tolerance:
                break
            lower, upper = (scale, upper) if kl < budget else (lower, scale)
            wanted = scale * min(4.0, max(0.25, math.sqrt(budget / max(kl, 1e-9))))
            scale = wanted if lower < wanted < upper else (lower + upper) / 2
        return scale, kl


def demo(done: set[tuple[str, ...]], cache: Path, ranks: list[int], capitals: int, budgets: list[float]) -> None:
    """Fit once for every rank, then forget some capitals until held-out retain KL is the budget."""
    model, tokenizer = load_model(str(demo_model()))
    data = load_data(capitals)
    retain = make_batches(tokenizer, data.retain[:96], batch_size=FIT_BATCH)
    retain += make_batches(tokenizer, data.text[:12], batch_size=FIT_BATCH)
    fitted, _ = split_holdout(check_batches(retain, torch.device("cpu")), kfade.UnlearnConfig().holdout)
    every: list[int | None] = [None, *ranks]
    costs_path = cache / "costs.json"
    if not costs_path.exists():
        fits, costs = fit_all(model, as_batches(fitted), every)
        for name, curvature in fits.items():
            curvature.save(cache / name)
        costs_path.write_text(json.dumps(costs))
        del fits
    costs = json.loads(costs_path.read_text())
    forget = make_batches(tokenizer, data.forget, batch_size=FIT_BATCH, loss_on="answer")
    layers = select(model, "mlp")
    gradient = uphill(model, layers, forget)
    search = Search(model, layers, make_batches(tokenizer, data.retain_held[::4], batch_size=FIT_BATCH))
    case, scale = f"SmolLM2-135M, {capitals} capitals", 1e-3
    for kind in ("ekfac", "kfac"):
        for rank in every:
            name = str(rank)
            if all(("demo", case, kind, "" if rank is None else name, str(b)) in done for b in budgets):
                continue
            curvature = kfade.Curvature.load(cache / name)
            if kind == "kfac":
                states = {n: replace(state, lambda_sum=None) for n, state in curvature.items()}
                curvature = kfade.Curvature(replace(curvature.config, curvature="kfac"), "demo", states)
            step = curvature.solve(gradient)
            # One uphill length for all, whatever the unit of a curvature.
            length = math.sqrt(sum(float(x.square().sum()) for x in step.values()))
            step = {n: x / length for n, x in step.items()}
            for budget in budgets:
                if ("demo", case, kind, "" if rank is None else name, str(budget)) in done:
                    continue
                scale, kl = search.to(step, budget, scale if scale > 1e-3 else 1.0)
                nll = scores(model, forget).nll
                search.move(step, 0.0)
                cost, corrects = costs[name], kind == "ekfac"
                record(done, {
                    "part": "demo", "case": case, "curvature": kind, "rank": "" if rank is None else rank,
                    "flops_predicted": f"{cost['flops']:.4g}" if corrects else "",
                    "cpu_seconds_factors": round(cost["factors"], 1),
                    "cpu_seconds_decomposition": round(cost["decomposition"], 1),
                    "cpu_seconds_eigenvalues": round(cost["eigenvalues"], 1) if corrects else "",
                    "numbers_predicted": f"{cost['numbers']:.4g}" if corrects else "",
                    "state_bytes": tensors_of(curvature), "peak_bytes": cost["peak"], "budget": budget,
                    "retain_kl": round(kl, 5), "forget_nll": round(nll, 3), "tokens": cost["tokens"],
                })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("spectra", "demo"), required=True)
    parser.add_argument("--cache", type=Path, default=Path("low_rank_cache"), help="directory for the fits of `demo`")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--capitals", type=int, default=16)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.015])
    options = parser.parse_args()
    done = recorded()
    if options.part == "spectra":
        spectra(done)
    else:
        options.cache.mkdir(parents=True, exist_ok=True)
        demo(done, options.cache, options.ranks, options.capitals, options.budgets)


if __name__ == "__main__":
    main()

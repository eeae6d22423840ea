"""Influence scores beside kronfluence, and K-FAC factors for curvlinops beside its own, in one run.

    python benchmarks/influence.py                          # 128 and 512 tokens, float32
    python benchmarks/influence.py --tokens 128 --queries 4 --repeats 1 --no-record

The model is that of `fit.py`. Scores: both sides are given the factors of one kfade fit, and all is timed
from the query gradients to the scores `[Q, N]`. kronfluence keeps a batch of queries at a time, for which the training
set goes by once; `--query-batch` says how many, and ours are given the memory of as many. With `--rank` both also score
queries of that rank, kronfluence's by its default (`svd_lowrank` without directions to spare). Printed is how much
faster that is than whole queries, beside what a count of FLOPs predicts of ours, and the mean correlation with the
scores of whole queries; a query begins like one of the training sequences, so that there is something to find.
Factors: curvlinops collects its own for its K-FAC operator, or `collect_factors_` does. Providers take turns; the
median is printed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from fit import Clock, Stages, build_data, build_model, kronfluence_task, relative_error
from records import append
from torch import Tensor
from transformers import LlamaForCausalLM

import kfade
from kfade.influence import ITERATIONS
from kfade.integrations.curvlinops import collect_factors_

PACKAGES = ("torch", "transformers", "kronfluence", "curvlinops-for-pytorch")
Batch = dict[str, Tensor]


class Rows(torch.utils.data.Dataset[Batch]):
    """The sequences of some batches."""

    def __init__(self, data: list[Batch]) -> None:
        self._rows = [{k: v[n] for k, v in one.items()} for one in data for n in range(len(one["input_ids"]))]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, n: int) -> Batch:
        return self._rows[n]


def stage_of(rank: int | None) -> str:
    return "scores" if rank is None else f"scores, rank {rank}"


def correlation(scores: Tensor, whole: Tensor) -> float:
    """Pearson's, mean over the queries."""
    x, y = (v - v.mean(1, keepdim=True) for v in (scores, whole))
    return float(((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).mean())


def predicted_flops(
    model: LlamaForCausalLM, curvature: kfade.Curvature, tokens: int, queries: int, sequences: int, rank: int | None
) -> float:
    """Of `kfade.influence` by the counts in its docstrings, for one group of queries; attention's own left out."""
    # Forward, and backward to the inputs of each layer alone. The tied head counts once, as the one product it is.
    total = 4.0 * sum(p.numel() for p in model.parameters() if p.ndim == 2) * tokens * (queries + sequences)
    for state in curvature.values():
        out, inner = state.d_out, state.width_in
        area, squares = out * inner, out**2 + inner**2
        total += queries * min(2 * tokens * (squares + area), 2 * area * (tokens + out + inner))
        formed = sequences * (tokens + queries) * area
        if rank is None:
            total += queries * 2 * area * (out + inner) + 2 * min(sequences * tokens * queries * area, formed)
        else:
            columns = rank + max(16, rank)
            total += queries * (4 * (ITERATIONS + 1) * area * columns + 2 * rank * squares)
            met = sequences * tokens * queries * rank * (out + inner)
            total += 2 * min(met, formed + queries * rank * area)
    return total


def kfade_scores(
    clock: Clock,
    model: LlamaForCausalLM,
    curvature: kfade.Curvature,
    queries: list[Batch],
    data: list[Batch],
    kept: int,
    rank: int | None,
) -> Tensor:
    each = 4 * sum(state.d_out * state.width_in for state in curvature.values())
    config = kfade.InfluenceConfig(solved_bytes=kept * each, query_rank=rank)
    found = clock(stage_of(rank), lambda: kfade.influence(model, curvature, queries, data, config))
    losses = next(iter(curvature.values())).losses
    scores: Tensor = found.scores * (sum(len(b["input_ids"]) for b in data) / losses)
    return scores


def kronfluence_scores(
    clock: Clock,
    model: LlamaForCausalLM,
    curvature: kfade.Curvature,
    queries: list[Batch],
    data: list[Batch],
    query_batch: int,
    batch: int,
    rank: int | None,
) -> Tensor:
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.score.pairwise import compute_pairwise_scores_with_loaders
    from kronfluence.utils.state import State

    sequences = sum(len(b["input_ids"]) for b in data)
    factors = {
        "lambda_matrix": {n: s.lambda_sum for n, s in curvature.items()},
        "num_lambda_processed": {n: torch.tensor([sequences]) for n in curvature},
        "activation_eigenvectors": {n: s.q_in for n, s in curvature.items()},
        "gradient_eigenvectors": {n: s.q_out for n, s in curvature.items()},
        "activation_eigenvalues": {n: s.lambda_in for n, s in curvature.items()},
        "gradient_eigenvalues": {n: s.lambda_out for n, s in curvature.items()},
    }
    task = kronfluence_task(list(curvature))
    wrapped = prepare_model(copy.deepcopy(model), task)
    query_loader, loader = (
        torch.utils.data.DataLoader(Rows(d), batch_size=n) for d, n in ((queries, query_batch), (data, batch))
    )

    def work() -> Any:
        return compute_pairwise_scores_with_loaders(
            loaded_factors=factors, model=wrapped, state=State(cpu=True), task=task, query_loader=query_loader,
            per_device_query_batch_size=query_batch, train_loader=loader, tracked_module_names=None, disable_tqdm=True,
            score_args=ScoreArguments(damping_factor=None, query_gradient_low_rank=rank),
            factor_args=FactorArguments(strategy="ekfac"),
        )  # fmt: skip

    scores: Tensor = clock(stage_of(rank), work)["all_modules"]
    return scores


class Logits(torch.nn.Module):
    """Logits as `CrossEntropyLoss` wants them: classes before tokens."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).logits.transpose(1, 2)


def curvlinops_factors(clock: Clock, model: LlamaForCausalLM, data: list[Batch], ours: bool) -> Tensor:
    """Time until the operator has factors; returns its product with a fixed vector."""
    from curvlinops import KFACLinearOperator

    names = [n for n, m in model.named_modules() if ".mlp." in n and isinstance(m, torch.nn.Linear)]
    last = [(b["input_ids"], torch.nn.functional.pad(b["labels"][:, 1:], (0, 1), value=-100)) for b in data]
    operator = KFACLinearOperator(
        Logits(model), torch.nn.CrossEntropyLoss(reduction="sum", ignore_index=-100),
        [model.get_submodule(n).weight for n in names], last, check_deterministic=False, fisher_type="empirical",
        num_data=sum(len(y) for _, y in last), num_per_example_loss_terms=last[0][1].shape[1],
    )  # fmt: skip

    def work() -> None:
        if ours:
            collect_factors_(operator, model, data)
        else:
            operator.compute_kronecker_factors()

    clock("curvlinops factors", work)
    generator = torch.Generator().manual_seed(0)
    product: Tensor = operator @ torch.randn(operator.shape[0], generator=generator)
    return product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--query-batch", type=int, default=8, help="solved queries that either side keeps at once")
    parser.add_argument("--rank", type=int, default=8, help="of low-rank queries; 0 leaves them out")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    model = build_model(options.layers, options.vocabulary)
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        data = build_data(options.sequences, tokens, options.batch, options.vocabulary)
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(0, options.vocabulary, (options.queries, tokens), generator=generator)
        known = torch.cat([b["input_ids"] for b in data])[: options.queries, : tokens // 2]
        ids[: len(known), : tokens // 2] = known
        queries = [
            {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids.split(options.query_batch)
        ]
        curvature = kfade.fit(model, data, kfade.FitConfig(fisher="empirical"))
        runs: dict[str, list[Stages]] = {"kfade": [], "peer": []}
        errors = {}
        agreements: dict[tuple[str, str], float] = {}
        predicted: dict[str, float] = {}
        ranks = [None, options.rank] if options.rank else [None]
        for rank in ranks:
            predicted[stage_of(rank)] = predicted_flops(
                model, curvature, tokens, options.queries, options.sequences, rank
            )
        for _ in range(options.repeats):
            ours, theirs = Clock(), Clock()
            whole: list[Tensor] = []
            for rank in ranks:
                mine = kfade_scores(ours, model, curvature, queries, data, options.query_batch, rank)
                their = kronfluence_scores(
                    theirs, model, curvature, queries, data, options.query_batch, options.batch, rank
                )
                errors[stage_of(rank)] = relative_error(mine, their)
                whole = whole or [mine, their]
                for provider, found, full in zip(runs, (mine, their), whole, strict=True):
                    agreements[provider, stage_of(rank)] = correlation(found, full)
            products = [curvlinops_factors(c, model, data, c is ours) for c in (ours, theirs)]
            errors["curvlinops factors"] = relative_error(*products)
            runs["kfade"].append(ours.stages)
            runs["peer"].append(theirs.stages)
        print(f"\n{options.sequences} sequences of {tokens} tokens, {options.queries} queries, {options.layers} layers")
        print(
            f"{'stage':20}{'kfade s':>10}{'peer s':>10}{'speed-up':>10}{'MiB':>8}{'MiB theirs':>12}{'difference':>12}"
        )
        for stage, error in errors.items():
            medians = {
                p: tuple(statistics.median(r[stage][i] for r in repeats) for i in range(2))
                for p, repeats in runs.items()
            }
            (mine_s, mine_m), (their_s, their_m) = medians["kfade"], medians["peer"]
            seconds = f"{mine_s:10.2f}{their_s:10.2f}{their_s / mine_s:10.2f}"
            print(f"{stage:20}{seconds}{mine_m:8.0f}{their_m:12.0f}{error:12.1e}")
            for provider, repeats in runs.items():
                times = [r[stage][0] for r in repeats]
                gain, expected, agreement = "", "", agreements.get((provider, stage), "")
                if stage.startswith("scores, rank"):
                    whole_s = statistics.median(r["scores"][0] for r in repeats)
                    gain = round(whole_s / medians[provider][0], 2)
                    expected = round(predicted["scores"] / predicted[stage], 2) if provider == "kfade" else ""
                    said = f", {expected} predicted" if expected else ""
                    print(f"  {provider}: {gain:.2f} times as fast as whole{said}; correlation {agreement:.4f}")
                rows.append({
                    "layers": options.layers, "vocabulary": options.vocabulary, "sequences": options.sequences,
                    "tokens": tokens, "queries": options.queries, "query_batch": options.query_batch, "stage": stage,
                    "provider": provider, "seconds": round(medians[provider][0], 3), "fastest": round(min(times), 3),
                    "slowest": round(max(times), 3), "extra_mib": round(medians[provider][1]), "difference": error,
                    "speed_up_by_rank": gain, "predicted": expected, "correlation": agreement,
                })  # fmt: skip
    if not options.no_record:
        print(f"\nrecorded in {append('influence', rows, packages=PACKAGES).relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()

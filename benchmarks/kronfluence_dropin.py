"""One kronfluence script with and without `kfade.integrations.kronfluence.accelerate()`, stage by stage, in one run.

    python benchmarks/kronfluence_dropin.py
    python benchmarks/kronfluence_dropin.py --layers 1 --sequences 8 --tokens 64 --repeats 1 --no-record

The model has SmolLM2-135M's layer shape (width 576, MLP 1,536, MLP layers tracked) with fewer layers and a
smaller vocabulary, randomly initialised; sequences are random tokens, the last quarter of every second one is
padding. Labels are sampled with the same seed on both sides. Everything goes through kronfluence's `Analyzer`,
files included. *Model alone* is the same two passes over the data without anything tracked: what no drop-in can
save, as the script stays the script. The two take turns within each repeat; what is printed is the median.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fit import Clock, Stages, build_model
from records import append
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM

from kfade.integrations.kronfluence import accelerate

FIT = ("covariances", "eigenvectors", "lambda")


class Texts(Dataset[Any]):
    """Random tokens, padded."""

    def __init__(self, sequences: int, tokens: int, vocabulary: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.ids = torch.randint(0, vocabulary, (sequences, tokens))
        self.mask = torch.ones_like(self.ids)
        self.mask[1::2, tokens - tokens // 4 :] = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index]}


def language_modelling(modules: list[str]) -> Any:
    from kronfluence.task import Task

    class LanguageModelling(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(**batch).logits[:, :-1].float()
            labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100).reshape(-1)
            logits = logits.reshape(-1, logits.shape[-1])
            if sample:
                drawn = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
                labels = torch.where(labels == -100, labels, drawn)
            return nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return modules

        def get_attention_mask(self, batch: Any) -> Tensor:
            return batch["attention_mask"]

    return LanguageModelling()


def factor_arguments(dtype: str, eigendecomposition: str) -> Any:
    from kronfluence.utils.common.factor_arguments import default_factor_arguments, smart_low_precision_factor_arguments

    arguments = default_factor_arguments() if dtype == "float32" else smart_low_precision_factor_arguments()
    arguments.eigendecomposition_dtype = getattr(torch, eigendecomposition)
    return arguments


def run(
    model: LlamaForCausalLM,
    data: Texts,
    queries: Texts,
    options: argparse.Namespace,
    dtype: str,
    eigendecomposition: str,
) -> tuple[Stages, dict[str, Tensor]]:
    """The script: seconds and extra MiB of each stage, and the scores for each damping."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments

    task = language_modelling([n for n, _ in model.named_modules() if ".mlp." in n and n.endswith("_proj")])
    prepared = prepare_model(copy.deepcopy(model), task)
    arguments = factor_arguments(dtype, eigendecomposition)
    clock, scores = Clock(), {}
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("run", prepared, task, cpu=True, disable_tqdm=True, output_dir=folder)
        fit = {"factors_name": "f", "factor_args": arguments}
        loaded = {"dataset": data, "per_device_batch_size": options.batch}
        torch.manual_seed(2)
        clock("covariances", lambda: analyzer.fit_covariance_matrices(**fit, **loaded))
        clock("eigenvectors", lambda: analyzer.perform_eigendecomposition(**fit))
        clock("lambda", lambda: analyzer.fit_lambda_matrices(**fit, **loaded))
        for number, damping in enumerate(options.dampings):
            name = f"scores, damping {damping}"
            clock(
                name,
                lambda damping=damping, number=number: analyzer.compute_pairwise_scores(  # type: ignore[misc]
                    scores_name=f"s{number}", factors_name="f", query_dataset=queries, train_dataset=data,
                    per_device_query_batch_size=options.batch, per_device_train_batch_size=options.batch,
                    score_args=ScoreArguments(damping_factor=None if damping == "heuristic" else float(damping)),
                ),
            )  # fmt: skip
            scores[name] = analyzer.load_pairwise_scores(f"s{number}")["all_modules"]
    parts = [clock.stages[name] for name in FIT]
    whole = sum(seconds for seconds, _ in parts), max(memory for _, memory in parts)
    return {**clock.stages, "whole fit": whole}, scores


def run_model_alone(model: LlamaForCausalLM, data: Texts, options: argparse.Namespace, dtype: str) -> Stages:
    """Two passes like those of a fit: frozen weights, sampled labels, gradients down to the embeddings."""
    task, clock = language_modelling([]), Clock()
    alone = copy.deepcopy(model).requires_grad_(False)
    alone.get_input_embeddings().register_forward_hook(lambda _m, _a, output: output.requires_grad_())

    def work() -> None:
        torch.manual_seed(2)
        for _ in range(2):
            for start in range(0, len(data), options.batch):
                part = slice(start, start + options.batch)
                batch = {"input_ids": data.ids[part], "attention_mask": data.mask[part]}
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != "float32"):
                    loss = task.compute_train_loss(batch, alone, sample=True)
                loss.backward()

    clock("whole fit", work)
    return clock.stages


@contextlib.contextmanager
def provider(name: str) -> Iterator[None]:
    with accelerate() if name == "kfade" else contextlib.nullcontext():
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], help="float32, or bf16 preset (smart_low_precision)"
    )
    parser.add_argument(
        "--eigendecompositions", nargs="+", default=["float64"], help="float64 (kronfluence's default), float32"
    )
    parser.add_argument("--dampings", nargs="+", default=["heuristic", "1e-8"], help="a number, or heuristic")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    model = build_model(options.layers, options.vocabulary)
    rows: list[dict[str, Any]] = []
    cases = [(d, t, e) for d in options.dtypes for t in options.tokens for e in options.eigendecompositions]
    for dtype, tokens, eigendecomposition in cases:
        data = Texts(options.sequences, tokens, options.vocabulary, seed=1)
        queries = Texts(options.queries, tokens, options.vocabulary, seed=3)
        runs: dict[str, list[Stages]] = {"model alone": [], "kronfluence": [], "kfade": []}
        scores: dict[str, dict[str, Tensor]] = {}
        for _ in range(options.repeats):
            runs["model alone"].append(run_model_alone(model, data, options, dtype))
            for name in ("kronfluence", "kfade"):
                with provider(name):
                    stages, scores[name] = run(model, data, queries, options, dtype, eigendecomposition)
                runs[name].append(stages)
        medians = {
            (name, stage): tuple(statistics.median(r[stage][i] for r in repeats) for i in (0, 1))
            for name, repeats in runs.items()
            for stage in repeats[0]
        }
        alone = medians["model alone", "whole fit"][0]
        print(
            f"\n{dtype}, {options.sequences} sequences of {tokens} tokens, {options.layers} layers,"
            f" eigendecomposition in {eigendecomposition}; the model alone {alone:.2f} s"
        )
        print(f"{'stage':26}{'kronfluence s':>14}{'with kfade s':>14}{'speed-up':>10}{'MiB':>8}{'MiB with':>10}")
        agreement: dict[str, tuple[float, float]] = {}
        for stage in runs["kfade"][0]:
            (theirs, their_memory), (ours, memory) = medians["kronfluence", stage], medians["kfade", stage]
            line = f"{stage:26}{theirs:14.2f}{ours:14.2f}{theirs / ours:10.2f}{their_memory:8.0f}{memory:10.0f}"
            if stage in scores["kfade"]:
                value, truth = (scores[x][stage].double() for x in ("kfade", "kronfluence"))
                difference = float((value - truth).norm() / truth.norm())
                agreement[stage] = spearmanr(value.flatten(), truth.flatten()).statistic, difference
                line += f"   rank correlation {agreement[stage][0]:.6f}, relative difference {difference:.1e}"
            print(line)
        for (name, stage), (seconds, memory) in medians.items():
            times = [r[stage][0] for r in runs[name]]
            correlation, difference = agreement.get(stage, ("", "")) if name == "kfade" else ("", "")
            rows.append({
                "layers": options.layers, "vocabulary": options.vocabulary, "sequences": options.sequences,
                "tokens": tokens, "dtype": dtype, "eigendecomposition": eigendecomposition, "provider": name,
                "stage": stage, "seconds": round(seconds, 3), "fastest": round(min(times), 3),
                "slowest": round(max(times), 3), "extra_mib": round(memory), "rank_correlation": correlation,
                "score_difference": difference,
            })  # fmt: skip
    if not options.no_record:
        path = append("kronfluence", rows, packages=("torch", "transformers", "kronfluence"))
        print(f"\nrecorded in {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()

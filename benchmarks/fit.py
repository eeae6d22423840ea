"""A whole EK-FAC fit beside kronfluence: same model, data and labels, stage by stage, in one run.

    python benchmarks/fit.py                      # float32 and bf16 autocast, 128 and 512 tokens
    python benchmarks/fit.py --tokens 128 --dtypes float32 --repeats 1

The model has SmolLM2-135M's layer shape (width 576, MLP 1,536) with fewer layers and a smaller
vocabulary, randomly initialised. Labels are fixed, so both libraries differentiate the same loss.
The floor is a plain forward and backward pass over the same batches, weight gradients included.
Providers take turns within each repeat; what is printed is the median of the repeats.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from records import append
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kfade
from kfade.progress import peak_bytes, reset_peak

Stages = dict[str, tuple[float, float]]


def build_model(layers: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def build_data(sequences: int, tokens: int, batch: int, vocabulary: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    ids = torch.randint(0, vocabulary, (sequences, tokens))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(batch)]


class Clock:
    """Times stages, with the memory that each adds, in MiB, to what was resident before it, or to `before` bytes."""

    def __init__(self, before: int | None = None) -> None:
        self.stages: Stages = {}
        self._before = before

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        reset_peak()
        before = peak_bytes() if self._before is None else self._before
        begin = time.perf_counter()
        result = work()
        self.stages[name] = (time.perf_counter() - begin, (peak_bytes() - before) / 2**20)
        return result


def run_floor(model: LlamaForCausalLM, data: list[dict[str, Tensor]], autocast: str) -> Stages:
    clock = Clock()

    def work() -> None:
        for batch in data:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast != "off"):
                model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)

    clock("forward + backward", work)
    return clock.stages


def run_kfade(model: LlamaForCausalLM, data: list[dict[str, Tensor]], autocast: str) -> tuple[Stages, kfade.Curvature]:
    progress = kfade.Progress()
    config = kfade.FitConfig(fisher="empirical", autocast=autocast)
    reset_peak()
    before = peak_bytes()
    begin = time.perf_counter()
    curvature = kfade.fit(model, data, config, progress=progress)
    total = time.perf_counter() - begin
    names = ("A, S", "eigh", "eigenvalues")
    stages = {n: (c.seconds, (c.peak_bytes - before) / 2**20) for n, c in zip(names, progress.costs, strict=True)}
    return {**stages, "whole fit": (total, max(memory for _, memory in stages.values()))}, curvature


def kronfluence_task(names: list[str]) -> Any:
    from kronfluence.task import Task

    class GivenLabels(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return torch.nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]).float(),
                batch["labels"][:, 1:].reshape(-1),
                reduction="sum",
            )

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Any) -> Tensor:
            return batch["attention_mask"]

    return GivenLabels()


def run_kronfluence(
    model: LlamaForCausalLM,
    data: list[dict[str, Tensor]],
    autocast: str,
    names: list[str],
    *,
    with_default: bool = True,
    clock: Clock | None = None,
) -> tuple[Stages, dict[str, dict[str, Tensor]]]:
    """Seconds and memory of each stage, and the factors; `with_default` decomposes in float64 too, its default.

    The model is wrapped in place: give it a copy.
    """
    from kronfluence.analyzer import prepare_model
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition
    from kronfluence.utils.common.factor_arguments import default_factor_arguments, smart_low_precision_factor_arguments
    from kronfluence.utils.state import State

    arguments = default_factor_arguments() if autocast == "off" else smart_low_precision_factor_arguments()
    arguments.use_empirical_fisher = True
    # Its default is float64, which is timed apart; float32 is what we use.
    arguments.eigendecomposition_dtype = torch.float32
    task, state = kronfluence_task(names), State(cpu=model.device.type == "cpu")
    wrapped = prepare_model(model, task)
    common = {"model": wrapped, "state": state, "factor_args": arguments, "disable_tqdm": True}
    clock = clock or Clock()
    begin = time.perf_counter()
    _, covariances = clock("A, S", lambda: fit_covariance_matrices_with_loader(task=task, loader=data, **common))
    eigen = clock("eigh", lambda: perform_eigendecomposition(covariances, wrapped, state, arguments, True))
    _, lambdas = clock(
        "eigenvalues", lambda: fit_lambda_matrices_with_loader(eigen_factors=eigen, task=task, loader=data, **common)
    )
    total = time.perf_counter() - begin
    stages = {**clock.stages, "whole fit": (total, max(memory for _, memory in clock.stages.values()))}
    if not with_default:
        return stages, {**covariances, **eigen, **lambdas}
    arguments.eigendecomposition_dtype = torch.float64
    clock("eigh, default", lambda: perform_eigendecomposition(covariances, wrapped, state, arguments, True))
    default, memory = clock.stages["eigh, default"]
    stages["eigh, default"] = (default, memory)
    stages["whole fit, default"] = (total - clock.stages["eigh"][0] + default, stages["whole fit"][1])
    return stages, {**covariances, **eigen, **lambdas}


def direction_error(value: Tensor, truth: Tensor) -> float:
    """Relative error after the best common scale."""
    value = value.double()
    return relative_error(value * (value * truth).sum() / value.square().sum(), truth)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def accuracy(model: LlamaForCausalLM, data: list[dict[str, Tensor]], autocast: str) -> dict[str, dict[str, float]]:
    """Mean relative error (Frobenius) of A, S and Λ against float64; Λ in each library's own basis."""
    from kfade.capture import deterministic_mode, frozen, trace
    from kfade.correction import CorrectionCollector
    from kfade.fisher import run_fisher
    from kfade.layers import select
    from kfade.loss import Head, check_batches

    exact_model = copy.deepcopy(model).double()
    config = kfade.FitConfig(fisher="empirical")
    exact = kfade.fit(exact_model, data, kfade.FitConfig(fisher="empirical", curvature="kfac"))
    _, ours = run_kfade(model, data, autocast)
    _, theirs = run_kronfluence(copy.deepcopy(model), data, autocast, list(ours))

    def exact_lambda(bases: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        layers = select(exact_model, config.modules)
        batches = check_batches(data, torch.device("cpu"))
        with deterministic_mode(exact_model), frozen(exact_model):
            head = Head(exact_model, batches[0])
            layers = trace(head, layers, batches[0])
            states = {name: copy.copy(exact[name]) for name in exact}
            for name, (q_in, q_out) in bases.items():
                states[name].q_in, states[name].q_out = q_in.double(), q_out.double()
            collector = CorrectionCollector(states, layers, torch.float64, torch.device("cpu"))
            run_fisher(head, layers, batches, config, collector, lambda *_: collector.end_batch())
        return {name: state.lambda_sum for name, state in states.items()}

    sequences = sum(len(batch["input_ids"]) for batch in data)
    truth = exact_lambda({n: (s.q_in, s.q_out) for n, s in ours.items()})
    their_truth = exact_lambda(
        {n: (theirs["activation_eigenvectors"][n], theirs["gradient_eigenvectors"][n]) for n in ours}
    )
    errors: dict[str, dict[str, list[float]]] = {
        p: {"A": [], "S": [], "eigenvalues": []} for p in ("kfade", "kronfluence")
    }
    for name, state in ours.items():
        a, s = (f.to_dense() for f in (exact[name].a_sum, exact[name].s_sum))
        errors["kfade"]["A"].append(direction_error(state.a_sum.to_dense(), a))
        errors["kfade"]["S"].append(direction_error(state.s_sum.to_dense(), s))
        errors["kfade"]["eigenvalues"].append(relative_error(state.lambda_sum, truth[name]))
        # Only the shapes are compared: each library keeps its factors as sums or means, in units of its own.
        errors["kronfluence"]["A"].append(direction_error(theirs["activation_covariance"][name], a))
        errors["kronfluence"]["S"].append(direction_error(theirs["gradient_covariance"][name], s))
        # kronfluence sums Λ and keeps the number of sequences beside it.
        scale = 1.0 if float(theirs["num_lambda_processed"][name].reshape(-1)[0]) == sequences else float("nan")
        errors["kronfluence"]["eigenvalues"].append(
            relative_error(theirs["lambda_matrix"][name] * scale, their_truth[name])
        )
    return {p: {k: statistics.mean(v) for k, v in e.items()} for p, e in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bf16 autocast"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--accuracy-sequences", type=int, default=8, help="0 leaves the comparison with float64 out")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    model = build_model(options.layers, options.vocabulary)
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        autocast = "off" if dtype == "float32" else "bfloat16"
        for tokens in options.tokens:
            data = build_data(options.sequences, tokens, options.batch, options.vocabulary)
            runs: dict[str, list[Stages]] = {"floor": [], "kfade": [], "kronfluence": []}
            run_floor(model, data[:1], autocast)
            for _ in range(options.repeats):
                runs["floor"].append(run_floor(model, data, autocast))
                stages, curvature = run_kfade(model, data, autocast)
                runs["kfade"].append(stages)
                names = list(curvature)
                del curvature
                runs["kronfluence"].append(run_kronfluence(copy.deepcopy(model), data, autocast, names)[0])
            few = data[0]["input_ids"][: options.accuracy_sequences].shape[0]
            errors = (
                accuracy(model, [{k: v[:few] for k, v in data[0].items()}], autocast)
                if options.accuracy_sequences
                else {}
            )
            medians = {
                (provider, stage): (
                    statistics.median(r[stage][0] for r in repeats), statistics.median(r[stage][1] for r in repeats)
                )
                for provider, repeats in runs.items()
                for stage in repeats[0]
            }  # fmt: skip
            floor = medians["floor", "forward + backward"][0]
            print(
                f"\n{dtype}, {options.sequences} sequences of {tokens} tokens, {options.layers} layers;"
                f" floor {floor:.2f} s"
            )
            print(
                f"{'stage':14}{'kfade s':>10}{'/ floor':>9}{'kronfl. s':>11}{'speed-up':>10}"
                f"{'MiB':>8}{'MiB theirs':>12}"
            )
            for stage in ("A, S", "eigh", "eigenvalues", "whole fit"):
                (ours, memory), (theirs, their_memory) = medians["kfade", stage], medians["kronfluence", stage]
                print(
                    f"{stage:14}{ours:10.2f}{ours / floor:9.2f}{theirs:11.2f}{theirs / ours:10.2f}"
                    f"{memory:8.0f}{their_memory:12.0f}"
                )
            default = medians["kronfluence", "whole fit, default"][0]
            whole = medians["kfade", "whole fit"][0]
            print(f"whole fit with their default, eigh in float64: {default:.2f} s, speed-up {default / whole:.2f}")
            for provider, error in errors.items():
                print(f"  error against float64, {provider}: " + ", ".join(f"{k} {v:.2e}" for k, v in error.items()))
            for (provider, stage), (seconds, memory) in medians.items():
                times = [r[stage][0] for r in runs[provider]]
                key = {"A, S": ("A", "S"), "eigenvalues": ("eigenvalues",)}.get(stage, ())
                error = max((errors[provider][k] for k in key), default="") if provider in errors else ""
                rows.append({
                    "layers": options.layers, "vocabulary": options.vocabulary, "sequences": options.sequences,
                    "tokens": tokens, "dtype": dtype, "provider": provider, "stage": stage,
                    "seconds": round(seconds, 3), "fastest": round(min(times), 3), "slowest": round(max(times), 3),
                    "over_floor": round(seconds / floor, 3), "extra_mib": round(memory), "error_float64": error,
                })  # fmt: skip
    if not options.no_record:
        print(f"\nrecorded in {append('fit', rows).relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()

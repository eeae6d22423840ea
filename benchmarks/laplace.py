"""Calibration of a small language model that was trained to over-confidence: Laplace beside temperature scaling.

    python benchmarks/laplace.py                 # a few minutes on two CPU cores; writes docs/laplace.svg
    python benchmarks/laplace.py --no-record     # print only

A Llama of 0.3 M parameters learns a little English by heart: topics of Python's own help (`pydoc_data.topics`, which
every Python has), byte by byte. Then its curvature is fitted on the training text, the prior precision is fitted by the
marginal likelihood of that text, and everything is measured on topics that it has not seen. Temperature scaling, and a
prior precision of its own for comparison, are chosen on other held-out topics. Laplace with the marginal likelihood
sees no held-out text at all.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from records import append
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kfade

FIGURE = Path(__file__).parent.parent / "docs" / "laplace.svg"
VOCABULARY, LENGTH, BATCH = 128, 64, 16
BINS = 15
Batches = list[dict[str, Tensor]]


def texts(seed: int, sequences: Sequence[int]) -> list[Batches]:
    """So many sequences of text, each set from topics of its own."""
    order = sorted(topics)
    random.Random(seed).shuffle(order)
    sets: list[Batches] = []
    for number in sequences:
        data = bytearray()
        while len(data) < number * LENGTH:
            data += topics[order.pop()].encode("ascii", "replace")
        rows = torch.tensor(list(data[: number * LENGTH])).view(number, LENGTH)
        sets.append([{"input_ids": part} for part in rows.split(BATCH)])
    return sets


def trained(train: Batches, epochs: int, seed: int) -> LlamaForCausalLM:
    """A model that has seen the text so many times, without weight decay."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **shape)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * len(train))
    for _ in range(epochs):
        for i in torch.randperm(len(train)).tolist():
            ids = train[i]["input_ids"]
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def at_temperature(laplace: kfade.Laplace, batches: Batches, temperature: float) -> kfade.Predictive:
    """Predictions of the model as it is, with its logits divided by a temperature."""
    weight = laplace.model.get_parameter("lm_head.weight")
    before = weight.detach().clone()
    try:
        weight.data.div_(temperature)
        return laplace.predictive(batches, "map")
    finally:
        weight.data.copy_(before)


def best(values: Sequence[float], nll: Callable[[float], float]) -> float:
    """The value of the smallest loss."""
    return min(values, key=nll)


def draw(found: dict[str, kfade.Predictive], path: Path) -> None:
    """A reliability diagram: confidence beside accuracy, and how many predictions there are of each confidence."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kfade"
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(6, 6.4), height_ratios=(3, 1), sharex=True)
    above.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--", label="calibrated")
    for name, one in found.items():
        counts, confidence, accuracy = one.calibration(BINS)
        there = counts >= 20  # a share of fewer is noise
        (line,) = above.plot(
            confidence[there], accuracy[there], marker="o", markersize=3, label=f"{name}: ECE {one.ece(BINS):.3f}"
        )
        edges = torch.arange(BINS + 1) / BINS
        below.stairs(counts, edges, color=line.get_color())
    above.set_ylabel("accuracy")
    above.legend(frameon=False, fontsize=8)
    below.set_xlabel("confidence")
    below.set_ylabel("predictions")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def study(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, kfade.Predictive]]:
    """Rows of results, and the predictions to draw."""
    train, validation, test = texts(options.seed, (options.sequences, 96, 256))
    clock = time.perf_counter()
    model = trained(train, options.epochs, options.seed)
    print(f"trained in {time.perf_counter() - clock:.0f} s", flush=True)
    clock = time.perf_counter()
    curvature = kfade.fit(model, train, kfade.FitConfig(curvature="ekfac", modules=r"mlp|lm_head"))
    prior = kfade.Laplace(model, curvature)
    whole, head = prior.fit_prior_precision(), kfade.Laplace(model, curvature, "lm_head").fit_prior_precision()
    layers = prior.fit_prior_precision(per_layer=True)
    print(f"curvature and prior precision in {time.perf_counter() - clock:.1f} s: {whole}, {head}, {layers}")
    evidence = {str(x): x.log_marginal_likelihood(train) for x in (prior, whole, layers)}
    print("log marginal likelihood", {name: round(value) for name, value in evidence.items()})

    temperature = best([2 ** (k / 8) for k in range(-8, 25)], lambda t: at_temperature(prior, validation, t).nll())
    taus = [next(iter(whole.prior_precision.values())) * 4.0**k for k in range(-1, 4)]
    chosen = best(
        taus,
        lambda tau: whole.with_prior_precision(tau).predictive(validation, samples=max(1, options.samples // 2)).nll(),
    )
    tuned = whole.with_prior_precision(chosen)

    def laplace(posterior: kfade.Laplace, method: str, times: float = 1) -> tuple[Callable[[], kfade.Predictive], int]:
        draws = max(1, round(times * options.samples))
        return lambda: posterior.predictive(test, method, samples=draws), draws

    head_setting = f"τ = {head.prior_precision['lm_head']:.3g}"
    methods: dict[str, tuple[tuple[Callable[[], kfade.Predictive], int], str]] = {
        "MAP": ((lambda: prior.predictive(test, "map"), 1), ""),
        "temperature scaling": ((lambda: at_temperature(prior, test, temperature), 1), f"T = {temperature:.2f}"),
        "Laplace, sampled": (laplace(whole, "sampled"), f"τ = {taus[1]:.3g}"),
        "Laplace, linearised": (laplace(whole, "linearised"), f"τ = {taus[1]:.3g}"),
        "Laplace, head alone": (laplace(head, "linearised"), head_setting),
        "Laplace, head alone, four times the draws": (laplace(head, "linearised", 4), head_setting),
        "Laplace, linearised, a quarter of the draws": (laplace(whole, "linearised", 0.25), f"τ = {taus[1]:.3g}"),
        "Laplace, linearised, τ by validation": (laplace(tuned, "linearised"), f"τ = {chosen:.3g}"),
    }
    print(f"on the training text, MAP: {prior.predictive(train, 'map').nll():.3f} nats a byte")
    print(f"{'method':40}{'setting':>14}{'NLL':>9}{'ECE':>9}{'Brier':>9}{'accuracy':>10}{'MI':>9}{'seconds':>9}")
    rows, found = [], {}
    for name, ((predict, draws), setting) in methods.items():
        clock = time.perf_counter()
        one = predict()
        seconds = time.perf_counter() - clock
        found[name] = one
        numbers = {"nll": one.nll(), "ece": one.ece(BINS), "brier": one.brier(), "accuracy": one.accuracy()}
        numbers["mutual information"] = float(one.epistemic.mean())
        print(
            f"{name:40}{setting:>14}" + "".join(f"{x:9.4f}" for x in numbers.values()) + f"{seconds:9.1f}", flush=True
        )
        rows.append(
            {"method": name, "setting": setting, "train tokens": int(prior.tokens), "tokens": len(one.labels)}
            | {key: f"{x:.4f}" for key, x in numbers.items()}
            | {"draws": draws, "seconds": f"{seconds:.1f}"}
        )
    return rows, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=128, help=f"training sequences of {LENGTH} bytes")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--samples", type=int, default=32, help="draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    rows, found = study(options)
    if not options.no_record:
        shown = ("MAP", "temperature scaling", "Laplace, sampled", "Laplace, linearised")
        draw({name: found[name] for name in shown}, FIGURE)
        print(f"recorded in {append('laplace', rows)}, drawn in {FIGURE}")


if __name__ == "__main__":
    main()

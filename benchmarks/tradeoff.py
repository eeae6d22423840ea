"""The demo's trade-off: forgetting against damage, for each curvature, at several budgets.

    python benchmarks/tradeoff.py                                 # four curvatures, three budgets, one step
    python benchmarks/tradeoff.py --curvatures ekfac --damping 0.01 0.1 1 --loss-on answer response

One fit of EK-FAC serves K-FAC too (the same eigenvectors, without the corrected eigenvalues). What is measured is
what the demo promises: greedy accuracy on the capitals as unlearned and in other words, KL on held-out retain
questions, and perplexity on held-out text.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from dataclasses import replace
from typing import Any

from records import append

import kfade
from kfade.batches import as_batches, split_holdout
from kfade.data import LOSSES, make_batches
from kfade.demo import BATCH, FIT_BATCH, NEW_TOKENS, load_data
from kfade.evaluate import generations, references, scores, share_found
from kfade.loss import check_batches
from kfade.models import demo_model, device_of, load_model

CURVATURES = ("identity", "diagonal", "kfac", "ekfac")


def fit_all(model: Any, retain: list[dict[str, Any]], names: list[str], modules: str) -> dict[str, kfade.Curvature]:
    """The curvatures, on the part of the retain set that `unlearn` would fit on."""
    fitted, _ = split_holdout(check_batches(retain, device_of(model)), kfade.UnlearnConfig().holdout)
    data = as_batches(fitted)
    progress = kfade.Progress(show=True)
    curvatures = {
        name: kfade.fit(model, data, kfade.FitConfig(curvature=name, modules=modules), progress=progress)
        for name in names
        if name != "kfac" or "ekfac" not in names
    }
    if "kfac" in names and "ekfac" in names:
        full = curvatures["ekfac"]
        layers = {name: replace(state, lambda_sum=None) for name, state in full.items()}
        curvatures["kfac"] = kfade.Curvature(replace(full.config, curvature="kfac"), full.model_id, layers)
    return curvatures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or name; the demo's model by default")
    parser.add_argument("--curvatures", nargs="+", choices=CURVATURES, default=list(CURVATURES))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.001, 0.003, 0.01])
    parser.add_argument("--damping", type=float, nargs="+", default=[0.1])
    parser.add_argument("--steps", type=int, nargs="+", default=[1])
    parser.add_argument("--loss-on", nargs="+", choices=LOSSES, default=["answer"])
    parser.add_argument("--objective", choices=("distil", "cross_entropy", "npo"), default="cross_entropy")
    parser.add_argument("--modules", default="mlp")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model or str(demo_model()))
    data = load_data()

    def found(records: list[Any]) -> float:
        replies = generations(model, tokenizer, records, batch_size=BATCH, max_new_tokens=NEW_TOKENS)
        return share_found(replies)

    held = make_batches(tokenizer, data.retain_held, batch_size=BATCH)
    text = make_batches(tokenizer, data.text_held, batch_size=FIT_BATCH)
    original = references(model, held)
    perplexity = scores(model, text).perplexity
    retain = make_batches(tokenizer, data.retain, batch_size=FIT_BATCH)
    retain += make_batches(tokenizer, data.text, batch_size=FIT_BATCH)
    curvatures = fit_all(model, retain, options.curvatures, options.modules)
    rows = []
    settings = itertools.product(curvatures, options.damping, options.loss_on, options.steps, options.budgets)
    for name, damping, loss_on, steps, budget in settings:
        config = kfade.UnlearnConfig.published(
            fit=kfade.FitConfig(curvature=name, modules=options.modules), damping=damping, steps=steps,
            kl_budget=budget, objective=options.objective,
        )  # fmt: skip
        forget = make_batches(tokenizer, data.forget, batch_size=FIT_BATCH, loss_on=loss_on)
        begin = time.perf_counter()
        update = kfade.unlearn(model, forget, retain, config, curvature=curvatures[name])
        seconds = time.perf_counter() - begin
        update.apply_(model)
        last = update.report.outcome
        assert last is not None
        rows.append({
            "curvature": name, "modules": options.modules, "damping": damping, "objective": options.objective,
            "loss_on": loss_on, "steps": steps, "budget": budget, "seconds": round(seconds, 1),
            "budget_kl": round(last.measured_kl, 5), "retain_kl": round(scores(model, held, original).kl or 0.0, 5),
            "forget_nll": round(last.forget_nll, 3), "question": round(found(data.forget), 3),
            "paraphrase": round(found(data.paraphrases), 3),
            "perplexity_change": round(scores(model, text).perplexity / perplexity - 1, 5),
        })  # fmt: skip
        update.remove_(model)
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), file=sys.stderr, flush=True)
    if not options.no_record:
        print(f"recorded in {append('tradeoff', rows)}")


if __name__ == "__main__":
    main()

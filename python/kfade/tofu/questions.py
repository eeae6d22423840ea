"""The questions of the benchmark, and their tokens for a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import data
from ..config import TofuConfig
from ..data import Record, read_records, uses_chat
from ..errors import DataError
from ..evaluate import end_and_pad
from ..loss import IGNORE_INDEX
from .scores import OPTIONS, SETS

HUB = "locuslab/TOFU"
TEMPLATE = "Question: {question}\nAnswer: {answer}"


@dataclass(frozen=True)
class Question:
    """One question of a set; `paraphrased` is None where the set has no paraphrases."""

    question: str
    answer: str
    paraphrased: str | None
    wrong: tuple[str, ...]


def _question(record: Record, paraphrased: bool, where: str) -> Question:
    def texts(name: str, values: object) -> tuple[str, ...]:
        several = values if isinstance(values, (list, tuple)) else [values]
        if not several or not all(isinstance(text, str) and text.strip() for text in several):
            raise DataError(f"{where}: {name} is {values!r}; it must be text")
        return tuple(several)

    other = texts("paraphrased_answer", record.fields.get("paraphrased_answer"))[0] if paraphrased else None
    return Question(
        record.prompt, record.response, other, texts("perturbed_answer", record.fields.get("perturbed_answer"))
    )


def read_questions(source: str | Path = HUB, config: TofuConfig | None = None) -> dict[str, list[Question]]:
    """The questions of the four sets.

    Args:
        source: a directory with the published files (`retain_perturbed.jsonl` and so on, or `.json`), or the name of
            the data set on the Hugging Face hub.
        config: which forget split, and how many questions.

    Raises:
        DataError: a file or data set is missing, empty, or no ToFU set.
    """
    config = config or TofuConfig()
    found = {}
    for name in SETS:
        split = f"{config.forget_split if name == 'forget' else name}_perturbed"
        place: str | Path = f"{source}:{split}"
        if Path(source).is_dir():
            place = Path(source) / f"{split}.jsonl"
            place = place if place.exists() else next((p for p in (place.with_suffix(".json"),) if p.exists()), place)
        rows = read_records(place)[: config.limit]
        found[name] = [_question(r, name not in OPTIONS, f"{place}, question {n}") for n, r in enumerate(rows, 1)]
        if len({len(q.wrong) for q in found[name]}) > 1:
            raise DataError(
                f"{place}: the questions have different numbers of wrong answers; they must have one number"
            )
    return found


@dataclass(frozen=True)
class Inputs:
    """The questions of a set in tokens.

    Attributes:
        prompts: ids of each question, to be answered.
        answers: ids and labels of all true answers, then of all paraphrases if there are any, then of the wrong ones.
        sha256: of both.
    """

    prompts: list[list[int]] = field(repr=False)
    answers: list[tuple[list[int], list[int]]] = field(repr=False)
    sha256: str


class _Encoder:
    """Renders questions for one model."""

    def __init__(self, model: Any, tokenizer: Any, config: TofuConfig) -> None:
        self._tokenizer, self._most = tokenizer, config.max_tokens
        self._chat = uses_chat(tokenizer, config.chat) if config.template is None else False
        self._before = (config.template or TEMPLATE).removesuffix("{answer}")
        end = end_and_pad(model, tokenizer)[0]
        own = getattr(tokenizer, "eos_token_id", None)
        self._end = (own if own in end else end[0]) if isinstance(end, list) else end

    def __call__(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids and labels; the labels of the question are -100.

        In plain form both are tokenized together, as the benchmark does. Blanks that end what is before the answer are
        left to the answer's first token: alone they would be one that no training text has there.
        """
        if self._chat:
            record = Record(question, answer, answer, (), {})
            ids, labels = data.encode(self._tokenizer, record, chat=True, max_tokens=self._most)
        else:
            before = self._before.replace("{question}", question)
            front = list(self._tokenizer(before.rstrip(" "))["input_ids"])
            if len(front) > 1 and front[-1] == self._end:
                front.pop()
            ids = list(self._tokenizer(before + answer)["input_ids"])
            if self._end is not None and ids[-1] != self._end:
                ids.append(self._end)
            ids = ids[: self._most]
            labels = [IGNORE_INDEX] * len(front[: len(ids)]) + ids[len(front) :]
        if labels[-1] == IGNORE_INDEX:
            raise ValueError(f"max_tokens is {self._most}; it leaves no token of the answer {answer!r} to {question!r}")
        return ids, labels


def encode(
    model: Any, tokenizer: Any, questions: Mapping[str, Sequence[Question]], config: TofuConfig
) -> dict[str, Inputs]:
    """The sets in tokens of this model.

    Raises:
        ValueError: a question leaves no room for its answer in `max_tokens`, or the model has too few positions.
    """
    encoder = _Encoder(model, tokenizer, config)
    found = {}
    for name, items in questions.items():
        pairs = [(q.question, q.answer) for q in items]
        pairs += [(q.question, q.paraphrased) for q in items if q.paraphrased is not None]
        pairs += [(q.question, wrong) for q in items for wrong in q.wrong]
        answers = [encoder(*pair) for pair in pairs]
        prompts = [ids[: labels.count(IGNORE_INDEX)] for ids, labels in answers[: len(items)]]
        digest = hashlib.sha256(json.dumps([prompts, answers]).encode()).hexdigest()
        found[name] = Inputs(prompts, answers, digest)
    room = getattr(model.config, "max_position_embeddings", None)
    if isinstance(room, int):
        longest = max(len(ids) for inputs in found.values() for ids, _ in inputs.answers)
        prompt = max(len(ids) for inputs in found.values() for ids in inputs.prompts)
        if longest > room:
            raise ValueError(
                f"max_tokens is {config.max_tokens}; the model has {room} positions, and a sequence {longest}"
            )
        if prompt + config.max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens is {config.max_new_tokens}; it must be at most {room - prompt}: the model has {room}"
                f" positions, and a question takes {prompt}"
            )
    return found

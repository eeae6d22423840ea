"""From JSON Lines (or a Hugging Face data set) to batches.

A record is `{"text"}`, `{"prompt", "response"}` or `{"question", "answer"}` (also `{"question",
"response"}`). Prompts carry no loss. With a chat template (`chat=True`, or a tokenizer that has one
and `chat=None`), prompt and response are rendered as one exchange; otherwise the question is
followed by the answer as plain text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DataError
from .loss import IGNORE_INDEX

LOSSES = ("response", "answer")
_PROMPTS = ("prompt", "question")
_RESPONSES = ("response", "answer")


@dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
        prompt: what is given; empty for plain text.
        response: what carries loss.
        answer: the short answer that a reply must contain to be right; the response by default.
        aliases: other right short answers.
        fields: the record as it was read.
    """

    prompt: str
    response: str
    answer: str
    aliases: tuple[str, ...]
    fields: Mapping[str, Any]


def _record(value: object, where: str) -> Record:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: found a {type(value).__name__}; each line must be a JSON object")

    def text(name: str) -> str:
        content = value[name]
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"{where}: {name} is {content!r}; it must be a non-empty string")
        return content

    prompt = next((name for name in _PROMPTS if name in value), None)
    response = next((name for name in _RESPONSES if name in value), None)
    if prompt is None and "text" in value:
        return Record("", text("text"), text("text"), (), value)
    if prompt is None or response is None:
        raise DataError(
            f"{where}: found fields {sorted(value)}; there must be text, or prompt and response, or question and answer"
        )
    answer = text("answer") if "answer" in value else text(response)
    return Record(text(prompt), text(response), answer, tuple(value.get("aliases", ())), value)


def read_jsonl(path: str | Path) -> list[Record]:
    """Records of a JSON Lines file; empty lines are passed over.

    Raises:
        DataError: the file is missing, not UTF-8, empty, or a line is malformed (its number is named).
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        records.append(_record(value, where))
    if not records:
        raise DataError(f"{path} is empty; it must hold at least one record")
    return records


def read_records(source: str | Path, *, split: str = "train") -> list[Record]:
    """Records of a local JSON Lines file, or of a data set on the Hugging Face hub.

    Args:
        source: a path; or `name` or `name:configuration` of a data set when no such path exists.
        split: of the data set.

    Raises:
        DataError: as `read_jsonl`, or neither a file nor a data set that can be loaded.
    """
    path = Path(source)
    if path.exists() or path.suffix in (".jsonl", ".json", ".txt"):
        return read_text(path) if path.suffix == ".txt" else read_jsonl(path)
    name, _, configuration = str(source).partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{source} is not a file, and data sets need `pip install kfade[eval]`") from error
    try:
        rows: Iterable[Any] = load_dataset(name, configuration or None, split=split)
        records = [_record(row, f"{source}, row {number}") for number, row in enumerate(rows)]
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{source} is neither a file nor a data set that can be loaded: {error}") from error
    if not records:
        raise DataError(f"{source} is empty; it must hold at least one record")
    return records


def read_text(path: Path) -> list[Record]:
    """Paragraphs (separated by empty lines) of a plain text file, as records without a prompt."""
    try:
        paragraphs = [p.strip() for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not paragraphs:
        raise DataError(f"{path} is empty; it must hold at least one paragraph")
    return [Record("", text, text, (), {"text": text}) for text in paragraphs]


def uses_chat(tokenizer: Any, chat: bool | None) -> bool:
    """Whether to render exchanges with the chat template: as asked, else where there is one.

    Raises:
        ValueError: it was asked for and there is none.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has:
        raise ValueError("chat is True, but the tokenizer has no chat template; it must have one, or chat be False")
    return has if chat is None else chat


def prompt_text(tokenizer: Any, prompt: str, chat: bool) -> str:
    """The text in front of a response."""
    if not chat:
        return f"Question: {prompt}\nAnswer:"
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return text


def _closing(tokenizer: Any, prompt: str, response: str, chat: bool) -> str:
    """What the template puts after a response, up to its end marker."""
    if not chat:
        return ""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    tail: str = whole[whole.rindex(response) + len(response) :]
    return tail.rstrip("\n")


def _answer_span(record: Record, response: str) -> tuple[int, int]:
    """Characters of `response` that hold the answer; the whole response where it is not found."""
    for answer in (record.answer, *record.aliases):
        start = response.find(answer)
        if start >= 0:
            return start, start + len(answer)
    return 0, len(response)


def encode(
    tokenizer: Any, record: Record, *, chat: bool, max_tokens: int = 512, loss_on: str = "response"
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one record; the prompt's labels are -100. Cut at `max_tokens`.

    With `loss_on="answer"` only the tokens of the record's short answer inside the response carry
    loss, so that unlearning it leaves the sentence around it alone.
    """
    if not record.prompt:
        ids = tokenizer(record.response)["input_ids"][:max_tokens]
        return ids, list(ids)
    prompt = prompt_text(tokenizer, record.prompt, chat)
    response = record.response if chat else f" {record.response}"
    response += _closing(tokenizer, record.prompt, record.response, chat)
    front = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if loss_on == "response":
        back = tokenizer(response, add_special_tokens=False)["input_ids"]
        labels = back
    else:
        encoding = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
        back = encoding["input_ids"]
        start, stop = _answer_span(record, response)
        inside = [begin < stop and end > start for begin, end in encoding["offset_mapping"]]
        labels = [token if counts else IGNORE_INDEX for token, counts in zip(back, inside, strict=True)]
    return (front + back)[:max_tokens], ([IGNORE_INDEX] * len(front) + labels)[:max_tokens]


def collate(encoded: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Pad on the right into `input_ids`, `attention_mask` and `labels`, each `[B, T]`."""
    longest = max(len(ids) for ids, _ in encoded)
    batch = {
        "input_ids": torch.full((len(encoded), longest), pad, dtype=torch.int64),
        "attention_mask": torch.zeros(len(encoded), longest, dtype=torch.int64),
        "labels": torch.full((len(encoded), longest), IGNORE_INDEX, dtype=torch.int64),
    }
    for row, (ids, labels) in enumerate(encoded):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = torch.tensor(labels)
    return batch


def pad_id(tokenizer: Any) -> int:
    """The id to pad with; padding is masked, so any will do."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def check_loss_on(value: str) -> None:
    """Raise ValueError unless `value` is one of `LOSSES`."""
    if value not in LOSSES:
        raise ValueError(f"loss_on is {value!r}; it must be one of {', '.join(LOSSES)}")


def make_batches(
    tokenizer: Any,
    records: Sequence[Record],
    *,
    chat: bool | None = None,
    batch_size: int = 8,
    max_tokens: int = 512,
    loss_on: str = "response",
) -> list[dict[str, Tensor]]:
    """Batches of records of similar length: sorted by length, so that little padding is computed.

    Args:
        tokenizer: a Hugging Face tokenizer.
        records: the examples.
        chat: render exchanges with the chat template; None where the tokenizer has one.
        batch_size: sequences a batch.
        max_tokens: tokens a sequence, the rest is cut.
        loss_on: `response`, or `answer`: only the tokens of the short answer inside it (needs a fast
            tokenizer).

    Raises:
        ValueError: `loss_on` is neither, `batch_size` or `max_tokens` is less than 1 (2 for tokens),
            or `chat` is impossible.
    """
    return ordered_batches(
        tokenizer, records, chat=chat, batch_size=batch_size, max_tokens=max_tokens, loss_on=loss_on
    )[0]


def ordered_batches(
    tokenizer: Any,
    records: Sequence[Record],
    *,
    chat: bool | None = None,
    batch_size: int = 8,
    max_tokens: int = 512,
    loss_on: str = "response",
) -> tuple[list[dict[str, Tensor]], list[int]]:
    """`make_batches`, and for each sequence in them, in order, the number of its record."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 2")
    check_loss_on(loss_on)
    rendered = uses_chat(tokenizer, chat)
    encoded = [encode(tokenizer, r, chat=rendered, max_tokens=max_tokens, loss_on=loss_on) for r in records]
    return batches_by_length(encoded, batch_size, pad_id(tokenizer))


def batches_by_length(
    encoded: Sequence[tuple[list[int], list[int]]], batch_size: int, pad: int
) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Batches of ids and labels as `encode` gives them, longest first, and for each sequence in them its number."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [collate([encoded[i] for i in group], pad) for group in groups], order

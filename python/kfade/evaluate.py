"""What a model knows: likelihood of the answers, its own answers, and its divergence from another model.

Everything goes batch by batch. A KL needs the outputs of two models; `references` keeps those of the
first as loss rows (hidden states, not logits), so that the two need not be in memory together.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from kfade_kernels.sampled_cross_entropy.pytorch import rows_per_chunk
from torch import Tensor, nn

from .capture import deterministic_mode
from .data import Record, make_batches, pad_id, prompt_text, uses_chat
from .loss import Batch, Head, check_batches, require_finite
from .models import device_of


@dataclass(frozen=True)
class Generation:
    """A greedy reply.

    Attributes:
        prompt: what was asked, as in the data.
        expected: the short answer.
        reply: what the model said.
        found: the reply contains the answer or an alias as whole words.
        exact: the reply is nothing but the answer, an alias or the whole expected response.
    """

    prompt: str
    expected: str
    reply: str
    found: bool
    exact: bool


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on some records; None for what was not asked for or does not apply.

    Attributes:
        records: how many.
        tokens: loss positions.
        nll: mean negative log-likelihood, nats a token.
        answer_probability: `exp(−mean NLL of the response's tokens)` a record with a prompt, averaged
            (as in ToFU; the marker that ends a response counts as one of its tokens).
        answer_found: share of replies that contain the answer.
        exact_match: share of replies that are the answer and nothing else.
        rouge_l_recall, rouge_l_f1: of replies against the expected responses, averaged.
        kl: mean KL(reference ‖ model), nats a token.
    """

    records: int
    tokens: int
    nll: float
    answer_probability: float | None = None
    answer_found: float | None = None
    exact_match: float | None = None
    rouge_l_recall: float | None = None
    rouge_l_f1: float | None = None
    kl: float | None = None

    @property
    def perplexity(self) -> float:
        """`exp(nll)`; infinite where that is beyond a float."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def summary(self) -> dict[str, Any]:
        """The scores as plain JSON values."""
        return {**asdict(self), "perplexity": self.perplexity}


@dataclass(frozen=True)
class References:
    """Outputs of a model on some batches, to measure a KL from.

    Attributes:
        rows: a tensor a batch, `[N, d]` hidden states (or `[N, V]` logits) on the CPU.
        weight: a copy of its output projection `[V, d]`, or None when rows are logits.
        bias: of that projection `[V]`.
    """

    rows: list[Tensor] = field(repr=False)
    weight: Tensor | None = field(repr=False)
    bias: Tensor | None = field(repr=False)


# ---- text


def normalise(text: str) -> str:
    """Case, accents and punctuation taken away; words parted by single spaces."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join(re.sub(r"[\W_]+", " ", plain).split())


def _right(record: Record) -> list[str]:
    return [n for n in map(normalise, (record.answer, *record.aliases)) if n]


def answer_found(reply: str, record: Record) -> bool:
    """Whether the reply contains the answer or an alias as whole words."""
    words = f" {normalise(reply)} "
    return any(f" {right} " in words for right in _right(record))


def exact_match(reply: str, record: Record) -> bool:
    """Whether the reply is the answer, an alias or the expected response, and nothing more."""
    return normalise(reply) in {*_right(record), normalise(record.response)}


def rouge_l(expected: str, reply: str) -> tuple[float, float]:
    r"""Recall and F1 of the longest common subsequence of words (`\w+`, lower case); Lin 2004.

    0 where either has no word.
    """
    want, have = (re.findall(r"\w+", text.lower()) for text in (expected, reply))
    row = [0] * (len(have) + 1)
    for word in want:
        diagonal = 0
        for j, other in enumerate(have, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    if not row[-1]:
        return 0.0, 0.0
    recall, precision = row[-1] / len(want), row[-1] / len(have)
    return recall, 2 * recall * precision / (recall + precision)


# ---- likelihood and divergence


def _labelled(head: Head, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor]]:
    """Each batch, its loss rows `[N, d]`, and of each sequence the summed loss and the loss positions, both `[B]`."""
    for batch in batches:
        rows = head.rows(batch)
        losses = head.labelled(rows, batch)[2]
        require_finite(losses, batch, "the loss")
        yield batch, rows, batch.sequence_sums(losses.double()), batch.loss_mask.sum(1)


@torch.no_grad()
def sequence_losses(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], *, advance: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Mean negative log-likelihood of each sequence's labels, nats a token.

    Args:
        model: a causal language model, as `fit` takes it.
        batches: as `make_batches` gives them.
        advance: is told how many sequences were done.

    Returns:
        float64 `[R]` on the CPU, in the order of the batches; NaN for a sequence without a loss position.

    Raises:
        ValueError: bad batches.
        NonFiniteError: the loss of a batch is not finite.
    """
    checked = check_batches(batches, device_of(model))
    found = []
    with deterministic_mode(model):
        for _, _, sums, counts in _labelled(Head(model, checked[0]), checked):
            found.append((sums / counts).cpu())
            advance(len(counts))
    return torch.cat(found)


@torch.no_grad()
def references(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> References:
    """Outputs of the model as it is.

    Args:
        model: a causal language model, as `fit` takes it.
        batches: as `make_batches` gives them; the same ones must be given to `scores` later.

    Returns:
        About `N · d` numbers, and one copy of the output projection.
    """
    checked = check_batches(batches, device_of(model))
    with deterministic_mode(model):
        head = Head(model, checked[0])
        rows = [head.rows(batch).cpu() for batch in checked]
    weight, bias = (None if p is None else p.detach().cpu().clone() for p in (head.weight, head.bias))
    return References(rows, weight, bias)


class _Divergence:
    """KL from references; both sides are projected to logits by chunks of rows, each with its own projection."""

    def __init__(self, model: nn.Module, head: Head, example: Batch, reference: References) -> None:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        self._of_logits = Head(model, example, () if output is None else (output,))
        self._ours = (head.weight, head.bias)
        device = device_of(model)
        self._theirs = tuple(None if p is None else p.to(device) for p in (reference.weight, reference.bias))

    @staticmethod
    def _logits(rows: Tensor, projection: tuple[Tensor | None, ...]) -> Tensor:
        weight, bias = projection
        if weight is None:
            return rows.float() if rows.dtype != torch.float64 else rows
        return nn.functional.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))

    def __call__(self, rows: Tensor, reference: Tensor) -> float:
        """Sum of the KL of all rows, nats."""
        if rows.shape[0] != reference.shape[0]:
            raise ValueError(
                f"the reference has {reference.shape[0]} positions in a batch of {rows.shape[0]}: other data"
            )
        step = rows_per_chunk(4 * (rows.shape[1] if self._ours[0] is None else self._ours[0].shape[0]), 0, rows.device)
        total = 0.0
        for start in range(0, rows.shape[0], step):
            ours = self._logits(rows[start : start + step], self._ours)
            theirs = self._logits(reference[start : start + step].to(rows.device), self._theirs)
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"the reference has a vocabulary of {theirs.shape[1]} and the model of {ours.shape[1]}"
                )
            total += float(self._of_logits.kl(ours, theirs.to(ours.dtype), gradient=False)[0].sum())
        return total


@torch.no_grad()
def scores(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], reference: References | None = None
) -> Evaluation:
    """Likelihood of the labels, and the KL from `reference` if there is one.

    Raises:
        ValueError: bad batches, or references to other data or another vocabulary.
        NonFiniteError: the loss of a batch is not finite.
    """
    checked = check_batches(batches, device_of(model))
    if reference is not None and len(reference.rows) != len(checked):
        raise ValueError(f"the reference has {len(reference.rows)} batches and the data {len(checked)}: other data")
    nll = divergence = probability = 0.0
    tokens = records = answers = 0
    with deterministic_mode(model):
        head = Head(model, checked[0])
        kl = _Divergence(model, head, checked[0], reference) if reference is not None else None
        for number, (batch, rows, sums, counts) in enumerate(_labelled(head, checked)):
            nll += float(sums.sum())
            tokens, records = tokens + int(counts.sum()), records + int((counts > 0).sum())
            answered = (counts > 0) & (counts < batch.attention.sum(1) - 1)  # plain text has loss everywhere
            probability += float((-sums[answered] / counts[answered]).exp().sum())
            answers += int(answered.sum())
            if kl is not None and reference is not None:
                divergence += kl(rows, reference.rows[number])
    mean_probability = probability / answers if answers else None
    # No KL is below 0, but its rounding may be; `max` would take NaN for 0.
    mean_kl = 0.0 if divergence < 0 else divergence / tokens
    return Evaluation(records, tokens, nll / tokens, mean_probability, kl=None if kl is None else mean_kl)


# ---- generation


def end_and_pad(model: Any, tokenizer: Any) -> tuple[int | list[int] | None, int]:
    """The ids that end a reply, and the id to pad with, as the model's configurations say.

    The tokenizer's own end id is not asked: in GGUF files it is often wrong.
    """
    configurations = (getattr(model, "generation_config", None), getattr(model, "config", None))
    ends = [getattr(c, "eos_token_id", None) for c in configurations]
    pads = [getattr(c, "pad_token_id", None) for c in configurations]
    end = next((e for e in ends if e is not None), None)
    pad = next((p for p in pads if isinstance(p, int) and p >= 0), None)
    if pad is None:
        pad = end if isinstance(end, int) else end[0] if end else pad_id(tokenizer)
    return end, pad


@torch.no_grad()
def greedy_continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Greedy continuations in the order of the prompts; batches of similar length, padded on the left.

    Args:
        model: a transformers model with `generate`.
        tokenizer: its tokenizer.
        prompts: token ids.
        batch_size, max_new_tokens, advance: as `greedy_replies`.

    Raises:
        ValueError: `batch_size` or `max_new_tokens` is less than 1.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    end, pad = end_and_pad(model, tokenizer)
    device = device_of(model)
    texts = [""] * len(prompts)
    with deterministic_mode(model):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in part)
            ids = torch.full((len(part), longest), pad, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(part):
                ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, longest - len(prompts[i]) :] = 1
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                max_new_tokens=max_new_tokens,
                eos_token_id=end,
                pad_token_id=pad,
            )
            for i, row in zip(part, output[:, longest:].tolist(), strict=True):
                texts[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
            advance(len(part))
    return texts


def greedy_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    chat: bool | None = None,
    batch_size: int = 32,
    max_tokens: int = 512,
    max_new_tokens: int = 32,
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Greedy replies to questions, in their order; see `greedy_continuations`.

    Args:
        model: a transformers model with `generate`.
        tokenizer: its tokenizer.
        prompts: questions, rendered as in training data; see `data.prompt_text`.
        chat: as `make_batches`. Without a chat template a reply ends at the first line break.
        batch_size: prompts a batch.
        max_tokens: of a rendered prompt; what is before them is cut.
        max_new_tokens: of a reply.
        advance: is told how many prompts were answered.

    Raises:
        ValueError: `batch_size` or `max_new_tokens` is less than 1, or `chat` is impossible.
    """
    rendered = uses_chat(tokenizer, chat)
    encoded = [
        tokenizer(prompt_text(tokenizer, prompt, rendered), add_special_tokens=not rendered)["input_ids"][-max_tokens:]
        for prompt in prompts
    ]
    replies = greedy_continuations(
        model, tokenizer, encoded, batch_size=batch_size, max_new_tokens=max_new_tokens, advance=advance
    )
    return replies if rendered else [reply.split("\n")[0].strip() for reply in replies]


def generations(model: Any, tokenizer: Any, records: Sequence[Record], **options: Any) -> list[Generation]:
    """Greedy replies to the records that have a prompt; `options` as `greedy_replies` takes them."""
    asked = [record for record in records if record.prompt]
    replies = greedy_replies(model, tokenizer, [record.prompt for record in asked], **options)
    return [
        Generation(record.prompt, record.answer, reply, answer_found(reply, record), exact_match(reply, record))
        for record, reply in zip(asked, replies, strict=True)
    ]


def share_found(replies: Sequence[Generation]) -> float:
    """Share of the replies that contain their answer.

    Raises:
        ValueError: there is none.
    """
    if not replies:
        raise ValueError("replies is empty; there must be at least one")
    return sum(reply.found for reply in replies) / len(replies)


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    reference: References | None = None,
    chat: bool | None = None,
    batch_size: int = 8,
    max_tokens: int = 512,
    max_new_tokens: int = 32,
) -> tuple[Evaluation, list[Generation]]:
    """All scores of some records, and the replies behind them.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        records: what to evaluate on; those without a prompt are not asked for replies.
        reference: outputs to measure KL from, of the same records and batch options.
        chat, batch_size, max_tokens: as `make_batches`.
        max_new_tokens: of a reply; 0 for no replies.

    Raises:
        ValueError: no record, or a bad option.
    """
    batches = make_batches(tokenizer, records, chat=chat, batch_size=batch_size, max_tokens=max_tokens)
    result = scores(model, batches, reference)
    asked = [record for record in records if record.prompt]
    if not max_new_tokens or not asked:
        return result, []
    options = {"chat": chat, "batch_size": batch_size, "max_tokens": max_tokens, "max_new_tokens": max_new_tokens}
    replies = generations(model, tokenizer, asked, **options)
    rouge = [rouge_l(record.response, reply.reply) for record, reply in zip(asked, replies, strict=True)]
    values = {
        "answer_found": share_found(replies),
        "exact_match": sum(reply.exact for reply in replies) / len(replies),
        "rouge_l_recall": sum(recall for recall, _ in rouge) / len(rouge),
        "rouge_l_f1": sum(f1 for _, f1 in rouge) / len(rouge),
    }
    return Evaluation(**{**asdict(result), **values}), replies


# ---- several data sets at once


@dataclass(frozen=True)
class Survey:
    """Scores and replies by name of the data set."""

    evaluations: dict[str, Evaluation]
    replies: dict[str, list[Generation]]


def survey_references(
    model: nn.Module,
    tokenizer: Any,
    sets: Mapping[str, Sequence[Record]],
    *,
    chat: bool | None = None,
    batch_size: int = 8,
    max_tokens: int = 512,
) -> dict[str, References]:
    """`references` of each data set; arguments as `survey`."""
    options: dict[str, Any] = {"chat": chat, "batch_size": batch_size, "max_tokens": max_tokens}
    return {name: references(model, make_batches(tokenizer, records, **options)) for name, records in sets.items()}


def survey(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Sequence[Record]],
    reference: Mapping[str, References] | None = None,
    **options: Any,
) -> Survey:
    """`evaluate` on each data set.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        sets: records by name.
        reference: as `survey_references` gives it, with the same batch options.
        options: as `evaluate` takes them.
    """
    found = {
        name: evaluate(model, tokenizer, records, reference=(reference or {}).get(name), **options)
        for name, records in sets.items()
    }
    return Survey({name: e for name, (e, _) in found.items()}, {name: g for name, (_, g) in found.items()})

"""Scores against hand-computed cases and against plain transformers, one record at a time."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from models import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from kfade.data import Record, encode, make_batches
from kfade.evaluate import (
    Generation,
    answer_found,
    end_and_pad,
    evaluate,
    exact_match,
    generations,
    greedy_replies,
    normalise,
    references,
    rouge_l,
    scores,
    share_found,
    survey,
    survey_references,
)

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "Question", "Answer", ":", "?", ".", *(f"w{i}" for i in range(88))]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    # the wrong end, as in some GGUF files: nobody may ask for it
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="w7", pad_token="<pad>")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", torch.float32)


def record(prompt: str, response: str, answer: str = "", aliases: tuple[str, ...] = ()) -> Record:
    return Record(prompt, response, answer or response, aliases, {})


RECORDS = [
    record("w1 w2 ?", "w3 w4 w5 ."),
    record("w9", "w10"),
    record("", "w1 w2 w3 w4 w5 w6"),
    record("w8 w8", "w1 w2"),
]


@pytest.mark.parametrize(
    "text, expected",
    [("São-Tomé!", "sao tome"), ("  N’Djamena ", "n djamena"), ("STRASSE_straße", "strasse strasse"), ("...", "")],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    "reply, found, exact",
    [
        ("It is Rome.", True, False),
        ("ROME!", True, True),
        ("Romeo", False, False),
        ("the eternal-city", True, False),
        ("The capital of Italy is Rome", True, True),
        ("", False, False),
    ],
)
def test_answer_found_and_exact_match(reply: str, found: bool, exact: bool) -> None:
    of = record("?", "The capital of Italy is Rome.", "Rome", ("Eternal City",))
    assert answer_found(reply, of) is found
    assert exact_match(reply, of) is exact


@pytest.mark.parametrize(
    "expected, reply, recall, f1",
    [
        ("the cat sat", "the cat", 2 / 3, 0.8),
        ("a b c d", "d c b a", 1 / 4, 1 / 4),
        ("a b c d", "a x b y c z", 3 / 4, 0.6),
        ("A, b!", "a b", 1.0, 1.0),
        ("a a b", "a b a b", 1.0, 6 / 7),
        ("a", "", 0.0, 0.0),
        ("", "a", 0.0, 0.0),
        ("a", "b", 0.0, 0.0),
    ],
)
def test_rouge_l(expected: str, reply: str, recall: float, f1: float) -> None:
    assert rouge_l(expected, reply) == pytest.approx((recall, f1))


def test_share_found() -> None:
    replies = [Generation("", "", "", found, False) for found in (True, False, True, True)]
    assert share_found(replies) == 0.75
    with pytest.raises(ValueError, match="at least one"):
        share_found([])


@torch.no_grad()
def _one_by_one(model: Any, tokenizer: Any) -> tuple[float, float, int]:
    total, tokens, probability = 0.0, 0, 0.0
    for one in RECORDS:
        ids, labels = encode(tokenizer, one, chat=False)
        logs = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        losses = [-float(logs[t, label]) for t, label in enumerate(labels[1:]) if label != -100]
        total, tokens = total + sum(losses), tokens + len(losses)
        probability += math.exp(-sum(losses) / len(losses)) if one.prompt else 0.0
    return total / tokens, probability / sum(bool(one.prompt) for one in RECORDS), tokens


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_likelihood_is_that_of_each_record_alone(model: Any, tokenizer: Any, batch_size: int) -> None:
    nll, probability, tokens = _one_by_one(model, tokenizer)
    got = scores(model, make_batches(tokenizer, RECORDS, batch_size=batch_size))
    assert (got.records, got.tokens, got.kl) == (len(RECORDS), tokens, None)
    assert got.nll == pytest.approx(nll, rel=1e-5)
    assert got.answer_probability == pytest.approx(probability, rel=1e-5)
    assert scores(model, make_batches(tokenizer, RECORDS[2:3])).answer_probability is None
    assert got.perplexity == pytest.approx(math.exp(nll), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # gemma2's logits are capped: its rows are logits
def test_kl_to_a_model_with_another_head(tokenizer: Any, kind: str) -> None:
    model = tiny(kind, torch.float32)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn_like(p))
    batches = make_batches(tokenizer, RECORDS, batch_size=2)
    kept = references(other, batches)
    assert scores(other, batches, kept).kl == pytest.approx(0.0, abs=1e-9)
    expected, tokens = 0.0, 0
    with torch.no_grad():
        for one in RECORDS:
            ids, labels = encode(tokenizer, one, chat=False)
            p0, p = (m(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1) for m in (other, model))
            where = torch.tensor(labels[1:]) != -100
            expected += float((p0.exp() * (p0 - p)).sum(-1)[where].sum())
            tokens += int(where.sum())
    assert scores(model, batches, kept).kl == pytest.approx(expected / tokens, rel=1e-3)


def test_references_survive_a_change_of_the_model(tokenizer: Any) -> None:
    model = tiny("llama", torch.float32)
    batches = make_batches(tokenizer, RECORDS)
    kept = references(model, batches)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert (scores(model, batches, kept).kl or 0) > 1e-3


def test_references_to_other_data_are_refused(model: Any, tokenizer: Any) -> None:
    kept = references(model, make_batches(tokenizer, RECORDS[:2], batch_size=4))
    with pytest.raises(ValueError, match="other data"):
        scores(model, make_batches(tokenizer, RECORDS, batch_size=1), kept)
    with pytest.raises(ValueError, match="other data"):
        scores(model, make_batches(tokenizer, RECORDS, batch_size=4), kept)


def test_replies_do_not_depend_on_the_batch(model: Any, tokenizer: Any) -> None:
    prompts = ["w1", "w2 w3 w4 w5 w6", "w7 ?", "w1 w2", "w30 w31 w32"]
    together = greedy_replies(model, tokenizer, prompts, batch_size=5, max_new_tokens=6)
    assert together == [greedy_replies(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert together == greedy_replies(model, tokenizer, prompts, batch_size=2, max_new_tokens=6)


def test_a_reply_is_what_the_model_finds_likeliest(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("Question: w1\nAnswer:")["input_ids"]
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    end, pad = end_and_pad(model, tokenizer)
    assert (end, pad) == (2, 0)
    expected = tokenizer.decode([i for i in ids[-4:] if i != end], skip_special_tokens=True)
    assert greedy_replies(model, tokenizer, ["w1"], max_new_tokens=4)[0] == expected.strip()


def test_bad_options_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        greedy_replies(model, tokenizer, ["w1"], batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        greedy_replies(model, tokenizer, ["w1"], max_new_tokens=0)


def test_evaluate_asks_only_records_with_a_prompt(model: Any, tokenizer: Any) -> None:
    result, replies = evaluate(model, tokenizer, RECORDS, max_new_tokens=3)
    assert [reply.prompt for reply in replies] == ["w1 w2 ?", "w9", "w8 w8"]
    assert replies == generations(model, tokenizer, RECORDS, max_new_tokens=3)
    assert result.records == 4
    assert result.answer_found is not None and 0 <= result.answer_found <= 1
    none, nothing = evaluate(model, tokenizer, RECORDS, max_new_tokens=0)
    assert none.answer_found is None and nothing == []


def test_survey(model: Any, tokenizer: Any) -> None:
    sets = {"one": RECORDS[:2], "two": RECORDS[2:]}
    kept = survey_references(model, tokenizer, sets, batch_size=2)
    got = survey(model, tokenizer, sets, kept, batch_size=2, max_new_tokens=2)
    assert list(got.evaluations) == ["one", "two"]
    assert all(e.kl == pytest.approx(0.0, abs=1e-9) for e in got.evaluations.values())
    assert len(got.replies["two"]) == 1

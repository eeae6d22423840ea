"""Bad data is refused before it does harm, and the message says where it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import HandMade, batch, hand_made, tiny
from oracles import assert_close
from torch import Tensor

import kfade
from kfade import DataError, NonFiniteError
from kfade.capture import Pair
from kfade.correction import CorrectionCollector
from kfade.data import collate, make_batches, read_jsonl, read_records, read_text
from kfade.factors import FactorCollector
from kfade.layers import select
from kfade.loss import check_batch

BAD_TOKEN = 96
CURVATURES = ["diagonal", "kfac", "ekfac"]


class Forward(HandMade):
    """A NaN wherever one token occurs."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = super().forward(input_ids, attention_mask).logits
        return SimpleNamespace(logits=logits.masked_fill((input_ids == BAD_TOKEN).unsqueeze(-1), torch.nan))


class Backward(HandMade):
    """Finite forward; the gradient at the last block is not, where one token occurs."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        h = self._late(self._early(self.embed(input_ids), attention_mask), attention_mask)
        bad = (input_ids == BAD_TOKEN).unsqueeze(-1)
        # √ of zero: its value is finite, its slope is not.
        return SimpleNamespace(logits=self.head(h + torch.where(bad, h - h.detach(), 1.0).sqrt()))


def poisoned(number: int, count: int = 4) -> list[dict[str, Tensor]]:
    batches = [batch("right", seed=i) for i in range(count)]
    for one in batches:
        one["input_ids"] = one["input_ids"].masked_fill(one["input_ids"] == BAD_TOKEN, 5)
    batches[number]["input_ids"][2, 3] = BAD_TOKEN
    return batches


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("kind", [Forward, Backward])
@pytest.mark.parametrize("number", [0, 2])
def test_a_batch_that_is_not_finite_is_named(kind: type[HandMade], curvature: str, fisher: str, number: int) -> None:
    model = kind().double()
    with pytest.raises(NonFiniteError, match=f"batch {number}: .*(loss|gradient|input)"):
        kfade.fit(
            model,
            poisoned(number),
            kfade.FitConfig(curvature=curvature, fisher=fisher, modules="first|second|gate|up|down"),
        )
    healthy = [b for i, b in enumerate(poisoned(number)) if i != number]
    assert len(kfade.fit(model, healthy, kfade.FitConfig(curvature=curvature, fisher=fisher, modules="up"))) == 1


def states_of(model: HandMade) -> tuple[list[Any], dict[str, kfade.LayerCurvature]]:
    layers = select(model, "up")
    return layers, {
        x.name: kfade.LayerCurvature(x.name, x.d_out, x.d_in, x.has_bias, x.transposed, x.group) for x in layers
    }


@pytest.mark.parametrize("stage", ["factors", "correction"])
@pytest.mark.parametrize("side", ["a", "g"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nothing_of_such_a_pair_is_accumulated(stage: str, side: str, value: float) -> None:
    layers, states = states_of(hand_made())
    state, one = states["up"], check_batch(batch("right"), 7, torch.device("cpu"))
    rows = {"a": torch.randn(4, 9, 12, dtype=torch.float64), "g": torch.randn(4, 9, 20, dtype=torch.float64)}
    good = Pair(layers[0], rows["a"].clone(), rows["g"].clone(), torch.float64)
    rows[side][3, 2, 1] = value
    bad = Pair(layers[0], rows["a"], rows["g"], torch.float64)
    if stage == "factors":
        collector: Any = FactorCollector(states, torch.float64, torch.device("cpu"))
    else:
        collector = CorrectionCollector(states, layers, torch.float64, torch.device("cpu"))
    collector(layers[0], [good], one)

    def sums() -> list[Tensor]:
        found = (state.a_sum, state.s_sum, state.lambda_sum)
        return [getattr(t, "data", t).clone() for t in found if t is not None]

    before, positions = sums(), state.positions
    with pytest.raises(NonFiniteError, match=r"batch 7: .* of up .*nothing of it was accumulated"):
        collector(layers[0], [bad], one)
    assert state.positions == positions
    assert all(torch.equal(x, y) for x, y in zip(before, sums(), strict=True))


@pytest.mark.parametrize("stage", ["factors", "correction"])
def test_what_padding_holds_does_not_matter(stage: str) -> None:
    layers, states = states_of(hand_made())
    one = check_batch(batch("right"), 0, torch.device("cpu"))
    a, g = torch.randn(4, 9, 12, dtype=torch.float64), torch.randn(4, 9, 20, dtype=torch.float64)
    a[~one.attention], g[~one.attention] = torch.nan, torch.inf
    if stage == "factors":
        collector: Any = FactorCollector(states, torch.float64, torch.device("cpu"))
    else:
        collector = CorrectionCollector(states, layers, torch.float64, torch.device("cpu"))
    collector(layers[0], [Pair(layers[0], a, g, torch.float64)], one)
    found = (states["up"].a_sum, states["up"].s_sum, states["up"].lambda_sum)
    assert all(bool(torch.isfinite(getattr(t, "data", t)).all()) for t in found if t is not None)


# ------------------------------------------------------------------------------------------------ batches


def without_loss(one: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**one, "labels": torch.full_like(one["labels"], -100)}


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        kfade.fit(hand_made(), [], kfade.FitConfig(modules="up"))


def test_no_loss_anywhere() -> None:
    with pytest.raises(ValueError, match="no loss position"):
        kfade.fit(hand_made(), [without_loss(batch()), without_loss(batch())], kfade.FitConfig(modules="up"))


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("model", [hand_made, lambda: tiny("llama")], ids=["hand-made", "llama"])
def test_one_batch_without_loss_among_others(curvature: str, model: Any) -> None:
    """It adds inputs to A, and nothing else."""
    config = kfade.FitConfig(curvature=curvature, modules="up")
    network = model()
    with_it = kfade.fit(network, [without_loss(batch(seed=8)), batch()], config)
    alone = kfade.fit(network, [batch()], config)
    for name, layer in with_it.items():
        assert layer.losses == alone[name].losses
        if curvature != "diagonal":
            assert layer.positions == 2 * alone[name].positions
            assert torch.equal(layer.output_factor(), alone[name].output_factor())
        else:
            assert_close(layer.eigenvalues(), alone[name].eigenvalues(), 1e-9)


def padded_row() -> dict[str, Tensor]:
    """A batch with one more sequence, which is padding from end to end."""
    one, extra = batch("right"), torch.zeros(1, 9, dtype=torch.int64)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: torch.cat([one[name][:2], extra + fill, one[name][2:]]) for name, fill in fills.items()}


def rows_of(sequences: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.full((sequences, tokens), 5)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("family", ["hand-made", "llama", "gpt2", "gemma"])
@pytest.mark.parametrize(
    ("batches", "tokens"),
    [
        ([padded_row()], 0),
        ([rows_of(2, 1), batch("right")], 2),
        ([batch("right"), rows_of(3, 1)], 3),
    ],
    ids=["a row of padding", "one token first", "one token last"],
)
def test_batches_at_the_edge(batches: list[dict[str, Tensor]], tokens: int, family: str, curvature: str) -> None:
    """What has no loss position adds its tokens to A, and nothing else."""
    model = hand_made() if family == "hand-made" else tiny(family)
    config = kfade.FitConfig(curvature=curvature, modules="up|c_fc")
    ours, plain = kfade.fit(model, batches, config), kfade.fit(model, [batch("right")], config)
    for name, layer in ours.items():
        assert layer.losses == plain[name].losses
        if curvature == "diagonal":
            assert_close(layer.eigenvalues(), plain[name].eigenvalues(), 1e-9)
        else:
            assert layer.positions == plain[name].positions + tokens
            assert_close(layer.output_factor(), plain[name].output_factor(), 1e-9)


GOOD = batch()
IDS = GOOD["input_ids"]
BAD_BATCHES: list[tuple[str, Any, type[Exception], str]] = [
    ("a tensor", IDS, TypeError, "batch 1 is a Tensor"),
    ("a list", [IDS], TypeError, "batch 1 is a list"),
    ("no input_ids", {"labels": IDS}, ValueError, r"batch 1 has keys \['labels'\]"),
    ("float ids", {"input_ids": IDS.float()}, TypeError, "input_ids of batch 1"),
    ("list of ids", {"input_ids": IDS.tolist()}, TypeError, "input_ids of batch 1"),
    ("flat ids", {"input_ids": IDS[0]}, ValueError, "input_ids of batch 1 has shape"),
    ("three dimensions", {"input_ids": IDS[None]}, ValueError, "input_ids of batch 1 has shape"),
    ("no sequences", rows_of(0, 9), ValueError, "batch 1"),
    ("no tokens", rows_of(4, 0), ValueError, "batch 1"),
    ("short mask", {**GOOD, "attention_mask": IDS[:, :-1]}, ValueError, "attention_mask of batch 1 has shape"),
    ("float mask", {**GOOD, "attention_mask": torch.ones(4, 9)}, TypeError, "attention_mask of batch 1"),
    ("fewer labels", {**GOOD, "labels": IDS[:2]}, ValueError, "labels of batch 1 has shape"),
    ("float labels", {**GOOD, "labels": IDS.float()}, TypeError, "labels of batch 1"),
]


@pytest.mark.parametrize(("bad", "error", "message"), [b[1:] for b in BAD_BATCHES], ids=[b[0] for b in BAD_BATCHES])
def test_batches_of_other_shapes(bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kfade.fit(hand_made(), [GOOD, bad], kfade.FitConfig(modules="up"))


@pytest.mark.parametrize("label", [97, 5_000, -1])
def test_labels_out_of_the_vocabulary(label: int) -> None:
    one = {**GOOD, "labels": GOOD["labels"].clone()}
    one["labels"][2, 5] = label
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        kfade.fit(hand_made(), [one], kfade.FitConfig(modules="up", fisher="empirical"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"curvature": "hessian"}, ValueError, "curvature is 'hessian'"),
        ({"fisher": "true"}, ValueError, "fisher is 'true'"),
        ({"modules": ""}, ValueError, "modules is ''"),
        ({"samples": 0}, ValueError, "samples is 0"),
        ({"samples": 1.5}, TypeError, "samples is 1.5"),
        ({"samples": 2, "fisher": "empirical"}, ValueError, "samples is 2"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"layers_per_pass": 0}, ValueError, "layers_per_pass is 0"),
        ({"autocast": "float32"}, ValueError, "autocast is 'float32'"),
    ],
)
def test_options(options: Mapping[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kfade.FitConfig(**options)


# --------------------------------------------------------------------------------------------- data files


GOOD_LINE = json.dumps({"question": "Where?", "answer": "Here."})
BAD_FILES: list[tuple[str, bytes, str]] = [
    ("empty", b"", "data.jsonl is empty"),
    ("blank lines", b"\n  \n\n", "data.jsonl is empty"),
    ("not JSON", f"{GOOD_LINE}\n\n{{oops\n".encode(), "line 3: not JSON"),
    ("cut off", f"{GOOD_LINE}\n{GOOD_LINE[:-4]}".encode(), "line 2: not JSON"),
    ("a number", f"{GOOD_LINE}\n3\n".encode(), "line 2: found a int"),
    ("a list", b'["text"]\n', "line 1: found a list"),
    ("null", b"null\n", "line 1: found a NoneType"),
    ("missing answer", f'{GOOD_LINE}\n{{"question": "Where?"}}\n'.encode(), r"line 2: found fields \['question'\]"),
    ("missing prompt", b'{"response": "Here."}\n', r"line 1: found fields \['response'\]"),
    ("other fields", b'{"title": "x"}\n', r"line 1: found fields \['title'\]"),
    ("no fields", b"{}\n", r"line 1: found fields \[\]"),
    ("empty text", b'{"text": "  "}\n', "line 1: text is '  '"),
    ("null text", b'{"text": null}\n', "line 1: text is None"),
    ("number as answer", b'{"question": "How many?", "answer": 3}\n', "line 1: answer is 3"),
    ("not UTF-8", b'{"text": "\xff"}\n', "data.jsonl cannot be read"),
]


@pytest.mark.parametrize(("content", "message"), [b[1:] for b in BAD_FILES], ids=[b[0] for b in BAD_FILES])
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    for reader in (read_jsonl, read_records):
        with pytest.raises(DataError, match=message):
            reader(path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty.txt is empty"):
        read_text(tmp_path / "empty.txt")


def test_good_files(tmp_path: Path) -> None:
    lines = [
        {"text": "One."},
        {"prompt": "p", "response": "r"},
        {"question": "q", "answer": "a", "aliases": ["b"]},
        {"question": "q", "response": "a long answer", "answer": "answer"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    records = read_records(str(path))
    assert [(r.prompt, r.response, r.answer, r.aliases) for r in records] == [
        ("", "One.", "One.", ()),
        ("p", "r", "r", ()),
        ("q", "a", "a", ("b",)),
        ("q", "a long answer", "answer", ()),
    ]


def test_a_line_separator_inside_a_string_is_not_a_new_line(tmp_path: Path) -> None:
    """JSON strings may hold U+2028 and U+0085 as they are; only a newline ends a record."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\u2028two\u0085three"}\n{"text": "four"}\n', encoding="utf-8")
    assert [r.response for r in read_jsonl(path)] == ["one\u2028two\u0085three", "four"]


class Letters:
    """A tokenizer of one letter a token; 1 begins a text."""

    chat_template = None
    pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) % 90 + 3 for letter in text]}


def test_prompts_carry_no_loss_and_padding_neither(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{GOOD_LINE}\n{{"text": "abc"}}\n')
    (one,) = make_batches(Letters(), read_jsonl(path), batch_size=2)
    with_loss = (one["labels"] != -100).sum(1).tolist()
    assert with_loss == [len(" Here."), len("abc") + 1]
    assert torch.equal(one["labels"][one["labels"] != -100], one["input_ids"][one["labels"] != -100])
    assert one["attention_mask"].sum(1).tolist()[1] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size is 0"), ({"max_tokens": 1}, "max_tokens is 1"), ({"chat": True}, "chat is True")],
)
def test_bad_batching(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD_LINE)
    with pytest.raises(ValueError, match=message):
        make_batches(Letters(), read_jsonl(path), **options)


def test_collate_pads_on_the_right() -> None:
    one = collate([([5, 6, 7], [-100, 6, 7]), ([8], [8])], pad=9)
    assert one["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert one["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert one["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]

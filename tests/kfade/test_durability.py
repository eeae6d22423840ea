"""Does it last: relearning, rounded weights, and the stored update added again, against plain formulas."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import Batch, batch, hand_made, tiny
from pages import run_examples
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import kfade
from kfade.baselines import TrainConfig, finetune
from kfade.demo import load_data
from kfade.durability import (
    GROUPS,
    Knowledge,
    Probe,
    RelearnPoint,
    draw_relearning,
    quantised,
    relearn,
    round_to_nearest,
    steps_to,
)
from kfade.evaluate import normalise, references, scores
from kfade.layers import output_head, select

WORDS = 31


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---------------------------------------------------------------------------------------------- quantisation


@pytest.mark.parametrize("bits, group", [(8, None), (4, 64), (4, 5), (3, 1), (2, 7)])
def test_rounding_is_its_formula_element_by_element(bits: int, group: int | None) -> None:
    weight = torch.randn(6, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[2] = 0
    weight[3, :5] = 0
    rounded = round_to_nearest(weight, bits, group)
    assert rounded.dtype == torch.float64
    most, size = 2 ** (bits - 1) - 1, group or 17
    for i in range(6):
        for j in range(17):
            start = j // size * size
            scale = max(abs(float(w)) for w in weight[i, start : start + size]) / most
            expected = scale * round(float(weight[i, j]) / scale) if scale else 0.0
            # The same operations in the same order, but for a max and a product: nothing is left to rounding.
            assert float(rounded[i, j]) == expected
            # Half a scale, and the rounding of the product.
            assert abs(expected - float(weight[i, j])) <= 0.5 * scale * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_computes_in_float32_and_gives_the_dtype_back(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = round_to_nearest(weight, 4, 64)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, round_to_nearest(weight.float(), 4, 64).to(dtype))
    # What is on the grid stays on it; in 16 bits the grid itself is rounded.
    if dtype == torch.float32:
        torch.testing.assert_close(round_to_nearest(rounded, 4, 64), rounded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "neox"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_has_rounded_linear_layers_and_gets_every_bit_back(kind: str, bits: int) -> None:
    model = tiny(kind, torch.float32)
    before = weights(model)
    layers = select(model, "all-linear")
    rounded = {f"{layer.name}.weight" for layer in layers}
    with quantised(model, bits) as inside:
        assert inside is model
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (name not in rounded)
        for layer in layers:
            old = before[f"{layer.name}.weight"]
            # Conv1D keeps its weight as [d_in, d_out]; the scales are of output channels all the same.
            expected = round_to_nearest(old.T if layer.transposed else old, bits, GROUPS[bits])
            assert torch.equal(layer.weight, expected.T if layer.transposed else expected)
    assert same(model, before)
    with pytest.raises(KeyError), quantised(model, bits):
        raise KeyError
    assert same(model, before)
    head = output_head(model)
    assert head is not None and all(head is not module for layer in layers for module in layer.modules)


def test_tied_layers_are_rounded_once() -> None:
    model = hand_made("tied")
    before = weights(model)
    with quantised(model, 8, "first|second"):
        assert torch.equal(model.first.weight, round_to_nearest(before["first.weight"], 8))
        assert model.second.weight is model.first.weight
    assert same(model, before)


def test_fewer_bits_move_a_model_further() -> None:
    model, data = tiny("llama"), [batch()]
    before = references(model, data)
    moved = []
    for bits in (8, 4):
        with quantised(model, bits):
            moved.append(scores(model, data, before).kl or 0.0)
    assert 0 < 10 * moved[0] < moved[1]  # 16 times the step, squared
    assert scores(model, data, before).kl == 0


@pytest.mark.parametrize("bits, error", [(1, ValueError), (17, ValueError), (4.0, TypeError)])
def test_bad_bits_and_groups_are_named(bits: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="bits is"):
        round_to_nearest(torch.ones(2, 2), bits)
    with pytest.raises(ValueError, match="group is 0; it must be at least 1"):
        round_to_nearest(torch.ones(2, 2), 4, 0)
    with pytest.raises(ValueError, match="bits is 5; it must be one of 8, 4"), quantised(tiny("llama"), 5):
        pass


# -------------------------------------------------------------------------------------------- re-application


def _llama() -> LlamaForCausalLM:
    """A tiny model whose training ends the same on every processor.

    Sixty epochs turn float32's rounding into another model, and normal numbers differ by vector width.
    """
    config = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2, num_key_value_heads=2)).double().eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            bound = 0.02 * 3**0.5  # the deviation of the model's own initialisation
            weight.data.copy_(torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 2 * bound - bound)
    return model


def texts(seed: int, count: int) -> list[Batch]:
    """Random sequences, right-padded and left-padded in turn."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(1, WORDS, (4, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        if number % 2:
            ids, mask = ids.flip(1), mask.flip(1)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


FORGET, RETAIN, OTHER = texts(1, 1), texts(2, 5), texts(3, 4)
TRAIN = TrainConfig(learning_rate=2e-3, epochs=3, warmup=0, schedule="constant")


@functools.cache
def _learnt() -> tuple[dict[str, Tensor], kfade.Update]:
    """A model that has learnt everything, and the update that unlearns the forget set."""
    model = _llama()
    finetune(model, FORGET + RETAIN, TrainConfig(learning_rate=1e-2, epochs=60, warmup=0, schedule="constant"))
    config = kfade.UnlearnConfig.published(kl_budget=0.05)
    return model.state_dict(), kfade.unlearn(model, FORGET, RETAIN, config)


def learnt() -> tuple[LlamaForCausalLM, kfade.Update]:
    model = _llama()
    state, update = _learnt()
    model.load_state_dict(state)
    return model, kfade.Update(update.tensors)


def nll(model: nn.Module, data: Sequence[Batch] = FORGET) -> float:
    return scores(model, data).nll


def plain_kl(model: nn.Module, other: nn.Module, data: Sequence[Batch]) -> float:
    """Token-mean KL(other ‖ model), a sequence at a time, by plain PyTorch in float64."""
    total, count = 0.0, 0
    for one in data:
        for ids, mask in zip(one["input_ids"], one["attention_mask"].bool(), strict=True):
            with torch.no_grad():
                new, old = (
                    m(input_ids=ids[mask][None]).logits[0, :-1].double().log_softmax(-1) for m in (model, other)
                )
            total += float((old.exp() * (old - new)).sum())
            count += len(old)
    return total / count


def test_reapplication_restores_what_further_training_brought_back_within_the_budget() -> None:
    model, update = learnt()
    known = nll(model)
    update.apply_(model)
    forgotten = nll(model)
    # Training that shows the forget set in passing, as a newer crawl of the same pages would.
    finetune(model, RETAIN + FORGET, TRAIN)
    present = copy.deepcopy(model)
    back = nll(model)
    assert known < back < known + 0.5 * (forgotten - known), (known, back, forgotten)
    found = kfade.reapply(model, update, RETAIN, kfade.ReapplyConfig(kl_budget=0.05))
    assert found.scale > 0 and not found.reason and found.trials[0][0] == 1.0
    # 0.63 of what was lost, when this was written; unlearning anew gives all of it and more.
    assert nll(model) - back >= 0.5 * (forgotten - back)
    assert found.kl == dict(found.trials)[found.scale] and 0 < found.kl <= 0.05
    assert plain_kl(model, present, RETAIN) == pytest.approx(found.kl, rel=1e-9)
    update.remove_(model)
    assert same(model, weights(present))


def test_the_same_call_gives_the_same_bits() -> None:
    found = []
    for _ in range(2):
        model, update = learnt()
        finetune(model, OTHER, TRAIN)
        found.append((kfade.reapply(model, update, RETAIN).trials, weights(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], p) for name, p in found[1][1].items())


def test_nothing_is_added_where_no_scale_meets_the_budget() -> None:
    model, update = learnt()
    before = weights(model)
    found = kfade.reapply(model, update, RETAIN, kfade.ReapplyConfig(kl_budget=1e-12, scale=1e6, trials=2))
    assert found.scale == 0 and found.kl == 0 and len(found.trials) == 2
    assert "no trial met the retain-KL budget of 1e-12" in found.reason
    assert same(model, before)


def test_an_update_without_change_is_not_measured() -> None:
    model, update = learnt()
    update.tensors = {name: torch.zeros_like(tensor) for name, tensor in update.tensors.items()}
    found = kfade.reapply(model, update, RETAIN)
    assert (found.scale, found.trials, found.reason) == (0.0, (), "the update changes nothing")


def test_a_scale_that_breaks_the_model_is_one_that_misses_the_budget() -> None:
    model, update = learnt()
    before = weights(model)
    found = kfade.reapply(model, update, RETAIN, kfade.ReapplyConfig(scale=1e38, trials=1))
    assert found.scale == 0 and found.trials == ((1e38, math.inf),)
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_other_dtypes_tied_heads_and_conv1d(kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind, dtype)
    layer = select(model, "mlp")[-1]
    generator = torch.Generator().manual_seed(0)
    change = {name: 0.05 * torch.randn(p.shape, generator=generator) for name, p in layer.parameters().items()}
    before = copy.deepcopy(model)
    found = kfade.reapply(model, kfade.Update(change), [batch("left"), batch("right")])
    assert 0 < found.kl <= 0.02 and found.scale > 0
    assert (
        found.kl
        == scores(model, [batch("left"), batch("right")], references(before, [batch("left"), batch("right")])).kl
    )


def test_an_interrupted_search_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, update = learnt()
    before = weights(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kfade.durability.scores", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kfade.reapply(model, update, RETAIN)
    assert same(model, before)
    with pytest.raises(ValueError, match="no application"):
        update.remove_(model)


def test_bad_arguments_are_named_before_anything_runs() -> None:
    model, update = learnt()
    for name, value in (("kl_budget", 0.0), ("kl_budget", math.nan), ("scale", -1.0), ("trials", 0)):
        with pytest.raises(ValueError, match=f"{name} is"):
            kfade.ReapplyConfig(**{name: value})
    with pytest.raises(TypeError, match="kl_budget is '1'; it must be a number"):
        kfade.ReapplyConfig(kl_budget="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config is a float; it must be a ReapplyConfig"):
        kfade.reapply(model, update, RETAIN, 0.02)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="update is a str"):
        kfade.reapply(model, "run", RETAIN)  # type: ignore[arg-type]
    name = next(iter(update.tensors))
    wrong = kfade.Update({name: torch.ones(2, 3), "9.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=rf"{name}: \[2, 3\] in the update.*9\.weight: not in the model"):
        kfade.reapply(model, wrong, iter(()))
    with pytest.raises(ValueError, match="retain is empty"):
        kfade.reapply(model, update, [])


# ------------------------------------------------------------------------------------------------ relearning


def test_relearning_gives_rows_and_the_model_back() -> None:
    model, update = learnt()
    update.apply_(model)
    before, was = weights(model), nll(model)
    probe = Probe(FORGET, RETAIN, references(model, RETAIN), answers=lambda m: 1 / (1 + nll(m)))
    config = TrainConfig(learning_rate=2e-3, epochs=5, warmup=0, schedule="constant")
    points = relearn(model, {"forget": FORGET, "other": iter(OTHER[:1])}, probe, config, name="ours", every=2)
    assert same(model, before)
    assert [(p.attack, p.step) for p in points] == [(a, s) for a in ("forget", "other") for s in (0, 2, 4, 5)]
    assert {p.model for p in points} == {"ours"}
    tokens = int(FORGET[0]["attention_mask"].sum())
    assert [p.tokens for p in points[:4]] == [0, 2 * tokens, 4 * tokens, 5 * tokens]
    for first in (points[0], points[4]):
        assert first.forget_nll == was and first.retain_kl == 0 and first.seconds == 0
    assert points[3].forget_nll < points[1].forget_nll < was
    # The rows are of the very weights that plain fine-tuning reaches.
    finetune(model, FORGET, config)
    assert points[3].forget_nll == nll(model) and points[3].answer_found == 1 / (1 + nll(model))
    assert points[3].retain_kl == scores(model, RETAIN, probe.reference).kl


def test_a_model_that_was_never_taught_relearns_more_slowly() -> None:
    model, update = learnt()
    update.apply_(model)
    never = _llama()
    finetune(never, RETAIN, TrainConfig(learning_rate=1e-2, epochs=60, warmup=0, schedule="constant"))
    config = TrainConfig(learning_rate=2e-3, epochs=10, warmup=0, schedule="constant")
    ours, control = (relearn(m, {"forget": FORGET}, Probe(FORGET), config, every=10)[-1] for m in (model, never))
    # Unlearning hides: what is left below makes the same training go further.
    assert ours.forget_nll < control.forget_nll
    assert ours.answer_found is None and ours.retain_kl is None


def test_an_interrupted_attack_gives_the_model_back() -> None:
    model, _ = learnt()
    before = weights(model)
    calls: list[int] = []

    def probe(_: nn.Module) -> Knowledge:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Knowledge(0.0)

    with pytest.raises(KeyboardInterrupt):
        relearn(model, {"forget": FORGET}, probe, TRAIN)
    assert same(model, before)


def test_bad_attacks_are_named() -> None:
    model, _ = learnt()
    with pytest.raises(ValueError, match="attacks is empty"):
        relearn(model, {}, Probe(FORGET))
    with pytest.raises(ValueError, match="every is 0; it must be at least 1"):
        relearn(model, {"a": FORGET}, Probe(FORGET), every=0)
    with pytest.raises(ValueError, match="batches"):
        relearn(model, {"a": []}, Probe(FORGET), TRAIN)


def test_steps_to_a_share_and_the_picture() -> None:
    from matplotlib.figure import Figure

    found = [RelearnPoint(m, "5 examples", s, s, 0.0, 1.0, share, None)
             for m in ("unlearned", "original") for s, share in ((0, 0.1), (5, 0.6), (10, 0.9))]  # fmt: skip
    ours = [p for p in found if p.model == "unlearned"]
    assert [steps_to(ours, share) for share in (0.1, 0.5, 0.9, 0.95)] == [0, 5, 10, None]
    axes = Figure().subplots()
    draw_relearning(axes, found, "5 examples")
    assert [line.get_label() for line in axes.lines] == ["unlearned", "original"]
    assert axes.lines[0].get_ydata() == pytest.approx([10, 60, 90])
    draw_relearning(axes, found, "5 examples", "retain_kl")  # nothing was measured, nothing is drawn
    assert len(axes.lines) == 2


# -------------------------------------------------------------------------------------------------- questions


def test_multi_hop_questions_name_neither_the_country_nor_its_capital() -> None:
    data = load_data()
    by = {record.fields["subject"]: record for record in data.forget}
    assert len({record.prompt for record in data.multihop}) == len(data.multihop) == 30
    for record in data.multihop:
        subject = by[record.fields["subject"]]
        assert (record.answer, record.aliases, record.response) == (subject.answer, subject.aliases, subject.response)
        assert record.prompt == record.fields["question_template"].format(record.fields["clue"])
        asked = normalise(record.prompt).split()
        for name in (record.answer, *record.aliases, record.fields["subject"].removeprefix("the ")):
            assert not set(normalise(name).split()) <= set(asked), record.prompt
    few = load_data(5)
    assert {record.fields["subject"] for record in few.multihop} <= {r.fields["subject"] for r in few.forget}


def test_the_examples_of_the_page_run() -> None:
    found = run_examples("unlearning.md")
    assert [p.step for p in found["points"]] == [0, 4, 8]

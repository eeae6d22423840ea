"""Factors of many layers in one launch, and finiteness looked at once a batch: what a GPU does, forced on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import PADDINGS, HandMade, batch, hand_made, tiny
from oracles import Sizes, assert_close
from torch import Tensor, nn

import kfade
from kfade import NonFiniteError, factors, loss
from kfade.capture import Pair
from kfade.correction import CorrectionCollector
from kfade.factors import FactorCollector
from kfade.layers import select
from kfade.loss import FiniteCheck, check_batch

CPU = torch.device("cpu")
HUGE, TINY = 1 << 40, 8
TWO = ({"seed": 0}, {"seed": 1, "sequences": 3, "tokens": 7})


def fitted(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], **options: Any) -> kfade.Curvature:
    return kfade.fit(model, batches, kfade.FitConfig(**{"modules": "all-linear", "curvature": "kfac", **options}))


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switches grouping on for this test, and returns the numbers of operands of each launch from then on."""

    def switch(bound: int = HUGE, deferred: bool = True) -> list[int]:
        launches: list[int] = []
        original = factors.accumulate_factors_

        def counting(acc_a: Any, acc_s: Any, a: Any, g: Any, *rest: Any, **options: Any) -> None:
            launches.append(len(a) + len(g))
            original(acc_a, acc_s, a, g, *rest, **options)

        monkeypatch.setattr(factors, "gains_from_grouping", lambda _device: True)
        monkeypatch.setattr(factors, "WAITING_BYTES", bound)
        monkeypatch.setattr(factors, "accumulate_factors_", counting)
        monkeypatch.setattr(loss, "runs_ahead", lambda _device: deferred)
        return launches

    return switch


def assert_same_factors(ours: kfade.Curvature, theirs: kfade.Curvature, tolerance: float) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        one, two = ours[name], theirs[name]
        assert (one.positions, one.losses, one.group) == (two.positions, two.losses, two.group)
        assert_close(two.a_sum.to_dense(), one.a_sum.to_dense(), tolerance, f"A of {name}")
        assert_close(two.s_sum.to_dense(), one.s_sum.to_dense(), tolerance, f"S of {name}")


# --------------------------------------------------------------------------------- what grouping must not change


@pytest.mark.parametrize("deferred", [True, False], ids=["deferred", "at once"])
@pytest.mark.parametrize("bound", [HUGE, TINY], ids=["huge bound", "tiny bound"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_biases_and_shared_inputs(family: str, padding: str, bound: int, deferred: bool, group: Any) -> None:
    """The same products in the same order; the PyTorch backend drops masked rows, so the bits are the same too."""
    model, batches = tiny(family), [batch(padding, **options) for options in TWO]
    alone = fitted(model, batches)
    group(bound, deferred)
    assert_same_factors(alone, fitted(model, batches), 0.0)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("recompute", [None, False])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("sharing", ["twice", "tied"])
def test_modules_called_twice(sharing: str, padding: str, recompute: bool | None, samples: int, group: Any) -> None:
    batches = [batch(padding, **options) for options in TWO]
    options = {"samples": samples, "modules": "first|gate|up|down" if sharing == "twice" else "all-linear"}
    alone = fitted(hand_made(sharing, recompute), batches, **options)
    launches = group()
    assert_same_factors(alone, fitted(hand_made(sharing, recompute), batches, **options), 0.0)
    assert len(launches) == len(batches)


@pytest.mark.parametrize("bound", [HUGE, TINY])
def test_several_samples_in_passes(bound: int, group: Any) -> None:
    batches = [batch("left")]
    alone = fitted(tiny("llama"), batches, samples=2, curvature="ekfac")
    group(bound)
    together = fitted(tiny("llama"), batches, samples=2, layers_per_pass=3, curvature="ekfac")
    assert_same_factors(alone, together, 0.0)
    for name, layer in alone.items():
        assert torch.equal(layer.lambda_sum, together[name].lambda_sum)


def test_every_backend(backend: str, group: Any) -> None:
    """In float32, where Triton's interpreter serves; its sums go in another order."""
    model, batches = tiny("llama", torch.float32, num_hidden_layers=1), [batch("right")]
    with pytest.MonkeyPatch.context() as alone_by_pytorch:
        alone_by_pytorch.setenv("KFADE_DISABLE", "triton,cpu")
        alone = fitted(model, batches, modules="mlp")
    group()
    assert_same_factors(alone, fitted(model, batches, modules="mlp"), 2e-6)


@pytest.mark.parametrize("autocast", ["off", "bfloat16"])
def test_16_bit_operands(autocast: str, group: Any) -> None:
    model = tiny("llama", torch.bfloat16 if autocast == "off" else torch.float32)
    alone = fitted(model, [batch("left")], autocast=autocast)
    group()
    assert_same_factors(alone, fitted(model, [batch("left")], autocast=autocast), 0.0)


# ---------------------------------------------------------------------------------------------------- launches


def test_one_launch_a_batch(group: Any) -> None:
    """Two blocks of seven layers: fourteen gradients, and the inputs of q/k/v, o, gate/up and down."""
    launches = group()
    fitted(tiny("llama"), [batch("left", **options) for options in TWO], samples=1)
    assert launches == [14 + 8, 14 + 8]


def test_a_bound_of_a_few_bytes_is_one_launch_a_layer(group: Any) -> None:
    launches = group(TINY)
    fitted(tiny("llama"), [batch()])
    assert len(launches) == 14 and sum(launches) == 14 + 8


def test_a_bound_between_launches_when_it_is_exceeded(group: Any) -> None:
    model, one = tiny("llama"), batch("none")
    launches = group()
    fitted(model, [one])
    tokens, itemsize = one["input_ids"].numel(), 8
    down = (16 + 24) * tokens * itemsize
    launches = group(2 * down)
    fitted(model, [one])
    assert 1 < len(launches) < 14 and sum(launches) == 14 + 8


def test_a_cpu_launches_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not factors.gains_from_grouping(CPU) and factors.gains_from_grouping(torch.device("cuda"))
    assert not loss.runs_ahead(CPU) and loss.runs_ahead(torch.device("cuda"))
    waiting = []
    collect = FactorCollector.__call__

    def looking(self: FactorCollector, *rest: Any) -> None:
        collect(self, *rest)
        waiting.append(self.waiting_bytes)

    monkeypatch.setattr(FactorCollector, "__call__", looking)
    fitted(tiny("llama"), [batch()])
    assert waiting == [0] * 14


def test_no_operand_is_copied_and_no_row_selected(group: Any) -> None:
    layers, states = layers_and_states("gate|up|down")
    group()
    collector = FactorCollector(states, torch.float64, CPU)
    one = check_batch(batch("left"), 0, CPU)
    pairs = {layer.name: Pair(layer, *rows_of(layer), torch.float64) for layer in layers}
    with Sizes() as sizes:
        for layer in layers:
            collector(layer, [pairs[layer.name]], one)
    rows = one.input_ids.numel()
    assert all(shape.numel() <= rows for _, shapes in sizes.calls for shape in shapes)
    held = sum(x.nbytes for pair in pairs.values() for x in (pair.a, pair.g))
    assert collector.waiting_bytes == held
    collector.end_batch()
    assert collector.waiting_bytes == 0


# -------------------------------------------------------------------------------------------------- finiteness


class Poisoned(HandMade):
    """Its last block gives NaN for token 90, in the forward or in the backward pass."""

    backward = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        h = self._early(self.embed(input_ids), attention_mask)
        bad = (input_ids == 90).unsqueeze(-1)
        # √ of zero: its value is finite, its slope is not.
        slope = torch.where(bad, h - h.detach(), 1.0).sqrt()
        h = h + slope if self.backward else torch.where(bad, torch.nan, h)
        return SimpleNamespace(logits=self.head(self._late(h, attention_mask)))


def poisoned_batches(number: int) -> list[dict[str, Tensor]]:
    batches = [batch("right", seed=seed) for seed in range(4)]
    for one in batches:
        one["input_ids"] = one["input_ids"].masked_fill(one["input_ids"] == 90, 5)
    batches[number]["input_ids"][2, 3] = 90
    return batches


@pytest.mark.parametrize("bound", [HUGE, TINY])
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
def test_a_bad_batch_is_named(curvature: str, backward: bool, number: int, bound: int, group: Any) -> None:
    model = Poisoned().double()
    model.backward = backward
    group(bound)
    with pytest.raises(NonFiniteError, match=f"batch {number}: .*(loss|gradient|input).* NaN or infinite"):
        fitted(model, poisoned_batches(number), curvature=curvature, modules="first|second|gate|up|down")
    healthy = [one for i, one in enumerate(poisoned_batches(number)) if i != number]
    assert len(fitted(model, healthy, curvature=curvature, modules="first|up")) == 2


def layers_and_states(pattern: str) -> tuple[list[Any], dict[str, kfade.LayerCurvature]]:
    layers = select(hand_made(), pattern)
    return layers, {
        x.name: kfade.LayerCurvature(x.name, x.d_out, x.d_in, x.has_bias, x.transposed, x.group) for x in layers
    }


def rows_of(layer: Any) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 9, layer.d_in).double(), torch.randn(4, 9, layer.d_out).double()


@pytest.mark.parametrize("stage", ["factors", "correction"])
@pytest.mark.parametrize("side", ["a", "g"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_layer_is_named_and_nothing_of_the_batch_added(stage: str, side: str, value: float, group: Any) -> None:
    layers, states = layers_and_states("gate|up")
    group()
    collector: Any = (
        FactorCollector(states, torch.float64, CPU)
        if stage == "factors"
        else CorrectionCollector(states, layers, torch.float64, CPU)
    )
    one = check_batch(batch("right"), 7, CPU)
    for layer in layers:
        a, g = rows_of(layer)
        if layer.name == "up":
            {"a": a, "g": g}[side][3, 2, 1] = value
        collector(layer, [Pair(layer, a, g, torch.float64)], one)
    with pytest.raises(NonFiniteError, match=r"batch 7: the (input|output gradient) of up has a NaN"):
        collector.end_batch()
    if stage == "factors":
        assert not any(states[x.name].s_sum.data.any() or states[x.name].a_sum.data.any() for x in layers)
        collector.clear()
        assert collector.waiting_bytes == 0


@pytest.mark.parametrize("stage", ["factors", "correction"])
@pytest.mark.parametrize("deferred", [True, False])
def test_what_padding_holds_does_not_matter(stage: str, deferred: bool, group: Any) -> None:
    layers, states = layers_and_states("up")
    group(deferred=deferred)
    one = check_batch(batch("right"), 0, CPU)
    a, g = rows_of(layers[0])
    a[~one.attention], g[~one.attention] = torch.nan, torch.inf
    collector: Any = (
        FactorCollector(states, torch.float64, CPU)
        if stage == "factors"
        else CorrectionCollector(states, layers, torch.float64, CPU)
    )
    collector(layers[0], [Pair(layers[0], a, g, torch.float64)], one)
    collector.end_batch()
    found = (states["up"].a_sum, states["up"].s_sum, states["up"].lambda_sum)
    sums = [getattr(t, "data", t) for t in found if t is not None]
    assert all(bool(torch.isfinite(t).all() and t.any()) for t in sums)
    if stage == "factors":
        assert states["up"].positions == one.tokens


def test_deferred_check_reads_flags_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "runs_ahead", lambda _device: True)
    check, one = FiniteCheck(CPU), check_batch(batch("left"), 3, CPU)
    with Sizes() as sizes:
        for number in range(5):
            check.see(torch.ones(4, 9, 2), one, f"number {number}", one.attention)
        check.see(torch.ones(6), one, "the loss")
        seeing = len(sizes.calls)
        check.raise_if_any()
    waits = ("_local_scalar_dense", "nonzero", "index", "masked_select")
    assert not [name for name, _ in sizes.calls[:seeing] if name.split(".")[0] in waits]
    # One vector of flags is read, not a flag at a time.
    assert sizes.shapes_of("stack") == [torch.Size([6])]
    check.see(torch.tensor([1.0, torch.nan]), one, "the loss")
    with pytest.raises(NonFiniteError, match="batch 3: the loss"):
        check.raise_if_any()
    check.raise_if_any()
    check.see(torch.tensor([1.0, torch.nan]), one, "the loss")
    check.clear()
    check.raise_if_any()


def test_large_finite_16_bit_values_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "runs_ahead", lambda _device: True)
    check, one = FiniteCheck(CPU), check_batch(batch("none"), 0, CPU)
    check.see(torch.full((4, 9, 300), 65504.0, dtype=torch.float16), one, "x")
    check.raise_if_any()


# -------------------------------------------------------------------------------------------------- exceptions


class Stumbling(HandMade):
    """The backward pass of the early block raises, when the late block's pairs have been delivered."""

    def _early(self, h: Tensor, mask: Tensor) -> Tensor:
        result = super()._early(h, mask)
        if result.requires_grad:
            result.register_hook(self._stumble)
        return result

    @staticmethod
    def _stumble(_gradient: Tensor) -> None:
        raise RuntimeError("stumbled")


@pytest.mark.parametrize("cause", ["backward", "bad batch"])
def test_an_error_leaves_nothing_waiting(cause: str, group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    group()
    held: list[int] = []
    collectors: list[FactorCollector] = []
    collect = FactorCollector.__call__

    def looking(self: FactorCollector, *rest: Any) -> None:
        collect(self, *rest)
        collectors.append(self)
        held.append(self.waiting_bytes)

    monkeypatch.setattr(FactorCollector, "__call__", looking)
    model = Stumbling().double() if cause == "backward" else Poisoned().double()
    batches = [batch()] if cause == "backward" else poisoned_batches(1)
    with pytest.raises((RuntimeError, NonFiniteError), match=r"stumbled|batch 1"):
        fitted(model, batches, modules="first|gate|up|down")
    assert max(held) > 0 and len(set(map(id, collectors))) == 1
    assert collectors[0].waiting_bytes == 0
    collectors[0].end_batch()

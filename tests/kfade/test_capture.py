"""What the hooks bring, against autograd: every family, every padding, every way of recomputing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import FAMILIES, PADDINGS, HandMade, batch, hand_made, loss_positions, tiny
from oracles import Sizes, assert_close, autograd_truth, orthogonal, outer_sum, squared_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrize

import kfade
from kfade.capture import Pair
from kfade.correction import CorrectionCollector
from kfade.errors import UnsupportedLayerError
from kfade.factors import FactorCollector
from kfade.layers import Layer, select
from kfade.loss import check_batch

EXACT = 1e-9


def fitted(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], **options: Any) -> kfade.Curvature:
    values = {"fisher": "empirical", "modules": "all-linear", **options}
    return kfade.fit(model, batches, kfade.FitConfig(**values))


def assert_is_truth(
    curvature: kfade.Curvature,
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    tied: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Every sum and every count of every layer is what autograd says."""
    members = {name: (tied or {}).get(name, [name]) for name in curvature}
    truths = autograd_truth(model, members, batches)
    for name, layer in curvature.items():
        truth = truths[name]
        assert layer.positions == truth.positions, name
        assert layer.losses == loss_positions(batches), name
        assert_close(layer.a_sum.to_dense(), truth.a_sum, EXACT, f"A of {name}")
        assert_close(layer.s_sum.to_dense(), truth.s_sum, EXACT, f"S of {name}")
        assert_close(layer.lambda_sum, truth.corrected(layer.q_out, layer.q_in), EXACT, f"Λ of {name}")
        assert float(layer.lambda_sum.sum()) > 0, name


# ------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact(family: str, padding: str) -> None:
    model = tiny(family)
    batches = [batch(padding), batch(padding, sequences=2, tokens=6, seed=1)]
    curvature = fitted(model, batches)
    candidates = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert list(curvature) == [n for n in candidates if n not in ("lm_head", "embed_out")]
    assert_is_truth(curvature, model, batches)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_of_transformers(family: str, reentrant: bool) -> None:
    model = tiny(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    curvature = fitted(model, [batch("left")])
    assert model.training and model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert_is_truth(curvature, model, [batch("left")])


def test_checkpointing_really_recomputes() -> None:
    """Otherwise the test above would prove nothing: layers run three times over two passes, not two."""
    model = tiny("llama")
    counts = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        calls = []
        handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        fitted(model, [batch()], curvature="kfac")
        handle.remove()
        counts.append(len(calls))
    assert counts[1] == counts[0] + 1


@pytest.mark.parametrize("only_first", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_that_a_user_made(reentrant: bool, only_first: bool) -> None:
    batches = [batch("right")]
    model = hand_made(recompute=reentrant, only_first=only_first)
    curvature = fitted(model, batches)
    assert_is_truth(curvature, hand_made(), batches)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_several_label_samples_with_checkpoints(reentrant: bool | None, samples: int) -> None:
    plain = fitted(tiny("llama"), [batch()], fisher="sampled", samples=samples)
    model = tiny("llama")
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
    for name, layer in fitted(model, [batch()], fisher="sampled", samples=samples).items():
        assert layer.losses == samples * loss_positions([batch()])
        assert layer.positions == plain[name].positions
        assert_close(layer.s_sum.to_dense(), plain[name].s_sum.to_dense(), EXACT)
        assert_close(layer.lambda_sum, plain[name].lambda_sum, EXACT)


@pytest.mark.parametrize("recompute", [None, False])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_module_called_twice(padding: str, recompute: bool | None, bias: bool) -> None:
    """Both calls are one gradient: they add up inside the square of Λ."""
    batches = [batch(padding)]
    curvature = fitted(hand_made("twice", recompute, bias=bias), batches, modules="first|down")
    assert curvature["first"].positions == 2 * curvature["down"].positions
    assert_is_truth(curvature, hand_made("twice", bias=bias), batches)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_two_linear_layers_with_one_weight(padding: str, bias: bool) -> None:
    model, batches = hand_made("tied", bias=bias), [batch(padding)]
    curvature = fitted(model, batches)
    assert "second" not in curvature and "first" in curvature
    assert_is_truth(curvature, model, batches, tied={"first": ["first", "second"]})


def test_hand_made_model_and_regular_expression() -> None:
    model, batches = hand_made(), [batch("left")]
    curvature = fitted(model, batches, modules="^(up|head)$")
    assert list(curvature) == ["up", "head"]
    assert_is_truth(curvature, model, batches)


def test_output_head_by_regular_expression() -> None:
    model, batches = tiny("llama"), [batch("left")]
    assert_is_truth(fitted(model, batches, modules="lm_head|q_proj"), model, batches)


class Rectified(HandMade):
    """Works on the outputs of its layers, in place if asked."""

    in_place = False

    def _relu(self, x: Tensor) -> Tensor:
        return x.mul_(3).relu_() if self.in_place else (3 * x).relu()

    def _early(self, h: Tensor, mask: Tensor) -> Tensor:
        return h + self._mean(self._relu(self.first(h)), mask) + self._relu(self.second(h))

    def _late(self, h: Tensor, mask: Tensor) -> Tensor:
        return h + self._mean(self.down(self._relu(self.gate(h)) + self.up(h)), mask)


def test_activations_in_place() -> None:
    """The gradient wanted is that of the output as the layer gave it, before it was written over."""
    model, batches = Rectified().double(), [batch("left")]
    model.in_place = True
    curvature = fitted(model, batches)
    model.in_place = False
    assert_is_truth(curvature, model, batches)


@pytest.mark.parametrize("ids", [slice(0, 1), slice(2, 3)], ids=["padded", "whole"])
def test_one_sequence(ids: slice) -> None:
    model = tiny("qwen2")
    batches = [{name: value[ids] for name, value in batch("right").items()}]
    assert_is_truth(fitted(model, batches), model, batches)


def test_attention_mask_and_labels_may_be_left_out() -> None:
    model, ids = tiny("llama"), batch("none")["input_ids"]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    ours, theirs = fitted(model, [{"input_ids": ids}]), fitted(model, [whole])
    assert all(torch.equal(ours[n].lambda_sum, theirs[n].lambda_sum) for n in ours)


@pytest.mark.parametrize("long_padding", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(0.6, 2.0), (0.05, 2.0), (0.05, 30.0)])
def test_soft_capped_logits_are_noticed(scale: float, cap: float, long_padding: bool) -> None:
    """Gemma 2 squeezes its logits, so they are not `hidden · weightᵀ`, whatever the first batch looks like."""
    model = tiny("gemma2", scale=scale, final_logit_softcapping=cap)
    one = batch("right", tokens=40 if long_padding else 9)
    if long_padding:
        one["attention_mask"][0, 10:] = 0
        one["labels"][0, 10:] = -100
    curvature = fitted(model, [one], modules="mlp")
    assert_is_truth(curvature, model, [one])


# ------------------------------------------------------------------------------------- shared inputs


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]),
        ("phi", [("q_proj", "k_proj", "v_proj", "fc1")]),
    ],
)
def test_shared_inputs_are_one_matrix(family: str, groups: list[tuple[str, ...]]) -> None:
    curvature = fitted(tiny(family), [batch()])
    for suffixes in groups:
        members = [layer for name, layer in curvature.items() if "layers.0." in name and name.endswith(suffixes)]
        assert len(members) == len(suffixes)
        assert all(m.a_sum is members[0].a_sum and m.q_in is members[0].q_in for m in members)
        assert {m.group for m in members} == {members[0].name}
        assert {m.positions for m in members} == {int(batch()["attention_mask"].sum())}
    assert len({id(layer.a_sum) for layer in curvature.values()}) < len(curvature)


def test_bias_divides_a_group() -> None:
    """Layers with and without a bias have factors of other orders, though their input is one tensor."""
    model = hand_made()
    model.up.bias = None
    curvature = fitted(model, [batch("left")])
    assert curvature["up"].group == "up" and curvature["gate"].group == "gate"
    assert_is_truth(curvature, model, [batch("left")])


# ---------------------------------------------------------------------------- the model is left alone


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "phi", "opt", "opt layerdrop"])
def test_dropout_is_off_and_modes_come_back(family: str, checkpointed: bool) -> None:
    rates = {
        "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
        "llama": {"attention_dropout": 0.5},
        "neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
        "phi": {"attention_dropout": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5},
        "opt": {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5},
        "opt layerdrop": {"layerdrop": 0.9},
    }[family]
    model = tiny(family.partition(" ")[0], **rates)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model.get_input_embeddings().eval()
    modes = [m.training for m in model.modules()]
    attributes = [{k: v for k, v in vars(m).items() if isinstance(v, float)} for m in model.modules()]
    curvature = fitted(model, [batch()])
    assert [m.training for m in model.modules()] == modes
    assert [{k: v for k, v in vars(m).items() if isinstance(v, float)} for m in model.modules()] == attributes
    assert_is_truth(curvature, model, [batch()])


def test_flags_gradients_hooks_and_weights_come_back() -> None:
    model = tiny("llama")
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
    before = {n: (p.requires_grad, p.grad, p.detach().clone()) for n, p in model.named_parameters()}
    fitted(model, [batch()])
    for name, parameter in model.named_parameters():
        flag, gradient, value = before[name]
        assert parameter.requires_grad is flag
        assert parameter.grad is gradient, name
        assert gradient is None or bool((gradient == gradient.reshape(-1)[0]).all())
        assert torch.equal(parameter, value)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_everything_comes_back_after_an_error() -> None:
    model = tiny("llama").train()
    bad = batch()
    bad["input_ids"] = bad["input_ids"].clone()
    bad["input_ids"][0, 0] = 10_000
    with pytest.raises(IndexError):
        fitted(model, [batch(), bad])
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_no_weight_gradient_is_computed() -> None:
    """No product of the backward pass has the shape of a weight, in the first stage, where none is needed."""
    model = tiny("llama", hidden_size=20, intermediate_size=30, num_key_value_heads=1)
    # Square weights have the shape of a factor, whose decomposition is a product too.
    shapes = {p.shape for p in model.parameters() if p.ndim == 2 and p.shape[0] != p.shape[1]}
    shapes |= {torch.Size(reversed(shape)) for shape in shapes}
    handed_on = [torch.Size([4, 9, 30]), torch.Size([36, 30])]
    with Sizes() as sizes:
        fitted(model, [batch("none")], curvature="kfac")
    products = sizes.shapes_of("mm", "addmm", "bmm")
    assert set(handed_on) & set(products), "the mode must see the model's products"
    assert not shapes & set(products)
    with Sizes() as sizes:
        model(**batch("none")).loss.backward()
    assert shapes & set(sizes.shapes_of("mm", "addmm", "bmm")), "an ordinary backward pass does compute them"


def test_logits_of_all_tokens_never_exist() -> None:
    one = batch("none", sequences=4, tokens=9)
    one["labels"][:, :-1] = -100
    with Sizes() as sizes:
        fitted(tiny("llama"), [one], curvature="kfac")
    # 16 rows at most: a short sequence on which the output projection is compared once.
    assert max(s[:-1].numel() for _, shapes in sizes.calls for s in shapes if s and s[-1] == 97) <= 16


# ------------------------------------------------------------------------------------------ precisions


@pytest.mark.parametrize(
    ("dtype", "autocast", "computed"),
    [
        (torch.float32, "off", torch.float32),
        (torch.bfloat16, "off", torch.bfloat16),
        (torch.float16, "off", torch.float16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, "float16", torch.float16),
    ],
    ids=str,
)
def test_16_bit_models_and_autocast(
    dtype: torch.dtype, autocast: str, computed: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State is float32, and adds nothing to the rounding of what the model itself computes."""
    wide = fitted(tiny("llama"), [batch("none")], modules="mlp")
    delivered: dict[str, Pair] = {}
    collect = FactorCollector.__call__

    def recording(self: FactorCollector, layer: Layer, pairs: list[Pair], one: Any) -> None:
        (delivered[layer.name],) = pairs
        collect(self, layer, pairs, one)

    monkeypatch.setattr(FactorCollector, "__call__", recording)
    model, one = tiny("llama", dtype), batch("none")
    curvature = fitted(model, [one], modules="mlp", autocast=autocast)
    # bfloat16 rows are rotated with a pair of 16-bit eigenvectors and rounded once; others in float32.
    rotated = 4 * 2.0**-9 if computed == torch.bfloat16 else 1e-5
    for name, layer in curvature.items():
        pair = delivered[name]
        assert pair.dtype == pair.g.dtype == computed
        a, g = pair.a.to(computed), pair.g
        assert layer.a_sum.dtype == layer.s_sum.dtype == layer.lambda_sum.dtype == torch.float32
        assert_close(layer.a_sum.to_dense(), outer_sum(a, ones=layer.has_bias), 1e-6, f"A of {name}")
        assert_close(layer.s_sum.to_dense(), outer_sum(g), 1e-6, f"S of {name}")
        truth = squared_gradients(g, a, layer.q_out, layer.q_in, ones=layer.has_bias)
        assert_close(layer.lambda_sum, truth, rotated, f"Λ of {name}")
        # Two layers deep the model's own rounding has grown to a few dozen units, and no further.
        grown = 64 * torch.finfo(computed).eps / 2
        assert_close(layer.a_sum.to_dense(), wide[name].a_sum.to_dense(), grown, f"A of {name} against float64")
        assert_close(layer.s_sum.to_dense(), wide[name].s_sum.to_dense(), grown, f"S of {name} against float64")


def test_what_one_batch_left_behind_is_not_used_by_the_next() -> None:
    """A group whose second member got no gradient: the rotated input must not wait for it."""
    model, one = hand_made(), check_batch(batch("none"), 0, torch.device("cpu"))
    layers = [replace(layer, group="gate") for layer in select(model, "gate|up")]
    states = {x.name: kfade.LayerCurvature(x.name, x.d_out, x.d_in, x.has_bias, x.transposed, x.group) for x in layers}
    for state in states.values():
        state.q_in, state.q_out = orthogonal(13), orthogonal(20)
    states["up"].q_in = states["gate"].q_in
    collector = CorrectionCollector(states, layers, torch.float64, torch.device("cpu"))
    truth: Tensor | float = 0.0
    for _ in range(2):
        a, g = torch.randn(4, 9, 12, dtype=torch.float64), torch.randn(4, 9, 20, dtype=torch.float64)
        collector(layers[0], [Pair(layers[0], a, g, torch.float64)], one)
        collector.end_batch()
        truth = truth + squared_gradients(g, a, states["gate"].q_out, states["gate"].q_in, ones=True)
    assert_close(states["gate"].lambda_sum, truth, 1e-12)


def test_float32_is_near_float64() -> None:
    wide, narrow = fitted(tiny("llama"), [batch()]), fitted(tiny("llama", torch.float32), [batch()])
    for name in wide:
        assert_close(narrow[name].a_sum.to_dense(), wide[name].a_sum.to_dense(), 1e-5)
        assert_close(narrow[name].s_sum.to_dense(), wide[name].s_sum.to_dense(), 1e-5)


# --------------------------------------------------------------------------- selection, and its refusals


def test_presets() -> None:
    kinds = ("mlp", "attention", "all-linear")
    names = {kind: set(fitted(tiny("llama"), [batch()], modules=kind, curvature="identity")) for kind in kinds}
    assert all(".mlp." in n for n in names["mlp"]) and len(names["mlp"]) == 6
    assert all(".self_attn." in n for n in names["attention"]) and len(names["attention"]) == 8
    assert names["all-linear"] == names["mlp"] | names["attention"]


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_and_attention_presets_cover_each_family(family: str) -> None:
    model = tiny(family)
    parts = [{layer.name for layer in select(model, kind)} for kind in ("mlp", "attention", "all-linear")]
    assert parts[0] and parts[1] and not parts[0] & parts[1]
    assert parts[0] | parts[1] == parts[2]


def test_a_pattern_that_matches_nothing_lists_the_candidates() -> None:
    with pytest.raises(ValueError, match=r"'nothing'.*layers\.0\.mlp\.up_proj"):
        fitted(tiny("llama"), [batch()], modules="nothing")


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(ValueError, match="regular expression"):
        fitted(tiny("llama"), [batch()], modules="(mlp")


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_head_tied_to_the_embedding_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"lm_head.*tied to .*(wte|embed_tokens)"):
        fitted(tiny(family, tie_word_embeddings=True), [batch()], modules="lm_head|mlp")


def test_weight_tied_to_an_unselected_layer_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"first.*tied to second"):
        fitted(hand_made("tied"), [batch()], modules="first|up")


class LoraLinear(nn.Linear):
    """What adapters look like: a subclass whose forward adds something."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.lora_a = nn.Parameter(torch.zeros(2, self.in_features))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + (input @ self.lora_a.T).sum(-1, keepdim=True)


class Linear4bit(nn.Linear):
    """What quantised layers look like: packed bytes as a weight, unpacked in forward."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        packed = torch.zeros(self.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return input.new_zeros(*input.shape[:-1], self.out_features)


class RenamedLinear(nn.Linear):
    """A subclass that changes nothing is as good as its parent."""


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("kind", "reason"), [(LoraLinear, "LoraLinear"), (Linear4bit, "Linear4bit")], ids=["adapter", "4-bit"]
)
def test_layers_of_other_kinds_are_refused_by_name(kind: type[nn.Linear], reason: str) -> None:
    model = hand_made()
    model.up = kind(12, 20)
    with pytest.raises(UnsupportedLayerError, match=f"layer up .*{reason}"):
        fitted(model.double() if kind is LoraLinear else model, [batch()])


def test_parametrized_weight_is_refused() -> None:
    model = hand_made()
    parametrize.register_parametrization(model.up, "weight", Doubled())
    with pytest.raises(UnsupportedLayerError, match=r"layer up .*parametrize"):
        fitted(model, [batch()])


def test_plain_subclass_is_taken() -> None:
    model = hand_made()
    model.up = RenamedLinear(12, 20).double()
    assert_is_truth(fitted(model, [batch()]), model, [batch()])


class Routed(HandMade):
    """Feeds a layer with some of the tokens only, as an expert is."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        h = self.embed(input_ids)
        extra = self.first(h.reshape(-1, 12)[::2]).sum()
        return SimpleNamespace(logits=self.head(h + extra))


def test_a_layer_that_is_fed_some_of_the_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"layer first .*not the batch's tokens"):
        fitted(Routed().double(), [batch()], modules="first")


class Bypassed(HandMade):
    """Uses the weight of a layer without calling it, as `nn.MultiheadAttention` does."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        h = self.embed(input_ids)
        return SimpleNamespace(logits=self.head(h + nn.functional.linear(h, self.first.weight, self.first.bias)))


def test_a_layer_that_is_never_called_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="first"):
        fitted(Bypassed().double(), [batch()], modules="first|head")


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_loss_positions_are_found_once_and_agree_with_the_mask(padding: str) -> None:
    one = check_batch(batch(padding), 0, torch.device("cpu"))
    mask = one.loss_mask
    assert torch.equal(one.loss_index, mask.flatten().nonzero().squeeze(1)) and one.loss_index is one.loss_index
    assert torch.equal(one.targets, one.labels[:, 1:][mask[:, :-1]])
    assert one.target_range == (int(one.targets.min()), int(one.targets.max()))
    values = torch.randn(int(mask.sum()), dtype=torch.float64)
    sums = torch.stack([values[mask.nonzero()[:, 0] == i].sum() for i in range(len(mask))])
    torch.testing.assert_close(one.sequence_sums(values), sums)

"""Tiny randomly initialised models, and batches for them. Cases are data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kfade.capture import deterministic_mode
from kfade.loss import Head, check_batch

VOCABULARY = 97
Batch = dict[str, Tensor]

_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {**_COMMON, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_GEMMA = {**_LLAMA, "num_key_value_heads": 1, "head_dim": 8}
_GPT2 = {**_COMMON, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}

_KINDS: dict[str, tuple[Callable[..., Any], Callable[..., nn.Module], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, _GPT2),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {**_LLAMA, "num_key_value_heads": 1}),
    "gemma": (GemmaConfig, GemmaForCausalLM, _GEMMA),
    "neox": (GPTNeoXConfig, GPTNeoXForCausalLM, _LLAMA),
    "mistral": (MistralConfig, MistralForCausalLM, {**_LLAMA, "num_key_value_heads": 1}),
    "phi": (PhiConfig, PhiForCausalLM, _LLAMA),
    "opt": (
        OPTConfig,
        OPTForCausalLM,
        {
            **_COMMON,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 64,
        },
    ),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, _GEMMA),
}
FAMILIES = ("llama", "gpt2", "qwen2", "gemma", "neox", "mistral", "phi")
PADDINGS = ("none", "right", "left")


def roughen(model: nn.Module, scale: float = 0.2, seed: int = 0) -> nn.Module:
    """Move every parameter at random, so that biases are not zero and predictions not uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def tiny(kind: str, dtype: torch.dtype = torch.float64, *, scale: float = 0.2, **options: Any) -> Any:
    """A model of this kind with random weights, always the same ones, in evaluation mode."""
    config, model, defaults = _KINDS[kind]
    torch.manual_seed(1)
    return roughen(model(config(**{**defaults, **options})), scale).to(dtype).eval()


def batch(padding: str = "right", sequences: int = 4, tokens: int = 9, seed: int = 0) -> Batch:
    """Random tokens; the first two sequences padded, the last with a prompt that carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (sequences, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row, missing in enumerate((4, 1)[:sequences]):
        if padding == "right":
            mask[row, tokens - missing :] = 0
        if padding == "left":
            mask[row, :missing] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[-1, : tokens // 2] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def sampled_labels(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], seed: int = 0, sample: int = 0
) -> list[Tensor]:
    """The labels that `fit` draws, one `[B, T]` a batch, with -100 where it draws none."""
    drawn = []
    with deterministic_mode(model), torch.no_grad():
        checked = [check_batch(b, i, torch.device("cpu")) for i, b in enumerate(batches)]
        head = Head(model, checked[0])
        for one in checked:
            labels = torch.full_like(one.input_ids, -100)
            labels[:, 1:][one.loss_mask[:, :-1]] = head.sampled(head.rows(one), one, seed, sample)[0]
            drawn.append(labels)
    return drawn


def loss_positions(batches: Sequence[Mapping[str, Tensor]]) -> int:
    return sum(int((b["labels"][:, 1:] != -100).logical_and(b["attention_mask"][:, :-1] != 0).sum()) for b in batches)


class HandMade(nn.Module):
    """A causal model of no library: running means in the place of attention.

    Args:
        sharing: `none`; `twice`, one module called twice; `tied`, two modules with one weight and bias.
        recompute: None, or `use_reentrant` of the checkpoint around each of its two blocks.
        only_first: checkpoint the first block only.
    """

    def __init__(
        self, sharing: str = "none", recompute: bool | None = None, *, only_first: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.sharing, self.recompute, self.only_first = sharing, recompute, only_first
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.first = nn.Linear(12, 12, bias=bias)
        self.second = nn.Linear(12, 12, bias=bias)
        if sharing == "tied":
            self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.gate, self.up = nn.Linear(12, 20, bias=bias), nn.Linear(12, 20, bias=bias)
        self.down = nn.Linear(20, 12, bias=bias)
        self.head = nn.Linear(12, VOCABULARY, bias=False)

    def _early(self, h: Tensor, mask: Tensor) -> Tensor:
        h = h + self._mean(self.first(h).tanh(), mask)
        return h + (self.first if self.sharing == "twice" else self.second)(h).sin()

    def _late(self, h: Tensor, mask: Tensor) -> Tensor:
        x = h.tanh()
        return h + self._mean(self.down(self.gate(x).sigmoid() * self.up(x)), mask)

    @staticmethod
    def _mean(h: Tensor, mask: Tensor) -> Tensor:
        weights = mask.to(h.dtype).unsqueeze(-1)
        return (h * weights).cumsum(1) / weights.cumsum(1).clamp(min=1)

    def _block(self, block: Callable[[Tensor, Tensor], Tensor], h: Tensor, mask: Tensor) -> Tensor:
        if self.recompute is None or (self.only_first and block == self._late):
            return block(h, mask)
        return checkpoint(block, h, mask, use_reentrant=self.recompute)  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        h = self._block(self._early, self.embed(input_ids), attention_mask)
        h = self._block(self._late, h, attention_mask)
        return SimpleNamespace(logits=self.head(h))


def hand_made(sharing: str = "none", recompute: bool | None = None, **options: Any) -> HandMade:
    torch.manual_seed(2)
    return HandMade(sharing, recompute, **options).double().eval()

"""ToFU from nothing: fine-tune, unlearn `forget05`, and compare with a model that never saw it.

    python benchmarks/tofu.py --data DIRECTORY            # full.jsonl and forget05.jsonl, as published
    python benchmarks/tofu.py --data DIRECTORY --pairs 4000 --epochs 40 --seeds 3

A tokenizer and a small Llama are trained on ToFU `full` (all of `forget05`, and as many of the other
pairs as `--pairs` leaves room for), and once more without the forget set. Then one K-FADE run for
each curvature, at the same budget of measured retain KL. Both trained models are kept in `--work`
and are not trained again. What is printed, on the forget set and on retain pairs that no fit saw:
token-mean NLL, KL to the original model, and KL to the retrained model, all in nats a token.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from records import append
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

import kfade
from kfade.data import Record, make_batches, read_jsonl
from kfade.fit import check_batches
from kfade.loss import Batch, Head

CURVATURES = ("identity", "diagonal", "kfac", "ekfac")


def train_tokenizer(records: list[Record], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<end>"], show_progress=False)
    tokenizer.train_from_iterator((f"Question: {r.prompt}\nAnswer: {r.response}" for r in records), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def train_model(
    batches: list[dict[str, Tensor]], options: argparse.Namespace, seed: int, path: Path
) -> LlamaForCausalLM:
    """A model trained on the batches; read from `path` where it is there already."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=options.width, intermediate_size=3 * options.width, num_hidden_layers=options.layers,
            num_attention_heads=4, vocab_size=options.vocabulary, max_position_embeddings=512,
            bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    steps = options.epochs * len(batches)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimiser, steps // 20, steps)
    order = random.Random(seed)
    begin, done, loss = time.perf_counter(), 0, torch.zeros(())
    for epoch in range(options.epochs):
        for batch in order.sample(batches, len(batches)):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            done += 1
        left = (time.perf_counter() - begin) / done * (steps - done)
        print(
            f"{path.stem}: epoch {epoch + 1}/{options.epochs}, loss {float(loss):.3f}, {left:.0f} s left",
            file=sys.stderr,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model.eval()


class Yardstick:
    """Loss rows of the original and the retrained model on one set, to measure others against."""

    def __init__(self, batches: list[Batch], original: LlamaForCausalLM, retrained: LlamaForCausalLM) -> None:
        self.batches = batches
        self._logits = [[m(input_ids=b.input_ids, attention_mask=b.attention.long()).logits[b.loss_mask]
                         for b in batches] for m in (original, retrained)]  # fmt: skip

    def __call__(self, model: LlamaForCausalLM) -> tuple[float, float, float]:
        """Token-mean NLL, KL(original ‖ model), KL(retrained ‖ model)."""
        head = Head(model, self.batches[0], tracked=[model.lm_head])
        nll, sums, count = 0.0, [0.0, 0.0], 0
        for i, batch in enumerate(self.batches):
            rows = head.rows(batch)
            nll += float(head.labelled(rows, batch)[2].sum())
            count += len(rows)
            for k in range(2):
                sums[k] += float(head.kl(rows, self._logits[k][i], gradient=False)[0].sum())
        return nll / count, sums[0] / count, sums[1] / count


def run_seed(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    full, forget = (read_jsonl(options.data / name) for name in ("full.jsonl", "forget05.jsonl"))
    questions = {r.prompt for r in forget}
    rest = [r for r in full if r.prompt not in questions]
    random.Random(seed).shuffle(rest)
    rest = rest[: max(0, options.pairs - len(forget))]
    if len(rest) < 40:
        raise SystemExit(f"--pairs {options.pairs} leaves {len(rest)} retain pairs; it must leave at least 40")
    tokenizer = train_tokenizer(full, options.vocabulary)
    batched = {name: make_batches(tokenizer, part, chat=False, batch_size=options.batch)
               for name, part in (("forget", forget), ("rest", rest))}  # fmt: skip
    stem = f"{options.pairs}-{options.epochs}-{options.width}x{options.layers}-{seed}"
    original = train_model(
        batched["forget"] + batched["rest"], options, seed, options.work / f"full-{stem}.safetensors"
    )
    retrained = train_model(batched["rest"], options, seed, options.work / f"retrained-{stem}.safetensors")
    cut = len(rest) // 4
    unseen, retain = rest[:cut], rest[cut:]
    device = torch.device("cpu")
    with torch.no_grad():
        sets = {
            name: Yardstick(
                check_batches(make_batches(tokenizer, part, chat=False, batch_size=16), device), original, retrained
            )
            for name, part in (("forget", forget), ("retain", unseen))
        }

    def row(method: str, model: LlamaForCausalLM, seconds: float, steps: int) -> dict[str, Any]:
        with torch.no_grad():
            values = {name: yardstick(model) for name, yardstick in sets.items()}
        return {
            "pairs": options.pairs, "epochs": options.epochs, "parameters": original.num_parameters(), "seed": seed,
            "method": method, "objective": options.objective, "damping": options.damping, "budget": options.kl_budget,
            "steps": steps, "seconds": round(seconds, 1),
            **{f"{name}_{what}": round(v, 4) for name, value in values.items()
               for what, v in zip(("nll", "kl_original", "kl_retrained"), value, strict=True)},
        }  # fmt: skip

    rows = [row("original", original, 0.0, 0), row("retrained", retrained, 0.0, 0)]
    forget_batches = make_batches(tokenizer, forget, chat=False, batch_size=16)
    retain_batches = make_batches(tokenizer, retain, chat=False, batch_size=16)
    for curvature in options.curvatures:
        config = kfade.UnlearnConfig(
            fit=kfade.FitConfig(curvature=curvature, modules="mlp", seed=seed), damping=options.damping,
            steps=options.steps, kl_budget=options.kl_budget, objective=options.objective, trials=10,
        )  # fmt: skip
        begin = time.perf_counter()
        update = kfade.unlearn(original, forget_batches, retain_batches, config)
        seconds = time.perf_counter() - begin
        update.apply_(original)
        rows.append(row(curvature, original, seconds, len(update.report.accepted)))
        update.remove_(original)
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with full.jsonl and forget05.jsonl")
    parser.add_argument("--work", type=Path, default=Path("tofu-models"), help="where trained models are kept")
    parser.add_argument("--pairs", type=int, default=600, help="question/answer pairs to fine-tune on")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--kl-budget", type=float, default=0.02)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--objective", choices=("cross_entropy", "npo"), default="cross_entropy")
    parser.add_argument("--curvatures", nargs="+", choices=CURVATURES, default=list(CURVATURES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    for name in ("full.jsonl", "forget05.jsonl"):
        if not (options.data / name).is_file():
            parser.error(f"--data {options.data} has no {name}; it must hold ToFU's files (locuslab/TOFU on the hub)")
    rows = [row for seed in range(options.seeds) for row in run_seed(options, seed)]
    columns = ["seed", "method", "steps", "seconds"] + [c for c in rows[0] if c.startswith(("forget_", "retain_"))]
    print("  ".join(f"{c:>19}" for c in columns))
    for r in rows:
        cells = (("inf" if math.isinf(v) else f"{v:.4g}") if isinstance(v := r[c], float) else str(v) for c in columns)
        print("  ".join(f"{cell:>19}" for cell in cells))
    if not options.no_record:
        print(f"recorded in {append('tofu', rows)}")


if __name__ == "__main__":
    main()

"""A small language model trained from scratch: AdamW, `kfade.optim.KFAC`, and K-FAC in plain PyTorch.

    python benchmarks/optimisers.py                          # records, draws docs/optimisers.svg
    python benchmarks/optimisers.py --sweep --steps 120   # the learning rates in SWEPT
    python benchmarks/optimisers.py --steps 40 --width 32 --no-record

The text is that of Python's own documentation topics, as bytes; the last tenth is held out, and 128 sequences of it
are evaluated. Every method sees the same batches from the same weights, under one schedule (20 steps of warm-up, then a
cosine to a tenth). The methods take turns step by step, so that whatever else the machine does meets them all; a
method's seconds are those of its own training steps, its evaluations left out. The plain version's settings are those
of kfade's.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from records import append
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import kfade
from kfade.optim import KFAC

DOCS = Path(__file__).parent.parent / "docs"
WARM_UP = 20
CHUNK = 16
METHODS = ("adamw", "kfade", "plain")
# Four learning rates a method; LR holds the best of each, and the K-FACs use that of AdamW for what they do not track.
SWEPT = {"adamw": (2e-3, 4e-3, 8e-3, 1.6e-2), "kfade": (1e-3, 3e-3, 1e-2, 3e-2)}
LR = {"adamw": 4e-3, "kfade": 1e-3, "plain": 1e-3}
CONFIG = kfade.KFACConfig(adam_lr=4e-3, adam_betas=(0.9, 0.95))
HELD = 128


class PlainKFAC:
    """K-FAC for the linear layers of a model as it is written in plain PyTorch, with Adam for the other parameters.

    It keeps the graph of the training pass for one more backward pass with labels of the model's own, which saves it
    the forward pass that kfade runs. Inputs that layers share are summed once.

    Args:
        model: a Hugging Face causal language model without biases in its linear layers.
        config: the options of `kfade.optim.KFAC`.
    """

    def __init__(self, model: nn.Module, config: kfade.KFACConfig) -> None:
        self.config = config
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.lm_head}
        tracked = {id(m.weight) for m in self.layers.values()}
        self.weights = [m.weight for m in self.layers.values()]
        rest = [p for p in model.parameters() if id(p) not in tracked]
        self.sgd = torch.optim.SGD(self.weights, lr=config.lr, momentum=config.momentum)
        self.adam = torch.optim.AdamW(
            rest, lr=config.adam_lr, betas=config.adam_betas, eps=config.adam_eps, weight_decay=0.0
        )
        self.a: dict[str, Tensor] = {}
        self.s: dict[str, Tensor] = {}
        self.leader: dict[str, str] = {}
        self.bases: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.positions = self.losses = 0.0
        self.scale = 1.0
        self.steps = 0

    def collect(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Forward with hooks, a backward pass of sampled labels to the layers' outputs; returns the loss."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(_m: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                inputs[name], outputs[name] = args[0], output

            return keep

        handles = [m.register_forward_hook(hook(n)) for n, m in self.layers.items()]
        found = model(**batch)
        for handle in handles:
            handle.remove()
        logits = found.logits[:, :-1].flatten(0, 1)
        if self.config.fit.fisher == "sampled":
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
        else:
            labels = batch["labels"][:, 1:].flatten()
        nll = nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(nll, list(outputs.values()), retain_graph=True)
        decay = self.config.decay
        first: dict[int, str] = {}
        for (name, x), g in zip(inputs.items(), gradients, strict=True):
            self.add(self.s, name, g)
            self.leader[name] = first.setdefault(id(x), name)
            if self.leader[name] == name:
                self.add(self.a, name, x.detach())
        self.positions = decay * self.positions + batch["input_ids"].numel()
        self.losses = decay * self.losses + len(labels)
        return found.loss

    def add(self, sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
        rows = rows.flatten(0, 1)
        sums[name] = sums[name].mul_(self.config.decay).addmm_(rows.T, rows) if name in sums else rows.T @ rows

    def decompose(self) -> None:
        inputs = {name: torch.linalg.eigh(a / self.positions) for name, a in self.a.items()}
        for name in self.layers:
            values, vectors = torch.linalg.eigh(self.s[name] / self.losses)
            values_in, vectors_in = inputs[self.leader[name]]
            self.bases[name] = values.clamp(min=0), vectors, values_in.clamp(min=0), vectors_in

    def train(self, model: nn.Module, batch: dict[str, Tensor]) -> float:
        """One training step."""
        config = self.config
        collects = self.steps % config.factor_every == 0
        loss = self.collect(model, batch) if collects else model(**batch).loss
        loss.backward()
        with torch.no_grad():
            if self.steps % config.refresh_every == 0:
                self.decompose()
            self.precondition()
        self.steps += 1
        for optimizer in (self.sgd, self.adam):
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    def precondition(self) -> None:
        total = torch.zeros(())
        solved = []
        for name, module in self.layers.items():
            values, vectors, values_in, vectors_in = self.bases[name]
            g = module.weight.grad
            damping = self.config.damping * values.mean() * values_in.mean()
            rotated = (vectors.T @ g @ vectors_in).div_(torch.outer(values, values_in).add_(damping))
            solved.append(vectors @ rotated @ vectors_in.T)
            total = total + (solved[-1] * g).sum()
        lr = self.sgd.param_groups[0]["lr"]
        scale = (self.config.kl_clip / (lr**2 * total)).sqrt().clamp(max=1)
        self.scale = float(scale)
        for weight, x in zip(self.weights, solved, strict=True):
            weight.grad = x.mul_(scale)


@dataclass
class Run:
    """A model that is trained by one method.

    Attributes:
        optimisers: what a schedule has to scale.
        losses: of the training batches, in nats a byte.
        seconds: of each training step.
        held: by number of steps, the loss of the held-out text.
    """

    method: str
    model: nn.Module
    train: Callable[[nn.Module, dict[str, Tensor]], float]
    optimisers: list[torch.optim.Optimizer]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held: dict[int, float] = field(default_factory=dict)

    def schedule(self, step: int, steps: int) -> None:
        share = min((step + 1) / WARM_UP, 0.55 + 0.45 * math.cos(math.pi * step / steps))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * share


def build(method: str, lr: float, width: int, layers: int, damping: float) -> Run:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=4, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        )
    ).train()  # fmt: skip
    config = replace(CONFIG, lr=lr, damping=damping)
    if method == "plain":
        plain = PlainKFAC(model, config)
        return Run(method, model, plain.train, [plain.sgd, plain.adam])
    optimiser: torch.optim.Optimizer
    if method == "kfade":
        optimiser = KFAC(model, config)
    else:
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=CONFIG.adam_betas, weight_decay=0.0)

    def train(model: nn.Module, batch: dict[str, Tensor]) -> float:
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return Run(method, model, train, [optimiser])


def read_text() -> tuple[Tensor, Tensor]:
    """Bytes to train on and to hold out."""
    text = torch.tensor(list("\n\n".join(topics[name] for name in sorted(topics)).encode()))
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def batches(text: Tensor, steps: int, batch: int, tokens: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - tokens, (batch,), generator=generator)
        ids = torch.stack([text[i : i + tokens] for i in starts.tolist()])
        yield {"input_ids": ids, "labels": ids}


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, tokens: int) -> float:
    """Loss of the held-out text, in nats a byte."""
    rows = text[: HELD * tokens].view(-1, tokens)
    model.eval()
    losses = [float(model(input_ids=x, labels=x).loss) * len(x) for x in rows.split(64)]
    model.train()
    return sum(losses) / len(rows)


def train_all(runs: list[Run], options: argparse.Namespace, steps: int) -> None:
    text, held = read_text()
    for step, batch in enumerate(batches(text, steps, options.batch, options.tokens)):
        # In turns, and each of them first equally often.
        for run in runs[step % len(runs) :] + runs[: step % len(runs)]:
            run.schedule(step, steps)
            begin = time.perf_counter()
            run.losses.append(run.train(run.model, batch))
            run.seconds.append(time.perf_counter() - begin)
        if (step + 1) % options.evaluate_every == 0 or step + 1 == steps:
            for run in runs:
                run.held[step + 1] = evaluate(run.model, held, options.tokens)
            found = "  ".join(f"{r.method} {r.held[step + 1]:.3f} ({sum(r.seconds):.0f} s)" for r in runs)
            print(f"step {step + 1}: {found}", flush=True)


def rows_of(run: Run, lr: float, kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    tracked = run.method != "adamw"
    return [
        {
            "run": kind, "method": run.method, "width": options.width, "layers": options.layers,
            "tokens_a_step": options.batch * options.tokens, "lr": lr, "damping": options.damping if tracked else "",
            "kl_clip": CONFIG.kl_clip if tracked else "", "factor_every": CONFIG.factor_every if tracked else "",
            "refresh_every": CONFIG.refresh_every if tracked else "", "step": step,
            "seconds": round(sum(run.seconds[:step]), 2),
            "median_step_seconds": round(statistics.median(run.seconds[:step]), 4),
            "train_loss": round(statistics.mean(run.losses[max(0, step - CHUNK) : step]), 4),
            "held_out_loss": round(loss, 4),
        }
        for step, loss in run.held.items()
    ]  # fmt: skip


def draw(runs: list[Run], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    # Without these, each drawing has other bytes.
    mpl.rcParams["svg.hashsalt"] = "kfade"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    names = {"adamw": "AdamW", "kfade": "kfade.optim.KFAC", "plain": "K-FAC in plain PyTorch"}
    for run, colour, style in zip(runs, ("tab:gray", "tab:blue", "tab:orange"), ("-", "-", "--"), strict=False):
        seconds = torch.tensor(run.seconds).cumsum(0).tolist()
        for axis, at in zip(axes, (range(1, len(seconds) + 1), seconds), strict=True):
            axis.plot(
                [at[s - 1] for s in run.held], list(run.held.values()), style, color=colour, label=names[run.method]
            )
            axis.plot(list(at)[::2], run.losses[::2], color=colour, linewidth=0.4, alpha=0.4)
    low = min(min(run.held.values()) for run in runs)
    axes[0].set(xlabel="step", ylabel="loss, nats a byte", ylim=(low - 0.25, 3.7))
    axes[1].set(xlabel="seconds of training")
    axes[0].legend(frameon=False, title="thick: held out; thin: training batch", fontsize=8, title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    print(f"drawn in {path.name}, {path.stat().st_size // 1000} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--damping", type=float, default=CONFIG.damping, help="relative")
    parser.add_argument("--evaluate-every", type=int, default=25)
    parser.add_argument("--sweep", action="store_true", help="the learning rates in SWEPT, one after the other")
    parser.add_argument("--no-record", action="store_true", help="print only, and draw nothing")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.sweep:
        for method, rates in SWEPT.items():
            for lr in rates:
                print(f"{method} {lr}")
                run = build(method, lr, options.width, options.layers, options.damping)
                train_all([run], options, options.steps)
                rows += rows_of(run, lr, "sweep", options)[-1:]
    else:
        runs = [build(method, LR[method], options.width, options.layers, options.damping) for method in METHODS]
        train_all(runs, options, options.steps)
        rows = [row for run in runs for row in rows_of(run, LR[run.method], "whole", options)]
        if not options.no_record:
            draw(runs, DOCS / "optimisers.svg")
    if not options.no_record:
        print(f"recorded in {append('optimisers', rows)}")


if __name__ == "__main__":
    main()

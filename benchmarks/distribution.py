"""Two processes on two cores beside one: each stage of a fit, on SmolLM2-135M, taking turns.

    python benchmarks/distribution.py                                  # a quiet machine with two cores; ten minutes
    python benchmarks/distribution.py --blocks 1 --rounds 1 --no-record

Every process computes with one thread. In each round the same processes fit twice: rank 0 alone while the others wait,
and all of them together; which comes first changes from round to round. A stage takes as long as the slowest rank; of
each the least over the rounds counts. `factors` and `correction` include the reductions; what sending eigenvectors to
all takes is in `whole` alone. What to expect of the decomposition is said beforehand, from n³ of each owner's factors.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import time
from typing import Any

import torch
import torch.distributed as dist
from records import append

import kfade
from kfade.distributed import owners_of
from kfade.fit import trace
from kfade.layers import select
from kfade.loss import Head, check_batches
from kfade.models import demo_model, load_model

STAGES = {"factors A, S": "factors", "eigendecomposition": "decomposition", "eigenvalues Λ": "correction"}


def one_fit(
    model: Any, batches: list[dict[str, torch.Tensor]], config: kfade.FitConfig, group: Any
) -> dict[str, float]:
    """Seconds of each stage, and of the whole."""
    progress = kfade.Progress()
    begin = time.perf_counter()
    kfade.fit(model, batches, config, progress=progress, group=group)
    seconds = {"whole": time.perf_counter() - begin}
    return seconds | {STAGES[c.name]: c.seconds for c in progress.costs if c.name in STAGES}


def predicted(model: Any, batches: list[dict[str, torch.Tensor]], config: kfade.FitConfig, ranks: int) -> float:
    """How many times faster owners decompose than one process, if time goes as n³."""
    checked = check_batches(batches, torch.device("cpu"))
    layers = trace(Head(model, checked[0]), select(model, config.modules), checked[0])
    owners = owners_of(layers, ranks, config)
    costs = [(owners.inputs[layer.name], layer.width_in**3) for layer in layers if layer.leads]
    costs += [(owners.outputs[layer.name], layer.d_out**3) for layer in layers]
    total = sum(n for _, n in costs)
    return total / max(sum(n for owner, n in costs if owner == rank) for rank in range(ranks))


def work(rank: int, options: argparse.Namespace, port: int, results: Any) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=options.ranks)
    model, _ = load_model(str(demo_model()))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (options.sequences, options.tokens), generator=generator)
    batches = [{"input_ids": part} for part in ids.split(options.batch)]
    config = kfade.FitConfig(modules=rf"layers\.({'|'.join(map(str, range(options.blocks)))})\.mlp")
    if rank == 0:
        results.put(predicted(model, batches, config, options.ranks))
    for number in range(options.rounds):
        for way in ("alone", "together")[:: -1 if number % 2 else 1]:
            dist.barrier()
            found = {}
            if way == "together" or rank == 0:
                found = one_fit(model, batches, config, dist.group.WORLD if way == "together" else None)
            everyone: list[dict[str, float]] = [{}] * options.ranks
            dist.all_gather_object(everyone, found)
            if rank == 0:
                results.put((way, {name: max(one.get(name, 0.0) for one in everyone) for name in found}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=6, help="of the model, whose MLP is fitted")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shared", action="store_true", help="say in the record that other processes ran beside")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=work, args=(r, options, port, results)) for r in range(options.ranks)]
    for process in processes:
        process.start()
    expected = results.get()
    ways: dict[str, list[dict[str, float]]] = {"alone": [], "together": []}
    for _ in range(2 * options.rounds):
        way, seconds = results.get()
        ways[way].append(seconds)
        print(way, {name: round(value, 2) for name, value in seconds.items()}, flush=True)
    for process in processes:
        process.join()
    alone, together = ({name: min(one[name] for one in ones) for name in ones[0]} for ones in ways.values())
    row: dict[str, Any] = {
        "model": "SmolLM2-135M", "ranks": options.ranks, "blocks": options.blocks, "sequences": options.sequences,
        "tokens": options.tokens, "rounds": options.rounds, "shared": options.shared,
        "decomposition_predicted": round(expected, 3),
    }  # fmt: skip
    for name in (*STAGES.values(), "whole"):
        row |= {
            f"{name}_alone": round(alone[name], 2),
            f"{name}_together": round(together[name], 2),
            f"{name}_times": round(alone[name] / together[name], 3),
        }
    print(row)
    if not options.no_record:
        print(f"\nrecorded in {append('distribution', [row])}")


if __name__ == "__main__":
    main()

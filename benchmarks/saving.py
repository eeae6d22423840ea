"""What saving as it goes costs a fit: SmolLM2-135M with and without a directory, taking turns.

    OMP_NUM_THREADS=1 python benchmarks/saving.py                     # about fifteen minutes
    OMP_NUM_THREADS=1 python benchmarks/saving.py --rounds 1 --no-record

Few tokens are the worst case: what is decomposed and saved is as much as for many. The two ways take turns, beginning
with the other one each time, and the least of each over the rounds is compared. Three measures:

- `wall`: what a user sees. On a machine that does other things too it says little.
- `cpu`: seconds of all threads. With one thread the side thread needs a core of its own, or else this is what it costs.
- `fitting`: CPU seconds of the thread that fits, and the time that it waited for the side thread and for the disk:
  what the wall time is, where nothing else runs and a core is free. It takes OMP_NUM_THREADS=1 to say so.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from records import append

import kfade
from kfade.models import demo_model, load_model
from kfade.resume import FitStore
from kfade.side_thread import SideThread

Batch = dict[str, torch.Tensor]
MEASURES = ("wall", "cpu", "fitting")
_waited = [0.0]


def waits(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the time that its thread did not compute added to `_waited`."""

    def call(*arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return function(*arguments)
        finally:
            _waited[0] += time.perf_counter() - wall - (time.thread_time() - cpu)

    return call


def measure(model: Any, batches: list[Batch], config: kfade.FitConfig, store: Path | None) -> dict[str, float]:
    """Seconds of one fit, and what it left on the disk."""
    _waited[0] = 0.0
    wall, cpu, thread = time.perf_counter(), time.process_time(), time.thread_time()
    fitted = kfade.fit(model, batches, config, store=store)
    found = {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "fitting": time.thread_time() - thread + _waited[0],
        "waited": _waited[0],
        "gigabytes": 0.0,
    }
    assert len(fitted)
    if store is not None:
        found["gigabytes"] = sum(p.stat().st_size for p in store.iterdir()) / 1e9
        shutil.rmtree(store)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curvature", default="ekfac")
    parser.add_argument("--modules", default="mlp")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two saves of the sums of a pass")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to save; a temporary directory if not given")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    for owner, name in ((SideThread, "wait"), (SideThread, "close"), (FitStore, "open")):
        setattr(owner, name, waits(getattr(owner, name)))
    model, _ = load_model(str(demo_model()))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (options.sequences, options.tokens), generator=generator)
    batches = [{"input_ids": part} for part in ids.split(options.batch)]
    config = kfade.FitConfig(
        curvature=options.curvature, modules=options.modules, checkpoint_seconds=options.every
    )  # fmt: skip
    ways: dict[str, list[dict[str, float]]] = {"plain": [], "saved": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number in range(options.rounds):
            for way in list(ways)[:: -1 if number % 2 else 1]:
                found = measure(model, batches, config, Path(folder) / "store" if way == "saved" else None)
                ways[way].append(found)
                print(way, {key: round(value, 2) for key, value in found.items()}, flush=True)
    plain, saved = ({key: min(one[key] for one in ones) for key in ones[0]} for ones in ways.values())
    row: dict[str, Any] = {
        "model": "SmolLM2-135M", "curvature": options.curvature, "modules": options.modules,
        "sequences": options.sequences, "tokens": options.tokens, "every": options.every, "rounds": options.rounds,
        "gigabytes": round(saved["gigabytes"], 3), "waited": round(saved["waited"], 2),
    }  # fmt: skip
    for name in MEASURES:
        row |= {
            f"{name}_plain": round(plain[name], 2),
            f"{name}_saved": round(saved[name], 2),
            f"{name}_cost": round(saved[name] / plain[name] - 1, 4),
        }
    print(row)
    if not options.no_record:
        print(f"\nrecorded in {append('saving', [row]).relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()

"""What saving as it goes costs a fit: SmolLM2-135M with and without a directory, taking turns.

    OMP_NUM_THREADS=1 python benchmarks/saving.py                     # about ten minutes
    OMP_NUM_THREADS=1 python benchmarks/saving.py --curvature kfac --rounds 1 --no-record

Few tokens are the worst case: what is decomposed and saved is as much as for many. Three ways take turns, beginning
with another one each time: no directory; a directory; and a directory whose sums are also saved between batches every
`--every` seconds. The least of each way's wall and CPU seconds over the rounds is set against that without. A machine
that does other things too lengthens all of them, and the side thread finds a core only where one is free.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from records import append

import kfade
from kfade.models import demo_model, load_model

Batch = dict[str, torch.Tensor]
WAYS = ("plain", "saved", "saved, sums too")


def seconds_of(model: Any, batches: list[Batch], way: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Wall and CPU seconds of one fit, and what it left on the disk."""
    every = options.every if way == WAYS[2] else 3600.0
    config = kfade.FitConfig(curvature=options.curvature, checkpoint_seconds=every)
    store = None if way == WAYS[0] else folder / "store"
    wall, cpu = time.perf_counter(), time.process_time()
    fitted = kfade.fit(model, batches, config, store=store)
    found: dict[str, Any] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "gb": 0.0}
    assert len(fitted)
    if store is not None:
        found["gb"] = sum(p.stat().st_size for p in store.iterdir()) / 1e9
        shutil.rmtree(store)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curvature", default="ekfac")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two saves of the sums")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to save; a temporary directory if not given")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    model, _ = load_model(str(demo_model()))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (options.sequences, options.tokens), generator=generator)
    batches = [{"input_ids": part} for part in ids.split(options.batch)]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number in range(options.rounds):
            for place in range(len(WAYS)):
                way = WAYS[(number + place) % len(WAYS)]
                found[way].append(seconds_of(model, batches, way, options, Path(folder)))
                print(way, {key: round(value, 2) for key, value in found[way][-1].items()}, flush=True)
    best = {way: {key: min(one[key] for one in ones) for key in ones[0]} for way, ones in found.items()}
    rows = [
        {
            "model": "SmolLM2-135M", "curvature": options.curvature, "sequences": options.sequences,
            "tokens": options.tokens, "rounds": options.rounds, "way": way,
            "every": options.every if way == WAYS[2] else "", "gigabytes": round(best[way]["gb"], 3),
            "wall": round(best[way]["wall"], 2), "cpu": round(best[way]["cpu"], 2),
            "wall_slowest": round(max(one["wall"] for one in found[way]), 2),
            "wall_share": round(best[way]["wall"] / best[WAYS[0]]["wall"] - 1, 4),
            "cpu_share": round(best[way]["cpu"] / best[WAYS[0]]["cpu"] - 1, 4),
        }
        for way in WAYS
    ]  # fmt: skip
    for row in rows:
        print(row)
    if not options.no_record:
        print(f"\nrecorded in {append('saving', rows).relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()

"""Rows of benchmark results: one CSV file a benchmark, appended to, losses included."""

from __future__ import annotations

import csv
import datetime
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor (or GPU), and the threads that were used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def append(benchmark: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Append rows with date, machine and versions to `results/<benchmark>.csv`.

    Raises:
        ValueError: the file has other columns.
    """
    import transformers

    common = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path = RESULTS / f"{benchmark}.csv"
    path.parent.mkdir(exist_ok=True)
    full = [{**common, **row} for row in rows]
    header = list(full[0])
    exists = path.exists()
    if exists:
        with path.open(newline="") as file:
            found = next(csv.reader(file))
        if found != header:
            raise ValueError(f"{path} has columns {found}; the rows have {header}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header)
        if not exists:
            writer.writeheader()
        writer.writerows(full)
    return path

"""Rows of benchmark results: one CSV file a benchmark, appended to, losses included."""

from __future__ import annotations

import csv
import datetime
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine(threads: int | None = None) -> str:
    """Processor (or GPU), and the threads that were used: so many, or those of this process."""
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
    return f"{name}, {threads or torch.get_num_threads()} threads"


def installed(package: str) -> str:
    """Its version, or an empty text."""
    try:
        return torch.__version__ if package == "torch" else version(package)
    except PackageNotFoundError:
        return ""


def append(
    benchmark: str,
    rows: Iterable[Mapping[str, Any]],
    *,
    packages: Sequence[str] = ("torch", "transformers"),
    folder: Path = RESULTS,
) -> Path:
    """Append rows with date, machine and versions to `<folder>/<benchmark>.csv`.

    Args:
        benchmark: name of the file.
        rows: all with the same columns.
        packages: whose versions are written beside them.
        folder: made if need be.

    Raises:
        ValueError: the file has other columns.
    """
    common = {"date": datetime.date.today().isoformat(), "machine": machine(), **{p: installed(p) for p in packages}}
    path = folder / f"{benchmark}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
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

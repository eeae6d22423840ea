"""`kfade compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from ..config import CompareConfig
from . import options as opt
from .output import keep_options, options_in_force, print_result, read_source, start_progress, table_of

_BUDGETS = [f"{b:g}" for b in opt.COMPARE.budgets]
_LEARNING_RATES = [f"{r:g}" for r in opt.COMPARE.learning_rates]


def _words(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """An option that may be repeated, or hold several values with commas between them."""
    words = tuple(word.strip() for value in values for word in str(value).split(",") if word.strip())
    if not words:
        raise ValueError(f"--{name} is empty; it must have at least one value")
    return words


def _numbers(name: str, values: Sequence[str]) -> tuple[float, ...]:
    words = _words(name, values)
    try:
        return tuple(float(word) for word in words)
    except ValueError:
        raise ValueError(f"--{name} is {', '.join(words)}; it must be numbers with commas between them") from None


def compare(
    ctx: typer.Context,
    model: opt.Model,
    forget: opt.Forget,
    retain: opt.Retain,
    out: opt.Out,
    retrained: Annotated[
        str | None, typer.Option("--retrained", help="Model trained without the forget set: the point to aim at.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Also measure KL from the original on this: a .txt file or .jsonl.")
    ] = None,
    methods: Annotated[
        list[str], typer.Option("--methods", help="Names with commas between them.", rich_help_panel=opt.STEP)
    ] = list(opt.COMPARE.methods),  # noqa: B006
    budgets: Annotated[
        list[str],
        typer.Option(
            "--budgets", help="Retain KL at which to compare, nats a token, commas between.", rich_help_panel=opt.STEP
        ),
    ] = _BUDGETS,
    seeds: Annotated[int, typer.Option("--seeds", help="How many runs of each.", rich_help_panel=opt.STEP)] = (
        opt.COMPARE.seeds
    ),
    epochs: Annotated[
        float, typer.Option("--epochs", help="Passes over the forget set.", rich_help_panel=opt.STEP)
    ] = opt.COMPARE.epochs,
    learning_rates: Annotated[
        list[str],
        typer.Option(
            "--learning-rates",
            help="Tries of each baseline, commas between; K-FADE tries as many budgets.",
            rich_help_panel=opt.STEP,
        ),
    ] = _LEARNING_RATES,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Time that one run may take.", rich_help_panel=opt.STEP)
    ] = opt.COMPARE.seconds,
    holdout: Annotated[
        float,
        typer.Option("--holdout", help="Share of the retain records that no method sees.", rich_help_panel=opt.DATA),
    ] = opt.COMPARE.holdout,
    chat: opt.Chat = None,
    batch_size: opt.BatchSize = 8,
    loss_on: opt.LossOn = "response",
    max_tokens: opt.MaxTokens = 512,
    max_new_tokens: opt.MaxNew = 32,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    limit: opt.Limit = None,
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Compare unlearning methods at equal retain KL and equal time; draw the trade-off.

    Writes report.html, points.csv, compare.json, config.yaml and runs/ into OUT; finished runs there are not run again.
    """
    from .. import compare as comparison
    from ..compare import report
    from ..data import check_loss_on
    from ..models import check_model

    options = CompareConfig(
        methods=_words("methods", methods), budgets=_numbers("budgets", budgets), seeds=seeds, epochs=epochs,
        learning_rates=_numbers("learning-rates", learning_rates), seconds=seconds, holdout=holdout,
    )  # fmt: skip
    check_loss_on(loss_on)
    comparison.check_methods(options.methods)
    sets = {"forget": read_source(forget, limit), "retain": read_source(retain, limit)}
    if text is not None:
        sets["text"] = read_source(text, limit)
    for name in (model, retrained):
        if name is not None:
            check_model(name, dtype, device)
    keep_options(out, options_in_force(ctx, options))
    progress = start_progress(quiet)
    batching: dict[str, Any] = {"chat": chat, "batch_size": batch_size, "max_tokens": max_tokens}
    result = comparison.compare(
        model, sets, options, out, retrained=retrained, loss_on=loss_on, max_new_tokens=max_new_tokens, dtype=dtype,
        device=device, progress=progress, **batching,
    )  # fmt: skip
    with progress.stage("report"):
        page = report.write(out, "Unlearning methods compared", f"Model {model}.", [result])
    values = {"command": "compare", "out": str(out), **result.to_json()}
    print_result(as_json, values, *_compare_tables(result))
    for budget in options.budgets:
        progress.say(comparison.verdict(result, budget))
    progress.say(f"report: {page}")


def _compare_tables(result: Any) -> list[Table]:
    """The best points within each budget, a method a row."""
    from ..compare import at_equal_kl, spread

    tables = []
    for budget in result.options.budgets:
        rows = []
        for method, points in at_equal_kl(result.points, budget).items():
            names = [*(["distance"] if result.aims else []), "forget_nll", "retain_kl", "seconds"]
            cells = [f"{mean:.4g} ± {deviation:.2g}" for mean, deviation in (
                spread([getattr(p, name) for p in points]) for name in names)]  # fmt: skip
            rows.append([result.title(method), *cells])
        head = ["", *(["KL to the retrained, forget"] if result.aims else []), "forget NLL", "retain KL", "seconds"]
        tables.append(table_of(f"Within a retain KL of {budget:g} nats a token", head, rows))
    return tables

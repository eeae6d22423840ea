"""`kfade influence`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..config import InfluenceConfig
from . import options as opt
from .output import costs_of, keep_options, options_in_force, print_result, read_source, start_progress, table_of


def influence(
    ctx: typer.Context,
    model: opt.Model,
    query: Annotated[
        str, typer.Option("--query", help="What to explain, a record a query; the same kinds of source as --train.")
    ],
    train: Annotated[
        str, typer.Option("--train", help="Training records to score: a .jsonl or .txt file, or a data set.")
    ],
    factors: Annotated[
        Path,
        typer.Option(
            "--factors",
            metavar="DIR",
            help="Curvature that `kfade fit` saved, best of the training records.",
            rich_help_panel=opt.CURVATURE,
        ),
    ],
    out: opt.Out,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Most helpful training records to list a query.")] = 10,
    damping: opt.Damping = opt.INFLUENCE.damping,
    damping_kind: opt.DampingKind = opt.INFLUENCE.damping_kind,
    solved_bytes: Annotated[
        int,
        typer.Option(
            "--solved-bytes",
            help="Bytes of solved query gradients kept at once; more queries take more passes over --train.",
            rich_help_panel=opt.CURVATURE,
        ),
    ] = opt.INFLUENCE.solved_bytes,
    query_rank: Annotated[
        int | None,
        typer.Option(
            "--query-rank",
            help="Keep each solved query gradient as its nearest matrix of this rank; whole if not given.",
            rich_help_panel=opt.CURVATURE,
        ),
    ] = opt.INFLUENCE.query_rank,
    chat: opt.Chat = None,
    batch_size: opt.BatchSize = 8,
    loss_on: Annotated[
        str,
        typer.Option(
            "--loss-on",
            help="What of a query is explained: its response, or only the short answer inside it.",
            rich_help_panel=opt.DATA,
        ),
    ] = "response",
    max_tokens: opt.MaxTokens = 512,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    limit: opt.Limit = None,
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Score training records by their influence on the loss of each query.

    Writes influence.safetensors (all scores), influence.json (the top records) and config.yaml into OUT.
    """
    from ..curvature import Curvature
    from ..data import check_loss_on, ordered_batches
    from ..influence import influence as find_influence
    from ..models import check_model, load_model
    from ..storage import read_manifest

    options = InfluenceConfig(damping, damping_kind, solved_bytes, query_rank)
    check_loss_on(loss_on)
    query_records, train_records = read_source(query, limit), read_source(train, limit)
    check_model(model, dtype, device)
    read_manifest(factors)
    keep_options(out, options_in_force(ctx, options))
    progress = start_progress(quiet)
    with progress.stage("load the model"):
        loaded, tokenizer = load_model(model, dtype, device)
    fitted = Curvature.load(factors, loaded)
    batching: dict[str, Any] = {"chat": chat, "batch_size": batch_size, "max_tokens": max_tokens}
    queries, query_order = ordered_batches(tokenizer, query_records, **batching, loss_on=loss_on)
    batches, order = ordered_batches(tokenizer, train_records, **batching)
    result = find_influence(loaded, fitted, queries, batches, options, progress=progress).in_order(query_order, order)
    with progress.stage("save"):
        result.save(out, top_k)
    values = {"command": "influence", "out": str(out), **result.summary(top_k), "costs": costs_of(progress)}
    print_result(as_json, values, _influence_table(result, query_records, train_records, top_k))


def _influence_table(result: Any, queries: Sequence[Any], train: Sequence[Any], k: int) -> Table:
    """The top k of each query, by the beginnings of the records."""

    def beginning(record: Any) -> str:
        text = " ".join((record.prompt or record.response).split())
        return text if len(text) <= 50 else f"{text[:49]}…"

    values, indices = result.top(k)
    rows = []
    for q, (scores, numbers) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        titles = [f"{q}: {beginning(queries[q])}", *[""] * (len(numbers) - 1)]
        found = [[f"{n}: {beginning(train[n])}", f"{score:.4g}"] for score, n in zip(scores, numbers, strict=True)]
        rows += [[title, *cells] for title, cells in zip(titles, found, strict=True)]
    return table_of("Most helpful training records", ["query", "training record", "score"], rows, "left")

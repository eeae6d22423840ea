"""`kfade unlearn` and `kfade apply`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import ReapplyConfig
from ..launch import group_of_all, launched, own_device
from . import options as opt
from .output import (
    costs_of,
    keep_options,
    options_in_force,
    print_result,
    read_source,
    scores_table,
    start_progress,
    steps_table,
    table_of,
)


def unlearn(
    ctx: typer.Context,
    model: opt.Model,
    forget: opt.Forget,
    retain: opt.Retain,
    out: opt.Out,
    factors: Annotated[
        Path | None,
        typer.Option(
            "--factors",
            metavar="DIR",
            help="Curvature saved by `kfade fit`, instead of a fit.",
            rich_help_panel=opt.CURVATURE,
        ),
    ] = None,
    curvature: opt.Curvature = opt.UNLEARN.fit.curvature,
    fisher: opt.Fisher = opt.UNLEARN.fit.fisher,
    modules: opt.Modules = opt.UNLEARN.fit.modules,
    samples: opt.Samples = opt.UNLEARN.fit.samples,
    seed: opt.Seed = opt.UNLEARN.fit.seed,
    layers_per_pass: opt.LayersPerPass = opt.UNLEARN.fit.layers_per_pass,
    device_memory: opt.DeviceMemory = opt.UNLEARN.fit.device_memory,
    state_device: opt.StateDevice = opt.UNLEARN.fit.state_device,
    autocast: opt.Autocast = opt.UNLEARN.fit.autocast,
    temperature: opt.Temperature = opt.UNLEARN.fit.temperature,
    rank: opt.Rank = opt.UNLEARN.fit.rank,
    max_factor_order: opt.MaxFactorOrder = opt.UNLEARN.fit.max_factor_order,
    decomposition: opt.Decomposition = opt.UNLEARN.fit.decomposition,
    basis_share: opt.BasisShare = opt.UNLEARN.fit.basis_share,
    checkpoint_seconds: opt.CheckpointSeconds = opt.UNLEARN.fit.checkpoint_seconds,
    tokens_per_dimension: opt.TokensPerDimension = opt.UNLEARN.tokens_per_dimension or 0.0,
    damping: opt.Damping = opt.UNLEARN.damping,
    damping_kind: opt.DampingKind = opt.UNLEARN.damping_kind,
    published: opt.Published = False,
    steps: opt.Steps = opt.UNLEARN.steps,
    tokens_per_step: opt.TokensPerStep = opt.UNLEARN.tokens_per_step or 0,
    kl_budget: opt.KlBudget = None,
    step_size: opt.StepSize = opt.UNLEARN.step_size,
    step_share: opt.StepShare = opt.UNLEARN.step_share,
    objective: opt.Objective = opt.UNLEARN.objective,
    margin: opt.Margin = opt.UNLEARN.margin,
    target_temperature: opt.TargetTemperature = opt.UNLEARN.target_temperature,
    pull_back: opt.PullBack = opt.UNLEARN.pull_back,
    npo_beta: opt.NpoBeta = opt.UNLEARN.npo_beta,
    retain_weight: opt.RetainWeight = opt.UNLEARN.retain_weight,
    cg_iterations: opt.CgIterations = opt.UNLEARN.cg_iterations,
    refit_every: opt.RefitEvery = opt.UNLEARN.refit_every,
    holdout: opt.Holdout = opt.UNLEARN.holdout,
    trials: opt.Trials = opt.UNLEARN.trials,
    chat: opt.Chat = None,
    batch_size: opt.BatchSize = 8,
    loss_on: opt.LossOn = "response",
    max_tokens: opt.MaxTokens = 512,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    limit: opt.Limit = None,
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
    max_new_tokens: opt.MaxNew = 32,
    keep_factors: Annotated[
        bool,
        typer.Option(
            "--keep-factors/--no-keep-factors",
            help="Leave the fitted curvature in OUT/factors, for --factors; else it is there only until the end.",
            rich_help_panel=opt.CURVATURE,
        ),
    ] = False,
    save_model: Annotated[
        bool, typer.Option("--save-model/--no-save-model", help="Also write the changed model, to OUT/model.")
    ] = False,
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Unlearn a forget set within a budget of retain KL; write the update and a report.

    Writes update.safetensors, report.html, report.json and config.yaml into OUT. The curvature is saved in OUT/factors
    as it is fitted: where the command is cut off meanwhile, the same command goes on with it.
    """
    from .. import models
    from ..curvature import Curvature
    from ..data import check_loss_on, make_batches
    from ..evaluate import survey, survey_references
    from ..journal import check_store
    from ..report import Comparison, spread, to_json, write_report
    from ..storage import read_manifest, remove_curvature
    from ..unlearn import unlearn as find_update

    options = opt.unlearn_options(ctx.params)
    check_loss_on(loss_on)
    forget_records, retain_records = read_source(forget, limit), read_source(retain, limit)
    sets = {
        "Forget": read_source(eval_forget or forget, limit)[:eval_limit],
        "Retain": read_source(eval_retain or retain, limit)[:eval_limit],
    }
    device, number = own_device(device), launched()[0]
    models.check_model(model, dtype, device)
    store = out / "factors" if factors is None else None
    if factors is not None:
        read_manifest(factors)
    if store is not None and number == 0:
        # What an earlier run has finished stays.
        keep_factors = check_store(store, options.fit) or keep_factors
    if save_model:
        models.check_save(out / "model")
    effective = options_in_force(ctx, options.fit, options)
    if number == 0:
        keep_options(out, effective)
    progress = start_progress(quiet)
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
    print_result(as_json, values, scores_table(columns), steps_table(update.report))
    for warning in update.report.warnings:
        progress.say(f"note: {warning}")
    progress.say(f"report: {page}")


def apply(
    ctx: typer.Context,
    model: opt.Model,
    update: opt.Update,
    out: opt.Out,
    scale: opt.Scale = 1.0,
    kl_budget: Annotated[
        float | None,
        typer.Option(
            "--kl-budget",
            help="Choose the scale instead, beginning at --scale: the largest found whose KL to the model as it is,"
            " measured on --retain, is within so many nats a token.",
            rich_help_panel=opt.STEP,
        ),
    ] = None,
    retain: opt.OptionalRetain = None,
    trials: opt.Trials = opt.UNLEARN.trials,
    chat: opt.Chat = None,
    batch_size: opt.BatchSize = 8,
    max_tokens: opt.MaxTokens = 512,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    limit: opt.Limit = None,
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Apply an update to a model and save the result to OUT, for transformers to load. Under torchrun rank 0 does it.

    A model that was trained further can take the same update again, with the scale that a KL budget allows.
    """
    from .. import models
    from ..data import make_batches
    from ..durability import reapply
    from ..update import Update

    if launched()[0] > 0:
        return
    device = own_device(device)
    if (kl_budget is None) != (retain is None):
        raise ValueError(f"kl_budget is {kl_budget} and retain is {retain}; both or neither must be given")
    options = None if kl_budget is None else ReapplyConfig(kl_budget, scale, trials)
    records = None if retain is None else read_source(retain, limit)
    loaded_update = Update.load(update)
    models.check_model(model, dtype, device)
    models.check_save(out)
    progress = start_progress(quiet)
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
        values |= {**asdict(found), "costs": costs_of(progress)}
        rows.append(["retain KL, nats a token", f"{found.kl:.4g}"])
    with progress.stage("save"):
        models.save_model(loaded, tokenizer, out)
        keep_options(out, options_in_force(ctx))
    values["tensors"] = len(loaded_update.tensors)
    rows += [["scale", f"{values['scale']:g}"], ["tensors changed", str(len(loaded_update.tensors))]]
    print_result(as_json, values, table_of("Applied", ["", ""], rows))

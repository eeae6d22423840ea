"""`kfade fit` and `kfade plan`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..config import FitConfig
from ..launch import group_of_all, launched, own_device
from . import options as opt
from .output import costs_of, keep_options, options_in_force, print_result, read_source, start_progress, table_of


def fit(
    ctx: typer.Context,
    model: opt.Model,
    retain: opt.Retain,
    out: opt.Out,
    curvature: opt.Curvature = opt.FIT.curvature,
    fisher: opt.Fisher = opt.FIT.fisher,
    modules: opt.Modules = opt.FIT.modules,
    samples: opt.Samples = opt.FIT.samples,
    seed: opt.Seed = opt.FIT.seed,
    layers_per_pass: opt.LayersPerPass = opt.FIT.layers_per_pass,
    device_memory: opt.DeviceMemory = opt.FIT.device_memory,
    state_device: opt.StateDevice = opt.FIT.state_device,
    autocast: opt.Autocast = opt.FIT.autocast,
    temperature: opt.Temperature = opt.FIT.temperature,
    rank: opt.Rank = opt.FIT.rank,
    max_factor_order: opt.MaxFactorOrder = opt.FIT.max_factor_order,
    decomposition: opt.Decomposition = opt.FIT.decomposition,
    basis_share: opt.BasisShare = opt.FIT.basis_share,
    basis: Annotated[
        Path | None,
        typer.Option(
            "--basis",
            help="Take A, S and the eigenvectors of this fitted curvature, and fit the eigenvalues alone, in one pass.",
            rich_help_panel=opt.CURVATURE,
        ),
    ] = None,
    checkpoint_seconds: opt.CheckpointSeconds = opt.FIT.checkpoint_seconds,
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
    """Fit the curvature of a retain set and save it, for `unlearn --factors` and for other uses.

    It is saved as it is fitted: where the command is cut off, by whatever, the same command goes on. Under torchrun or
    accelerate launch all processes share the work.
    """
    from ..curvature import Curvature
    from ..data import make_batches
    from ..fit import fit as fit_curvature
    from ..journal import check_store
    from ..models import check_model, load_model
    from ..plan import plan_run
    from ..plan.text import beside_table
    from ..storage import MANIFEST

    options = opt.fit_options(ctx.params)
    records = read_source(retain, limit)
    device = own_device(device)
    check_model(model, dtype, device)
    given = None if basis is None else Curvature.load(basis)
    first = launched()[0] == 0
    if first:
        check_store(out, options)
        if not (out / MANIFEST).exists():
            keep_options(out, options_in_force(ctx, options))
    progress = start_progress(quiet)
    group = ctx.with_resource(group_of_all(device))
    with progress.stage("load the model"):
        loaded, tokenizer = load_model(model, dtype, device)
    batches = make_batches(tokenizer, records, chat=chat, batch_size=batch_size, max_tokens=max_tokens)
    planned = None
    if group is None:
        with progress.stage("plan"):
            planned = plan_run(loaded, batches, options, model, out, given)
        for reason in planned.reasons:
            progress.say(reason)
    fitted = fit_curvature(loaded, batches, options, progress=progress, store=out, group=group, basis=given)
    if not first:
        return
    names = list(getattr(fitted, "owners", fitted))
    compared = [] if planned is None else planned.beside(progress.costs)
    # Not before the fit: what is there may be refused, and then it keeps its options.
    keep_options(out, options_in_force(ctx, options))
    values = {
        "command": "fit",
        "out": str(out),
        "layers": names,
        "records": len(records),
        "costs": costs_of(progress),
        "plan": None if planned is None else planned.to_json(),
        "planned_and_measured": [asdict(stage) for stage in compared],
    }
    rows = [[c.name, f"{c.seconds:.1f} s", f"{c.rate:,.0f} {c.unit}s/s" if c.units else "–"] for c in progress.costs]
    shown = table_of(f"{curvature} of {len(names)} layers in {out}", ["stage", "time", "rate"], rows)
    print_result(as_json, values, shown, *(table_of(*beside_table(compared)) for _ in compared[:1]))


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
    batch_size: opt.BatchSize = 8,
    curvature: opt.Curvature = opt.FIT.curvature,
    fisher: opt.Fisher = opt.FIT.fisher,
    modules: opt.Modules = opt.FIT.modules,
    samples: opt.Samples = opt.FIT.samples,
    layers_per_pass: opt.LayersPerPass = opt.FIT.layers_per_pass,
    device_memory: opt.DeviceMemory = opt.FIT.device_memory,
    state_device: opt.StateDevice = opt.FIT.state_device,
    autocast: opt.Autocast = opt.FIT.autocast,
    rank: opt.Rank = opt.FIT.rank,
    max_factor_order: opt.MaxFactorOrder = opt.FIT.max_factor_order,
    decomposition: opt.Decomposition = opt.FIT.decomposition,
    basis_share: opt.BasisShare = opt.FIT.basis_share,
    basis: Annotated[
        bool,
        typer.Option(
            "--basis",
            help="The fit will take A, S and the eigenvectors of a fitted curvature, and fit the eigenvalues alone.",
            rich_help_panel=opt.CURVATURE,
        ),
    ] = False,
    dtype: opt.Dtype = "float32",
    device: Annotated[
        str,
        typer.Option(
            "--device", help="cpu (measured for two seconds), A100, H100, H200, B200 or L40S.", rich_help_panel=opt.DATA
        ),
    ] = "cpu",
    devices: Annotated[
        int,
        typer.Option("--devices", help="Devices that share the work; simulated beyond one.", rich_help_panel=opt.DATA),
    ] = 1,
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Say what a fit will take, before anything runs: FLOPs, bytes, time and memory of each stage, and its passes."""
    from ..plan import plan as plan_of
    from ..plan.text import tables

    options = FitConfig(
        curvature=curvature, fisher=fisher, modules=modules, samples=samples, layers_per_pass=layers_per_pass,
        device_memory=device_memory, state_device=state_device, autocast=autocast, rank=rank,
        max_factor_order=max_factor_order, decomposition=decomposition, basis_share=basis_share,
    )  # fmt: skip
    start_progress(quiet)
    found = plan_of(
        model, tokens, seq_len, options, batch_size=batch_size, device=device, devices=devices, dtype=dtype, basis=basis
    )
    shown = [table_of(title, head, rows, "left") for title, head, rows in tables(found)]
    print_result(as_json, {"command": "plan", **found.to_json()}, *shown)

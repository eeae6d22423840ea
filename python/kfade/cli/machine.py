"""`kfade bench` and `kfade doctor`: what this machine has, and how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .output import keep_options, options_in_force, print_result, start_progress, table_of


def bench(
    ctx: typer.Context,
    operation: Annotated[
        list[str] | None, typer.Option("--operation", help="An operation; may be repeated.", show_default="all")
    ] = None,
    sizes: Annotated[str, typer.Option("--sizes", help="small, medium, or large (for a GPU).")] = "small",
    dtype: Annotated[str, typer.Option("--dtype", help="Of the rows: float32, bfloat16 or float16.")] = "float32",
    repeats: Annotated[int, typer.Option("--repeats", help="Timed calls of each provider.")] = 5,
    device: opt.Device = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Also write bench.csv, bench.png and config.yaml here.")
    ] = None,
    config: opt.Config = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Time the operations on this machine beside the plain PyTorch that they replace."""
    from .. import bench as benchmark

    options = benchmark.BenchConfig(tuple(operation or ()), sizes, dtype, repeats, device)
    progress = start_progress(quiet)
    result = benchmark.run(options, progress)
    if out is not None:
        benchmark.write(result, out)
        keep_options(out, options_in_force(ctx))
    shown = [table_of(title, head, rows) for title, head, rows in benchmark.tables(result)]
    print_result(as_json, {"command": "bench", **result.to_json()}, *shown)
    progress.say(f"{result.device}: the peak is {result.peak_tflops:.3g} TFLOP/s")
    for note in result.notes:
        progress.say(f"note: {note}")


def doctor(as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """Show versions, devices, and which backend serves each kernel and why."""
    from .. import doctor as checks

    values = checks.collect()
    tables = [table_of(title, head, rows, "left") for title, head, rows in checks.tables(values)]
    print_result(as_json, values, *tables)
    if not as_json:
        print(values["note"])

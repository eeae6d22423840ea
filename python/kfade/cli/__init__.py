"""The command line: parses, calls the library, prints. Options are checked where they are used."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .comparison import compare
from .demonstration import demo
from .errors import Group
from .evaluation import evaluate, evaluate_lm_eval, evaluate_tofu
from .fitting import fit, plan
from .influence import influence
from .machine import bench, doctor
from .unlearning import apply, unlearn

app = typer.Typer(
    name="kfade",
    cls=Group,
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


# In the order in which `kfade --help` shows them.
for _name, _command in (
    ("fit", fit),
    ("plan", plan),
    ("unlearn", unlearn),
    ("apply", apply),
    ("eval", evaluate),
    ("eval tofu", evaluate_tofu),
    ("eval lm-eval", evaluate_lm_eval),
    ("influence", influence),
    ("compare", compare),
    ("demo", demo),
    ("bench", bench),
    ("doctor", doctor),
):
    app.command(_name)(_command)

"""What ends a command: errors that users can mend, and interruptions."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import KfadeError
from ..launch import launched
from .options import DEBUG


class Group(TyperGroup):
    """Turns the errors that users can mend into one line and exit code 2."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A command may have two words, such as `eval tofu`."""
        words = " ".join(args[:2])
        return super().resolve_command(ctx, [words, *args[2:]] if words in self.commands else args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            if launched()[0] == 0:
                print(str(error) or "interrupted; no half-written file is left", file=sys.stderr)
            raise typer.Exit(130) from None
        except (KfadeError, ValueError, TypeError, OSError) as error:
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            message = " ".join(str(error).split()) or type(error).__name__
            rank, ranks = launched()
            print(f"error{f' of rank {rank}' if ranks > 1 else ''}: {message}", file=sys.stderr)
            raise typer.Exit(2) from None

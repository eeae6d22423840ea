"""Which backend serves a call, and why.

Every operation is declared once with a `torch.library` schema. Its implementation asks the
operation's backends, fastest first, whether they serve these arguments; the first that does runs.
The last one is always the plain PyTorch reference, which serves everything. `explain` asks the same
question without running anything.

The environment variable `KFADE_DISABLE` (names separated by commas, e.g. `pytorch,triton`) switches
backends off; it is read at every call, so that a doubtful result can be checked on the spot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .precision import float32_products

LIBRARY = torch.library.Library("kfade_kernels", "DEF")
KILL_SWITCH = "KFADE_DISABLE"

_operations: dict[str, Operation] = {}


@contextmanager
def no_autocast() -> Iterator[None]:
    """Within this block products keep the dtype of their operands, whatever the caller's autocast."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Attributes:
        name: `triton`, `pytorch` or `reference`.
        run: takes the arguments of the schema.
        refuses: takes the same arguments; returns why this backend cannot serve them, or None.
        configuration: takes the same arguments; says how the call would be run.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *_: None
    configuration: Callable[..., str] = lambda *_: ""


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`: who serves the call, how, and why the others do not."""

    operation: str
    backend: str
    configuration: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        how = f" ({self.configuration})" if self.configuration else ""
        why = "".join(f"; not {name}: {reason}" for name, reason in self.refused)
        return f"{self.operation}: {self.backend}{how}{why}"


@dataclass(frozen=True)
class Operation:
    """A declared operation: its schema is in `torch.ops.kfade_kernels`, its backends are here."""

    name: str
    prepare: Callable[..., tuple[Any, ...]]
    backends: Sequence[Backend] = field(default_factory=tuple)

    def choose(self, *arguments: Any) -> tuple[Backend, list[tuple[str, str]]]:
        disabled = {name.strip() for name in os.environ.get(KILL_SWITCH, "").split(",")}
        refused: list[tuple[str, str]] = []
        for backend in self.backends[:-1]:
            reason = f"disabled by {KILL_SWITCH}" if backend.name in disabled else backend.refuses(*arguments)
            if reason is None:
                return backend, refused
            refused.append((backend.name, reason))
        return self.backends[-1], refused

    def __call__(self, *arguments: Any) -> Any:
        # Under a caller's autocast the products inside would be rounded to 16 bit, and to TF32 by a global setting.
        with no_autocast(), float32_products():
            return self.choose(*arguments)[0].run(*arguments)


def declare(
    name: str,
    schema: str,
    prepare: Callable[..., tuple[Any, ...]],
    fake: Callable[..., Any],
    backends: Sequence[Backend],
) -> Any:
    """Declare an operation and return the `torch.ops` callable.

    Args:
        name: public name, e.g. `syrk_`.
        schema: argument list and result in the language of `torch.library`.
        prepare: checks the arguments of the public function and turns them into those of the schema.
        fake: shapes and dtypes of the result, for tracing.
        backends: fastest first, the reference last.
    """
    operation = Operation(name, prepare, tuple(backends))
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, operation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kfade_kernels::{name}", fake, lib=LIBRARY)
    _operations[name] = operation
    return getattr(torch.ops.kfade_kernels, name)


def operations() -> tuple[str, ...]:
    """Names of all declared operations."""
    return tuple(_operations)


def explain(operation: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend and configuration would serve a call, and why; nothing is run.

    Args:
        operation: name of a public operation, e.g. `"syrk_"`.
        args: the arguments that the operation itself would be given.
        kwargs: its keyword arguments.

    Raises:
        ValueError: no operation has that name; or the arguments are wrong, as the operation would say.
    """
    if operation not in _operations:
        raise ValueError(f"operation is {operation!r}; it must be one of {', '.join(_operations)}")
    declared = _operations[operation]
    arguments = declared.prepare(*args, **kwargs)
    backend, refused = declared.choose(*arguments)
    return Explanation(operation, backend.name, backend.configuration(*arguments), tuple(refused))

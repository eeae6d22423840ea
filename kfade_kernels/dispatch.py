"""Which backend serves a call, and why.

Every operation is declared once with a `torch.library` schema. Its implementation asks the
operation's backends, fastest first, whether they serve these arguments; the first that does runs.
The last one is always the plain PyTorch reference, which serves everything. `explain` asks the same
question without running anything.

What autograd may do with an operation is declared with it: an argument that requires a gradient is either
differentiated, or refused by name. Left to itself PyTorch would record whatever a backend happens to be made
of, which is a wrong derivative for one backend, none for the next, and a graph that grows with every sum.

The environment variable `KFADE_DISABLE` (names separated by commas, e.g. `pytorch,triton`) switches
backends off; it is read at every call, so that a doubtful result can be checked on the spot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
        name: `cuda`, `triton`, `cpu`, `pytorch` or `reference`.
        run: takes the arguments of the schema.
        refuses: takes the same arguments; returns why this backend cannot serve them, or None.
        configuration: takes the same arguments; says how the call would be run.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *_: None
    configuration: Callable[..., str] = lambda *_: ""


@dataclass(frozen=True)
class Derivative:
    """How reverse-mode autograd goes through an operation that changes nothing in place.

    Attributes:
        of: the arguments of the schema that may require a gradient.
        save: takes `ctx`, the arguments of the schema and the result; keeps on `ctx` what `backward` needs.
        backward: takes `ctx`, for each tensor in the arguments `of` whether its gradient is wanted, and the
            gradient of each result (None where nothing depends on it); returns a gradient or None for each such
            tensor, in the same order.
    """

    of: tuple[str, ...]
    save: Callable[[Any, Sequence[Any], Any], None]
    backward: Callable[[Any, Sequence[bool], Sequence[Tensor | None]], list[Tensor | None]]


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


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors of a list of arguments, and of lists in it."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(x for x in value if isinstance(x, Tensor))
    return found


def refuse_gradients(operation: str, arguments: Mapping[str, Any], derivative: str = "no derivative") -> None:
    """Refuse tensors, or lists of tensors, that require a gradient; the caller knows that gradients are on.

    Args:
        operation: public name.
        arguments: by the names that the error gives them.
        derivative: what the operation has.

    Raises:
        ValueError: one of them requires a gradient.
    """
    for name, value in arguments.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        for i, x in enumerate(values):
            if isinstance(x, Tensor) and x.requires_grad:
                entry = f"entry {i} of {name}" if len(values) > 1 else name
                raise ValueError(
                    f"kfade_kernels.{operation}: {entry} requires a gradient; the operation has {derivative}:"
                    " detach it, or call under torch.no_grad()"
                )


def _autograd_kernel(name: str, overload: Any, labels: Mapping[str, str], derivative: Derivative | None) -> Any:
    """What runs in the place of an operation where autograd looks: it records, refuses, or goes on below.

    `torch.library.register_autograd` does not take operations that work in place, and lets a gradient fall
    through a list in which some entries are None.
    """
    names = [argument.name for argument in overload._schema.arguments]
    of = derivative.of if derivative is not None else ()
    has = "no derivative" if derivative is None else f"a derivative in {labels.get(of[0], of[0])} alone"

    def below(keyset: Any, arguments: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, arguments: Sequence[Any], *_: Tensor) -> Any:
            assert derivative is not None
            ctx.set_materialize_grads(False)
            result = below(keyset, arguments)
            derivative.save(ctx, arguments, result)
            return tuple(result) if isinstance(result, list) else result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            assert derivative is not None
            with no_autocast(), float32_products():
                return None, None, *derivative.backward(ctx, ctx.needs_input_grad[2:], grads)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(x).tangent is not None for x in _tensors(arguments)
        ):
            raise ValueError(f"kfade_kernels.{name}: a tangent is given; the operation has no forward-mode derivative")
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in _tensors(arguments)):
            return below(keyset, arguments)
        given = dict(zip(names, arguments, strict=True))
        for n, value in given.items():
            if n not in of:
                refuse_gradients(name, {labels.get(n, n): value}, has)
        result = Recorded.apply(keyset, arguments, *_tensors([given[n] for n in of]))
        # A schema's list came out of autograd as a tuple.
        return list(result) if overload._schema.returns[0].type.kind() == "ListType" else result

    return kernel


def declare(
    name: str,
    schema: str,
    prepare: Callable[..., tuple[Any, ...]],
    fake: Callable[..., Any],
    backends: Sequence[Backend],
    labels: Mapping[str, str] | None = None,
    derivative: Derivative | None = None,
) -> Any:
    """Declare an operation and return the `torch.ops` callable.

    Args:
        name: public name, e.g. `syrk_`.
        schema: argument list and result in the language of `torch.library`.
        prepare: checks the arguments of the public function and turns them into those of the schema.
        fake: shapes and dtypes of the result, for tracing.
        backends: fastest first, the reference last.
        labels: what the public function calls arguments of the schema that have other names there.
        derivative: how autograd goes through; without one, arguments that require a gradient are refused.
    """
    operation = Operation(name, prepare, tuple(backends))
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, operation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kfade_kernels::{name}", fake, lib=LIBRARY)
    _operations[name] = operation
    packet = getattr(torch.ops.kfade_kernels, name)
    kernel = _autograd_kernel(name, packet.default, labels or {}, derivative)
    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return packet


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

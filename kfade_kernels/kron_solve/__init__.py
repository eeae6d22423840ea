"""`kron_solve`: apply the damped inverse of a Kronecker-factored matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .. import arguments as check
from ..dispatch import Backend, Derivative, declare
from . import pytorch, reference, triton

RightHandSide = Tensor | tuple[Tensor, Tensor]
Eigenvalues = Tensor | tuple[Tensor, Tensor]


def _check_problem(
    v: Any, q_out: Any, q_in: Any, eigenvalues: Any, damping: Any, at: str
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, float]:
    """One problem as the schema has it; `at` is `[i]` in a list of problems, else empty."""
    a: Tensor | None = None
    if isinstance(v, tuple):
        if len(v) != 2:
            raise TypeError(f"v{at} is a tuple of {len(v)}; it must be a tensor or the pair (g, a)")
        v, a = check.tensor(f"v{at}[0]", v[0], ndim=(2,)), check.tensor(f"v{at}[1]", v[1], ndim=(2,))
        check.shape(f"v{at}[1]", a, [v.shape[0], a.shape[1]], f"as many rows as v{at}[0]")
        check.same_device(f"v{at}[1]", a, f"v{at}[0]", v.device)
        if a.dtype != v.dtype:
            raise TypeError(f"v{at}[1] is {a.dtype}; it must be {v.dtype} like v{at}[0]")
        d_out, d_in = v.shape[1], a.shape[1]
    else:
        check.tensor(f"v{at}", v, ndim=(2, 3))
        d_out, d_in = v.shape[-2:]
    for name, q, order in ((f"q_out{at}", q_out, d_out), (f"q_in{at}", q_in, d_in)):
        check.tensor(name, q, dtypes=check.STATES, ndim=(2,))
        check.shape(name, q, [order, order], f"square, as the matching dimension of v{at}")
        check.same_device(name, q, f"v{at}", v.device)
    if q_in.dtype != q_out.dtype:
        raise TypeError(f"q_in{at} is {q_in.dtype}; it must be {q_out.dtype} like q_out{at}")
    check.not_wider(f"v{at}", v.dtype, f"q_out{at}", q_out.dtype)
    if isinstance(eigenvalues, Tensor):
        values, names = [eigenvalues], [f"eigenvalues{at}"]
        shapes = [[d_out, d_in]]
    elif isinstance(eigenvalues, (tuple, list)) and len(eigenvalues) == 2:
        values, names = list(eigenvalues), [f"eigenvalues{at}[0]", f"eigenvalues{at}[1]"]
        shapes = [[d_out], [d_in]]
    else:
        raise TypeError(
            f"eigenvalues{at} is a {type(eigenvalues).__name__}; it must be a tensor [d_out, d_in] or a pair"
            " of vectors ([d_out], [d_in])"
        )
    for name, value, expected in zip(names, values, shapes, strict=True):
        check.tensor(name, value, dtypes=(q_out.dtype,), ndim=(len(expected),))
        check.shape(name, value, expected, "as v")
        check.same_device(name, value, f"v{at}", v.device)
    right = values[1] if len(values) == 2 else None
    return v, a, q_out, q_in, values[0], right, check.finite(f"damping{at}", damping, minimum=0.0)


def _prepare(v: Any, q_out: Any, q_in: Any, eigenvalues: Any, damping: Any) -> tuple[Any, ...]:
    if not isinstance(v, list):
        problems = [_check_problem(v, q_out, q_in, eigenvalues, damping, "")]
        return tuple([column] for column in problems[0])
    dampings = list(damping) if isinstance(damping, (list, tuple)) else [damping] * len(v)
    for name, value in (("q_out", q_out), ("q_in", q_in), ("eigenvalues", eigenvalues), ("damping", dampings)):
        if not isinstance(value, list):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a list like v")
        if len(value) != len(v):
            raise ValueError(f"{name} has {len(value)} entries; it must have {len(v)}, one for each entry of v")
    problems = [
        _check_problem(*parts, f"[{i}]")
        for i, parts in enumerate(zip(v, q_out, q_in, eigenvalues, dampings, strict=True))
    ]
    return tuple([p[i] for p in problems] for i in range(7))


def _fake(v: list[Tensor], a: list[Tensor | None], q_out: list[Tensor], q_in: list[Tensor], *_: object) -> list[Tensor]:
    return [
        torch.empty(x.shape if y is None else (x.shape[1], y.shape[1]), dtype=q.dtype, device=x.device)
        for x, y, q in zip(v, a, q_out, strict=True)
    ]


def _save(ctx: Any, arguments: Sequence[Any], _result: Any) -> None:
    v, a, *bases, ctx.dampings = arguments
    ctx.dtypes = [x.dtype for x in v]
    # A solution is linear in v: only the two factors of a pair are needed again.
    pairs = [x if y is not None else None for x, y in zip(v, a, strict=True)]
    ctx.save_for_backward(*(x for column in (pairs, a, *bases) for x in column))


def _backward(ctx: Any, needs: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The operation is symmetric, so the gradient of v is the solution W for the gradient of the result.

    For a pair `v = gᵀ a` that of g is `a Wᵀ`, and that of a is `g W`.
    """
    count, saved = len(grads), ctx.saved_tensors
    g, a, *bases = (saved[start : start + count] for start in range(0, len(saved), count))
    places = {i: count + k for k, i in enumerate(i for i in range(count) if a[i] is not None)}
    wanted = [i for i in range(count) if grads[i] is not None and (needs[i] or (i in places and needs[places[i]]))]
    columns = [[column[i] for i in wanted] for column in (grads, [None] * count, *bases, ctx.dampings)]
    found: list[Tensor | None] = [None] * len(needs)
    for i, w in zip(wanted, _solve(*columns), strict=True):
        if i not in places:
            found[i] = w.to(ctx.dtypes[i])
            continue
        if needs[i]:
            found[i] = (a[i].to(w.dtype) @ w.T).to(ctx.dtypes[i])
        if needs[places[i]]:
            found[places[i]] = (g[i].to(w.dtype) @ w).to(ctx.dtypes[i])
    return found


_solve = declare(
    "kron_solve",
    "(Tensor[] v, Tensor?[] a, Tensor[] q_out, Tensor[] q_in, Tensor[] eigenvalues, Tensor?[] eigenvalues_in,"
    " float[] dampings) -> Tensor[]",
    _prepare,
    _fake,
    [
        Backend("triton", triton.run, triton.refuses, triton.configuration),
        Backend("pytorch", pytorch.run, pytorch.refuses, pytorch.configuration),
        Backend("reference", reference.run),
    ],
    labels={"a": "v", "eigenvalues_in": "eigenvalues"},
    derivative=Derivative(("v", "a"), _save, _backward),
)


@overload
def kron_solve(v: RightHandSide, q_out: Tensor, q_in: Tensor, eigenvalues: Eigenvalues, damping: float) -> Tensor: ...


@overload
def kron_solve(
    v: Sequence[RightHandSide],
    q_out: Sequence[Tensor],
    q_in: Sequence[Tensor],
    eigenvalues: Sequence[Eigenvalues],
    damping: float | Sequence[float],
) -> list[Tensor]: ...


def kron_solve(v: Any, q_out: Any, q_in: Any, eigenvalues: Any, damping: Any) -> Any:
    """`(F + λI)⁻¹ v` for `F = (Q_out ⊗ Q_in) diag(Λ) (Q_out ⊗ Q_in)ᵀ`, as a matrix equation:

    `Q_out [ (Q_outᵀ v Q_in) ⊘ (Λ + λ) ] Q_inᵀ`

    One layer, or lists of layers of any shapes, which a GPU then solves together.

    Args:
        v: `[d_out, d_in]`, or a batch `[K, d_out, d_in]` of right-hand sides, of any float dtype; or a
            pair `(g [N, d_out], a [N, d_in])` that stands for the gradient `gᵀ a`, which is not formed
            where its tokens are so few that rotating them is cheaper. Or a list of any of these.
        q_out: output eigenvectors in columns `[d_out, d_out]`, float32 or float64; or a list.
        q_in: input eigenvectors in columns `[d_in, d_in]`, same dtype; or a list.
        eigenvalues: `Λ [d_out, d_in]` (EK-FAC), or the pair `(λ_out [d_out], λ_in [d_in])` (K-FAC),
            whose outer product is then never formed; or a list of either.
        damping: λ ≥ 0, absolute, in the unit of Λ; with lists, one number or a list of them. Zero is only
            sensible where Λ is positive.

    Returns:
        The solution in the shape of `v` and the dtype of `q_out`; with lists, a list.

    Raises:
        TypeError: an argument is not of its type or dtype.
        ValueError: shapes, devices or lengths do not agree, `damping` is negative or not finite, or another
            argument than v requires a gradient.

    Autograd goes through v (both tensors of a pair), as often as you like: the gradient is one more solve.

    Cost: `4·d_out·d_in·(d_out + d_in)` FLOPs for each right-hand side; for a pair the first half of that
    becomes `2·N·(d_out² + d_in² + d_out·d_in)` where that is less.
    """
    solutions: list[Tensor] = _solve(*_prepare(v, q_out, q_in, eigenvalues, damping))
    return solutions if isinstance(v, list) else solutions[0]

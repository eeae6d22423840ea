"""What autograd may do with each operation: differentiate, against finite differences, or hear a reason at the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kfade_kernels as kk
import pytest
import torch
from oracles import assert_close, orthogonal
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional

OPS = torch.ops.kfade_kernels


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def bases(d_out: int, d_in: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return orthogonal(d_out, dtype), orthogonal(d_in, dtype)


# ------------------------------------------------------------------------------------------ kron_solve

Solve = tuple[Callable[..., Any], tuple[Tensor, ...]]


def solves() -> dict[str, Solve]:
    """`kron_solve` as a function of what may be differentiated: each form of v, of Λ, and of lists."""
    q = bases(4, 3)
    values, vectors = torch.rand(4, 3).double(), (torch.rand(4).double(), torch.rand(3).double())
    other = bases(2, 5)
    other_values = torch.rand(2, 5).double()

    def mixed(v: Tensor, g: Tensor, a: Tensor, w: Tensor) -> Any:
        return kk.kron_solve([v, (g, a), w], [q[0], *[other[0]] * 2], [q[1], *[other[1]] * 2],
                             [vectors, other_values, other_values], [0.1, 0.2, 0.3])  # fmt: skip

    return {
        "matrix": (lambda v: kk.kron_solve(v, *q, values, 0.1), (leaf(4, 3),)),
        "batch, vectors": (lambda v: kk.kron_solve(v, *q, vectors, 0.1), (leaf(2, 4, 3),)),
        "pair, one token": (lambda g, a: kk.kron_solve((g, a), *q, values, 0.1), (leaf(1, 4), leaf(1, 3))),
        "pair, many tokens": (lambda g, a: kk.kron_solve((g, a), *q, vectors, 0.1), (leaf(9, 4), leaf(9, 3))),
        "list of pairs": (
            lambda g, a: kk.kron_solve([(g, a), (2 * g, a)], [q[0]] * 2, [q[1]] * 2, [values] * 2, 0.1),
            (leaf(2, 4), leaf(2, 3)),
        ),
        "mixed list": (mixed, (leaf(4, 3), leaf(3, 2), leaf(3, 5), leaf(2, 2, 5))),
    }


@pytest.mark.parametrize("form", solves())
def test_solve_is_differentiable_in_v(backend: str, form: str) -> None:
    function, inputs = solves()[form]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_solve_of_one_side_of_a_pair_in_a_mixed_list() -> None:
    """An entry without a pair is a None in the list of the schema, which must not swallow the gradient."""
    q_out, q_in = bases(4, 3)
    v, g, values = torch.randn(4, 3).double(), torch.randn(5, 4).double(), torch.rand(4, 3).double()

    def function(a: Tensor) -> Tensor:
        return kk.kron_solve([v, (g, a)], [q_out] * 2, [q_in] * 2, [values] * 2, 0.1)[1]

    assert gradcheck(function, (leaf(5, 3),))


def test_solve_where_only_one_result_is_used() -> None:
    q_out, q_in = bases(4, 3)
    values, v = torch.rand(4, 3).double(), [leaf(4, 3), leaf(4, 3)]
    second = kk.kron_solve(v, [q_out] * 2, [q_in] * 2, [values] * 2, 0.1)[1]
    first_grad, second_grad = torch.autograd.grad(second.sum(), v, allow_unused=True)
    assert first_grad is None
    ones = torch.ones(4, 3).double()
    # F is symmetric: the gradient is the solution for the gradient of the result.
    assert_close(second_grad, kk.kron_solve(ones, q_out, q_in, values, 0.1), 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradient_of_a_solve_has_the_dtype_of_v(backend: str, dtype: torch.dtype) -> None:
    q_out, q_in = bases(20, 18, torch.float32)
    values, weight = torch.rand(20, 18), torch.randn(20, 18)
    v = leaf(20, 18, dtype=dtype)
    (found,) = torch.autograd.grad((kk.kron_solve(v, q_out, q_in, values, 0.1) * weight).sum(), v)
    assert found.dtype == dtype
    truth = kk.kron_solve(weight.double(), q_out.double(), q_in.double(), values.double(), 0.1)
    # One rounding to the dtype of v, of a result that is itself good to a few float32 roundings.
    assert_close(found, truth, 2 * torch.finfo(dtype).eps + 2e-6)


# ---------------------------------------------------------------------------------------------- rotate


@pytest.mark.parametrize("ones_column", [False, True])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 4, 3), (0, 3)], ids=str)
def test_rotation_is_differentiable_in_x(backend: str, shape: tuple[int, ...], ones_column: bool) -> None:
    q = torch.randn(3 + int(ones_column), 6).double()
    x = leaf(*shape)
    assert gradcheck(lambda x: kk.rotate(x, q, ones_column=ones_column), (x,))
    assert gradgradcheck(lambda x: kk.rotate(x, q, ones_column=ones_column), (x,))


@pytest.mark.parametrize("ones_column", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradient_of_a_rotation_with_a_pair(backend: str, dtype: torch.dtype, ones_column: bool) -> None:
    q = orthogonal(40, torch.float32)
    x = leaf(9, 40 - int(ones_column), dtype=dtype)
    y = kk.rotate(x, kk.bf16_pair(q), ones_column=ones_column)
    weight = torch.randn_like(y)
    (found,) = torch.autograd.grad((y * weight).sum(), x)
    assert found.dtype == dtype
    truth = weight.double() @ q.double().T[:, : x.shape[1]]
    # The pair is good to 2⁻¹⁷; then one rounding to the dtype of x.
    assert_close(found, truth, 2.0**-16 + 2 * torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------- sampled_cross_entropy


@pytest.mark.parametrize("projected", [False, True])
def test_negative_log_likelihood_is_differentiable_in_x(backend: str, projected: bool) -> None:
    labels = torch.tensor([3, 0, 6, 6, 1])
    weight, bias = torch.randn(7, 4).double(), torch.randn(7).double()
    options: dict[str, Any] = {"weight": weight, "bias": bias, "chunk_rows": 2} if projected else {}
    x = leaf(5, 4 if projected else 7)
    assert gradcheck(lambda x: kk.sampled_cross_entropy(x, labels=labels, **options).nll, (x,))


@pytest.mark.parametrize("draw", ["uniform", "keys"])
def test_sampled_labels_are_constants_to_autograd(backend: str, draw: str) -> None:
    x, along = leaf(6, 9, dtype=torch.float32), torch.randn(6)
    given = torch.rand(6) if draw == "uniform" else kk.counter_bits(torch.arange(6), torch.tensor(1))
    found = kk.sampled_cross_entropy(x, **{draw: given})
    assert found.nll.requires_grad and not found.grad.requires_grad and not found.labels.requires_grad
    (grad,) = torch.autograd.grad(found.nll, x, along)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(functional.cross_entropy(wide, found.labels, reduction="none"), wide, along.double())
    assert_close(grad, truth, 1e-6)


def test_second_derivative_of_the_likelihood_is_refused() -> None:
    x = leaf(3, 5)
    nll = kk.sampled_cross_entropy(x, labels=torch.tensor([0, 1, 2])).nll
    with pytest.raises(ValueError, match=r"sampled_cross_entropy: a second derivative is asked for"):
        torch.autograd.grad(nll.sum(), x, create_graph=True)


# -------------------------------------------------------------------------------------------- refusals


def refused() -> dict[str, tuple[str, Callable[[], Any]]]:
    """For each tensor that may not require a gradient: how the error begins, and a call."""
    x, plain = leaf(4, 3, dtype=torch.float32), torch.randn(4, 3)
    acc, q, square = kk.PackedSymmetric(3), orthogonal(3, torch.float32), leaf(3, 3, dtype=torch.float32)
    tracked = kk.PackedSymmetric.from_packed(acc.data.clone().requires_grad_(), 3)
    lam, values, labels = torch.zeros(3, 3), torch.rand(3, 3), torch.tensor([0, 1, 2, 0])
    tokens = torch.randn(1, 4, 3)

    def solve(**changed: Any) -> Any:
        return kk.kron_solve(**{"v": q, "q_out": q, "q_in": q, "eigenvalues": values, "damping": 0.1, **changed})

    return {
        "syrk_: x": ("syrk_: x", lambda: kk.syrk_(acc, x)),
        "syrk_: acc": ("syrk_: acc", lambda: kk.syrk_(tracked, plain)),
        "accumulate_factors_: g": (
            "accumulate_factors_: entry 1 of a and g", lambda: kk.accumulate_factors_(acc, acc, plain, x)
        ),
        "accumulate_factors_: acc_a": (
            "accumulate_factors_: entry 0 of acc_a and acc_s",
            lambda: kk.accumulate_factors_(tracked, acc, plain, plain),
        ),
        "eigenvalue_correction_: a": (
            "eigenvalue_correction_: a", lambda: kk.eigenvalue_correction_(lam, tokens, x.unsqueeze(0))
        ),
        "eigenvalue_correction_: q_in": (
            "eigenvalue_correction_: q_in", lambda: kk.eigenvalue_correction_(lam, tokens, tokens, q, square)
        ),
        "eigenvalue_correction_: lam": (
            "eigenvalue_correction_: lam", lambda: kk.eigenvalue_correction_(square, tokens, tokens)
        ),
        "apply_update_: deltas": ("apply_update_: deltas", lambda: kk.apply_update_([plain], [x])),
        "apply_update_: gradients": (
            "apply_update_: entry 1 of gradients",
            lambda: kk.apply_update_([plain, plain + 1], [plain + 2] * 2, 1.0, [plain, x]),
        ),
        "apply_update_ as declared: weights": (
            "apply_update_: weights", lambda: OPS.apply_update_([x], [plain], 1.0, None)
        ),
        "rotate: q": ("rotate: q", lambda: kk.rotate(plain, square)),
        "kron_solve: q_out": ("kron_solve: q_out", lambda: solve(q_out=square)),
        "kron_solve: eigenvalues": ("kron_solve: eigenvalues", lambda: solve(eigenvalues=square)),
        "kron_solve: a vector": (
            "kron_solve: eigenvalues", lambda: solve(eigenvalues=(values[0], square[0]))
        ),
        "sampled_cross_entropy: weight": (
            "sampled_cross_entropy: weight",
            lambda: kk.sampled_cross_entropy(plain, labels=labels, weight=square),
        ),
        "sampled_cross_entropy: uniform": (
            "sampled_cross_entropy: uniform", lambda: kk.sampled_cross_entropy(plain, x[:, 0])
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", refused())
def test_refused_at_the_call_by_name(backend: str, case: str) -> None:
    begins, call = refused()[case]
    with pytest.raises(ValueError) as error:
        call()
    said = str(error.value)
    assert said.startswith(f"kfade_kernels.{begins} requires a gradient; the operation has ")
    assert said.endswith(": detach it, or call under torch.no_grad()")


@pytest.mark.parametrize("case", [case for case in refused() if "acc" not in case.split(": ")[1] and "lam" not in case])
def test_without_gradients_the_same_call_runs(backend: str, case: str) -> None:
    with torch.no_grad():
        refused()[case][1]()


def test_error_says_what_is_differentiable() -> None:
    with pytest.raises(ValueError, match="the operation has no derivative: detach it"):
        refused()["syrk_: x"][1]()
    with pytest.raises(ValueError, match="the operation has a derivative in v alone: detach it"):
        refused()["kron_solve: q_out"][1]()


def test_nothing_is_done_before_a_refusal() -> None:
    acc, weight = kk.PackedSymmetric(3), torch.ones(3)
    with pytest.raises(ValueError, match="requires a gradient"):
        kk.syrk_(acc, leaf(4, 3, dtype=torch.float32))
    with pytest.raises(ValueError, match="requires a gradient"):
        kk.apply_update_([weight], [leaf(3, dtype=torch.float32)])
    assert not acc.data.any() and torch.equal(weight, torch.ones(3))


def test_forward_mode_is_refused() -> None:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(4, 3), torch.randn(4, 3))
        with pytest.raises(ValueError, match=r"rotate: a tangent is given; the operation has no forward-mode"):
            kk.rotate(x, torch.eye(3))
        # A tensor without a tangent is an ordinary one.
        kk.rotate(torch.randn(4, 3), torch.eye(3))


# ------------------------------------------------------------------------- where curvature is collected


def test_accumulators_work_in_a_hook_of_a_backward_pass() -> None:
    """Gradients that arrive there belong to no graph, and inputs are detached."""
    layer, x = torch.nn.Linear(3, 4), torch.randn(2, 5, 3)
    a, g, lam = kk.PackedSymmetric(4), kk.PackedSymmetric(4), torch.zeros(4, 4)

    def arrived(grad: Tensor) -> None:
        kk.accumulate_factors_(a, g, x, grad, ones_column=True)
        kk.eigenvalue_correction_(lam, grad, x, ones_column=True)

    hidden = layer(x)
    hidden.register_hook(arrived)
    hidden.square().sum().backward()
    grad = 2 * hidden.detach()
    assert_close(g.to_dense(), grad.flatten(0, 1).T @ grad.flatten(0, 1), 1e-6)
    assert lam.any() and not lam.requires_grad and not a.data.requires_grad


def test_rows_of_a_graph_are_summed_without_growing_it() -> None:
    acc, x = kk.PackedSymmetric(3), leaf(4, 3, dtype=torch.float32).sin()
    kk.syrk_(acc, x.detach())
    with torch.no_grad():
        kk.syrk_(acc, x)
    assert acc.data.grad_fn is None and not acc.data.requires_grad
    assert_close(acc.to_dense(), 2 * (x.T @ x).detach(), 1e-6)


# ---------------------------------------------------------------------------------- PyTorch's own tools


def differentiable() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments as the schemas take them, with gradients required."""
    q_out, q_in = bases(4, 3, torch.float32)
    x, values = leaf(4, 3, dtype=torch.float32), torch.rand(4, 3)
    pair = leaf(5, 4, dtype=torch.float32), leaf(5, 3, dtype=torch.float32)
    return {
        "rotate": [(x, q_in, False), (leaf(4, 2, dtype=torch.float32), q_in, True)],
        "kron_solve": [
            ([x], [None], [q_out], [q_in], [values], [None], [0.1]),
            ([x, pair[0]], [None, pair[1]], [q_out] * 2, [q_in] * 2, [values] * 2, [None] * 2, [0.1, 0.2]),
        ],
        "sampled_cross_entropy": [
            (x, None, None, None, torch.tensor([0, 2, 1, 1]), None, 0),
            (x, torch.randn(7, 3), None, torch.rand(4), None, None, 3),
        ],
    }


@pytest.mark.parametrize("operation", differentiable())
def test_opcheck_with_gradients(backend: str, operation: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # That check adds up all results in place, the first of which are integers here.
    checks += ["test_aot_dispatch_dynamic"] if operation != "sampled_cross_entropy" else []
    for arguments in differentiable()[operation]:
        torch.library.opcheck(getattr(OPS, operation).default, arguments, test_utils=checks)


def losses() -> dict[str, Callable[[Tensor], Tensor]]:
    q_out, q_in = bases(4, 3, torch.float32)
    values, labels = torch.rand(4, 3), torch.tensor([0, 2, 1, 1])
    return {
        "rotate": lambda x: kk.rotate(x.sin(), q_in).square().sum(),
        "kron_solve": lambda x: kk.kron_solve(x.sin(), q_out, q_in, values, 0.1).square().sum(),
        "kron_solve of a pair": lambda x: kk.kron_solve(
            [x, (x.cos(), x)], [q_out, q_in], [q_in] * 2, [values, values[:3]], 0.1
        )[1].square().sum(),
        "sampled_cross_entropy": lambda x: kk.sampled_cross_entropy(x.sin(), labels=labels).nll.square().sum(),
    }  # fmt: skip


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", losses())
def test_gradient_of_a_compiled_function(name: str, compiler: str) -> None:
    torch.compiler.reset()
    loss, x = losses()[name], leaf(4, 3, dtype=torch.float32)
    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    (found,), (expected,) = torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x)
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", ["syrk_: x", "rotate: q", "apply_update_: deltas"])
def test_refused_when_compiled(case: str, compiler: str) -> None:
    torch.compiler.reset()
    x, plain = leaf(4, 3, dtype=torch.float32), torch.randn(4, 3)

    def call(x: Tensor) -> Tensor:
        if case == "syrk_: x":
            acc = torch.zeros(9)
            OPS.syrk_(acc, 3, x * 2, None, 1.0, False, False)
            return acc
        if case == "rotate: q":
            return kk.rotate(plain, x.T @ x)
        return kk.apply_update_([plain], [x * 2])

    # The compiler wraps what is raised while it traces, and keeps the text.
    with pytest.raises(Exception, match=f"kfade_kernels.{case} requires a gradient"):
        torch.compile(call, backend=compiler)(x)

"""Choice of backend, what `explain` says of it, and every operation under PyTorch's own tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import kfade_kernels as kk
import pytest
import torch
from kfade_kernels import native
from kfade_kernels.precision import float32_products
from kfade_kernels.syrk import pytorch as syrk_pytorch
from oracles import assert_close, orthogonal

PUBLIC = (
    "syrk_",
    "accumulate_factors_",
    "apply_update_",
    "eigenvalue_correction_",
    "kron_solve",
    "sampled_cross_entropy",
)


def public_arguments(operation: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the public function, the in-place state first."""
    acc, mask = kk.PackedSymmetric(6), torch.tensor([True, False, True, True])
    rows = torch.randn(4, 6)
    g, a = torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    q_out, q_in = orthogonal(6, torch.float32), orthogonal(5, torch.float32)
    return {
        "syrk_": ((acc, rows[:, :5], mask, 0.5), {"ones_column": True}),
        "accumulate_factors_": (
            ([acc], [kk.PackedSymmetric(3)], [rows[:, :5]], [rows[:, :3]], mask),
            {"ones_column": True},
        ),
        "apply_update_": (
            ([torch.randn(4, 6).half(), torch.randn(3)], [rows, rows[0, :3]], 0.5, [rows, rows[1, :3]]),
            {},
        ),
        "eigenvalue_correction_": ((torch.zeros(6, 5), g, a, q_out, q_in), {}),
        "kron_solve": ((torch.randn(6, 5), q_out, q_in, (torch.rand(6), torch.rand(5)), 0.1), {}),
        "sampled_cross_entropy": ((rows, torch.rand(4)), {"weight": torch.randn(9, 6), "chunk_rows": 3}),
    }[operation]


def schema_arguments(operation: str) -> list[tuple[Any, ...]]:
    """Arguments as the schemas in `torch.ops.kfade_kernels` take them, several cases each."""
    packed, x, mask = kk.PackedSymmetric(130).data, torch.randn(7, 130), torch.rand(7) > 0.5
    g, a = torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    q_out, q_in = orthogonal(6, torch.float32), orthogonal(5, torch.float32)
    weight, labels = torch.randn(9, 6), torch.randint(6, (4,))
    return {
        "syrk_": [
            (packed, 130, x, None, 1.0, False, False),
            (packed, 130, x[:, :129], mask, -2.0, True, True),
            (packed, 130, x.bfloat16(), mask, 1.0, False, False),
        ],
        "accumulate_factors_": [
            ([packed, torch.zeros(9)], [130, 3], [x, x[:, :2]], [mask, None], [False, True], False),
            ([], [], [], [], [], False),
        ],
        "apply_update_": [
            ([torch.randn(7, 130), torch.randn(4).half()], [x, torch.randn(4)], -2.0, [x, torch.randn(4)]),
            ([torch.randn(7, 130)], [x], 1.0, None),
            ([], [], 1.0, []),
        ],
        "eigenvalue_correction_": [
            (torch.zeros(6, 5), g, a, q_out, q_in, None, False, None),
            (torch.zeros(6, 5), g[0], a[0], q_out, q_in, None, False, torch.tensor([0, 3, 3, 4])),
            (torch.zeros(6, 6), g, a, kk.bf16_pair(q_out), None, torch.rand(8) > 0.5, True, None),
        ],
        "kron_solve": [
            ([torch.randn(6, 5)], [None], [q_out], [q_in], [torch.rand(6, 5)], [None], [0.1]),
            (
                [torch.randn(3, 6, 5).half(), torch.randn(2, 6)],
                [None, torch.randn(2, 5)],
                [q_out, q_out],
                [q_in, q_in],
                [torch.rand(6), torch.rand(6, 5)],
                [torch.rand(5), None],
                [0.1, 0.0],
            ),
        ],
        "sampled_cross_entropy": [
            (torch.randn(4, 6), None, None, torch.rand(4), None, None, 0),
            (torch.randn(4, 6), None, None, None, labels, None, 3),
            (torch.randn(4, 6).half(), None, None, None, None, labels, 0),
            (torch.randn(4, 6), weight, torch.randn(9), torch.rand(4), None, None, 0),
            (torch.randn(4, 6), weight, torch.randn(9), None, None, labels, 0),
            (torch.randn(4, 6).bfloat16(), weight.bfloat16(), None, None, labels, None, 1),
        ],
    }[operation]


@pytest.mark.parametrize("operation", PUBLIC)
def test_opcheck(backend: str, operation: str) -> None:
    for arguments in schema_arguments(operation):
        torch.library.opcheck(getattr(torch.ops.kfade_kernels, operation).default, arguments)


def calls() -> dict[str, Callable[..., Any]]:
    """One function of tensors for each operation, as a user would compile it; in-place state is made inside."""

    def syrk(x: torch.Tensor) -> torch.Tensor:
        acc = torch.zeros(130 * 130, dtype=x.dtype)[: kk.PackedSymmetric(130).data.numel()]
        torch.ops.kfade_kernels.syrk_(acc, 130, x.sin(), None, 0.5, False, False)
        return acc * 2

    def factors(x: torch.Tensor) -> torch.Tensor:
        one, two = torch.zeros(kk.PackedSymmetric(130).data.numel()), torch.zeros(9)
        torch.ops.kfade_kernels.accumulate_factors_(
            [one, two], [130, 3], [x, x[:, :2]], [None, None], [False, True], False
        )
        return one.sum() + two

    def applied(x: torch.Tensor) -> torch.Tensor:
        one, two = x.sin(), torch.ones(3)
        found = kk.apply_update_([one, two], [x, x[0, :3]], 0.5, [x.cos(), x[1, :3]])
        kk.apply_update_([two], [x[2, :3]])
        return one * 2 + two.sum() + found.float().sum()

    def correction(x: torch.Tensor) -> torch.Tensor:
        g, a = x.reshape(1, *x.shape)[..., :20], x.reshape(1, *x.shape)[..., 20:30]
        return kk.eigenvalue_correction_(torch.zeros(20, 10), g, a) + 1

    def solve(x: torch.Tensor) -> torch.Tensor:
        values = (torch.ones(x.shape[0]), torch.ones(x.shape[1]))
        return kk.kron_solve(x.cos(), torch.eye(x.shape[0]), torch.eye(x.shape[1]), values, 0.5) + 1

    def entropy(x: torch.Tensor) -> torch.Tensor:
        labels, grad, nll = kk.sampled_cross_entropy(x * 2, torch.full((x.shape[0],), 0.4))
        return grad + nll.unsqueeze(1) + labels.unsqueeze(1)

    return {
        "syrk_": syrk,
        "accumulate_factors_": factors,
        "apply_update_": applied,
        "eigenvalue_correction_": correction,
        "kron_solve": solve,
        "sampled_cross_entropy": entropy,
    }


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("operation", PUBLIC)
def test_compiles_whole(operation: str, compiler: str) -> None:
    torch.compiler.reset()
    function, x = calls()[operation], torch.randn(7, 130)
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    assert_close(compiled(x), function(x), 1e-6)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_function_updates_the_callers_accumulator(compiler: str) -> None:
    torch.compiler.reset()

    @torch.compile(backend=compiler, fullgraph=True)
    def step(acc: kk.PackedSymmetric, x: torch.Tensor) -> torch.Tensor:
        kk.syrk_(acc, x, x[:, 0] > 0, ones_column=True)
        return x.sum()

    acc, expected, x = kk.PackedSymmetric(131), kk.PackedSymmetric(131), torch.randn(7, 130)
    for _ in range(2):
        step(acc, x)
        kk.syrk_(expected, x, x[:, 0] > 0, ones_column=True)
    assert_close(acc.to_dense(), expected.to_dense(), 1e-6)


def test_every_operation_is_declared() -> None:
    assert set(PUBLIC) <= set(kk.operations())


@pytest.mark.parametrize("operation", PUBLIC)
def test_explain_says_who_and_why(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, kwargs = public_arguments(operation)
    said = kk.explain(operation, *args, **kwargs)
    in_cpp = native.missing is None and operation in ("syrk_", "accumulate_factors_", "eigenvalue_correction_")
    assert (said.operation, said.backend) == (operation, "cpu" if in_cpp else "pytorch")
    assert said.configuration and said.backend in str(said)
    monkeypatch.setenv("KFADE_DISABLE", "cpu")
    said = kk.explain(operation, *args, **kwargs)
    assert said.backend == "pytorch" and said.configuration
    monkeypatch.setenv("KFADE_DISABLE", "triton, cpu, pytorch")
    said = kk.explain(operation, *args, **kwargs)
    assert said.backend == "reference"
    assert ("pytorch", "disabled by KFADE_DISABLE") in said.refused
    assert "disabled by KFADE_DISABLE" in str(said)


@pytest.mark.parametrize("operation", PUBLIC)
def test_explain_runs_nothing(operation: str) -> None:
    args, kwargs = public_arguments(operation)
    kk.explain(operation, *args, **kwargs)
    state = args[0][0] if operation == "accumulate_factors_" else args[0]
    if operation in ("syrk_", "accumulate_factors_"):
        assert not state.data.any()
    if operation == "eigenvalue_correction_":
        assert not state.any()


def test_explain_refuses_what_the_operation_refuses() -> None:
    with pytest.raises(ValueError, match="operation is 'gemm'"):
        kk.explain("gemm")
    with pytest.raises(ValueError, match="x has shape"):
        kk.explain("syrk_", kk.PackedSymmetric(4), torch.zeros(2, 5))


@pytest.mark.parametrize("operation", PUBLIC)
def test_elsewhere_the_reference_serves(operation: str) -> None:
    """The meta device stands for any that has no backend of its own."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        if isinstance(value, kk.PackedSymmetric):
            return kk.PackedSymmetric(value.n, device="meta")
        return type(value)(map(move, value)) if isinstance(value, (list, tuple)) else value

    args, kwargs = public_arguments(operation)
    said = kk.explain(operation, *move(args), **{name: move(value) for name, value in kwargs.items()})
    assert said.backend == "reference"
    assert "meta" in dict(said.refused)["pytorch"]


@pytest.mark.parametrize("operation", PUBLIC)
def test_public_function_runs_its_own_arguments(backend: str, operation: str) -> None:
    args, kwargs = public_arguments(operation)
    getattr(kk, operation)(*args, **kwargs)


def results(operation: str) -> list[torch.Tensor]:
    """What a call returns, and the state that it leaves, from the same seed each time."""
    torch.manual_seed(7)
    args, kwargs = public_arguments(operation)
    returned = getattr(kk, operation)(*args, **kwargs)
    state = args[0] if operation == "accumulate_factors_" else [returned]
    found = list(returned) if operation == "sampled_cross_entropy" else state
    return [x.to_dense() if isinstance(x, kk.PackedSymmetric) else x for x in found]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", PUBLIC)
def test_autocast_around_a_call_changes_nothing(backend: str, operation: str, dtype: torch.dtype) -> None:
    """Curvature is often collected within an autocast region; its products must not follow."""
    plain = results(operation)
    with torch.autocast("cpu", dtype):
        inside = results(operation)
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))


def test_rotation_is_not_autocast() -> None:
    x, q = torch.randn(9, 40), orthogonal(40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = kk.rotate(x, q)
    assert torch.equal(inside, kk.rotate(x, q))


@pytest.fixture
def precision_settings() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for settings in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        settings.fp32_precision = "none"


def float32_settings() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.usefixtures("precision_settings")
@pytest.mark.parametrize("kind", ["high", "medium"])
def test_tf32_of_the_whole_program_does_not_reach_an_operation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = syrk_pytorch.add

    def recording(*arguments: Any) -> None:
        seen.append(float32_settings())
        run(*arguments)

    monkeypatch.setenv("KFADE_DISABLE", "cpu")
    monkeypatch.setattr(syrk_pytorch, "add", recording)
    torch.set_float32_matmul_precision(kind)
    before = float32_settings()
    assert before != ("ieee", "ieee")
    kk.syrk_(kk.PackedSymmetric(4), torch.randn(3, 4))
    assert seen == [("ieee", "ieee")]
    assert float32_settings() == before
    assert torch.get_float32_matmul_precision() == kind


@pytest.mark.usefixtures("precision_settings")
def test_precision_settings_are_left_as_they_were() -> None:
    with float32_products(allow_tf32=True):
        # On a GPU alone.
        assert float32_settings()[0] == "tf32" != float32_settings()[1]
        with float32_products():
            assert float32_settings()[0] == "ieee"
        assert float32_settings()[0] == "tf32"
    # A wider setting that was followed is followed again.
    torch.backends.fp32_precision = "tf32"
    with float32_products():
        assert float32_settings() == ("ieee", "ieee")
    assert float32_settings() == ("tf32", "tf32")
    torch.backends.fp32_precision = "ieee"
    assert float32_settings() == ("ieee", "ieee")

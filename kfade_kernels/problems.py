"""Random problems of each operation, with what they are compared with: for the tuner and the benchmarks.

A problem holds its data, calls the public function, and knows its truth (the reference in float64), the
plain PyTorch expressions that it replaces, and its cost. Accumulators are scratch, never anybody's state.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import cost
from .accumulate_factors import accumulate_factors_
from .apply_update import apply_update_
from .configurations import Configuration, choose
from .cost import Cost
from .devices import Device
from .dispatch import KILL_SWITCH, Explanation, explain
from .eigenvalue_correction import eigenvalue_correction_
from .kron_solve import kron_solve
from .packed import PackedSymmetric
from .precision import bf16_pair, float32_products
from .rotation import rotate
from .sampled_cross_entropy import sampled_cross_entropy
from .sampled_cross_entropy.noise import vocabulary_noise
from .sketch import sketch_
from .syrk import syrk_
from .timing import Work
from .triton_support import ENABLE, triton_version

DAMPING = 0.1
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@contextmanager
def backends(*, enable: str = "", disable: str = "") -> Iterator[None]:
    """Within this block these backends (names separated by commas) are switched on, and off."""
    before = {name: os.environ.get(name) for name in (ENABLE, KILL_SWITCH)}
    os.environ.update({ENABLE: enable, KILL_SWITCH: disable})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


# Backends of GPU kernels, and what is switched off so that one of them alone serves what it can.
OTHERS = {"triton": "cuda,cpu,pytorch", "cuda": "triton,cpu,pytorch"}


def by(backend: str) -> AbstractContextManager[None]:
    """Context in which `triton`'s or `cuda`'s kernels serve what they can, seen correct here or not."""
    return backends(enable=backend, disable=OTHERS[backend])


@dataclass(frozen=True)
class Problem:
    """One call of an operation on random data.

    Attributes:
        operation: public name.
        kernel: folder of the configurations that it runs with; empty where it has none.
        size: in words.
        dtype: of the rows.
        device: where the data is.
        extent: order or row length that its configuration is looked up by.
        run: the call, adding to the same scratch state every time.
        results: makes fresh state, calls once and returns what came out; True calls in float64.
        cost: of a configuration, on a device.
        explain: which backend would serve `run`.
        baselines: plain PyTorch expressions of the same thing, by name, the first the most usual.
        operands: dtype of the operands of its products, that its configuration is looked up by; None for `dtype`.
        rounding: relative error that comes of intermediate results in 16 bit, which the reference does not round.
    """

    operation: str
    kernel: str
    size: str
    dtype: torch.dtype
    device: torch.device
    extent: int
    run: Work
    results: Callable[[bool], list[Tensor]]
    cost: Callable[[Configuration, Device | None], Cost]
    explain: Callable[[], Explanation]
    baselines: Mapping[str, Work] = field(default_factory=dict)
    operands: torch.dtype | None = None
    rounding: float = 0.0

    def configuration(self, device: Device) -> Configuration:
        """The configuration that the call would get on a device."""
        if not self.kernel:
            return Configuration()
        return choose(self.kernel, device, self.operands or self.dtype, self.extent, triton_version())


def relative(value: Tensor, truth: Tensor) -> float:
    """Frobenius distance from the truth, relative to it (absolute where the truth is zero)."""
    value, truth = value.double(), truth.double()
    return float(torch.linalg.norm(value - truth) / (torch.linalg.norm(truth) or 1.0))


@dataclass(frozen=True)
class Reference:
    """What a problem's results are held against: in float64, and by plain PyTorch in the same dtype."""

    truths: Sequence[Tensor]
    plains: Sequence[Tensor]


def reference(problem: Problem) -> Reference:
    """Run the definition of the operation twice, in float64 and in the problem's dtype."""
    with backends(disable="triton,cuda,cpu,pytorch"):
        return Reference(problem.results(True), problem.results(False))


def errors(problem: Problem, results: Sequence[Tensor], against: Reference) -> list[tuple[float, float]]:
    """For each result its error against float64, and the error that it may have.

    That is a few times the error of the reference in the same dtype, four roundings of the result's
    dtype where the reference happens to be exact, and the problem's `rounding`.
    """
    found = []
    for value, plain, truth in zip(results, against.plains, against.truths, strict=True):
        floor = 4 * torch.finfo(value.dtype).eps + problem.rounding
        found.append((relative(value, truth), 8 * relative(plain, truth) + floor))
    return found


def fault(problem: Problem, against: Reference | None = None) -> str | None:
    """What is wrong with the results of a problem, or None: error, NaN, or bits that differ when it is run again."""
    poison(problem.device)
    first = problem.results(False)
    poison(problem.device)
    second = problem.results(False)
    for number, (error, allowed) in enumerate(errors(problem, first, against or reference(problem))):
        if not error <= allowed:
            return f"result {number} is off by {error:.2e}; {allowed:.2e} is allowed"
    for number, (one, two) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(one, two):
            return f"result {number} has other bits the second time"
    return None


def poison(device: torch.device) -> None:
    """Fill memory that the next results will be given with NaN, so that what is not written shows."""
    largest = 26 if device.type == "cuda" else 21
    held = [torch.full((1 << bits,), torch.nan, device=device) for bits in range(8, largest)]
    del held


def cut_off(rows: int, dtype: torch.dtype) -> float:
    """Relative error of 16-bit products summed over so many rows in a matrix unit, which rounds towards zero.

    Half a unit of the last place of float32 at most for each step of 8 rows (16 on sm_90), on a sum that
    grows; float32 memory, which the sum goes to after `flush` rows, is added to with rounding to nearest.
    PyTorch's own products of 16 bit have the same error. (Fasi et al., "Numerical behavior of NVIDIA tensor
    cores", 2021.)
    """
    return min(rows, Configuration.flush) / 8 * 2.0**-24 if dtype.itemsize == 2 else 0.0


# ------------------------------------------------------------------------------------------- data


def _orthogonal(order: int, device: torch.device) -> Tensor:
    """A random orthogonal matrix, float32: products of a few reflections, since a QR of a large order takes long."""
    q = torch.eye(order, device=device)
    for _ in range(4):
        v = torch.randn(order, 1, device=device)
        v /= v.norm()
        q -= 2 * (q @ v) @ v.T
        q = q[torch.randperm(order, device=device)]
    return q


def _basis_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of eigenvectors for rows of a dtype: a bfloat16 pair, or float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _mask(rows: Sequence[int], masked: bool, device: torch.device) -> Tensor | None:
    return torch.rand(tuple(rows), device=device) > 0.3 if masked else None


def _poisoned_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), torch.nan)


def _accumulator(order: int, device: torch.device, wide: bool) -> PackedSymmetric:
    """Zeros, with NaN in the scratch above the diagonal of the diagonal blocks."""
    acc = PackedSymmetric(order, device=device, dtype=torch.float64 if wide else torch.float32)
    for start in range(0, order, 128):
        stop = min(start + 128, order)
        offset = start * (start + 128) // 2
        panel = acc.data[offset : offset + (stop - start) * stop].view(stop - start, stop)[:, start:]
        panel.masked_fill_(torch.ones_like(panel).triu(1).bool(), torch.nan)
    return acc


def _widen(x: Tensor, wide: bool) -> Tensor:
    return x.double() if wide and x.is_floating_point() else x


def _matrix_product(x: Tensor) -> Tensor:
    """`xᵀ x` in float32: what PyTorch has for 16-bit rows on a GPU, and a cast where it has nothing."""
    if x.dtype == torch.float32:
        return x.T @ x
    if x.is_cuda:
        return torch.mm(x.T, x, out_dtype=torch.float32)
    return x.float().T @ x.float()


def with_tf32(work: Work) -> Work:
    """The same with PyTorch's float32 products in TF32."""

    def switched() -> object:
        with float32_products(allow_tf32=True):
            return work()

    return switched


# -------------------------------------------------------------------------------------- operations


def outer_product(
    rows: int,
    order: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    masked: bool = False,
    ones_column: bool = False,
    allow_tf32: bool = False,
    padding: int = 0,
) -> Problem:
    """`syrk_`; with `padding` the rows of x lie so many elements farther apart than they are long."""
    width = order - int(ones_column)
    x = torch.randn(rows, width + padding, device=device).to(dtype)[:, :width]
    mask = _mask([rows], masked, device)
    x = _poisoned_rows(x, mask)
    acc = PackedSymmetric(order, device=device)
    dense = torch.zeros(order, order, device=device)

    def arguments(acc: PackedSymmetric, wide: bool) -> PackedSymmetric:
        return syrk_(acc, _widen(x, wide), mask, ones_column=ones_column, allow_tf32=allow_tf32)

    def addmm() -> Tensor:
        return dense.addmm_(x.T, x)

    baselines: dict[str, Work] = {"mm + add_": lambda: dense.add_(_matrix_product(x))}
    if allow_tf32 and dtype == torch.float32:
        baselines = {"mm + add_, tf32": with_tf32(baselines["mm + add_"]), "addmm_, tf32": with_tf32(addmm)}
    elif dtype == torch.float32:
        baselines["addmm_"] = addmm
    elif device.type == "cuda":
        baselines["addmm"] = lambda: torch.addmm(dense, x.T, x, out_dtype=torch.float32)
    return Problem(
        "syrk_", "syrk", f"order {order}, {rows} rows{', tf32' if allow_tf32 else ''}", dtype, device, order,
        run=lambda: arguments(acc, False),
        results=lambda wide: [arguments(_accumulator(order, device, wide), wide).to_dense()],
        cost=lambda c, where: cost.syrk(
            rows, order, dtype, replace(c, precision="tf32") if allow_tf32 else c, where, ones_column=ones_column
        ),
        explain=lambda: explain("syrk_", acc, x, mask, ones_column=ones_column, allow_tf32=allow_tf32),
        baselines={} if masked or ones_column else baselines,
        rounding=2.0**-9 if allow_tf32 else cut_off(rows, dtype),
    )  # fmt: skip


def outer_products(
    sizes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device, *, ones_column: bool = False
) -> Problem:
    """`accumulate_factors_` of problems (rows, order): the first half inputs, the second half gradients."""
    half = len(sizes) // 2
    xs = [
        torch.randn(rows, order - int(ones_column and i < half), device=device).to(dtype)
        for i, (rows, order) in enumerate(sizes)
    ]
    accumulators = [PackedSymmetric(order, device=device) for _, order in sizes]
    dense = [torch.zeros(order, order, device=device) for _, order in sizes]

    def call(accumulators: list[PackedSymmetric], wide: bool) -> list[PackedSymmetric]:
        given = [_widen(x, wide) for x in xs]
        accumulate_factors_(
            accumulators[:half], accumulators[half:], given[:half], given[half:], ones_column=[ones_column] * half
        )
        return accumulators

    def plain() -> None:
        for matrix, x in zip(dense, xs, strict=True):
            matrix.add_(_matrix_product(x))

    def one_by_one() -> None:
        for acc, x in zip(accumulators, xs, strict=True):
            syrk_(acc, x)

    orders = sorted({order for _, order in sizes})
    return Problem(
        "accumulate_factors_", "syrk", f"{len(sizes)} of order {', '.join(map(str, orders))}, {sizes[0][0]} rows",
        dtype, device, max(orders),
        run=lambda: call(accumulators, False),
        results=lambda wide: [
            acc.to_dense() for acc in call([_accumulator(order, device, wide) for _, order in sizes], wide)
        ],
        cost=lambda c, where: cost.accumulate_factors(sizes, dtype, c, where),
        explain=lambda: explain(
            "accumulate_factors_", accumulators[:half], accumulators[half:], xs[:half], xs[half:],
            ones_column=[ones_column] * half,
        ),
        baselines={} if ones_column else {"mm + add_ in turn": plain, "syrk_ in turn": one_by_one},
        rounding=cut_off(max(rows for rows, _ in sizes), dtype),
    )  # fmt: skip


def sketch(
    rows: int,
    order: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    masked: bool = False,
    ones_column: bool = False,
) -> Problem:
    """`sketch_`: rows of one factor, and test vectors."""
    mask = _mask([rows], masked, device)
    x = _poisoned_rows(torch.randn(rows, order - int(ones_column), device=device).to(dtype), mask)
    omega = torch.randn(order, columns, device=device)
    y, trace = torch.zeros_like(omega), torch.zeros((), device=device)
    dense = torch.zeros(order, order, device=device)

    def call(wide: bool) -> list[Tensor]:
        kind = torch.float64 if wide else torch.float32
        fresh = torch.zeros_like(omega, dtype=kind), torch.zeros_like(trace, dtype=kind)
        sketch_(*fresh, _widen(x, wide), omega.to(kind), mask, ones_column=ones_column)
        return list(fresh)

    def two_products() -> None:
        wide = x.float()
        y.addmm_(wide.T, wide @ omega)

    plain = {"two float32 products": two_products, "mm + add_ of the whole": lambda: dense.add_(_matrix_product(x))}
    forms = f"{', masked' if masked else ''}{', ones' if ones_column else ''}"
    return Problem(
        "sketch_", "product", f"order {order}, {rows} rows, {columns} vectors{forms}", dtype, device, order,
        run=lambda: sketch_(y, trace, x, omega, mask, ones_column=ones_column),
        results=call,
        cost=lambda c, where: cost.sketch(rows, order, columns, dtype, c, where),
        explain=lambda: explain("sketch_", y, trace, x, omega, mask, ones_column=ones_column),
        baselines={} if masked or ones_column else plain,
        operands=torch.float32,
    )  # fmt: skip


def rotation(rows: int, width: int, dtype: torch.dtype, device: torch.device, *, ones_column: bool = False) -> Problem:
    """`rotate`: float32 eigenvectors for float32 rows, a bfloat16 pair for bfloat16 rows."""
    x = torch.randn(rows, width - int(ones_column), device=device).to(dtype)
    q = _orthogonal(width, device)
    basis = bf16_pair(q) if dtype == torch.bfloat16 else q

    def call(wide: bool) -> Tensor:
        return rotate(_widen(x, wide), q.double() if wide else basis, ones_column=ones_column)

    baselines: dict[str, Work] = {"float32 product": lambda: x.float() @ q}
    if dtype != torch.float32:
        rounded = q.to(dtype)
        baselines[f"{str(dtype).removeprefix('torch.')} product, Q rounded"] = lambda: x @ rounded
    return Problem(
        "rotate", "product", f"{rows} rows of {width}", dtype, device, width,
        run=lambda: call(False),
        results=lambda wide: [call(wide)],
        cost=lambda c, where: Cost("rotate", (cost.rotate(rows, width, dtype, c),)),
        explain=lambda: explain("rotate", x, basis, ones_column=ones_column),
        baselines={} if ones_column else baselines,
        operands=_basis_dtype(dtype),
        rounding=_ROUNDING.get(dtype, 0.0),
    )  # fmt: skip


def correction(
    sequences: int,
    tokens: int,
    d_out: int,
    d_in: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    masked: bool = False,
    ones_column: bool = False,
    rotated: bool = False,
    packed: bool = False,
) -> Problem:
    """`eigenvalue_correction_`; `rotated` gives no bases, `packed` sequences of uneven length, one after the other."""
    rows = [sequences * tokens] if packed else [sequences, tokens]
    mask = _mask(rows, masked, device)
    g, a = (
        _poisoned_rows(torch.randn(*rows, width, device=device).to(dtype), mask)
        for width in (d_out, d_in - int(ones_column))
    )
    ends = [0, *(tokens * i + (i % 3 - 1) * (tokens // 3) for i in range(1, sequences)), sequences * tokens]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(device) if packed else None
    q_out, q_in = _orthogonal(d_out, device), _orthogonal(d_in, device)
    narrow = dtype == torch.bfloat16
    pairs = (bf16_pair(q_out), bf16_pair(q_in)) if narrow else (q_out, q_in)
    options: dict[str, Any] = {"ones_column": ones_column, "cu_seqlens": cu_seqlens}

    def bases(wide: bool) -> tuple[Tensor | None, Tensor | None]:
        if rotated:
            return None, None
        return (q_out.double(), q_in.double()) if wide else pairs

    def call(lam: Tensor, wide: bool) -> Tensor:
        return eigenvalue_correction_(lam, _widen(g, wide), _widen(a, wide), *bases(wide), mask, **options)

    lam = torch.zeros(d_out, d_in, device=device)
    rounded = (q_out.to(dtype), q_in.to(dtype))

    def rotating_gradients() -> Tensor:
        gradient = torch.bmm(g.transpose(1, 2), a)
        if not rotated:
            gradient = torch.matmul(rounded[0].T, torch.matmul(gradient, rounded[1]))
        return lam.add_(gradient.square_().sum(0))

    def rotating_tokens() -> Tensor:
        left, right = (g, a) if rotated else (g @ rounded[0], a @ rounded[1])
        return lam.add_(torch.bmm(left.transpose(1, 2), right).square_().sum(0))

    def rotations(where: Device) -> Configuration:
        return choose("product", where, _basis_dtype(dtype), max(d_out, d_in), triton_version())

    forms = f"{', packed' if packed else ''}{', rotated' if rotated else ''}"
    size = f"{sequences} × {tokens} tokens{forms}, {d_out} × {d_in}"
    return Problem(
        "eigenvalue_correction_", "eigenvalue_correction", size, dtype,
        device, max(d_out, d_in),
        run=lambda: call(lam, False),
        results=lambda wide: [
            call(torch.zeros(d_out, d_in, device=device, dtype=torch.float64 if wide else torch.float32), wide)
        ],
        cost=lambda c, where: cost.eigenvalue_correction(
            sequences, tokens, d_out, d_in, dtype, c,
            None if where is None else rotations(where),
            rotated=rotated,
        ),
        explain=lambda: explain(
            "eigenvalue_correction_", lam, g, a, *bases(False), mask, **options
        ),
        baselines={} if masked or ones_column or packed else {
            "gradients rotated (kronfluence)": rotating_gradients,
            "tokens rotated (bergson)": rotating_tokens,
        },
        operands=dtype if rotated else _basis_dtype(dtype),
        rounding=2 * (cut_off(2 * tokens, dtype) if rotated else _ROUNDING.get(dtype, 0.0)),
    )  # fmt: skip


def solve(
    d_out: int,
    d_in: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int = 0,
    pair: bool = False,
    tokens: int | None = None,
) -> Problem:
    """`kron_solve` of one right-hand side, of a batch, or of one given as g and a of so many tokens.

    `pair` gives Λ as two vectors.
    """
    q_out, q_in = _orthogonal(d_out, device), _orthogonal(d_in, device)
    vectors = (torch.rand(d_out, device=device), torch.rand(d_in, device=device))
    values = torch.rand(d_out, d_in, device=device)
    if tokens is None:
        v = [torch.randn(*((batch,) if batch else ()), d_out, d_in, device=device).to(dtype)]
    else:
        v = [torch.randn(tokens, width, device=device).to(dtype) for width in (d_out, d_in)]

    def arguments(wide: bool) -> tuple[Any, ...]:
        given = [_widen(x, wide) for x in v]
        spectrum = tuple(_widen(x, wide) for x in vectors) if pair else _widen(values, wide)
        return tuple(given) if len(given) == 2 else given[0], _widen(q_out, wide), _widen(q_in, wide), spectrum, DAMPING

    def plain() -> Tensor:
        return plain_solve(v[0].float() if len(v) == 1 else v[0].float().T @ v[1].float(), q_out, q_in, values)

    many = f"{batch} of " if batch else ""
    few = "" if tokens is None else f", {tokens} tokens"
    return Problem(
        "kron_solve", "product", f"{many}{d_out} × {d_in}{few}{', pair' if pair else ''}", dtype, device,
        max(d_out, d_in),
        run=lambda: kron_solve(*arguments(False)),
        results=lambda wide: [kron_solve(*arguments(wide))],
        cost=lambda c, where: cost.kron_solve(d_out, d_in, c, batch=max(1, batch), pair=pair, tokens=tokens),
        explain=lambda: explain("kron_solve", *arguments(False)),
        baselines={} if pair else {"eager": plain},
        operands=torch.float32,
    )  # fmt: skip


def plain_solve(v: Tensor, q_out: Tensor, q_in: Tensor, values: Tensor) -> Tensor:
    """What one writes in PyTorch; a function of its own, so that `torch.compile` can be given it."""
    return q_out @ ((q_out.T @ v @ q_in) / (values + DAMPING)) @ q_in.T


def solves(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> Problem:
    """`kron_solve` of layers `(d_out, d_in)`, all in one call."""
    layers = [
        (
            torch.randn(d_out, d_in, device=device).to(dtype), _orthogonal(d_out, device), _orthogonal(d_in, device),
            torch.rand(d_out, d_in, device=device),
        )
        for d_out, d_in in shapes
    ]  # fmt: skip

    def arguments(wide: bool) -> tuple[Any, ...]:
        return (*([_widen(x, wide) for x in part] for part in zip(*layers, strict=True)), DAMPING)

    def in_turn() -> object:
        return [plain_solve(v.float(), *rest) for v, *rest in layers]

    widest = max(max(shape) for shape in shapes)
    return Problem(
        "kron_solve", "product", f"{len(shapes)} layers to {widest}", dtype, device, widest,
        run=lambda: kron_solve(*arguments(False)),
        results=lambda wide: list(kron_solve(*arguments(wide))),
        cost=lambda c, where: cost.together([cost.kron_solve(*shape, c) for shape in shapes]),
        explain=lambda: explain("kron_solve", *arguments(False)),
        baselines={"eager in turn": in_turn},
        operands=torch.float32,
    )  # fmt: skip


def cross_entropy(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    hidden: int | None = None,
    labels: str = "keys",
) -> Problem:
    """`sampled_cross_entropy` of logits, or of hidden states with their projection.

    Labels are drawn by `keys` (Gumbel-max) or a `uniform` number (the inverse of the cumulated
    probabilities), or `given`.

    Its results do not depend on a draw that rounding may decide either way: the probabilities (or their
    product with the weight), the logarithm of each row's sum of exponentials, and by how much each label
    misses what the draw allows, which is zero.
    """
    if hidden is None:
        x, weight = 2 * torch.randn(rows, vocabulary, device=device).to(dtype), None
    else:
        x = torch.randn(rows, hidden, device=device).to(dtype)
        weight = (2 * hidden**-0.5 * torch.randn(vocabulary, hidden, device=device)).to(dtype)
    uniform, keys = torch.rand(rows, device=device), torch.randint(2**62, (rows,), device=device)
    wanted = torch.randint(vocabulary, (rows,), device=device)
    draw: dict[str, Any] = {"keys": {"keys": keys}, "uniform": {"uniform": uniform}, "given": {"labels": wanted}}[
        labels
    ]

    def results(wide: bool) -> list[Tensor]:
        matrix = None if weight is None else _widen(weight, wide)
        result = sampled_cross_entropy(_widen(x, wide), **draw, weight=matrix)
        exact = x.double() if weight is None else x.double() @ weight.double().T
        column = result.labels.unsqueeze(1)
        at_label = exact.gather(1, column).squeeze(1)
        if weight is None:
            mean = result.grad.float().scatter_add(1, column, torch.ones_like(column, dtype=torch.float32))
        else:
            mean = result.grad.float() + weight.float()[result.labels]
        logsumexp = result.nll + at_label
        if labels == "given":
            return [mean, logsumexp]
        if labels == "keys":
            scores = exact + vocabulary_noise(keys, vocabulary, torch.float64)
            missed = scores.amax(1) - scores.gather(1, column).squeeze(1)
        else:
            upper = exact.softmax(1).cumsum(1).gather(1, column).squeeze(1)
            lower = upper - (at_label - exact.logsumexp(1)).exp()
            missed = (lower - uniform).clamp(min=0) + (uniform - upper).clamp(min=0)
        # Of the worst row: a mean would hide a wrong draw.
        return [mean, logsumexp, missed.amax(0, keepdim=True).float()]

    def plain() -> Tensor:
        logits = x if weight is None else x @ weight.T
        p = logits.float().softmax(-1)
        picked = wanted.unsqueeze(1) if labels == "given" else torch.multinomial(p, 1)
        grad = p.scatter_add(1, picked, torch.full_like(picked, -1, dtype=p.dtype)).to(dtype)
        return grad if weight is None else grad @ weight

    baselines: dict[str, Work] = {"softmax" if labels == "given" else "softmax + multinomial": plain}
    if labels == "given":

        def autograd() -> Tensor:
            leaf = x.detach().requires_grad_()
            logits = leaf if weight is None else functional.linear(leaf, weight)
            (found,) = torch.autograd.grad(functional.cross_entropy(logits, wanted, reduction="sum"), leaf)
            return found

        baselines["F.cross_entropy, autograd"] = autograd
    return Problem(
        "sampled_cross_entropy", "sampled_cross_entropy",
        f"{rows} × {vocabulary}{f' from {hidden}' if hidden else ''}, labels {labels}", dtype, device, vocabulary,
        run=lambda: sampled_cross_entropy(x, **draw, weight=weight),
        results=results,
        cost=lambda c, where: cost.sampled_cross_entropy(rows, vocabulary, dtype, hidden=hidden),
        explain=lambda: explain("sampled_cross_entropy", x, **draw, weight=weight),
        baselines=baselines,
        rounding=4 * _ROUNDING.get(dtype, 2.0**-17) * (1 if hidden is None else 2),
    )  # fmt: skip


def update(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, *, along: bool = True
) -> Problem:
    """`apply_update_` of float32 deltas to weights of these shapes; `along` float32 gradients it is also measured."""
    weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    deltas = [1e-3 * torch.randn(shape, device=device) for shape in shapes]
    gradients = [torch.randn(shape, device=device) for shape in shapes] if along else None

    def norm(tensors: Sequence[Tensor]) -> float:
        return math.sqrt(sum(float(x.double().square().sum()) for x in tensors))

    def results(wide: bool) -> list[Tensor]:
        targets = [_widen(w, wide).clone() for w in weights]
        given = None if gradients is None else [_widen(g, wide) for g in gradients]
        sums = apply_update_(targets, [_widen(d, wide) for d in deltas], 0.5, given)
        if gradients is None:
            return targets
        # The product, of terms of either sign, is held against what it could be at most.
        scaled = torch.stack([sums[0] / norm(deltas) ** 2, sums[1] / (norm(deltas) * norm(gradients))])
        return [*targets, scaled.float()]

    def plain() -> object:
        for w, d in zip(weights, deltas, strict=True):
            w.add_(d, alpha=0.5)
        if gradients is None:
            return None
        squares = sum(d.square().sum() for d in deltas)
        return squares, sum(torch.dot(d.view(-1), g.view(-1)) for d, g in zip(deltas, gradients, strict=True))

    def together() -> object:
        torch._foreach_add_(weights, deltas if dtype == torch.float32 else [d.to(dtype) for d in deltas], alpha=0.5)
        if gradients is None:
            return None
        products = torch._foreach_mul(deltas, gradients)
        return torch.stack(torch._foreach_norm(deltas)).square().sum(), sum(p.sum() for p in products)

    elements = sum(weight.numel() for weight in weights)
    return Problem(
        "apply_update_", "apply_update",
        f"{len(shapes)} weights, {elements} elements{', measured' if along else ''}", dtype, device, elements,
        run=lambda: apply_update_(weights, deltas, 0.5, gradients),
        results=results,
        cost=lambda c, where: cost.apply_update(
            elements, dtype, torch.float32, gradient_dtype=torch.float32 if along else None
        ),
        explain=lambda: explain("apply_update_", weights, deltas, 0.5, gradients),
        baselines={"add_ in turn": plain, "torch._foreach": together},
        rounding=1e-6,
    )  # fmt: skip


def served_here(problem: Problem, backend: str = "triton") -> str | None:
    """Why a backend of GPU kernels would not serve a problem even where it is switched on, or None."""
    with by(backend):
        answer = problem.explain()
    if answer.backend == backend:
        return None
    return dict(answer.refused).get(backend, f"the operation has no kernel of {backend}")

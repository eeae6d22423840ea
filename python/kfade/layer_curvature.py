"""The fitted curvature of one layer: a typed state, and the solve.

For a layer with per-token inputs a and output gradients g the curvature is
`F = (Q_S ⊗ Q_A) diag(Λ) (Q_S ⊗ Q_A)ᵀ`, where Q_A and Q_S are the eigenvectors of the input factor
`A = A_sum / P` and the output factor `S = S_sum / T`. K-FAC has `Λ = λ_S λ_Aᵀ`, EK-FAC measures Λ,
the diagonal approximation measures it in the parameters' own basis, and identity has `Λ = 1`.

With a rank k a factor of higher order has a *thin* basis Q `[n, k]` of its largest eigenpairs, and all directions
beside them share the mean of the rest: see `kfade_kernels.low_rank`. Λ is then a block, its last row or column for
that tail.

With a greatest order of factors, one of a higher order is block-diagonal, and so are its eigenvectors: see
`kfade_kernels.blocks`. F is then block-diagonal as well, with one block for each pair of blocks of the two sides, and
each of these is what a layer of its own would have.

A K-FAC curvature may have factors alone and no eigenvectors: it is solved with by Cholesky factorisations and a
factored damping, and has no Λ; see `kfade_kernels.cholesky`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from kfade_kernels import PackedSymmetric, kron_solve, low_rank
from kfade_kernels.blocks import BlockBasis, PackedBlocks, slices, split
from kfade_kernels.cholesky import factored_solve
from kfade_kernels.precision import float32_products
from torch import Tensor

from .layers import Layer, WeightAndBias
from .placement import moved

# Elements of the gradients that are solved for in one call: it holds three buffers of that size.
SOLVED_TOGETHER = 1 << 28

# What a layer is solved with: factors alone, or eigenvectors and eigenvalues.
_FACTORS = ("a_sum", "s_sum")
_SPECTRAL = ("q_in", "lambda_in", "q_out", "lambda_out", "lambda_sum")

Factor = PackedSymmetric | PackedBlocks
Basis = Tensor | BlockBasis


def check_damping(value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"damping is {value}; it must be finite and at least 0")


@dataclass
class Sketch:
    """What one pass keeps of a factor of which only the largest eigenpairs are wanted.

    Attributes:
        omega: test vectors Ω `[n, l]`; layers of one width share them.
        y: `Σ a aᵀ Ω`, `[n, l]`.
        trace: `Σ ‖a‖²`, float64.
    """

    omega: Tensor
    y: Tensor
    trace: Tensor


@dataclass
class LayerCurvature:
    """Curvature of one weight matrix.

    Attributes:
        name: name of the layer's module.
        d_out: width of the outputs.
        d_in: width of the inputs, without the bias.
        has_bias: a bias rides along as the last input column of every matrix here.
        transposed: the parameter is stored `[d_in, d_out]`.
        group: name of the layer whose input factor this one shares.
        positions: P, the rows summed in A_sum; no whole number where older sums were weighted down.
        losses: T, the loss positions behind S_sum and Λ_sum, times the label samples; weighted like P.
        lambda_losses: T of Λ_sum where it rests on other positions than S_sum; None where on the same.
        max_factor_order: a factor of a higher order is in blocks; None where all are whole.
        a_sum: `Σ a aᵀ`, packed, of order d_in (+ 1); the same object for all layers of a group. None where the basis
            is thin.
        s_sum: `Σ g gᵀ`, packed, of order d_out; likewise.
        q_in, lambda_in: eigenvectors in columns and eigenvalues of A, ascending (in blocks, within each). A thin basis
            has k columns, and its eigenvalues are followed by the mean of the others.
        q_out, lambda_out: the same of S.
        lambda_sum: `Σ_n (Q_Sᵀ G_n Q_A)∘²`, `[d_out, d_in (+ 1)]`. Of a thin basis it has k + 1 rows or columns, and in
            the last the means over all other directions.
        a_sketch, s_sketch: of a factor that is to have a thin basis, until it has it.
        input_owner: the rank that has A_sum, where several ranks share the fit and another one has it.
    """

    name: str
    d_out: int
    d_in: int
    has_bias: bool
    transposed: bool
    group: str
    positions: float = 0
    losses: float = 0
    lambda_losses: float | None = None
    max_factor_order: int | None = None
    a_sum: Factor | None = field(default=None, repr=False)
    s_sum: Factor | None = field(default=None, repr=False)
    q_in: Basis | None = field(default=None, repr=False)
    lambda_in: Tensor | None = field(default=None, repr=False)
    q_out: Basis | None = field(default=None, repr=False)
    lambda_out: Tensor | None = field(default=None, repr=False)
    lambda_sum: Tensor | None = field(default=None, repr=False)
    a_sketch: Sketch | None = field(default=None, repr=False)
    s_sketch: Sketch | None = field(default=None, repr=False)
    input_owner: int | None = None

    @property
    def low_rank(self) -> bool:
        """Whether a side has a thin basis."""
        return any(isinstance(q, Tensor) and q.shape[1] < q.shape[0] for q in (self.q_in, self.q_out))

    @property
    def input_blocks(self) -> tuple[int, ...]:
        """Orders of the blocks of A: one, d_in (+ 1), where it is whole."""
        return split(self.width_in, self.max_factor_order)

    @property
    def output_blocks(self) -> tuple[int, ...]:
        """The same of S."""
        return split(self.d_out, self.max_factor_order)

    @property
    def in_blocks(self) -> bool:
        """Whether a factor is block-diagonal."""
        return len(self.input_blocks) > 1 or len(self.output_blocks) > 1

    @property
    def factors_alone(self) -> bool:
        """Whether it is solved with by Cholesky factorisations: there are factors, and nothing was decomposed."""
        return self.a_sum is not None and self.s_sum is not None and self.q_in is None and self.q_out is None

    def on(self, device: torch.device) -> LayerCurvature:
        """The same layer, with what it is solved and multiplied with on a device; itself where that is there already.

        A copy of eigenvectors and Λ, or of factors where there are no eigenvectors, for as long as it is kept.
        """
        names = _FACTORS if self.factors_alone else _SPECTRAL
        if all(value is None or value.device == device for value in (getattr(self, name) for name in names)):
            return self
        return replace(self, **moved(self, names, device, {}))

    @property
    def solves_together(self) -> bool:
        """Whether it is solved with in one call with other layers: it has whole eigenvectors."""
        return self.q_in is not None and self.q_out is not None and not (self.low_rank or self.in_blocks)

    @property
    def width_in(self) -> int:
        return self.d_in + int(self.has_bias)

    @property
    def lambda_count(self) -> float:
        """T behind Λ_sum, at least 1."""
        return max(1, self.losses if self.lambda_losses is None else self.lambda_losses)

    def lacks(self, what: str) -> ValueError:
        """The error to raise where something that was not fitted, or is elsewhere, is asked for."""
        why = "it was fitted with a rank" if self.low_rank else "the curvature was fitted without"
        if self.input_owner is not None and what == "input factor" and not self.low_rank:
            why = f"it is with rank {self.input_owner}; save the curvature and load it to have all of it"
        return ValueError(f"layer {self.name} has no {what}: {why}")

    def input_factor(self) -> Tensor:
        """`A = A_sum / P`, dense `[d_in (+ 1), d_in (+ 1)]`."""
        if self.a_sum is None:
            raise self.lacks("input factor")
        return self.a_sum.to_dense() / max(1, self.positions)

    def output_factor(self) -> Tensor:
        """`S = S_sum / T`, dense `[d_out, d_out]`."""
        if self.s_sum is None:
            raise self.lacks("output factor")
        return self.s_sum.to_dense() / max(1, self.losses)

    def input_eigenvectors(self) -> Tensor:
        """`Q_A`, eigenvectors in columns; `[d_in (+ 1), k]` with a rank. In blocks it is a dense tensor made anew."""
        if self.q_in is None:
            raise self.lacks("input eigenvectors")
        return self.q_in if isinstance(self.q_in, Tensor) else self.q_in.to_dense()

    def output_eigenvectors(self) -> Tensor:
        """`Q_S`, eigenvectors in columns; `[d_out, k]` with a rank. In blocks it is a dense tensor made anew."""
        if self.q_out is None:
            raise self.lacks("output eigenvectors")
        return self.q_out if isinstance(self.q_out, Tensor) else self.q_out.to_dense()

    def eigenvalues(self) -> Tensor:
        """`Λ [d_out, d_in (+ 1)]`; with a rank a block, whose entries count as often as `multiplicities` says."""
        if self.lambda_sum is not None:
            return self.lambda_sum / self.lambda_count
        if self.lambda_out is not None and self.lambda_in is not None:
            return torch.outer(self.lambda_out, self.lambda_in)
        if self.factors_alone:
            raise ValueError(
                f"layer {self.name} has no eigenvalues: nothing was decomposed; fit with decomposition 'eigh'"
            )
        return torch.ones(self.d_out, self.width_in)

    def multiplicities(self) -> Tensor:
        """How many directions each entry of `eigenvalues` stands for: float64, ones without a rank."""
        values = self.eigenvalues()
        if not self.low_rank:
            return torch.ones_like(values, dtype=torch.float64)
        sides = (low_rank.multiplicities(q) for q in (self.output_eigenvectors(), self.input_eigenvectors()))
        return torch.outer(*sides).to(values.device)

    def mean_eigenvalue(self) -> float:
        """Mean of Λ: the unit of relative damping."""
        if self.low_rank:
            return float((self.eigenvalues().double() * self.multiplicities()).sum()) / (self.d_out * self.width_in)
        if self.lambda_sum is not None:
            return float(self.lambda_sum.mean(dtype=torch.float64)) / self.lambda_count
        if self.lambda_out is not None and self.lambda_in is not None:
            return float(self.lambda_out.mean(dtype=torch.float64) * self.lambda_in.mean(dtype=torch.float64))
        if self.a_sum is not None and self.s_sum is not None:
            traces = float(self.a_sum.trace()) * float(self.s_sum.trace())
            return traces / (max(1, self.positions) * max(1, self.losses) * self.width_in * self.d_out)
        return 1.0

    def damping(self, value: float, kind: str) -> float:
        """The absolute damping: `value`, or `value` times the mean eigenvalue."""
        return value * self.mean_eigenvalue() if kind == "relative" else value

    def check_matrix(self, matrix: Tensor) -> None:
        """Raise ValueError unless a matrix, or a batch of them, is `[d_out, d_in (+ 1)]`."""
        if matrix.shape[-2:] != (self.d_out, self.width_in):
            raise ValueError(
                f"the gradient of {self.name} has shape {list(matrix.shape)}; it must be {[self.d_out, self.width_in]}"
            )

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """`(F + λI)⁻¹` applied to `matrix [d_out, d_in (+ 1)]` or a batch of them; λ absolute."""
        self.check_matrix(matrix)
        check_damping(damping)
        return solve_layers([self], [matrix], [damping])[0]

    def product(self, left: Tensor, right: Tensor) -> float:
        """`leftᵀ F right` for two matrices `[d_out, d_in (+ 1)]`, on their device."""
        here = self.on(left.device)
        if here is not self:
            return here.product(left, right)
        if self.low_rank:
            image = low_rank.apply(right, self.output_eigenvectors(), self.input_eigenvectors(), self.eigenvalues())
            return float((left.to(image.dtype) * image).sum(dtype=torch.float64))
        if self.in_blocks:
            return sum(p.state.product(left[p.rows, p.columns], right[p.rows, p.columns]) for p in self.parts())
        if self.factors_alone:
            s, a = self.output_factor(), self.input_factor()
            with float32_products():
                return float((left.to(s.dtype) * (s @ right.to(s.dtype) @ a)).sum(dtype=torch.float64))
        if self.q_out is not None and self.q_in is not None:
            q_out, q_in = self.output_eigenvectors(), self.input_eigenvectors()
            with float32_products():
                left, right = (q_out.T @ m.to(q_out.dtype) @ q_in for m in (left, right))
        if self.q_out is None and self.lambda_sum is None:
            return float((left * right).sum(dtype=torch.float64))
        return float((left * right * self.eigenvalues()).sum(dtype=torch.float64))

    def parts(self) -> list[Part]:
        """One layer for each block of S and each of A, by rows and then columns; their tensors are views of this one's.

        F of this layer is zero between them, so that each can be solved with, or multiplied by, alone.
        """
        sides = []
        for total, q, values, orders in (
            (self.s_sum, self.q_out, self.lambda_out, self.output_blocks),
            (self.a_sum, self.q_in, self.lambda_in, self.input_blocks),
        ):
            count = len(orders)
            totals = [None] * count if total is None else total.blocks
            bases = [None] * count if q is None else q.blocks if isinstance(q, BlockBasis) else [q]
            spectra = [None] * count if values is None else values.split(orders)
            sides.append(list(zip(slices(orders), orders, totals, bases, spectra, strict=True)))
        return [
            Part(rows, columns, replace(
                self, d_out=d_out, d_in=width, has_bias=False, max_factor_order=None, s_sum=s, a_sum=a, q_out=q_out,
                q_in=q_in, lambda_out=lambda_out, lambda_in=lambda_in,
                lambda_sum=None if self.lambda_sum is None else self.lambda_sum[rows, columns],
            ))
            for rows, d_out, s, q_out, lambda_out in sides[0]
            for columns, width, a, q_in, lambda_in in sides[1]
        ]  # fmt: skip

    def join(self, value: Tensor | Sequence[Tensor]) -> Tensor:
        """A gradient as users give it, as `[d_out, d_in (+ 1)]`.

        A tensor in the parameter's layout; with a bias, the pair (weight, bias), or both joined in
        one `[d_out, d_in + 1]`.
        """
        if not isinstance(value, Tensor):
            weight, bias = value
            matrix = weight.T if self.transposed else weight
            return torch.cat([matrix, bias.to(matrix.dtype).unsqueeze(1)], dim=1)
        return value.T if self.transposed and not self.has_bias else value

    def part(self, matrix: Tensor) -> Tensor | WeightAndBias:
        """`[d_out, d_in (+ 1)]` in the parameters' layout: a tensor, or weight and bias apart."""
        weight = matrix[:, : self.d_in]
        weight = weight.T.contiguous() if self.transposed else weight.contiguous()
        return WeightAndBias(weight, matrix[:, self.d_in].contiguous()) if self.has_bias else weight


@dataclass(frozen=True)
class Part:
    """What a layer has for one block of each of its factors.

    Attributes:
        rows, columns: of the layer's matrices.
        state: as of a layer of this size, without a bias.
    """

    rows: slice
    columns: slice
    state: LayerCurvature


def by_parts(
    layer: LayerCurvature,
    matrix: Tensor,
    function: Callable[[list[LayerCurvature], list[Tensor]], Sequence[Tensor]],
) -> Tensor:
    """What a function makes of a matrix `[..., d_out, d_in (+ 1)]`, given all parts of a layer and of the matrix."""
    parts = layer.parts()
    found = function([p.state for p in parts], [matrix[..., p.rows, p.columns] for p in parts])
    result = matrix.new_empty(matrix.shape, dtype=found[0].dtype)
    for part, value in zip(parts, found, strict=True):
        result[..., part.rows, part.columns] = value
    return result


def solve_layers(
    layers: Sequence[LayerCurvature], matrices: Sequence[Tensor], dampings: Sequence[float]
) -> list[Tensor]:
    """`(F + λI)⁻¹` of each layer applied to its matrix; layers with eigenvectors go together, a few at a time.

    What lives on another device than a matrix is copied to that of the matrix meanwhile.
    """
    solved: list[Tensor | None] = [None] * len(layers)
    rotated = []
    for i, (given, matrix, damping) in enumerate(zip(layers, matrices, dampings, strict=True)):
        if given.solves_together:
            rotated.append(i)
            continue
        layer = given.on(matrix.device)
        if layer.low_rank:
            scale = (layer.eigenvalues() + damping).reciprocal_()
            solved[i] = low_rank.apply(matrix, layer.output_eigenvectors(), layer.input_eigenvectors(), scale)
        elif layer.factors_alone:
            solved[i] = _factored_solve(layer, matrix, damping)
        elif layer.in_blocks:
            solved[i] = by_parts(layer, matrix, partial(_solve_alike, damping))
        elif layer.lambda_sum is None:
            solved[i] = matrix / (1 + damping)
        else:
            solved[i] = matrix.to(layer.lambda_sum.dtype) / (layer.eigenvalues() + damping)
    for group in _groups(rotated, [matrix.numel() for matrix in matrices]):
        problems = [_kron_arguments(layers[i].on(matrices[i].device), matrices[i], dampings[i]) for i in group]
        for i, solution in zip(
            group, kron_solve(*(list(column) for column in zip(*problems, strict=True))), strict=True
        ):
            # Λ went in as its raw sum, T times too large, and so did λ.
            solved[i] = solution.mul_(layers[i].lambda_count) if layers[i].lambda_sum is not None else solution
    return [x for x in solved if x is not None]


def _solve_alike(damping: float, layers: Sequence[LayerCurvature], matrices: Sequence[Tensor]) -> list[Tensor]:
    return solve_layers(layers, matrices, [damping] * len(layers))


def _factored_solve(layer: LayerCurvature, matrix: Tensor, damping: float) -> Tensor:
    assert layer.s_sum is not None and layer.a_sum is not None
    counts = {"s_count": max(1, layer.losses), "a_count": max(1, layer.positions)}
    try:
        return factored_solve(matrix, layer.s_sum, layer.a_sum, damping, **counts)
    except ValueError as error:
        raise ValueError(f"layer {layer.name}: {error}") from error


def _groups(indices: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Consecutive indices whose sizes sum to at most `SOLVED_TOGETHER`, or single ones."""
    group: list[int] = []
    for i in indices:
        if group and sum(sizes[j] for j in group) + sizes[i] > SOLVED_TOGETHER:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _kron_arguments(layer: LayerCurvature, matrix: Tensor, damping: float) -> tuple[Any, ...]:
    """Arguments of `kron_solve`. The raw sum of Λ saves a copy of it: the solution is then T times too small."""
    eigenvalues: Tensor | tuple[Tensor, Tensor]
    if layer.lambda_sum is not None:
        eigenvalues, damping = layer.lambda_sum, damping * layer.lambda_count
    else:
        assert layer.lambda_out is not None and layer.lambda_in is not None
        eigenvalues = layer.lambda_out, layer.lambda_in
    return matrix, layer.output_eigenvectors(), layer.input_eigenvectors(), eigenvalues, damping


def new_states(layers: Sequence[Layer], losses: int, max_factor_order: int | None = None) -> dict[str, LayerCurvature]:
    """Empty states of some layers, by name; `losses` is T of each."""
    return {
        layer.name: LayerCurvature(
            *(layer.name, layer.d_out, layer.d_in, layer.has_bias, layer.transposed, layer.group),
            losses=losses,
            max_factor_order=max_factor_order,
        )
        for layer in layers
    }

"""A fitted curvature as a symmetric linear operator on the model's parameters, for PyTorch and for SciPy.

A curvature is `F = Q diag(Λ) Qᵀ` with `Q = Q_S ⊗ Q_A` in each layer, so every power of `F + λI` costs the
same as a product with it: rotate, scale by `(Λ + λ)^p`, rotate back. The operator is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any, overload

import torch
from kfade_kernels import kron_solve, low_rank
from kfade_kernels.arguments import finite
from kfade_kernels.precision import float32_products
from torch import Tensor

from .config import DAMPINGS
from .curvature import Curvature
from .layer_curvature import LayerCurvature, by_parts


def checked_layers(curvature: Curvature, layers: str | Sequence[str] | None) -> list[LayerCurvature]:
    """The chosen layers in the order of the curvature."""
    if not isinstance(curvature, Curvature):
        raise TypeError(f"curvature is a {type(curvature).__name__}; it must be a Curvature")
    chosen = list(curvature) if layers is None else [layers] if isinstance(layers, str) else list(layers)
    if not chosen:
        raise ValueError("layers is empty; it must name at least one layer, or be None for all")
    unknown = sorted(set(chosen) - set(curvature))
    if unknown:
        raise ValueError(f"layers has unknown names {unknown}; the curvature has {sorted(curvature)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers is {chosen}; it must name each layer once")
    states = [state for name, state in curvature.items() if name in chosen]
    if any(state.factors_alone for state in states):
        raise ValueError(
            "curvature has factors and no eigenvalues, and these are needed: it must be fitted with decomposition"
            " 'eigh'"
        )
    return states


def _shapes(state: LayerCurvature) -> dict[str, torch.Size]:
    """Names and shapes of a layer's parameters, in the layout in which the model has them."""
    weight = (state.d_in, state.d_out) if state.transposed else (state.d_out, state.d_in)
    shapes = {f"{state.name}.weight": torch.Size(weight)}
    return {**shapes, f"{state.name}.bias": torch.Size([state.d_out])} if state.has_bias else shapes


def _weighted(state: LayerCurvature, values: Tensor) -> float:
    """The sum over all directions of what is given by eigenvalue."""
    return float((values * state.multiplicities()).sum()) if state.low_rank else float(values.sum())


def _matrices(state: LayerCurvature, rows: Tensor) -> Tensor:
    """Rows `[n, K]` of a layer's parameters as `[K, d_out, d_in (+ 1)]`."""
    size, columns = state.d_out * state.d_in, rows.shape[1]
    if state.transposed:
        weight = rows[:size].reshape(state.d_in, state.d_out, columns).permute(2, 1, 0)
    else:
        weight = rows[:size].reshape(state.d_out, state.d_in, columns).permute(2, 0, 1)
    return torch.cat([weight, rows[size:].T.unsqueeze(2)], dim=2) if state.has_bias else weight


def _rows(state: LayerCurvature, matrices: Tensor) -> Tensor:
    """The inverse of `_matrices`."""
    weight = matrices[:, :, : state.d_in]
    weight = weight.permute(2, 1, 0) if state.transposed else weight.permute(1, 2, 0)
    rows = weight.reshape(state.d_out * state.d_in, matrices.shape[0])
    return torch.cat([rows, matrices[:, :, state.d_in].T]) if state.has_bias else rows


class CurvatureOperator:
    """`(F + λI)^power` of a fitted curvature, as a symmetric operator on the tracked parameters.

    `operator @ v` takes a vector `[D]`, a matrix `[D, K]`, or a mapping from parameter names to tensors in the
    parameters' own layout, and returns the same kind. A vector holds the parameters of the layers in the order
    in which `model.named_parameters()` gives them (layers in the order of the curvature; a layer's weight,
    then its bias), each flattened in its own layout, as `torch.nn.utils.parameters_to_vector` does.

    Args:
        curvature: of any of the four kinds.
        layers: the name of one layer, names of some, or None for all; their order does not matter.
        damping: λ ≥ 0.
        kind: `relative` multiplies λ by each layer's mean eigenvalue, `absolute` does not.
        power: 1 for `F + λI` itself; any finite number.

    Attributes:
        names: of the parameters, in the order in which a vector holds them.
        shape: `(D, D)`.
        dtype: of the arithmetic and of results: that of the fit. An identity fit has no tensors: its operator
            works in the dtype of what it is given, and this is PyTorch's default dtype.
        device: where the curvature is; what is given must be there too.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: an unknown layer, a bad damping, kind or power, or a negative power where an eigenvalue is 0 and
            there is no damping.

    Cost: a product takes `4·d_out·d_in·(d_out + d_in)` FLOPs a layer and column, whatever the power; trace,
    log-determinant and norm take one pass over Λ.
    """

    def __init__(
        self,
        curvature: Curvature,
        layers: str | Sequence[str] | None = None,
        *,
        damping: float = 0.0,
        kind: str = "relative",
        power: float = 1.0,
    ) -> None:
        self._states = checked_layers(curvature, layers)
        if kind not in DAMPINGS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(DAMPINGS)}")
        damping, self._power = finite("damping", damping, minimum=0.0), finite("power", power)
        self._curvature, self._damping, self._kind = curvature, damping, kind
        self._dampings = [state.damping(damping, kind) for state in self._states]
        shapes = [_shapes(state) for state in self._states]
        self._shapes = {name: shape for each in shapes for name, shape in each.items()}
        self._sizes = [sum(shape.numel() for shape in each.values()) for each in shapes]
        self.names = list(self._shapes)
        self.shape = (sum(self._sizes), sum(self._sizes))
        first = self._states[0]
        tensor = first.q_out if first.q_out is not None else first.lambda_sum
        self._has_state = tensor is not None
        self.dtype = torch.get_default_dtype() if tensor is None else tensor.dtype
        self.device = torch.device("cpu") if tensor is None else tensor.device
        if self._power < 0:
            for state, value in zip(self._states, self._dampings, strict=True):
                if float(state.eigenvalues().min()) + value <= 0:
                    raise ValueError(
                        f"damping is {damping} ({kind}), which is {value} for layer {state.name}, and that has an"
                        f" eigenvalue 0: power {self._power:g} does not exist; the damping must be greater than 0 there"
                    )

    def __repr__(self) -> str:
        return (
            f"CurvatureOperator({self._curvature.config.curvature}, {len(self._states)} layers, shape={self.shape},"
            f" damping={self._damping:g} {self._kind}, power={self._power:g})"
        )

    # ---- other operators

    @property
    def T(self) -> CurvatureOperator:
        """The transpose: the operator itself, since it is symmetric."""
        return self

    def _to_power(self, power: float) -> CurvatureOperator:
        names = [state.name for state in self._states]
        return CurvatureOperator(self._curvature, names, damping=self._damping, kind=self._kind, power=power)

    def inverse(self) -> CurvatureOperator:
        """The inverse: of `F + λI` it is the operator behind `Curvature.solve`.

        Raises:
            ValueError: an eigenvalue is 0 and there is no damping.
        """
        return self._to_power(-self._power)

    def inverse_sqrt(self) -> CurvatureOperator:
        """The symmetric inverse square root: from `z ~ N(0, I)` it makes samples of `N(0, (F + λI)⁻¹)`.

        Raises:
            ValueError: an eigenvalue is 0 and there is no damping.
        """
        return self._to_power(-self._power / 2)

    # ---- numbers

    def _spectrum(self, state: LayerCurvature, damping: float) -> Tensor:
        """`Λ + λ` of a layer in float64, `[d_out, d_in (+ 1)]`, or a block with a rank."""
        return state.eigenvalues().double() + damping

    def _sum(self, function: Any) -> float:
        layers = zip(self._states, self._dampings, strict=True)
        return sum(_weighted(state, function(self._spectrum(state, damping))) for state, damping in layers)

    def trace(self) -> float:
        """The trace, summed in float64."""
        return self._sum(lambda spectrum: spectrum**self._power)

    def logdet(self) -> float:
        """The natural logarithm of the determinant; -inf where an eigenvalue is 0."""
        return self._power * self._sum(torch.log) if self._power else 0.0

    def frobenius_norm(self) -> float:
        """The square root of the sum of squares of all entries."""
        return math.sqrt(self._sum(lambda spectrum: spectrum ** (2 * self._power)))

    # ---- products

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def __matmul__(self, other: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """The product with a vector `[D]`, a matrix `[D, K]` or a mapping by parameter name.

        Raises:
            TypeError: not one of these, not of a float dtype, or of a wider dtype than the fit.
            ValueError: another shape or device, or a mapping of other parameters.
        """
        if isinstance(other, Mapping):
            return self.to_mapping(self @ self.to_vector(other))
        if not isinstance(other, Tensor):
            raise TypeError(f"other is a {type(other).__name__}; it must be a tensor or a mapping by parameter name")
        size = self.shape[1]
        if other.ndim not in (1, 2) or other.shape[0] != size:
            raise ValueError(f"other has shape {list(other.shape)}; it must be [{size}] or [{size}, K]")
        if not other.is_floating_point():
            raise TypeError(f"other is {other.dtype}; it must be of a float dtype")
        if self._has_state and torch.promote_types(other.dtype, self.dtype) != self.dtype:
            raise TypeError(f"other is {other.dtype}; it must not be wider than the {self.dtype} of the curvature")
        if self._has_state and other.device != self.device:
            raise ValueError(f"other is on {other.device}; it must be on {self.device} like the curvature")
        columns = other.to(self.dtype) if self._has_state else other
        parts = (columns if other.ndim == 2 else columns.unsqueeze(1)).split(self._sizes)
        matrices = [_matrices(state, part) for state, part in zip(self._states, parts, strict=True)]
        product = torch.cat([_rows(state, x) for state, x in zip(self._states, self._apply(matrices), strict=True)])
        return product if other.ndim == 2 else product.squeeze(1)

    def _apply(self, matrices: list[Tensor]) -> list[Tensor]:
        """The operator on matrices `[K, d_out, d_in (+ 1)]`, one a layer."""
        if self._power >= 0 or any(s.q_out is None or s.low_rank or s.in_blocks for s in self._states):
            return [self._scaled(*each) for each in zip(self._states, self._dampings, matrices, strict=True)]
        # A solve with (Λ + λ)^-power is this power, by the kernel that takes all layers at once.
        q_out, q_in = zip(*((s.output_eigenvectors(), s.input_eigenvectors()) for s in self._states), strict=True)
        spectra = [(s.eigenvalues() + x) ** -self._power for s, x in zip(self._states, self._dampings, strict=True)]
        return kron_solve(matrices, list(q_out), list(q_in), spectra, 0.0)

    def _scaled(self, state: LayerCurvature, damping: float, matrices: Tensor) -> Tensor:
        """One layer's `Q_S [(Q_Sᵀ V Q_A) ∘ (Λ + λ)^power] Q_Aᵀ`; without eigenvectors only the scaling."""
        if state.q_out is None and state.lambda_sum is None:
            return matrices * float((1 + damping) ** self._power)
        if state.in_blocks:
            return by_parts(state, matrices, lambda parts, some: list(map(self._scaled, parts, repeat(damping), some)))
        scale = (state.eigenvalues() + damping) ** self._power
        if state.q_out is None:
            return matrices * scale
        q_out, q_in = state.output_eigenvectors(), state.input_eigenvectors()
        if state.low_rank:
            return low_rank.apply(matrices, q_out, q_in, scale)
        with float32_products():
            product: Tensor = q_out @ (q_out.T @ matrices @ q_in).mul_(scale) @ q_in.T
        return product

    # ---- between vectors and parameters

    def to_vector(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A mapping by parameter name, each in the parameter's layout, as a vector `[D]`.

        Raises:
            ValueError: a parameter is missing, unknown, or of another shape.
        """
        missing, unknown = sorted(set(self.names) - set(tensors)), sorted(set(tensors) - set(self.names))
        if missing or unknown:
            raise ValueError(f"tensors lacks {missing} and has unknown {unknown}; it must have {self.names}")
        for name, shape in self._shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name} has shape {list(tensors[name].shape)}; it must be {list(shape)}")
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def to_mapping(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector `[D]` as views of it by parameter name, each in the parameter's layout.

        Raises:
            ValueError: another shape.
        """
        if vector.shape != self.shape[1:]:
            raise ValueError(f"vector has shape {list(vector.shape)}; it must be [{self.shape[1]}]")
        parts = vector.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def to_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` of the same shape and dtype, on NumPy arrays.

        What SciPy hands over is converted to the dtype of this operator and to its device, and back.

        Raises:
            ImportError: SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError("to_scipy needs SciPy, which is not installed: `pip install scipy`") from error

        def product(array: Any) -> Any:
            given = torch.tensor(array, dtype=self.dtype, device=self.device)
            return (self @ given.reshape(self.shape[1], -1)).cpu().numpy().reshape(array.shape)

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=dtype)

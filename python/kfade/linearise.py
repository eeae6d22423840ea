"""A model linearised in some weights: derivatives of its loss rows, and products with its exact Gauss-Newton matrix.

With h the loss rows, z the logits and J the derivative of h with respect to the weights of some layers, the
Gauss-Newton matrix of the token mean over N loss positions is

    G = 1/N Σ_n J_nᵀ Wᵀ H_n W J_n    with    H = (diag(p) − p pᵀ) / T²,   p = softmax(z / T)

(Schraudolph 2002; `z = h Wᵀ + b`). It couples layers, which Kronecker factors leave apart. A product takes one
forward-mode and one reverse-mode pass over the batches, and G is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from kfade_kernels.sampled_cross_entropy.pytorch import rows_per_chunk
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .capture import layer_hooks
from .errors import UnsupportedLayerError
from .layers import Layer
from .loss import Batch, Head
from .sharding import whole

Matrices = dict[str, Tensor]


class _Rows(nn.Module):
    """The way to a model's loss rows as a module, so that its weights can be replaced for one call."""

    def __init__(self, model: nn.Module, head: Head) -> None:
        super().__init__()
        self.model, self._head = model, head

    def forward(self, batch: Batch) -> Tensor:
        return self._head.rows(batch)


def linearised_rows(
    model: nn.Module, head: Head, layers: Sequence[Layer], batch: Batch, change: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Loss rows h, and their derivative along a change of the weights, by one forward-mode product.

    Args:
        model: the model.
        head: runs it.
        layers: whose weights change.
        batch: of N loss positions.
        change: by parameter name, each in the parameter's layout.

    Raises:
        UnsupportedLayerError: forward-mode derivatives do not reach a layer.
    """

    def reached(layer: Layer, _args: object, _kwargs: object, output: Tensor) -> None:
        if forward_ad.unpack_dual(output).tangent is None:
            raise UnsupportedLayerError(
                f"layer {layer.name} cannot be linearised: forward-mode derivatives do not reach it (a reentrant"
                " checkpoint hides them); use the non-reentrant kind, or what needs no linearised model"
            )

    # PyTorch's fused attention has no forward-mode derivative.
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), layer_hooks(layers, reached):
        duals = {}
        for layer in layers:
            for name, parameter in layer.parameters().items():
                duals[f"model.{name}"] = forward_ad.make_dual(parameter.detach(), change[name].to(parameter))
        found = forward_ad.unpack_dual(functional_call(_Rows(model, head), duals, (batch,)))
        return found.primal, torch.zeros_like(found.primal) if found.tangent is None else found.tangent


def softmax_hessian_product(head: Head, rows: Tensor, tangent: Tensor, temperature: float = 1.0) -> Tensor:
    """`Wᵀ H W t` of each row: the curvature of its cross-entropy along t, on rows `[N, d]` (or logits `[N, V]`)."""
    weight, bias = head.weight, head.bias
    vocabulary = rows.shape[1] if weight is None else weight.shape[0]
    product = torch.empty_like(rows)
    step = rows_per_chunk(2 * vocabulary, 0, rows.device)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        logits, moved = rows[part], tangent[part]
        if weight is not None:
            logits = nn.functional.linear(logits.to(weight.dtype), weight, bias)
            moved = nn.functional.linear(moved.to(weight.dtype), weight)
        wide = torch.promote_types(logits.dtype, torch.float32)
        p = (logits.to(wide) / temperature).softmax(-1)
        moved = moved.to(wide)
        curved = p * (moved - (p * moved).sum(-1, keepdim=True)) / temperature**2
        product[part] = (curved if weight is None else curved.to(weight.dtype) @ weight).to(product.dtype)
    return product


def add_gauss_newton_products(
    model: nn.Module,
    head: Head,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    change: Mapping[str, Tensor],
    tokens: int,
    temperature: float,
) -> None:
    """Add what some batches give of `G v` to the gradients of the layers' parameters, which must require them.

    Cost: about six forward passes over the batches.

    Args:
        model: the model.
        head: runs it.
        layers: whose weights change.
        batches: all those of the token mean, or a part of them.
        change: v by parameter name.
        tokens: loss positions of all batches.
        temperature: of the softmax.
    """
    for batch in batches:
        with torch.no_grad():
            rows, tangent = linearised_rows(model, head, layers, batch, change)
            curved = softmax_hessian_product(head, rows, tangent, temperature)
        head.rows(batch).backward(curved / tokens)


def gradient_matrices(layers: Sequence[Layer], dtype: torch.dtype) -> Matrices:
    """What the layers' parameters have in `.grad`, `[d_out, d_in (+ 1)]` by layer name; 0 where they have none."""
    result = {}
    for layer in layers:
        parts = [whole(torch.zeros_like(p) if p.grad is None else p.grad) for p in layer.parameters().values()]
        bias = parts[1].to(dtype) if layer.has_bias else None
        result[layer.name] = layer.joint(parts[0].to(dtype), bias).clone()
    return result


def dot(left: Matrices, right: Matrices) -> float:
    """Sum over layers and entries, added up in float64."""
    return sum(float((left[name] * right[name]).sum(dtype=torch.float64)) for name in left)


def conjugate_gradients(
    product: Callable[[Matrices], Matrices],
    right: Matrices,
    precondition: Callable[[Matrices], Matrices],
    iterations: int,
    tolerance: float = 1e-6,
    inner: Callable[[Matrices, Matrices], float] = dot,
) -> Matrices:
    """Preconditioned conjugate gradients for `A x = b` (Hestenes and Stiefel 1952), from 0.

    Every iterate has `xᵀ A x = xᵀ b`. The first one is the preconditioner's own solution, at its best length.

    Args:
        product: A v, with A positive definite; a v of no curvature ends the iteration.
        right: b.
        precondition: an approximation of A⁻¹ applied to v, positive definite too.
        iterations: at most so many products.
        tolerance: end where the residual, in the preconditioner's norm, has fallen by this factor.
        inner: the inner product; where ranks share the matrices, the sum over them.
    """
    solution = {name: torch.zeros_like(matrix) for name, matrix in right.items()}
    residual = {name: matrix.clone() for name, matrix in right.items()}
    conditioned = precondition(residual)
    direction = {name: matrix.clone() for name, matrix in conditioned.items()}
    first = norm = inner(residual, conditioned)
    for _ in range(iterations):
        if not norm > tolerance**2 * first:
            break
        curved = product(direction)
        bend = inner(direction, curved)
        if not bend > 0:
            break
        length = norm / bend
        for name, along in direction.items():
            solution[name].add_(along, alpha=length)
            residual[name].sub_(curved[name], alpha=length)
        conditioned = precondition(residual)
        norm, before = inner(residual, conditioned), norm
        for name, along in direction.items():
            along.mul_(norm / before).add_(conditioned[name])
    return solution

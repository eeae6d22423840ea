"""Exact Gauss-Newton products against matrices made by autograd, and conjugate gradients against dense solves."""

from __future__ import annotations

import models
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kfade
from kfade.batches import as_batches, split_holdout
from kfade.capture import deterministic_mode, trained
from kfade.layers import Layer, select
from kfade.linearise import Matrices, add_gauss_newton_products, conjugate_gradients, dot, gradient_matrices
from kfade.loss import Batch, Head, check_batches

CPU = torch.device("cpu")


def dense_gauss_newton(model: nn.Module, layers: list[Layer], batches: list[Batch], temperature: float) -> Tensor:
    """G over all entries `[d_out, d_in (+ 1)]` of all layers, from Jacobians of logits by autograd, float64."""
    sizes = {name: p for layer in layers for name, p in layer.parameters().items()}
    total: Tensor | float = 0.0
    for batch in batches:

        def logits(parameters: dict[str, Tensor], batch: Batch = batch) -> Tensor:
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention.long()}
            rows: Tensor = functional_call(model, parameters, (), {**inputs, "position_ids": batch.positions}).logits
            return rows[batch.loss_mask]

        detached = {name: p.detach() for name, p in sizes.items()}
        jacobian = jacrev(logits)(detached)
        columns = []
        for layer in layers:
            weight = jacobian[f"{layer.name}.weight"]
            weight = weight.transpose(-1, -2) if layer.transposed else weight
            if layer.has_bias:
                weight = torch.cat([weight, jacobian[f"{layer.name}.bias"].unsqueeze(-1)], dim=-1)
            columns.append(weight.flatten(2))
        j = torch.cat(columns, dim=-1)
        p = (logits(detached) / temperature).softmax(-1).detach()
        hessian = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / temperature**2
        total = total + torch.einsum("nvi,nvw,nwj->ij", j, hessian, j)
    assert isinstance(total, Tensor)
    return total / sum(len(batch.loss_index) for batch in batches)


def flat(matrices: dict[str, Tensor]) -> Tensor:
    return torch.cat([matrix.flatten() for matrix in matrices.values()])


def product_of(
    model: nn.Module, head: Head, layers: list[Layer], batches: list[Batch], matrices: Matrices, temperature: float
) -> Matrices:
    """`G v` over some batches, for v and the result `[d_out, d_in (+ 1)]` by layer name."""
    tokens = sum(len(batch.loss_index) for batch in batches)
    change = {name: part for layer in layers for name, part in layer.split(matrices[layer.name]).items()}
    with trained(model, [p for layer in layers for p in layer.parameters().values()]):
        add_gauss_newton_products(model, head, layers, batches, change, tokens, temperature)
        return gradient_matrices(layers, torch.float64)


@pytest.mark.parametrize("padding", models.PADDINGS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_products_are_those_of_the_matrix(kind: str, temperature: float, padding: str) -> None:
    torch.manual_seed(0)
    model = models.tiny(kind)
    batches = check_batches([models.batch(padding, seed=seed) for seed in (0, 1)], CPU)
    layers = select(model, r"layers\.1\.mlp\.down_proj|layers\.0\.self_attn\.v_proj|h\.1\.mlp\.c_proj")
    with deterministic_mode(model):
        head = Head(model, batches[0], {m for layer in layers for m in layer.modules})
        matrix = dense_gauss_newton(model, layers, batches, temperature)
        vector = {x.name: torch.randn(x.d_out, x.width_in, dtype=torch.float64) for x in layers}
        product = product_of(model, head, layers, batches, vector, temperature)
    expected = (matrix @ flat(vector)).detach()
    # transformers computes Llama's norms in float32, in whatever dtype the model is; GPT-2's are float64 here.
    limit = (1e-6 if kind == "llama" else 1e-11) * float(expected.abs().max())
    torch.testing.assert_close(flat(product), expected, rtol=0, atol=limit)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def system(order: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(order, order, generator=generator, dtype=torch.float64)
    right = torch.randn(order, 1, generator=generator, dtype=torch.float64)
    return root @ root.T + torch.eye(order, dtype=torch.float64), {"x": right}


def test_conjugate_gradients_end_at_the_solution() -> None:
    a, right = system(12)
    found = conjugate_gradients(lambda v: {"x": a @ v["x"]}, right, dict, 40, tolerance=1e-13)
    torch.testing.assert_close(found["x"], torch.linalg.solve(a, right["x"]), rtol=1e-8, atol=1e-10)


def test_iterates_get_closer_and_have_their_energy() -> None:
    a, right = system(30)
    diagonal = a.diagonal().unsqueeze(1)
    exact = torch.linalg.solve(a, right["x"])
    scale = diagonal.sqrt()
    values = torch.linalg.eigvalsh(a / scale / scale.T)
    root = float(values[-1] / values[0]) ** 0.5
    start = float(exact.T @ a @ exact)
    errors = [start]
    for iterations in (1, 3, 6, 12):
        x = conjugate_gradients(lambda v: {"x": a @ v["x"]}, right, lambda v: {"x": v["x"] / diagonal}, iterations)["x"]
        assert float(x.T @ a @ x) == pytest.approx(float(x.T @ right["x"]), rel=1e-9)
        errors.append(float((x - exact).T @ a @ (x - exact)))
        # The bound of Chebyshev polynomials, on the square of the error in A's norm.
        assert errors[-1] <= 4 * ((root - 1) / (root + 1)) ** (2 * iterations) * start
    assert errors == sorted(errors, reverse=True)


def test_no_curvature_ends_the_iteration() -> None:
    _, right = system(3)
    found = conjugate_gradients(lambda v: {"x": 0 * v["x"]}, right, dict, 5)
    assert not found["x"].any()
    assert dot(right, right) > 0


def test_a_step_by_conjugate_gradients_solves_the_exact_system() -> None:
    """With enough iterations d solves (G + λI) d = −g of the step's retain batch, whatever preconditions."""
    model = models.tiny("llama", mlp_bias=False)
    forget, retain = [models.batch("none")], [models.batch("right", sequences=5, seed=5)]
    changes = {"damping": 0.5, "kl_budget": None, "step_size": 1.0, "fit": kfade.FitConfig(modules="down_proj")}
    exact, few, direct = (
        kfade.unlearn(model, forget, retain, kfade.UnlearnConfig.published(cg_iterations=count, **changes))
        for count in (400, 1, 0)
    )
    flats = [torch.cat([x.flatten() for x in update.tensors.values()]) for update in (exact, few, direct)]
    # One iteration is the direct solution at another length.
    assert float(torch.cosine_similarity(flats[1], flats[2], dim=0)) == pytest.approx(1.0, abs=1e-10)
    assert float(torch.cosine_similarity(flats[0], flats[2], dim=0)) < 0.999
    fitted, _ = split_holdout(check_batches(retain, CPU), 0.2)
    curvature = kfade.fit(model, as_batches(fitted), kfade.FitConfig(modules="down_proj"))
    layers = select(model, "down_proj")
    matrix = dense_gauss_newton(model, layers, fitted, 1.0)
    damping = [torch.full((x.d_out * x.d_in,), curvature[x.name].damping(0.5, "relative")).double() for x in layers]
    (batch,) = check_batches(forget, CPU)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention.long()).logits[batch.loss_mask]
    nn.functional.cross_entropy(logits, batch.targets).backward()
    gradient = torch.cat([x.weight.grad.flatten() for x in layers])
    expected = torch.linalg.solve((matrix + torch.diag(torch.cat(damping))).detach(), gradient)
    # The iteration ends at a residual of 1e-6, in a system whose condition is some hundreds.
    assert float((flats[0] - expected).norm()) < 1e-4 * float(expected.norm())

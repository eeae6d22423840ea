"""`kron_solve` by Triton: each of the four products is one grouped launch over all problems.

The division by `Λ + λ` is the end of the second product, so Λ is read once and nothing but two
buffers of the size of v exists. Products of float32 are float32-grade, whatever PyTorch's TF32 setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .. import triton_support as support
from ..product.triton import Product, configure, multiply, operand
from .pytorch import few_tokens

# Below this width a product is a handful of tiles.
SMALLEST_WIDTH = 64


@dataclass
class _Stages:
    """Products by stage: those of one stage are independent, and the next stage needs them all."""

    form: list[Product] = field(default_factory=list)
    first: list[Product] = field(default_factory=list)
    second: list[Product] = field(default_factory=list)
    third: list[Product] = field(default_factory=list)
    fourth: list[Product] = field(default_factory=list)

    def add(
        self,
        v: Tensor,
        a: Tensor | None,
        q_out: Tensor,
        q_in: Tensor,
        values: Tensor,
        values_in: Tensor | None,
        damping: float,
    ) -> Tensor:
        """Plan one problem; returns the tensor that will hold its solution."""
        shape = v.shape if a is None else torch.Size((v.shape[1], a.shape[1]))
        # The first and the third product share one buffer, the second and the last the other.
        buffer, solution = (torch.empty(shape, dtype=torch.float32, device=v.device) for _ in range(2))
        left, right = operand(q_out), operand(q_in)
        if values_in is None:
            divide = partial(Product, finish="divide by a matrix", first=_row_major(values), damping=damping)
        else:
            pair = values.contiguous(), values_in.contiguous()
            divide = partial(Product, finish="divide by a pair", first=pair[0], second=pair[1], damping=damping)
        outs, divided = (list(x.view(-1, *shape[-2:])) for x in (buffer, solution))
        if a is None:
            gradients = [operand(x) for x in v.reshape(-1, *shape[-2:])]
        elif few_tokens(v.shape[0], *shape):
            g_rotated, a_rotated = (
                torch.empty(v.shape[0], width, dtype=torch.float32, device=v.device) for width in shape
            )
            self.form += [Product(operand(v), left, g_rotated), Product(operand(a), right, a_rotated)]
            self.second.append(divide(g_rotated.T, a_rotated, solution))
            gradients = []
        else:
            gradients = [torch.empty_like(solution)]
            self.form.append(Product(operand(v.T), operand(a), gradients[0]))
        # Few tokens came to the second stage by another way: they have no gradient here.
        for gradient, out, target in zip(gradients, outs, divided, strict=False):
            self.first.append(Product(left.T, gradient, out))
            self.second.append(divide(out, right, target))
        for out, target in zip(outs, divided, strict=True):
            self.third.append(Product(left, target, out))
            self.fourth.append(Product(out, right.T, target))
        return solution

    def run(self) -> None:
        for products in (self.form, self.first, self.second, self.third, self.fourth):
            multiply(products)


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def run(
    v: list[Tensor],
    a: list[Tensor | None],
    q_out: list[Tensor],
    q_in: list[Tensor],
    eigenvalues: list[Tensor],
    eigenvalues_in: list[Tensor | None],
    dampings: list[float],
) -> list[Tensor]:
    stages = _Stages()
    problems = zip(v, a, q_out, q_in, eigenvalues, eigenvalues_in, dampings, strict=True)
    solutions = [stages.add(*problem) for problem in problems]
    stages.run()
    return solutions


def refuses(v: list[Tensor], a: list[Tensor | None], q_out: list[Tensor], q_in: list[Tensor], *_: object) -> str | None:
    if not v:
        return "there are no problems"
    for i, (x, q_o) in enumerate(zip(v, q_out, strict=True)):
        reason = support.refusal("kron_solve", f"v[{i}]", x.device, (x.dtype, q_o.dtype))
        if reason is not None:
            return reason
    # Small problems are solved together with one that is not.
    smallest = [min(q_o.shape[0], q_i.shape[0]) for q_o, q_i in zip(q_out, q_in, strict=True)]
    if max(smallest) < SMALLEST_WIDTH and not support.interpreted():
        return f"v has a side of {max(smallest)}, below {SMALLEST_WIDTH}"
    return None


def configuration(v: list[Tensor], a: list[Tensor | None], q_out: list[Tensor], q_in: list[Tensor], *_: object) -> str:
    largest = max(range(len(v)), key=lambda i: q_out[i].shape[0] * q_in[i].shape[0])
    d_out, d_in = q_out[largest].shape[0], q_in[largest].shape[0]
    c = configure(v[0].device, torch.float32, torch.float32, max(d_out, d_in), d_out % 4 == d_in % 4 == 0)
    return f"four grouped launches for {len(v)} problems, tiles of {c}"

"""What is true, written down a second time: slow, in float64, and without the library's own formulas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# ---------------------------------------------------------------------------------------- comparing


def relative(value: Tensor, truth: Tensor) -> float:
    """Frobenius distance from the truth, relative to it (absolute where the truth is zero)."""
    value, truth = value.double(), truth.double()
    assert value.shape == truth.shape, f"{list(value.shape)} is not {list(truth.shape)}"
    return float(torch.linalg.norm(value - truth) / (torch.linalg.norm(truth) or 1.0))


def assert_close(value: Tensor, truth: Tensor, tolerance: float, what: str = "") -> None:
    error = relative(value, truth)
    assert error <= tolerance, f"{what}: relative error {error:.2e} is above {tolerance:.2e}"


def assert_as_accurate(value: Tensor, plain: Tensor, truth: Tensor, times: float = 4.0) -> None:
    """`value` may be off by a few times what the plain PyTorch expression `plain` is off by.

    Where the plain expression happens to be exact, four roundings of the dtype of `value` remain. The
    truth is float64 itself, so a float64 result is held to 1e-13.
    """
    floor = 1e-13 if value.dtype == torch.float64 else 4 * torch.finfo(value.dtype).eps
    allowed = times * relative(plain, truth) + floor
    assert_close(value, truth, allowed, "against float64")


# ------------------------------------------------------------------------- the operations, in float64


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(*x.shape[:-1], 1, dtype=x.dtype)], -1)


def outer_sum(
    x: Tensor, mask: Tensor | None = None, *, ones: bool = False, dtype: torch.dtype = torch.float64
) -> Tensor:
    """`xᵀ diag(mask) x` of rows with any leading dimensions."""
    x = (x.reshape(-1, x.shape[-1]) if mask is None else x[mask.bool()]).to(dtype)
    x = with_ones(x) if ones else x
    return x.T @ x


def squared_gradients(
    g: Tensor,
    a: Tensor,
    q_out: Tensor | None,
    q_in: Tensor | None,
    mask: Tensor | None = None,
    *,
    ones: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`Σ_b (Q_outᵀ G_b Q_in)∘²`, a sequence at a time."""
    width = a.shape[2] + int(ones)
    total = torch.zeros(g.shape[2], width, dtype=dtype)
    for b in range(g.shape[0]):
        keep = slice(None) if mask is None else mask[b].bool()
        rows = a[b][keep].to(dtype)
        gradient = g[b][keep].to(dtype).T @ (with_ones(rows) if ones else rows)
        gradient = gradient if q_out is None else q_out.to(dtype).T @ gradient
        gradient = gradient if q_in is None else gradient @ q_in.to(dtype)
        total += gradient**2
    return total


def dense_solve(v: Tensor, q_out: Tensor, q_in: Tensor, spectrum: Tensor, damping: float) -> Tensor:
    """`(F + λI)⁻¹ vec(v)` with F written out as one dense matrix."""
    q = torch.kron(q_out.double(), q_in.double())
    matrix = q @ torch.diag(spectrum.double().reshape(-1)) @ q.T
    matrix += damping * torch.eye(matrix.shape[0], dtype=torch.float64)
    return torch.linalg.solve(matrix, v.double().reshape(-1)).reshape(v.shape)


def orthogonal(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0].to(dtype)


class Sizes(TorchDispatchMode):
    """Records the operators that run, and the elements of the largest tensor that one of them returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.calls: list[tuple[str, tuple[torch.Size, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        shapes = tuple(r.shape for r in results if isinstance(r, Tensor))
        self.calls.append((func.__name__, shapes))
        self.largest = max([self.largest, *(shape.numel() for shape in shapes)])
        return result

    def shapes_of(self, *names: str) -> list[torch.Size]:
        """Shapes of the results of the operators of these names."""
        return [shape for name, shapes in self.calls if name.split(".")[0] in names for shape in shapes]


# -------------------------------------------------------------------------------- models, by autograd


@dataclass
class Truth:
    """What autograd says about one layer.

    Attributes:
        a_sum: `Σ a aᵀ` over tokens that are not padding, and their number.
        s_sum: `Σ g gᵀ` over the same tokens.
        gradients: one `[d_out, d_in (+ 1)]` a sequence, the bias last.
    """

    a_sum: Tensor | float = 0.0
    s_sum: Tensor | float = 0.0
    positions: int = 0
    gradients: list[Tensor] = field(default_factory=list)

    def corrected(self, q_out: Tensor, q_in: Tensor) -> Tensor:
        """`Σ_n (Q_outᵀ G_n Q_in)∘²`."""
        return sum((q_out.T @ g @ q_in) ** 2 for g in self.gradients)  # type: ignore[return-value]

    def fisher(self, losses: int) -> Tensor:
        """The exact block `Σ_n vec(G_n) vec(G_n)ᵀ / T`, row-major."""
        rows = torch.stack([g.reshape(-1) for g in self.gradients])
        return rows.T @ rows / losses


def is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def weight_gradient(module: nn.Module) -> Tensor:
    """The gradient of a module's parameters as `[d_out, d_in (+ 1)]`."""
    weight, bias = module.weight, getattr(module, "bias", None)
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    gradient = gradient.T if is_transposed(module) else gradient
    return gradient.clone() if bias is None else torch.cat([gradient, bias.grad.unsqueeze(1)], 1)


@contextmanager
def _recorded(modules: Mapping[str, Sequence[nn.Module]]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Inputs and outputs (which keep their gradients) of every call of these modules."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
    handles = []
    for name, members in modules.items():
        for module in members:

            def hook(_m: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                output.retain_grad()
                calls[name].append((args[0].detach(), output))

            handles.append(module.register_forward_hook(hook))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def autograd_truth(
    model: nn.Module,
    layers: Sequence[str] | Mapping[str, Sequence[str]],
    batches: Sequence[Mapping[str, Tensor]],
    labels: Sequence[Tensor] | None = None,
) -> dict[str, Truth]:
    """Run every sequence alone and without its padding, and differentiate its summed loss.

    Args:
        model: causal language model; it is put into evaluation mode.
        layers: names of modules; or for each name the names of all modules that share its weight.
        batches: as `kfade.fit` takes them.
        labels: one `[B, T]` a batch in the place of the batches' own (e.g. sampled ones).
    """
    model.eval()
    members = layers if isinstance(layers, Mapping) else {name: [name] for name in layers}
    modules = {name: [model.get_submodule(n) for n in names] for name, names in members.items()}
    truths = {name: Truth() for name in modules}
    for number, batch in enumerate(batches):
        targets = batch["labels"] if labels is None else labels[number]
        for n in range(targets.shape[0]):
            kept = batch["attention_mask"][n].bool()
            ids, wanted = batch["input_ids"][n][kept], targets[n][kept][1:]
            model.zero_grad()
            with _recorded(modules) as calls:
                logits = model(input_ids=ids.unsqueeze(0), attention_mask=torch.ones_like(ids).unsqueeze(0)).logits
                nn.functional.cross_entropy(logits[0, :-1], wanted, reduction="sum", ignore_index=-100).backward()
            for name, truth in truths.items():
                first = modules[name][0]
                for a, output in calls[name]:
                    biased = getattr(first, "bias", None) is not None
                    truth.a_sum = truth.a_sum + outer_sum(a, ones=biased)
                    truth.s_sum = truth.s_sum + (0 if output.grad is None else outer_sum(output.grad))
                    truth.positions += a.shape[:-1].numel()
                truth.gradients.append(weight_gradient(first))
    model.zero_grad(set_to_none=True)
    return truths

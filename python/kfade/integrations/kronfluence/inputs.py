"""Inputs of consecutive modules that are fed one tensor: copied, added up or rotated once for all of them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from kfade_kernels import PackedSymmetric, rotate, syrk_
from kfade_kernels.rotation import rotates_tokens
from torch import Tensor


def accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Sums are float32, or float64 where that is asked for."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class _SharedSum(PackedSymmetric):
    """An input covariance, of one module or of several that have been fed the same tensors so far.

    Attributes:
        owners: the modules it was made for; one of them owns it while its storage holds it.
    """

    __slots__ = ("owners",)

    owners: list[Any]


@dataclass
class _Pending:
    """An input that is not in any sum yet, since the next module may be fed the same one.

    Attributes:
        source: the tensor itself, compared by identity and version.
        version: of `source`, which may be changed in place.
        rows: its copy `[N, d_in]`.
        attention: the modules' attention mask, as kronfluence set it.
        mask: 0/1 `[N]`, or None.
        ones: the modules have a bias.
        modules: those that were fed it.
    """

    source: Tensor
    version: int
    rows: Tensor
    attention: Tensor | None
    mask: Tensor | None
    ones: bool
    modules: list[Any]


class InputSums:
    """Adds inputs to covariances: once for consecutive modules that are fed the same tensor.

    Such modules share a sum from their first batch on. A module that is one day fed something else gets
    a sum of its own, which is why an input is added only when the next one, or a gradient, arrives.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pending: _Pending | None = None

    def see(self, module: Any, x: Tensor, mask: Tensor | None) -> None:
        """Note input `x [..., d_in]`, whose rows the 0/1 `mask [N]` keeps."""
        pending, ones = self._pending, module.bias is not None
        if (
            pending is not None
            and pending.source is x
            and pending.version == x._version
            and pending.attention is module.attention_mask
            and pending.ones == ones
            and module not in pending.modules
        ):
            pending.modules.append(module)
            return
        self.flush()
        # A copy: until it is added, the model may change its activations in place.
        rows = x.detach().to(module.factor_args.activation_covariance_dtype, copy=True).reshape(-1, x.shape[-1])
        self._pending = _Pending(x, x._version, rows, module.attention_mask, mask, ones, [module])

    def flush(self) -> None:
        """Add what is pending."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        by_sum: dict[int, list[Any]] = {}
        for module in pending.modules:
            by_sum.setdefault(id(module.storage[self._name]), []).append(module)
        for members in by_sum.values():
            total = self._sum_of(members, pending)
            for module in members:
                module.storage[self._name] = total
            syrk_(total, pending.rows, pending.mask, ones_column=pending.ones)

    def _sum_of(self, members: list[Any], pending: _Pending) -> _SharedSum:
        """The sum of these modules and of no other."""
        total: Any = members[0].storage[self._name]
        if total is None:
            rows = pending.rows
            dtype = accumulator_dtype(rows.dtype)
            total = _SharedSum(rows.shape[1] + int(pending.ones), device=rows.device, dtype=dtype)
        elif any(m.storage[self._name] is total for m in total.owners if m not in members):
            total = _SharedSum.from_packed(total.data.clone(), total.n)
        total.owners = members
        return total  # type: ignore[no-any-return]

    def clear(self) -> None:
        """Forget what is pending."""
        self._pending = None


@dataclass
class _Held:
    """An input that waits for the gradient of its module's output.

    Attributes:
        source: the tensor it was made of.
        version: of that.
        key: dtype and bias of the modules it can serve.
        rows: `[B, T, d_in]`, a copy; or rotated, `[B, T, d_in (+ 1)]`.
        basis: what it was rotated by, or None.
    """

    source: weakref.ref[Tensor]
    version: int
    key: tuple[torch.dtype, bool]
    rows: Tensor
    basis: Tensor | None


class HeldInputs:
    """Holds inputs for the Λ stage: one copy, rotated once, for consecutive modules that are fed one tensor."""

    def __init__(self, eigenvectors: str) -> None:
        self._name = eigenvectors
        self._last: _Held | None = None

    def hold(self, module: Any, x: Tensor, *, rotated: bool) -> _Held:
        """Keep `x [B, ..., d_in]` as rows of sequences; `rotated` says that there is a basis and it may be used."""
        arguments, ones = module.factor_args, module.bias is not None
        key = arguments.per_sample_gradient_dtype, ones
        last = self._last
        if last is not None and last.source() is x and last.version == x._version and last.key == key:
            if last.basis is None:
                return last
            if rotated and self._same_basis(module, last.basis):
                return last
        rows, basis = sequences(x.detach().to(key[0])), None
        if rotated and rotates_tokens(rows.shape[1], module.weight.shape[0]):
            basis = module.storage[self._name]
            rows = rotate(rows, basis, ones_column=ones)
        elif rows.data_ptr() == x.data_ptr():
            # The model may change its activations in place.
            rows = rows.clone()
        if arguments.offload_activations_to_cpu:
            rows = rows.cpu()
        self._last = _Held(weakref.ref(x), x._version, key, rows, basis)
        return self._last

    def _same_basis(self, module: Any, basis: Tensor) -> bool:
        """Whether the module's eigenvectors are these; equal ones are from now on the same tensor."""
        own = module.storage[self._name]
        if own is not basis and own.dtype == basis.dtype and torch.equal(own, basis):
            module.storage[self._name] = own = basis
        return own is basis

    def clear(self) -> None:
        """Forget the last input: nothing shares it any more."""
        self._last = None


def sequences(x: Tensor) -> Tensor:
    """`x [B, d]` or `[B, ..., d]` as `[B, T, d]`."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


class Masks:
    """Row masks of kronfluence's attention masks; the last one is kept, since all modules have the same."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Tensor | None, Tensor] | None = None

    def __call__(self, attention: Tensor) -> tuple[Tensor | None, Tensor]:
        """The mask as a flat boolean tensor, or None where its values are not all 0 and 1; and its sum."""
        last = self._last
        if last is None or last[0] is not attention or last[1] != attention._version:
            flat = attention.reshape(-1)
            keep = flat != 0
            binary = attention.dtype == torch.bool or bool((flat == keep).all())
            self._last = last = (attention, attention._version, keep if binary else None, attention.sum())
        return last[2:]

    def clear(self) -> None:
        """Forget the last mask."""
        self._last = None

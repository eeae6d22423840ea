"""kronfluence on kfade's operations: `accelerate()`, after which an unchanged script runs on them.

| stage | what is replaced in kronfluence 1.0.1 | what runs there |
|---|---|---|
| covariances | hooks of `CovarianceTracker` | `syrk_` into packed sums, an input that modules share once |
| eigenvectors | `perform_eigendecomposition` | `kfade.decomposition.decompose`, a shared input once |
| Λ | hooks of `LambdaTracker` | `eigenvalue_correction_`, tokens rotated, no per-sample gradients |
| scores | `precondition_gradient` | its own products; factors stay on the GPU while there is room |

Between the stages there are kronfluence's own tensors, in its dtypes, its normalisation and its files: sums,
with the counts that divide them beside; Λ is divided by the number of sequences.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from kfade_kernels import PackedSymmetric, bf16_pair, eigenvalue_correction_, rotate, syrk_
from kfade_kernels.rotation import rotates_tokens
from torch import Tensor

from ..decomposition import decompose
from . import UnsupportedPeerError

SUPPORTED_VERSION = "1.0.1"

# What is replaced or relied upon, with the start of the SHA-256 of its source in the supported version.
_SOURCES = {
    "factor.covariance:fit_covariance_matrices_with_loader": "4cf67029a4d5",
    "factor.eigen:fit_lambda_matrices_with_loader": "c0ddb6866753",
    "factor.eigen:perform_eigendecomposition": "df10f8a66f60",
    "computer.factor_computer:perform_eigendecomposition": "df10f8a66f60",
    "factor.config:Kfac": "4c0f1cdf05cb",
    "factor.config:Kfac.precondition_gradient": "9fed86a40929",
    "factor.config:Ekfac": "de552aad56bd",
    "factor.config:Ekfac.precondition_gradient": "9fed86a40929",
    "module.linear:TrackedLinear": "7c5fbbb9a052",
    "module.tracked_module:TrackedModule": "ed72c5876ec2",
    "module.tracked_module:TrackedModule.get_factor": "d6fb969596b5",
    "module.tracker.base:BaseTracker": "0022a92dc0d6",
    "module.tracker.factor:CovarianceTracker": "0bcf9c52819e",
    "module.tracker.factor:CovarianceTracker.register_hooks": "babed713ea28",
    "module.tracker.factor:CovarianceTracker.release_memory": "945de9ca9e24",
    "module.tracker.factor:CovarianceTracker.synchronize": "19bdfdbd97e7",
    "module.tracker.factor:LambdaTracker": "223b1f6f1b6d",
    "module.tracker.factor:LambdaTracker.finalize_iteration": "9a8e57a93ba5",
    "module.tracker.factor:LambdaTracker.register_hooks": "afb85eb3de61",
    "module.tracker.factor:LambdaTracker.release_memory": "68b6910c6699",
    "module.tracker.precondition:PreconditionTracker": "e94e745e0b15",
    "module.tracker.precondition:PreconditionTracker.release_memory": "c0bb69f7a54f",
    "module.utils:load_factors": "66742e8a9797",
    "module.utils:set_factors": "3a5449a3307b",
    "module.utils:set_mode": "dd096e4f12cb",
}

_active: Acceleration | None = None


class Acceleration:
    """kronfluence as `accelerate` left it, until `undo`; a context manager that undoes at its end."""

    def __init__(self, replaced: list[tuple[Any, str, Any]]) -> None:
        self._replaced = replaced

    @property
    def active(self) -> bool:
        """Whether kronfluence runs on kfade's operations."""
        return bool(self._replaced)

    def undo(self) -> None:
        """Give kronfluence its own code back; does nothing the second time. Not while a stage is running."""
        global _active  # noqa: PLW0603
        while self._replaced:
            owner, name, original = self._replaced.pop()
            setattr(owner, name, original)
        if _active is self:
            _active = None

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def accelerate() -> Acceleration:
    """Let kronfluence fit factors and compute scores on kfade's operations, in this process, from now on.

    Called again while that is so, it returns the same object.

    Returns:
        What takes it back: `.undo()`, or the end of a `with` block.

    Raises:
        UnsupportedPeerError: kronfluence is not installed, has another version than `SUPPORTED_VERSION`, or
            a function that would be replaced or relied upon is not that version's. Nothing is replaced then.
    """
    global _active  # noqa: PLW0603
    if _active is None:
        _refuse_unsupported()
        replaced: list[tuple[Any, str, Any]] = []
        for place, replacement in _replacements(_Notices()).items():
            owner, name = _find(place)
            replaced.append((owner, name, getattr(owner, name)))
            setattr(owner, name, replacement)
        _active = Acceleration(replaced)
    return _active


# ------------------------------------------------------------------------------------- what is supported


def _find(place: str) -> tuple[Any, str]:
    """The object that has the attribute `module:path.to.attribute` of kronfluence, and the attribute's name."""
    module, _, path = place.partition(":")
    owner: Any = import_module(f"kronfluence.{module}")
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def _digest(place: str) -> str:
    """The start of the SHA-256 of its source, or of nothing where it is not there or cannot be read."""
    try:
        owner, name = _find(place)
        source = inspect.getsource(inspect.unwrap(getattr(owner, name)))
    except (ImportError, AttributeError, OSError, TypeError):
        source = ""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _refuse_unsupported() -> None:
    supported = f"kfade accelerates kronfluence {SUPPORTED_VERSION} as it is on PyPI"
    try:
        version = import_module("kronfluence").__version__
    except ImportError as error:
        raise UnsupportedPeerError(f"kronfluence cannot be imported ({error}); {supported}") from error
    if version != SUPPORTED_VERSION:
        raise UnsupportedPeerError(f"kronfluence has version {version}; {supported}")
    changed = [place for place, digest in _SOURCES.items() if _digest(place) != digest]
    if changed:
        raise UnsupportedPeerError(
            f"kronfluence {version} has other internals than expected: {', '.join(changed)} changed"
            f" (a fork, or patched by something else?); {supported}"
        )


class _Notices:
    """Says once for each reason that kronfluence's own code runs."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, what: str, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"kronfluence's own code runs for {what}: {reason}", stacklevel=3)


# ------------------------------------------------------------------------------------------ shared inputs


def _accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
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


class _InputSums:
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
            dtype = _accumulator_dtype(rows.dtype)
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


class _HeldInputs:
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
        rows, basis = _sequences(x.detach().to(key[0])), None
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


def _sequences(x: Tensor) -> Tensor:
    """`x [B, d]` or `[B, ..., d]` as `[B, T, d]`."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


class _Masks:
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


# ------------------------------------------------------------------------------------------- replacements


def _replacements(notice: _Notices) -> dict[str, Callable[..., Any]]:
    """The new functions, by the place of what they replace."""
    decomposition = _decomposition(notice)
    return {
        **_covariance_stage(),
        "factor.eigen:perform_eigendecomposition": decomposition,
        "computer.factor_computer:perform_eigendecomposition": decomposition,
        **_lambda_stage(notice),
        **_score_stage(),
    }


def _names() -> Any:
    return import_module("kronfluence.utils.constants")


def _covariance_stage() -> dict[str, Callable[..., Any]]:
    names, linear = _names(), import_module("kronfluence.module.linear")
    tracked = import_module("kronfluence.module.tracked_module")
    trackers = import_module("kronfluence.module.tracker.factor")
    inputs, gradients = names.ACTIVATION_COVARIANCE_MATRIX_NAME, names.GRADIENT_COVARIANCE_MATRIX_NAME
    sums, masks = _InputSums(inputs), _Masks()
    original = SimpleNamespace(
        get_factor=tracked.TrackedModule.get_factor,
        synchronize=trackers.CovarianceTracker.synchronize,
        release_memory=trackers.CovarianceTracker.release_memory,
    )

    def count(module: Any, name: str, rows: Tensor | int) -> None:
        if module.storage[name] is None:
            device = rows.device if isinstance(rows, Tensor) else None
            module.storage[name] = torch.zeros(1, dtype=torch.int64, device=device)
        module.storage[name].add_(rows)

    def add(module: Any, name: str, rows: Tensor, alpha: float = 1.0) -> None:
        if module.storage[name] is None:
            dtype = _accumulator_dtype(rows.dtype)
            module.storage[name] = PackedSymmetric(rows.shape[1], device=rows.device, dtype=dtype)
        syrk_(module.storage[name], rows, alpha=alpha)

    def add_input(module: Any, x: Tensor) -> None:
        number: Tensor | int = x.shape[:-1].numel()
        mask: Tensor | None = None
        binary = True
        if module.attention_mask is not None and module.attention_mask.numel() == number:
            mask, number = masks(module.attention_mask)
            binary = mask is not None
        if binary and type(module) is linear.TrackedLinear:
            sums.see(module, x, mask)
        else:
            # A convolution, a module of the user's, or a mask with weights: kronfluence makes the rows.
            masked = module.attention_mask is not None
            x = x.detach().to(module.factor_args.activation_covariance_dtype, copy=masked)
            rows, number = module.get_flattened_activation(input_activation=x)
            sums.flush()
            add(module, inputs, rows)
        count(module, names.NUM_ACTIVATION_COVARIANCE_PROCESSED, number)

    def register_hooks(self: Any) -> None:
        module = self.module

        @torch.no_grad()
        def forward_hook(_module: Any, args: tuple[Any, ...], outputs: Tensor) -> None:
            add_input(module, args[0])
            self.cached_hooks.append(outputs.register_hook(backward_hook))

        @torch.no_grad()
        def backward_hook(gradient: Tensor) -> None:
            self.cached_hooks.pop().remove()
            sums.flush()
            gradient = gradient.detach().to(module.factor_args.gradient_covariance_dtype)
            rows, number = module.get_flattened_gradient(output_gradient=gradient)
            add(module, gradients, rows, float(module.gradient_scale) ** 2)
            count(module, names.NUM_GRADIENT_COVARIANCE_PROCESSED, number)

        self.registered_hooks.append(module.register_forward_hook(forward_hook))

    def get_factor(self: Any, factor_name: str) -> Any:
        if factor_name == inputs:
            sums.flush()
        factor = original.get_factor(self, factor_name)
        arguments = self.factor_args
        if isinstance(factor, PackedSymmetric):
            asked = "activation_covariance_dtype" if factor_name == inputs else "gradient_covariance_dtype"
            return factor.to_dense().to(getattr(arguments, asked))
        if factor_name == names.LAMBDA_MATRIX_NAME and self.current_mode == tracked.ModuleMode.LAMBDA:
            return None if factor is None else factor.to(arguments.lambda_dtype)
        return factor

    def synchronize(self: Any, num_processes: int) -> None:
        for name in (inputs, gradients):
            self.module.storage[name] = self.module.get_factor(factor_name=name)
        original.synchronize(self, num_processes=num_processes)

    def release_memory(self: Any) -> None:
        sums.clear()
        masks.clear()
        original.release_memory(self)

    return {
        "module.tracked_module:TrackedModule.get_factor": get_factor,
        "module.tracker.factor:CovarianceTracker.register_hooks": register_hooks,
        "module.tracker.factor:CovarianceTracker.release_memory": release_memory,
        "module.tracker.factor:CovarianceTracker.synchronize": synchronize,
    }


def _decomposition(notice: _Notices) -> Callable[..., Any]:
    names, eigen = _names(), import_module("kronfluence.factor.eigen")
    original = eigen.perform_eigendecomposition
    sides = (
        (
            names.ACTIVATION_COVARIANCE_MATRIX_NAME, names.NUM_ACTIVATION_COVARIANCE_PROCESSED,
            names.ACTIVATION_EIGENVALUES_NAME, names.ACTIVATION_EIGENVECTORS_NAME,
        ),
        (
            names.GRADIENT_COVARIANCE_MATRIX_NAME, names.NUM_GRADIENT_COVARIANCE_PROCESSED,
            names.GRADIENT_EIGENVALUES_NAME, names.GRADIENT_EIGENVECTORS_NAME,
        ),
    )  # fmt: skip

    def eigenpairs(covariance: Tensor, number: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dense = covariance.to(device, dtype)
        # A matrix that kronfluence summed is symmetric up to rounding only.
        packed = PackedSymmetric.from_dense((dense + dense.T).mul_(0.5))
        del dense
        try:
            pairs = decompose(packed, number)
        except torch.OutOfMemoryError:
            eigen.release_memory()
            pairs = decompose(packed, number)
        values, vectors = (x.to("cpu", covariance.dtype) for x in pairs)
        return values, vectors

    @torch.no_grad()
    def perform_eigendecomposition(
        covariance_factors: dict[str, dict[str, Tensor]],
        model: Any,
        state: Any,
        factor_args: Any,
        disable_tqdm: bool = False,
    ) -> dict[str, dict[str, Tensor]]:
        dtype = factor_args.eigendecomposition_dtype
        if dtype not in (torch.float32, torch.float64):
            notice("eigendecompositions", f"eigendecomposition_dtype is {dtype}, not torch.float32 or torch.float64")
            return original(covariance_factors, model, state, factor_args, disable_tqdm)  # type: ignore[no-any-return]
        factors: dict[str, dict[str, Tensor]] = {name: {} for name in names.EIGENDECOMPOSITION_FACTOR_NAMES}
        modules = eigen.get_tracked_module_names(model=model)
        # Modules that share their input follow each other.
        last: dict[str, tuple[Tensor, int, str]] = {}
        bar = eigen.tqdm(
            total=len(modules),
            desc="Performing Eigendecomposition",
            bar_format=eigen.TQDM_BAR_FORMAT,
            disable=not state.is_main_process or disable_tqdm,
        )
        with bar as progress:
            for module in modules:
                for covariances, counts, eigenvalues, eigenvectors in sides:
                    covariance = covariance_factors[covariances][module]
                    number = int(covariance_factors[counts][module])
                    before = last.get(covariances)
                    if (
                        before is not None
                        and before[1] == number
                        and before[0].dtype == covariance.dtype
                        and torch.equal(before[0], covariance)
                    ):
                        # A copy: a safetensors file cannot hold one tensor under two names.
                        values, vectors = (factors[x][before[2]].clone() for x in (eigenvalues, eigenvectors))
                    else:
                        values, vectors = eigenpairs(covariance, number, state.device, dtype)
                    last[covariances] = covariance, number, module
                    factors[eigenvalues][module], factors[eigenvectors][module] = values, vectors
                progress.update(1)
        return factors

    return perform_eigendecomposition


def _takes_pairs(device: torch.device) -> bool:
    """Whether bfloat16 rows are rotated by a bfloat16 pair of eigenvectors.

    A CPU without the units for it is a hundred times slower at that, and one with them gains nothing over a
    single float32 product.
    """
    return device.type == "cuda"


def _lambda_stage(notice: _Notices) -> dict[str, Callable[..., Any]]:
    names, linear = _names(), import_module("kronfluence.module.linear")
    config, exceptions = import_module("kronfluence.factor.config"), import_module("kronfluence.utils.exceptions")
    trackers = import_module("kronfluence.module.tracker.factor")
    original = SimpleNamespace(
        register_hooks=trackers.LambdaTracker.register_hooks,
        finalize_iteration=trackers.LambdaTracker.finalize_iteration,
        release_memory=trackers.LambdaTracker.release_memory,
    )
    held_inputs = _HeldInputs(names.ACTIVATION_EIGENVECTORS_NAME)
    bases = names.GRADIENT_EIGENVECTORS_NAME, names.ACTIVATION_EIGENVECTORS_NAME

    def state_dtype(arguments: Any) -> torch.dtype:
        return _accumulator_dtype(arguments.lambda_dtype, arguments.per_sample_gradient_dtype)

    def prepare_bases(module: Any, device: torch.device) -> bool:
        """Put the eigenvectors on the device as the kernels take them; False where the strategy has none."""
        arguments = module.factor_args
        if not config.FactorConfig.CONFIGS[arguments.strategy].requires_eigendecomposition_for_lambda:
            return False
        if any(module.storage[name] is None for name in names.EIGENDECOMPOSITION_FACTOR_NAMES):
            raise exceptions.FactorsNotFoundError(
                f"The strategy {arguments.strategy} needs the eigendecomposition of module {module.name} for its Lambda"
                " matrix, and it is not there."
            )
        dtype = state_dtype(arguments)
        narrow = arguments.per_sample_gradient_dtype == torch.bfloat16 and dtype == torch.float32
        as_pair = narrow and _takes_pairs(device)
        for name in bases:
            q = module.storage[name]
            if q.ndim == 2:
                q = q.to(device, dtype)
                module.storage[name] = bf16_pair(q) if as_pair else q
        return True

    def add(module: Any, g: Tensor, a: Tensor, *, a_is_rotated: bool) -> None:
        """Add sequences `g [B, T, d_out]`, `a [B, T, d_in]` to Λ."""
        storage, arguments = module.storage, module.factor_args
        has_bases = prepare_bases(module, g.device)
        q_out, q_in = (storage[name] if has_bases else None for name in bases)
        ones = module.bias is not None
        if storage[names.NUM_LAMBDA_PROCESSED] is None:
            storage[names.NUM_LAMBDA_PROCESSED] = torch.zeros(1, dtype=torch.int64)
            storage[names.LAMBDA_MATRIX_NAME] = torch.zeros(
                module.weight.shape[0],
                module.weight.shape[1] + int(ones),
                dtype=state_dtype(arguments),
                device=g.device,
            )
        if module.gradient_scale != 1.0:
            g = g.to(state_dtype(arguments)) * module.gradient_scale
        a = a.to(g.device)
        if a_is_rotated:
            q_in, ones = None, False
        eigenvalue_correction_(storage[names.LAMBDA_MATRIX_NAME], g, a, q_out, q_in, ones_column=ones)
        storage[names.NUM_LAMBDA_PROCESSED].add_(g.shape[0])

    def register_hooks(self: Any) -> None:
        module = self.module
        reason = _not_accelerated(module, linear.TrackedLinear)
        if reason is not None:
            notice(f"the Lambda matrix of module {module.name} and of any like it", reason)
            original.register_hooks(self)
            return

        @torch.no_grad()
        def forward_hook(_module: Any, args: tuple[Any, ...], outputs: Tensor) -> None:
            has_bases = prepare_bases(module, args[0].device)
            if module.factor_args.has_shared_parameters:
                # Calls are laid end to end when all gradients are there, so none is rotated before.
                held = held_inputs.hold(module, args[0], rotated=False)
                self.cached_activations = [*(self.cached_activations or []), held]
            else:
                self.cached_activations = held_inputs.hold(module, args[0], rotated=has_bases)
            self.cached_hooks.append(outputs.register_hook(backward_hook))

        @torch.no_grad()
        def backward_hook(gradient: Tensor) -> None:
            if self.cached_activations is None:
                self._raise_cache_not_found_exception()
            held_inputs.clear()
            g = _sequences(gradient.detach().to(module.factor_args.per_sample_gradient_dtype))
            if module.factor_args.has_shared_parameters:
                self.cached_hooks.pop().remove()
                pairs = self.cached_per_sample_gradient or []
                self.cached_per_sample_gradient = [*pairs, (g, self.cached_activations.pop().rows)]
                return
            held = self.cached_activations
            self.clear_all_cache()
            add(module, g, held.rows, a_is_rotated=held.basis is not None)

        self.registered_hooks.append(module.register_forward_hook(forward_hook))

    @torch.no_grad()
    def finalize_iteration(self: Any) -> None:
        pairs = self.cached_per_sample_gradient
        if not isinstance(pairs, list):
            original.finalize_iteration(self)
            return
        g, a = (torch.cat(side, dim=1) for side in zip(*pairs, strict=True))
        self.clear_all_cache()
        add(self.module, g, a, a_is_rotated=False)

    def release_memory(self: Any) -> None:
        held_inputs.clear()
        original.release_memory(self)

    return {
        "module.tracker.factor:LambdaTracker.register_hooks": register_hooks,
        "module.tracker.factor:LambdaTracker.finalize_iteration": finalize_iteration,
        "module.tracker.factor:LambdaTracker.release_memory": release_memory,
    }


def _not_accelerated(module: Any, linear: Any) -> str | None:
    """Why kronfluence's own code must compute the module's Λ, or None."""
    if type(module) is not linear:
        return f"{type(module).__name__} is not kronfluence's own TrackedLinear"
    if module.per_sample_gradient_process_fnc is not None:
        return "the task post-processes per-sample gradients, so they are needed"
    return None


def _has_room(factor: Tensor, device: torch.device) -> bool:
    """Whether half of a GPU's memory stays free with a copy of `factor` on it."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free - factor.nbytes > total // 2


def _score_stage() -> dict[str, Callable[..., Any]]:
    names, config = _names(), import_module("kronfluence.factor.config")
    trackers = import_module("kronfluence.module.tracker.precondition")
    release = trackers.PreconditionTracker.release_memory
    resident = names.ACTIVATION_EIGENVECTORS_NAME, names.GRADIENT_EIGENVECTORS_NAME, names.LAMBDA_MATRIX_NAME

    def resident_first(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @torch.no_grad()
        def precondition_gradient(self: Any, gradient: Tensor, storage: dict[str, Any]) -> Tensor:
            for name in resident:
                factor = storage[name]
                if factor.device != gradient.device and _has_room(factor, gradient.device):
                    storage[name] = factor.to(gradient.device)
            return original(self, gradient=gradient, storage=storage)

        return precondition_gradient

    def release_memory(self: Any) -> None:
        release(self)
        # Each stage is given its factors after this; what the last one left may lie on a GPU.
        for name in names.EIGENDECOMPOSITION_FACTOR_NAMES:
            self.module.storage[name] = None

    return {
        "factor.config:Kfac.precondition_gradient": resident_first(config.Kfac.precondition_gradient),
        "factor.config:Ekfac.precondition_gradient": resident_first(config.Ekfac.precondition_gradient),
        "module.tracker.precondition:PreconditionTracker.release_memory": release_memory,
    }

"""What of kronfluence is replaced or relied upon, and whether it is there as it was when that was written."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from importlib import import_module
from typing import Any

from .. import UnsupportedPeerError

SUPPORTED_VERSION = "1.0.1"

# What is replaced or relied upon, with the start of the SHA-256 of its source in the supported version.
SOURCES = {
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


def find(place: str) -> tuple[Any, str]:
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
        owner, name = find(place)
        source = inspect.getsource(inspect.unwrap(getattr(owner, name)))
    except (ImportError, AttributeError, OSError, TypeError):
        source = ""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def refuse_unsupported() -> None:
    supported = f"kfade accelerates kronfluence {SUPPORTED_VERSION} as it is on PyPI"
    try:
        version = import_module("kronfluence").__version__
    except ImportError as error:
        raise UnsupportedPeerError(f"kronfluence cannot be imported ({error}); {supported}") from error
    if version != SUPPORTED_VERSION:
        raise UnsupportedPeerError(f"kronfluence has version {version}; {supported}")
    changed = [place for place, digest in SOURCES.items() if _digest(place) != digest]
    if changed:
        raise UnsupportedPeerError(
            f"kronfluence {version} has other internals than expected: {', '.join(changed)} changed"
            f" (a fork, or patched by something else?); {supported}"
        )


class Notices:
    """Says once for each reason that kronfluence's own code runs."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, what: str, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"kronfluence's own code runs for {what}: {reason}", stacklevel=3)


def constants() -> Any:
    return import_module("kronfluence.utils.constants")

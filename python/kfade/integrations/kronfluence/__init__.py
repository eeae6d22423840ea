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

from collections.abc import Callable
from typing import Any

from .covariances import covariance_stage
from .eigenvalues import lambda_stage
from .eigenvectors import decomposition_stage
from .peer import SUPPORTED_VERSION as SUPPORTED_VERSION
from .peer import Notices, find, refuse_unsupported
from .scores import score_stage

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
        refuse_unsupported()
        replaced: list[tuple[Any, str, Any]] = []
        for place, replacement in _replacements(Notices()).items():
            owner, name = find(place)
            replaced.append((owner, name, getattr(owner, name)))
            setattr(owner, name, replacement)
        _active = Acceleration(replaced)
    return _active


def _replacements(notice: Notices) -> dict[str, Callable[..., Any]]:
    """The new functions, by the place of what they replace."""
    decomposition = decomposition_stage(notice)
    return {
        **covariance_stage(),
        "factor.eigen:perform_eigendecomposition": decomposition,
        "computer.factor_computer:perform_eigendecomposition": decomposition,
        **lambda_stage(notice),
        **score_stage(),
    }

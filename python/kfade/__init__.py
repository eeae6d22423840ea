"""Unlearning by uphill Gauss-Newton steps, with fast Kronecker-factored curvature of language models."""

from .config import FitConfig, UnlearnConfig
from .curvature import Curvature, LayerCurvature
from .errors import DataError, KfadeError, NonFiniteError, StorageError, UnsupportedLayerError
from .fit import fit, sampled_labels
from .layers import WeightAndBias
from .progress import Progress
from .unlearn import Step, UnlearnReport, unlearn
from .update import Update

__version__ = "0.1.0"

__all__ = [
    "Curvature",
    "DataError",
    "FitConfig",
    "KfadeError",
    "LayerCurvature",
    "NonFiniteError",
    "Progress",
    "Step",
    "StorageError",
    "UnlearnConfig",
    "UnlearnReport",
    "UnsupportedLayerError",
    "Update",
    "WeightAndBias",
    "fit",
    "sampled_labels",
    "unlearn",
]

"""Unlearning by uphill Gauss-Newton steps, with fast Kronecker-factored curvature of language models."""

from .config import FitConfig, UnlearnConfig
from .curvature import Curvature, LayerCurvature
from .errors import DataError, KfadeError, NonFiniteError, StorageError, UnsupportedLayerError
from .fit import fit
from .layers import WeightAndBias
from .progress import Progress

__version__ = "0.1.0"

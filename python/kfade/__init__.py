"""Unlearning by uphill Gauss-Newton steps, with fast Kronecker-factored curvature of language models."""

from . import optim
from .calibration import Calibration, Predictive
from .config import FitConfig, InfluenceConfig, KFACConfig, ReapplyConfig, UnlearnConfig
from .curvature import Curvature
from .durability import Reapplied, reapply
from .errors import DataError, KfadeError, NonFiniteError, StorageError, UnsupportedLayerError
from .fisher import sampled_labels
from .fit import fit
from .influence import Influence, influence
from .laplace import Laplace, LogitVariance
from .layer_curvature import LayerCurvature
from .layers import WeightAndBias
from .operators import CurvatureOperator
from .outcome import Outcome, Step, UnlearnReport
from .plan import Plan, plan
from .progress import Progress
from .training import FactorTracker
from .unlearn import unlearn
from .update import Update

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Curvature",
    "CurvatureOperator",
    "DataError",
    "FactorTracker",
    "FitConfig",
    "Influence",
    "InfluenceConfig",
    "KFACConfig",
    "KfadeError",
    "Laplace",
    "LayerCurvature",
    "LogitVariance",
    "NonFiniteError",
    "Outcome",
    "Plan",
    "Predictive",
    "Progress",
    "Reapplied",
    "ReapplyConfig",
    "Step",
    "StorageError",
    "UnlearnConfig",
    "UnlearnReport",
    "UnsupportedLayerError",
    "Update",
    "WeightAndBias",
    "fit",
    "influence",
    "optim",
    "plan",
    "reapply",
    "sampled_labels",
    "unlearn",
]

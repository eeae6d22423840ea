"""The unlearning methods that people use today, each one small function on one shared loop.

Every method but two minimises `γ · forget objective + α · retain objective` with AdamW over the forget set, as the
open-unlearning benchmark (Dorna et al. 2025, arXiv 2506.12618) trains them: each forget batch is paired with a retain
batch. Gradient ascent has no retain objective; task-vector negation trains on the forget set and subtracts what it
learnt. `METHODS` lists them with their sources and published defaults; `finetune` is the same loop for plain training,
and `retrain` the truth that all of them approach.

What needs the original model (NPO's reference, retain KL, UNDIAL's teacher, RMU's activations) is computed once before
the first step, so no second model is kept. The model runs without dropout.
"""

from .loop import TrainReport, TrainStep, finetune, retrain, run_baseline, trained_parameters
from .methods import METHODS, BaselineConfig, Context, Method, TrainConfig, decoder_layers

__all__ = [
    "METHODS",
    "BaselineConfig",
    "Context",
    "Method",
    "TrainConfig",
    "TrainReport",
    "TrainStep",
    "decoder_layers",
    "finetune",
    "retrain",
    "run_baseline",
    "trained_parameters",
]

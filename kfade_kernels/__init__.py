"""Fast kernels for Kronecker-factored curvature of neural networks.

Every operation has one folder: its schema and public function, its definition in plain PyTorch
(`reference.py`), and one file a backend. `explain` says which backend would serve a call, and why.
"""

from .accumulate_factors import accumulate_factors_
from .apply_update import apply_update_
from .dispatch import Explanation, explain, operations
from .eigenvalue_correction import eigenvalue_correction_
from .kron_solve import kron_solve
from .packed import PackedSymmetric
from .precision import bf16_pair
from .rotation import rotate
from .sampled_cross_entropy import CrossEntropy, counter_bits, counter_uniform, gumbel_noise, sampled_cross_entropy
from .sketch import sketch_
from .syrk import syrk_

__all__ = [
    "CrossEntropy",
    "Explanation",
    "PackedSymmetric",
    "accumulate_factors_",
    "apply_update_",
    "bf16_pair",
    "counter_bits",
    "counter_uniform",
    "eigenvalue_correction_",
    "explain",
    "gumbel_noise",
    "kron_solve",
    "operations",
    "rotate",
    "sampled_cross_entropy",
    "sketch_",
    "syrk_",
]

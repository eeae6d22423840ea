"""Grouped matrix products on a GPU, with what follows them fused in: the part that other operations are made of.

Not an operation of its own: `rotate`, `kron_solve`, `sketch_` and `eigenvalue_correction_` hand it their problems.
"""

"""Modules with sparse weights and dense activations, in the place of torch's.

Gradient, optimiser state and update exist only at the non-zeros, so retraining costs the density and nothing revives a
pruned weight.
"""

from .conv2d import SparseConv2d
from .convolution import SparseConv1d
from .fused import FusedConv2d, MaxPool2d, Shortcut
from .linear import SparseLinear
from .packed import DTYPES, SparseModule
from .squeeze_excite import SqueezeExcite

__all__ = [
    "DTYPES",
    "FusedConv2d",
    "MaxPool2d",
    "Shortcut",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
    "SqueezeExcite",
]

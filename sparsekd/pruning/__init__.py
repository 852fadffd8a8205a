"""Which weights go: importance, pattern, budget, schedule, and the Pruner that makes the masks and holds them."""

from .importance import IMPORTANCES
from .permutation import Permutation, choose_permutation
from .pruner import Pruner
from .schedule import CubicSL, IterativeSL, LinearSL, RigL

__all__ = ["IMPORTANCES", "CubicSL", "IterativeSL", "LinearSL", "Permutation", "Pruner", "RigL", "choose_permutation"]

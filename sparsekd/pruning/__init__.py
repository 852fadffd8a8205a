"""Which weights go: importance, pattern, budget, schedule, and the Pruner that makes the masks and holds them."""

from .batch_norm import recalibrate_batch_norm
from .importance import IMPORTANCES
from .latency import LatencyBudget
from .permutation import Permutation, choose_permutation
from .pruner import Pruner
from .schedule import CubicSL, IterativeSL, LinearSL, RigL
from .sensitivity import Sensitivity, gather_importance, sensitivity

__all__ = [
    "IMPORTANCES",
    "CubicSL",
    "IterativeSL",
    "LatencyBudget",
    "LinearSL",
    "Permutation",
    "Pruner",
    "RigL",
    "Sensitivity",
    "choose_permutation",
    "gather_importance",
    "recalibrate_batch_norm",
    "sensitivity",
]

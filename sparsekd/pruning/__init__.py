"""Which weights go: importance, pattern, budget, schedule, and the Pruner that makes the masks and holds them."""

from .importance import IMPORTANCES
from .patterns import PATTERNS
from .pruner import Pruner
from .schedule import CubicSL, LinearSL

__all__ = ["IMPORTANCES", "PATTERNS", "CubicSL", "LinearSL", "Pruner"]

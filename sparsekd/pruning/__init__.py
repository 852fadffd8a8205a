"""Which weights go: importance, budget, pattern, schedule, and the Pruner that holds the masks."""

from .importance import IMPORTANCES
from .patterns import PATTERNS
from .pruner import Pruner
from .schedule import CubicSL, LinearSL

__all__ = ["IMPORTANCES", "PATTERNS", "CubicSL", "LinearSL", "Pruner"]

"""Distillation: the loss between student and teacher, feature hints, weight penalties, and the training loop."""

from .distiller import Distiller, evaluate
from .features import FeatureHints
from .losses import KDLoss, penalty
from .training_state import EpochRecord

__all__ = ["Distiller", "EpochRecord", "FeatureHints", "KDLoss", "evaluate", "penalty"]

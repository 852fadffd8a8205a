"""Distillation: loss, the teacher's kept answers, feature hints, weight penalties, and the training loop."""

from .distiller import Distiller, evaluate
from .features import FeatureHints
from .losses import KDLoss, penalty
from .teacher_cache import TeacherCache
from .training_state import EpochRecord

__all__ = ["Distiller", "EpochRecord", "FeatureHints", "KDLoss", "TeacherCache", "evaluate", "penalty"]

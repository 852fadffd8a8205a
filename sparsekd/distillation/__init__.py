"""Distillation: losses, the teacher's kept answers, feature hints, weight penalties, and the training loop."""

from ..sparse.ops import linear_kd_loss
from .distiller import Distiller, evaluate
from .ensemble import TeacherEnsemble
from .feature_losses import FEATURE_LOSSES
from .features import FeatureHints
from .logit_losses import LOGIT_LOSSES, DistillationLoss
from .logs import CSVLog, TensorBoardLog
from .losses import KDLoss, LinearKDLoss, penalty
from .teacher_cache import TeacherCache
from .training_state import EpochRecord

__all__ = [
    "FEATURE_LOSSES",
    "LOGIT_LOSSES",
    "CSVLog",
    "DistillationLoss",
    "Distiller",
    "EpochRecord",
    "FeatureHints",
    "KDLoss",
    "LinearKDLoss",
    "TeacherCache",
    "TeacherEnsemble",
    "TensorBoardLog",
    "evaluate",
    "linear_kd_loss",
    "penalty",
]

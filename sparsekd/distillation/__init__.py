"""Distillation: losses, the teacher's kept answers, feature hints, weight penalties, and the training loop."""

from ..sparse.ops import kd_loss, linear_kd_loss
from .distiller import Distiller, evaluate
from .ensemble import TeacherEnsemble
from .feature_losses import FEATURE_LOSSES, at_loss, fitnet_loss, rkd_loss, sp_loss
from .features import FeatureHints
from .logit_losses import (
    LOGIT_LOSSES,
    DistillationLoss,
    dist_loss,
    dkd_loss,
    jsd_loss,
    kl_loss,
    logit_standardisation_loss,
    mse_loss,
    reverse_kl_loss,
)
from .logs import CSVLog, TensorBoardLog
from .losses import KDLoss, LinearKDLoss, group_lasso, penalty
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
    "at_loss",
    "dist_loss",
    "dkd_loss",
    "evaluate",
    "fitnet_loss",
    "group_lasso",
    "jsd_loss",
    "kd_loss",
    "kl_loss",
    "linear_kd_loss",
    "logit_standardisation_loss",
    "mse_loss",
    "penalty",
    "reverse_kl_loss",
    "rkd_loss",
    "sp_loss",
]

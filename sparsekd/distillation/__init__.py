"""What the teacher says: the loss, feature hints, penalties, and the training loop."""

from .distiller import Distiller, EpochRecord, evaluate
from .losses import KDLoss, penalty

__all__ = ["Distiller", "EpochRecord", "KDLoss", "evaluate", "penalty"]

"""sparsekd: distil, prune, and swap layers for ones with sparse weights (dense activations) that really run faster."""

from importlib.metadata import PackageNotFoundError, version

from .compress import compress
from .distillation import DistillationLoss, Distiller, KDLoss, LinearKDLoss, TeacherCache, evaluate, linear_kd_loss
from .pruning import CubicSL, IterativeSL, LinearSL, Pruner, RigL, recalibrate_batch_norm, sensitivity
from .reporting import report, would_it_be_faster
from .sparse.checkpoint import load, save
from .sparse.convert import choices, convert, dense_state_dict, to_dense
from .sparse.fusion import optimize_for_inference
from .sparse.modules import SparseConv1d, SparseConv2d, SparseLinear

try:
    __version__ = version("sparsekd")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"

__all__ = [
    "CubicSL",
    "DistillationLoss",
    "Distiller",
    "IterativeSL",
    "KDLoss",
    "LinearKDLoss",
    "LinearSL",
    "Pruner",
    "RigL",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "TeacherCache",
    "choices",
    "compress",
    "convert",
    "dense_state_dict",
    "evaluate",
    "linear_kd_loss",
    "load",
    "optimize_for_inference",
    "recalibrate_batch_norm",
    "report",
    "save",
    "sensitivity",
    "to_dense",
    "would_it_be_faster",
]

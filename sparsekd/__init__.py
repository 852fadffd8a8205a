"""sparsekd: distil, prune, and swap layers for ones with sparse weights (dense activations) that really run faster."""

from importlib.metadata import PackageNotFoundError, version

from .channels import fold_permutations, remove_channels
from .compress import compress
from .distillation import (
    CSVLog,
    DistillationLoss,
    Distiller,
    KDLoss,
    LinearKDLoss,
    TeacherCache,
    TeacherEnsemble,
    TensorBoardLog,
    evaluate,
    linear_kd_loss,
)
from .interop import (
    BlockSparseConfig,
    NMSparseConfig,
    SparseConfig,
    adopt_masks,
    hold_masks,
    prepare,
    read_masks,
    sparsify_,
)
from .latency import latency_budget
from .pruning import (
    CubicSL,
    IterativeSL,
    LatencyBudget,
    LinearSL,
    Pruner,
    RigL,
    gather_importance,
    recalibrate_batch_norm,
    sensitivity,
)
from .reporting import report, would_it_be_faster
from .sparse.checkpoint import load, save
from .sparse.convert import choices, convert, dense_state_dict, to_dense
from .sparse.fusion import optimize_for_inference
from .sparse.modules import SparseConv1d, SparseConv2d, SparseLinear
from .sparse.shapes import choices_by_shape

try:
    __version__ = version("sparsekd")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"

__all__ = [
    "BlockSparseConfig",
    "CSVLog",
    "CubicSL",
    "DistillationLoss",
    "Distiller",
    "IterativeSL",
    "KDLoss",
    "LatencyBudget",
    "LinearKDLoss",
    "LinearSL",
    "NMSparseConfig",
    "Pruner",
    "RigL",
    "SparseConfig",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "TeacherCache",
    "TeacherEnsemble",
    "TensorBoardLog",
    "adopt_masks",
    "choices",
    "choices_by_shape",
    "compress",
    "convert",
    "dense_state_dict",
    "evaluate",
    "fold_permutations",
    "gather_importance",
    "hold_masks",
    "latency_budget",
    "linear_kd_loss",
    "load",
    "optimize_for_inference",
    "prepare",
    "read_masks",
    "recalibrate_batch_norm",
    "remove_channels",
    "report",
    "save",
    "sensitivity",
    "sparsify_",
    "to_dense",
    "would_it_be_faster",
]

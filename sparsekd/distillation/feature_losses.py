"""Losses between inner features, each a pure function named as in its paper.

``student, teacher``: ``[N, C, H, W]`` or ``[N, D]``; the teacher's take no gradient. Half types are taken
in float32, and products of matrices are float32 under autocast too.

============ ============================================================================== ===========================
``fitnet``   mean (student - teacher)^2, of one shape                                       mdistiller: the same
``at``       mean over rows and places of (Q_s - Q_t)^2, Q = channels' mean of a^2,         mdistiller: the same, x 1000
             flattened, of length 1; channels may differ
``rkd``      25 * distances + 50 * angles, Huber, over pairs and triples of the batch;      mdistiller: the same
             widths may differ
``sp``       |G_s - G_t|^2 / N^2, G = rows of X X^T of length 1; widths may differ          mdistiller: the same, x 3000
============ ============================================================================== ===========================

Sources: Romero et al., "FitNets", ICLR 2015; Zagoruyko and Komodakis, "Paying more attention to attention", ICLR 2017;
Park et al., "Relational knowledge distillation", CVPR 2019; Tung and Mori, "Similarity-preserving knowledge
distillation", ICCV 2019.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.dim() < 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"Expected features [N, ...] of one batch, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.to(dtype), teacher.detach().to(dtype)


def fitnet_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of features of one shape (after a regressor, where channels differ)."""
    if student.shape != teacher.shape:
        raise ValueError(f"Expected features of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    return F.mse_loss(*_features(student, teacher))


def attention(features: Tensor) -> Tensor:
    """``[N, C, H, W]`` to ``[N, H W]`` of length 1: where in the image the channels are active."""
    return F.normalize(features.square().mean(1).flatten(1), dim=1)


def at_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer. Raises ValueError unless both are ``[N, C, H, W]`` of one H and W."""
    if student.dim() != 4 or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"Expected features [N, C, H, W] of one H and W, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    student, teacher = _features(student, teacher)
    return (attention(student) - attention(teacher)).square().mean()


def _distances(x: Tensor) -> Tensor:
    """Euclidean, ``[N, N]``, in units of their mean over different rows."""
    gaps = (x[:, None] - x[None]).square().sum(2).clamp_min(1e-12)
    off = 1 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    found = gaps.sqrt() * off
    return found / (found.sum() / off.sum().clamp_min(1)).clamp_min(1e-12)


def _angles(x: Tensor) -> Tensor:
    """Cosines at row j of the corner between rows i and k: ``[N, N, N]``."""
    arms = F.normalize(x[None] - x[:, None], dim=2)
    return torch.einsum("jid,jkd->jik", arms, arms)


def rkd_loss(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Relations of the rows of a batch; memory grows with N^3."""
    student, teacher = (part.flatten(1) for part in _features(student, teacher))
    distance = F.smooth_l1_loss(_distances(student), _distances(teacher))
    with torch.autocast(student.device.type, enabled=False):
        angle = F.smooth_l1_loss(_angles(student), _angles(teacher))
    return distance_weight * distance + angle_weight * angle


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Which samples of a batch look alike."""
    student, teacher = (part.flatten(1) for part in _features(student, teacher))
    with torch.autocast(student.device.type, enabled=False):
        own, taught = (F.normalize(part @ part.t(), dim=1) for part in (student, teacher))
    return (own - taught).square().mean()


FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fitnet": fitnet_loss,
    "at": at_loss,
    "rkd": rkd_loss,
    "sp": sp_loss,
}

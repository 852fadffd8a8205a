"""kd_loss: cross entropy and KL divergence from raw logits. Its gradient is registered in csrc/ops.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .registered import OPS, check_device
from .rules import check_same_device


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    distill_ignored: bool = False,
) -> Tensor:
    """``(1 - alpha) * CE + alpha * T^2 * KL(teacher || student)`` from raw logits, row by row in the caches.

    The gradient is made in the forward. All is computed in double and rounded once. CE averages over the rows that are
    not ignored, KL sums over classes and averages over its rows: those not ignored, or all with ``distill_ignored``.
    With no such row the loss is NaN, as torch's cross entropy; with ``distill_ignored`` and no label CE counts as 0.

    Args:
        student: logits ``[N, C]`` or ``[N, C, d1, ...]`` (classes in dimension 1) or ``[C]``, any floating dtype.
        teacher: logits of the same shape, any floating dtype; takes no gradient.
        target: int64 ``[N]`` / ``[N, d1, ...]`` / scalar, classes in 0..C-1 or ``ignore_index``; None needs alpha = 1.

    Returns:
        A scalar, float64 for float64 student logits and float32 otherwise. Differentiable once, in ``student``.

    Raises:
        ValueError, TypeError, IndexError: arguments that do not fit, or a target out of range.

    Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015.
    """
    check_device(student, "kd_loss_forward")
    if student.dim() == 0 or student.shape != teacher.shape:
        raise ValueError(
            "Expected student and teacher logits of one shape [N, C, ...], "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if target is not None:
        if target.is_floating_point():
            raise TypeError(f"Expected target of dtype torch.int64 (class indices), got {target.dtype}")
        expected = student.shape[:1] + student.shape[2:] if student.dim() > 1 else ()
        if target.shape != expected:
            raise ValueError(f"Expected target of shape {tuple(expected)}, got {tuple(target.shape)}")
        target = target.reshape(-1)
    classes = student.shape[1 if student.dim() > 1 else 0]
    if student.dim() != 2:
        dim = min(1, student.dim() - 1)
        student = student.movedim(dim, -1).reshape(-1, classes)
        teacher = teacher.movedim(dim, -1).reshape(-1, classes)
    return OPS.kd_loss(
        student, teacher.detach(), target, temperature, alpha, ignore_index, label_smoothing, distill_ignored
    )


@torch.library.register_fake("sparsekd::kd_loss_forward")
def _kd_loss_forward_fake(
    student, teacher, target, temperature, alpha, ignore_index, label_smoothing, distill_ignored, with_grad
):
    check_same_device(student, {"teacher logits": teacher, "target": target})
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty((), dtype=dtype), student.new_empty(student.shape if with_grad else (0,), dtype=dtype)


@torch.library.register_fake("sparsekd::kd_loss_rows_")
def _kd_loss_rows_fake(student, teacher, target, *settings):
    check_same_device(student, {"teacher logits": teacher, "target": target})
    return student.new_empty((), dtype=torch.float64)

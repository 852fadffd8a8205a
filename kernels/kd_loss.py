"""The distillation loss and its gradient from raw logits, in one kernel.

    loss = (1 - alpha) * CE(student, target) + alpha * T^2 * D(teacher, student at temperature T)
    D    = KL(p || q), KL(q || p), or
           JSD_beta = beta * KL(p || m) + (1 - beta) * KL(q || m),  m = beta * p + (1 - beta) * q

    gradient of D in the student's logits, times T:   q - p  |  q (log q/p - KL(q || p))  |
                                                      (1 - beta) q (log q/m - KL(q || m))

A program owns BLOCK_R rows. Up to :data:`ONE_BLOCK` classes they stay in registers: both logits are read once and the
gradient is written once. Beyond, a first pass over blocks of classes finds the three log-sum-exps online (student at 1
and at T, teacher at T) and a second computes loss and gradient; there is no limit to the number of classes.

Arithmetic is in fp32 (fp64 for fp64 logits), the sum over rows in fp64. A target out of range makes the loss NaN: to
raise an error would wait for the device.

Sources: Hinton et al., "Distilling the knowledge in a neural network", 2015; JSD_beta: Agarwal et al., "On-policy
distillation of language models", ICLR 2024; online log-sum-exp: Milakov, Gimelshein, "Online normalizer calculation for
softmax", 2018.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from . import checks
from .checks import cdiv, power_of_2
from .linear_kd_loss import total

ONE_BLOCK = 8192  # classes that stay in registers
# Classes at a time beyond, and a warp for each 256 of them. What the second pass of a divergence other than the forward
# KL holds does not fit the 128 registers that 16 warps leave.
BLOCK_C = {"forward_kl": 4096, "reverse_kl": 2048, "jsd": 2048}


@triton.jit
def _finite(top):
    """A maximum to subtract: where all is -inf so far, 0, as -inf - -inf is NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _terms(p, q, u, DTYPE: tl.constexpr):
    """Those of KL(p || q) with q - p added, whose sum is 0: p (exp(u) - 1 - u), u = log q - log p.

    None is negative, and an error of u, that of the log-sum-exps, drops out to first order. The plain p * -u keeps it,
    which is as large as the whole KL of a teacher that is near.
    """
    terms = q - p - p * u
    if DTYPE == tl.float32:
        near = u * u * (1 / 2 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * (1 / 720 + u / 5040)))))
        terms = tl.where(tl.abs(u) < 0.5, p * near, terms)
    return tl.where(p > 0, terms, q)  # where p is 0, u may be infinite


@triton.jit
def _kd_loss_kernel(
    student_ptr,
    teacher_ptr,
    target_ptr,
    labelled_ptr,
    losses_ptr,
    grad_ptr,
    rows,
    classes,
    distilled,
    temperature: tl.float64,
    alpha: tl.float64,
    beta: tl.float64,
    label_smoothing: tl.float64,
    grad_scale: tl.float64,
    ignore_index,
    s_row,
    s_class,
    t_row,
    t_class,
    g_row,
    HAS_TARGET: tl.constexpr,
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    DISTILL_IGNORED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    in_row = row < rows
    c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    s_rows = student_ptr + (row * s_row)[:, None]
    t_rows = teacher_ptr + (row * t_row)[:, None]
    temperature, alpha = tl.full((), temperature, tl.float64), tl.full((), alpha, tl.float64)
    beta, label_smoothing = tl.full((), beta, tl.float64), tl.full((), label_smoothing, tl.float64)
    inverse = (1.0 / temperature).to(DTYPE)
    up = tl.full((), grad_scale, tl.float64).to(DTYPE)

    known = in_row
    scale_hard = tl.full((), 0, DTYPE)
    scale_soft = (alpha * temperature * temperature / distilled).to(DTYPE)
    label = row * 0 - 1
    if HAS_TARGET:
        labelled = tl.load(labelled_ptr)  # of all rows
        target = tl.load(target_ptr + row, mask=in_row, other=ignore_index)
        known = in_row & (target != ignore_index)
        if HARD:
            label = tl.where(known, target, -1)
            scale_hard = tl.where(labelled > 0, (1.0 - alpha) / labelled, 0.0).to(DTYPE)
        if not DISTILL_IGNORED:
            scale_soft = tl.where(labelled > 0, alpha * temperature * temperature / labelled, 0.0).to(DTYPE)
    softened = known
    if DISTILL_IGNORED:
        softened = in_row
    hard, soft = tl.where(known, scale_hard, 0.0), tl.where(softened, scale_soft, 0.0)  # [BLOCK_R]

    # Log-sum-exps, each less the maximum: of the student at 1 and at T, of the teacher at T.
    if ONE_BLOCK:
        inside = in_row[:, None] & (c < classes)[None, :]
        s = tl.load(s_rows + c[None, :] * s_class, mask=inside, other=-float("inf")).to(DTYPE)  # [BLOCK_R, BLOCK_C]
        t = tl.load(t_rows + c[None, :] * t_class, mask=inside, other=-float("inf")).to(DTYPE)
        s_top, t_top = tl.max(s, axis=1), tl.max(t, axis=1)
        s_top, t_top = tl.where(in_row, s_top, 0.0), tl.where(in_row, t_top, 0.0)
        log_hard = tl.log(tl.sum(tl.exp(s - s_top[:, None]), axis=1))
        log_soft = tl.log(tl.sum(tl.exp((s - s_top[:, None]) * inverse), axis=1))
        log_teacher = tl.log(tl.sum(tl.exp((t - t_top[:, None]) * inverse), axis=1))
    else:
        nothing = tl.full((BLOCK_R,), -float("inf"), DTYPE)
        zero = tl.zeros((BLOCK_R,), DTYPE)
        s_top, t_top, hard_sum, soft_sum, teacher_sum = nothing, nothing, zero, zero, zero
        for first in range(0, classes, BLOCK_C):
            inside = in_row[:, None] & (first + c < classes)[None, :]
            s = tl.load(s_rows + (first + c)[None, :].to(tl.int64) * s_class, mask=inside, other=-float("inf"))
            t = tl.load(t_rows + (first + c)[None, :].to(tl.int64) * t_class, mask=inside, other=-float("inf"))
            s, t = s.to(DTYPE), t.to(DTYPE)
            s_new, t_new = tl.maximum(s_top, tl.max(s, axis=1)), tl.maximum(t_top, tl.max(t, axis=1))
            s_at, t_at = _finite(s_new), _finite(t_new)
            s -= s_at[:, None]
            hard_sum = hard_sum * tl.exp(s_top - s_at) + tl.sum(tl.exp(s), axis=1)
            soft_sum = soft_sum * tl.exp((s_top - s_at) * inverse) + tl.sum(tl.exp(s * inverse), axis=1)
            t = (t - t_at[:, None]) * inverse
            teacher_sum = teacher_sum * tl.exp((t_top - t_at) * inverse) + tl.sum(tl.exp(t), axis=1)
            s_top, t_top = s_new, t_new
        s_top, t_top = tl.where(in_row, s_top, 0.0), tl.where(in_row, t_top, 0.0)
        log_hard, log_soft, log_teacher = tl.log(hard_sum), tl.log(soft_sum), tl.log(teacher_sum)

    # Second pass: loss and gradient of the blocks. Reverse KL and JSD need their own value for the gradient: one more.
    TWICE: tl.constexpr = SOFT and DIVERGENCE != "forward_kl" and WITH_GRAD and not ONE_BLOCK
    entropy = tl.zeros((BLOCK_R,), DTYPE)  # KL(q || p) or KL(q || m)
    loss = tl.zeros((BLOCK_R,), DTYPE)
    lot = (1.0 - beta).to(DTYPE)
    SWEEPS: tl.constexpr = 2 if TWICE else 1
    for sweep in tl.static_range(SWEEPS):
        for first in range(0, classes, BLOCK_C):
            position = first + c
            inside = in_row[:, None] & (position < classes)[None, :]
            if not ONE_BLOCK:
                s = tl.load(s_rows + position[None, :].to(tl.int64) * s_class, mask=inside, other=-float("inf"))
                t = tl.load(t_rows + position[None, :].to(tl.int64) * t_class, mask=inside, other=-float("inf"))
                s, t = s.to(DTYPE), t.to(DTYPE)
            grad = tl.zeros((BLOCK_R, BLOCK_C), DTYPE)
            if HARD and sweep == SWEEPS - 1:
                log_q = (s - s_top[:, None]) - log_hard[:, None]
                is_label = position[None, :] == label[:, None]
                smooth = (label_smoothing / classes).to(DTYPE)
                wanted = tl.where(is_label, (1.0 - label_smoothing).to(DTYPE), 0.0) + smooth
                ce = tl.where(inside & (wanted > 0), -wanted * log_q, 0.0)
                loss += hard * tl.sum(ce, axis=1)
                grad += hard[:, None] * (tl.exp(log_q) - wanted)
            if SOFT:
                log_q = (s - s_top[:, None]) * inverse - log_soft[:, None]
                log_p = (t - t_top[:, None]) * inverse - log_teacher[:, None]
                q, p = tl.exp(log_q), tl.exp(log_p)
                if DIVERGENCE == "forward_kl":
                    terms = tl.where(inside, _terms(p, q, log_q - log_p, DTYPE), 0.0)
                    loss += soft * tl.sum(terms, axis=1)
                    grad += (soft * inverse)[:, None] * (q - p)
                else:
                    if DIVERGENCE == "reverse_kl":
                        of_q, distance = _terms(q, p, log_p - log_q, DTYPE), log_q - log_p
                    else:
                        m = beta.to(DTYPE) * p + lot * q
                        of_q, distance = _terms(q, m, tl.log(m) - log_q, DTYPE), log_q - tl.log(m)
                        if sweep == SWEEPS - 1:
                            of_p = tl.where(inside, _terms(p, m, tl.log(m) - log_p, DTYPE), 0.0)
                            loss += soft * beta.to(DTYPE) * tl.sum(of_p, axis=1)
                    if sweep == 0:
                        entropy += tl.sum(tl.where(inside, of_q, 0.0), axis=1)
                    distance = tl.where(inside & (q > 0), distance, 0.0)
                    if sweep == SWEEPS - 1:
                        share = soft
                        if DIVERGENCE == "jsd":
                            share = soft * lot
                        grad += (share * inverse)[:, None] * q * (distance - entropy[:, None])
            if WITH_GRAD and sweep == SWEEPS - 1:
                to = grad_ptr + (row * g_row)[:, None] + position[None, :]
                tl.store(to, (grad * up).to(grad_ptr.dtype.element_ty), mask=inside)
    if SOFT and DIVERGENCE != "forward_kl":
        if DIVERGENCE == "jsd":
            loss += soft * lot * entropy
        else:
            loss += soft * entropy
    if HAS_TARGET:
        loss = tl.where(known & ((target < 0) | (target >= classes)), float("nan"), loss)
    tl.store(losses_ptr + row, loss, mask=in_row)


def launch(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    labelled: Tensor | None,
    losses: Tensor,
    grad: Tensor | None,
    distilled: int,
    temperature: float,
    alpha: float,
    ignore_index: int,
    label_smoothing: float,
    distill_ignored: bool,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    block_c: int | None = None,
    grad_scale: float = 1.0,
) -> None:
    """Loss of each row into ``losses [rows]`` and the gradient into ``grad``, which may be ``student`` itself.

    Args:
        labelled: the number of rows with a label, over which CE is averaged; int64, on the device. None: no target.
        distilled: the number of rows over which the divergence is averaged unless it is ``labelled``.
        block_c: classes at a time, if not all of them.
        grad_scale: a factor of the gradient alone, for a dtype in which it would vanish.
    """
    rows, classes = student.shape
    one_block = block_c is None and classes <= ONE_BLOCK
    block_c = power_of_2(classes) if one_block else min(block_c or BLOCK_C[divergence], BLOCK_C[divergence])
    block_r = min(max(2048 // block_c, 1), power_of_2(rows), 64)
    elements = block_r * block_c
    warps = (4 if elements <= 2048 else 8 if elements <= 4096 else 16) if one_block else max(elements // 256, 4)
    double = torch.float64 in (student.dtype, teacher.dtype)
    wrap_triton(_kd_loss_kernel)[(cdiv(rows, block_r),)](
        student,
        teacher,
        target,
        labelled,
        losses,
        grad,
        rows,
        classes,
        max(distilled, 1),
        float(temperature),
        float(alpha),
        float(beta),
        float(label_smoothing),
        float(grad_scale),
        ignore_index,
        *student.stride(),
        *teacher.stride(),
        0 if grad is None else grad.stride(0),
        HAS_TARGET=target is not None,
        HARD=target is not None and alpha < 1,
        SOFT=alpha > 0,
        DISTILL_IGNORED=distill_ignored,
        DIVERGENCE=divergence,
        WITH_GRAD=grad is not None,
        DTYPE=tl.float64 if double else tl.float32,
        ONE_BLOCK=one_block,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=warps,
    )


def count_labels(target: Tensor | None, ignore_index: int) -> Tensor | None:
    return None if target is None else (target != ignore_index).sum()


def kd_loss_forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    temperature: float,
    alpha: float,
    ignore_index: int,
    label_smoothing: float,
    distill_ignored: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, gradient in the student's logits or ``[0]``); arguments as :func:`sparsekd.sparse.ops.kd_loss`'s."""
    checks.check_dim(student, "student logits", 2)
    checks.check_floating(student, "student logits")
    checks.check_floating(teacher, "teacher logits")
    if teacher.shape != student.shape:
        raise ValueError(
            f"Expected teacher logits of the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    if teacher.device != student.device:
        raise ValueError(f"Expected teacher logits on {student.device}, got {teacher.device}")
    rows, classes = student.shape
    if classes == 0:
        raise ValueError("Expected at least one class, got 0")
    checks.check_loss_settings(temperature, alpha, label_smoothing, target)
    checks.check_target(target, student, rows)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    losses = student.new_empty((rows,), dtype=dtype)
    grad = student.new_empty(student.shape if with_grad else (0,), dtype=dtype)
    labelled = count_labels(target, ignore_index)
    if rows:
        settings = (temperature, alpha, ignore_index, label_smoothing, distill_ignored)
        target = None if target is None else target.contiguous()
        launch(student, teacher, target, labelled, losses, grad if with_grad else None, rows, *settings)
    return total(losses.sum(dtype=torch.float64), rows, labelled, distill_ignored, dtype), grad

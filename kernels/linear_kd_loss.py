"""The distillation loss of two linear layers, and its gradients, without the logits in memory.

    s = student @ student_weight.T + student_bias,   t = teacher @ teacher_weight.T + teacher_bias
    loss = (1 - alpha) * CE(s, target) + alpha * T^2 * D(t, s at temperature T)          as in ``kd_loss.py``

    for each chunk of rows:   g = dloss/ds [rows of the chunk, classes],   which is made with the loss
        grad_student[chunk]  = g @ student_weight
        grad_weight         += g.T @ student[chunk]
        grad_bias           += sum of g

Only a chunk of either logits is there at a time. Products are those of torch; ``kd_loss.py``, on the CPU the C++ kernel
of kd_loss, makes loss and ``g`` of a chunk in one pass, and ``g`` takes the place of the student's logits. Gradients
are summed in float32 (float64 for float64). In float16 ``g`` is scaled by the number of rows, by which it is averaged,
as it would vanish.

Method: the head's gradient in the forward, chunk by chunk, as in Hsu et al., "Liger Kernel: efficient Triton kernels
for LLM training", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .checks import cdiv, power_of_2

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
WORKSPACE_SHARE = 8  # of the bytes of inputs and gradients: one part of so many is for the chunk
LEAST_WORKSPACE = {"cpu": 1 << 20, "cuda": 64 << 20}  # a matrix product of few rows wastes a GPU


class Settings(NamedTuple):
    temperature: float
    alpha: float
    divergence: str
    beta: float
    ignore_index: int
    label_smoothing: float
    distill_ignored: bool


class Call(NamedTuple):
    """What the op is called with; hidden states ``[batch, length, features]``."""

    student: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    target: Tensor | None
    settings: Settings
    chunk_rows: int
    wanted: list[bool]

    @property
    def rows(self) -> int:
        return self.student.shape[0] * self.student.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of loss and gradients."""
        return torch.float64 if self.student.dtype == torch.float64 else torch.float32


# (logits of the student, of the teacher, target, with gradient) of a chunk: its part of the loss, and the gradient
RowsOfLoss = Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]


def _checked(arguments: tuple) -> Call:
    call = Call(*arguments[:7], Settings(*arguments[7:14]), *arguments[14:])
    settings = call.settings
    student, weight, bias, teacher, teacher_weight, teacher_bias, target = call[:7]
    for whose, hidden, head, shift in (
        ("student", student, weight, bias),
        ("teacher", teacher, teacher_weight, teacher_bias),
    ):
        checks.check_dim(hidden, whose, 3)
        checks.check_floating(hidden, whose)
        checks.check_dim(head, f"{whose}_weight", 2)
        checks.check_like(head, f"{whose}_weight", hidden, whose)
        if head.shape[1] != hidden.shape[2]:
            raise ValueError(
                f"Expected {whose}_weight of shape [classes, {hidden.shape[2]}] for {whose} of shape "
                f"{tuple(hidden.shape)}, got {tuple(head.shape)}"
            )
        if shift is not None:
            checks.check_like(shift, f"{whose}_bias", hidden, whose)
            if shift.shape != head.shape[:1]:
                raise ValueError(f"Expected {whose}_bias of shape {tuple(head.shape[:1])}, got {tuple(shift.shape)}")
    if teacher.shape[:2] != student.shape[:2]:
        raise ValueError(f"Expected teacher with {tuple(student.shape[:2])} rows, got {tuple(teacher.shape[:2])}")
    if teacher_weight.shape[0] != weight.shape[0] or weight.shape[0] == 0:
        raise ValueError(
            f"Expected student_weight and teacher_weight of as many classes, got {weight.shape[0]} and "
            f"{teacher_weight.shape[0]}"
        )
    if teacher.device != student.device:
        raise ValueError(f"Expected teacher on {student.device}, got {teacher.device}")
    checks.check_loss_settings(settings.temperature, settings.alpha, settings.label_smoothing, target)
    if settings.divergence not in DIVERGENCES:
        raise ValueError(f"Expected divergence to be one of {', '.join(DIVERGENCES)}, got {settings.divergence!r}")
    if settings.divergence == "jsd" and not 0 < settings.beta < 1:
        raise ValueError(f"Expected beta in (0, 1), got {settings.beta}")
    if call.chunk_rows < 0:
        raise ValueError(f"Expected chunk_rows of at least 1, or 0 for a size by memory, got {call.chunk_rows}")
    checks.check_target(target, student, call.rows)
    return call


def rows_by_memory(tensors: list[Tensor | None], bytes_per_row: int, rows: int, device: str) -> int:
    """Rows of a chunk, such that it takes an eighth of what inputs and gradients do, or a little."""
    held = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    workspace = max(held // WORKSPACE_SHARE, LEAST_WORKSPACE.get(device, LEAST_WORKSPACE["cpu"]))
    chunk = max(workspace // max(bytes_per_row, 1), 16)
    return max(min(chunk // 16 * 16, rows), 1)


def _chunks(batch: int, length: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Where in ``[batch, length]`` each chunk of about ``rows`` lies: rows of one image, or whole images."""
    if length > rows:
        step = cdiv(length, cdiv(length, rows))
        for image in range(batch):
            for first in range(0, length, step):
                yield slice(image, image + 1), slice(first, min(first + step, length))
    else:
        step = max(rows // max(length, 1), 1)
        for image in range(0, batch, step):
            yield slice(image, min(image + step, batch)), slice(0, length)


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(hidden, weight.t(), out=out) if bias is None else torch.addmm(bias, hidden, weight.t(), out=out)


def _run(call: Call, workspace_per_logit: int, rows_of_loss: RowsOfLoss) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, weight, bias, teacher, teacher_weight, teacher_bias, target = call[:7]
    batch, length, features = student.shape
    classes, rows, dtype, chunk_rows = weight.shape[0], call.rows, call.dtype, call.chunk_rows
    wanted = [call.wanted[0], call.wanted[1], call.wanted[2] and bias is not None]
    grad_hidden = torch.empty_like(student, dtype=dtype) if wanted[0] else student.new_empty(0, dtype=dtype)
    grad_weight = weight.new_zeros(weight.shape if wanted[1] else (0,), dtype=dtype)
    grad_bias = weight.new_zeros((classes,) if wanted[2] else (0,), dtype=dtype)
    loss = student.new_zeros((), dtype=torch.float64)
    if not chunk_rows:
        logits = student.element_size() + teacher.element_size() + workspace_per_logit * any(wanted)
        per_row = classes * logits + features * (dtype.itemsize + student.element_size()) * wanted[0]
        held = [*call[:6], grad_hidden, grad_weight, grad_bias]
        chunk_rows = rows_by_memory(held, per_row, rows, student.device.type)
    scale = power_of_2(rows) if student.dtype == torch.float16 else 1
    chunks = list(_chunks(batch, length, chunk_rows)) if rows else []
    # One block for all chunks: an allocator that gets them in turns keeps some of each.
    most = max((student[chunk].shape[:2].numel() for chunk in chunks), default=0)
    s_block, t_block = student.new_empty((most, classes)), teacher.new_empty((most, classes))
    for images, places in chunks:
        hidden = student[images, places].reshape(-1, features)
        s = _linear(hidden, weight, bias, s_block[: hidden.shape[0]])
        of_teacher = teacher[images, places].reshape(-1, teacher.shape[2])
        t = _linear(of_teacher, teacher_weight, teacher_bias, t_block[: hidden.shape[0]])
        of_chunk = None if target is None else target.view(batch, length)[images, places].reshape(-1)
        part, g = rows_of_loss(s, t, of_chunk, any(wanted))
        loss += part
        if g is None:  # no row counts
            if wanted[0]:
                grad_hidden[images, places] = 0
            continue
        if not any(wanted):
            continue
        if g.dtype != student.dtype:
            g = (g * scale).to(student.dtype) if scale != 1 else g.to(student.dtype)
        if wanted[0]:
            to = grad_hidden[images, places]
            if dtype == student.dtype and to.is_contiguous():
                torch.mm(g, weight, out=to.view(-1, features))
            else:
                torch.div((g @ weight).to(dtype).view(to.shape), scale, out=to)
        if wanted[1] and dtype == student.dtype:
            grad_weight.addmm_(g.t(), hidden)
        elif wanted[1]:
            grad_weight.add_(g.t() @ hidden, alpha=1 / scale)
        if wanted[2]:
            grad_bias += g.sum(0, dtype=dtype) / scale
        del g
    return loss, grad_hidden, grad_weight, grad_bias


def total(loss: Tensor, rows: int, labelled: Tensor | None, distill_ignored: bool, dtype: torch.dtype) -> Tensor:
    """As torch: the mean over no rows is NaN. Unlabelled rows that are distilled make the loss well defined."""
    if rows == 0:
        return torch.full_like(loss, math.nan, dtype=dtype)
    if labelled is not None and not distill_ignored:
        loss = torch.where(labelled > 0, loss, math.nan)
    return loss.to(dtype)


def linear_kd_loss(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of student, student_weight, student_bias); see ``csrc/ops.cpp`` and ``sparsekd.sparse.ops``."""
    from . import kd_loss

    call = _checked(arguments)
    settings = call.settings
    labelled = kd_loss.count_labels(call.target, settings.ignore_index)
    half = call.student.dtype == torch.float16

    def rows_of_loss(s, t, of_chunk, with_grad):
        losses = s.new_empty((s.shape[0],), dtype=call.dtype)
        kd_loss.launch(
            s, t, of_chunk, labelled, losses, s if with_grad else None, call.rows, settings.temperature,
            settings.alpha, settings.ignore_index, settings.label_smoothing, settings.distill_ignored,
            settings.divergence, settings.beta, grad_scale=power_of_2(call.rows) if half else 1,
        )  # fmt: skip
        return losses.sum(dtype=torch.float64), s

    loss, *grads = _run(call, 0, rows_of_loss)
    return total(loss, call.rows, labelled, settings.distill_ignored, call.dtype), *grads


# --- on the CPU ------------------------------------------------------------------------------------------------------


def linear_kd_loss_cpu(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as those of :func:`linear_kd_loss`."""
    call = _checked(arguments)
    target, settings, dtype = call.target, call.settings, call.dtype
    temperature, alpha, divergence, beta, ignore_index, label_smoothing, distill_ignored = settings
    rows, classes, labelled = call.rows, call.student_weight.shape[0], None
    if target is not None:
        known = target != ignore_index
        labelled = known.sum()
        wrong = known & ((target < 0) | (target >= classes))
        if bool(wrong.any()):
            got = int(target[wrong][0])
            raise IndexError(f"Expected targets in 0..{classes - 1} or ignore_index={ignore_index}, got {got}")
    count = None if labelled is None else int(labelled)
    distilled = rows if count is None or distill_ignored else count
    given = (call.student.dtype, call.teacher.dtype)
    wide = torch.float64 if torch.float64 in given else torch.float32
    # The weight of a row in either mean.
    hard = (1 - alpha) / count if count else 0.0
    soft = alpha / distilled if distilled else 0.0

    def rows_of_loss(s, t, of_chunk, with_grad):
        known = s.shape[0] if of_chunk is None else int((of_chunk != ignore_index).sum())
        if hard + soft == 0 or not (known or distill_ignored):
            return 0.0, None
        if not s.is_cpu:
            return _rows_elsewhere(s, t, of_chunk, known, hard, soft, settings)
        s, t = s.to(wide), t.to(wide)
        loss = torch.ops.sparsekd.kd_loss_rows_(
            s, t, of_chunk, temperature, hard, soft, divergence, beta, ignore_index, label_smoothing, distill_ignored,
            with_grad,
        )  # fmt: skip
        return loss, s.to(dtype)

    # Where logits are narrower, or the student's narrower than the teacher's, there is a copy of them.
    extra = wide.itemsize * sum(narrow != wide for narrow in given)
    extra += given[0].itemsize if given[0] != wide else 0
    loss, *grads = _run(call, extra, rows_of_loss)
    return total(loss, rows, labelled, distill_ignored, dtype), *grads


def _rows_elsewhere(
    student: Tensor, teacher: Tensor, target: Tensor | None, known: int, hard: float, soft: float, settings: Settings
) -> tuple[Tensor, Tensor]:
    """A chunk of a device that has kd_loss but not kd_loss_rows_: CUDA without Triton."""
    if settings.divergence != "forward_kl":
        return _rows_in_float64(student, teacher, target, hard, soft, settings)
    hard, soft = hard * known, soft * (student.shape[0] if settings.distill_ignored else known)
    loss, grad = torch.ops.sparsekd.kd_loss_forward(
        student, teacher, target, settings.temperature, soft / (hard + soft), settings.ignore_index,
        settings.label_smoothing, settings.distill_ignored, True,
    )  # fmt: skip
    return loss.double() * (hard + soft), grad.mul_(hard + soft)


def _rows_in_float64(
    student: Tensor, teacher: Tensor, target: Tensor | None, hard: float, soft: float, settings: Settings
) -> tuple[Tensor, Tensor]:
    """``hard`` times the sum of CE plus ``soft * T^2`` times the sum of D, and the gradient in the student's logits."""
    known = None if target is None else (target != settings.ignore_index)[:, None]
    temperature, smoothing = settings.temperature, settings.label_smoothing
    loss, grad = student.new_zeros((), dtype=torch.float64), None
    if hard:
        log_q = student.to(torch.float64).log_softmax(1)
        label = torch.where(known[:, 0], target, 0)[:, None]
        ce = -(1 - smoothing) * log_q.gather(1, label) if smoothing < 1 else torch.zeros_like(log_q[:, :1])
        if smoothing:
            ce = ce - smoothing * log_q.mean(1, keepdim=True)
        loss = loss + hard * torch.where(known, ce, 0).sum()
        grad = log_q.exp_().sub_(smoothing / student.shape[1])
        grad.scatter_add_(1, label, torch.full_like(label, smoothing - 1, dtype=torch.float64))
        grad = grad.mul_(hard).masked_fill_(~known, 0)
    if soft:
        log_q = (student.to(torch.float64) / temperature).log_softmax(1)
        log_p = (teacher.to(torch.float64) / temperature).log_softmax(1)
        q = log_q.exp()
        if settings.divergence == "reverse_kl":
            distance, share = log_q - log_p, 1.0
            rows = torch.zeros_like(q[:, :1])
        else:
            beta, share = settings.beta, 1 - settings.beta
            log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
            rows = beta * _expectation(log_p.exp(), log_p - log_m)
            distance = log_q - log_m
        of_q = _expectation(q, distance)
        rows = rows + share * of_q
        of_row = temperature * soft  # or [rows, 1]
        if known is not None and not settings.distill_ignored:
            of_row = of_row * known.to(torch.float64)
        loss = loss + (rows * temperature * of_row).sum()
        distance = torch.where(q > 0, distance - of_q, 0).mul_(q).mul_(share * of_row)
        grad = distance if grad is None else grad.add_(distance)
    return loss, grad.to(torch.float64 if student.dtype == torch.float64 else torch.float32)


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """Sum of p * x along rows, where what has no probability counts nothing, even if infinite."""
    return torch.where(p > 0, p * x, 0).sum(1, keepdim=True)

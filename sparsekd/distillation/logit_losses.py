"""Distillation losses between logits, each a pure function named as in its paper.

All take ``student_logits, teacher_logits`` (``[N, C]``, floating; the teacher's take no gradient) and return a scalar,
float64 for float64 students and float32 otherwise: half types are computed in float32, in log space, so that
logits of +-6e4 give finite losses and gradients. p is softmax(student / T), q softmax(teacher / T). Sums are over
classes, means over rows ("batchmean"). Where a factor T^2 is named it is always applied; it keeps the size of the
gradient the same at every temperature.

=============================== ===================================================== =================================
name                            formula                                               elsewhere
=============================== ===================================================== =================================
``kl_loss``                     T^2 KL(q || p)                                        the KL term of :class:`KDLoss`
``reverse_kl_loss``             T^2 KL(p || q)                                        MiniLLM: without T^2
``jsd_loss``                    T^2 (beta KL(q || m) + (1 - beta) KL(p || m)),        GKD in trl: without T^2
                                m = beta q + (1 - beta) p
``dkd_loss``                    T^2 (alpha TCKD + beta NCKD)                          mdistiller: the same
``logit_standardisation_loss``  T^2 KL of z-scores, row by row                        its repository: times 9
``dist_loss``                   T^2 (beta inter + gamma intra), 1 - Pearson each      its repository: the same
``mse_loss``                    mean over rows and classes of (student - teacher)^2   Kim et al.: sum over classes / 2
=============================== ===================================================== =================================
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _logits(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the arithmetic, divided by T."""
    for whose, logits in (("student", student), ("teacher", teacher)):
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"Expected floating {whose}_logits, got {got}")
    if student.shape != teacher.shape or student.dim() != 2 or student.numel() == 0:
        raise ValueError(
            f"Expected student_logits and teacher_logits of one shape [N, C], got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"Expected temperature to be positive and finite, got {temperature}")
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.to(dtype) / temperature, teacher.detach().to(dtype) / temperature


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p), mean over rows; both differentiable."""
    return (log_q.exp() * (log_q - log_p)).sum(1).mean()


def kl_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(q || p). Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015."""
    student, teacher = _logits(student_logits, teacher_logits, temperature)
    return temperature**2 * _kl(teacher.log_softmax(1), student.log_softmax(1))


def reverse_kl_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || q): the student stays where the teacher is. Source: Gu et al., "MiniLLM", ICLR 2024."""
    student, teacher = _logits(student_logits, teacher_logits, temperature)
    return temperature**2 * _kl(student.log_softmax(1), teacher.log_softmax(1))


def jsd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """T^2 times the generalised Jensen-Shannon divergence, beta in (0, 1).

    Source: Agarwal et al., "On-policy distillation of language models: learning from self-generated mistakes", ICLR
    2024, with m = beta q + (1 - beta) p.
    """
    if not 0 < beta < 1:
        raise ValueError(f"Expected beta in (0, 1), got {beta}")
    student, teacher = _logits(student_logits, teacher_logits, temperature)
    log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return temperature**2 * (beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m))


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD): the divergence of target against the rest, and that within the rest.

    Args:
        target: int64 ``[N]``, classes 0..C-1.

    Raises:
        ValueError: two classes and beta > 0: one class is left besides the target, and NCKD is nothing.

    Source: Zhao et al., "Decoupled knowledge distillation", CVPR 2022.
    """
    student, teacher = _logits(student_logits, teacher_logits, temperature)
    rows, classes = student.shape
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != (rows,):
        got = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"Expected target of int64 [{rows}], got {got}")
    if not bool(((target >= 0) & (target < classes)).all()):
        raise ValueError(f"Expected targets in 0..{classes - 1}, got {int(target.min())}..{int(target.max())}")
    if classes == 2 and beta:
        raise ValueError("Expected more than two classes for the non-target part of dkd_loss, got 2: set beta=0")
    others = torch.ones_like(student, dtype=torch.bool).scatter_(1, target[:, None], False)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        # Without the target's column, not with a large negative number in its place.
        rest = logits[others].view(rows, classes - 1)
        log_all = logits.log_softmax(1)
        of_target = log_all.gather(1, target[:, None])  # [N, 1]
        of_others = rest.logsumexp(1, keepdim=True) - logits.logsumexp(1, keepdim=True)
        return torch.cat([of_target, of_others], 1), rest.log_softmax(1)

    (log_b, log_p), (log_a, log_q) = parts(student), parts(teacher)
    return temperature**2 * (alpha * _kl(log_a, log_b) + beta * _kl(log_q, log_p))


def standardised(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """(z - mean) / (deviation + eps) of each row; the deviation is that of a sample (C - 1), as in the paper's code.

    A row whose logits are all the same has z-scores of 0 and no gradient, which would be of the size of 1 / eps.
    """
    deviation = logits.std(1, keepdim=True)
    flat = deviation <= 16 * torch.finfo(logits.dtype).eps * logits.detach().abs().amax(1, keepdim=True)
    return ((logits - logits.mean(1, keepdim=True)) / (deviation.masked_fill(flat, 1) + eps)).masked_fill(flat, 0)


def logit_standardisation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL between the softened z-scores of both. Source: Sun et al., "Logit standardization in knowledge
    distillation", CVPR 2024."""
    student, teacher = _logits(student_logits, teacher_logits)
    return kl_loss(standardised(student), standardised(teacher), temperature)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of each row of one with that of the other; 0 and without a gradient where one does not vary."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    lengths = a.norm(dim=1), b.norm(dim=1)
    flat = (lengths[0] <= 16 * torch.finfo(a.dtype).eps) | (lengths[1] <= 16 * torch.finfo(a.dtype).eps)
    return ((a * b).sum(1) / (lengths[0] * lengths[1]).masked_fill(flat, 1)).masked_fill(flat, 0)


def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """T^2 (beta (1 - correlation of each row) + gamma (1 - correlation of each class over the batch)), in the mean.

    Source: Huang et al., "Knowledge distillation from a stronger teacher", NeurIPS 2022.
    """
    student, teacher = _logits(student_logits, teacher_logits, temperature)
    p, q = student.softmax(1), teacher.softmax(1)
    inter, intra = 1 - _pearson(p, q).mean(), 1 - _pearson(p.t(), q.t()).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over rows and classes of (student - teacher)^2. Source: Ba and Caruana, 2014; Kim et al., IJCAI 2021."""
    return F.mse_loss(*_logits(student_logits, teacher_logits))


LOGIT_LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl": kl_loss,
    "reverse_kl": reverse_kl_loss,
    "jsd": jsd_loss,
    "dkd": dkd_loss,
    "logit_standardisation": logit_standardisation_loss,
    "dist": dist_loss,
    "mse": mse_loss,
}


class DistillationLoss(nn.Module):
    """(1 - alpha) CE(student, target) + alpha * one of :data:`LOGIT_LOSSES`, for :class:`Distiller`.

    Args:
        term: a name, or a callable ``(student_logits, teacher_logits) -> scalar``.
        alpha: weight of the teacher's term, in [0, 1].
        settings: of the term (temperature, beta, ...), handed on. "dkd" has an ``alpha`` of its own: give it as
            ``functools.partial(dkd_loss, alpha=...)`` where it is not 1.

    Call it with logits ``[N, C]`` or ``[N, C, d1, ...]``, whose positions are rows to the term, and an int64 target
    ``[N]`` or ``[N, d1, ...]``; None needs alpha = 1 and another term than "dkd". Rows of target -100 are out of both
    terms; where all are, the result is NaN, as in :class:`KDLoss`.

    Raises:
        ValueError, TypeError: settings out of their range, logits or targets that don't fit.
    """

    ignore_index = -100

    def __init__(self, term: str | Callable[..., Tensor], alpha: float = 0.5, **settings: float) -> None:
        super().__init__()
        if isinstance(term, str) and term not in LOGIT_LOSSES:
            raise ValueError(f"Expected term to be one of {', '.join(LOGIT_LOSSES)} or a callable, got {term!r}")
        if not isinstance(term, str) and not callable(term):
            raise TypeError(f"Expected term to be a name or a callable, got {type(term).__name__}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"Expected alpha in [0, 1], got {alpha}")
        self.term = LOGIT_LOSSES[term] if isinstance(term, str) else term
        if isinstance(term, str):
            own = [name for name in inspect.signature(self.term).parameters if name in ("temperature", "beta", "gamma")]
            unknown = [name for name in settings if name not in own]
            if unknown:
                said = ", ".join(own) or "none"
                raise TypeError(f"Expected settings of {term!r} out of {said}, got {', '.join(unknown)}")
        self.labelled = self.term is dkd_loss or getattr(self.term, "func", None) is dkd_loss
        self.alpha, self.settings = alpha, settings

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        if target is None and (self.alpha < 1 or self.labelled):
            raise ValueError("Expected a target unless alpha is 1 and the term needs no labels, got None")
        shape = student_logits.shape
        fits = len(shape) > 1 and teacher_logits.shape == shape
        if not fits or (target is not None and target.shape != shape[:1] + shape[2:]):
            got = "None" if target is None else tuple(target.shape)
            raise ValueError(
                "Expected student_logits and teacher_logits of one shape [N, C, ...] and a target [N, ...], got "
                f"{tuple(shape)}, {tuple(teacher_logits.shape)} and {got}"
            )
        student, teacher = (logits.movedim(1, -1).flatten(0, -2) for logits in (student_logits, teacher_logits))
        if target is None:
            return self.term(student, teacher, **self.settings)
        known = target.flatten() != self.ignore_index
        student, teacher, target = student[known], teacher[known], target.flatten()[known]  # [rows, C], [rows]
        ce = F.cross_entropy(student.float() if student.dtype != torch.float64 else student, target)
        if target.numel() == 0:
            return ce
        extra = (target,) if self.labelled else ()
        return (1 - self.alpha) * ce + self.alpha * self.term(student, teacher, *extra, **self.settings)

    def extra_repr(self) -> str:
        name = next((name for name, term in LOGIT_LOSSES.items() if term is self.term), repr(self.term))
        return ", ".join([name, f"alpha={self.alpha}", *(f"{key}={value}" for key, value in self.settings.items())])

"""Several teachers as one.

    logits = T log( sum over teachers of w_i softmax(z_i / T) )

The student's gradient of T^2 KL(softmax(logits / T) || student) is that of sum w_i T^2 KL(teacher_i || student); the
losses differ by what no student can change, how much the teachers disagree. So every loss, cache and kernel for one
teacher serves several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .outputs import logits_of


class TeacherEnsemble(nn.Module):
    """Takes the place of the teacher in :class:`sparsekd.Distiller`.

    Args:
        teachers: at least one; each is given the same input and answers with logits ``[N, C, ...]`` (a tensor, an
            object with ``.logits``, or a tuple that starts with them).
        weights: at least 0, one for each teacher; scaled to a sum of 1. Equal by default.
        temperature: T, that of the loss.

    ``features`` of the Distiller name a teacher's module by its place: ``"teachers.0.layer3"``.

    Raises:
        TypeError, ValueError: arguments of other kinds; from the call, logits of different shapes.

    Source: You et al., "Learning from multiple teacher networks", KDD 2017, who average with equal weights.
    """

    def __init__(
        self, teachers: Iterable[nn.Module], weights: Iterable[float] | None = None, temperature: float = 4.0
    ) -> None:
        super().__init__()
        teachers = list(teachers)
        for teacher in teachers:
            if not isinstance(teacher, nn.Module):
                raise TypeError(f"Expected teachers to be torch.nn.Modules, got {type(teacher).__name__}")
        if not teachers:
            raise ValueError("Expected at least one teacher, got none")
        weights = [1.0] * len(teachers) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(teachers) or not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
            raise ValueError(f"Expected {len(teachers)} weights of at least 0 and not all 0, got {weights}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"Expected temperature to be positive and finite, got {temperature!r}")
        self.teachers, self.temperature = nn.ModuleList(teachers), float(temperature)
        self.weights = [weight / sum(weights) for weight in weights]

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        found = []
        for weight, teacher in zip(self.weights, self.teachers, strict=True):
            logits = logits_of(teacher(*args, **kwargs), "teacher")
            if found and logits.shape != found[0].shape:
                raise ValueError(
                    f"Expected logits of one shape from all teachers, got {tuple(found[0].shape)} and "
                    f"{tuple(logits.shape)}"
                )
            logits = logits if logits.dtype == torch.float64 else logits.float()
            log_share = math.log(weight) if weight else -math.inf
            found.append((logits / self.temperature).log_softmax(1) + log_share)
        return torch.logsumexp(torch.stack(found), 0) * self.temperature

    def extra_repr(self) -> str:
        return f"weights={self.weights}, temperature={self.temperature}"

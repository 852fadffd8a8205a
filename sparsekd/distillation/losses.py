"""The distillation loss, and the complexity penalty R(W) of the objective L(W', D') + lambda R(W')."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..sparse import ops


class KDLoss(nn.Module):
    """``(1 - alpha) * CE(student, target) + alpha * T^2 * KL(teacher || student)`` from raw logits, in one pass.

    CE averages over the rows that are not ignored, KL sums over classes and averages over rows; both see the same rows,
    unless ``distill_ignored`` lets the teacher speak on unlabelled ones too. T^2 keeps the teacher's share of the
    gradient independent of the temperature.

    Args:
        temperature: T > 0, softens both distributions.
        alpha: weight of the teacher's term, in [0, 1].
        ignore_index: target of rows without a label.
        label_smoothing: of CE alone, in [0, 1].
        distill_ignored: KL keeps the rows with ``ignore_index``.

    Call it with student logits and teacher logits ``[N, C]`` or ``[N, C, d1, ...]`` and int64 targets ``[N]`` or
    ``[N, d1, ...]`` (None needs alpha = 1); it gives a float32 scalar (float64 for float64 logits). Teacher logits take
    no gradient. Errors as in :func:`sparsekd.sparse.ops.kd_loss`.

    Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.5,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        distill_ignored: bool = False,
    ) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"Expected a finite temperature > 0, got {temperature}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"Expected alpha in [0, 1], got {alpha}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"Expected label_smoothing in [0, 1], got {label_smoothing}")
        self.temperature, self.alpha = float(temperature), float(alpha)
        self.ignore_index, self.label_smoothing = ignore_index, float(label_smoothing)
        self.distill_ignored = distill_ignored

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return ops.kd_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            alpha=self.alpha,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            distill_ignored=self.distill_ignored,
        )

    def extra_repr(self) -> str:
        said = f"temperature={self.temperature}, alpha={self.alpha}"
        if self.label_smoothing:
            said += f", label_smoothing={self.label_smoothing}"
        return said + (", distill_ignored=True" if self.distill_ignored else "")


WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def weights_of(model: nn.Module) -> Iterator[Tensor]:
    """The weights of convolutions and linear layers (packed values of sparse ones), not biases or norms; each once."""
    seen: set[int] = set()
    for module in model.modules():
        weight = module.weight if isinstance(module, WEIGHTED) else module._parameters.get("values")
        if weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            yield weight


def l1(model: nn.Module) -> Tensor:
    """R(W) = sum |w|."""
    return _total(weight.abs().sum() for weight in weights_of(model))


def l2(model: nn.Module) -> Tensor:
    """R(W) = sum w^2."""
    return _total(weight.square().sum() for weight in weights_of(model))


def _total(terms: Iterator[Tensor]) -> Tensor:
    found = list(terms)
    if not found:
        raise ValueError("Expected a model with convolutions or linear layers to penalise, got none")
    return torch.stack(found).sum()


PENALTIES = {"l1": l1, "l2": l2}


def penalty(name: str | Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    """R(W) by name ("l1", "l2"), or any callable from the model to a scalar."""
    if isinstance(name, str):
        if name not in PENALTIES:
            raise ValueError(f"Expected penalty to be one of {', '.join(PENALTIES)} or a callable, got {name!r}")
        return PENALTIES[name]
    if not callable(name):
        raise TypeError(f"Expected penalty to be a name or a callable, got {name!r}")
    return name

"""Both terms of the objective L(W) + penalty_weight * R(W): the distillation loss L and the weight penalty R.

L = (1 - alpha) * CE(student, target) + alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T))
R = sum |w|  ("l1"),   sum w^2  ("l2")   or   sum over V x 1 vectors of sqrt(V) |vector|  ("group_lasso")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Real

from torch import Tensor, nn

from ..sparse import ops


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Expected {name} to be a number, got {value!r}")
    return float(value)


class KDLoss(nn.Module):
    """Cross entropy with the labels, mixed with the divergence from the teacher's softened distribution.

    KL sums over classes and averages over rows ("batchmean"; over all positions for ``[N, C, d1, ...]``), CE averages
    over the labelled rows. The factor T^2 keeps the size of the teacher's gradient the same at every temperature.

    Args:
        temperature: T > 0; softens the distributions of both networks, in KL alone.
        alpha: weight of the teacher's term, in [0, 1]; 0 is plain cross entropy, 1 needs no labels.
        ignore_index: the target of rows without a label; such rows are out of both terms.
        label_smoothing: of CE alone, in [0, 1].
        distill_ignored: keep unlabelled rows in KL, so that the teacher speaks where no label does.

    Call it with
        student_logits: ``[N, C]`` or ``[N, C, d1, ...]``, any floating dtype.
        teacher_logits: of the same shape, any floating dtype; takes no gradient.
        target: int64 ``[N]`` or ``[N, d1, ...]``; None needs alpha = 1.

    It returns a scalar, float64 for float64 student logits and float32 otherwise. It is NaN when no row is labelled, as
    torch's cross entropy is, unless ``distill_ignored`` leaves rows to distil.

    Raises:
        ValueError, TypeError: settings out of their range, logits or targets that don't fit.
        IndexError: a target that is neither a class nor ``ignore_index``.

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
        self.temperature = _number("temperature", temperature)
        self.alpha = _number("alpha", alpha)
        self.label_smoothing = _number("label_smoothing", label_smoothing)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"Expected temperature to be positive and finite, got {temperature}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"Expected alpha in [0, 1], got {alpha}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"Expected label_smoothing in [0, 1], got {label_smoothing}")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"Expected ignore_index to be an int, got {ignore_index!r}")
        self.ignore_index = ignore_index
        self.distill_ignored = bool(distill_ignored)

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
        parts = [f"temperature={self.temperature}", f"alpha={self.alpha}"]
        if self.ignore_index != -100:
            parts.append(f"ignore_index={self.ignore_index}")
        if self.label_smoothing:
            parts.append(f"label_smoothing={self.label_smoothing}")
        if self.distill_ignored:
            parts.append("distill_ignored=True")
        return ", ".join(parts)


# --- penalties -------------------------------------------------------------------------------------------------------

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Weights of convolutions and linear layers, packed values of sparse ones; a shared weight counts once."""
    seen: list[Tensor] = []
    for module in model.modules():
        weight = module._parameters.get("values")
        if weight is None and isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
            weight = module.weight
        if weight is not None and not any(weight is other for other in seen):
            seen.append(weight)
            yield weight


def _summed(model: nn.Module, of_weight: Callable[[Tensor], Tensor]) -> Tensor:
    terms = [of_weight(weight) for weight in _weights(model)]
    if not terms:
        raise ValueError("Expected a model with convolutions or linear layers to penalise, got none")
    return sum(terms[1:], start=terms[0])


def _l1(model: nn.Module) -> Tensor:
    """sum |w|"""
    return _summed(model, lambda weight: weight.abs().sum())


def _l2(model: nn.Module) -> Tensor:
    """sum w^2"""
    return _summed(model, lambda weight: weight.square().sum())


def group_lasso(vector: int = 4) -> Callable[[nn.Module], Tensor]:
    """sum over V x 1 vectors of sqrt(V) * |vector|_2: weights of V output channels at one column grow or go together.

    Vectors are those of the packed format: consecutive output channels within a convolution group, the last of which
    may have fewer. Of a packed layer they are its own. At a vector of zeros the gradient is zero.

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006.
    """
    if isinstance(vector, bool) or not isinstance(vector, int) or vector < 1:
        raise ValueError(f"Expected vector to be a whole number of at least 1, got {vector!r}")

    def of_model(model: nn.Module) -> Tensor:
        groups = {id(m.weight): m for m in model.modules() if isinstance(m, _CONVOLUTIONS)}

        def of_weight(weight: Tensor) -> Tensor:
            module = groups.get(id(weight))
            convolution_groups = 1 if module is None else module.groups
            if isinstance(module, _CONVOLUTIONS[3:]):  # transposed: [C, K/g, ...]
                parts = weight.view(convolution_groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(2)
            else:
                parts = weight.reshape(convolution_groups, weight.shape[0] // convolution_groups, -1)
            pad = -parts.shape[1] % vector
            parts = nn.functional.pad(parts, (0, 0, 0, pad)).unflatten(1, (-1, vector))  # [g, row groups, V, columns]
            sizes = parts.new_full((parts.shape[1], 1), math.sqrt(vector))
            sizes[-1] = math.sqrt(vector - pad)
            return (parts.norm(dim=2) * sizes).sum()

        packed = [m.values for m in model.modules() if m._parameters.get("values") is not None]
        plain = _summed(model, lambda w: w.sum() * 0 if any(w is p for p in packed) else of_weight(w))
        return plain + sum(math.sqrt(values.shape[1]) * values.norm(dim=1).sum() for values in packed)

    return of_model


_PENALTIES = {"l1": _l1, "l2": _l2, "group_lasso": group_lasso()}


def penalty(name_or_callable: str | Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    """R(W) as a function from the model to a scalar.

    Args:
        name_or_callable: "l1" (sum of |w|), "l2" (sum of w^2) or "group_lasso" (:func:`group_lasso`, V = 4) over the
            weights of convolutions and linear layers, biases and normalisations left out; or any callable, which is
            returned as it is.

    Raises:
        ValueError: an unknown name; from the function, a model without such weights. TypeError: neither of the two.
    """
    if isinstance(name_or_callable, str):
        if name_or_callable not in _PENALTIES:
            raise ValueError(f"Expected penalty to be {', '.join(_PENALTIES)} or a callable, got {name_or_callable!r}")
        return _PENALTIES[name_or_callable]
    if not callable(name_or_callable):
        raise TypeError(f"Expected penalty to be a name or a callable, got {type(name_or_callable).__name__}")
    return name_or_callable

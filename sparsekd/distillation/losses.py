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


class LinearKDLoss(nn.Module):
    """:class:`KDLoss` of two heads, from what goes into them: neither network's logits are ever in memory as a whole.

    For many classes (language models) and many rows (segmentation, where each pixel is one) the logits, their
    log-softmax and gradients are what memory goes to. Here they are made a chunk of rows at a time, with the gradients
    of the student's hidden states and head.

    Args:
        divergence: "forward_kl" (that of :class:`KDLoss`), "reverse_kl" or "jsd"; see
            :func:`sparsekd.sparse.ops.linear_kd_loss`.
        beta: of "jsd", in (0, 1).
        chunk_rows: rows at a time; None: as many as take an eighth of the memory of inputs and gradients.
        The others as in :class:`KDLoss`.

    Call it with
        student_hidden: what the student's head takes: ``[..., features]``, or ``[N, features, ...]`` for a convolution.
        student_head: ``nn.Linear``, or a 1 x 1 convolution without stride, padding and groups.
        teacher_hidden, teacher_head: the same of the teacher; take no gradient.
        target: int64 of the hidden states' shape without the features; None needs alpha = 1.

    It returns a scalar. In place of ``loss(student(x), teacher(x), target)``::

        loss = LinearKDLoss(temperature=2.0)
        loss(student.features(x), student.head, teacher.features(x), teacher.head, target)

    Raises:
        ValueError, TypeError, IndexError: as :class:`KDLoss`, and for heads that are neither of the two.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.5,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        distill_ignored: bool = False,
        chunk_rows: int | None = None,
    ) -> None:
        super().__init__()
        checked = KDLoss(temperature, alpha, ignore_index, label_smoothing, distill_ignored)
        if divergence not in ("forward_kl", "reverse_kl", "jsd"):
            raise ValueError(f"Expected divergence to be forward_kl, reverse_kl or jsd, got {divergence!r}")
        if not 0 < _number("beta", beta) < 1:
            raise ValueError(f"Expected beta in (0, 1), got {beta}")
        if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int)):
            raise TypeError(f"Expected chunk_rows to be an int or None, got {chunk_rows!r}")
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"Expected chunk_rows of at least 1, got {chunk_rows}")
        self.settings = dict(
            temperature=checked.temperature,
            alpha=checked.alpha,
            divergence=divergence,
            beta=float(beta),
            ignore_index=checked.ignore_index,
            label_smoothing=checked.label_smoothing,
            distill_ignored=checked.distill_ignored,
            chunk_rows=chunk_rows,
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_head: nn.Module,
        teacher_hidden: Tensor,
        teacher_head: nn.Module,
        target: Tensor | None = None,
    ) -> Tensor:
        weight, of_maps = _weight_of_head("student_head", student_head)
        teacher_weight, teacher_of_maps = _weight_of_head("teacher_head", teacher_head)
        if of_maps != teacher_of_maps:
            raise ValueError("Expected two linear heads or two convolutions, got one of each")
        return ops.linear_kd_loss(
            student_hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            target,
            student_bias=student_head.bias,
            teacher_bias=teacher_head.bias,
            features_dim=1 if of_maps else -1,
            **self.settings,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _weight_of_head(name: str, head: nn.Module) -> tuple[Tensor, bool]:
    """``[classes, features]``, and whether the head works on maps."""
    if isinstance(head, nn.Linear):
        return head.weight, False
    if not isinstance(head, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise TypeError(f"Expected {name} to be nn.Linear or a 1 x 1 convolution, got {type(head).__name__}")
    plain = (set(head.kernel_size), set(head.stride), head.groups) == ({1}, {1}, 1)
    if not plain or (head.padding not in ("same", "valid") and any(head.padding)):
        raise ValueError(f"Expected {name} to be a 1 x 1 convolution without stride, padding and groups, got {head}")
    return head.weight.flatten(1), True


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

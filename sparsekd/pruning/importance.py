"""How much each weight matters. The weights with the lowest scores go.

An importance is a name of :data:`IMPORTANCES` or a callable::

    importance(name, weight, gradient) -> scores

``name`` is the parameter's name, ``weight`` the detached weight, ``gradient`` the mean over batches of |dL/dw|, both of
the weight's shape, as the scores must be. A callable that does without gradients sets ``needs_gradient = False`` on
itself and is given None; one that wants another mean sets ``statistic`` to a name of :data:`STATISTICS`. Under a
schedule the mean is over the batches since the last update; one that wants those before it too sets ``cumulative =
True``. When what is asked for is missing, that is an error, never another criterion.

A batch's gradient is that of its loss, so a mean over its samples where the loss is one. The loss may be any, that of
distillation too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .gatherers import STATISTICS
from .sharding import is_distributed, whole

Importance = Callable[[str, Tensor, "Tensor | None"], Tensor]


class GradientImportance:
    """Mean over batches of |dL/dw|: the loss hardly notices a weight that it is flat in.

    Source: sensitivity of the loss to single weights, as in Karnin, "A simple procedure for pruning back-propagation
    trained neural networks", 1990; here the mean of absolute values over batches.
    """

    needs_gradient = True

    def __call__(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient


class MagnitudeImportance:
    """|w|. Source: Han et al., "Learning both weights and connections for efficient neural networks", 2015."""

    needs_gradient = False

    def __call__(self, name: str, weight: Tensor, gradient: None) -> Tensor:
        return weight.abs()


class TaylorImportance:
    """Mean over batches of |w dL/dw|: by how much the loss changes, to first order, when the weight goes.

    Source: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019 (who square it).
    """

    statistic = "|w g|"

    def __call__(self, name: str, weight: Tensor, statistic: Tensor) -> Tensor:
        return statistic


class SNIPImportance:
    """|mean over batches of w dL/dw|. Source: Lee et al., "SNIP: single-shot network pruning", ICLR 2019."""

    statistic = "w g"

    def __call__(self, name: str, weight: Tensor, statistic: Tensor) -> Tensor:
        return statistic.abs()


class MovementImportance:
    """-(mean over batches of w dL/dw): high where training moves a weight away from zero, negative where towards it.

    Under a schedule the mean is over all batches so far: over the few between two updates it is mostly noise.

    Source: Sanh, Wolf, Rush, "Movement pruning: adaptive sparsity by fine-tuning", NeurIPS 2020.
    """

    statistic = "w g"
    cumulative = True

    def __call__(self, name: str, weight: Tensor, statistic: Tensor) -> Tensor:
        return -statistic


class FisherImportance:
    """w^2 / 2 times the mean over batches of (dL/dw)^2, the diagonal of the empirical Fisher matrix.

    The saliency of LeCun, Denker, Solla, "Optimal brain damage", NIPS 1989, with the curvature so estimated (Theis et
    al., 2018). The mean is over batches; those of one sample give the Fisher matrix itself, larger ones less.
    """

    statistic = "g^2"

    def __call__(self, name: str, weight: Tensor, statistic: Tensor) -> Tensor:
        return weight.to(statistic.dtype).square() * statistic / 2


class WandaImportance:
    """|w| times the root mean square of the inputs that it meets. No gradients are needed, forwards are enough.

    Source: Sun et al., "A simple and effective pruning approach for large language models", ICLR 2024, who compare
    weights within an output channel and take the norm over all tokens; here the budget says who competes.
    """

    statistic = "x^2"

    def __call__(self, name: str, weight: Tensor, statistic: Tensor) -> Tensor:
        return weight.abs().to(statistic.dtype) * statistic.sqrt()


class RandomImportance:
    """Uniform scores, the baseline of every criterion.

    They depend on the seed, the name and the shape only: not on torch's global seed (which differs between ranks), nor
    on how often they were asked for, so that there is nothing to save for a resume.
    """

    needs_gradient = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, name: str, weight: Tensor, gradient: None) -> Tensor:
        # A hash of both, as the CPU's generator takes in 32 bits of a seed only.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return torch.rand(weight.shape, generator=generator).to(weight.device)


IMPORTANCES: dict[str, Callable[[], Importance]] = {
    "gradient": GradientImportance,
    "magnitude": MagnitudeImportance,
    "random": RandomImportance,
    "taylor": TaylorImportance,
    "snip": SNIPImportance,
    "movement": MovementImportance,
    "fisher": FisherImportance,
    "wanda": WandaImportance,
}


def statistic_of(importance: Importance) -> str | None:
    """What an importance has to be given, None for nothing; ValueError for an unknown statistic."""
    statistic = getattr(importance, "statistic", "|g|" if getattr(importance, "needs_gradient", True) else None)
    if statistic is not None and statistic != "x^2" and statistic not in STATISTICS:
        known = ", ".join(map(repr, (*STATISTICS, "x^2")))
        raise ValueError(f"Expected the statistic of an importance to be one of {known} or None, got {statistic!r}")
    return statistic


def find_importance(importance: str | Importance) -> Importance:
    """The criterion of a name, or the callable itself; ValueError for anything else."""
    if isinstance(importance, str) and importance in IMPORTANCES:
        return IMPORTANCES[importance]()
    if isinstance(importance, (str, type)) or not callable(importance):
        names = ", ".join(map(repr, IMPORTANCES))
        raise ValueError(f"Expected importance to be one of {names} or a callable, got {importance!r}")
    return importance


def score(importance: Importance, weights: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor] | None) -> dict:
    """Parameter name to scores in float32 (float64 of float64), the same on every rank.

    Raises:
        ValueError: a callable returns anything but scores of the weight's shape.
    """
    scores = {}
    for name, weight in weights.items():
        weight = whole(weight.detach())
        values = importance(name, weight, None if gradients is None else gradients[name])
        shape = tuple(weight.shape)
        if not isinstance(values, Tensor) or values.shape != weight.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"Expected scores of shape {shape} for {name}, got {got}")
        values = values.detach().to(weight.device, torch.float64 if values.dtype == torch.float64 else torch.float32)
        # -inf is the mark of what is pruned already; no other weight may tie with it.
        scores[name] = values.clamp(min=torch.finfo(values.dtype).min)
        if is_distributed():
            scores[name] = scores[name].contiguous()
            if type(importance) not in IMPORTANCES.values():
                # A callable may look at data of its own rank.
                dist.all_reduce(scores[name])
            dist.broadcast(scores[name], src=0)
    return scores

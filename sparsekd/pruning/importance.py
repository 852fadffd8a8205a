"""How much each weight matters. A criterion takes a weight and what was gathered for it, and gives scores of its shape.

    criterion(weight, gradient) -> scores

``gradient`` is the mean over batches of |dL/dw| (None for criteria whose ``needs_gradients`` is False). The lowest
scores are pruned. Any callable of this form will do; set ``needs_gradients = True`` on it when it uses the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Criterion = Callable[[Tensor, "Tensor | None"], Tensor]


class GradientImportance:
    """Mean over batches of |dL/dw|: a weight to which the loss is insensitive may go.

    Source: the sensitivity of Karnin, "A simple procedure for pruning back-propagation trained neural networks", IEEE
    Transactions on Neural Networks, 1990, taken as a mean of absolute values over batches.
    """

    needs_gradients = True

    def __call__(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            raise RuntimeError("Expected gathered gradients for importance 'gradient', got none")
        return gradient


class MagnitudeImportance:
    """|w| (Han et al., "Learning both weights and connections for efficient neural networks", NeurIPS 2015)."""

    needs_gradients = False

    def __call__(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return weight.detach().abs()


class RandomImportance:
    """Uniform scores from a seed of their own: the same on every process, whatever torch's global seed is."""

    needs_gradients = False

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return torch.rand(weight.shape, generator=self.generator).to(weight.device)


IMPORTANCES: dict[str, Callable[[], Criterion]] = {
    "gradient": GradientImportance,
    "magnitude": MagnitudeImportance,
    "random": RandomImportance,
}


def criterion_of(importance: str | Criterion) -> Criterion:
    """The criterion of a name, or the callable itself."""
    if isinstance(importance, str):
        if importance not in IMPORTANCES:
            raise ValueError(f"Expected importance to be one of {', '.join(IMPORTANCES)}, got {importance!r}")
        return IMPORTANCES[importance]()
    if isinstance(importance, type) or not callable(importance):
        raise TypeError(f"Expected importance to be a name or a callable, got {importance!r}")
    return importance

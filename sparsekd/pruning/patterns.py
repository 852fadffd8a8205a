"""What shape the holes have: scores and a number of weights to prune, to a mask (True = keep)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def unstructured(scores: Tensor, count: int) -> Tensor:
    """Prunes the ``count`` lowest scores, wherever they are; among equals the first in memory goes first."""
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.argsort(scores.flatten(), stable=True)[:count]] = False
    return mask.view(scores.shape)


PATTERNS: dict[str, Callable[[Tensor, int], Tensor]] = {"unstructured": unstructured}


def pattern_of(name: str) -> Callable[[Tensor, int], Tensor]:
    if name not in PATTERNS:
        raise ValueError(f"Expected pattern to be one of {', '.join(PATTERNS)}, got {name!r}")
    return PATTERNS[name]

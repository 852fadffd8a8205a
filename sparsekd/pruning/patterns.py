"""Which shape the holes take: from scores and a number of weights to prune, to a mask (True = keep).

A pattern is a function ``pattern(scores, count) -> mask``; :data:`PATTERNS` names those that the Pruner knows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pattern = Callable[[Tensor, int], Tensor]


def lowest(scores: Tensor, count: int) -> Tensor:
    """Marks the ``count`` lowest scores; among equal scores those that come first in row-major order.

    The same choice as a stable sort makes, in linear time on the CPU.

    Args:
        scores: any shape, without NaN.
        count: how many to mark; less than 0 counts as 0, more than there are as all.

    Returns:
        A bool tensor of the shape of ``scores`` with exactly ``count`` True.
    """
    flat = scores.flatten()  # [n]
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if flat.device.type == "cpu":
        threshold = flat.kthvalue(count).values
    else:
        # kthvalue raises on CUDA under torch.use_deterministic_algorithms; a sort is fast enough there.
        threshold = flat.sort().values[count - 1]
    marked = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    marked[ties[: count - int(marked.sum())]] = True
    return marked.view(scores.shape)


def unstructured(scores: Tensor, count: int) -> Tensor:
    """Prunes the ``count`` lowest scores wherever they are. Ties: see :func:`lowest`.

    Args:
        scores: of the weight's shape, ``[out, in, *kernel]`` or ``[out, in]``.
        count: how many weights to prune.

    Returns:
        The mask, a bool tensor of the shape of ``scores``, True = keep.
    """
    return ~lowest(scores, count)


PATTERNS: dict[str, Pattern] = {"unstructured": unstructured}


def find_pattern(pattern: str) -> Pattern:
    """The function of a name; ValueError for an unknown one."""
    if not isinstance(pattern, str) or pattern not in PATTERNS:
        raise ValueError(f"Expected pattern to be one of {', '.join(map(repr, PATTERNS))}, got {pattern!r}")
    return PATTERNS[pattern]

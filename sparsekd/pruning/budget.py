"""How many weights go in which layer.

    "global"           the lowest scores of all layers together
    "uniform"          the same sparsity in every layer
    {glob: sparsity}   this sparsity in the layers whose name matches (the last match wins), ``sparsity`` in the others
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import torch
from torch import Tensor

BUDGETS = ("global", "uniform")


def check_sparsity(sparsity: float, meaning: str = "sparsity") -> float:
    """Raises unless 0 <= sparsity < 1 (the fraction removed)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"Expected {meaning} to be a number in [0, 1), got {sparsity!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"Expected {meaning} in [0, 1), got {sparsity}")
    return float(sparsity)


def check_budget(budget: str | Mapping[str, float], names: list[str]) -> None:
    """Raises for an unknown budget, a sparsity out of range or a glob that matches no layer."""
    if isinstance(budget, Mapping):
        for glob, sparsity in budget.items():
            check_sparsity(sparsity, f"sparsity of {glob!r}")
            if not fnmatch.filter(names, glob):
                raise ValueError(f"Expected {glob!r} to match a prunable layer, got none of {', '.join(names)}")
    elif budget not in BUDGETS:
        raise ValueError(f"Expected budget to be one of {', '.join(BUDGETS)} or a dict of globs, got {budget!r}")


def layer_sparsities(names: list[str], sparsity: float, budget: Mapping[str, float]) -> dict[str, float]:
    """The sparsity of each layer under a budget by globs."""
    found = {}
    for name in names:
        found[name] = sparsity
        for glob, value in budget.items():
            if fnmatch.fnmatchcase(name, glob):
                found[name] = value
    return found


def prune_counts(
    scores: Mapping[str, Tensor], sparsity: float, budget: str | Mapping[str, float], progress: float = 1.0
) -> dict[str, int]:
    """How many weights each layer loses: round(sparsity * n) exactly, in all or per layer.

    Args:
        scores: layer name to scores; the weights that are already pruned have the lowest.
        sparsity: of this moment.
        budget: see above.
        progress: how far a schedule has come, 0..1, by which sparsities given per layer are scaled.
    """
    for name, values in scores.items():
        if bool(torch.isnan(values).any()):
            raise ValueError(f"Expected scores without NaN, got {int(torch.isnan(values).sum())} of them in {name}")
    names = list(scores)
    if isinstance(budget, Mapping):
        targets = {
            name: value * progress if any(fnmatch.fnmatchcase(name, glob) for glob in budget) else value
            for name, value in layer_sparsities(names, sparsity, budget).items()
        }
        return {name: round(targets[name] * scores[name].numel()) for name in names}
    if budget == "uniform":
        return {name: round(sparsity * scores[name].numel()) for name in names}
    flat = torch.cat([scores[name].flatten().float() for name in names])
    lowest = torch.argsort(flat, stable=True)[: round(sparsity * flat.numel())]
    owner = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([scores[name].numel() for name in names]))
    counts = torch.bincount(owner.to(lowest.device)[lowest], minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))

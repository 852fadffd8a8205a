"""How many weights each layer loses.

==================== =================================================================================================
``"global"``          all prunable weights compete: round(sparsity * n) of them go, wherever their scores are lowest
``"uniform"``         each layer loses round(sparsity * n) of its own weights
``{glob: sparsity}``  each layer loses the fraction given for its name; of several matching globs the last one counts;
                      layers that no glob matches stay dense, and the Pruner's ``sparsity`` is not used
==================== =================================================================================================

Globs match the layer's name (``layer1.0.conv1``) or its parameter's (``layer1.0.conv1.weight``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from numbers import Real

import torch
from torch import Tensor

from .patterns import lowest

BUDGETS = ("global", "uniform")


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Returns ``sparsity``, the fraction removed; TypeError when it is no number, ValueError outside [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise TypeError(f"Expected {name} to be a number in [0, 1), got {sparsity!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"Expected {name} in [0, 1), got {sparsity}")
    return float(sparsity)


def matches(parameter: str, glob: str) -> bool:
    """Whether a glob matches a parameter's name or that of the layer that owns it."""
    return fnmatchcase(parameter, glob) or fnmatchcase(parameter.rpartition(".")[0], glob)


class Budget:
    """Distributes a sparsity over layers.

    Args:
        budget: "global", "uniform" or a mapping from name globs to sparsities.
        sparsity: of all prunable weights; a mapping brings its own.
        sizes: parameter name to its number of weights.

    Raises:
        TypeError: a sparsity is no number.
        ValueError: an unknown budget, a sparsity outside [0, 1), a glob that matches no prunable layer.
    """

    def __init__(self, budget: str | Mapping[str, float], sparsity: float, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.sparsity = check_sparsity(sparsity)
        self.layers: dict[str, float] | None = None  # final sparsity of each layer; None: they compete
        if isinstance(budget, Mapping):
            self.layers = dict.fromkeys(self.sizes, 0.0)
            for glob, value in budget.items():
                value = check_sparsity(value, f"sparsity of {glob!r}")
                found = [name for name in self.sizes if matches(name, glob)]
                if not found:
                    known = ", ".join(self.sizes)
                    raise ValueError(f"Expected budget globs that match a prunable layer, got {glob!r} for {known}")
                self.layers.update(dict.fromkeys(found, value))
        elif budget == "uniform":
            self.layers = dict.fromkeys(self.sizes, self.sparsity)
        elif budget != "global":
            names = ", ".join(map(repr, BUDGETS))
            raise ValueError(f"Expected budget to be one of {names} or a dict of name globs, got {budget!r}")

    def total(self, at: Callable[[float], float] = float) -> int:
        """How many weights go in all; ``at`` maps a final sparsity to that of the moment (a schedule)."""
        if self.layers is None:
            return round(at(self.sparsity) * sum(self.sizes.values()))
        return sum(round(at(self.layers[name]) * size) for name, size in self.sizes.items())

    def counts(self, scores: Mapping[str, Tensor], at: Callable[[float], float] = float) -> dict[str, int]:
        """How many weights each layer loses.

        Args:
            scores: parameter name to scores; -inf where a weight is pruned already.
            at: maps a final sparsity to that of the moment.

        Raises:
            ValueError: scores are NaN, which no order has a place for.
        """
        for name, values in scores.items():
            missing = int(values.isnan().sum())
            if missing:
                raise ValueError(f"Expected scores without NaN, got {missing} of {values.numel()} NaN in {name}")
        if self.layers is not None:
            return {name: round(at(self.layers[name]) * size) for name, size in self.sizes.items()}
        # Layers may lie on several devices.
        device = next(iter(scores.values())).device
        together = torch.cat([scores[name].flatten().to(device) for name in self.sizes])
        parts = lowest(together, self.total(at)).split(list(self.sizes.values()))
        return {name: int(part.sum()) for name, part in zip(self.sizes, parts, strict=True)}

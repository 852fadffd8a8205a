"""The cells of ``accuracy.py``: what is compared, and in which order it is run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

GRID = ("unstructured", "4x1", "4x1-permuted", "8x1-permuted")
WIDE = ("16x1", "16x1-permuted")
FIXED = (("2:4", 0.5), ("4:2:10", 0.8), ("4:2:20", 0.9))
SPARSITIES = {"shapes": (0.8, 0.9, 0.95), "digits": (0.9,)}
IMPORTANCES = ("magnitude", "gradient")


@dataclass(frozen=True)
class Settings:
    """What all cells of one set of images have in common."""

    images: int  # that students see, of the training images
    teacher_epochs: int
    dense_epochs: int
    epochs: int  # after the dense ones: pruned over the first half of the steps, then retrained
    width: int = 20
    teacher_width: int = 40
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    temperature: float = 4.0
    alpha: float = 0.7


SETTINGS = {
    "shapes": Settings(images=18000, teacher_epochs=6, dense_epochs=4, epochs=2),
    "digits": Settings(images=1348, teacher_epochs=12, dense_epochs=12, epochs=6),
}


@dataclass(frozen=True)
class Recipe:
    """How a cell is trained where that is not by the Settings."""

    epochs: int = 1  # times those of the Settings
    prune_until: float = 0.5  # fraction of the steps after which the last mask is made
    lr: float | None = None
    weight_decay: float | None = None
    alpha: float | None = None
    temperature: float | None = None


RECIPES = {"": Recipe(), "long": Recipe(epochs=3)}


@dataclass(frozen=True)
class Cell:
    """One training: what is pruned, by what, and how."""

    pattern: str = "unstructured"
    sparsity: float = 0.9
    importance: str = "magnitude"
    distilled: bool = True
    budget: str = "erk"
    schedule: str = "cubic"  # "once": all weights go before the first step
    lasso: int = 0  # V of a group lasso over consecutive V x 1 vectors until the last mask is made; 0: none
    recipe: str = ""  # in RECIPES

    @property
    def name(self) -> str:
        parts = [self.pattern.replace(":", ".")]
        parts += [] if self.pattern == "dense" else [f"{100 * self.sparsity:g}", self.importance]
        parts += [self.budget] if self.budget != Cell.budget else []
        parts += [self.schedule] if self.schedule != Cell.schedule else []
        parts += [f"lasso{self.lasso}"] if self.lasso else []
        parts += [self.recipe] if self.recipe else []
        parts += ["distilled"] if self.distilled else []
        return "-".join(parts)

    @property
    def plain(self) -> Cell:
        """The same pattern, sparsity, importance and teacher by the recipe of the grid."""
        return replace(self, budget=Cell.budget, schedule=Cell.schedule, lasso=0, recipe="")


def dense(distilled: bool, recipe: str = "") -> Cell:
    return Cell("dense", 0.0, "none", distilled, recipe=recipe)


def globally() -> tuple[Cell, Cell]:
    """By the search's budget; trained longer they are the best recipe."""
    return Cell(budget="global"), Cell("4x1-permuted", budget="global")


def stages(name: str) -> list[list[Cell]]:
    """Cells in the order of what they tell; a stage is run for all seeds before the next."""
    both = (True, False)
    grid = {
        sparsity: [
            Cell(pattern, sparsity, importance, taught)
            for taught in both
            for importance in IMPORTANCES
            for pattern in GRID
        ]
        for sparsity in SPARSITIES[name]
    }
    if name != "shapes":
        return [[dense(taught) for taught in both] + grid[0.9]]
    first = [dense(taught) for taught in both]
    first += [Cell(pattern, distilled=taught) for taught in both for pattern in (*GRID[:3], *WIDE)]
    budgets = [Cell(sparsity=0.95, budget=budget) for budget in ("erk", "uniform", "global")]
    best = [dense(True, "long"), *(replace(cell, recipe="long") for cell in globally())]
    ways = [Cell("4x1", lasso=4), Cell("16x1", lasso=16)]
    ways += [Cell(pattern, schedule="once") for pattern in (*GRID[:3], *WIDE)]
    fixed = [
        Cell(pattern, sparsity, importance, taught)
        for taught in both
        for importance in IMPORTANCES
        for pattern, sparsity in FIXED
    ]
    budgets_by_gradient = [replace(cell, importance="gradient") for cell in budgets]
    others = [Cell(pattern, importance=i) for i in ("taylor", "movement") for pattern in GRID[::2]]
    others += [*budgets_by_gradient, *(Cell(pattern, importance="gradient", schedule="once") for pattern in GRID[:2])]
    listed = [first, list(globally()), budgets, best, ways, grid[0.9], fixed[:3], grid[0.95], grid[0.8], fixed, others]
    seen: set[Cell] = set()
    return [[cell for cell in stage if not (cell in seen or seen.add(cell))] for stage in listed]


def cells(name: str) -> list[Cell]:
    return [cell for stage in stages(name) for cell in stage]


def ordered(name: str, seeds: Iterable[int]) -> list[tuple[Cell, int]]:
    seeds = list(seeds)
    return [(cell, seed) for stage in stages(name) for seed in seeds for cell in stage]

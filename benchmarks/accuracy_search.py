"""Which recipe is best at 90%: one thing at a time is changed, judged by images that are neither trained on nor tested.

    python benchmarks/accuracy_search.py

Starts from the dense student of seed 0 that ``accuracy.py`` made. The images that judge are drawn by the generator of
shapes from another seed, 6,000 of them (standard error a third of a point), so that students may see all training
images and neither they nor the teacher has seen one of these. One JSON a trial in
``benchmarks/results/accuracy/search``; what came out of it is in ``accuracy_cells.py`` and has cells of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from accuracy import RESULTS, Bench
from accuracy_cells import RECIPES, Cell, Recipe, dense

from sparsekd import data

JUDGES = 6000
CHANGES = {
    "alpha1": Recipe(alpha=1.0),
    "alpha0.9": Recipe(alpha=0.9),
    "decay1e-4": Recipe(weight_decay=1e-4),
    "lr0.1": Recipe(lr=0.1),
    "until0.75": Recipe(prune_until=0.75),
    "until0.25": Recipe(prune_until=0.25),
    "temperature2": Recipe(temperature=2.0),
    "long": RECIPES["long"],
}


class Search(Bench):
    def __init__(self, results: Path, runs: Path) -> None:
        super().__init__("shapes", results, runs)
        self.trials = results / "search"
        self.trials.mkdir(parents=True, exist_ok=True)
        self.teacher(), self.student(0)  # before the judges: what is written of them is by test images
        drawn = data.load("shapes", seed=1)
        self.test = data.Loader(drawn.train_images[:JUDGES], drawn.train_labels[:JUDGES], 256)

    def path(self, name: str) -> Path:
        """Trials have a folder of their own beside the models that they start from."""
        dense = name == "teacher" or name.startswith("student-")
        return super().path(name) if dense else self.trials / f"{name}.json"


def trials() -> list[Cell]:
    """Budgets, then everything else one at a time under a global one."""
    tried = [dense(True)]
    for budget in ("global", "erk"):
        tried += [Cell(pattern, budget=budget) for pattern in ("unstructured", "4x1-permuted")]
    tried += [Cell(importance=importance, budget="global") for importance in ("taylor", "gradient")]
    tried += [Cell("4x1-permuted", budget="global", recipe="alpha1"), dense(True, "alpha1")]
    tried += [Cell(budget="global", recipe=change) for change in CHANGES]
    tried += [Cell("4x1-permuted", budget="global", recipe="long"), dense(True, "long")]
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    args = parser.parse_args()
    RECIPES.update(CHANGES)
    search = Search(args.out, args.runs)
    teacher = search.teacher()
    for cell in trials():
        if not search.path(f"{cell.name}-0").exists():
            search.run(cell, 0, teacher)


if __name__ == "__main__":
    main()

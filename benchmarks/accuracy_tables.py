"""The tables and plots of ``accuracy.py``, out of the JSON files of its cells."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

from accuracy_cells import FIXED, GRID, IMPORTANCES, SETTINGS, SPARSITIES, Cell, cells, dense, globally

from sparsekd.measure.report import write_text

Found = dict[str, dict[int, float]]  # name of a cell, "teacher" or "student" -> seed -> accuracy in percent


def read(name: str, folder: Path) -> Found:
    found: Found = {}
    for file in sorted((folder / name).glob("*.json")):
        cell, _, seed = file.stem.rpartition("-")
        accuracy = 100 * json.loads(file.read_text())["accuracy"]
        found.setdefault(cell or file.stem, {})[int(seed) if cell else 0] = accuracy
    return found


def said(values: list[float], sign: str = "") -> str:
    """Mean and deviation; how many seeds there are where it is fewer than three."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:{sign}.2f} (1)"
    count = f" ({len(values)})" if len(values) == 2 else ""
    return f"{statistics.fmean(values):{sign}.2f} ± {statistics.stdev(values):.2f}{count}"


def _of(found: Found, name: str) -> str:
    return said(list(found.get(name, {}).values()))


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _grid(name: str, found: Found) -> tuple[list[str], set[str]]:
    """The table of patterns by importances and teachers, and the names of its cells."""
    ways = [(taught, importance) for taught in (False, True) for importance in IMPORTANCES]
    shapes = [(pattern, sparsity) for sparsity in SPARSITIES[name] for pattern in GRID]
    shapes += FIXED if name == "shapes" else ()
    shown = {dense(taught).name for taught in (False, True)}
    rows = [["dense, trained on", *(_of(found, dense(taught).name) for taught, _ in ways)]]
    for pattern, sparsity in sorted(shapes, key=lambda shape: shape[1]):
        made = [Cell(pattern, sparsity, importance, taught).name for taught, importance in ways]
        shown.update(made)
        rows.append([f"{sparsity:.0%} {pattern}", *(_of(found, cell) for cell in made)])
    head = ["%", *(f"{importance}, distilled" if taught else importance for taught, importance in ways)]
    return _table(head, rows), shown


def _others(name: str, found: Found, shown: set[str]) -> list[str]:
    """What is not in the grid, beside the same cell by the recipe of the grid."""
    others = [cell for cell in cells(name) if cell.name not in shown]
    rows = []
    for cell in others:
        plain = _of(found, cell.plain.name) if cell.plain != cell else ""
        rows.append([cell.name, _of(found, cell.name), plain])
    said = "Beside them, where the last column is the same by the recipe of the table above:"
    return [said, "", *_table(["cell", "%", "plain"], rows)] if rows else []


def comparisons(name: str) -> list[tuple[str, list[tuple[Cell, Cell]]]]:
    """What is asked of pairs of cells: the first less the second, the mean over the pairs where there are several."""
    if name != "shapes":
        return []
    asked = []

    def ask(label: str, *pairs: tuple[Cell, Cell]) -> None:
        asked.append((label, list(pairs)))

    for cell in globally():
        label = f"90% {cell.pattern} by the best recipe, less dense of as many epochs; distilled"
        ask(label, (replace(cell, recipe="long"), dense(True, "long")))
    trained = [replace(cell, recipe="long") for cell in globally()]
    for how, (single, vector) in (
        ("by the best recipe", trained),
        ("global budget", globally()),
        ("erk budget", (Cell(), Cell("4x1-permuted"))),
    ):
        ask(f"90% 4x1-permuted less unstructured; {how}, distilled", (vector, single))
    for cell in globally():
        ask(f"90% {cell.pattern}, global budget, less erk; distilled", (cell, cell.plain))
    for taught in (True, False):
        for pattern in ("unstructured", "4x1", "4x1-permuted"):
            label = f"90% {pattern}, less dense; {'distilled' if taught else 'labels alone'}"
            ask(label, (Cell(pattern, distilled=taught), dense(taught)))
    for pattern, sparsity in (("unstructured", 0.8), ("4x1-permuted", 0.8), *FIXED):
        cell = Cell(pattern, sparsity)
        ask(f"{sparsity:.0%} {pattern}, less dense; distilled", (cell, dense(True)))
    for pattern, sparsity in FIXED[1:]:
        ask(f"{sparsity:.0%} {pattern} less 4x1; distilled", (Cell(pattern, sparsity), Cell("4x1", sparsity)))
    for importance in ("gradient", "taylor", "movement"):
        for pattern in GRID[::2]:
            label = f"90% {pattern}, by {importance} less by magnitude; distilled"
            ask(label, (Cell(pattern, importance=importance), Cell(pattern)))
    for importance in IMPORTANCES:
        for pattern in GRID[:2]:
            cell = Cell(pattern, importance=importance)
            ask(
                f"90% {pattern} by {importance}, gradually less at once; distilled",
                (cell, replace(cell, schedule="once")),
            )
    for pattern, vector in (("4x1", 4), ("16x1", 16)):
        with_penalty = Cell(pattern, lasso=vector), Cell(pattern)
        ask(f"90% {pattern}, with a group penalty less without; distilled", with_penalty)
    for importance in IMPORTANCES:
        for budget in ("erk", "global"):
            cell = Cell(sparsity=0.95, importance=importance, budget=budget)
            label = f"95% unstructured by {importance}, {budget} less uniform; distilled"
            ask(label, (cell, replace(cell, budget="uniform")))
    return asked + _permuted()


def _permuted() -> list[tuple[str, list[tuple[Cell, Cell]]]]:
    """Permuted less consecutive groups: pruned at once, gradually, and gradually over all of the grid's four ways."""

    def pair(vector: str, **settings: object) -> tuple[Cell, Cell]:
        return Cell(f"{vector}-permuted", **settings), Cell(vector, **settings)

    asked = []
    for vector in ("4x1", "16x1"):
        label = f"90% {vector}, permuted less consecutive; pruned at once, distilled"
        asked.append((label, [pair(vector, schedule="once")]))
    for taught in (True, False):
        for vector in ("4x1", "16x1"):
            label = f"90% {vector}, permuted less consecutive; {'distilled' if taught else 'labels alone'}"
            asked.append((label, [pair(vector, distilled=taught)]))
    for taught in (True, False):
        label = f"95% 4x1, permuted less consecutive; {'distilled' if taught else 'labels alone'}"
        asked.append((label, [pair("4x1", sparsity=0.95, distilled=taught)]))
    for sparsity in SPARSITIES["shapes"]:
        ways = [(importance, taught) for importance in IMPORTANCES for taught in (True, False)]
        pairs = [pair("4x1", sparsity=sparsity, importance=i, distilled=taught) for i, taught in ways]
        label = f"{sparsity:.0%} 4x1, permuted less consecutive; mean of magnitude and gradient, distilled and not"
        asked.append((label, pairs))
    return asked


def _compared(name: str, found: Found) -> list[str]:
    rows = []
    for label, pairs in comparisons(name):
        both = [(found.get(first.name, {}), found.get(second.name, {})) for first, second in pairs]
        seeds = sorted(set.intersection(*(one.keys() & other.keys() for one, other in both)))
        rows.append([label, said([statistics.fmean(one[s] - other[s] for one, other in both) for s in seeds], "+")])
    text = (
        "Differences in points, seed by seed (both have the same dense student and order of images), ± their own "
        "deviation over the seeds:"
    )
    return [text, "", *_table(["what", "points"], rows)] if rows else []


def _made(name: str, folder: Path) -> str:
    """When and where the figures were made, and what they took."""
    results = [json.loads(file.read_text()) for file in sorted((folder / name).glob("*.json"))]
    known = [result for result in results if "machine" in result]
    machines, dates = sorted({r["machine"] for r in known}), sorted({r["date"] for r in known})
    if not known:
        return ""
    minutes = sum(result["seconds"] for result in results) / 60
    took = f"{minutes:.0f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    part = f" (as {len(known)} of {len(results)} files say)" if len(known) < len(results) else ""
    return f"Made {when} on {' and '.join(machines)}{part}, one thread each; {took} of one core in all."


def section(name: str, folder: Path) -> list[str]:
    """The tables of one set of images."""
    found, settings, wanted = read(name, folder), SETTINGS[name], cells(name)
    done = [sum(seed in found.get(cell.name, {}) for cell in wanted) for seed in range(3)]
    lines = [
        f"## {name}",
        "",
        f"Teacher {_of(found, 'teacher').removesuffix(' (1)')}, dense students before the cells' steps "
        f"{_of(found, 'student')}. {settings.images:,} training images, {settings.dense_epochs} dense epochs, "
        f"then {settings.epochs} for each cell. **{sum(done)} of {3 * len(wanted)} cells are done**: "
        f"{', '.join(map(str, done))} of {len(wanted)} by seed. {_made(name, folder)}".rstrip(),
        "",
    ]
    grid, shown = _grid(name, found)
    return lines + grid + _others(name, found, shown) + _compared(name, found)


def _search(folder: Path) -> list[str]:
    """What ``accuracy_search.py`` tried."""
    tried = read("search", folder)
    if not tried:
        return []
    rows = [[cell, f"{values[0]:.2f}"] for cell, values in sorted(tried.items(), key=lambda one: -one[1][0])]
    text = (
        "Recipes at 90% that `python benchmarks/accuracy_search.py` tried, seed 0, on 6,000 images that are neither "
        "training nor test images (standard error a third of a point):"
    )
    return ["## The search for a recipe", "", text, "", *_table(["cell", "%"], rows)]


def plot(name: str, folder: Path) -> None:
    from matplotlib.figure import Figure

    found = read(name, folder)
    figure = Figure(figsize=(9, 4), layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    for side, taught in zip(sides, (False, True), strict=True):
        for color, pattern in enumerate(GRID):
            for importance, style in (("magnitude", "o-"), ("gradient", "s--")):
                points = [
                    (100 * sparsity, list(found[made.name].values()))
                    for sparsity in (0.8, 0.9, 0.95)
                    if (made := Cell(pattern, sparsity, importance, taught)).name in found
                ]
                if points:
                    means = [statistics.fmean(values) for _, values in points]
                    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
                    label = f"{pattern}, {importance}"
                    side.errorbar([at for at, _ in points], means, spread, fmt=style, color=f"C{color}", label=label)
        trained_on = found.get(dense(taught).name)
        if trained_on:
            mean = statistics.fmean(trained_on.values())
            side.axhline(mean, color="black", linewidth=1, label="dense, trained on")
        side.set(title="distilled" if taught else "labels alone", xlabel="sparsity in %")
    sides[0].set_ylabel(f"accuracy on {name} in %")
    if sides[1].get_legend_handles_labels()[0]:
        sides[1].legend(fontsize="x-small")
    figure.savefig(folder / f"{name}.png", dpi=110)


def write(folder: Path) -> None:
    names = [name for name in SETTINGS if any((folder / name).glob("*.json"))]
    lines = [
        "# Accuracy of pruned students",
        "",
        "Written by `python benchmarks/accuracy.py`, which says how each figure came about; one JSON file beside this "
        "one for each. Accuracy on test images in percent, mean ± standard deviation over 3 seeds; of fewer seeds, "
        "their number is in brackets, and of one there is no deviation. The standard error of 3,000 test images "
        "(shapes) is half a point, of 445 (digits) a third. What is not done yet has a dash, and the command goes on "
        "with it. The images of shapes are synthetic.",
        "",
    ]
    for name in names:
        lines += section(name, folder) + [f"![accuracy against sparsity]({name}.png)", ""]
        plot(name, folder)
    lines += _search(folder)
    if (notes := folder / "notes.md").exists():
        lines += [notes.read_text()]
    write_text(folder / "README.md", "\n".join(lines).rstrip() + "\n")

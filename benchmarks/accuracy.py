"""How accurate a pruned student is: patterns, importances, budgets, with and without a teacher.

    python benchmarks/accuracy.py                   # shapes: 3 seeds, two processes, in one go or in many
    python benchmarks/accuracy.py --data digits
    python benchmarks/accuracy.py --table           # only write the table and the plot of what is done

A teacher of twice the width is trained once, with augmentation. For each seed a dense student is
trained on labels alone; every cell of that seed starts from it and has the same number of further steps, in which the
sparsity rises on a cubic schedule over the first half. "Dense, trained on" has those steps too, without pruning. Cells
differ in nothing but what their name says, and no step, epoch or checkpoint of a cell is chosen by test images: the
accuracy is that after the last step. The net, the amount of data and the budget that all cells share (ERK) were chosen
once, by a trial of one seed that looked at them.

Each cell is one JSON file in ``benchmarks/results/accuracy/<data>``, written when it is done: whatever stops the run,
the same command goes on with the cells that are missing, one seed of all before the next seed. Checkpoints and the
teacher's answers are in ``runs/accuracy/<data>``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sparsekd import CubicSL, Distiller, KDLoss, Pruner, TeacherCache, data, evaluate
from sparsekd.distillation.losses import group_lasso
from sparsekd.measure.report import write_text

RESULTS = Path(__file__).parent / "results" / "accuracy"
GRID = ("unstructured", "4x1", "4x1-permuted", "8x1-permuted")
LASSO = 1e-4  # weight of the group penalty
LONG = 3


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
class Cell:
    """One recipe."""

    pattern: str = "unstructured"
    sparsity: float = 0.9
    importance: str = "magnitude"
    distilled: bool = True
    budget: str = "erk"
    schedule: str = "cubic"  # "once": all weights go before the first step
    lasso: bool = False  # a group lasso over consecutive 4 x 1 vectors on the way
    long: bool = False  # LONG times the epochs

    @property
    def name(self) -> str:
        parts = [self.pattern.replace(":", ".")]
        parts += [] if self.pattern == "dense" else [f"{100 * self.sparsity:g}", self.importance]
        parts += [self.budget] if self.budget != Cell.budget else []
        parts += [self.schedule] if self.schedule != Cell.schedule else []
        parts += ["lasso"] if self.lasso else []
        parts += ["long"] if self.long else []
        parts += ["distilled"] if self.distilled else []
        return "-".join(parts)


def cells(name: str) -> list[Cell]:
    """Those that tell most come first."""
    dense = [Cell("dense", 0.0, "none", distilled=taught) for taught in (True, False)]
    sparsities = (0.9, 0.95, 0.8) if name == "shapes" else (0.9,)
    grid = {
        sparsity: [
            Cell(pattern, sparsity, importance, taught)
            for taught in (True, False)
            for importance in ("magnitude", "gradient")
            for pattern in GRID
        ]
        for sparsity in sparsities
    }
    if name != "shapes":
        return dense + grid[0.9]
    # One thing at a time is changed first.
    first = [Cell(pattern) for pattern in GRID]
    first += [Cell(importance="gradient"), Cell("4x1-permuted", importance="gradient")]
    first += [Cell(distilled=False), Cell("4x1-permuted", distilled=False)]
    long = [Cell("dense", 0.0, "none", long=True), Cell(long=True), Cell("4x1-permuted", long=True)]
    fixed = [("2:4", 0.5), ("4:2:10", 0.8), ("4:2:20", 0.9)]
    hardware = [
        Cell(pattern, sparsity, importance, taught)
        for taught in (True, False)
        for importance in ("magnitude", "gradient")
        for pattern, sparsity in fixed
    ]
    budgets = [
        Cell(sparsity=0.95, importance=importance, budget=budget)
        for importance in ("magnitude", "gradient")
        for budget in ("erk", "uniform", "global")
    ]
    more = [Cell(pattern, importance=i) for i in ("taylor", "movement") for pattern in ("unstructured", "4x1-permuted")]
    wide = [Cell(pattern, distilled=taught) for taught in (True, False) for pattern in ("16x1", "16x1-permuted")]
    ways = [replace(cell, lasso=True) for cell in (Cell("4x1"), Cell("4x1", distilled=False))]
    ways += [Cell(pattern, importance=i, schedule="once") for i in ("magnitude", "gradient") for pattern in GRID[:2]]
    ordered = dense + first + long + budgets + hardware[:3] + ways + grid[0.9] + more + wide
    ordered += grid[0.95] + hardware + grid[0.8]
    return list(dict.fromkeys(ordered))


def network(width: int, classes: int) -> nn.Module:
    """Five 3x3 convolutions with batch-norm, ``width`` to 8 ``width`` channels, halved thrice; one linear layer."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    layers = [
        *block(3, width, 2), *block(width, 2 * width, 2), *block(2 * width, 4 * width, 1),
        nn.MaxPool2d(2), *block(4 * width, 4 * width, 1), *block(4 * width, 8 * width, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes),
    ]  # fmt: skip
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


class Bench:
    """The images, the teacher and the dense students of one set; what exists on disk is read, not made again."""

    def __init__(self, name: str, results: Path, runs: Path) -> None:
        self.name, self.settings = name, SETTINGS[name]
        self.results, self.runs = results / name, runs / name
        self.results.mkdir(parents=True, exist_ok=True)
        self.runs.mkdir(parents=True, exist_ok=True)
        self.data = data.load(name)
        count = self.settings.images
        self.images, self.labels = self.data.train_images[:count], self.data.train_labels[:count]
        self.test = data.Loader(self.data.test_images, self.data.test_labels, 256)

    def optimizer(self, model: nn.Module, lr: float, steps: int) -> torch.optim.Optimizer:
        """SGD whose learning rate falls to zero along half a cosine, step by step."""
        s = self.settings
        made = torch.optim.SGD(model.parameters(), lr, s.momentum, weight_decay=s.weight_decay, nesterov=True)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(made, steps)
        made.register_step_post_hook(lambda *_: falling.step())
        return made

    def loader(self, seed: int) -> data.Loader:
        return data.Loader(self.images, self.labels, self.settings.batch_size, shuffle=True, seed=seed)

    def teacher(self) -> nn.Module:
        s, file = self.settings, self.runs / "teacher.pt"
        torch.manual_seed(1000)
        model = network(s.teacher_width, self.data.classes)
        if not file.exists():
            everything = data.Loader(
                self.data.train_images, self.data.train_labels, s.batch_size, True, 1000, self.name == "shapes"
            )
            began = time.process_time()
            optimizer = self.optimizer(model, s.lr, s.teacher_epochs * len(everything))
            Distiller(model, None).fit(everything, s.teacher_epochs, optimizer, progress=True)
            self.write("teacher", {"accuracy": evaluate(model, self.test), "seconds": time.process_time() - began})
            _save(model, file)
        model.load_state_dict(torch.load(file, weights_only=True))
        return TeacherCache(model.eval(), folder=self.runs / "answers").eval()

    def student(self, seed: int) -> nn.Module:
        """The dense one, before it is pruned."""
        s, file = self.settings, self.runs / f"dense-{seed}.pt"
        torch.manual_seed(seed)
        model = network(s.width, self.data.classes)
        if not file.exists():
            began, train = time.process_time(), self.loader(seed)
            optimizer = self.optimizer(model, s.lr, s.dense_epochs * len(train))
            Distiller(model, None).fit(train, s.dense_epochs, optimizer, progress=False)
            result = {"accuracy": evaluate(model, self.test), "seconds": time.process_time() - began}
            self.write(f"student-{seed}", result | {"train_accuracy": evaluate(model, train)})
            _save(model, file)
        model.load_state_dict(torch.load(file, weights_only=True))
        return model

    def run(self, cell: Cell, seed: int, teacher: nn.Module) -> None:
        s, model = self.settings, self.student(seed)
        train = self.loader(seed + 100)  # another order than the dense student's
        epochs, began = s.epochs * (LONG if cell.long else 1), time.process_time()
        steps = epochs * len(train)
        optimizer = self.optimizer(model, s.lr, steps)
        torch.manual_seed(seed)
        pruner, result = None, {}
        if cell.pattern != "dense":
            schedule = None
            if cell.schedule == "cubic":
                schedule = CubicSL(start=0, end=steps // 2, update_frequency=10)
            pruner = Pruner(model, cell.sparsity, cell.importance, cell.pattern, cell.budget, schedule, optimizer)
            if schedule is None:
                self.prune_at_once(pruner, model, teacher if cell.distilled else None, train)
        loss = {"loss": KDLoss(s.temperature, s.alpha)} if cell.distilled else {}
        if cell.lasso:
            loss |= {"penalty": group_lasso(4), "penalty_weight": LASSO}
        distiller = Distiller(model, teacher if cell.distilled else None, **loss)
        distiller.fit(train, epochs, optimizer, pruner=pruner, progress=False)
        if pruner is not None:
            result["sparsity"] = pruner.sparsity()
            result["layers"] = {name: 1 - float(mask.float().mean()) for name, mask in pruner.masks.items()}
            pruner.squash_mask()
        result |= {"accuracy": evaluate(model, self.test), "seconds": time.process_time() - began}
        self.write(f"{cell.name}-{seed}", result | {"seed": seed, "cell": asdict(cell)})

    def prune_at_once(self, pruner: Pruner, model: nn.Module, teacher: nn.Module | None, train: Iterable) -> None:
        """Importance over the first batches of the untrained-on model, in training mode as during training."""
        s = self.settings
        model.train()
        for x, y in train:
            model.zero_grad(set_to_none=True)
            logits = model(x)
            if teacher is None:
                nn.functional.cross_entropy(logits, y).backward()
            else:
                KDLoss(s.temperature, s.alpha)(logits, teacher(x), y).backward()
            pruner.step()
            if pruner.finished:
                break
        train.epoch = 0

    def path(self, name: str) -> Path:
        return self.results / f"{name}.json"

    def write(self, name: str, result: dict) -> None:
        result = {"data": self.name, **result, "settings": asdict(self.settings), "torch": torch.__version__}
        write_text(self.path(name), json.dumps(result, indent=1) + "\n")
        print(
            f"{time.strftime('%H:%M:%S')} {name}: {100 * result['accuracy']:.2f}%, {result['seconds']:.0f} s",
            flush=True,
        )


def _save(model: nn.Module, file: Path) -> None:
    aside = file.with_suffix(f".{os.getpid()}.part")
    torch.save(model.state_dict(), aside)
    aside.replace(file)


def check_done(bench: Bench) -> None:
    """Cells of other settings would make one table of two experiments."""
    for file in bench.results.glob("*.json"):
        if json.loads(file.read_text())["settings"] != asdict(bench.settings):
            raise SystemExit(f"Expected the settings of {bench.name} in {file}, got others: remove it, or choose --out")


# --- many processes ---------------------------------------------------------------------------------------------------

_WORK: dict[str, object] = {}


def _begin(name: str, results: Path, runs: Path) -> None:
    torch.set_num_threads(1)
    _WORK["bench"] = Bench(name, results, runs)
    _WORK["teacher"] = _WORK["bench"].teacher()


def _one(work: tuple[Cell, int]) -> None:
    _WORK["bench"].run(*work, _WORK["teacher"])


def run(bench: Bench, seeds: Iterable[int], jobs: int, arguments: tuple) -> None:
    bench.teacher()
    for seed in seeds:
        left = [cell for cell in cells(bench.name) if not bench.path(f"{cell.name}-{seed}").exists()]
        if not left:
            continue
        bench.student(seed)
        work = [(cell, seed) for cell in left]
        if jobs == 1:
            if not _WORK:
                _begin(*arguments)
            for one in work:
                _one(one)
        else:
            with multiprocessing.get_context("spawn").Pool(jobs, _begin, arguments) as pool:
                for _ in pool.imap_unordered(_one, work):
                    pass


# --- what is written --------------------------------------------------------------------------------------------------


def read(name: str, folder: Path) -> dict[str, list[float]]:
    """Name of a cell, or "teacher" or "student", to the accuracies of the seeds that are done, in percent."""
    found: dict[str, list[float]] = {}
    for file in sorted((folder / name).glob("*.json")):
        cell = file.stem if file.stem == "teacher" else file.stem.rpartition("-")[0]
        found.setdefault(cell, []).append(100 * json.loads(file.read_text())["accuracy"])
    return found


def said(values: list[float] | None) -> str:
    """Mean and deviation; how many seeds there are where it is fewer than three."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f} (1)"
    count = f" ({len(values)})" if len(values) == 2 else ""
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}{count}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def section(name: str, folder: Path) -> list[str]:
    """The tables of one set of images."""
    found, settings, wanted = read(name, folder), SETTINGS[name], cells(name)
    seeds = max((len(values) for values in found.values()), default=0)
    done = sum(len(found.get(cell.name, [])) for cell in wanted)
    lines = [
        f"## {name}",
        "",
        f"Teacher {said(found.get('teacher', [])[:1]).removesuffix(' (1)')}, dense student before the cells' steps "
        f"{said(found.get('student'))}. {settings.images:,} training images, {settings.dense_epochs} dense epochs, "
        f"then {settings.epochs} for each cell. {done} of {3 * len(wanted)} cells are done, of {seeds} of 3 seeds.",
        "",
    ]
    ways = [(taught, importance) for taught in (False, True) for importance in ("magnitude", "gradient")]
    head = ["%", *(f"{importance}, distilled" if taught else importance for taught, importance in ways)]
    dense = [said(found.get("dense-distilled" if taught else "dense")) for taught, _ in ways]
    shapes = [(pattern, s) for s in ((0.8, 0.9, 0.95) if name == "shapes" else (0.9,)) for pattern in GRID]
    shapes += [("2:4", 0.5), ("4:2:10", 0.8), ("4:2:20", 0.9)] if name == "shapes" else []
    rows = [["dense, trained on", *dense]]
    for pattern, sparsity in shapes:
        made = [Cell(pattern, sparsity, importance, taught) for taught, importance in ways]
        rows.append([f"{sparsity:.0%} {pattern}", *(said(found.get(cell.name)) for cell in made)])
    lines += _table(head, rows)
    shown = {Cell(p, s, importance, taught).name for p, s in shapes for taught, importance in ways}
    shown |= {cell.name for cell in wanted[:2]}
    others = [cell for cell in wanted if cell.name not in shown]
    if others:
        lines += ["Beside them, where the last column is the same recipe in the table above:", ""]
        rows = []
        for cell in others:
            plain = replace(cell, budget=Cell.budget, schedule=Cell.schedule, lasso=False, long=False)
            plain = plain if plain.name in shown else None
            rows.append([cell.name, said(found.get(cell.name)), said(found.get(plain.name)) if plain else ""])
        lines += _table(["recipe", "%", "plain"], rows)
    return lines


def plot(name: str, folder: Path) -> None:
    from matplotlib.figure import Figure

    found = read(name, folder)
    figure = Figure(figsize=(9, 4), layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    for side, taught in zip(sides, (False, True), strict=True):
        for color, pattern in enumerate(GRID):
            for importance, style in (("magnitude", "o-"), ("gradient", "s--")):
                points = [
                    (100 * sparsity, found[made.name])
                    for sparsity in (0.8, 0.9, 0.95)
                    if (made := Cell(pattern, sparsity, importance, taught)).name in found
                ]
                if points:
                    means = [statistics.fmean(values) for _, values in points]
                    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
                    label = f"{pattern}, {importance}"
                    side.errorbar([at for at, _ in points], means, spread, fmt=style, color=f"C{color}", label=label)
        dense = found.get("dense-distilled" if taught else "dense")
        if dense:
            side.axhline(statistics.fmean(dense), color="black", linewidth=1, label="dense, trained on")
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
        "their number is in brackets, and of one there is no deviation; the standard error of 3,000 test images is "
        "half a point. What is not done yet has a dash, and the command goes on with it. The images of shapes are "
        "synthetic.",
        "",
    ]
    for name in names:
        lines += section(name, folder) + [f"![accuracy against sparsity]({name}.png)", ""]
        plot(name, folder)
    write_text(folder / "README.md", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(SETTINGS), default="shapes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        raise SystemExit(f"Expected at least 1 seed and 1 process, got {args.seeds} and {args.jobs}")
    if not args.table:
        torch.set_num_threads(1)
        bench = Bench(args.data, args.out, args.runs)
        check_done(bench)
        run(bench, range(args.seeds), args.jobs, (args.data, args.out, args.runs))
    write(args.out)


if __name__ == "__main__":
    main()

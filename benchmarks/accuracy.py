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
the same command goes on with the cells that are missing, in the order of ``accuracy_cells.py``. Checkpoints and the
teacher's answers are in ``runs/accuracy/<data>``, outside the repository. Those that are missing are trained again
(three minutes), and the run goes on if they have the hash that is written beside the cells, as they do where a
processor rounds alike (one thread, fixed seeds). Where they have not, the command says so: the cells then have to be
made anew, an hour of one core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from accuracy_cells import RECIPES, SETTINGS, Cell, ordered
from accuracy_tables import write
from torch import nn

from sparsekd import CubicSL, Distiller, KDLoss, Pruner, TeacherCache, data, evaluate
from sparsekd.distillation.answer_store import teacher_hash
from sparsekd.distillation.losses import group_lasso
from sparsekd.measure.machine import processor
from sparsekd.measure.report import write_text

RESULTS = Path(__file__).parent / "results" / "accuracy"
LASSO = 1e-4  # weight of the group penalty


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
        torch.set_num_threads(1)  # sums of another number of threads round otherwise
        self.name, self.settings = name, SETTINGS[name]
        self.results, self.runs = results / name, runs / name
        self.results.mkdir(parents=True, exist_ok=True)
        self.runs.mkdir(parents=True, exist_ok=True)
        self.data = data.load(name)
        count = self.settings.images
        self.images, self.labels = self.data.train_images[:count], self.data.train_labels[:count]
        self.test = data.Loader(self.data.test_images, self.data.test_labels, 256)

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float, steps: int) -> torch.optim.Optimizer:
        """SGD whose learning rate falls to zero along half a cosine, step by step."""
        momentum = self.settings.momentum
        made = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, nesterov=True)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(made, steps)
        made.register_step_post_hook(lambda *_: falling.step())
        return made

    def loader(self, seed: int) -> data.Loader:
        return data.Loader(self.images, self.labels, self.settings.batch_size, shuffle=True, seed=seed)

    def teacher(self) -> nn.Module:
        s, file = self.settings, self.runs / "teacher.pt"
        torch.manual_seed(1000)
        model = network(s.teacher_width, self.data.classes)
        if not (file.exists() and self.path("teacher").exists()):
            everything = data.Loader(
                self.data.train_images, self.data.train_labels, s.batch_size, True, 1000, self.name == "shapes"
            )
            began = time.process_time()
            optimizer = self.optimizer(model, s.lr, s.weight_decay, s.teacher_epochs * len(everything))
            Distiller(model, None).fit(everything, s.teacher_epochs, optimizer, progress=True)
            self.keep(model, file, "teacher", began)
        self.load(model, file, "teacher")
        return TeacherCache(model.eval(), folder=self.runs / "answers").eval()

    def student(self, seed: int) -> nn.Module:
        """The dense one, before it is pruned."""
        s, file = self.settings, self.runs / f"dense-{seed}.pt"
        torch.manual_seed(seed)
        model = network(s.width, self.data.classes)
        if not (file.exists() and self.path(f"student-{seed}").exists()):
            began, train = time.process_time(), self.loader(seed)
            optimizer = self.optimizer(model, s.lr, s.weight_decay, s.dense_epochs * len(train))
            Distiller(model, None).fit(train, s.dense_epochs, optimizer, progress=False)
            self.keep(model, file, f"student-{seed}", began, train)
        self.load(model, file, f"student-{seed}")
        return model

    def keep(self, model: nn.Module, file: Path, name: str, began: float, train: data.Loader | None = None) -> None:
        """A dense model as a checkpoint; its figures are written unless they are there: it is then trained again."""
        if not self.path(name).exists():
            result = {"accuracy": evaluate(model, self.test), "seconds": time.process_time() - began}
            if train is not None:
                result["train_accuracy"] = evaluate(model, train)
            self.write(name, result | {"weights": teacher_hash(model)})
        self.check_same(model, name)
        aside = file.with_suffix(f".{os.getpid()}.part")
        torch.save(model.state_dict(), aside)
        aside.replace(file)

    def load(self, model: nn.Module, file: Path, name: str) -> None:
        model.load_state_dict(torch.load(file, weights_only=True))
        self.check_same(model, name)

    def check_same(self, model: nn.Module, name: str) -> None:
        """Another machine rounds otherwise and makes another model: cells of two would be in one table."""
        written, got = json.loads(self.path(name).read_text()).get("weights"), teacher_hash(model)
        if written != got:
            raise SystemExit(
                f"Expected a {name} with weights {written}, which the cells in {self.results} come from, got {got}: "
                f"bring {self.runs} from where they were made, remove them, or choose --out"
            )

    def run(self, cell: Cell, seed: int, teacher: nn.Module) -> None:
        s, recipe, model, began = self.settings, RECIPES[cell.recipe], self.student(seed), time.process_time()
        start = {"student": teacher_hash(model), "teacher": teacher_hash(teacher.teacher) if cell.distilled else None}
        train = self.loader(seed + 100)  # another order than the dense student's
        epochs = s.epochs * recipe.epochs
        steps = epochs * len(train)
        lr, decay = _first(recipe.lr, s.lr), _first(recipe.weight_decay, s.weight_decay)
        optimizer = self.optimizer(model, lr, decay, steps)
        torch.manual_seed(seed)
        loss = KDLoss(_first(recipe.temperature, s.temperature), _first(recipe.alpha, s.alpha))
        pruner, result = None, {}
        if cell.pattern != "dense":
            schedule = None
            if cell.schedule == "cubic":
                schedule = CubicSL(start=0, end=int(steps * recipe.prune_until), update_frequency=10)
            pruner = Pruner(model, cell.sparsity, cell.importance, cell.pattern, cell.budget, schedule, optimizer)
            if schedule is None:
                self.prune_at_once(pruner, model, teacher if cell.distilled else None, loss, train)
        penalty = {}
        if cell.lasso:
            lasso = group_lasso(cell.lasso)
            penalty["penalty"] = lambda student: student[0].weight.new_zeros(()) if pruner.finished else lasso(student)
            penalty["penalty_weight"] = LASSO
        distiller = Distiller(model, teacher if cell.distilled else None, loss, **penalty)
        distiller.fit(train, epochs, optimizer, pruner=pruner, progress=False)
        if pruner is not None:
            result["sparsity"] = pruner.sparsity()
            result["layers"] = {name: 1 - float(mask.float().mean()) for name, mask in pruner.masks.items()}
            pruner.squash_mask()
        result |= {"accuracy": evaluate(model, self.test), "seconds": time.process_time() - began}
        result |= {"seed": seed, "cell": asdict(cell), "recipe": asdict(recipe), "start": start}
        self.write(f"{cell.name}-{seed}", result)

    def prune_at_once(
        self, pruner: Pruner, model: nn.Module, teacher: nn.Module | None, loss: nn.Module, train: Iterable
    ) -> None:
        """Importance over the first batches of the untrained-on model, in training mode as during training."""
        model.train()
        while not pruner.finished:
            for x, y in train:
                model.zero_grad(set_to_none=True)
                logits = model(x)
                if teacher is None:
                    nn.functional.cross_entropy(logits, y).backward()
                else:
                    loss(logits, teacher(x), y).backward()
                pruner.step()
                if pruner.finished:
                    break
        train.epoch = 0

    def path(self, name: str) -> Path:
        return self.results / f"{name}.json"

    def write(self, name: str, result: dict) -> None:
        where = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"
        made = {"torch": torch.__version__, "machine": where, "date": time.strftime("%Y-%m-%d", time.gmtime())}
        result = {"data": self.name, **result, "settings": asdict(self.settings), **made}
        write_text(self.path(name), json.dumps(result, indent=1) + "\n")
        print(
            f"{time.strftime('%H:%M:%S')} {name}: {100 * result['accuracy']:.2f}%, {result['seconds']:.0f} s",
            flush=True,
        )


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


def check_done(bench: Bench) -> None:
    """Cells of other settings, or from another student or teacher, would make one table of two experiments."""
    found = {file: json.loads(file.read_text()) for file in sorted(bench.results.glob("*.json"))}
    weights = {file.stem: result["weights"] for file, result in found.items() if "weights" in result}
    for file, result in found.items():
        if result["settings"] != asdict(bench.settings):
            raise SystemExit(f"Expected the settings of {bench.name} in {file}, got others: remove it, or choose --out")
        for name, start in result.get("start", {}).items():
            model = name if name == "teacher" else f"{name}-{result['seed']}"
            if start not in (None, weights.get(model)):
                raise SystemExit(
                    f"Expected {file} to come from the {model} {weights.get(model)}, got {start}: remove it, or choose "
                    "--out"
                )


# --- many processes ---------------------------------------------------------------------------------------------------

_WORK: dict[str, object] = {}


def _begin(name: str, results: Path, runs: Path) -> None:
    _WORK["bench"] = Bench(name, results, runs)
    _WORK["teacher"] = _WORK["bench"].teacher()


def _one(work: tuple[Cell, int]) -> None:
    _WORK["bench"].run(*work, _WORK["teacher"])


def run(bench: Bench, seeds: Iterable[int], jobs: int, arguments: tuple) -> None:
    bench.teacher()
    for seed in seeds:
        bench.student(seed)
    work = [(c, seed) for c, seed in ordered(bench.name, seeds) if not bench.path(f"{c.name}-{seed}").exists()]
    if jobs == 1:
        _begin(*arguments)
        for one in work:
            _one(one)
    else:
        with multiprocessing.get_context("spawn").Pool(jobs, _begin, arguments) as pool:
            for _ in pool.imap_unordered(_one, work):
                pass


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
        bench = Bench(args.data, args.out, args.runs)
        check_done(bench)
        run(bench, range(args.seeds), args.jobs, (args.data, args.out, args.runs))
    write(args.out)


if __name__ == "__main__":
    main()

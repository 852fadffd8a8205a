"""The demonstration: a teacher, a student distilled from it, pruned, retrained, swapped, and what each step gave.

Every stage leaves its model and its record in the run's folder, and a training that is interrupted leaves a checkpoint,
so that --resume goes on where the last run stopped.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from . import data, demo_report, reference_models
from .distillation import Distiller, KDLoss, TeacherCache, evaluate
from .distillation.checkpoint import put_aside
from .measure.report import NetworkReport, write_text
from .measure.timing import threads
from .pruning import CubicSL, Pruner
from .reporting import compare_networks, machine, report
from .sparse.checkpoint import load, save
from .sparse.convert import choices, convert

CURVE = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
IMPORTANCES = ("gradient", "magnitude", "random")
BATCHES = (1, 64)


@dataclass(frozen=True)
class Settings:
    """What suits one data set; epochs are those of the student."""

    teacher_epochs: int
    epochs: int
    retrain_epochs: int
    lr: float = 0.01
    momentum: float = 0.9
    batch_size: int = 64
    temperature: float = 4.0
    alpha: float = 0.5
    labels_fraction: float = 1.0  # of the training images whose labels the student sees; the teacher sees all
    # Part of the retraining in which pruning goes on, on a cubic schedule; 0 prunes at once, before it. On shapes a
    # student that is cut at once has 40% after 4 epochs with the teacher, one that is cut over 2 of them 93%.
    gradual: float = 0.0
    # Where the time goes is in the convolutions, and under a global budget the linear layers pay for them.
    budget: str = "uniform"


SETTINGS = {
    "digits": Settings(teacher_epochs=10, epochs=10, retrain_epochs=10),
    "shapes": Settings(teacher_epochs=10, epochs=3, retrain_epochs=3, labels_fraction=0.25, alpha=0.9, gradual=0.5),
    "cifar10": Settings(teacher_epochs=10, epochs=10, retrain_epochs=10),
}


class Demo:
    def __init__(self, args: Namespace) -> None:
        if not 0 < args.sparsity < 1:
            raise ValueError(f"Expected sparsity in (0, 1), got {args.sparsity}")
        if args.seeds < 1:
            raise ValueError(f"Expected at least 1 seed, got {args.seeds}")
        self.settings = SETTINGS[args.data]
        if args.epochs is not None:
            if args.epochs < 1:
                raise ValueError(f"Expected at least 1 epoch, got {args.epochs}")
            count = args.epochs
            self.settings = Settings(
                **{**vars(self.settings), "teacher_epochs": count, "epochs": count, "retrain_epochs": count}
            )
        self.data = data.load(args.data, root=args.root, download=args.download)
        self.args = args
        self.sparsity, self.seeds = args.sparsity, range(args.seed, args.seed + args.seeds)
        self.folder = Path(args.out or ("runs/demo" if args.data == "digits" else f"runs/demo-{args.data}"))
        self.stages = self.folder / "stages"
        self.console = Console()
        signature = {"data": args.data, "sparsity": args.sparsity, "seed": args.seed, **vars(self.settings)}
        self._open_folder(signature, args.resume)

    def _open_folder(self, signature: dict, resume: bool) -> None:
        written = self.stages / "settings.json"
        if resume and written.exists() and json.loads(written.read_text()) != signature:
            raise ValueError(
                f"Expected the settings of the run in {self.folder} to resume it, got others; leave --resume out"
            )
        if not resume:
            put_aside(self.stages)
        self.stages.mkdir(parents=True, exist_ok=True)
        write_text(written, json.dumps(signature))

    # --- stages ---

    def stage(
        self, name: str, said: str, model: nn.Module, work: Callable[[nn.Module, Path], dict]
    ) -> tuple[nn.Module, dict]:
        """Runs one stage, or takes its result from an earlier run."""
        weights, record = self.stages / f"{name}.safetensors", self.stages / f"{name}.json"
        if record.exists():
            return load(model, weights), json.loads(record.read_text())
        done = sum(1 for other in self.stages.glob("*.json")) - 1  # one is of the settings
        self.console.print(f"[bold]{done + 1} of {1 + 5 * len(self.seeds)}: {said}[/bold]")
        checkpoint = self.stages / f"{name}.checkpoint"
        began = time.perf_counter()
        result = work(model, checkpoint)
        result["seconds"] = time.perf_counter() - began
        save(model, weights)
        write_text(record, json.dumps(result))
        checkpoint.unlink(missing_ok=True)
        self.console.print(f"  accuracy {result['accuracy']:.4f}, {result['seconds']:.0f} s")
        return model, result

    def loaders(self, seed: int, labels_fraction: float = 1.0, labelled_only: bool = False):
        options = {"labels_fraction": labels_fraction, "labelled_only": labelled_only} if labels_fraction < 1 else {}
        return data.loaders(self.data, batch_size=self.settings.batch_size, seed=seed, **options)

    def optimizer(self, model: nn.Module, lr: float | None = None) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=lr or self.settings.lr, momentum=self.settings.momentum)

    def fit(self, model, teacher, train, test, epochs, checkpoint, optimizer=None, pruner=None) -> dict:
        loss = {} if teacher is None else {"loss": self.loss()}
        history = Distiller(model, teacher, **loss).fit(
            train, epochs, optimizer or self.optimizer(model), pruner=pruner, val_loader=test, checkpoint=checkpoint,
            progress=True,
        )  # fmt: skip
        return {"accuracy": evaluate(model, test), "epochs": len(history)}

    def loss(self) -> KDLoss:
        settings = self.settings
        return KDLoss(settings.temperature, settings.alpha, distill_ignored=settings.labels_fraction < 1)

    def student(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return reference_models.reference_student(num_classes=self.data.classes)

    def train_teacher(self) -> None:
        torch.manual_seed(self.args.seed)
        train, test = self.loaders(self.args.seed)
        epochs = self.settings.teacher_epochs
        self.teacher, self.teacher_record = self.stage(
            "teacher",
            f"teacher, {epochs} epochs on {self.args.data}",
            reference_models.reference_teacher(num_classes=self.data.classes),
            lambda model, checkpoint: self.fit(model, None, train, test, epochs, checkpoint),
        )
        # All students see the same images; only augmented ones are new each time.
        self.taught = self.teacher if self.data.augment else TeacherCache(self.teacher).eval()

    def train_students(self, seed: int) -> None:
        """The student alone and the distilled one: the same labels, the same number of steps."""
        fraction, epochs = self.settings.labels_fraction, self.settings.epochs
        train, test = self.loaders(seed, fraction)
        alone, alone_epochs = train, epochs
        if fraction < 1:  # without a teacher only the labelled images say anything: as many steps on those
            alone, _ = self.loaders(seed, fraction, labelled_only=True)
            alone_epochs = max(round(epochs * len(train) / len(alone)), 1)
        self.models["alone", seed], self.records["alone", seed] = self.stage(
            f"student-{seed}",
            f"student alone, seed {seed}",
            self.student(seed),
            lambda model, checkpoint: self.fit(model, None, alone, test, alone_epochs, checkpoint),
        )
        self.models["distilled", seed], self.records["distilled", seed] = self.stage(
            f"distilled-{seed}",
            f"distilled student, seed {seed}",
            self.student(seed),
            lambda model, checkpoint: self.fit(model, self.taught, train, test, epochs, checkpoint),
        )
        self.train[seed], self.alone[seed] = (train, epochs), (alone, alone_epochs)
        self.test = test

    def gather_and_prune(
        self, model: nn.Module, importance: str, sparsity: float, train, teacher=None, optimizer=None
    ) -> Pruner:
        """Mean importance over up to 64 batches of the untouched model, then the cut; nothing is trained here."""
        batches = min(len(train), 64)
        budget = self.settings.budget
        pruner = Pruner(model, sparsity, importance, budget=budget, optimizer=optimizer, importance_steps=batches)
        loss = self.loss()
        for index, (x, y) in enumerate(train):
            if index == batches:
                break
            model.zero_grad(set_to_none=True)
            logits = model(x)
            if teacher is None:
                nn.functional.cross_entropy(logits, y).backward()
            else:
                with torch.no_grad():
                    taught = teacher(x)
                loss(logits, taught, y).backward()
            pruner.step()
        model.zero_grad(set_to_none=True)
        return pruner

    def prune_and_retrain(self, kind: str, seed: int, importance: str, taught: bool) -> None:
        base = self.models["distilled" if taught else "alone", seed]
        (train, epochs), teacher = (self.train if taught else self.alone)[seed], self.taught if taught else None
        retrain = max(round(epochs * self.settings.retrain_epochs / self.settings.epochs), 1)

        def work(model: nn.Module, checkpoint: Path) -> dict:
            optimizer = self.optimizer(model)
            train.epoch = 0
            gradual = round(self.settings.gradual * retrain * len(train))
            pruned = copy.deepcopy(model) if gradual else model
            pruner = self.gather_and_prune(
                pruned, importance, self.sparsity, train, teacher, None if gradual else optimizer
            )
            before = evaluate(pruned, self.test)
            if gradual:
                # Masks every ten steps: choosing them costs more than a step of so small a network.
                schedule = CubicSL(start=0, end=gradual, update_frequency=10)
                pruner = Pruner(
                    model, self.sparsity, importance, budget=self.settings.budget, schedule=schedule,
                    optimizer=optimizer,
                )  # fmt: skip
            result = self.fit(model, teacher, train, self.test, retrain, checkpoint, optimizer, pruner)
            result |= {"pruned": before, "sparsity": pruner.sparsity(total=True)}
            pruner.squash_mask()
            return result

        with_teacher = " with the teacher" if taught else ""
        said = f"pruned by {importance} to {self.sparsity:.0%}, retrained{with_teacher}, seed {seed}"
        self.models[kind, seed], self.records[kind, seed] = self.stage(
            f"{kind}-{seed}", said, copy.deepcopy(base), work
        )

    def curve(self) -> dict[str, list[float]]:
        """Accuracy of the first seed's student after pruning alone, by sparsity and importance."""
        record = self.stages / "curve.json"
        if record.exists():
            return json.loads(record.read_text())
        seed = self.seeds[0]
        found: dict[str, list[float]] = {importance: [] for importance in IMPORTANCES}
        train = self.alone[seed][0]
        for importance in IMPORTANCES:
            for sparsity in CURVE:
                model = copy.deepcopy(self.models["alone", seed])
                train.epoch = 0
                self.gather_and_prune(model, importance, sparsity, train).squash_mask()
                found[importance].append(evaluate(model, self.test))
        write_text(record, json.dumps(found))
        return found

    # --- measurements ---

    def measure(self, model: nn.Module) -> tuple[list[NetworkReport], nn.Module]:
        """Dense against swapped at each batch size, one thread; also the model converted for the first of them."""
        found, first = [], None
        for batch in BATCHES:
            x = self.data.test_images[:batch]
            converted = convert(model.eval(), x, mapping={"*": {"vector": 1}})
            found.append(compare_networks(model, converted, x))
            first = first or converted
        return found, first

    def run(self) -> None:
        self.models, self.records, self.train, self.alone = {}, {}, {}, {}
        self.train_teacher()
        for seed in self.seeds:
            self.train_students(seed)
        for seed in self.seeds:
            self.prune_and_retrain("retrained", seed, "gradient", taught=False)
            self.prune_and_retrain("random", seed, "random", taught=False)
            self.prune_and_retrain("both", seed, "gradient", taught=True)
        curve = self.curve()
        self.console.print("[bold]swapping layers and measuring, 1 thread[/bold]")
        seed = self.seeds[0]
        with threads(1):
            rows = self.rows()
            converted = convert(
                self.models["both", seed].eval(), self.data.test_images[:1], mapping={"*": {"vector": 1}}
            )
            layers = report(converted, self.data.test_images[:1], BATCHES)
            where = machine()
        accuracy = evaluate(converted, self.test)
        dense = evaluate(self.models["both", seed], self.test)
        if abs(accuracy - dense) > 0.002:
            raise RuntimeError(
                f"Expected the swapped student as accurate as the dense one ({dense:.4f}), got {accuracy:.4f}"
            )
        save(converted, self.folder / "student.safetensors")
        demo_report.write(self, rows, curve, layers, where)

    def accuracies(self, kind: str, field: str = "accuracy") -> list[float]:
        return [self.records[kind, seed][field] for seed in self.seeds]

    def rows(self) -> list[dict]:
        """The table: one row per model, times of the first seed's."""
        seed = self.seeds[0]
        pruned = copy.deepcopy(self.models["alone", seed])
        self.gather_and_prune(pruned, "gradient", self.sparsity, self.alone[seed][0]).squash_mask()
        made = [
            ("teacher", self.teacher, [self.teacher_record["accuracy"]]),
            ("student alone", self.models["alone", seed], self.accuracies("alone")),
            ("distilled student", self.models["distilled", seed], self.accuracies("distilled")),
            ("pruned, not retrained", pruned, self.accuracies("retrained", "pruned")),
            ("pruned and retrained", self.models["retrained", seed], self.accuracies("retrained")),
            ("distilled, pruned, retrained with the teacher", self.models["both", seed], self.accuracies("both")),
        ]
        rows = []
        for name, model, accuracies in made:
            networks, converted = self.measure(model)
            aside = self.stages / "size.safetensors"
            save(converted, aside)
            rows.append(
                {
                    "model": name,
                    "accuracy": statistics.fmean(accuracies),
                    "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                    "parameters": sum(int(torch.count_nonzero(p)) for p in model.parameters()),
                    "bytes": aside.stat().st_size,
                    "sparse_layers": sum(c.kernel == "sparse" for c in choices(converted).values()),
                    "networks": [vars(network) for network in networks],
                }
            )
            aside.unlink()
        return rows


def run(args: Namespace) -> Path:
    """``sparsekd demo``; the folder that it wrote to."""
    made = Demo(args)
    made.run()
    return made.folder

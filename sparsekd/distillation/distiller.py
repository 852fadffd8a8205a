"""The training loop: a student from a teacher, or alone, with a pruner on the way, that can be interrupted.

    L(W', D') + lambda R(W')        L the distillation loss (and feature hints), R a penalty on the weights
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import FeatureHints
from .losses import KDLoss, penalty

IGNORED = -100
FORMAT = "sparsekd training, version 1"


@dataclass(frozen=True)
class EpochRecord:
    """One epoch; accuracies in 0..1, None where there was nothing to compare with."""

    epoch: int
    loss: float
    accuracy: float | None  # on the training batches, as they were passed
    val_accuracy: float | None
    seconds: float


def logits_of(output: object) -> Tensor:
    """The logits: a tensor itself, ``.logits``, or the first of a tuple or dict's ``"logits"``."""
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"Expected a model that gives logits (a tensor, .logits or a tuple), got {type(output).__name__}")


def _batch(batch: object) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) >= 2 and isinstance(batch[0], Tensor) and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise TypeError(f"Expected batches (inputs, targets) of tensors, got {type(batch).__name__}")


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode; every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def evaluate(model: nn.Module, loader: Iterable) -> float:
    """Accuracy in 0..1 in eval mode, over the rows that have a label (not -100).

    Raises:
        ValueError: no labelled row.
    """
    device = next(model.parameters(), torch.empty(0)).device
    right = count = 0
    with _mode(model, False), torch.no_grad():
        for batch in loader:
            x, y = _batch(batch)
            y = y.to(device)
            known = y != IGNORED
            right += int(((logits_of(model(x.to(device))).argmax(1) == y) & known).sum())
            count += int(known.sum())
    if count == 0:
        raise ValueError("Expected a loader with labelled images, got none")
    return right / count


class Distiller:
    """Trains a student from a frozen teacher.

    Args:
        student: trained in place.
        teacher: stays in eval mode and takes no gradient; None trains the student alone by cross entropy.
        loss: ``(student_logits, teacher_logits, target) -> scalar``.
        features: ``{student path: teacher path}`` of modules whose outputs are drawn together (``features.py``), added
            with ``feature_weight``.
        penalty: R(W): "l1", "l2" or a callable from the model to a scalar, added with ``penalty_weight``.

    Models may give logits, an object with ``.logits`` or a tuple that starts with them.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: Callable = KDLoss(),  # noqa: B008 (holds settings only, no state)
        features: Mapping[str, str] | None = None,
        penalty: str | Callable | None = None,
        penalty_weight: float = 0.0,
        feature_weight: float = 1.0,
    ) -> None:
        for name, model in (("student", student), ("teacher", teacher)):
            if not isinstance(model, nn.Module) and not (name == "teacher" and model is None):
                raise TypeError(f"Expected the {name} to be a torch.nn.Module, got {type(model).__name__}")
        if teacher is None and features:
            raise ValueError("Expected a teacher for features, got none")
        if teacher is student:
            raise ValueError("Expected a teacher that is another module than the student, got the same one")
        if not penalty_weight >= 0:
            raise ValueError(f"Expected penalty_weight >= 0, got {penalty_weight}")
        self.student, self.teacher, self.loss = student, teacher, loss
        self.features, self.feature_weight = features, feature_weight
        self.penalty = None if penalty is None else _penalty(penalty)
        self.penalty_weight = penalty_weight

    def fit(
        self,
        train_loader: Iterable,
        epochs: int,
        optimizer: torch.optim.Optimizer,
        scheduler: object = None,
        pruner: object = None,
        val_loader: Iterable | None = None,
        checkpoint: str | os.PathLike | None = None,
        progress: bool = False,
    ) -> list[EpochRecord]:
        """Trains for ``epochs`` and returns one record per epoch.

        Args:
            train_loader: batches ``(x, y)``; where it has an attribute ``epoch``, that is set before each epoch.
            scheduler: stepped after each epoch.
            pruner: its ``step()`` is called after each ``optimizer.step()``.
            checkpoint: a file, written aside and renamed after each epoch; when it exists the training goes on from it,
                bit for bit as if it had not been interrupted.
            progress: show a bar with loss, accuracy and the time left.

        Raises:
            ValueError: an empty loader, a checkpoint of another training; FloatingPointError: the loss is not finite.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"Expected a number of epochs of at least 1, got {epochs!r}")
        if hasattr(train_loader, "__len__") and len(train_loader) == 0:
            raise ValueError("Expected a training loader with at least one batch, got none")
        hints = FeatureHints(self.student, self.teacher, self.features) if self.features else None
        modes = [_mode(self.student, True)]
        if self.teacher is not None:
            modes.append(_mode(self.teacher, False))
        parts = _Parts(self.student, optimizer, scheduler, pruner, hints, train_loader)
        try:
            for mode in modes:
                mode.__enter__()
            return self._run(train_loader, epochs, parts, val_loader, checkpoint, progress)
        finally:
            for mode in reversed(modes):
                mode.__exit__(None, None, None)
            if hints is not None:
                hints.close()

    def _run(self, train_loader, epochs, parts, val_loader, checkpoint, progress) -> list[EpochRecord]:
        history: list[EpochRecord] = []
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and path.exists():
            history = parts.restore(path)
        with _bar(train_loader, epochs, progress) as shown:
            for epoch in range(len(history), epochs):
                began = time.perf_counter()
                loss, accuracy = self._epoch(train_loader, epoch, parts, shown)
                if parts.scheduler is not None:
                    parts.scheduler.step()
                val_accuracy = None if val_loader is None else evaluate(self.student, val_loader)
                history.append(EpochRecord(epoch, loss, accuracy, val_accuracy, time.perf_counter() - began))
                shown(loss, val_accuracy if val_accuracy is not None else accuracy, 0)
                if path is not None:
                    parts.write(path, history)
        return history

    def _epoch(self, train_loader, epoch: int, parts: _Parts, shown) -> tuple[float, float | None]:
        if hasattr(train_loader, "epoch"):
            train_loader.epoch = epoch
        device = next(self.student.parameters()).device
        total, batches, right, known = 0.0, 0, 0, 0
        for batch in train_loader:
            x, y = _batch(batch)
            x, y = x.to(device), y.to(device)
            logits, objective = self._objective(x, y, parts)
            value = float(objective.detach())
            if value != value or value in (float("inf"), float("-inf")):
                raise FloatingPointError(f"Expected a finite loss, got {value} in epoch {epoch}, batch {batches}")
            parts.optimizer.zero_grad(set_to_none=True)
            objective.backward()
            parts.optimizer.step()
            if parts.pruner is not None:
                parts.pruner.step()
            labelled = y != IGNORED
            right += int(((logits.detach().argmax(1) == y) & labelled).sum())
            known += int(labelled.sum())
            total, batches = total + value, batches + 1
            shown(total / batches, right / known if known else None, 1)
        if batches == 0:
            raise ValueError("Expected a training loader with at least one batch, got none")
        return total / batches, right / known if known else None

    def _objective(self, x: Tensor, y: Tensor, parts: _Parts) -> tuple[Tensor, Tensor]:
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = logits_of(self.teacher(x))
        logits = logits_of(self.student(x))
        if taught is None:
            objective = F.cross_entropy(logits, y, ignore_index=IGNORED)
        else:
            objective = self.loss(logits, taught, y)
        if parts.hints is not None:
            objective = objective + self.feature_weight * parts.hints()
            parts.take_adapters()
        if self.penalty is not None and self.penalty_weight > 0:
            objective = objective + self.penalty_weight * self.penalty(self.student)
        return logits, objective


_penalty = penalty


class _Parts:
    """Everything whose state a continuation needs."""

    def __init__(self, student, optimizer, scheduler, pruner, hints, loader) -> None:
        self.student, self.optimizer, self.scheduler = student, optimizer, scheduler
        self.pruner, self.hints, self.loader = pruner, hints, loader

    def take_adapters(self) -> None:
        """Adapters are made at the first batch; the optimiser trains them from then on."""
        have = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        new = [p for p in self.hints.parameters() if id(p) not in have]
        if new:
            self.optimizer.add_param_group({"params": new})

    def write(self, path: Path, history: list[EpochRecord]) -> None:
        state = {
            "format": FORMAT,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "adapters": None if self.hints is None else self.hints.adapters.state_dict(),
            "history": [asdict(record) for record in history],
            "rng": torch.get_rng_state(),
        }
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise

    def restore(self, path: Path) -> list[EpochRecord]:
        """Reads a checkpoint; everything is checked before anything is changed, and nothing is unpickled."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a torn file raises one of many kinds
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"Expected a whole checkpoint in {path}, got a file that can't be read: {first[:120]}") from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"Expected a training checkpoint of sparsekd in {path}, got another file")
        own = {key: value.shape for key, value in self.student.state_dict().items()}
        saved = {key: value.shape for key, value in state["student"].items()}
        if own != saved:
            odd = sorted(set(own.items()) ^ set(saved.items()))[0][0]
            raise ValueError(f"Expected a checkpoint of this student in {path}, got one that differs in {odd}")
        for name, part in (("scheduler", self.scheduler), ("pruner", self.pruner), ("adapters", self.hints)):
            if (part is None) != (state[name] is None):
                has = "with" if part is not None else "without"
                raise ValueError(f"Expected a checkpoint {has} a state of the {name} in {path}, got the opposite")
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])  # checks itself
        self.student.load_state_dict(state["student"])
        if self.hints is not None:
            self.hints.restore(state["adapters"])
            self.take_adapters()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        return [EpochRecord(**record) for record in state["history"]]


@contextmanager
def _bar(loader: Iterable, epochs: int, progress: bool) -> Iterator[Callable]:
    """A rich progress bar over all batches, or nothing."""
    if not progress:
        yield lambda loss, accuracy, advance: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    total = epochs * len(loader) if hasattr(loader, "__len__") else None
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=total)

        def shown(loss: float, accuracy: float | None, advance: int) -> None:
            said = f"loss {loss:.4f}" + ("" if accuracy is None else f", accuracy {accuracy:.4f}")
            bar.update(task, advance=advance, description=said)

        yield shown

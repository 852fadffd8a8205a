"""Everything that a training run consists of, taken and put back as one, and the file that it is kept in.

The file is torch.save's, of tensors and plain types only, so that reading it runs no code (``weights_only=True``).
"""

from __future__ import annotations

import copy
import io
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .features import FeatureHints

FORMAT = "sparsekd training, version 3"
FIELDS = {
    "format", "kinds", "student", "optimizer", "scheduler", "pruner", "adapters", "epoch", "history",
    "rng", "cuda_rng", "loader_rng", "scaler", "average",
}  # fmt: skip


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave; accuracies in 0..1, None where there was no label or no loader to take them from."""

    epoch: int  # from 0
    loss: float  # the whole objective, mean over the rows
    train_accuracy: float | None  # on the training batches as they came, so by the weights of that moment
    val_accuracy: float | None
    seconds: float


class TrainingState:
    """The parts of a run that change while it goes on, and the step that changes them."""

    def __init__(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: object,
        pruner: object,
        hints: FeatureHints | None,
        loader: Iterable,
        scaler: torch.amp.GradScaler | None = None,
        clip_norm: float | None = None,
        average: nn.Module | None = None,
    ) -> None:
        self.student, self.optimizer, self.scheduler = student, optimizer, scheduler
        self.pruner, self.hints = pruner, hints
        self.scaler, self.clip_norm, self.average = scaler, clip_norm, average
        generator = getattr(loader, "generator", None)
        self._generator = generator if isinstance(generator, torch.Generator) else None
        self._enlisted: list[nn.Parameter] = []

    # --- training ---

    def backward(self, objective: Tensor) -> None:
        """Adds to the gradients of the step under way."""
        self.enlist_adapters()
        (objective if self.scaler is None else self.scaler.scale(objective)).backward()

    def step(self) -> None:
        """One step of the optimiser, and of the pruner, which zeroes what the optimiser moved."""
        if self.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(held, self.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.pruner is not None:
            self.pruner.step()
        if self.average is not None:
            self.average.update_parameters(self.student)
            if hasattr(self.pruner, "apply_masks"):
                # Earlier weights are in the average, also of what is pruned by now.
                self.pruner.apply_masks(self.average)
        self.optimizer.zero_grad(set_to_none=True)

    def end_epoch(self, loss: float) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif self.scheduler is not None:
            self.scheduler.step()

    def enlist_adapters(self) -> None:
        """Gives the adapters made so far to the optimiser.

        They join its first group: schedulers count the groups when they are built, so a new one would be left out.
        """
        if self.hints is None:
            return
        for parameter in self.hints.parameters():
            if not any(parameter is other for other in self._enlisted):
                self.optimizer.param_groups[0]["params"].append(parameter)
                self._enlisted.append(parameter)

    def release_adapters(self) -> None:
        """Leaves the optimiser with the parameters that it came with."""
        group = self.optimizer.param_groups[0]
        for parameter in self._enlisted:
            group["params"] = [other for other in group["params"] if other is not parameter]
            self.optimizer.state.pop(parameter, None)
        self._enlisted.clear()

    # --- as one value ---

    def kinds(self) -> dict[str, str | dict | None]:
        """What the state is of; a state fits where these agree, and the student's tensors do."""
        named = {"optimizer": self.optimizer, "scheduler": self.scheduler, "pruner": self.pruner}
        named |= {"scaler": self.scaler, "average": self.average}
        kinds = {name: None if part is None else type(part).__name__ for name, part in named.items()}
        return kinds | {"features": None if self.hints is None else self.hints.pairs}

    def take(self, history: list[EpochRecord]) -> dict:
        """The state after the epochs of ``history``; its tensors are those in use, not copies."""
        return {
            "format": FORMAT,
            "kinds": self.kinds(),
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "adapters": None if self.hints is None else self.hints.state_dict(),
            "epoch": len(history),
            "history": [asdict(record) for record in history],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "loader_rng": None if self._generator is None else self._generator.get_state(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def put(self, state: Mapping) -> None:
        """Puts a state back; where any part refuses it, all are left as they were and the error is raised on."""
        before = copy.deepcopy(self.take([]))
        try:
            self._put(state)
        except BaseException:
            self._put(before)
            raise

    def _put(self, state: Mapping) -> None:
        self.release_adapters()
        self.student.load_state_dict(state["student"])
        if self.hints is not None:
            self.hints.load_state_dict(state["adapters"])
            self.enlist_adapters()  # first, for the optimiser's state counts them
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self._generator is not None and state["loader_rng"] is not None:
            self._generator.set_state(state["loader_rng"])
        if state["cuda_rng"] and len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        torch.set_rng_state(state["rng"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.pruner is not None:
            # Last: a pruner that is done lets go of its hooks, which no later failure could bring back.
            self.pruner.load_state_dict(state["pruner"])

    def misfit(self, state: object) -> str | None:
        """What is wrong with a state that is to be put here; None when nothing is."""
        if not isinstance(state, dict) or state.get("format") != FORMAT or set(state) != FIELDS:
            return "another kind of file"
        own, saved = _outline(self.student.state_dict()), _outline(state["student"])
        for name in sorted(set(own) | set(saved)):
            if own.get(name) != saved.get(name):
                return f"one of another model: {name} is {saved.get(name, 'missing')}, not {own.get(name, 'there')}"
        for name, kind in self.kinds().items():
            if state["kinds"].get(name) != kind:
                return f"one with {name} {state['kinds'].get(name)}, not {kind}"
        if state["epoch"] != len(state["history"]):
            return f"one of {state['epoch']} epochs with records of {len(state['history'])}"
        return None


def _outline(state: Mapping) -> dict[str, str]:
    """Name to shape and dtype, as text."""
    return {
        name: f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        for name, value in state.items()
    }


class Checkpoint:
    """The file of a run.

    ``save`` takes the state to memory first and then writes it, so that an interrupt finds, in the file or in memory,
    the whole state of the last finished epoch and nothing of the one under way.
    """

    def __init__(self, path: str | os.PathLike, state: TrainingState) -> None:
        self.path, self.state = Path(path), state
        self._pending: bytes | None = None
        if not self.path.parent.is_dir():
            raise ValueError(f"Expected a checkpoint in a folder that exists, got {self.path}")
        for name, part in (("scheduler", state.scheduler), ("pruner", state.pruner)):
            if part is not None and not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
                got = type(part).__name__
                raise TypeError(
                    f"Expected a {name} with state_dict and load_state_dict to keep a checkpoint, got {got}"
                )

    def resume(self) -> list[EpochRecord]:
        """Puts the file's state in place where there is a file; the records of the epochs that it has behind it.

        Raises:
            ValueError: the file can't be read, or is of another training; nothing is changed then.
        """
        if not self.path.exists():
            self._pending = self._packed([])
            try:
                _unpacked(self._pending)
            except Exception as error:
                raise ValueError(
                    "Expected optimizer, scheduler and pruner states of tensors and plain types to keep a checkpoint, "
                    f"got others: {_first_line(error)}"
                ) from error
            return []
        expected = f"Expected a checkpoint of this training of {type(self.state.student).__name__} in {self.path}"
        try:
            found = _unpacked(self.path.read_bytes())
        except Exception as error:  # a torn file raises one of many kinds
            raise ValueError(f"{expected}, got a file that can't be read: {_first_line(error)}") from error
        try:
            wrong = self.state.misfit(found)
            history = [] if wrong else [EpochRecord(**fields) for fields in found["history"]]
            if wrong is None:
                self.state.put(found)
        except Exception as error:
            raise ValueError(f"{expected}, got one that does not fit: {_first_line(error)}") from error
        if wrong is not None:
            raise ValueError(f"{expected}, got {wrong}")
        return history

    def save(self, history: list[EpochRecord]) -> None:
        """Replaces the file by the state after the epochs of ``history``."""
        self._pending = self._packed(history)
        self.flush()

    def flush(self) -> None:
        """Writes what ``save``, or the start of the run, has taken and not yet written."""
        if self._pending is None:
            return
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            with open(aside, "wb") as file:
                file.write(self._pending)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        self._pending = None

    def _packed(self, history: list[EpochRecord]) -> bytes:
        buffer = io.BytesIO()
        torch.save(self.state.take(history), buffer)
        return buffer.getvalue()


def put_aside(path: Path) -> None:
    """Renames what an earlier run left, so that a new one can begin and nothing is lost; the newest is kept."""
    if path.exists():
        aside = path.with_name(f"{path.name}.old")
        if aside.is_dir():
            shutil.rmtree(aside)
        path.replace(aside)
        print(f"an earlier run's {path.name} was there (--resume goes on with it); it is kept as {aside}")


def _unpacked(content: bytes) -> object:
    # torch.load does not look at the checksums that torch.save writes.
    broken = zipfile.ZipFile(io.BytesIO(content)).testzip()
    if broken is not None:
        raise ValueError(f"the checksum of {broken} is wrong")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__

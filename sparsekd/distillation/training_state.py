"""Everything that a training run consists of, taken and put back as one; ``checkpoint.py`` keeps it in a file."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from . import random_state
from .features import FeatureHints

FORMAT = "sparsekd training, version 4"
FIELDS = {
    "format", "kinds", "student", "optimizer", "scheduler", "pruner", "adapters", "epoch", "history", "begun",
    "rng", "scaler", "average",
}  # fmt: skip


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave; accuracies in 0..1, None where there was no label or no loader to take them from."""

    epoch: int  # from 0
    loss: float  # the whole objective, mean over the rows
    train_accuracy: float | None  # on the training batches as they came, so by the weights of that moment
    val_accuracy: float | None
    seconds: float
    lr: float | None = None  # of the optimizer's first group, in this epoch's last step
    sparsity: float | None = None  # of the prunable weights, where a pruner tells it


@dataclass
class EpochSums:
    """Of an epoch that is under way."""

    batches: int = 0
    rows: int = 0
    total: float = 0.0  # of the objective, over the rows
    right: int = 0
    labelled: int = 0
    seconds: float = 0.0
    rng: dict | None = None  # the random numbers that it began with

    def add(self, value: float, rows: int, right: int, labelled: int) -> None:
        self.batches, self.rows, self.total = self.batches + 1, self.rows + rows, self.total + value * rows
        self.right, self.labelled = self.right + right, self.labelled + labelled

    @property
    def loss(self) -> float:
        return self.total / max(self.rows, 1)

    @property
    def accuracy(self) -> float | None:
        return self.right / self.labelled if self.labelled else None


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
        self.begun: EpochSums | None = None  # the epoch under way, where it has begun

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

    def begin_epoch(self, loader: Iterable) -> tuple[Iterator, EpochSums]:
        """The batches of an epoch, and what was done of it before; those batches are left out."""
        here = random_state.take(self._generator)
        resumed, self.begun = self.begun, self.begun or EpochSums(rng=here)
        if resumed is not None:
            random_state.put(resumed.rng, self._generator)  # the loader draws its order again
        batches = iter(loader)
        if resumed is not None:
            deque(islice(batches, resumed.batches), maxlen=0)
            random_state.put(here, self._generator)
        return batches, self.begun

    def end_epoch(self, loss: float) -> None:
        self.begun = None
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
        kinds["features"] = None if self.hints is None else self.hints.pairs
        kinds["feature_loss"] = None if self.hints is None else self.hints.name
        return kinds

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
            "begun": None if self.begun is None else asdict(self.begun),
            "rng": random_state.take(self._generator),
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
        random_state.put(state["rng"], self._generator)
        self.begun = None if state["begun"] is None else EpochSums(**state["begun"])
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

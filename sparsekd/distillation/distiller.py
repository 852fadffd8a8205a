"""The training loop: a student from a frozen teacher, or alone, pruned on the way if asked, and resumable bit for bit.

    minimise   L(student(x), teacher(x), y)  +  feature_weight * hints  +  penalty_weight * R(W)

L and R are in ``losses.py``, the hints in ``features.py``, what a checkpoint holds in ``training_state.py``.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .checkpoint import Checkpoint
from .features import FeatureHints
from .losses import KDLoss
from .losses import penalty as penalty_of
from .outputs import logits_of
from .progress import progress_bar
from .training_state import EpochRecord, TrainingState

IGNORED = -100
_DEFAULT_LOSS = KDLoss()  # what the signature shows; every Distiller makes its own


def _pair(batch: object, device: torch.device | None) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0].to(device), batch[1].to(device)
    got = type(batch).__name__
    if isinstance(batch, (tuple, list)):
        got += f" of ({', '.join(type(part).__name__ for part in batch)})"
    raise TypeError(f"Expected batches (x, y) of two tensors, got a {got}")


def _scalar(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"Expected {name} to give a scalar tensor, got {got}")
    return value


def _device(model: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in model.parameters()), None)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode; afterwards each module has the mode that it had, which need not be the same for all."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _hits(logits: Tensor, y: Tensor, ignore_index: int) -> tuple[int, int]:
    """Right and labelled rows (positions, for dense targets)."""
    labelled = y != ignore_index
    return int(((logits.argmax(1 if logits.dim() > 1 else 0) == y) & labelled).sum()), int(labelled.sum())


def evaluate(model: nn.Module, loader: Iterable, ignore_index: int = IGNORED) -> float:
    """Accuracy of ``model`` over all batches, in 0..1, in eval mode and without gradients; modes are restored.

    Args:
        loader: batches ``(x, y)``, y int64 ``[N]`` or ``[N, d1, ...]`` for logits ``[N, C]`` or ``[N, C, d1, ...]``.
        ignore_index: rows with this label are left out.

    Raises:
        ValueError: no labelled row. TypeError: batches or outputs of another kind.
    """
    device, right, labelled = _device(model), 0, 0
    with _mode(model, False), torch.no_grad():
        for batch in loader:
            x, y = _pair(batch, device)
            found = _hits(logits_of(model(x)), y, ignore_index)
            right, labelled = right + found[0], labelled + found[1]
    if labelled == 0:
        raise ValueError("Expected a loader with at least one labelled row to evaluate on, got none")
    return right / labelled


class Distiller:
    """Trains a student, from a teacher or alone.

    Args:
        student: trained in place.
        teacher: runs in eval mode without gradients and is not changed (nor are its batch statistics); its modes are
            restored afterwards. A copy of the student makes self-distillation. None trains the student alone, by cross
            entropy with labels -100 left out, and ``loss`` is not used.
        loss: ``(student_logits, teacher_logits, target) -> scalar``, a :class:`KDLoss` or like it.
        features: ``{student path: teacher path}`` of modules whose outputs are drawn together
            (:class:`FeatureHints`) by ``feature_loss``, "fitnet", "at", "rkd", "sp" or a callable, added with
            ``feature_weight``.
        penalty: R(W): "l1", "l2" or a callable from the student to a scalar, added with ``penalty_weight``.

    Both networks may give logits, an object with ``.logits`` (Hugging Face) or a tuple that starts with logits.

    Raises:
        ValueError, TypeError: settings that don't fit.

    Source: Hinton, Vinyals, Dean, 2015; hints: Romero et al., ICLR 2015.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor] = _DEFAULT_LOSS,
        features: Mapping[str, str] | None = None,
        penalty: str | Callable[[nn.Module], Tensor] | None = None,
        penalty_weight: float = 0.0,
        feature_weight: float = 1.0,
        feature_loss: str | Callable[[Tensor, Tensor], Tensor] = "fitnet",
    ) -> None:
        if not isinstance(student, nn.Module):
            raise TypeError(f"Expected student to be a torch.nn.Module, got {type(student).__name__}")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"Expected teacher to be a torch.nn.Module or None, got {type(teacher).__name__}")
        if teacher is student:
            raise ValueError("Expected teacher and student to be two modules, got the same one twice")
        if teacher is None and features:
            raise ValueError("Expected a teacher to take features from, got none")
        if feature_loss != "fitnet" and not features:
            raise ValueError(f"Expected features for feature_loss={feature_loss!r}, got none")
        if loss is not None and not callable(loss):
            raise TypeError(f"Expected loss to be callable, got {type(loss).__name__}")
        for name, weight in (("penalty_weight", penalty_weight), ("feature_weight", feature_weight)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"Expected {name} to be finite and at least 0, got {weight}")
        if penalty is None and penalty_weight:
            raise ValueError(f"Expected a penalty for penalty_weight={penalty_weight}, got none")
        self.student, self.teacher = student, teacher
        self.loss = KDLoss() if loss is None or loss is _DEFAULT_LOSS else loss
        self.hints = FeatureHints(student, teacher, features, feature_loss) if features else None
        self.penalty = None if penalty is None else penalty_of(penalty)
        self.penalty_weight, self.feature_weight = penalty_weight, feature_weight
        self.average: nn.Module | None = None
        self.ignore_index = IGNORED if teacher is None else getattr(self.loss, "ignore_index", IGNORED)

    def fit(
        self,
        train_loader: Iterable,
        epochs: int,
        optimizer: torch.optim.Optimizer,
        scheduler: object = None,
        pruner: object = None,
        val_loader: Iterable | None = None,
        checkpoint: str | os.PathLike | None = None,
        progress: bool | None = None,
        on_epoch: Callable[[EpochRecord], object] | Iterable[Callable] | None = None,
        *,
        checkpoint_steps: int | None = None,
        amp: torch.dtype | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        ema: float | None = None,
    ) -> list[EpochRecord]:
        """Trains until ``epochs`` epochs are done, those of an earlier run in ``checkpoint`` included.

        Args:
            train_loader: batches ``(x, y)`` of tensors. Where it has an attribute ``epoch``, that is set to 0, 1, ...
                before each pass, so that its order can depend on it.
            optimizer: over the student's parameters. Adapters of ``features`` join its first group during the call.
            scheduler: its ``step()`` is called after each epoch (``step(loss)`` for ReduceLROnPlateau).
            pruner: its ``step()`` is called after each ``optimizer.step()``; a checkpoint needs its ``state_dict()``
                and ``load_state_dict()`` too.
            val_loader: evaluated after each epoch.
            checkpoint: a file. Where it exists the training goes on from it, bit for bit as if it had never stopped;
                it is replaced in one move after each epoch. On KeyboardInterrupt, which is raised on, it holds the
                last finished epoch. Random numbers of torch, Python and numpy, and of the loader's ``generator``, are
                in it. Under torch.distributed each rank has a file of its own, ``checkpoint`` with ``.rankN`` added,
                and the one before it; all go on from the last step that every rank has.
            progress: a bar with loss, accuracy and the time left. True shows it, and writes a line per epoch where the
                standard output is no terminal; False is quiet; None shows it on a terminal only.
            on_epoch: called with each new record, after the checkpoint is written; one or several, as
                :class:`CSVLog` and :class:`TensorBoardLog`.
            checkpoint_steps: replace the file after so many steps of the optimizer too. A training that goes on within
                an epoch asks the loader for the batches that are done again, and leaves them out.
            amp: torch.bfloat16 or torch.float16: both networks run under autocast to it, losses in float32; with
                float16 a GradScaler scales the objective and leaves out steps that overflow.
            accumulate: batches whose gradients make one step of the optimizer, each with the same weight; at the end of
                an epoch the rest.
            clip_norm: gradients of a step are scaled down to this norm, all parameters of the optimizer together.
            ema: decay in (0, 1) of an exponential average of the weights (and buffers), under the pruner's masks. It is
                what ``val_loader`` is evaluated on, and ``distiller.average`` afterwards.

        Returns:
            One record per epoch, from the first on.

        Raises:
            ValueError: an empty loader; a checkpoint that is broken or of another training (file and student stay as
            they are); settings that don't fit. TypeError: batches or outputs of another kind. FloatingPointError: a
            loss that is not finite, before it changes a weight; the checkpoint stays that of the last finished epoch.
        """
        self._check(epochs, optimizer, train_loader, val_loader)
        _check_options(amp, accumulate, clip_norm, ema)
        _check_checkpoint_steps(checkpoint_steps, checkpoint)
        scaler = None
        if amp == torch.float16:
            scaler = torch.amp.GradScaler((_device(self.student) or torch.device("cpu")).type)
        self.average = None
        if ema is not None:
            self.average = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
        self._amp, self._accumulate = amp, accumulate
        state = TrainingState(
            self.student, optimizer, scheduler, pruner, self.hints, train_loader, scaler, clip_norm, self.average
        )
        with ExitStack() as stack:
            stack.enter_context(_mode(self.student, True))
            if self.teacher is not None:
                stack.enter_context(_mode(self.teacher, False))
            stack.callback(state.release_adapters)
            state.enlist_adapters()
            optimizer.zero_grad(set_to_none=True)  # what an earlier backward may have left
            file = None if checkpoint is None else Checkpoint(checkpoint, state, checkpoint_steps)
            history = [] if file is None else file.resume()
            show = stack.enter_context(progress_bar(train_loader, len(history), epochs, progress))
            try:
                for epoch in range(len(history), epochs):
                    history.append(self._epoch(epoch, train_loader, val_loader, state, show, file, history))
                    if file is not None:
                        file.save(history)
                    if on_epoch is not None:
                        # What it draws would otherwise be missing when the training is resumed.
                        with torch.random.fork_rng(devices=[]):
                            for call in (on_epoch,) if callable(on_epoch) else on_epoch:
                                call(history[-1])
            except KeyboardInterrupt:
                if file is not None:
                    file.flush()
                raise
        return history

    def _check(self, epochs: object, optimizer: object, train_loader: object, val_loader: object) -> None:
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"Expected epochs to be an int of at least 1, got {epochs!r}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"Expected optimizer to be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in self.student.parameters()):
            raise ValueError("Expected an optimizer over the student's parameters, got one over none of them")
        if self.teacher is not None:
            taken = [n for n, p in self.teacher.named_parameters() if id(p) in held and p.requires_grad]
            if taken:
                raise ValueError(
                    f"Expected an optimizer that leaves the teacher alone, got one that holds its {taken[0]}"
                )
        for name, loader in (("train_loader", train_loader), ("val_loader", val_loader)):
            if hasattr(loader, "__len__") and len(loader) == 0:
                raise ValueError(f"Expected {name} to give at least one batch, got an empty one")

    def _epoch(
        self, epoch: int, train_loader, val_loader, state: TrainingState, show: Callable, file: Checkpoint | None,
        history: list[EpochRecord],
    ) -> EpochRecord:  # fmt: skip
        began = time.perf_counter()
        if hasattr(train_loader, "epoch"):
            train_loader.epoch = epoch
        device = _device(self.student)
        batches, done = state.begin_epoch(train_loader)  # of an epoch that was begun, what is left
        began -= done.seconds
        with self.hints or nullcontext():
            for batch, share, last in _shares(batches, self._accumulate):
                x, y = _pair(batch, device)
                logits, objective = self._objective(x, y)
                hits, known = _hits(logits.detach(), y, self.ignore_index)
                value = float(objective.detach())
                if not math.isfinite(value):
                    why = "" if known else ", which has no labelled row (see KDLoss(distill_ignored=True))"
                    raise FloatingPointError(
                        f"Expected a finite loss, got {value} at epoch {epoch}, batch {done.batches}{why}"
                    )
                state.backward(objective * share if share != 1 else objective)
                done.add(value, x.shape[0], hits, known)
                if last:
                    state.step()
                    done.seconds = time.perf_counter() - began
                    if file is not None:
                        file.after_step(history)
                show(done.loss, done.accuracy, 1)
        if done.batches == 0:
            raise ValueError(
                f"Expected train_loader to give at least one batch in each epoch, got none in epoch {epoch}"
            )
        judged = self.student if self.average is None else self.average
        val_accuracy = None if val_loader is None else evaluate(judged, val_loader, self.ignore_index)
        lr = float(state.optimizer.param_groups[0]["lr"])
        sparsity = getattr(state.pruner, "sparsity", None)
        sparsity = float(sparsity()) if callable(sparsity) else None
        state.end_epoch(done.loss)
        show(done.loss, done.accuracy if val_accuracy is None else val_accuracy, 0)
        return EpochRecord(epoch, done.loss, done.accuracy, val_accuracy, time.perf_counter() - began, lr, sparsity)

    def _objective(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The student's logits and the scalar to minimise."""
        if self.teacher is None:
            with self._autocast(x):
                logits = logits_of(self.student(x), "student")
            objective = F.cross_entropy(logits if self._amp is None else logits.float(), y, ignore_index=IGNORED)
        else:
            # Not inference_mode: its tensors can't be saved for the student's backward.
            with torch.no_grad(), self._autocast(x):
                taught = logits_of(self.teacher(x), "teacher")
            with self._autocast(x):
                logits = logits_of(self.student(x), "student")
            objective = self.loss(logits, taught, y)
        objective = _scalar("loss", objective)
        if self.hints is not None:
            objective = objective + self.feature_weight * self.hints.loss()
        if self.penalty is not None and self.penalty_weight:
            objective = objective + self.penalty_weight * _scalar("penalty", self.penalty(self.student))
        return logits, objective

    def _autocast(self, x: Tensor):
        return nullcontext() if self._amp is None else torch.autocast(x.device.type, self._amp)


def _check_checkpoint_steps(steps: object, checkpoint: object) -> None:
    if steps is None:
        return
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"Expected checkpoint_steps to be an int of at least 1 or None, got {steps!r}")
    if checkpoint is None:
        raise ValueError(f"Expected a checkpoint for checkpoint_steps={steps}, got none")


def _check_options(amp: object, accumulate: object, clip_norm: object, ema: object) -> None:
    if amp not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"Expected amp to be torch.bfloat16, torch.float16 or None, got {amp!r}")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"Expected accumulate to be an int of at least 1, got {accumulate!r}")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"Expected clip_norm to be positive and finite, got {clip_norm!r}")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"Expected ema in (0, 1), got {ema!r}")


def _shares(loader: Iterable, accumulate: int) -> Iterator[tuple[object, float, bool]]:
    """Each batch with its weight in its step, and whether it is the step's last."""
    held = []
    for batch in loader:
        held.append(batch)
        if len(held) == accumulate:
            yield from ((one, 1 / accumulate, index == accumulate - 1) for index, one in enumerate(held))
            held = []
    yield from ((one, 1 / len(held), index == len(held) - 1) for index, one in enumerate(held))

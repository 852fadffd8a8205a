"""Pruning and distillation in Hugging Face's ``Trainer``; needs the package transformers.

callback = PruningCallback(sparsity=0.8, schedule=sparsekd.CubicSL(100, 1000))
DistillationTrainer(model, args, teacher=teacher, train_dataset=data, callbacks=[callback]).train()
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(f"Expected the package transformers for sparsekd.hf, got none: {error}") from None

from .distillation import KDLoss
from .distillation.outputs import logits_of
from .pruning import Pruner


class PruningCallback(TrainerCallback):
    """Prunes the model while it is trained. The state is in ``pruner-N.pt`` (of rank N) of each checkpoint.

    Args:
        sparsity, settings: of :class:`sparsekd.Pruner`; the optimizer is the Trainer's.
        squash: drop masks and hooks at the end; the zeros stay.

    Raises:
        FileNotFoundError: training goes on from a checkpoint outside of ``args.output_dir``, or one that was written
            without this callback. TypeError, ValueError: as the Pruner does, when training begins.
    """

    def __init__(self, sparsity: float, squash: bool = True, **settings: object) -> None:
        self.sparsity, self.squash, self.settings = sparsity, squash, settings
        self.pruner: Pruner | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module,
        optimizer: torch.optim.Optimizer, **kwargs: object,
    ) -> None:  # fmt: skip
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has torch's inside
        self.pruner = Pruner(model, self.sparsity, optimizer=optimizer, **self.settings)
        if state.global_step:
            file = self._file(args, state)
            if not file.exists():
                raise FileNotFoundError(f"Expected the Pruner's state in {file} to go on from there, got no file")
            self.pruner.load_state_dict(torch.load(file, weights_only=True))

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.pruner.step()  # once for each step of the optimizer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        file = self._file(args, state)
        if file.parent.is_dir():
            torch.save(self.pruner.state_dict(), file)

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: dict | None = None, **kwargs: object
    ) -> None:
        if logs is not None and self.pruner is not None:
            logs["sparsity"] = self.pruner.sparsity()  # for the callbacks after this one, which show it
            state.log_history[-1]["sparsity"] = logs["sparsity"]

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if self.squash:
            self.pruner.squash_mask()

    @staticmethod
    def _file(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / f"pruner-{args.process_index}.pt"


class DistillationTrainer(Trainer):
    """A Trainer whose loss is that of a student with a frozen teacher, which is given the same inputs.

    Args:
        teacher: gives an output with ``.logits`` of the student's shape; put in eval mode.
        loss: ``(student_logits, teacher_logits, labels) -> scalar``; :class:`sparsekd.KDLoss` by default. Logits of
            ``[N, L, C]`` are given as ``[N L, C]``.
    """

    def __init__(
        self, *args: object, teacher: nn.Module, loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        **kwargs: object,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.teacher, self.distillation_loss = teacher.eval().requires_grad_(False), loss or KDLoss()
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch, so the Trainer averages steps

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: object = None
    ) -> Tensor | tuple[Tensor, object]:
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(f"Expected labels among the inputs, got {', '.join(sorted(inputs))}")
        outputs = model(**inputs)
        student = logits_of(outputs, "student")
        self.teacher.to(student.device)
        with torch.no_grad():
            taught = logits_of(self.teacher(**inputs), "teacher")
        student, taught = student.flatten(0, -2), taught.flatten(0, -2)
        loss = self.distillation_loss(student, taught, labels.flatten())
        return (loss, outputs) if return_outputs else loss

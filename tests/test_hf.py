"""Callback and Trainer in the real transformers."""

import types

import pytest
import torch
from torch import nn

from sparsekd import CubicSL, DistillationLoss

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")


class Classifier(nn.Module):
    """As those of Hugging Face: keyword arguments, an output with loss and logits."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x, labels=None):
        logits = self.net(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return types.SimpleNamespace(loss=loss, logits=logits)


def rows():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 4, generator=generator)
    return [{"x": row, "labels": row.argmax() % 3} for row in x]


def train(folder, resume=False, epochs=4, stop=None, squash=True, **options):
    from sparsekd.hf import DistillationTrainer, PruningCallback

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop

    args = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=4, learning_rate=0.01,
        save_strategy="steps", save_steps=8, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=4, seed=3,
        remove_unused_columns=False, **options,
    )  # fmt: skip
    callback = PruningCallback(
        0.75, squash, schedule=CubicSL(2, 20, update_frequency=2), budget="uniform", ignored_layers=["net.4"]
    )
    trainer = DistillationTrainer(
        Classifier(), args, teacher=Classifier(7), train_dataset=rows(), callbacks=[callback, Stop()]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def test_prunes_distils_and_resumes_to_the_bit(tmp_path):
    whole, callback = train(tmp_path / "whole", squash=False)
    model, teacher = whole.model, Classifier(7)
    for index in (0, 2):
        assert (model.net[index].weight == 0).float().mean() == 0.75
    assert model.net[4].weight.all() and callback.pruner.state_dict()["steps"] == 32
    assert [round(log["sparsity"], 2) for log in whole.state.log_history] == [
        0.22, 0.53, 0.69, 0.74, 0.75, 0.75, 0.75, 0.75, 0.75
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(whole.teacher.parameters(), teacher.parameters(), strict=True))
    train(tmp_path / "half", stop=16)
    resumed, callback = train(tmp_path / "half", resume=True, squash=False)
    assert callback.pruner.state_dict()["steps"] == 32
    for a, b in zip(model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_without_the_pruner_is_refused(tmp_path):
    train(tmp_path, epochs=1)
    (tmp_path / "checkpoint-8" / "pruner-0.pt").unlink()
    with pytest.raises(FileNotFoundError, match="Expected the Pruner's state in .*pruner-0.pt"):
        train(tmp_path, resume=True)


def test_one_step_for_each_of_the_optimizer(tmp_path):
    trainer, callback = train(tmp_path, epochs=1, squash=False, gradient_accumulation_steps=2)
    assert trainer.state.global_step == callback.pruner.state_dict()["steps"] == 4


def test_loss_of_tokens_is_that_of_rows():
    from sparsekd.hf import DistillationTrainer

    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    labels = torch.tensor([[1, -100, 2], [0, 4, -100]])
    loss = DistillationLoss("kl", 0.5)
    trainer = object.__new__(DistillationTrainer)
    trainer.distillation_loss, trainer.teacher = loss, nn.Identity()
    trainer.teacher.forward = lambda x: (teacher,)
    model = nn.Identity()
    model.forward = lambda x: (student,)
    got = trainer.compute_loss(model, {"x": torch.ones(1), "labels": labels})
    assert torch.equal(got, loss(student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten()))
    with pytest.raises(ValueError, match="Expected labels among the inputs, got x"):
        trainer.compute_loss(model, {"x": torch.ones(1)})

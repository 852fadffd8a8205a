"""The callback in the real Lightning."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd import CubicSL, KDLoss

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")


class Student(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.teacher = nn.Linear(4, 3).requires_grad_(False)
        self.seen = []

    def training_step(self, batch, index):
        x, y = batch
        self.seen.append((self.net[2].weight == 0).float().mean())
        return KDLoss()(self.net(x), self.teacher(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=0.01, weight_decay=0.1)


def loader():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 4, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, F.relu(x).argmax(1) % 3), batch_size=4)


def fit(folder, epochs, callback, resume=None, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[callback], logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, enable_checkpointing=False, **options,
    )  # fmt: skip
    model = Student()
    trainer.fit(model, loader(), ckpt_path=resume)
    return model, trainer, callback


@pytest.mark.parametrize("module", ["", "net"])
def test_prunes_and_holds(tmp_path, module):
    """All but what is named, or the student's layers alone, beside a teacher in the same module."""
    from sparsekd.lightning import PruningCallback

    named = {"ignored_layers": ["4"], "module": "net"} if module else {"ignored_layers": ["net.4", "teacher"]}
    schedule = CubicSL(2, 20, update_frequency=2)
    callback = PruningCallback(0.75, schedule=schedule, budget="uniform", **named)
    model, trainer, callback = fit(tmp_path, 4, callback)
    for layer in (model.net[0], model.net[2]):
        assert (layer.weight == 0).float().mean() == 0.75
    assert model.net[4].weight.all() and model.teacher.weight.all()
    assert model.seen == sorted(model.seen) and model.seen[0] == 0
    assert float(trainer.callback_metrics["sparsity"]) == 0.75
    state = trainer.optimizers[0].state[model.net[2].weight]
    assert not state["exp_avg"][model.net[2].weight == 0].any()
    assert set(model.state_dict()) == set(Student().state_dict())


def test_one_step_for_each_of_the_optimizer(tmp_path):
    from sparsekd.lightning import PruningCallback

    callback = PruningCallback(0.5, squash=False, importance_steps=4, ignored_layers=["teacher"])
    _, trainer, _ = fit(tmp_path, 1, callback, accumulate_grad_batches=2)
    assert callback.pruner.finished and trainer.global_step == 4
    assert callback.pruner.state_dict()["steps"] == 4


def test_resumed_from_lightnings_checkpoint_to_the_bit(tmp_path):
    from sparsekd.lightning import PruningCallback

    def made():
        return PruningCallback(
            0.75, squash=False, schedule=CubicSL(2, 20, update_frequency=2), ignored_layers=["net.4", "teacher"]
        )

    whole, _, _ = fit(tmp_path, 4, made())
    _, trainer, _ = fit(tmp_path, 2, made())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _, callback = fit(tmp_path, 4, made(), tmp_path / "half.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert callback.pruner.state_dict()["steps"] == 32

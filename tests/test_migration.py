"""The blocks of MIGRATION.md run as printed, and its names exist."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekd

TEXT = (Path(__file__).resolve().parent.parent / "MIGRATION.md").read_text()
BLOCKS = dict(re.findall(r"\n## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", TEXT, re.DOTALL))

pytestmark = pytest.mark.usefixtures("one_thread")


def test_there_is_one_for_each_of_five_tools():
    assert list(BLOCKS) == ["torch.nn.utils.prune", "torch.ao.pruning", "torchao", "SparseML", "Torch-Pruning"]


@pytest.mark.filterwarnings("ignore:.*stay dense.*:UserWarning")
@pytest.mark.parametrize("tool", BLOCKS)
def test_block_runs_as_printed(tool):
    if tool == "Torch-Pruning":
        pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    x = torch.randn(4, 3, 8, 8)
    scope = {
        "sparsekd": sparsekd, "copy": copy, "model": model, "x": x, "loss_fn": nn.functional.cross_entropy,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        "loader": [(torch.randn_like(x), torch.randint(4, (4,))) for _ in range(4)],
    }  # fmt: skip
    exec(compile(BLOCKS[tool], "MIGRATION.md", "exec"), scope)
    removed = {
        "torch.nn.utils.prune": 0.8, "torch.ao.pruning": (0.5 * 216 + 0.8 * 1152) / 1368, "torchao": 0.5 * 1152 / 1368,
        "SparseML": (0.5 * 216 + 0.9 * 1152) / 1368, "Torch-Pruning": 0.5 * 216 / 1368,
    }  # fmt: skip
    plain = sparsekd.to_dense(scope["model"])
    if tool == "Torch-Pruning":
        assert scope["smaller"][0].out_channels == 4 and scope["smaller"][3].in_features == 144
    zeros = sum(int((layer.weight == 0).sum()) for layer in (plain[0], plain[3]))
    assert zeros / 1368 == pytest.approx(removed[tool], abs=1e-3)


def test_names_exist():
    for name in (
        "Pruner",
        "CubicSL",
        "IterativeSL",
        "RigL",
        "KDLoss",
        "hold_masks",
        "prepare",
        "adopt_masks",
        "remove_channels",
    ):
        assert name in TEXT and hasattr(sparsekd, name)

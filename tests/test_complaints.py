"""What users of other tools complain about, where no other test has it: masks, gradients, budgets, files.

Each names the thread. The rest is where it belongs: the mask contract, budgets, losses, checkpoints.
"""

import io

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.pruning import CubicSL, Pruner

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 3)
    )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 2, 6, 6, generator=generator), torch.randint(3, (4,), generator=generator)


def trained(steps, **settings):
    """A model after some steps, its pruner and its optimizer."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    pruner = Pruner(model, 0.75, optimizer=optimizer, ignored_layers=(), **settings)
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
    return model, pruner, optimizer


def size(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


def test_final_weights_are_as_sparse_as_was_asked_for():
    """NVIDIA/apex#1474 (ASP): "final model weights are not sparse as expected", once they are saved and loaded."""
    model, pruner, _ = trained(12, schedule=CubicSL(2, 8))
    prunable = list(pruner.masks)
    pruner.squash_mask()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain = network()
    plain.load_state_dict(torch.load(file, weights_only=True), strict=True)
    total = sum(plain.state_dict()[name].numel() for name in prunable)
    assert sum(int((plain.state_dict()[name] == 0).sum()) for name in prunable) == round(0.75 * total)


def test_a_checkpoint_does_not_grow_while_masks_are_on():
    """haochen-rye/NeRV#21: weights beside masks and originals make the file twice as large."""
    model, _, _ = trained(4, importance_steps=2)
    assert list(model.state_dict()) == list(network().state_dict())
    assert size(model.state_dict()) == size(network().state_dict())


def test_masks_do_not_wear_off():
    """pytorch PR#65293: a mask that is multiplied into itself at each step ends as zero."""
    _, pruner, _ = trained(6, importance_steps=3)
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    for _ in range(30):
        pruner.step()
    assert all(torch.equal(mask, before[name]) for name, mask in pruner.masks.items()) and pruner.sparsity() == 0.75


def test_no_gradient_passes_a_hook_once_masks_are_final():
    """facebookresearch/open_lth#6: masks held by hooks on gradients are slow. These hold after the optimizer's step."""
    model, pruner, optimizer = trained(6, importance_steps=3)
    assert pruner.finished
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_what_is_saved_is_the_student():
    """clovaai/overhaul-distillation#38: "save the d_net or the s_net?". The student, which is a plain model as ever."""
    student, teacher = network(), nn.Sequential(network(), nn.Linear(3, 3))
    keys = list(student.state_dict())
    distiller = sparsekd.Distiller(student, teacher, features={"3": "0.3"})
    optimizer = torch.optim.SGD(
        distiller.parameters() if hasattr(distiller, "parameters") else student.parameters(), 0.1
    )
    distiller.fit([batch(0), batch(1)], 1, optimizer)
    assert list(student.state_dict()) == keys
    network().load_state_dict(student.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 4, 3), (2, 2, 8)),
        (nn.Conv3d(2, 4, 3), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose2d(2, 4, 3), (2, 2, 4, 4)),
        (nn.Linear(6, 4), (2, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_sensitivity_is_of_every_kind_of_layer(layer, shape):
    """microsoft/nni#3826: an analysis that knows nn.Conv2d only."""
    layer.reset_parameters()  # by the test's seed, not by what was drawn when the tests were collected
    model, x = nn.Sequential(layer, nn.ReLU()), torch.randn(shape)
    with torch.no_grad():
        want = model(x)
    found = sparsekd.sensitivity(model, lambda pruned: -float((pruned(x) - want).abs().sum().detach()), (0.5, 0.9))
    (name,) = found.layers
    assert name == "0.weight" and found.baseline == 0 and 0 > found.layers[name][0] > found.layers[name][1]

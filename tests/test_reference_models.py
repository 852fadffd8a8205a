"""The reference networks: parameters counted by hand, and the blocks worked out in small."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd.reference_models import BasicBlock, cifar_resnet20, reference_student, reference_teacher


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        # weights and biases: conv1, conv2, fc1, fc2
        (reference_teacher, [3 * 64 * 9 + 64, 64 * 128 * 9 + 128, 8192 * 512 + 512, 512 * 10 + 10]),
        (reference_student, [3 * 32 * 9 + 32, 32 * 64 * 9 + 64, 4096 * 256 + 256, 256 * 10 + 10]),
    ],
)
def test_reference_parameters(make, layers):
    model = make()
    assert [name for name, _ in model.named_children()] == ["conv1", "conv2", "fc1", "fc2"]
    assert [count(layer) for layer in model.children()] == layers
    assert count(model) == {reference_teacher: 4_275_594, reference_student: 1_070_794}[make]


@pytest.mark.parametrize("make", [reference_teacher, reference_student, cifar_resnet20])
@pytest.mark.parametrize("classes", [2, 10, 12])
def test_logits(make, classes):
    model = make(num_classes=classes).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (3, classes) and y.dtype == torch.float32
        torch.testing.assert_close(model(x[1:2]), y[1:2], rtol=1e-4, atol=1e-5)
        assert model(x[:0]).shape == (0, classes)


def test_reference_net_layer_by_layer():
    model, x = reference_student(), torch.randn(2, 3, 32, 32)
    halved = nn.Sequential(model.conv1, nn.ReLU(), nn.MaxPool2d(2), model.conv2, nn.ReLU(), nn.MaxPool2d(2))
    whole = nn.Sequential(halved, nn.Flatten(), model.fc1, nn.ReLU(), model.fc2)
    assert halved(x).shape == (2, 64, 8, 8)
    assert torch.equal(model(x), whole(x))


def test_resnet20_parameters():
    # Convolutions without bias, two figures for each channel of a batch norm, the fully connected layer.
    convolutions = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert count(cifar_resnet20()) == convolutions + norms + 64 * 10 + 10 == 269_722


def test_resnet20_has_20_layers():
    model = cifar_resnet20()
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == 20
    assert [name for name, _ in model.named_children()] == ["conv1", "bn1", "layer1", "layer2", "layer3", "fc"]


def test_resnet20_fourfold():
    model = cifar_resnet20(width=64)
    assert [stage[-1].conv2.out_channels for stage in (model.layer1, model.layer2, model.layer3)] == [64, 128, 256]
    assert model.fc.in_features == 256


def test_block_is_its_shortcut_when_the_convolutions_are_silent():
    block = BasicBlock(2, 5, stride=2)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 2, 4, 4)
    expected = torch.zeros(1, 5, 2, 2)
    expected[:, :2] = x[:, :, [0, 2]][:, :, :, [0, 2]].relu()
    assert torch.equal(block(x), expected)
    same = BasicBlock(2, 2)
    nn.init.zeros_(same.conv2.weight)
    assert torch.equal(same(x), x.relu())


def test_block_against_its_formula():
    block, x = BasicBlock(3, 3).eval(), torch.randn(2, 3, 6, 6)
    first = F.relu(F.conv2d(x, block.conv1.weight, padding=1) / (1 + block.bn1.eps) ** 0.5)  # a new norm in eval mode
    second = F.conv2d(first, block.conv2.weight, padding=1) / (1 + block.bn2.eps) ** 0.5
    torch.testing.assert_close(block(x), F.relu(x + second))


@pytest.mark.parametrize("make", [reference_teacher, reference_student, cifar_resnet20])
def test_gradients_reach_every_parameter(make):
    model = make()
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reference_teacher(0), "num_classes .* got 0"),
        (lambda: reference_student(2.5), "num_classes .* got 2.5"),
        (lambda: cifar_resnet20(width=0), "width .* got 0"),
        (lambda: cifar_resnet20(num_classes=-1), "num_classes .* got -1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"^Expected {message}$"):
        call()

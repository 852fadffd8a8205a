"""The networks of the reference system, all for ``[N, 3, 32, 32]`` images and giving logits ``[N, num_classes]``.

- reference_teacher: conv 3x3 3 -> 64, ReLU, pool, conv 3x3 64 -> 128, ReLU, pool, fc 8192 -> 512, ReLU, fc -> classes.
- reference_student: the same at half the widths: 32, 64, fc 4096 -> 256.
- cifar_resnet20: He et al., "Deep residual learning for image recognition", CVPR 2016 (arXiv 1512.03385, 2015), section
  4.2, with n = 3.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"Expected {name} to be an integer of at least 1, got {value!r}")


class ReferenceNet(nn.Module):
    """Two convolutions, each halved by a max pool, and two fully connected layers.

    Args:
        width: channels of the first convolution; the second has twice as many.
        hidden: features between the fully connected layers.
    """

    def __init__(self, width: int, hidden: int, num_classes: int = 10) -> None:
        super().__init__()
        _check(width=width, hidden=hidden, num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc1 = nn.Linear(2 * width * 8 * 8, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # [N, width, 16, 16]
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # [N, 2 width, 8, 8]
        x = F.relu(self.fc1(x.flatten(1)))  # [N, hidden]
        return self.fc2(x)


def reference_teacher(num_classes: int = 10) -> ReferenceNet:
    """4,275,594 parameters for 10 classes. Raises ValueError below 1 class."""
    return ReferenceNet(64, 512, num_classes)


def reference_student(num_classes: int = 10) -> ReferenceNet:
    """1,070,794 parameters for 10 classes, a quarter of the teacher's. Raises ValueError below 1 class."""
    return ReferenceNet(32, 256, num_classes)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (the paper's option A, its choice for CIFAR).

    ``[N, in_channels, H, W]`` to ``[N, out_channels, H / stride, W / stride]``. Where the shape changes, the shortcut
    takes every ``stride``-th pixel and fills the channels that are new with zeros.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, out_channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels > 0:
            x = F.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """6n + 2 layers: a convolution, three stages of n blocks at 32, 16 and 8 pixels a side, a fully connected layer."""

    def __init__(self, blocks: int = 3, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        _check(blocks=blocks, width=width, num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, 1)
        self.layer2 = _stage(blocks, width, 2 * width, 2)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # the paper's own, from He et al., ICCV 2015
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # [N, width, 32, 32]
        x = self.layer3(self.layer2(self.layer1(x)))  # [N, 4 width, 8, 8]
        return self.fc(x.mean((2, 3)))


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))


def cifar_resnet20(width: int = 16, num_classes: int = 10) -> CifarResNet:
    """ResNet-20 for CIFAR, with ``width``, 2 ``width`` and 4 ``width`` channels in its stages.

    269,722 parameters at the paper's width of 16 (its 0.27 million); ``width=64`` is the fourfold one, 64/128/256.
    Raises ValueError for a width or a number of classes below 1.
    """
    return CifarResNet(3, width, num_classes)

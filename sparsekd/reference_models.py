"""The reference teacher and student, and the CIFAR ResNet-20: small networks for 3 x 32 x 32 images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReferenceNet(nn.Module):
    """conv3x3, ReLU, pool, conv3x3, ReLU, pool, fully connected, ReLU, fully connected.

    Input ``[N, 3, 32, 32]``, output logits ``[N, num_classes]``.
    """

    def __init__(self, width: int, hidden: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc1 = nn.Linear(2 * width * 8 * 8, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # [N, width, 16, 16]
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # [N, 2 width, 8, 8]
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def reference_teacher(num_classes: int = 10) -> ReferenceNet:
    """Channels 3, 64, 128, then 8192, 512, num_classes."""
    return ReferenceNet(64, 512, num_classes)


def reference_student(num_classes: int = 10) -> ReferenceNet:
    """Half the teacher's widths: channels 3, 32, 64, then 4096, 256, num_classes."""
    return ReferenceNet(32, 256, num_classes)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an identity; where the shape changes, a 1x1 convolution (option B of the paper)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2: 6n + 2 layers."""

    def __init__(self, blocks: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def cifar_resnet20(width: int = 16, num_classes: int = 10) -> CifarResNet:
    """ResNet-20 for 32 x 32 images, ``width`` channels in the first stage (16; 64 is the x4 one: 64/128/256)."""
    if width < 1:
        raise ValueError(f"Expected a width of at least 1, got {width}")
    return CifarResNet(3, width, num_classes)

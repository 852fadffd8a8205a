"""What optimize_for_inference puts in the place of several layers: one module, one pass over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .conv2d import SparseConv2d
from .plans import Watched

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


class FusedConv2d(Watched):
    """``activation(conv(input) + residual)``, by :func:`sparsekd.sparse.ops.conv2d_fused` where ``conv`` is sparse.

    Args:
        conv: a :class:`SparseConv2d`, or a plain ``nn.Conv2d`` (after :func:`sparsekd.to_dense`).
        activation: "none", "relu", "relu6", "silu" or "hardswish".

    Input ``[N, C, H, W]`` or ``[C, H, W]``; ``residual`` anything that can be added to the result. Both may lie in
    lanes (:func:`sparsekd.sparse.ops.to_lanes`). For inference: an error where a tensor requires a gradient.

    Attributes:
        lanes: the result stays in lanes where tensor cores compute it and N is divisible by 8; for one that only other
            fused convolutions read.
    """

    lanes = False

    def __init__(self, conv: nn.Module, activation: str = "none") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"Expected activation out of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.conv, self.activation = conv, activation

    def forward(self, input: Tensor, residual: Tensor | float | None = None) -> Tensor:
        conv = self._modules["conv"]
        sparse = isinstance(conv, SparseConv2d)
        if sparse:
            if not conv.channels_last and (residual is None or type(residual) is Tensor):
                output = conv.again(input, self.activation, residual)
                if output is not None:
                    return output
            conv._check_input(input)
        size = _image_size(input)
        fits = sparse and conv.padding_mode == "zeros" and not conv.channels_last
        plan = conv.plan_for(input, size) if fits else None
        in_lanes = self.lanes and plan is not None and plan.lanes
        lanes = in_lanes and input.dim() > 3 and size[0] % ops.LANES == 0
        if plan is None or not plan.lanes:
            input = _lie(input, False)
        residual = _lie(residual, lanes)
        fits = fits and not conv.runs_dense(input)
        if not fits or (residual is not None and not self._as_the_result(input, residual)):
            output = conv(_lie(input, False))
            residual = _lie(residual, False)
            return ACTIVATIONS[self.activation](output if residual is None else output + residual)
        if plan is not None and not lanes:
            conv.remember(input, self.activation)
            if (output := conv.again(input, self.activation, residual)) is not None:
                return output
        common = {
            "kernel_size": conv.kernel_size,
            "shift": conv.bias,
            "residual": residual,
            "activation": self.activation,
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
        }
        if conv.pattern is not None:
            return ops.conv2d_24_fused(input, *conv.packed_24(), **common)
        return ops.conv2d_fused(
            input,
            conv.values,
            conv.crow_indices,
            conv.col_indices,
            out_channels=conv.out_channels,
            row_indices=conv.row_indices,
            plan=plan,
            lanes=lanes,
            **common,
        )

    def _as_the_result(self, input: Tensor, residual: Tensor | float) -> bool:
        """Whether the residual has the shape and dtype of the result, so that nothing is broadcast."""
        conv = self.conv
        if not isinstance(residual, Tensor) or residual.dtype != input.dtype or isinstance(conv.padding, str):
            return False
        batch, _, *image = _image_size(input)
        geometry = zip(image, conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]
        alike = residual.dim() == 5 or min(input.dim(), 4) == residual.dim()
        return alike and _image_size(residual) == (batch, conv.out_channels, *size)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def _image_size(input: Tensor) -> tuple[int, ...]:
    """(N, C, H, W) of images, of one image, or of images in lanes."""
    if input.dim() == 5:
        return (input.shape[0] * ops.LANES, *input.shape[1:4])
    return (*(1,) * (4 - input.dim()), *input.shape)


def _lie(activations: Tensor | float | None, lanes: bool) -> Tensor | float | None:
    """The same activations in lanes, or as images; what is no batch of images stays as it is."""
    dim = activations.dim() if isinstance(activations, Tensor) else 0
    if dim == 4 and lanes and activations.shape[0] % ops.LANES == 0:
        return ops.to_lanes(activations)
    return ops.from_lanes(activations) if dim == 5 and not lanes else activations


class MaxPool2d(Watched):
    """``nn.MaxPool2d`` by :func:`sparsekd.sparse.ops.max_pool2d` for images that lie line by line on the CPU.

    Other layouts, dtypes and devices are torch's.

    Args:
        kernel_size, stride, padding: (height, width).
    """

    def __init__(self, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def forward(self, input: Tensor) -> Tensor:
        ours = input.device.type == "cpu" and input.dtype in (torch.float32, torch.float64) and input.is_contiguous()
        if not ours or (torch.is_grad_enabled() and input.requires_grad):
            return F.max_pool2d(input, self.kernel_size, self.stride, self.padding)
        return ops.max_pool2d(input, self.kernel_size, self.stride, self.padding)

    def to_dense(self) -> nn.MaxPool2d:
        return nn.MaxPool2d(self.kernel_size, self.stride, self.padding).train(self.training)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class Shortcut(Watched):
    """``input[:, :, ::stride, ::stride]`` with channels of zeros before and after its own.

    The shortcut without parameters of He et al., "Deep residual learning for image recognition", CVPR 2016 (option A).

    Args:
        stride: of lines and columns.
        new_channels: how many there are before the input's, and after.
    """

    def __init__(self, stride: tuple[int, int], new_channels: tuple[int, int]) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, new_channels

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input[:, :, :: self.stride[0], :: self.stride[1]], (0, 0, 0, 0, *self.new_channels))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, new_channels={self.new_channels}"

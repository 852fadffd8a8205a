"""Problem: one call of one layer, as far as its time goes. Measured times are kept under it, others predicted by it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..measure import machine
from .modules import SparseModule
from .ops import same_padding, uses_tf32


@dataclass(frozen=True)
class Problem:
    """Sizes of an ``nn.Conv2d``, ``nn.Conv1d`` (of height 1) or ``nn.Linear`` (whose rows are the batch)."""

    kind: str  # "conv2d" or "linear"
    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, int] = (1, 1)  # input height and width
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)  # of both sides together
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    layout: str = "nchw"  # of the input: "nchw" or "nhwc"
    weight_layout: str = "nchw"
    bias: bool = True
    padding_mode: str = "zeros"
    precision: str = "float32"  # "float32, autocast bfloat16" under autocast, "float32 as tf32" where a GPU may

    @classmethod
    def of(cls, layer: nn.Module, x: Tensor) -> Problem:
        """The call ``layer(x)`` of a plain or sparse layer."""
        bias, precision = layer.bias is not None, precision_of(x, not hasattr(layer, "in_features"))
        if isinstance(x, Tensor) and hasattr(layer, "in_features"):
            rows = x.numel() // max(x.shape[-1], 1)
            return cls("linear", rows, layer.in_features, layer.out_features, bias=bias, precision=precision)
        flat = len(layer.kernel_size) == 1
        batched = x if x.dim() == (3 if flat else 4) else x.unsqueeze(0)

        def pair(values, one):
            return (one, *values) if flat else tuple(values)

        kernel, dilation = pair(layer.kernel_size, 1), pair(layer.dilation, 1)
        if layer.padding == "same":
            padding = tuple(sum(sides) for sides in same_padding(kernel, dilation))
        else:
            padding = (0, 0) if layer.padding == "valid" else tuple(2 * side for side in pair(layer.padding, 0))
        return cls(
            "conv2d",
            batched.shape[0],
            layer.in_channels,
            layer.out_channels,
            pair(batched.shape[2:], 1),
            kernel,
            pair(layer.stride, 1),
            padding,
            dilation,
            layer.groups,
            _layout(batched),
            "nhwc" if _last(layer) else "nchw",
            bias,
            layer.padding_mode,
            precision,
        )

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the result."""
        sizes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple(max((n + p - d * (k - 1) - 1) // s + 1, 0) for n, k, s, p, d in sizes)

    @property
    def columns(self) -> int:
        """Of the weight as a matrix: input channels of a group times taps."""
        return self.in_channels // self.groups * math.prod(self.kernel)

    @property
    def weights(self) -> int:
        return self.out_channels * self.columns

    @property
    def multiplications(self) -> int:
        """Of the dense layer."""
        return self.batch * math.prod(self.output) * self.weights

    def as_row(self) -> dict:
        return asdict(self)


def in_tf32(x: Tensor, convolution: bool = True) -> bool:
    """Whether fp32 on this tensor's device keeps TF32's 10 bits of a factor, by the user's settings."""
    return machine.place(x).type == "cuda" and x.dtype == torch.float32 and uses_tf32(convolution)


def rounding_of(x: Tensor) -> float:
    """The rounding of a result, or of its factors where that is more: TF32 keeps as many digits as float16."""
    return torch.finfo(torch.float16 if in_tf32(x) or in_tf32(x, False) else x.dtype).eps


def precision_of(x: Tensor, convolution: bool = True) -> str:
    """The input's dtype, and autocast's where it is on."""
    name = str(x.dtype).removeprefix("torch.") + (" as tf32" if in_tf32(x, convolution) else "")
    device = machine.place(x).type
    if not torch.is_autocast_enabled(device):
        return name
    return f"{name}, autocast {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"


def _layout(x: Tensor) -> str:
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return "nhwc" if last else "nchw"


def _last(layer: nn.Module) -> bool:
    """Whether the layer answers in channels_last whatever it is given."""
    if isinstance(layer, SparseModule):
        return bool(getattr(layer, "channels_last", False))
    return _layout(layer.weight) == "nhwc"

"""Convolutions on tensor cores with what depends on the pattern alone made once, and activations in their own layout.

A plan (``csrc/cuda/conv2d_planned.cpp``) tells which column is where in the operands of tensor cores. In lanes, 8
images lie side by side: each shift by a tap of the kernel is then a whole vector of 16 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from .op_rules import LANES


class Plan(NamedTuple):
    """What a convolution on tensor cores reads in place of the pattern; holds none of the values."""

    indices: Tensor  # int32 [n]
    tiling: tuple[int, ...]  # chooses the kernel


def conv2d_plan(
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    vector: int,
    input_size: tuple[int, int, int, int],
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Plan | None:
    """The plan of a pattern for :func:`sparsekd.sparse.ops.conv2d_fused` on tensor cores: CUDA, half types, V >= 8.

    It is made for inputs ``[N, C, H, W]`` of ``input_size``, and right for those of other N, H and W, if slower. A plan
    of another pattern gives wrong numbers, but reads no foreign memory.

    Returns:
        None where tensor cores can't take the layer.
    """
    geometry = (out_channels, _pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation), groups)
    tiling = torch.ops.sparsekd.conv2d_tiling(col_indices, vector, input_size, *geometry)
    if not tiling:
        return None
    return Plan(
        torch.ops.sparsekd.conv2d_plan(crow_indices, col_indices, tiling, vector, input_size, *geometry), tuple(tiling)
    )


def takes_plans(device: torch.device) -> bool:
    """Whether the kernels that read plans are built for a device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("sparsekd::conv2d_planned", device.type.upper())


def to_lanes(input: Tensor) -> Tensor:
    """``[N, C, H, W]``, N divisible by 8, as ``[N / 8, C, H, W, 8]``: 8 images side by side, 16 bytes in half types."""
    return input.unflatten(0, (-1, LANES)).movedim(1, -1).contiguous()


def from_lanes(input: Tensor) -> Tensor:
    """``[N / 8, C, H, W, 8]`` as ``[N, C, H, W]``."""
    return input.movedim(-1, 1).flatten(0, 1)

"""Convolutions with what depends on the pattern alone made once, and activations in the layout of tensor cores.

On CUDA a plan (``csrc/cuda/conv2d_planned.cpp``) tells which column is where in the operands of tensor cores. In lanes,
8 images lie side by side: each shift by a tap of the kernel is then a whole vector of 16 bytes. On the CPU it holds the
distance of each column from a result's pixel (``csrc/cpu/kernels.h``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from .op_rules import LANES


class Plan(NamedTuple):
    """What a convolution reads in place of the pattern; holds none of the values."""

    indices: Tensor  # int32 [n]
    tiling: tuple[int, ...]  # chooses the kernel on CUDA; on the CPU the layout of the input that the plan is for
    order: Tensor | None = None  # int32 [n_vectors]: the pattern's entry at each place, if the plan has its own


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
    ordered: bool = False,
) -> Plan | None:
    """The plan of a pattern for :func:`sparsekd.sparse.ops.conv2d_fused`.

    On CUDA it is for tensor cores: half types, V >= 8. On the CPU for float32 ``[N, C, H, W]``; others are computed,
    too, but as without a plan.

    It is made for inputs ``[N, C, H, W]`` of ``input_size``, and right for those of other N, H and W, if slower. A plan
    of another pattern gives wrong numbers, but reads no foreign memory.

    Args:
        ordered: on the CPU entries lie as they are read, block by block of input channels, so that a weight that isn't
            in the caches comes in one stream. Values are then to be brought into the plan's ``order`` first, which
            :func:`sparsekd.sparse.ops.conv2d_fused` does at each call. CUDA has no such plans.

    Returns:
        None where tensor cores can't take the layer, and for no images.
    """
    geometry = (out_channels, _pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation), groups)
    tiling = torch.ops.sparsekd.conv2d_tiling(col_indices, vector, input_size, *geometry)
    if not tiling:
        return None
    ordered = ordered and col_indices.is_cpu
    if ordered:
        tiling = [1, *tiling[1:]]
    indices = torch.ops.sparsekd.conv2d_plan(crow_indices, col_indices, tiling, vector, input_size, *geometry)
    order = indices[indices.shape[0] - col_indices.shape[0] :] if ordered else None
    return Plan(indices, tuple(tiling), order)


def takes_plans(device: torch.device, dtype: torch.dtype, vector: int) -> bool:
    """Whether there are kernels that gain by plans."""
    if device.type == "cpu":
        return dtype == torch.float32
    built = torch._C._dispatch_has_kernel_for_dispatch_key("sparsekd::conv2d_planned", device.type.upper())
    return built and vector >= 8 and dtype in (torch.float16, torch.bfloat16)


def to_lanes(input: Tensor) -> Tensor:
    """``[N, C, H, W]``, N divisible by 8, as ``[N / 8, C, H, W, 8]``: 8 images side by side, 16 bytes in half types."""
    return input.unflatten(0, (-1, LANES)).movedim(1, -1).contiguous()


def from_lanes(input: Tensor) -> Tensor:
    """``[N / 8, C, H, W, 8]`` as ``[N, C, H, W]``."""
    return input.movedim(-1, 1).flatten(0, 1)

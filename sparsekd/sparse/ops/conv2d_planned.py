"""Convolutions with what depends on the pattern alone made once, and activations in the layout of tensor cores.

On CUDA a plan (``csrc/cuda/conv2d_planned.cpp``) tells which column is where in the operands of tensor cores. In lanes,
8 images lie side by side: each shift by a tap of the kernel is then a whole vector of 16 bytes. For CUDA cores and on
the CPU it holds the distance of each column from a result's pixel (``csrc/cuda/core_plan.h``, ``csrc/cpu/kernels.h``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import pair
from .registered import ON_CUDA, OPS, backend_of
from .rules import check_same_device, like, output_size, register_for_inference

LANES = 8  # images side by side in a vector of 16 bytes


class Plan(NamedTuple):
    """What a convolution reads in place of the pattern; holds none of the values."""

    indices: Tensor  # int32 [n]
    tiling: tuple[int, ...]  # chooses the kernel on CUDA; on the CPU the layout of the input that the plan is for
    order: Tensor | None = None  # int32 [n_vectors]: the pattern's entry at each place, if the plan has its own
    lanes: bool = False  # is for tensor cores: fits any N, H and W, and activations may lie in lanes


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
    tensor_cores: bool = True,
) -> Plan | None:
    """The plan of a pattern for :func:`sparsekd.sparse.ops.conv2d_fused`.

    On CUDA it is for tensor cores: half types, V >= 8; or for CUDA cores: any V, float32 and half types. On the CPU for
    float32 ``[N, C, H, W]``; others are computed, too, but as without a plan.

    It is made for inputs ``[N, C, H, W]`` of ``input_size``, and right for those of other N, H and W, if slower; but on
    CUDA cores an error for those. A plan of another pattern gives wrong numbers, but reads no foreign memory.

    Args:
        ordered: on the CPU entries lie as they are read, block by block of input channels, so that a weight that isn't
            in the caches comes in one stream. Values are then to be brought into the plan's ``order`` first, which
            :func:`sparsekd.sparse.ops.conv2d_fused` does at each call. CUDA has no such plans.
        tensor_cores: on CUDA, which of the two it is for.

    Returns:
        None where tensor cores, or a tile in shared memory, can't take the layer, and for no images.
    """
    geometry = (out_channels, pair(kernel_size), pair(stride), pair(padding), pair(dilation), groups)
    tiling = OPS.conv2d_tiling(col_indices, vector, input_size, *geometry, tensor_cores)
    if not tiling:
        return None
    ordered = ordered and col_indices.is_cpu
    if ordered:
        tiling = [1, *tiling[1:]]
    indices = OPS.conv2d_plan(crow_indices, col_indices, tiling, vector, input_size, *geometry)
    order = indices[indices.shape[0] - col_indices.shape[0] :] if ordered else None
    return Plan(indices, tuple(tiling), order, tensor_cores and for_tensor_cores(col_indices.device))


def for_tensor_cores(device: torch.device) -> bool:
    """Whether plans on a device may be for tensor cores: such fit inputs of any size, which may lie in lanes."""
    return device.type != "cpu"


def takes_plans(device: torch.device, dtype: torch.dtype, vector: int) -> bool:
    """Whether there are kernels that gain by plans; on CUDA those of tensor cores."""
    if not for_tensor_cores(device):
        return dtype == torch.float32
    return _built_for(device) and vector >= 8 and dtype in (torch.float16, torch.bfloat16)


def takes_core_plans(device: torch.device, dtype: torch.dtype, vector: int) -> bool:
    """Whether CUDA cores compute a layer, rather than tensor cores or Triton, by kernels that gain by plans."""
    if dtype != torch.float32 or not for_tensor_cores(device):
        return False
    return _built_for(device) and backend_of("conv2d_fused", dtype, vector) == "cuda"


def _built_for(device: torch.device) -> bool:
    return device.type == "cuda" and "conv2d_planned" in ON_CUDA


def to_lanes(input: Tensor) -> Tensor:
    """``[N, C, H, W]``, N divisible by 8, as ``[N / 8, C, H, W, 8]``: 8 images side by side, 16 bytes in half types."""
    return input.unflatten(0, (-1, LANES)).movedim(1, -1).contiguous()


def from_lanes(input: Tensor) -> Tensor:
    """``[N / 8, C, H, W, 8]`` as ``[N, C, H, W]``."""
    return input.movedim(-1, 1).flatten(0, 1)


@torch.library.register_fake("sparsekd::conv2d_planned")
def _conv2d_planned_fake(
    input, values, plan, tiling, rows, scale, shift, residual, activation, to_lanes, out_channels, kernel_size, stride,
    padding, dilation, groups
):  # fmt: skip
    check_same_device(input, {"values": values, "plan": plan, "scale": scale, "shift": shift, "residual": residual})
    height, width = output_size(input, kernel_size, stride, padding, dilation)
    batch = input.shape[0] * (LANES if input.dim() == 5 else 1)
    if to_lanes:
        size = (-(-batch // LANES), out_channels, height, width, LANES)
        pitch = (width + width % 2) * LANES  # rows begin at a 32-byte sector
        return input.new_empty_strided(size, (out_channels * height * pitch, height * pitch, pitch, LANES, 1))
    size = (batch, out_channels, height, width)
    return input.new_empty(size) if input.dim() == 5 else like(input, size)


register_for_inference("conv2d_planned", instead="conv2d")

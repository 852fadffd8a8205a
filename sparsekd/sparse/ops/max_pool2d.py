"""Max-pool for inference, of images that lie line by line."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import pair
from .registered import OPS, call
from .rules import output_size, register_for_inference


def max_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """:func:`torch.nn.functional.max_pool2d` on the CPU, several times as fast on ``[N, C, H, W]``.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, float32 or float64.
        kernel_size, stride, padding: (height, width).

    Returns:
        ``[..., H', W']``, contiguous; NaN where a window holds one.

    Raises:
        ValueError: shapes or geometry that do not fit. TypeError: another dtype. RuntimeError: for gradients.
    """
    return call(OPS.max_pool2d, input, pair(kernel_size), pair(stride), pair(padding))


@torch.library.register_fake("sparsekd::max_pool2d")
def _max_pool2d_fake(input, kernel_size, stride, padding):
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    size = output_size(batched, kernel_size, stride, padding, (1, 1))
    return input.new_empty((*input.shape[:-2], *size))


register_for_inference("max_pool2d", instead="torch.nn.functional.max_pool2d")

"""What arguments have in common: autocast, geometries, one image in the place of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .registered import call


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def autocast(input: Tensor, *others: object) -> list:
    """Under ``torch.autocast``, floating tensors in its dtype, as ``torch.nn.functional.conv2d`` takes them."""
    device = "cpu" if input.is_cpu else input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return [input, *others]
    dtype = torch.get_autocast_dtype(device)

    def lower(given):
        eligible = isinstance(given, Tensor) and given.is_floating_point() and given.dtype != torch.float64
        return given.to(dtype) if eligible else given

    return [lower(given) for given in (input, *others)]


def same_padding(kernel_size: tuple[int, int], dilation: tuple[int, int]) -> list[tuple[int, int]]:
    """(before, after) of each dimension for ``padding="same"``; the odd element goes after, as in torch."""
    totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def prepared(
    input: Tensor, kernel_size, stride, padding, dilation, groups, lanes: bool = False
) -> tuple[Tensor, tuple]:
    """The input, padded where the padding is not the same on both sides, and the geometry as the ops take it."""
    kernel_size, stride, dilation = pair(kernel_size), pair(stride), pair(dilation)
    if input.dim() not in ((3, 4, 5) if lanes else (3, 4)):
        raise ValueError(f"Expected an input of 3 or 4 dimensions ([N,] C, H, W), got shape {tuple(input.shape)}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'Expected padding to be numbers, "same" or "valid", got {padding!r}')
        if padding == "same" and stride != (1, 1):
            raise ValueError(f'Expected stride 1 with padding="same", got {stride}')
        sides = same_padding(kernel_size, dilation) if padding == "same" else [(0, 0), (0, 0)]
        extra = [after - before for before, after in sides]
        if any(extra):
            in_lanes = (0, 0) if input.dim() == 5 else ()
            input = F.pad(input, (*in_lanes, 0, extra[1], 0, extra[0]))
        padding = (sides[0][0], sides[1][0])
    return input, (kernel_size, stride, pair(padding), dilation, groups)


def convolution(op: torch._ops.OpOverload, input: Tensor, *arguments: object) -> Tensor:
    """Runs a convolution; one image ``[C, H, W]`` as a batch of one."""
    input, *arguments = autocast(input, *arguments)
    if input.dim() != 3:
        return call(op, input, *arguments)
    return call(op, input.unsqueeze(0), *arguments).squeeze(0)


def residual_of(input: Tensor, residual: Tensor | None) -> Tensor | None:
    """The residual of a batch, as :func:`convolution` makes one of the input."""
    return residual.unsqueeze(0) if residual is not None and input.dim() == 3 else residual

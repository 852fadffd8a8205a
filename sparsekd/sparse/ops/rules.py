"""What torch needs to know of every operator besides its kernels: its fake kernel and its gradient.

Each operator's are in its file. A backward calls another registered operator, and the input and weight gradients are
bilinear, so that any order of differentiation stays within them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def output_size(input: Tensor, kernel_size, stride, padding, dilation) -> list[int]:
    """Height and width of what a convolution makes of ``[N, C, H, W]``, or of images in lanes."""
    geometry = zip(input.shape[2:4], kernel_size, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]


def convolved(input: Tensor, out_channels: int, *geometry) -> Tensor:
    """What a convolution makes of ``[N, C, H, W]``; geometry: kernel_size, stride, padding, dilation, groups."""
    return like(input, (input.shape[0], out_channels, *output_size(input, *geometry[:-1])))


def check_same_device(first: Tensor, others: dict[str, Tensor | None]) -> None:
    """One tensor on meta brings the whole call to the fake kernel, whose result on the CPU would hold any numbers."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"Expected {name} on {first.device}, got {tensor.device}")


def like(source: Tensor, shape) -> Tensor:
    return torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=suggest_memory_format(source))


def save_factors(ctx, input, values, *pattern):
    """Of two factors, each is only needed for the gradient of the other."""
    of_values, of_input = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
    ctx.save_for_backward(input if of_values else None, values if of_input else None, *pattern)


def register_gradient(op: str, setup: Callable, backward: Callable) -> None:
    torch.library.register_autograd(f"sparsekd::{op}", backward, setup_context=setup)


def register_for_inference(op: str, instead: str) -> None:
    """A gradient that is an error."""

    def refuse(ctx, inputs, output):
        raise RuntimeError(
            f"Expected {op} under torch.no_grad() or on tensors without gradients, as it is for inference; got one "
            f"that requires a gradient: use {instead}"
        )

    register_gradient(op, refuse, refuse)

"""What torch needs to know of every operator besides its kernels: its fake kernel and its gradient.

Each operator's are in its file. A backward calls another registered operator, and the input and weight gradients are
bilinear, so that any order of differentiation stays within them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .registered import OPS


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


def register_gradient(op: str, setup: Callable, backward: Callable) -> None:
    torch.library.register_autograd(f"sparsekd::{op}", backward, setup_context=setup)


def register_bilinear(op: str, size_of: Callable[[Tensor], object]) -> None:
    """The gradients of an operator with a sparse weight, of ``<op>_input_grad`` and of ``<op>_weight_grad``.

    It is linear in (input) and in (values); writing f for it, f_x for the input gradient and f_w for the weight
    gradient, <f(x, w), g> = <x, f_x(g, w)> = <w, f_w(x, g)>. So the gradient of each is one of the other two.

    Args:
        size_of: what ``<op>_input_grad`` is told of the input's size.
    """
    product, input_grad, weight_grad = (getattr(OPS, name) for name in (op, f"{op}_input_grad", f"{op}_weight_grad"))

    def setup(ctx, inputs, output):
        input, values, *pattern, _, _ = inputs[:8]
        ctx.geometry = inputs[8:]
        # Of two factors, each is only needed for the gradient of the other.
        of_input, of_values = ctx.needs_input_grad[:2]
        ctx.save_for_backward(input if of_values else None, values if of_input else None, *pattern)
        ctx.input_size, ctx.vector = size_of(input), values.shape[1]

    def backward(ctx, grad):
        input, values, *pattern, transpose = ctx.saved_tensors
        grad_input = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = input_grad(grad, values, *pattern, transpose, ctx.input_size, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            grad_values = weight_grad(input, grad, *pattern, ctx.vector, *ctx.geometry)
        if ctx.needs_input_grad[6]:
            grad_bias = grad.sum([dim for dim in range(grad.dim()) if dim != 1])
        return grad_input, grad_values, *[None] * 4, grad_bias, None, *[None] * len(ctx.geometry)

    def input_grad_setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.geometry = inputs[7:]

    def input_grad_backward(ctx, grad):
        grad_output, values, *pattern, transpose = ctx.saved_tensors
        to_grad_output = to_values = None
        if ctx.needs_input_grad[0]:
            to_grad_output = product(grad, values, *pattern, transpose, None, grad_output.shape[1], *ctx.geometry)
        if ctx.needs_input_grad[1]:
            to_values = weight_grad(grad, grad_output, *pattern, values.shape[1], *ctx.geometry)
        return to_grad_output, to_values, *[None] * (5 + len(ctx.geometry))

    def weight_grad_setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.geometry = inputs[6:]

    def weight_grad_backward(ctx, grad):
        input, grad_output, *pattern = ctx.saved_tensors
        to_input = to_grad_output = None
        if ctx.needs_input_grad[0]:
            to_input = input_grad(grad_output, grad, *pattern, None, size_of(input), *ctx.geometry)
        if ctx.needs_input_grad[1]:
            to_grad_output = product(input, grad, *pattern, None, None, grad_output.shape[1], *ctx.geometry)
        return to_input, to_grad_output, *[None] * (4 + len(ctx.geometry))

    register_gradient(op, setup, backward)
    register_gradient(f"{op}_input_grad", input_grad_setup, input_grad_backward)
    register_gradient(f"{op}_weight_grad", weight_grad_setup, weight_grad_backward)


def register_for_inference(op: str, instead: str) -> None:
    """A gradient that is an error."""

    def refuse(ctx, inputs, output):
        raise RuntimeError(
            f"Expected {op} under torch.no_grad() or on tensors without gradients, as it is for inference; got one "
            f"that requires a gradient: use {instead}"
        )

    register_gradient(op, refuse, refuse)

"""linear with sparse weights: a convolution of maps of one pixel, with kernels of its own for few rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import autocast
from .registered import OPS, call, check_device
from .rules import check_same_device, register_gradient, save_factors


def linear(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    row_indices: Tensor | None = None,
    transpose: Tensor | None = None,
) -> Tensor:
    """``input @ weight.T + bias`` with a sparse weight ``[out_features, in_features]`` and dense activations.

    Args:
        input: ``[..., in_features]``; dtypes and the other arguments as in :func:`conv2d`.

    Returns:
        ``[..., out_features]``; differentiable in input, values and bias.
    """
    check_device(input, "linear")
    if input.dim() == 0:
        raise ValueError("Expected an input of at least 1 dimension [..., in_features], got a scalar")
    input, values, bias = autocast(input, values, bias)
    flat = input.dim() == 2  # a reshape of nothing takes as long as a small layer
    rows = input if flat else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    op = OPS.linear.default
    output = call(op, rows, values, crow_indices, col_indices, row_indices, transpose, bias, out_features)
    return output if flat else output.reshape(*input.shape[:-1], out_features)


@torch.library.register_fake("sparsekd::linear")
def _linear_fake(input, values, crow, col, rows, transpose, bias, out_features):
    check_same_device(
        input, {"values": values, "crow_indices": crow, "col_indices": col, "row_indices": rows, "bias": bias}
    )
    return input.new_empty((input.shape[0], out_features))


@torch.library.register_fake("sparsekd::linear_input_grad")
def _linear_input_grad_fake(grad_output, values, crow, col, rows, transpose, in_features):
    check_same_device(grad_output, {"values": values, "crow_indices": crow, "col_indices": col, "row_indices": rows})
    return grad_output.new_empty((grad_output.shape[0], in_features))


@torch.library.register_fake("sparsekd::linear_weight_grad")
def _linear_weight_grad_fake(input, grad_output, crow, col, rows, vector):
    check_same_device(
        input, {"grad_output": grad_output, "crow_indices": crow, "col_indices": col, "row_indices": rows}
    )
    return input.new_empty((col.shape[0], vector))


def _linear_setup(ctx, inputs, output):
    input, values, crow, col, rows, transpose, bias, _ = inputs
    save_factors(ctx, input, values, crow, col, rows, transpose)
    ctx.in_features, ctx.vector = input.shape[1], values.shape[1]


def _linear_backward(ctx, grad):
    input, values, crow, col, rows, transpose = ctx.saved_tensors
    grad_input = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = OPS.linear_input_grad(grad, values, crow, col, rows, transpose, ctx.in_features)
    if ctx.needs_input_grad[1]:
        grad_values = OPS.linear_weight_grad(input, grad, crow, col, rows, ctx.vector)
    if ctx.needs_input_grad[6]:
        grad_bias = grad.sum(0)
    return grad_input, grad_values, None, None, None, None, grad_bias, None


def _linear_input_grad_setup(ctx, inputs, output):
    grad_output, values, crow, col, rows, transpose, _ = inputs
    ctx.save_for_backward(grad_output, values, crow, col, rows, transpose)


def _linear_input_grad_backward(ctx, grad):
    grad_output, values, crow, col, rows, transpose = ctx.saved_tensors
    to_grad_output = to_values = None
    if ctx.needs_input_grad[0]:
        to_grad_output = OPS.linear(grad, values, crow, col, rows, transpose, None, grad_output.shape[1])
    if ctx.needs_input_grad[1]:
        to_values = OPS.linear_weight_grad(grad, grad_output, crow, col, rows, values.shape[1])
    return to_grad_output, to_values, *[None] * 5


def _linear_weight_grad_setup(ctx, inputs, output):
    input, grad_output, crow, col, rows, _ = inputs
    ctx.save_for_backward(input, grad_output, crow, col, rows)


def _linear_weight_grad_backward(ctx, grad):
    input, grad_output, crow, col, rows = ctx.saved_tensors
    to_input = to_grad_output = None
    if ctx.needs_input_grad[0]:
        to_input = OPS.linear_input_grad(grad_output, grad, crow, col, rows, None, input.shape[1])
    if ctx.needs_input_grad[1]:
        to_grad_output = OPS.linear(input, grad, crow, col, rows, None, None, grad_output.shape[1])
    return to_input, to_grad_output, *[None] * 4


register_gradient("linear", _linear_setup, _linear_backward)
register_gradient("linear_input_grad", _linear_input_grad_setup, _linear_input_grad_backward)
register_gradient("linear_weight_grad", _linear_weight_grad_setup, _linear_weight_grad_backward)

"""linear with sparse weights: a convolution of maps of one pixel, with kernels of its own for few rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import autocast
from .registered import OPS, call, check_device
from .rules import check_same_device, register_bilinear


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


register_bilinear("linear", lambda input: input.shape[1])

"""A linear layer with a V x 1 sparse weight: the convolution of ``conv2d.py`` over maps of one pixel.

    output[m, row(g, v)] = sum over j in group g:  values[j, v] * input[m, col(j)]

Rows of the input are the pixels; strides say that neighbours in a row are channels.
"""

from __future__ import annotations

from torch import Tensor

from . import checks, configs
from .conv2d import conv2d, conv2d_input_grad
from .weight_grad import conv2d_weight_grad

_POINT = ([1, 1], [1, 1], [0, 0], [1, 1], 1)  # kernel size, stride, padding, dilation, groups


def _as_maps(rows: Tensor, name: str) -> Tensor:
    checks.check_dim(rows, name, 2)
    return rows[:, :, None, None]


def _precision(tensor: Tensor) -> str:
    return checks.precision_of(tensor.dtype, convolution=False)


def linear(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    transpose: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    config: configs.Config | None = None,
) -> Tensor:
    """``[M, in_features]`` to ``[M, out_features]``; arguments as :func:`sparsekd.sparse.ops.linear`'s."""
    pattern = (crow_indices, col_indices, row_indices, None)
    output = conv2d(
        _as_maps(input, "input"),
        values,
        *pattern,
        bias,
        out_features,
        *_POINT,
        config=config,
        precision=_precision(input),
    )
    return output.flatten(1)


def linear_input_grad(
    grad_output: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    transpose: Tensor | None,
    in_features: int,
    config: configs.Config | None = None,
) -> Tensor:
    pattern = (crow_indices, col_indices, row_indices, None)
    maps = _as_maps(grad_output, "grad_output")
    size = [grad_output.shape[0], in_features, 1, 1]
    return conv2d_input_grad(
        maps, values, *pattern, size, *_POINT, config=config, precision=_precision(grad_output)
    ).flatten(1)


def linear_weight_grad(
    input: Tensor,
    grad_output: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    vector: int,
    config: configs.Config | None = None,
) -> Tensor:
    maps = _as_maps(input, "input"), _as_maps(grad_output, "grad_output")
    pattern = (crow_indices, col_indices, row_indices, vector)
    return conv2d_weight_grad(*maps, *pattern, *_POINT, config=config, precision=_precision(input))

"""conv2d with sparse weights, and the same with what follows it: activation(scale * conv2d + shift + residual)."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import convolution, prepared, residual_of
from .conv2d_planned import Plan
from .registered import OPS, check_device
from .rules import check_same_device, convolved, like, register_bilinear, register_for_inference


def conv2d(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    row_indices: Tensor | None = None,
    transpose: Tensor | None = None,
) -> Tensor:
    """Convolution with sparse weights and dense activations; differentiable in input, values and bias.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; float32 or float64 (float16 and bfloat16 are computed in float32).
        values: ``[n_vectors, V]``, dtype and device of the input.
        crow_indices: int32 ``[groups * ceil(out_channels / groups / V) + 1]``.
        col_indices: int32 ``[n_vectors]``, columns ``(c * R + r) * S + s`` within the convolution group.
        bias: ``[out_channels]`` or None.
        padding: int, pair, "valid" or "same".
        row_indices: int32 ``[out_channels]``, output channel of each packed row, or None.
        transpose: the plan of :func:`transpose_pattern` for the input gradient; made in the backward when None.

    Returns:
        ``[N, out_channels, H', W']`` in the memory format of the input (``[out_channels, H', W']`` without a batch).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; IndexError: a column out of range.

    Method: direct sparse convolution (Park et al., "Faster CNNs with direct sparse convolutions and guided pruning",
    ICLR 2017; Chen, "Escoin", 2018).
    """
    check_device(input, "conv2d")
    input, geometry = prepared(input, kernel_size, stride, padding, dilation, groups)
    pattern = (crow_indices, col_indices, row_indices, transpose)
    return convolution(OPS.conv2d.default, input, values, *pattern, bias, out_channels, *geometry)


def conv2d_fused(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    row_indices: Tensor | None = None,
    plan: Plan | None = None,
    lanes: bool = False,
) -> Tensor:
    """``activation(scale * conv2d(input) + shift + residual)``, for inference: results are finished while in the cache.

    A batch-norm in eval mode is ``scale = weight / sqrt(running_var + eps)``, ``shift = bias - running_mean * scale``
    (plus ``scale`` times the convolution's own bias).

    Args:
        scale, shift: ``[out_channels]``, dtype and device of the input, or None.
        residual: of the output's shape, dtype and device of the input, or None.
        activation: "none", "relu", "relu6", "silu" or "hardswish", as in ``torch.nn.functional``.
        plan: of :func:`conv2d_plan` for this pattern, which is then not prepared again.
        lanes: the result, and the residual, lie in lanes (:func:`to_lanes`). With a plan the input may, too.
        The others as in :func:`conv2d`.

    Raises:
        As :func:`conv2d`; RuntimeError where a tensor requires a gradient.
    """
    check_device(input, "conv2d_fused")
    if lanes and plan is None:
        raise ValueError("Expected a plan for results in lanes, got None")
    input, geometry = prepared(input, kernel_size, stride, padding, dilation, groups, lanes=plan is not None)
    finish = (scale, shift, residual_of(input, residual), activation)
    if plan is not None:
        if plan.order is not None:
            values = values.index_select(0, plan.order)
        op, arguments = OPS.conv2d_planned.default, (plan.indices, plan.tiling, row_indices, *finish, lanes)
    else:
        op, arguments = OPS.conv2d_fused.default, (crow_indices, col_indices, row_indices, *finish)
    return convolution(op, input, values, *arguments, out_channels, *geometry)


def transpose_pattern(
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    *,
    vector: int,
    out_channels: int,
    in_channels: int,
    taps: int,
    groups: int = 1,
) -> Tensor:
    """The transposed pattern that the input gradient walks, made once per pattern.

    Returns:
        int32 ``[in_channels + 1 + 2 n]``: where each input channel's entries start, then each entry's column
        ``k * taps + tap`` (k within the convolution group), then its place in the flattened ``values``.
    """
    return OPS.transpose_pattern(
        crow_indices, col_indices, row_indices, vector, out_channels, in_channels, taps, groups
    )


@torch.library.register_fake("sparsekd::conv2d")
def _conv2d_fake(input, values, crow, col, rows, transpose, bias, *geometry):
    check_same_device(
        input, {"values": values, "crow_indices": crow, "col_indices": col, "row_indices": rows, "bias": bias}
    )
    return convolved(input, *geometry)


@torch.library.register_fake("sparsekd::conv2d_fused")
def _conv2d_fused_fake(input, values, crow, col, rows, scale, shift, residual, activation, *geometry):
    check_same_device(input, {"scale": scale, "shift": shift, "residual": residual})
    return _conv2d_fake(input, values, crow, col, rows, None, None, *geometry)


@torch.library.register_fake("sparsekd::conv2d_input_grad")
def _conv2d_input_grad_fake(grad_output, values, crow, col, rows, transpose, input_size, *geometry):
    check_same_device(grad_output, {"values": values, "crow_indices": crow, "col_indices": col, "row_indices": rows})
    return like(grad_output, tuple(input_size))


@torch.library.register_fake("sparsekd::conv2d_weight_grad")
def _conv2d_weight_grad_fake(input, grad_output, crow, col, rows, vector, *geometry):
    check_same_device(
        input, {"grad_output": grad_output, "crow_indices": crow, "col_indices": col, "row_indices": rows}
    )
    return input.new_empty((col.shape[0], vector))


@torch.library.register_fake("sparsekd::transpose_pattern")
def _transpose_pattern_fake(crow, col, rows, vector, out_channels, in_channels, taps, groups):
    check_same_device(crow, {"col_indices": col, "row_indices": rows})
    if vector == 1:
        return crow.new_empty((in_channels + 1 + 2 * col.shape[0],))
    # Padding rows have no entry, so the size depends on the data.
    return crow.new_empty((torch.library.get_ctx().new_dynamic_size(),))


register_bilinear("conv2d", lambda input: input.shape)
register_for_inference("conv2d_fused", instead="conv2d")

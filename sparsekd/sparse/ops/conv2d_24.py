"""conv2d with two of each four input channels kept (``formats_24.py``), and the same with what follows it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats_24 import gather_24, unpack_24
from .arguments import convolution, prepared, residual_of
from .registered import OPS, check_device
from .rules import check_same_device, convolved, register_for_inference, register_gradient


def conv2d_24(
    input: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with weights of which two of each four input channels are kept (``formats_24.py``).

    On CUDA (compute capability 8.0 or later, float16 and bfloat16, sums in float32) on sparse tensor cores;
    channels_last is taken as it is, other memory formats are copied there and back. On the CPU, and in float32 and
    float64 on CUDA (counted in ``fallbacks``, ``dense.py``), it is torch's dense convolution of the unpacked weight,
    which is not faster than dense. Differentiable in input, values and bias; the
    backward is dense: the input gradient with the unpacked weight, the weight gradient gathered at what is kept.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, C / groups a multiple of 16.
        values: ``[out_channels, R * S, C / groups / 2]``, dtype and device of the input.
        metadata: int32 ``[groups * ceil(out_channels / groups / 16), R * S, ceil(C / groups / 64), 32]``, as
            ``pack_24`` makes it.
        bias: ``[out_channels]`` or None.
        padding: int, pair, "valid" or "same".

    Returns:
        ``[N, out_channels, H', W']`` in the memory format of the input (``[out_channels, H', W']`` without a batch).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; IndexError: on the CPU, metadata that
        ``pack_24`` does not make (on CUDA it gives wrong numbers); NotImplementedError: a GPU before 8.0.

    Source: Mishra et al., "Accelerating sparse deep neural networks", 2021.
    """
    check_device(input, "conv2d_24")
    input, geometry = prepared(input, kernel_size, stride, padding, dilation, groups)
    return convolution(OPS.conv2d_24.default, input, values, metadata, bias, values.shape[0], *geometry)


def conv2d_24_fused(
    input: Tensor,
    values: Tensor,
    metadata: Tensor,
    *,
    kernel_size: int | tuple[int, int],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """``activation(scale * conv2d_24(input) + shift + residual)``, for inference; see :func:`conv2d_fused`."""
    check_device(input, "conv2d_24_fused")
    input, geometry = prepared(input, kernel_size, stride, padding, dilation, groups)
    finish = (scale, shift, residual_of(input, residual), activation)
    return convolution(OPS.conv2d_24_fused.default, input, values, metadata, *finish, values.shape[0], *geometry)


@torch.library.register_fake("sparsekd::conv2d_24")
def _conv2d_24_fake(input, values, metadata, bias, *geometry):
    check_same_device(input, {"values": values, "metadata": metadata, "bias": bias})
    return convolved(input, *geometry)


@torch.library.register_fake("sparsekd::conv2d_24_fused")
def _conv2d_24_fused_fake(input, values, metadata, scale, shift, residual, activation, *geometry):
    check_same_device(input, {"scale": scale, "shift": shift, "residual": residual})
    return _conv2d_24_fake(input, values, metadata, None, *geometry)


def _conv2d_24_setup(ctx, inputs, output):
    input, values, metadata, bias, ctx.out_channels, ctx.kernel_size, *ctx.geometry = inputs
    ctx.save_for_backward(input, values, metadata)


def _conv2d_24_backward(ctx, grad):
    """Dense: rows of the transposed weight are not 2:4, and what the weight's gradient skips would save no product."""
    input, values, metadata = ctx.saved_tensors
    *convolution, groups = ctx.geometry
    shape = (ctx.out_channels, input.shape[1] // groups, *ctx.kernel_size)
    weight = unpack_24(values, metadata, shape, groups)
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    biases = [ctx.out_channels] if wanted[2] else None
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, input, weight, biases, *convolution, False, [0, 0], groups, wanted
    )
    grad_values = gather_24(grad_weight, metadata, groups) if wanted[1] else None
    return grad_input, grad_values, None, grad_bias, *[None] * 6


register_gradient("conv2d_24", _conv2d_24_setup, _conv2d_24_backward)
register_for_inference("conv2d_24_fused", instead="conv2d_24")

"""What torch needs to know of every operator besides its kernels: its fake kernel and its gradient.

Imported by ``ops.py`` after the compiled part has registered the schemas. Each backward calls another registered op,
and the input and weight gradients are bilinear, so that any order of differentiation stays within these ops.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .formats_24 import gather_24, unpack_24

_ops = torch.ops.sparsekd
LANES = 8  # images side by side in a vector of 16 bytes

# --- fakes: shapes, dtypes and memory formats without data -----------------------------------------------------------


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _check_same_device(first: Tensor, others: dict[str, Tensor | None]) -> None:
    """One tensor on meta brings the whole call to the fake kernel, whose result on the CPU would hold any numbers."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"Expected {name} on {first.device}, got {tensor.device}")


def _like(source: Tensor, shape) -> Tensor:
    return torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=suggest_memory_format(source))


@torch.library.register_fake("sparsekd::conv2d")
def _conv2d_fake(
    input, values, crow, col, rows, transpose, bias, out_channels, kernel_size, stride, padding, dilation, groups
):
    _check_same_device(
        input, {"values": values, "crow_indices": crow, "col_indices": col, "row_indices": rows, "bias": bias}
    )
    size = [_output_size(input.shape[2 + d], kernel_size[d], stride[d], padding[d], dilation[d]) for d in range(2)]
    return _like(input, (input.shape[0], out_channels, *size))


@torch.library.register_fake("sparsekd::conv2d_fused")
def _conv2d_fused_fake(
    input, values, crow, col, rows, scale, shift, residual, activation, out_channels, kernel_size, stride, padding,
    dilation, groups
):  # fmt: skip
    _check_same_device(input, {"scale": scale, "shift": shift, "residual": residual})
    geometry = (out_channels, kernel_size, stride, padding, dilation, groups)
    return _conv2d_fake(input, values, crow, col, rows, None, None, *geometry)


@torch.library.register_fake("sparsekd::conv2d_planned")
def _conv2d_planned_fake(
    input, values, plan, tiling, rows, scale, shift, residual, activation, to_lanes, out_channels, kernel_size, stride,
    padding, dilation, groups
):  # fmt: skip
    _check_same_device(input, {"values": values, "plan": plan, "scale": scale, "shift": shift, "residual": residual})
    height, width = (
        _output_size(input.shape[2 + d], kernel_size[d], stride[d], padding[d], dilation[d]) for d in range(2)
    )
    batch = input.shape[0] * (LANES if input.dim() == 5 else 1)
    if to_lanes:
        size = (-(-batch // LANES), out_channels, height, width, LANES)
        pitch = (width + width % 2) * LANES  # rows begin at a 32-byte sector
        return input.new_empty_strided(size, (out_channels * height * pitch, height * pitch, pitch, LANES, 1))
    size = (batch, out_channels, height, width)
    return input.new_empty(size) if input.dim() == 5 else _like(input, size)


@torch.library.register_fake("sparsekd::conv2d_24")
def _conv2d_24_fake(
    input, values, metadata, bias, out_channels, kernel_size, stride, padding, dilation, groups
):  # fmt: skip
    _check_same_device(input, {"values": values, "metadata": metadata, "bias": bias})
    size = [_output_size(input.shape[2 + d], kernel_size[d], stride[d], padding[d], dilation[d]) for d in range(2)]
    return _like(input, (input.shape[0], out_channels, *size))


@torch.library.register_fake("sparsekd::conv2d_24_fused")
def _conv2d_24_fused_fake(
    input, values, metadata, scale, shift, residual, activation, out_channels, kernel_size, stride, padding, dilation,
    groups
):  # fmt: skip
    _check_same_device(input, {"scale": scale, "shift": shift, "residual": residual})
    geometry = (out_channels, kernel_size, stride, padding, dilation, groups)
    return _conv2d_24_fake(input, values, metadata, None, *geometry)


@torch.library.register_fake("sparsekd::conv2d_input_grad")
def _conv2d_input_grad_fake(
    grad_output, values, crow, col, rows, transpose, input_size, kernel_size, stride, padding, dilation, groups
):
    _check_same_device(grad_output, {"values": values, "crow_indices": crow, "col_indices": col, "row_indices": rows})
    return _like(grad_output, tuple(input_size))


@torch.library.register_fake("sparsekd::conv2d_weight_grad")
def _conv2d_weight_grad_fake(
    input, grad_output, crow, col, rows, vector, kernel_size, stride, padding, dilation, groups
):
    _check_same_device(
        input, {"grad_output": grad_output, "crow_indices": crow, "col_indices": col, "row_indices": rows}
    )
    return input.new_empty((col.shape[0], vector))


@torch.library.register_fake("sparsekd::linear")
def _linear_fake(input, values, crow, col, rows, transpose, bias, out_features):
    _check_same_device(
        input, {"values": values, "crow_indices": crow, "col_indices": col, "row_indices": rows, "bias": bias}
    )
    return input.new_empty((input.shape[0], out_features))


@torch.library.register_fake("sparsekd::linear_input_grad")
def _linear_input_grad_fake(grad_output, values, crow, col, rows, transpose, in_features):
    _check_same_device(grad_output, {"values": values, "crow_indices": crow, "col_indices": col, "row_indices": rows})
    return grad_output.new_empty((grad_output.shape[0], in_features))


@torch.library.register_fake("sparsekd::linear_weight_grad")
def _linear_weight_grad_fake(input, grad_output, crow, col, rows, vector):
    _check_same_device(
        input, {"grad_output": grad_output, "crow_indices": crow, "col_indices": col, "row_indices": rows}
    )
    return input.new_empty((col.shape[0], vector))


@torch.library.register_fake("sparsekd::transpose_pattern")
def _transpose_pattern_fake(crow, col, rows, vector, out_channels, in_channels, taps, groups):
    _check_same_device(crow, {"col_indices": col, "row_indices": rows})
    if vector == 1:
        return crow.new_empty((in_channels + 1 + 2 * col.shape[0],))
    # Padding rows have no entry, so the size depends on the data.
    return crow.new_empty((torch.library.get_ctx().new_dynamic_size(),))


@torch.library.register_fake("sparsekd::kd_loss_forward")
def _kd_loss_forward_fake(
    student, teacher, target, temperature, alpha, ignore_index, label_smoothing, distill_ignored, with_grad
):
    _check_same_device(student, {"teacher logits": teacher, "target": target})
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty((), dtype=dtype), student.new_empty(student.shape if with_grad else (0,), dtype=dtype)


@torch.library.register_fake("sparsekd::kd_loss_rows_")
def _kd_loss_rows_fake(student, teacher, target, *settings):
    _check_same_device(student, {"teacher logits": teacher, "target": target})
    return student.new_empty((), dtype=torch.float64)


@torch.library.register_fake("sparsekd::linear_kd_loss")
def _linear_kd_loss_fake(
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, target, temperature, alpha,
    divergence, beta, ignore_index, label_smoothing, distill_ignored, chunk_rows, wanted
):  # fmt: skip
    _check_same_device(
        student,
        {
            "student_weight": student_weight,
            "student_bias": student_bias,
            "teacher": teacher,
            "teacher_weight": teacher_weight,
            "teacher_bias": teacher_bias,
            "target": target,
        },
    )
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    grads = [
        torch.empty_like(t, dtype=dtype) if wants and t is not None else student.new_empty((0,), dtype=dtype)
        for t, wants in zip((student, student_weight, student_bias), wanted, strict=True)
    ]
    return student.new_empty((), dtype=dtype), *grads


# --- gradients -------------------------------------------------------------------------------------------------------
# conv2d is linear in (input) and in (values); writing f for conv2d, f_x for the input gradient and f_w for the weight
# gradient, <f(x, w), g> = <x, f_x(g, w)> = <w, f_w(x, g)>. So the gradient of each is one of the other two.


def _save_factors(ctx, input, values, *pattern):
    """Of two factors, each is only needed for the gradient of the other."""
    of_values, of_input = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
    ctx.save_for_backward(input if of_values else None, values if of_input else None, *pattern)


def _conv2d_setup(ctx, inputs, output):
    input, values, crow, col, rows, transpose, bias, out_channels, *ctx.geometry = inputs
    _save_factors(ctx, input, values, crow, col, rows, transpose)
    ctx.input_size, ctx.vector = input.shape, values.shape[1]


def _conv2d_backward(ctx, grad):
    input, values, crow, col, rows, transpose = ctx.saved_tensors
    grad_input = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = _ops.conv2d_input_grad(grad, values, crow, col, rows, transpose, ctx.input_size, *ctx.geometry)
    if ctx.needs_input_grad[1]:
        grad_values = _ops.conv2d_weight_grad(input, grad, crow, col, rows, ctx.vector, *ctx.geometry)
    if ctx.needs_input_grad[6]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_input, grad_values, None, None, None, None, grad_bias, *[None] * 6


def _inference_only(ctx, inputs, output):
    raise RuntimeError(
        "Expected conv2d_fused under torch.no_grad() or on tensors without gradients, as it is for inference; got one "
        "that requires a gradient: use conv2d"
    )


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


def _conv2d_24_fused_setup(ctx, inputs, output):
    raise RuntimeError(
        "Expected conv2d_24_fused under torch.no_grad() or on tensors without gradients, as it is for inference; got "
        "one that requires a gradient: use conv2d_24"
    )


def _conv2d_input_grad_setup(ctx, inputs, output):
    grad_output, values, crow, col, rows, transpose, _, *ctx.geometry = inputs
    ctx.save_for_backward(grad_output, values, crow, col, rows, transpose)


def _conv2d_input_grad_backward(ctx, grad):
    grad_output, values, crow, col, rows, transpose = ctx.saved_tensors
    to_grad_output = to_values = None
    if ctx.needs_input_grad[0]:
        to_grad_output = _ops.conv2d(
            grad, values, crow, col, rows, transpose, None, grad_output.shape[1], *ctx.geometry
        )
    if ctx.needs_input_grad[1]:
        to_values = _ops.conv2d_weight_grad(grad, grad_output, crow, col, rows, values.shape[1], *ctx.geometry)
    return to_grad_output, to_values, *[None] * 10


def _conv2d_weight_grad_setup(ctx, inputs, output):
    input, grad_output, crow, col, rows, _, *ctx.geometry = inputs
    ctx.save_for_backward(input, grad_output, crow, col, rows)


def _conv2d_weight_grad_backward(ctx, grad):
    input, grad_output, crow, col, rows = ctx.saved_tensors
    to_input = to_grad_output = None
    if ctx.needs_input_grad[0]:
        to_input = _ops.conv2d_input_grad(grad_output, grad, crow, col, rows, None, input.shape, *ctx.geometry)
    if ctx.needs_input_grad[1]:
        to_grad_output = _ops.conv2d(input, grad, crow, col, rows, None, None, grad_output.shape[1], *ctx.geometry)
    return to_input, to_grad_output, *[None] * 9


def _linear_setup(ctx, inputs, output):
    input, values, crow, col, rows, transpose, bias, _ = inputs
    _save_factors(ctx, input, values, crow, col, rows, transpose)
    ctx.in_features, ctx.vector = input.shape[1], values.shape[1]


def _linear_backward(ctx, grad):
    input, values, crow, col, rows, transpose = ctx.saved_tensors
    grad_input = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = _ops.linear_input_grad(grad, values, crow, col, rows, transpose, ctx.in_features)
    if ctx.needs_input_grad[1]:
        grad_values = _ops.linear_weight_grad(input, grad, crow, col, rows, ctx.vector)
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
        to_grad_output = _ops.linear(grad, values, crow, col, rows, transpose, None, grad_output.shape[1])
    if ctx.needs_input_grad[1]:
        to_values = _ops.linear_weight_grad(grad, grad_output, crow, col, rows, values.shape[1])
    return to_grad_output, to_values, *[None] * 5


def _linear_weight_grad_setup(ctx, inputs, output):
    input, grad_output, crow, col, rows, _ = inputs
    ctx.save_for_backward(input, grad_output, crow, col, rows)


def _linear_weight_grad_backward(ctx, grad):
    input, grad_output, crow, col, rows = ctx.saved_tensors
    to_input = to_grad_output = None
    if ctx.needs_input_grad[0]:
        to_input = _ops.linear_input_grad(grad_output, grad, crow, col, rows, None, input.shape[1])
    if ctx.needs_input_grad[1]:
        to_grad_output = _ops.linear(input, grad, crow, col, rows, None, None, grad_output.shape[1])
    return to_input, to_grad_output, *[None] * 4


def _linear_kd_loss_setup(ctx, inputs, output):
    ctx.wanted, ctx.dtypes = inputs[-1], [None if t is None else t.dtype for t in inputs[:3]]
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _linear_kd_loss_backward(ctx, grad, *_):
    if torch.is_grad_enabled():  # the gradients would be taken for constants
        raise RuntimeError(
            "Expected linear_kd_loss to be differentiated once: its gradients are made in the forward; got a backward "
            "with create_graph=True"
        )
    result = [None] * ctx.inputs
    if grad is None:
        return tuple(result)
    # loss.backward() hands in 1. The gradients are then passed on as they are: a copy would double their memory.
    plain = type(grad) is Tensor and grad.is_cpu and not torch._C._functorch.is_functorch_wrapped_tensor(grad)
    factor = None if plain and grad.item() == 1 else grad
    for i, (made, wants, dtype) in enumerate(zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)):
        if ctx.needs_input_grad[i]:
            if not wants:
                raise RuntimeError(f"Expected wanted[{i}] of an input that requires a gradient, got False")
            result[i] = (made if factor is None else made * factor).to(dtype)
    return tuple(result)


torch.library.register_autograd(
    "sparsekd::linear_kd_loss", _linear_kd_loss_backward, setup_context=_linear_kd_loss_setup
)

for _name in (
    "conv2d",
    "conv2d_24",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "linear",
    "linear_input_grad",
    "linear_weight_grad",
):
    torch.library.register_autograd(
        f"sparsekd::{_name}", globals()[f"_{_name}_backward"], setup_context=globals()[f"_{_name}_setup"]
    )
for _name in ("conv2d_fused", "conv2d_planned"):
    torch.library.register_autograd(f"sparsekd::{_name}", _inference_only, setup_context=_inference_only)
torch.library.register_autograd(
    "sparsekd::conv2d_24_fused", _conv2d_24_fused_setup, setup_context=_conv2d_24_fused_setup
)

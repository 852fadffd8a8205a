"""The Python half of every operator: what it takes and gives.

Schemas are in ``csrc/ops.cpp``, meanings in ``reference.py``, fakes and gradients in ``op_rules.py``. Weights are
sparse (V x 1 vector-CSR, see ``formats.py``), activations dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import sparsekd._C  # noqa: F401  (registers the operators)
except ImportError as error:
    raise ImportError(
        "Expected the compiled part of sparsekd (sparsekd._C), built against the installed torch "
        f"{torch.__version__}, got: {error}. Build it with `pip install --no-build-isolation .`"
    ) from error

from ..kernels import registration
from . import op_rules  # noqa: F401  (on top of what was registered)
from .plans import LANES, Plan, conv2d_plan, from_lanes, takes_plans, to_lanes  # noqa: F401

_backends_on_cuda = registration.register()  # kept, as they are gone with it
fallbacks, strict_backends = registration.fallbacks, registration.strict
only_backend, tuning_tiles = registration.only, registration.tuning

_ops = torch.ops.sparsekd


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: "baseline", "avx2" or "avx512" (cap: ``SPARSEKD_CPU_ISA``)."""
    return _ops.cpu_isa()


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _call(op, *arguments):
    """Runs an op. Without gradients it goes past its autograd formula, which is in Python and costs 10 us even then."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _check_device(input: Tensor, op: str) -> None:
    kind = input.device.type
    if kind in ("cpu", "meta"):
        return
    if kind != "cuda" or not torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekd::{op}", "CUDA"):
        raise NotImplementedError(f"Expected input on cpu, got {input.device}: no kernel is built for this device")


def _autocast(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """Under ``torch.autocast``, floating tensors in its dtype, as ``torch.nn.functional.conv2d`` takes them."""
    device = "cpu" if tensors[0].is_cpu else tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def lower(tensor):
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return [lower(tensor) for tensor in tensors]


def same_padding(kernel_size: tuple[int, int], dilation: tuple[int, int]) -> list[tuple[int, int]]:
    """(before, after) of each dimension for ``padding="same"``; the odd element goes after, as in torch."""
    totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


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
    _check_device(input, "conv2d")
    input, geometry = _prepared(input, kernel_size, stride, padding, dilation, groups)
    input, values, bias = _autocast(input, values, bias)
    batched = input.dim() == 4
    output = _call(
        _ops.conv2d.default,
        input if batched else input.unsqueeze(0),
        values,
        crow_indices,
        col_indices,
        row_indices,
        transpose,
        bias,
        out_channels,
        *geometry,
    )
    return output if batched else output.squeeze(0)


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
        plan: of :func:`conv2d_plan` for this pattern, which is then not prepared again; float16 and bfloat16.
        lanes: the result, and the residual, lie in lanes (:func:`to_lanes`). With a plan the input may, too.
        The others as in :func:`conv2d`.

    Raises:
        As :func:`conv2d`; RuntimeError where a tensor requires a gradient.
    """
    _check_device(input, "conv2d_fused")
    if lanes and plan is None:
        raise ValueError("Expected a plan for results in lanes, got None")
    input, geometry = _prepared(input, kernel_size, stride, padding, dilation, groups, lanes=plan is not None)
    input, values, scale, shift, residual = _autocast(input, values, scale, shift, residual)
    batched = input.dim() != 3
    if not batched:
        input = input.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
    finish = (scale, shift, residual, activation)
    if plan is not None:
        if plan.order is not None:
            values = values.index_select(0, plan.order)
        op, arguments = _ops.conv2d_planned.default, (plan.indices, plan.tiling, row_indices, *finish, lanes)
    else:
        op, arguments = _ops.conv2d_fused.default, (crow_indices, col_indices, row_indices, *finish)
    output = _call(op, input, values, *arguments, out_channels, *geometry)
    return output if batched else output.squeeze(0)


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
    channels_last is taken as it is, other memory formats are copied there and back. On the CPU it is torch's dense
    convolution of the unpacked weight, which is not faster than dense. Differentiable in input, values and bias; the
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
    _check_device(input, "conv2d_24")
    input, geometry = _prepared(input, kernel_size, stride, padding, dilation, groups)
    input, values, bias = _autocast(input, values, bias)
    batched = input.dim() == 4
    output = _call(
        _ops.conv2d_24.default,
        input if batched else input.unsqueeze(0),
        values,
        metadata,
        bias,
        values.shape[0],
        *geometry,
    )
    return output if batched else output.squeeze(0)


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
    _check_device(input, "conv2d_24_fused")
    input, geometry = _prepared(input, kernel_size, stride, padding, dilation, groups)
    input, values, scale, shift, residual = _autocast(input, values, scale, shift, residual)
    batched = input.dim() == 4
    if not batched:
        input = input.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
    output = _call(
        _ops.conv2d_24_fused.default,
        input,
        values,
        metadata,
        scale,
        shift,
        residual,
        activation,
        values.shape[0],
        *geometry,
    )
    return output if batched else output.squeeze(0)


def _prepared(
    input: Tensor, kernel_size, stride, padding, dilation, groups, lanes: bool = False
) -> tuple[Tensor, tuple]:
    """The input, padded where the padding is not the same on both sides, and the geometry as the ops take it."""
    kernel_size, stride, dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
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
    return input, (kernel_size, stride, _pair(padding), dilation, groups)


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
    return _ops.transpose_pattern(
        crow_indices, col_indices, row_indices, vector, out_channels, in_channels, taps, groups
    )


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
    _check_device(input, "linear")
    if input.dim() == 0:
        raise ValueError("Expected an input of at least 1 dimension [..., in_features], got a scalar")
    input, values, bias = _autocast(input, values, bias)
    flat = input.dim() == 2  # a reshape of nothing takes as long as a small layer
    rows = input if flat else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    op = _ops.linear.default
    output = _call(op, rows, values, crow_indices, col_indices, row_indices, transpose, bias, out_features)
    return output if flat else output.reshape(*input.shape[:-1], out_features)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    distill_ignored: bool = False,
) -> Tensor:
    """``(1 - alpha) * CE + alpha * T^2 * KL(teacher || student)`` from raw logits, in one pass over both.

    The gradient is made in the forward. All is computed in double and rounded once. CE averages over the rows that are
    not ignored, KL sums over classes and averages over its rows: those not ignored, or all with ``distill_ignored``.
    With no such row the loss is NaN, as torch's cross entropy; with ``distill_ignored`` and no label CE counts as 0.

    Args:
        student: logits ``[N, C]`` or ``[N, C, d1, ...]`` (classes in dimension 1) or ``[C]``, any floating dtype.
        teacher: logits of the same shape, any floating dtype; takes no gradient.
        target: int64 ``[N]`` / ``[N, d1, ...]`` / scalar, classes in 0..C-1 or ``ignore_index``; None needs alpha = 1.

    Returns:
        A scalar, float64 for float64 student logits and float32 otherwise. Differentiable once, in ``student``.

    Raises:
        ValueError, TypeError, IndexError: arguments that do not fit, or a target out of range.

    Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015.
    """
    _check_device(student, "kd_loss_forward")
    if student.dim() == 0 or student.shape != teacher.shape:
        raise ValueError(
            "Expected student and teacher logits of one shape [N, C, ...], "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if target is not None:
        if target.is_floating_point():
            raise TypeError(f"Expected target of dtype torch.int64 (class indices), got {target.dtype}")
        expected = student.shape[:1] + student.shape[2:] if student.dim() > 1 else ()
        if target.shape != expected:
            raise ValueError(f"Expected target of shape {tuple(expected)}, got {tuple(target.shape)}")
        target = target.reshape(-1)
    classes = student.shape[1 if student.dim() > 1 else 0]
    if student.dim() != 2:
        dim = min(1, student.dim() - 1)
        student = student.movedim(dim, -1).reshape(-1, classes)
        teacher = teacher.movedim(dim, -1).reshape(-1, classes)
    return _ops.kd_loss(
        student, teacher.detach(), target, temperature, alpha, ignore_index, label_smoothing, distill_ignored
    )


def linear_kd_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 4.0,
    alpha: float = 0.5,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    distill_ignored: bool = False,
    features_dim: int = -1,
    chunk_rows: int | None = None,
) -> Tensor:
    """``(1 - alpha) * CE + alpha * T^2 * D(teacher, student)`` of two linear layers, whose logits are never in memory.

    As :func:`kd_loss` of ``student @ student_weight.T + student_bias`` and the teacher's, made a chunk of rows at a
    time together with the gradients. What is held beyond inputs and gradients is one chunk of either logits.

    Args:
        student: hidden states ``[..., features]``, or ``[N, features, d1, ...]`` with ``features_dim=1``, where each
            pixel is a row (a segmentation head is a 1 x 1 convolution); any floating dtype.
        student_weight: ``[classes, features]``, dtype of ``student``.
        teacher, teacher_weight: of as many rows and classes; features and dtype may differ. They take no gradient.
        target: int64 of the hidden states' shape without the features, or None with ``alpha=1``.
        student_bias, teacher_bias: ``[classes]`` or None.
        divergence: D is "forward_kl", KL(p || q), "reverse_kl", KL(q || p), or "jsd", beta KL(p || m) +
            (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; p of the teacher and q of the student, both at T.
        beta: of "jsd", in (0, 1).
        chunk_rows: rows at a time; None: as many as take an eighth of the memory of inputs and gradients.
        The others as in :func:`kd_loss`, means over rows included.

    Returns:
        A scalar, float64 for float64 hidden states and float32 otherwise. Differentiable once, in ``student``,
        ``student_weight`` and ``student_bias``. Gradients of half types are summed in float32, which takes twice their
        memory.

    Raises:
        ValueError, TypeError: arguments that do not fit; IndexError: a target out of range (on CUDA the loss is NaN).

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015; JSD: Agarwal et al., "On-policy
    distillation of language models", ICLR 2024; chunks: Hsu et al., "Liger Kernel", 2024.
    """
    _check_device(student, "linear_kd_loss")
    hidden = []
    for name, tensor in (("student", student), ("teacher", teacher)):
        if tensor.dim() < 2 or not -tensor.dim() <= features_dim < tensor.dim():
            raise ValueError(
                f"Expected {name} of shape [..., features] with features in dimension {features_dim}, got shape "
                f"{tuple(tensor.shape)}"
            )
        hidden.append(tensor.movedim(features_dim, -1))
    leading = hidden[0].shape[:-1]
    if hidden[1].shape[:-1] != leading:
        raise ValueError(
            f"Expected student and teacher of the same rows, got shapes {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    if target is not None:
        if target.is_floating_point():
            raise TypeError(f"Expected target of dtype torch.int64 (class indices), got {target.dtype}")
        if target.shape != leading:
            raise ValueError(f"Expected target of shape {tuple(leading)}, got {tuple(target.shape)}")
        target = target.reshape(-1)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"Expected chunk_rows of at least 1 or None, got {chunk_rows}")
    student, student_weight, student_bias = _autocast(hidden[0], student_weight, student_bias)
    teacher, teacher_weight, teacher_bias = _autocast(hidden[1], teacher_weight, teacher_bias)
    # Maps stay [images, pixels, features], a view: no single stride walks over the pixels of all images.
    maps = student.dim() > 2 and not (student.is_contiguous() and teacher.is_contiguous())
    student, teacher = (
        t.flatten(1, -2) if maps else t.reshape(1, math.prod(leading), t.shape[-1]) for t in (student, teacher)
    )
    learned = (student, student_weight, student_bias)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in learned]
    taught = (None if t is None else t.detach() for t in (teacher, teacher_weight, teacher_bias))
    settings = (temperature, alpha, divergence, beta, ignore_index, label_smoothing, distill_ignored)
    return _ops.linear_kd_loss(*learned, *taught, target, *settings, chunk_rows or 0, wanted)[0]

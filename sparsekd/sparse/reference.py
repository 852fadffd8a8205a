"""What each operator means, in plain PyTorch on the dense weight: the oracle that every kernel is tested against.

Arguments are those of the operator, in its order (``csrc/ops.cpp``); a convolution's end in ``out_channels``,
``kernel_size`` and ``geometry``: stride, padding, dilation, groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import gather, unpack
from .formats_24 import unpack_24


def conv2d_reference(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: tuple[int, int],
    *geometry: object,
) -> Tensor:
    shape = (out_channels, input.shape[1] // geometry[-1], *kernel_size)
    weight = unpack(values, crow_indices, col_indices, row_indices, shape, geometry[-1])
    return F.conv2d(input, weight, bias, *geometry)


ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


def conv2d_fused_reference(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
    *geometry: object,
) -> Tensor:
    output = conv2d_reference(input, values, crow_indices, col_indices, row_indices, None, *geometry)
    return _finished(output, scale, shift, residual, activation)


def squeeze_excite_reference(
    input: Tensor,
    reduce: Tensor,
    reduce_bias: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate: str,
) -> Tensor:
    inner = ACTIVATIONS[activation](F.linear(input.mean((2, 3)), reduce, reduce_bias))
    outer = F.linear(inner, expand, expand_bias)
    return input * (torch.sigmoid(outer) if gate == "sigmoid" else F.hardsigmoid(outer))[:, :, None, None]


def conv2d_24_reference(
    input: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: tuple[int, int],
    *geometry: object,
) -> Tensor:
    weight = unpack_24(values, metadata, (out_channels, input.shape[1] // geometry[-1], *kernel_size), geometry[-1])
    return F.conv2d(input, weight, bias, *geometry)


def conv2d_24_fused_reference(
    input: Tensor,
    values: Tensor,
    metadata: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
    *geometry: object,
) -> Tensor:
    return _finished(conv2d_24_reference(input, values, metadata, None, *geometry), scale, shift, residual, activation)


def _finished(
    output: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    output = output if scale is None else output * scale.view(-1, 1, 1)
    output = output if shift is None else output + shift.view(-1, 1, 1)
    return ACTIVATIONS[activation](output if residual is None else output + residual)


def conv2d_input_grad_reference(
    grad_output: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    input_size: tuple[int, int, int, int],
    kernel_size: tuple[int, int],
    *geometry: object,
) -> Tensor:
    shape = (grad_output.shape[1], input_size[1] // geometry[-1], *kernel_size)
    weight = unpack(values, crow_indices, col_indices, row_indices, shape, geometry[-1])
    return torch.nn.grad.conv2d_input(list(input_size), weight, grad_output, *geometry)


def conv2d_weight_grad_reference(
    input: Tensor,
    grad_output: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    vector: int,
    kernel_size: tuple[int, int],
    *geometry: object,
) -> Tensor:
    size = [grad_output.shape[1], input.shape[1] // geometry[-1], *kernel_size]
    dense = torch.nn.grad.conv2d_weight(input, size, grad_output, *geometry)
    return gather(dense, crow_indices, col_indices, row_indices, vector, geometry[-1])


def linear_reference(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    weight = unpack(values, crow_indices, col_indices, row_indices, (out_features, input.shape[1]))
    return F.linear(input, weight, bias)


def kd_loss_reference(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: float = 4.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    distill_ignored: bool = False,
) -> Tensor:
    """(1 - alpha) * CE + alpha * T^2 * KL(teacher || student) over logits ``[N, C]``; see ``ops.kd_loss``."""
    teacher = teacher.detach().to(student.dtype)
    loss = student.new_zeros(())
    if target is not None and alpha < 1:
        known = bool((target != ignore_index).any())
        if known or not distill_ignored:
            hard = F.cross_entropy(student, target, ignore_index=ignore_index, label_smoothing=label_smoothing)
            loss = loss + (1 - alpha) * hard
    if alpha > 0:
        rows = slice(None) if target is None or distill_ignored else target != ignore_index
        log_student = F.log_softmax(student[rows] / temperature, dim=1)
        log_teacher = F.log_softmax(teacher[rows] / temperature, dim=1)
        loss = loss + alpha * temperature**2 * F.kl_div(
            log_student, log_teacher, reduction="batchmean", log_target=True
        )
    return loss


def linear_kd_loss_reference(
    student: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    target: Tensor | None = None,
    temperature: float = 4.0,
    alpha: float = 0.5,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    distill_ignored: bool = False,
) -> Tensor:
    """(1 - alpha) * CE + alpha * T^2 * D of two linear layers of ``[M, features]``; see ``ops.linear_kd_loss``."""
    s = F.linear(student, student_weight, student_bias)
    t = F.linear(teacher, teacher_weight, teacher_bias).detach().to(s.dtype)
    if divergence == "forward_kl":
        return kd_loss_reference(s, t, target, temperature, alpha, ignore_index, label_smoothing, distill_ignored)
    loss = kd_loss_reference(s, t, target, temperature, 0.0, ignore_index, label_smoothing, distill_ignored)
    loss = (1 - alpha) * loss if alpha < 1 and target is not None else s.new_zeros(())
    if alpha > 0:
        rows = slice(None) if target is None or distill_ignored else target != ignore_index
        log_q, log_p = (F.log_softmax(logits[rows] / temperature, dim=1) for logits in (s, t))

        def kl(log_a, log_b):
            return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)

        if divergence == "reverse_kl":
            distance = kl(log_q, log_p)
        else:
            log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
            distance = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        loss = loss + alpha * temperature**2 * distance
    return loss

"""linear_kd_loss: the loss of two linear layers, whose logits are never in memory as a whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import autocast
from .registered import OPS, check_device
from .rules import check_same_device, register_gradient


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
    check_device(student, "linear_kd_loss")
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
    student, student_weight, student_bias = autocast(hidden[0], student_weight, student_bias)
    teacher, teacher_weight, teacher_bias = autocast(hidden[1], teacher_weight, teacher_bias)
    # Maps stay [images, pixels, features], a view: no single stride walks over the pixels of all images.
    maps = student.dim() > 2 and not (student.is_contiguous() and teacher.is_contiguous())
    student, teacher = (
        t.flatten(1, -2) if maps else t.reshape(1, math.prod(leading), t.shape[-1]) for t in (student, teacher)
    )
    learned = (student, student_weight, student_bias)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in learned]
    taught = (None if t is None else t.detach() for t in (teacher, teacher_weight, teacher_bias))
    settings = (temperature, alpha, divergence, beta, ignore_index, label_smoothing, distill_ignored)
    return OPS.linear_kd_loss(*learned, *taught, target, *settings, chunk_rows or 0, wanted)[0]


@torch.library.register_fake("sparsekd::linear_kd_loss")
def _linear_kd_loss_fake(
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, target, temperature, alpha,
    divergence, beta, ignore_index, label_smoothing, distill_ignored, chunk_rows, wanted
):  # fmt: skip
    check_same_device(
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


register_gradient("linear_kd_loss", _linear_kd_loss_setup, _linear_kd_loss_backward)

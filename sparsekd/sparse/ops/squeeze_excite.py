"""Squeeze-and-excitation for inference, of images that lie line by line."""

from __future__ import annotations

import torch
from torch import Tensor

from .registered import OPS, call
from .rules import register_for_inference

GATES = ("sigmoid", "hardsigmoid")


def squeeze_excite(
    input: Tensor,
    reduce: Tensor,
    reduce_bias: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor | None,
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """``input * gate(expand @ activation(reduce @ mean + reduce_bias) + expand_bias)`` with the mean over pixels.

    After Hu et al., "Squeeze-and-excitation networks", CVPR 2018. Means have the same bits in whatever order pixels are
    added (``csrc/cpu/squeeze_excite.h`` says how).

    Args:
        input: ``[N, C, H, W]``, float32, on the CPU.
        reduce: ``[S, C]``. reduce_bias: ``[S]``.
        expand: ``[C, S]``. expand_bias: ``[C]``.
        activation: "none", "relu", "relu6", "silu" or "hardswish".
        gate: "sigmoid" or "hardsigmoid".

    Returns:
        ``[N, C, H, W]``, contiguous.

    Raises:
        ValueError: shapes that do not fit, another activation or gate. TypeError: another dtype. RuntimeError: for
        gradients.
    """
    return call(OPS.squeeze_excite, input, reduce, reduce_bias, expand, expand_bias, activation, gate)


@torch.library.register_fake("sparsekd::squeeze_excite")
def _squeeze_excite_fake(input, reduce, reduce_bias, expand, expand_bias, activation, gate):
    return input.new_empty(input.shape)


register_for_inference("squeeze_excite", instead="torch's own layers")

"""Squeeze-and-excitation as one module, one pass over memory for the mean and one for the product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .fused import ACTIVATIONS
from .plans import Watched

GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}


class SqueezeExcite(Watched):
    """``input * gate(expand(activation(reduce(mean of input))))`` by :func:`sparsekd.sparse.ops.squeeze_excite`.

    That is for images that lie line by line on the CPU, in float32; others are torch's. For inference: an error where a
    tensor requires a gradient.

    Args:
        reduce, expand: ``nn.Conv2d`` of one pixel, without groups, whose parameters it takes.
        activation: "none", "relu", "relu6", "silu" or "hardswish".
        gate: "sigmoid" or "hardsigmoid".

    Attributes:
        plain: all is torch's, for an exporter, say: :func:`sparsekd.to_dense` sets it.
    """

    PARAMETERS = ("reduce", "reduce_bias", "expand", "expand_bias")

    def __init__(self, reduce: nn.Conv2d, expand: nn.Conv2d, activation: str, gate: str) -> None:
        super().__init__()
        self.reduce, self.expand = (_flat(layer.weight) for layer in (reduce, expand))  # [S, C], [C, S]
        self.register_parameter("reduce_bias", reduce.bias)
        self.register_parameter("expand_bias", expand.bias)
        self.activation, self.gate, self.plain = activation, gate, False

    def forward(self, input: Tensor) -> Tensor:
        own = self._parameters
        arguments = *(own[name] for name in self.PARAMETERS), self.activation, self.gate
        ours = input.device.type == "cpu" and input.is_contiguous() and not torch.is_autocast_enabled("cpu")
        if ours and not self.plain and input.dim() == 4 and input.dtype == own["reduce"].dtype == torch.float32:
            return ops.squeeze_excite(input, *arguments)
        inner = F.linear(input.mean((-2, -1)), self.reduce, self.reduce_bias)
        outer = F.linear(ACTIVATIONS[self.activation](inner), self.expand, self.expand_bias)
        return input * GATES[self.gate](outer)[..., None, None]

    def extra_repr(self) -> str:
        channels, hidden = self.expand.shape
        return f"{channels}, hidden={hidden}, activation={self.activation}, gate={self.gate}"


def _flat(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().flatten(1).contiguous(), weight.requires_grad)

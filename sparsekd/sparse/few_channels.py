"""Convolutions of a few input channels, an image's colours, packed with all their weights.

Dense engines are made for many channels: they convert such an input to blocks of channels that stay nearly empty, or
answer in a layout that the sparse layers after it have to turn around. The sparse kernels read lines as they lie,
whatever the channels; at density 1 in groups of output channels that share all columns they do no work in vain.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from .convert import Choices, choices, keep_choices
from .dispatch import Choice
from .modules import SparseConv2d

MOST_CHANNELS = 4
VECTOR = 4


def packs_whole(module: nn.Module) -> bool:
    """Whether a layer is a plain convolution of a few channels that the sparse kernels can take, on the CPU."""
    if type(module) is not nn.Conv2d or module._forward_hooks or module._forward_pre_hooks:
        return False
    fits = module.groups == 1 and module.in_channels <= MOST_CHANNELS and module.out_channels >= 2 * VECTOR
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return fits and plain and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def packed_whole(model: nn.Module) -> nn.Module | None:
    """A copy with these layers packed, for inference; None for a model without any."""
    if not any(packs_whole(module) for module in model.modules()):
        return None
    model = copy.deepcopy(model)
    made = Choices(choices(model), choices(model).seconds, choices(model).turned)
    for name, module in list(model.named_modules()):
        if not name or not packs_whole(module):
            continue
        keep = torch.ones_like(module.weight, dtype=torch.bool)
        packed = SparseConv2d.from_dense(module, keep, VECTOR).requires_grad_(False).train(module.training)
        packed.channels_last = False
        packed.freeze()
        model.set_submodule(name, packed)
        reason = f"{module.in_channels} input channels: faster so in the whole network, with all its weights"
        found = made.get(name, Choice(name, "Conv2d", "dense", ""))
        made[name] = replace(found, kernel="sparse", reason=reason, vector=VECTOR)
        if name in made.turned:
            made.turned.remove(name)
    keep_choices(model, made)
    return model

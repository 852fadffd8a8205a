"""Convolutions of a few input channels each: an image's colours, packed with all their weights, and depthwise layers.

Dense engines are made for many channels: they convert an image to blocks of channels that stay nearly empty, or answer
in a layout that the sparse layers after it have to turn around. The sparse kernels read lines as they lie, whatever the
channels; at density 1 in groups of output channels that share all columns they do no work in vain.

A depthwise layer has too few weights for its time to depend on how many are zero. Alone it is slower in the sparse
kernels; but between pruned layers that keep their activations in strips (csrc/cpu/strip_chain.h) it costs them two
changes of layout to leave it dense.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from .convert import Choices, choices, keep_choices
from .dispatch import Choice, best_grouping
from .modules import SparseConv2d

MOST_CHANNELS = 4
VECTOR = 4


def packs_whole(module: nn.Module) -> bool:
    """Whether a layer is a plain convolution of a few channels that the sparse kernels can take, on the CPU."""
    return _packs(module) and module.groups == 1 and module.out_channels >= 2 * VECTOR


def packs_groups(module: nn.Module) -> bool:
    """The same of a convolution whose groups have a few channels each."""
    return _packs(module) and module.groups > 1


def _packs(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d or module._forward_hooks or module._forward_pre_hooks:
        return False
    fits = module.in_channels // module.groups <= MOST_CHANNELS
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return fits and plain and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def packed_whole(model: nn.Module, groups: bool = False) -> nn.Module | None:
    """A copy with layers of a few channels packed, for inference; None for a model without any of those asked for.

    ``groups``: also those whose groups have a few channels each, of which zeros are left out.
    """
    wanted = packs_groups if groups else packs_whole
    if not any(wanted(module) for module in model.modules()):
        return None
    model = copy.deepcopy(model)
    made = Choices(choices(model), choices(model).seconds, choices(model).turned)
    for name, module in list(model.named_modules()):
        if not name or not (packs_whole(module) or groups and packs_groups(module)):
            continue
        keep, vector = torch.ones_like(module.weight, dtype=torch.bool), VECTOR
        reason = f"{module.in_channels} input channels: faster so in the whole network, with all its weights"
        if module.groups > 1:
            keep = module.weight.detach() != 0
            vector, permuted = best_grouping(module)
            vector = 1 if permuted else vector
            reason = f"{module.in_channels // module.groups} channels in a group: faster so in the whole network"
        packed = SparseConv2d.from_dense(module, keep, vector).requires_grad_(False).train(module.training)
        packed.channels_last = False
        packed.freeze()
        model.set_submodule(name, packed)
        found = made.get(name, Choice(name, "Conv2d", "dense", ""))
        made[name] = replace(found, kernel="sparse", reason=reason, vector=vector)
        if name in made.turned:
            made.turned.remove(name)
    keep_choices(model, made)
    return model

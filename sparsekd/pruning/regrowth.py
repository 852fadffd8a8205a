"""Masks that move: the smallest units of a layer go, as many others grow where the gradient is greatest.

Source: Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .patterns import Units, lowest
from .sharding import new_whole, whole


@torch.no_grad()
def moved_masks(
    weights: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    pruned: set[str],
    gradients: Mapping[str, Tensor],
    fraction: float,
    units: Callable[[str, Tensor], Units],
) -> tuple[dict[str, Tensor], int]:
    """The next masks, and how many weights have come back.

    Args:
        masks: True = keep, of each weight's shape.
        pruned: names of the layers that have lost weights; the others stay whole.
        gradients: mean |dL/dw|, also where a weight is pruned.
        fraction: of a layer's units that are kept, to be exchanged.
        units: groups the values of a layer, as its pattern does.
    """
    found, regrown = {}, 0
    for name, weight in weights.items():
        found[name] = masks[name].to(gradients[name].device)
        if name not in pruned:
            continue
        mask, size = found[name], whole(weight.detach()).abs().float()
        small, steep = units(name, size), units(name, gradients[name])
        kept = units(name, mask.float()).scores > 0
        moving = min(round(fraction * int(kept.sum())), int((~kept).sum()))
        dropped = lowest(torch.where(kept, small.scores, math.inf), moving)
        grown = lowest(torch.where(kept, math.inf, -steep.scores), moving)
        found[name] = new_whole(weight, torch.bool)
        found[name].copy_(small.mask(~((kept & ~dropped) | grown), weight.shape))
        regrown += int((found[name] & ~mask).sum())
    return found, regrown

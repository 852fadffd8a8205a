"""A weight of which two of each four consecutive input channels are kept, as sparse tensor cores take it.

At each place (r, s) of the kernel an output channel keeps two of the channels 0 to 3, of 4 to 7, and so on:

    weight[k, :, r, s] = [a . b . | . . c d | ...]      values[k, r * S + s] = [a, b, c, d, ...]
                                                        places of each pair    0, 2, 2, 3, ...   ascending, 2 bits each

The bits lie in ``metadata`` as the instruction ``mma.sp.m16n8k32`` wants them from the 32 lanes of a warp. One tile of
32 words is of 16 output and 64 input channels; word ``4 * g + t`` holds of row g in its lower half and of row g + 8 in
its upper half the places of the 8 values of channels ``16 * t`` to ``16 * t + 15``, the first in the lowest bits. Tiles
never cross convolution groups. Where one is filled up, it says 0 and 1.

Source: Mishra et al., "Accelerating sparse deep neural networks", 2021; NVIDIA, PTX ISA, "Sparse matrix storage".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .formats import check_mask

TILE_ROWS, TILE_CHANNELS = 16, 64
CHANNELS = 16  # per convolution group: a multiple of it, so that values are copied 16 bytes at a time


class TwoOfFour(NamedTuple):
    """A packed weight, contiguous."""

    values: Tensor  # [K, R * S, C/g / 2], dtype of the weight
    metadata: Tensor  # int32 [g * ceil(K/g / 16), R * S, ceil(C/g / 64), 32]


def _check_shape(shape: tuple[int, ...], groups: int) -> None:
    if len(shape) != 4:
        raise ValueError(f"Expected a weight of 4 dimensions [K, C/groups, R, S], got shape {tuple(shape)}")
    if groups < 1 or shape[0] % groups != 0:
        raise ValueError(f"Expected output channels divisible by groups={groups}, got {shape[0]}")
    if shape[1] == 0 or shape[1] % CHANNELS != 0:
        raise ValueError(
            f"Expected a multiple of {CHANNELS} input channels per group for 2:4 weights, got {shape[1]} in a weight "
            f"of shape {tuple(shape)}"
        )


def metadata_shape(shape: tuple[int, ...], groups: int = 1) -> tuple[int, int, int, int]:
    """Of the metadata of a weight ``[K, C/groups, R, S]``."""
    tiles = groups * -(-(shape[0] // groups) // TILE_ROWS)
    return tiles, shape[2] * shape[3], -(-shape[1] // TILE_CHANNELS), 32


def pack_24(weight: Tensor, mask: Tensor | None = None, groups: int = 1) -> TwoOfFour:
    """Packs a dense weight.

    Args:
        weight: floating ``[K, C/groups, R, S]``, C/groups a multiple of 16.
        mask: bool, the weight's shape, True = keep, exactly two of each four consecutive input channels, as the pattern
            "2:4" of ``Pruner`` makes it. None keeps what is not zero; a four that has fewer than two such weights keeps
            zeros as well, the later ones.
        groups: groups of the convolution.

    Raises:
        ValueError: a mask or non-zeros that are not 2:4, or a shape that has no packed form; TypeError: no bool mask.
    """
    _check_shape(tuple(weight.shape), groups)
    if mask is not None:
        check_mask(weight, mask)
    out, channels, *kernel = weight.shape
    taps = math.prod(kernel)
    # [K, taps, C/g / 4, 4]
    fours = weight.detach().reshape(out, channels, taps).transpose(1, 2).reshape(out, taps, -1, 4)
    keep = fours != 0
    if mask is not None:
        keep = mask.reshape(out, channels, taps).transpose(1, 2).reshape(out, taps, -1, 4)
    counts = keep.sum(-1)
    wrong = counts > 2 if mask is None else counts != 2
    if bool(wrong.any()):
        most = "at most two non-zeros in" if mask is None else "a mask that keeps two of"
        raise ValueError(
            f"Expected {most} each four consecutive input channels, got {int(wrong.sum())} of {wrong.numel()} fours "
            "with others"
        )
    # What is kept first, then the later ones of the rest, and of these two in ascending order.
    order = torch.arange(4, device=weight.device)
    places = (keep * 8 + order).topk(2, dim=-1).indices.sort(dim=-1).values  # [K, taps, C/g / 4, 2]
    values = fours.gather(-1, places).reshape(out, taps, channels // 2)
    return TwoOfFour(values.contiguous(), _metadata(places.reshape(out, taps, -1), groups))


def _metadata(places: Tensor, groups: int) -> Tensor:
    """``[K, taps, C/g / 2]`` of 0 to 3 to the words of tiles."""
    out, taps, half = places.shape
    per_group = out // groups
    rows, values = -per_group % TILE_ROWS, -half % (TILE_CHANNELS // 2)
    whole = places.reshape(groups, per_group, taps, half).to(torch.int64)
    filling = torch.tensor([0, 1], device=places.device)
    whole = torch.cat([whole, filling.repeat(values // 2).expand(groups, per_group, taps, -1)], -1)
    whole = torch.cat([whole, filling.repeat((half + values) // 2).expand(groups, rows, taps, -1)], 1)
    # [groups, tiles, half of the rows e, g, taps, blocks, t, value i]
    whole = whole.reshape(groups, -1, 2, 8, taps, (half + values) // 32, 4, 8)
    shift = (torch.arange(2, device=places.device) * 16).view(2, 1, 1, 1, 1, 1)
    shift = shift + torch.arange(8, device=places.device) * 2
    words = (whole << shift).sum((2, -1))  # [groups, tiles, g, taps, blocks, t]; bits don't meet
    words = words.permute(0, 1, 3, 4, 2, 5).reshape(-1, taps, (half + values) // 32, 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def places_24(metadata: Tensor, shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """Which input channel of its group each value is of: int64 ``[K, R * S, C/groups / 2]``."""
    _check_shape(tuple(shape), groups)
    expected = metadata_shape(shape, groups)
    if metadata.dtype != torch.int32 or tuple(metadata.shape) != expected:
        raise ValueError(f"Expected metadata int32 {expected}, got {metadata.dtype} {tuple(metadata.shape)}")
    out, channels, taps = shape[0], shape[1], shape[2] * shape[3]
    shift = (torch.arange(2, device=metadata.device) * 16).view(2, 1) + torch.arange(8, device=metadata.device) * 2
    words = metadata.reshape(groups, -1, taps, expected[2], 8, 4, 1, 1)
    bits = (words >> shift.to(torch.int32)) & 3  # [groups, tiles, taps, blocks, g, t, e, i]
    rows = bits.permute(0, 1, 6, 4, 2, 3, 5, 7).reshape(groups, -1, taps, expected[2] * TILE_CHANNELS // 2)
    places = rows[:, : out // groups, :, : channels // 2].reshape(out, taps, channels // 2).long()
    return places + torch.arange(channels // 2, device=metadata.device) // 2 * 4


def unpack_24(values: Tensor, metadata: Tensor, shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """The dense weight of ``shape``; differentiable in ``values``."""
    places = places_24(metadata, shape, groups)
    dense = values.new_zeros(shape[0], shape[2] * shape[3], shape[1]).scatter_add(2, places, values)
    return dense.transpose(1, 2).reshape(shape)


def gather_24(weight: Tensor, metadata: Tensor, groups: int = 1) -> Tensor:
    """The values of a dense weight at a given pattern; the inverse of :func:`unpack_24`."""
    shape = tuple(weight.shape)
    places = places_24(metadata, shape, groups)
    return weight.reshape(shape[0], shape[1], -1).transpose(1, 2).gather(2, places)

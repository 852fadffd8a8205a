"""What the kernels need of a pattern beyond its canonical format, made on the device, once: an order, its transpose.

Nothing here waits for the device: sizes follow from shapes alone. A plan is kept for as long as the index tensors that
it was made from, and made anew when one of them was written to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .checks import Geometry, cdiv, check_pattern

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _once(indices: tuple[Tensor | None, ...], key: tuple, make: Callable):
    """``make()``, or what it gave for the same tensors before."""
    first = indices[0]
    tracing = any(t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in indices)
    if tracing or torch.compiler.is_compiling():
        return make()
    versions = tuple(_version(t) for t in indices)
    found = _kept.setdefault(first, {}).get(key)
    if found is not None:
        others, made_of, plan = found
        pairs = zip(others, indices, strict=True)
        same = all((ref is None) == (t is None) and (ref is None or ref() is t) for ref, t in pairs)
        if same and made_of == versions:
            return plan
    plan = make()
    # What is made while a graph is captured holds nothing before the graph runs. It stays that graph's own.
    if not _capturing(first):
        _kept[first][key] = (tuple(None if t is None else weakref.ref(t) for t in indices), versions, plan)
    return plan


def heaviest_first(crow: Tensor) -> Tensor:
    """Row groups by falling number of vectors: int32 ``[row groups]``.

    Row swizzle of Gale et al., "Sparse GPU kernels for deep learning", SC 2020: the tail of a launch is then short.
    """
    return _once((crow,), ("order",), lambda: _order(crow[1:] - crow[:-1]))


def _order(counts: Tensor) -> Tensor:
    return torch.argsort(counts, descending=True, stable=True).to(torch.int32)


class Transposed(NamedTuple):
    """The transposed pattern in blocks of input channels, for the input gradient.

    A block's list holds the (packed row group, tap) in which any of its channels has a vector, one list for each phase
    (y % stride, x % stride) of the input:

        start, end [blocks * phases]      the list's part of ``column``
        column     [slots]                row group (within the convolution group) * taps + tap
        vector_of  [slots, block]         the vector of each of the block's channels, or -1
        order      [blocks * phases]      longest list first
    """

    start: Tensor
    end: Tensor
    column: Tensor
    vector_of: Tensor
    order: Tensor


def transposed(
    crow: Tensor, col: Tensor, in_channels: int, row_groups_per_group: int, geometry: Geometry, block: int
) -> Transposed:
    key = ("transposed", in_channels, row_groups_per_group, geometry, block)
    return _once((col, crow), key, lambda: _transpose(crow, col, in_channels, row_groups_per_group, geometry, block))


def _transpose(crow, col, in_channels, row_groups_per_group, geometry, block) -> Transposed:
    taps, groups, device = geometry.taps, geometry.groups, col.device
    channels = in_channels // groups
    blocks = cdiv(channels, block)
    # The one phase that each tap belongs to. All on the device: a copy from the host waits, and a captured graph does
    # not allow it.
    phases = geometry.stride[0] * geometry.stride[1]
    every_tap = torch.arange(taps, device=device)
    r, s = every_tap // geometry.kernel[1], every_tap % geometry.kernel[1]
    phase_of = (r * geometry.dilation[0] - geometry.padding[0]) % geometry.stride[0] * geometry.stride[1]
    phase_of = phase_of + (s * geometry.dilation[1] - geometry.padding[1]) % geometry.stride[1]
    of_phase = phase_of[:, None] == torch.arange(phases, device=device)  # [taps, phases]
    taps_of_phase = of_phase.sum(0)

    # Which vector each (channel, tap, row group) has: a dense map without the V, filled from the list.
    index = torch.arange(col.shape[0], device=device)
    row_group = torch.searchsorted(crow[1:].contiguous(), index, right=True).clamp(max=crow.shape[0] - 2)
    group, within = row_group // row_groups_per_group, row_group % row_groups_per_group
    channel, tap = col.long() // taps, col.long() % taps
    place = ((group * blocks * block + channel) * taps + tap) * row_groups_per_group + within
    size = groups * blocks * block * taps * row_groups_per_group
    place = torch.where((col >= 0) & (channel < channels), place, size)
    dense = torch.full((size + 1,), -1, dtype=torch.int32, device=device)
    dense = dense.scatter(0, place, index.to(torch.int32))[:size]
    length = taps * row_groups_per_group
    dense = dense.view(groups * blocks, block, length).transpose(1, 2)  # [blocks, slots of a block, block]

    # Slots by phase; within each those that are used come first, in their order.
    absent = (dense < 0).all(dim=2).to(torch.int32)  # [blocks, slots of a block]
    phase = phase_of[:, None].expand(-1, row_groups_per_group).reshape(-1)  # of each slot
    sorted_slots = torch.argsort(phase * 2 + absent, dim=1, stable=True)
    vector_of = torch.gather(dense, 1, sorted_slots[:, :, None].expand(-1, -1, block))
    column = every_tap[:, None] + torch.arange(row_groups_per_group, device=device) * taps
    column = column.reshape(-1)[sorted_slots]

    first = (taps_of_phase.cumsum(0) - taps_of_phase) * row_groups_per_group
    begin = torch.arange(groups * blocks, device=device)[:, None] * length + first
    used = (1 - absent).view(groups * blocks, taps, row_groups_per_group).sum(2)
    count = (used[:, :, None] * of_phase).sum(1)  # [blocks, phases]
    return Transposed(
        begin.reshape(-1).to(torch.int32),
        (begin + count).reshape(-1).to(torch.int32),
        column.reshape(-1).to(torch.int32),
        vector_of.reshape(-1, block).contiguous(),
        _order(count.reshape(-1)),
    )


def transpose_pattern(
    crow: Tensor,
    col: Tensor,
    rows: Tensor | None,
    vector: int,
    out_channels: int,
    in_channels: int,
    taps: int,
    groups: int,
) -> Tensor:
    """The list of single entries that ``csrc/cpu/pattern.cpp`` makes, entry for entry. Waits for the device."""
    if taps < 1 or groups < 1 or in_channels < groups or in_channels % groups:
        raise ValueError(
            "Expected input channels divisible by groups and at least one tap, got "
            f"{in_channels}, groups={groups}, taps={taps}"
        )
    check_pattern(crow, col, rows, crow, out_channels, groups, vector)
    rows_per_group, channels_per_group = out_channels // groups, in_channels // groups
    packed = cdiv(rows_per_group, vector)
    if col.numel() and bool(((col < 0) | (col >= channels_per_group * taps)).any()):
        raise IndexError(f"Expected col_indices in 0..{channels_per_group * taps - 1}, got one outside")
    index = torch.arange(col.shape[0], device=col.device)
    row_group = torch.searchsorted(crow[1:].contiguous(), index, right=True)
    group = (row_group // packed)[:, None]
    local = (row_group % packed)[:, None] * vector + torch.arange(vector, device=col.device)  # [n_vectors, V]
    real = local < rows_per_group
    row = (group * rows_per_group + local).clamp(max=max(out_channels - 1, 0))
    if rows is not None:
        row = rows.long()[row]
    channel, tap = group * channels_per_group + (col.long() // taps)[:, None], (col.long() % taps)[:, None]
    place = index[:, None] * vector + torch.arange(vector, device=col.device)
    order = torch.argsort((channel * out_channels + row)[real], stable=True)
    channel = channel.expand_as(row)[real][order]
    column = ((row % rows_per_group) * taps + tap)[real][order]
    starts = torch.searchsorted(channel, torch.arange(in_channels + 1, device=col.device))
    return torch.cat([starts, column, place[real][order]]).to(torch.int32)

"""Which shape the holes take: a pattern groups the weights of a layer into units that go or stay as one.

======================== ==============================================================================================
``"unstructured"``       single weights
``"Vx1"``, ``"4x1"``     V output channels share their columns (the packed format of ``sparse/formats.py``)
``"4x1-permuted"``       the same, with output channels grouped by what they keep (``permutation.py``)
``"RxC"``, ``"4x4"``     blocks of R output and C input channels, at each place of the kernel
``"filter"``             whole output channels
``"channel"``            whole input channels
``"N:M"``, ``"2:4"``     of each M consecutive input channels, at each place of the kernel, N remain
``"V:N:M"``              of each M input channels 2N remain, the same for V output channels; of those N for each channel
======================== ==============================================================================================

    weight [K, C/g, R, S]          "2x1"             "2x2"            "2:4"             "4:2:8", columns 0 3 5 6 chosen
      rows: output channels        a a . .           a a b b          x . . x           x . . x . . . .
      here: R = S = 1              a a . .    ->     a a b b          . x x .           . . . x . x . .
                                   . . b b           c c d d          x x . .           x . . . . . x .
                                   . . b b           c c d d          . . x x           . . . . . x x .

``N:M`` and ``V:N:M`` fix the sparsity at 1 - N/M. Where input channels are no multiple of M the last group is as if
filled up with zeros: it keeps N all the same. Blocks never cross convolution groups; the last one may be smaller.

Sources: 2:4, Mishra et al., "Accelerating sparse deep neural networks", 2021; V:N:M, Castro et al., "VENOM: a
vectorized N:M format for unleashing the power of sparse tensor cores", SC 2023.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Units(NamedTuple):
    """What goes or stays as one in a layer."""

    scores: Tensor  # [n] mean score of each unit's weights; -inf when all of them are pruned already
    sizes: Tensor | None  # [n] int64, weights of each unit; None: one each
    index: Tensor | None  # [numel] int64, unit of each weight, -1 for weights that never go; None: weight i is unit i

    def mask(self, pruned: Tensor, shape: torch.Size) -> Tensor:
        """True = keep, of the weight's shape; ``pruned`` is bool ``[n]``."""
        if self.index is None:
            return ~pruned.view(shape)
        # One more unit, which never goes: index -1.
        return ~torch.cat([pruned, pruned.new_zeros(1)])[self.index].view(shape)


class Layout(NamedTuple):
    """How a layer's weight becomes the matrix of output channels that patterns speak of."""

    groups: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        return cls(getattr(module, "groups", 1), isinstance(module, _TRANSPOSED))

    def rows(self, weight: Tensor) -> Tensor:
        """``[K, C/g, taps]``; from a transposed convolution's ``[C, K/g, ...]`` too."""
        if self.transposed:
            parts = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
            weight = parts.transpose(1, 2).reshape(-1, weight.shape[0] // self.groups, *weight.shape[2:])
        return weight.reshape(weight.shape[0], weight.shape[1], math.prod(weight.shape[2:]))

    def weight(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`rows`."""
        if not self.transposed:
            return rows.reshape(shape)
        parts = rows.reshape(self.groups, shape[1], shape[0] // self.groups, *shape[2:])
        return parts.transpose(1, 2).reshape(shape)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Marks the ``count`` lowest scores; among equal scores those that come first in row-major order.

    The same choice as a stable sort makes, in linear time on the CPU.

    Args:
        scores: any shape, without NaN.
        count: how many to mark; less than 0 counts as 0, more than there are as all.

    Returns:
        A bool tensor of the shape of ``scores`` with exactly ``count`` True.
    """
    flat = scores.flatten()  # [n]
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if flat.device.type == "cpu":
        threshold = flat.kthvalue(count).values
    else:
        # kthvalue raises on CUDA under torch.use_deterministic_algorithms; a sort is fast enough there.
        threshold = flat.sort().values[count - 1]
    marked = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    marked[ties[: count - int(marked.sum())]] = True
    return marked.view(scores.shape)


def lowest_units(scores: Tensor, sizes: Tensor | None, weights: int) -> Tensor:
    """Marks the units of the lowest scores that hold ``weights`` weights, or as near to that as whole units come.

    Args:
        scores: ``[n]``. sizes: ``[n]`` weights of each, or None for one each.
    """
    if sizes is None or scores.numel() == 0:
        return lowest(scores, weights)
    first = int(sizes[0])
    if bool((sizes == first).all()):
        return lowest(scores, round(weights / first))
    order = torch.argsort(scores, stable=True)
    held = torch.cat([sizes.new_zeros(1), sizes[order].cumsum(0)])  # weights of the first 0, 1, 2, ... units
    marked = torch.zeros_like(scores, dtype=torch.bool)
    marked[order[: int((held - weights).abs().argmin())]] = True
    return marked


class Pattern:
    """Groups weights into units. Patterns see a layer as ``[K, C/g, taps]`` (:meth:`Layout.rows`)."""

    name = "unstructured"
    sparsity: float | None = None  # what the pattern itself fixes
    vector = 1  # output channels that share their columns
    permuted = False

    def __repr__(self) -> str:
        return self.name

    def limit(self, shape: torch.Size, layout: Layout) -> int | None:
        """How many weights of a layer go in the end where the pattern fixes that, else None."""
        return None

    def units(self, scores: Tensor, layout: Layout, order: Tensor | None = None) -> Units:
        """The units of a layer.

        Args:
            scores: of the weight's shape, without NaN; -inf where a weight is pruned already.
            order: output channels in the order in which they are grouped, int64 ``[K]``; None: as they come.
        """
        return Units(scores.flatten(), None, None)


class BlockPattern(Pattern):
    """``rows`` output by ``columns`` input channels; None stands for all of them (of a convolution group)."""

    def __init__(self, name: str, rows: int | None, columns: int | None, permuted: bool = False) -> None:
        self.name, self.rows, self.columns, self.permuted = name, rows, columns, permuted
        self.vector = rows or 1

    def units(self, scores: Tensor, layout: Layout, order: Tensor | None = None) -> Units:
        out, inputs, taps = layout.rows(scores).shape
        device, per_group = scores.device, out // layout.groups
        place = torch.arange(out, device=device)
        if order is not None:
            place = torch.empty_like(place).scatter_(0, order.to(device), place.clone())
        rows = self.rows or per_group
        # Groups of rows begin anew with each convolution group.
        row = place // per_group * -(-per_group // rows) + place % per_group // rows  # [K]
        channel = torch.arange(inputs, device=device) // (self.columns or max(inputs, 1))  # [C/g]
        tap = torch.arange(taps, device=device)
        if self.rows is None or self.columns is None:
            tap = torch.zeros_like(tap)  # whole filters and channels: all places of the kernel at once
        channels, places = int(channel[-1]) + 1 if inputs else 0, int(tap[-1]) + 1 if taps else 0
        index = (row[:, None, None] * channels + channel[None, :, None]) * places + tap  # [K, C/g, taps]
        index = layout.weight(index, scores.shape).flatten()
        return _units(scores, index)


def _units(scores: Tensor, index: Tensor) -> Units:
    count = int(index.max()) + 1 if index.numel() else 0
    sizes = torch.bincount(index, minlength=count)
    flat = scores.flatten()
    gone = flat == -torch.inf
    # In double: a sum of float32 can overflow, and -inf is the mark of what is pruned already.
    total = torch.zeros(count, dtype=torch.float64, device=scores.device).index_add_(0, index, flat.double())
    means = (total / sizes).clamp_(min=torch.finfo(torch.float64).min)
    whole = torch.bincount(index, weights=gone.double(), minlength=count) == sizes
    # A unit of which some weights are pruned (masks that were read) is worth what is left of it.
    left = torch.zeros_like(total).index_add_(0, index, flat.double().masked_fill(gone, 0.0)) / sizes
    means = torch.where(means == torch.finfo(torch.float64).min, left, means).masked_fill_(whole, -torch.inf)
    return Units(means, sizes, index)


def _ranks(scores: Tensor) -> Tensor:
    """Places in ascending order, among equal scores as they come; -inf stays."""
    places = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    places[scores.argsort(stable=True)] = torch.arange(scores.numel(), dtype=torch.float64, device=scores.device)
    return places.masked_fill(scores == -torch.inf, -torch.inf)


class NMPattern(Pattern):
    """N of each M consecutive input channels remain; with V > 1 out of 2N that V output channels share."""

    def __init__(self, name: str, n: int, m: int, vector: int = 1) -> None:
        self.name, self.n, self.m, self.vector = name, n, m, vector
        self.sparsity = 1 - n / m

    def limit(self, shape: torch.Size, layout: Layout) -> int:
        probe = layout.rows(torch.zeros(shape, device="meta"))
        out, inputs, taps = probe.shape
        kept = inputs // self.m * self.n + min(inputs % self.m, self.n)
        return out * taps * (inputs - kept)

    def units(self, scores: Tensor, layout: Layout, order: Tensor | None = None) -> Units:
        rows = layout.rows(scores).movedim(2, 1)  # [K, taps, C/g]
        out, taps, inputs = rows.shape
        whole = -(-inputs // self.m) * self.m
        # Zeros that fill up the last group come after everything, so that no real weight makes room for them.
        groups = nn.functional.pad(rows.double(), (0, whole - inputs), value=-torch.inf).view(out, taps, -1, self.m)
        real = torch.arange(whole, device=scores.device).view(-1, self.m) < inputs  # [groups, M]
        stays = torch.ones_like(groups, dtype=torch.bool)
        if self.vector > 1:
            stays = self._shared_columns(groups, real, layout)
        # Of what the shared columns leave, the N highest; equal ones: the later stays, as `lowest` has it.
        # What is pruned already comes last of these, yet before what does not stay: each group keeps N places.
        floor = torch.finfo(groups.dtype).min
        key = torch.where(stays & real, groups.clamp(min=floor), -torch.inf).flip(-1)
        ranked = torch.argsort(key, dim=-1, descending=True, stable=True)
        best = torch.zeros_like(stays).scatter_(-1, ranked[..., : self.n], True).flip(-1)
        loses = ~(best & stays) & real

        def flat(chosen: Tensor) -> Tensor:  # [numel], in the order of the weight
            return layout.weight(chosen.view(out, taps, whole)[..., :inputs].movedim(1, 2), scores.shape).flatten()

        index = torch.full((scores.numel(),), -1, dtype=torch.int64, device=scores.device)
        if self.vector == 1:
            position = flat(loses).nonzero().flatten()
            index[position] = torch.arange(position.numel(), device=scores.device)
            return Units(scores.flatten()[position], None, index)
        # Columns that are not chosen go first, whole, then single weights within the others: a column that is chosen
        # later has lost nothing, so that no more than is asked for goes where scores change on the way.
        within, outside = flat(loses & stays), flat(loses & ~stays)
        row = self._row_groups(out, layout, scores.device)
        vectors = (row[:, None] * taps + torch.arange(taps, device=row.device))[..., None] * whole
        vectors = flat((vectors + torch.arange(whole, device=row.device)).contiguous())  # [numel], which V x 1 vector
        _, index[outside] = vectors[outside].unique(return_inverse=True)
        columns = _units(scores.flatten()[outside], index[outside])
        first, single = len(columns.scores), scores.flatten()[within]
        index[within] = first + torch.arange(single.numel(), device=scores.device)
        ranks = torch.cat([_ranks(columns.scores), _ranks(single) + first])
        return Units(ranks, torch.cat([columns.sizes, torch.ones_like(index[within])]), index)

    def _row_groups(self, out: int, layout: Layout, device: torch.device) -> Tensor:
        """Which V output channels each belongs to, ``[K]``; they begin anew with each convolution group."""
        place, per_group = torch.arange(out, device=device), out // layout.groups
        return place // per_group * -(-per_group // self.vector) + place % per_group // self.vector

    def _shared_columns(self, groups: Tensor, real: Tensor, layout: Layout) -> Tensor:
        """The 2N columns of each group of M that hold most, for V output channels together: bool like ``groups``."""
        row = self._row_groups(groups.shape[0], layout, groups.device)
        worth = torch.where(groups == -torch.inf, 0.0, groups)
        sums = worth.new_zeros(int(row[-1]) + 1, *groups.shape[1:]).index_add_(0, row, worth)
        # What is pruned already in all V channels goes before what is not, and the filling before both.
        gone = torch.ones_like(sums, dtype=torch.int64).index_add_(0, row, -(groups > -torch.inf).long()) > 0
        sums = sums.masked_fill(gone, -torch.inf)
        ranked = torch.argsort(sums.flip(-1), dim=-1, descending=True, stable=True)[..., : 2 * self.n]
        return torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, ranked, True).flip(-1)[row]


def find_pattern(pattern: str | Pattern) -> Pattern:
    """The pattern of a name; ValueError for an unknown one."""
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, str):
        if pattern == "unstructured":
            return Pattern()
        if pattern == "filter":
            return BlockPattern(pattern, 1, None)
        if pattern == "channel":
            return BlockPattern(pattern, None, 1)
        numbers = [int(number) for number in re.findall(r"\d+", pattern)]
        if re.fullmatch(r"\d+x\d+", pattern) and min(numbers) > 0:
            return BlockPattern(pattern, *numbers)
        if re.fullmatch(r"\d+x1-permuted", pattern) and numbers[0] > 0:
            return BlockPattern(pattern, numbers[0], 1, permuted=True)
        if re.fullmatch(r"\d+:\d+", pattern) and 0 < numbers[0] < numbers[1]:
            return NMPattern(pattern, *numbers)
        if re.fullmatch(r"\d+:\d+:\d+", pattern) and numbers[0] > 0 and 0 < 2 * numbers[1] <= numbers[2]:
            return NMPattern(pattern, numbers[1], numbers[2], vector=numbers[0])
    raise ValueError(
        'Expected pattern to be one of "unstructured", "Vx1", "Vx1-permuted", "RxC", "N:M" (N < M), "V:N:M" (2N <= M), '
        f'"filter", "channel", got {pattern!r}'
    )

"""Mask and weight to V x 1 vector-CSR, and back.

The weight ``[K, C/g, R, S]`` (or ``[K, C]``) is a matrix of K rows and C/g*R*S columns. Rows come in groups of V output
channels that keep the same columns; V = 1 is unstructured sparsity. Groups never cross convolution groups, and the
last group of each is padded:

    weight, V = 2                  crow_indices = [0, 2, 3]         first vector of each row group
      a . b .                      col_indices  = [0, 2, 1]         column of each vector
      c . d .                      values       = [[a, c],          [n_vectors, V]
      . e . .                                      [b, d],
                                                   [e, 0]]          the last group has one row: zero padding

With ``row_indices`` the packed row p is output channel ``row_indices[p]`` (a permutation inside the convolution
groups), so that channels which are not neighbours can share columns. Layout after column-vector-sparse formats of
Chen et al., "Efficient tensor core-based GPU kernels for structured sparsity", SC 2021.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

INDEX_LIMIT = 2**31 - 1


class VectorCSR(NamedTuple):
    """A packed weight. Indices are int32, contiguous, on the device of ``values``."""

    values: Tensor  # [n_vectors, V]
    crow_indices: Tensor  # [groups * ceil(K / groups / V) + 1]
    col_indices: Tensor  # [n_vectors]
    row_indices: Tensor | None  # [K] or None


def check_mask(weight: Tensor, mask: Tensor) -> None:
    """Raises unless ``mask`` is a bool tensor of the weight's shape and device (True = keep)."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"Expected a mask of dtype torch.bool (True = keep), got {got}")
    if mask.shape != weight.shape:
        raise ValueError(f"Expected a mask of shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    if mask.device != weight.device:
        raise ValueError(f"Expected a mask on {weight.device}, got {mask.device}")


def _row_masks(mask: Tensor, groups: int) -> Tensor:
    """``[K, ...]`` to ``[groups, K/groups, columns]``."""
    out_channels = mask.shape[0]
    if out_channels % groups != 0:
        raise ValueError(f"Expected output channels divisible by groups={groups}, got {out_channels}")
    return mask.reshape(groups, out_channels // groups, -1)


def largest_vector(mask: Tensor, groups: int = 1) -> int:
    """The largest V for which every group of V consecutive output channels shares its columns.

    Args:
        mask: bool ``[K, ...]``, True = keep.
        groups: groups of the convolution.
    """
    rows = _row_masks(mask, groups)
    differs = (rows[:, 1:] != rows[:, :-1]).any(dim=-1).any(dim=0)  # [K/g - 1]: between row i and row i + 1
    # A group may only end where neighbours differ, so V divides every such place.
    boundaries = (differs.nonzero().flatten() + 1).tolist()
    return math.gcd(*boundaries) if boundaries else max(rows.shape[1], 1)


def grouping_permutation(mask: Tensor, vector: int, groups: int = 1) -> Tensor:
    """Output channels ordered so that channels with equal columns are neighbours: int32 ``[K]``.

    Whole groups of ``vector`` equal channels come first, so a mask that fits V x 1 in some order fits in this one.
    """
    rows = _row_masks(mask, groups)
    per_group = rows.shape[1]
    order = []
    for group in range(groups):
        _, pattern, counts = torch.unique(rows[group], dim=0, return_inverse=True, return_counts=True)
        by_pattern = torch.argsort(pattern, stable=True)
        starts = torch.cumsum(counts, 0) - counts
        rank = torch.arange(per_group, device=mask.device) - starts[pattern[by_pattern]]
        whole = rank < (counts // vector * vector)[pattern[by_pattern]]
        order.append(torch.cat([by_pattern[whole], by_pattern[~whole]]) + group * per_group)
    return torch.cat(order).to(torch.int32) if order else torch.empty(0, dtype=torch.int32, device=mask.device)


def largest_grouping(mask: Tensor, groups: int = 1) -> int:
    """The largest V, of 64, 32, ..., 2, for which some order of the output channels fits V x 1; 1 where none does.

    It is that of :func:`grouping_permutation`; the channels of the last group of each convolution group may be fewer.
    """
    rows = _row_masks(mask, groups)
    counts = [torch.unique(own, dim=0, return_counts=True)[1] for own in rows if own.numel()]
    for vector in (64, 32, 16, 8, 4, 2):
        if counts and rows.shape[1] >= vector and all(int((own % vector).count_nonzero()) <= 1 for own in counts):
            return vector
    return 1


def _check_permutation(row_indices: Tensor, out_channels: int, groups: int) -> None:
    per_group = out_channels // groups
    expected = torch.arange(out_channels, device=row_indices.device)
    valid = row_indices.shape == (out_channels,) and bool((row_indices.long().sort().values == expected).all())
    if not valid or bool((row_indices.long() // per_group != expected // per_group).any()):
        raise ValueError(
            f"Expected a permutation of {out_channels} output channels inside each of {groups} convolution groups, "
            f"got {row_indices.tolist()}"
        )


def pack(
    weight: Tensor,
    mask: Tensor | None = None,
    vector: int | str = 1,
    groups: int = 1,
    permute: bool | Tensor = False,
) -> VectorCSR:
    """Packs a dense weight.

    Args:
        weight: floating ``[K, C/groups, R, S]`` or ``[K, C]``.
        mask: bool, the weight's shape, True = keep. None keeps a vector when any of its weights is non-zero.
        vector: V, or "auto" for :func:`largest_vector`.
        groups: groups of the convolution.
        permute: True groups equal channels that are not neighbours; a permutation ``[K]`` is taken as it is.

    Raises:
        ValueError: an explicit mask whose groups of V rows do not share their columns, a V below 1, or sizes beyond
            2**31.
    """
    if mask is not None:
        check_mask(weight, mask)
    keep = weight != 0 if mask is None else mask
    if vector == "auto":
        vector = largest_vector(keep, groups)
    if not isinstance(vector, int) or isinstance(vector, bool) or vector < 1:
        raise ValueError(f'Expected vector to be a whole number of at least 1 or "auto", got {vector!r}')
    rows = _row_masks(keep, groups)  # [g, K/g, columns]
    _, per_group, columns = rows.shape
    row_indices = None
    if isinstance(permute, Tensor):
        row_indices = permute.to(device=weight.device, dtype=torch.int32).contiguous()
        _check_permutation(row_indices, weight.shape[0], groups)
    elif permute:
        row_indices = grouping_permutation(keep, vector, groups)
    dense = weight.detach().reshape(weight.shape[0], -1)
    if row_indices is not None:
        dense = dense[row_indices.long()]
        rows = rows.reshape(weight.shape[0], -1)[row_indices.long()].view_as(rows)
    packed = -(-per_group // vector)
    pad = packed * vector - per_group
    dense = torch.nn.functional.pad(dense.reshape(groups, per_group, columns), (0, 0, 0, pad))
    dense = dense.view(groups * packed, vector, columns)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, pad))
    grouped = rows.view(groups * packed, vector, columns)
    kept = grouped.any(dim=1)  # [row groups, columns]
    if mask is not None:
        real = (torch.arange(packed * vector, device=weight.device) < per_group).view(packed, vector).repeat(groups, 1)
        fits = (grouped == kept[:, None]) | ~real[:, :, None]
        if not bool(fits.all()):
            bad = int((~fits).any(dim=1).sum())
            raise ValueError(
                f"Expected a mask whose groups of {vector} output channels share their columns, got {bad} columns kept "
                "for only some of their channels"
            )
    if columns > INDEX_LIMIT or kept.numel() and int(kept.sum()) * vector > INDEX_LIMIT:
        raise ValueError(f"Expected fewer than 2**31 columns and values, got a weight of shape {tuple(weight.shape)}")
    crow = torch.zeros(groups * packed + 1, dtype=torch.int32, device=weight.device)
    crow[1:] = kept.sum(dim=1).cumsum(0)
    group_of, col = kept.nonzero(as_tuple=True)
    values = dense[group_of, :, col]  # [n_vectors, V]
    return VectorCSR(values.contiguous(), crow, col.to(torch.int32), row_indices)


def flat_positions(
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    vector: int,
    shape: tuple[int, ...],
    groups: int = 1,
) -> Tensor:
    """Where each packed value lies in the flattened dense weight: int64 ``[n_vectors, V]``, K*columns for padding."""
    out_channels = shape[0]
    columns = math.prod(shape[1:])
    per_group = out_channels // groups
    packed = -(-per_group // vector)
    counts = (crow_indices[1:] - crow_indices[:-1]).long()
    group_of = torch.repeat_interleave(
        torch.arange(groups * packed, device=col_indices.device), counts, output_size=col_indices.shape[0]
    )
    local = (group_of % packed)[:, None] * vector + torch.arange(vector, device=col_indices.device)  # [n_vectors, V]
    row = (group_of // packed)[:, None] * per_group + local
    padding = local >= per_group
    row = row.masked_fill(padding, 0)
    if row_indices is not None:
        row = row_indices.long()[row]
    return (row * columns + col_indices.long()[:, None]).masked_fill(padding, out_channels * columns)


def unpack(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    row_indices: Tensor | None,
    shape: tuple[int, ...],
    groups: int = 1,
) -> Tensor:
    """The dense weight of ``shape``; differentiable in ``values``."""
    position = flat_positions(crow_indices, col_indices, row_indices, values.shape[1], shape, groups)
    size = math.prod(shape)
    dense = values.new_zeros(size + 1)  # the last element takes the padding
    return dense.index_put((position.reshape(-1),), values.reshape(-1))[:size].view(shape)


def gather(
    weight: Tensor, crow_indices: Tensor, col_indices: Tensor, row_indices: Tensor | None, vector: int, groups: int = 1
) -> Tensor:
    """The packed values ``[n_vectors, V]`` of a dense weight at a given pattern; the inverse of :func:`unpack`."""
    position = flat_positions(crow_indices, col_indices, row_indices, vector, tuple(weight.shape), groups)
    return torch.cat([weight.reshape(-1), weight.new_zeros(1)])[position]

"""How a SparseConv2d of pattern "2:4" hands its packed values to ``ops.conv2d_24``: the order, made once per pattern.

The module keeps vector-CSR (``formats.py``) with V = 1, as all sparse modules do, so that it is saved, loaded, trained
and made dense as they are. Its values in the order of ``formats_24.py`` are those, permuted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import formats, formats_24


class Plan24(NamedTuple):
    metadata: Tensor  # of `formats_24.TwoOfFour`
    order: Tensor  # int32 [K, R * S, C/g / 2]: which of the packed values each of its values is
    col_indices: Tensor  # that it was made of

    def packed(self, values: Tensor) -> formats_24.TwoOfFour:
        """Of the packed values ``[n, 1]``; differentiable."""
        ordered = values.flatten().index_select(0, self.order.flatten()).view(self.order.shape)
        return formats_24.TwoOfFour(ordered, self.metadata)


def plan_24(
    crow_indices: Tensor, col_indices: Tensor, row_indices: Tensor | None, shape: tuple[int, ...], groups: int
) -> Plan24:
    """The plan of a pattern with V = 1; ValueError for one that does not keep two of each four input channels."""
    # Tensors made in inference mode could not be saved for a later backward.
    with torch.inference_mode(False):
        if col_indices.is_meta:
            metadata = col_indices.new_empty(formats_24.metadata_shape(shape, groups))
            return Plan24(metadata, col_indices.new_empty(shape[0], shape[2] * shape[3], shape[1] // 2), col_indices)
        half = math.prod(shape[1:]) // 2
        counts = crow_indices.diff()
        if col_indices.shape[0] != shape[0] * half or not bool((counts == half).all()):
            raise ValueError(
                f"Expected a mask that keeps two of each four consecutive input channels, {half} weights of each "
                f"output channel, got {col_indices.shape[0]} weights of {shape[0]} channels"
            )
        places = torch.arange(1, col_indices.shape[0] + 1, device=col_indices.device).view(-1, 1)
        dense = formats.unpack(places, crow_indices, col_indices, row_indices, shape, groups)
        places, metadata = formats_24.pack_24(dense, dense != 0, groups)
        return Plan24(metadata, (places - 1).to(torch.int32), col_indices)


def filled_mask(weight: Tensor, mask: Tensor | None, groups: int) -> Tensor | None:
    """A mask that keeps two of each four: the given one, or that of the non-zeros, with zeros where there are fewer.

    Raises:
        As :func:`formats_24.pack_24`.
    """
    if weight.is_meta:
        if mask is None:
            return None
        weight = mask.float()
    values, metadata = formats_24.pack_24(weight, mask, groups)
    return formats_24.unpack_24(torch.ones_like(values), metadata, tuple(weight.shape), groups) != 0

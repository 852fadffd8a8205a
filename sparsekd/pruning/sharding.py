"""Weights that FSDP2 shards (DTensor): the part that this rank holds, and the whole.

Masks are made from whole scores, which are the same on every rank, and held on each rank's own part.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory; a plain tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All parts together. Every rank has to call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole ``value``, cut as ``like`` is. Nothing is sent: each rank has the whole."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = like.device_mesh
    everywhere = distribute_tensor(value, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
    return everywhere.redistribute(mesh, like.placements).to_local()


def whole_of_part(part: Tensor, like: Tensor) -> Tensor:
    """The whole of what each rank has a part of. Every rank has to call it."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    sharded = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return sharded.full_tensor()


def new_whole(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty plain tensor of the whole's shape, in its memory format, on the device of this rank's part."""
    if is_sharded(like):
        return torch.empty(like.shape, dtype=dtype, device=local(like).device)
    return torch.empty_like(like, dtype=dtype)

"""Packed safetensors: a pruned model in the bytes of its non-zeros.

One file holds the state dict, in which every packed or mostly-zero weight ``name`` is replaced by

    name#nonzeros   the kept values in row-major order, in the weight's dtype
    name#bitmask    uint8 [ceil(numel / 8)], bit 7 - i % 8 of byte i // 8 is set where element i is kept

and, in the metadata, which of them belong to sparse modules and how those were grouped, and which convolutions are
stored in channels_last, and a SHA-256 over all of it. At 90% sparsity a float32 weight takes 10% + 1/32 of its dense
bytes. Nothing is unpickled, and nothing larger than the model's own tensors is allocated, whatever a file says.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .convert import dense_state_dict
from .dispatch import KINDS, from_dense, sparsity_of
from .modules import DTYPES, SparseConv2d, SparseModule
from .surgery import put_in_place

FORMAT = "sparsekd"
VERSION = 2
PACK_FROM = 0.1  # sparsity above which bitmask and non-zeros are smaller, with a margin


def _pack_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy()))


def _unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).view(shape)


def _checksum(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    """SHA-256 over every name, dtype, shape and byte, and over the metadata."""
    digest = hashlib.sha256()
    for name, fact in sorted(facts.items()):
        digest.update(f"{name}={fact}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save(model: nn.Module, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Writes the model's parameters and buffers, pruned weights packed.

    The file is written aside and renamed: an existing one stays whole until the new one is.

    Args:
        dtype: of the values of packed weights in the file, float16 or bfloat16 to halve them; None: as in the model.

    Raises:
        TypeError: not a module, or another dtype; ValueError: values that ``dtype`` can't hold; OSError: the folder
        can't be written.
    """
    if dtype not in (None, *DTYPES):
        raise TypeError(f"Expected dtype to be None or one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module, got {type(model).__name__}")
    everywhere = model.named_modules(remove_duplicate=False)
    sparse = {name: module for name, module in everywhere if isinstance(module, SparseModule)}
    tensors: dict[str, Tensor] = {}
    packed: dict[str, dict] = {}
    aliases: dict[str, str] = {}
    owner: dict[tuple, str] = {}
    channels_last: list[str] = []
    for key, tensor in dense_state_dict(model).items():
        prefix, _, last = key.rpartition(".")
        if _only_channels_last(tensor):
            channels_last.append(key)
        # Of the model's own tensor: where a copy lies that is packed and gone, the next may lie.
        identity = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        tensor = tensor.detach().cpu().contiguous()
        module = sparse.get(prefix) if last == "weight" else None
        if module is None and tensor.numel():  # tied tensors are stored once
            if identity in owner:
                aliases[key] = owner[identity]
                continue
            owner[identity] = key
        if module is not None:
            mask = module.mask
            packed[key] = {"shape": list(tensor.shape), "vector": module.vector}
            if getattr(module, "pattern", None) is not None:
                packed[key]["pattern"] = module.pattern
            if module.row_indices is not None:
                tensors[f"{key}#rows"] = module.row_indices.cpu()
        elif tensor.dim() >= 2 and tensor.is_floating_point() and sparsity_of(tensor) > PACK_FROM:
            mask = tensor != 0
            packed[key] = {"shape": list(tensor.shape)}
        else:
            tensors[key] = tensor
            continue
        tensors[f"{key}#nonzeros"] = _cast(tensor[mask.cpu()], dtype, key)
        tensors[f"{key}#bitmask"] = _pack_bits(mask)
    facts = {"packed": packed, "aliases": aliases, "channels_last": channels_last}
    metadata = {"format": FORMAT, "version": str(VERSION), **{name: json.dumps(fact) for name, fact in facts.items()}}
    metadata["checksum"] = _checksum(tensors, metadata)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Expected a folder to write {path.name} into, got {path.parent}, which is none")
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, aside, metadata)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def _cast(values: Tensor, dtype: torch.dtype | None, key: str) -> Tensor:
    cast = values if dtype is None else values.to(dtype)
    lost = int((cast.isfinite() != values.isfinite()).sum())
    if lost:
        raise ValueError(f"Expected values of {key} within the range of {dtype}, got {lost} beyond it")
    return cast


def _only_channels_last(tensor: Tensor) -> bool:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors, and the facts of the metadata."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file saved by sparsekd.save, got {path}, which is none")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"Expected a whole file saved by sparsekd.save, got {path}: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"Expected a file saved by sparsekd.save, got {path} without its mark")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"Expected format version {VERSION}, got {metadata.get('version')} in {path}")
    if metadata.pop("checksum", None) != _checksum(tensors, metadata):
        raise ValueError(f"Expected a whole file saved by sparsekd.save, got {path}, whose checksum differs")
    try:
        packed, aliases, channels_last = (json.loads(metadata[name]) for name in ("packed", "aliases", "channels_last"))
        for key, info in packed.items():
            _check_packed(key, info, tensors)
        whole = all(isinstance(key, str) and "#" not in key for key in (*aliases, *aliases.values(), *channels_last))
        if not whole or not isinstance(channels_last, list):
            raise ValueError("names of tensors are missing")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"Expected a whole file saved by sparsekd.save, got {path}: {error}") from None
    return tensors, {"packed": packed, "aliases": aliases, "channels_last": channels_last}


def _check_packed(key: str, info: dict, tensors: dict[str, Tensor]) -> None:
    """Raises unless the packed tensors of a weight have the sizes that its shape says."""
    shape, bits, nonzeros = info["shape"], tensors[f"{key}#bitmask"], tensors[f"{key}#nonzeros"]
    if not all(type(side) is int and side >= 0 for side in shape) or not len(shape):
        raise ValueError(f"{key} of shape {shape}")
    if bits.dtype != torch.uint8 or bits.shape != (-(-math.prod(shape) // 8),):
        raise ValueError(f"a bitmask {list(bits.shape)} of {bits.dtype} for {key} of shape {shape}")
    if nonzeros.dtype not in DTYPES or nonzeros.dim() != 1:
        raise ValueError(f"values {list(nonzeros.shape)} of {nonzeros.dtype} for {key}")
    if "vector" in info and not (type(info["vector"]) is int and 1 <= info["vector"] <= max(shape[0], 1)):
        raise ValueError(f"vector {info['vector']} for {key} of shape {shape}")
    if "pattern" in info and (info["pattern"] != "2:4" or len(shape) != 4 or info.get("vector") != 1):
        raise ValueError(f"pattern {info['pattern']!r} for {key} of shape {shape}")


def load(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Loads a file of :func:`save` into a model of the same architecture, plain or converted, and returns it.

    Layers that were sparse when saved become sparse modules, in place. Strict: missing and unexpected keys, other
    shapes, corrupt data and newer formats are errors, and the model is then unchanged. Nothing is unpickled.
    """
    path = Path(path)
    tensors, facts = _read(path)
    expected = {key: tensor.shape for key, tensor in dense_state_dict(model).items()}
    state = {key: tensor for key, tensor in tensors.items() if "#" not in key}
    swaps: dict[nn.Module, nn.Module] = {}
    for key, info in facts["packed"].items():
        mask = _unpack_bits(tensors[f"{key}#bitmask"], tuple(info["shape"]))
        nonzeros = tensors[f"{key}#nonzeros"]
        if int(mask.sum()) != nonzeros.numel():
            raise ValueError(f"Expected {int(mask.sum())} non-zeros of {key} in {path}, got {nonzeros.numel()}")
        weight = torch.zeros(info["shape"], dtype=nonzeros.dtype)
        weight[mask] = nonzeros
        state[key] = weight
        if "vector" not in info:
            continue
        name = key.rpartition(".")[0]
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"Expected a layer {name!r} in the model for {path}, got none") from None
        plain = old.to_dense() if isinstance(old, SparseModule) else old
        if not isinstance(plain, KINDS) or plain.weight.shape != weight.shape:
            got = f"{type(old).__name__} {list(getattr(plain, 'weight', weight).shape)}"
            raise ValueError(
                f"Expected {name!r} to be a convolution or Linear with a weight {info['shape']}, got {got}"
            )
        rows = tensors.get(f"{key}#rows")
        made = copy.deepcopy(plain)
        with torch.no_grad():
            made.weight.copy_(weight)
        mask = mask.to(made.weight.device)
        if "pattern" in info:
            swaps[old] = SparseConv2d.from_dense(made, mask, pattern=info["pattern"])
        else:
            swaps[old] = from_dense(made, mask, info["vector"], False if rows is None else rows)
    for key, source in facts["aliases"].items():
        if source not in state:
            raise ValueError(f"Expected {source}, which {key} equals, in {path}, got none")
        state[key] = state[source]
    _load_checked(model, state, expected, swaps, path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key in facts["channels_last"]:
        if key in parameters:
            parameters[key].data = parameters[key].data.contiguous(memory_format=torch.channels_last)
    return model


def _load_checked(
    model: nn.Module, state: dict[str, Tensor], expected: dict, swaps: dict[nn.Module, nn.Module], path: Path
) -> None:
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"Expected the keys of the model in {path}, got {missing[:3]} missing and {unexpected[:3]} more"
        )
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise ValueError(f"Expected {key} of shape {list(shape)} in {path}, got {list(state[key].shape)}")
    if model in swaps:
        raise ValueError("Expected a model that holds the sparse layer, got the layer itself; wrap it in nn.Sequential")
    # Plain layers where the file has a plain one: a converted model may hold a sparse module of another pattern there.
    for module in list(model.modules()):
        if isinstance(module, SparseModule) and module not in swaps:
            swaps[module] = module.to_dense()
    put_in_place(model, swaps)
    state = OrderedDict(state)
    state._metadata = model.state_dict()._metadata
    model.load_state_dict(state)

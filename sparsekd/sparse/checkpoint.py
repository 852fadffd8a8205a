"""Packed safetensors: a pruned model in the bytes of its non-zeros.

One file holds the state dict, in which every packed or mostly-zero weight ``name`` is replaced by

    name#nonzeros   the kept values in row-major order, in the weight's dtype
    name#bitmask    uint8 [ceil(numel / 8)], bit 7 - i % 8 of byte i // 8 is set where element i is kept

and, in the metadata, which of them belong to sparse modules and how those were grouped, and which convolutions are
stored in channels_last. At 90% sparsity a float32 weight takes 10% + 1/32 of its dense bytes.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .convert import dense_state_dict
from .dispatch import KINDS, from_dense, sparsity_of
from .packed_module import SparseModule
from .surgery import put_in_place

FORMAT = "sparsekd"
VERSION = 1
PACK_FROM = 0.1  # sparsity above which bitmask and non-zeros are smaller, with a margin


def _pack_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy()))


def _unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).view(shape)


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes the model's parameters and buffers, pruned weights packed.

    The file is written aside and renamed: an existing one stays whole until the new one is.

    Raises:
        TypeError: not a module; OSError: the folder can't be written.
    """
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
        tensor = tensor.detach().cpu().contiguous()
        module = sparse.get(prefix) if last == "weight" else None
        if module is None and tensor.numel():
            # Tied tensors are stored once.
            identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
            if identity in owner:
                aliases[key] = owner[identity]
                continue
            owner[identity] = key
        if module is not None:
            mask = module.mask
            packed[key] = {"shape": list(tensor.shape), "vector": module.vector}
            if module.row_indices is not None:
                tensors[f"{key}#rows"] = module.row_indices.cpu()
        elif tensor.dim() >= 2 and tensor.is_floating_point() and sparsity_of(tensor) > PACK_FROM:
            mask = tensor != 0
            packed[key] = {"shape": list(tensor.shape)}
        else:
            tensors[key] = tensor
            continue
        tensors[f"{key}#nonzeros"] = tensor[mask.cpu()]
        tensors[f"{key}#bitmask"] = _pack_bits(mask)
    facts = {"packed": packed, "aliases": aliases, "channels_last": channels_last}
    metadata = {"format": FORMAT, "version": str(VERSION), **{name: json.dumps(fact) for name, fact in facts.items()}}
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
    if int(metadata.get("version", 0)) > VERSION:
        raise ValueError(f"Expected format version {VERSION} or older, got {metadata['version']} in {path}")
    defaults = {"packed": "{}", "aliases": "{}", "channels_last": "[]"}
    return tensors, {name: json.loads(metadata.get(name, default)) for name, default in defaults.items()}


def load(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Loads a file of :func:`save` into a model of the same architecture, plain or converted, and returns it.

    Layers that were sparse when saved become sparse modules, in place. Strict: missing and unexpected keys, other
    shapes, corrupt data and newer formats are errors, and the model is then unchanged. Nothing is unpickled.
    """
    path = Path(path)
    tensors, facts = _read(path)
    state = {key: tensor for key, tensor in tensors.items() if "#" not in key}
    swaps: dict[nn.Module, nn.Module] = {}
    for key, info in facts["packed"].items():
        try:
            mask = _unpack_bits(tensors[f"{key}#bitmask"], tuple(info["shape"]))
            nonzeros = tensors[f"{key}#nonzeros"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"Expected the packed tensors of {key} in {path}, got: {error}") from None
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
        swaps[old] = from_dense(made, mask, info["vector"], False if rows is None else rows)
    state.update({key: state[source] for key, source in facts["aliases"].items()})
    _load_checked(model, state, swaps, path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key in facts["channels_last"]:
        if key in parameters:
            parameters[key].data = parameters[key].data.contiguous(memory_format=torch.channels_last)
    return model


def _load_checked(model: nn.Module, state: dict[str, Tensor], swaps: dict[nn.Module, nn.Module], path: Path) -> None:
    expected = {key: tensor.shape for key, tensor in dense_state_dict(model).items()}
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
    model.load_state_dict(state)

"""To and from torch's own modules: what may be packed, and where packed weights go back to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .packed import SparseModule


def options(parameter: Tensor) -> dict:
    return {"device": parameter.device, "dtype": parameter.dtype}


def keep_all(weight: Tensor) -> Tensor:
    # On the CPU for a weight on meta, as a mask from outside would be.
    return torch.ones(weight.shape, dtype=torch.bool, device="cpu" if weight.is_meta else weight.device)


def check_plain(module: nn.Module, kind: type[nn.Module], *methods: str) -> None:
    """Raises unless ``module`` computes what ``kind`` computes and has its weight."""
    if not isinstance(module, kind):
        raise TypeError(f"Expected torch.nn.{kind.__name__}, got {type(module).__name__}")
    if any(getattr(type(module), method) is not getattr(kind, method) for method in methods):
        raise TypeError(
            f"Expected a module with the forward of torch.nn.{kind.__name__}, got {type(module).__name__} with another"
        )
    if isinstance(module.weight, nn.UninitializedParameter):
        raise ValueError(f"Expected {type(module).__name__} with its weight made, got one that has not seen an input")


def copy_into(module: SparseModule, dense: nn.Module) -> nn.Module:
    with torch.no_grad():
        dense.weight.copy_(module.weight)
        dense.weight.requires_grad_(module.values.requires_grad)
        if module.bias is not None:
            dense.bias.copy_(module.bias)
            dense.bias.requires_grad_(module.bias.requires_grad)
    return dense.train(module.training)

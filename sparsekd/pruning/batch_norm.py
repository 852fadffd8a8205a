"""Batch-norm statistics after pruning: those of the dense model describe activations that are no longer there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .layers import check_count


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, loader: Iterable, batches: int | None = None) -> int:
    """Takes running means and variances anew from data; weights, modes and momenta stay as they are.

    Args:
        loader: batches ``(x, ...)`` or ``x``; the mean over those that are seen is kept.
        batches: of the loader, at most; None takes all.

    Returns:
        How many layers were recalibrated; 0 leaves the model alone.

    Raises:
        ValueError: an empty loader; the statistics are then as before.

    Source: Li et al., "EagleEye: fast sub-net evaluation for efficient neural network pruning", ECCV 2020.
    """
    if batches is not None:
        check_count("batches", batches)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    before = [(value, value.clone()) for norm in norms for value in norm.buffers()]
    device, seen = next(iter(norms[0].buffers())).device, 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean
            norm.train()
        for batch in loader:
            if batches is not None and seen == batches:
                break
            x = batch if isinstance(batch, Tensor) else batch[0]
            model(x.to(device))
            seen += 1
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        if seen == 0:
            for value, old in before:
                value.copy_(old)
    if seen == 0:
        raise ValueError("Expected a loader with at least one batch to recalibrate on, got none")
    return len(norms)

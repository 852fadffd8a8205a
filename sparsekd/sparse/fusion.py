"""optimize_for_inference: batch-norm folded into the convolutions, then pruned layers swapped where that is faster."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from .convert import choices, convert, to_dense


def optimize_for_inference(model: nn.Module, example_inputs: object) -> nn.Module:
    """A copy of the model for inference: eval mode, batch-norm folded, pruned layers sparse where that is faster.

    A model that torch.fx cannot trace keeps its batch-norms, which is said in a warning.

    Args:
        example_inputs: a tensor, or a tuple of positional, or a dict of named arguments of the forward.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module, got {type(model).__name__}")
    model = to_dense(model) if choices(model) else copy.deepcopy(model)
    model.eval()
    try:
        with torch.no_grad():
            folded = fuse(model, inplace=False, no_trace=False)
    except Exception as error:  # torch.fx raises many kinds, among them its users' own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"batch-norm is not folded, as torch.fx can't trace the model: {reason}", stacklevel=2)
        folded = model
    return convert(folded, example_inputs, inplace=True)

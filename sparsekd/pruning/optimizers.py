"""What an optimizer keeps for the single entries of a weight.

Most keep tensors of the weight's shape (momentum, moments). LBFGS lays all parameters end to end in flat vectors
instead, ``[numel of all]``, kept under the first parameter, its pairs in lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from .sharding import local


def moved_by(optimizers: Iterable[Optimizer], weights: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the weights that these optimizers hold."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    theirs = {id(parameter) for group in groups for parameter in group["params"]}
    return {name for name, weight in weights.items() if id(weight) in theirs}


def entries_of(optimizer: Optimizer, weight: nn.Parameter) -> Iterator[Tensor]:
    """The optimizer's tensors that have an entry for each entry of the weight, as views of the weight's shape."""
    if isinstance(optimizer, LBFGS):
        yield from _flat_entries(optimizer, weight)
        return
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            yield local(value)


def _flat_entries(optimizer: LBFGS, weight: nn.Parameter) -> Iterator[Tensor]:
    parameters, begin = optimizer._params, 0  # its vectors follow this list
    for parameter in parameters:
        size = parameter.numel() * (2 if parameter.is_complex() else 1)
        if parameter is weight:
            break
        begin += size
    else:
        return
    for value in optimizer.state.get(parameters[0], {}).values():
        for vector in value if isinstance(value, list) else [value]:
            if isinstance(vector, Tensor) and vector.dim() == 1:
                part = vector[begin : begin + size]
                yield (torch.view_as_complex(part.view(-1, 2)) if weight.is_complex() else part).view(weight.shape)


def begin_anew(optimizer: Optimizer) -> None:
    """For an optimizer that models the loss from earlier steps: new masks leave it another function to minimise."""
    if isinstance(optimizer, LBFGS):
        for state in optimizer.state.values():
            state["n_iter"] = 0

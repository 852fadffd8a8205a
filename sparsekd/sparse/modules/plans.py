"""What a sparse convolution remembers of its inferences, so that the next of the same size is little but the kernel.

    by size of the input                    the plan that the kernels read in place of the pattern (``plans.py``)
    by size and activation, on the CPU      the whole call: an operator whose arguments but the tensors are bound

A call is remembered when everything was looked at the long way: what the layer is set to, and whether it runs sparse at
that size. So a layer forgets its calls whenever one of its attributes is set.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import ops

changes = [0]  # of Watched layers


class Watched(nn.Module):
    """A layer that counts what is set on it or hooked to it, for those who remember what it does."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        changes[0] += 1

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        changes[0] += 1

    def register_forward_hook(self, *args: object, **kwargs: object) -> RemovableHandle:
        changes[0] += 1
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: object, **kwargs: object) -> RemovableHandle:
        changes[0] += 1
        return super().register_forward_pre_hook(*args, **kwargs)


MOST_PLANS = 4  # of a layer, for as many sizes of its input

Size = tuple[int, ...]  # [N, C, H, W]


class LayerPlans:
    """The plans of one pattern and the calls by them.

    Attributes:
        pattern: the col_indices that they are of.
        last: the plan that was asked for last, for a compiler to trace.
    """

    def __init__(self, pattern: Tensor) -> None:
        self.pattern = pattern
        self.last: ops.Plan | None = None
        self.by_size: dict[tuple[Size, bool], ops.Plan | None] = {}  # and by whether they are for lanes
        self.calls: dict[tuple[Size, str], Callable[..., Tensor | None]] = {}
        self.bound: dict[tuple[Size, str], torch.ScriptObject] = {}  # whose methods the calls are

    def plan(self, size: Size, make: Callable[[], ops.Plan | None], lanes: bool = False) -> ops.Plan | None:
        """The plan of a size; None where the kernels gain nothing by one, and for none yet while a graph is captured.

        What a capture makes is there only when the graph has run.
        """
        key = (tuple(size), lanes)
        if key not in self.by_size:
            if self.pattern.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            if len(self.by_size) >= MOST_PLANS:
                del self.by_size[next(iter(self.by_size))]
                self.forget_calls()  # they hold plans, too
            self.by_size[key] = make()
        self.last = self.by_size[key]
        return self.last

    def remember(self, size: Size, activation: str, row_indices: Tensor | None, geometry: tuple) -> None:
        """The call of a size on the CPU; ``geometry`` as the operators take it, from out_channels on."""
        if (size, activation) in self.calls:  # and not taken, for a reason of the moment
            return
        plan = self.by_size[tuple(size), False]
        bound = torch.classes.sparsekd.PlannedConv2d(
            plan.indices, list(plan.tiling), plan.order, row_indices, activation, list(size), *geometry
        )
        self.bound[size, activation] = bound
        self.calls[size, activation] = bound.run  # looked up once: that takes longer than a dictionary

    def forget_calls(self) -> None:
        self.calls.clear()
        self.bound.clear()

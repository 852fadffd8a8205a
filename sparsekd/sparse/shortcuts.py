"""Shortcuts without parameters in a traced network: subsampled activations beside channels of zeros.

    F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, after))

With a module in their place the layers around them run in one sequence (``sequence.py``).
"""

from __future__ import annotations

import operator
from itertools import count

import torch.nn.functional as F
from torch import fx

from .modules import FusedConv2d, Shortcut, SparseConv2d


def replace_shortcuts(graph: fx.GraphModule) -> None:
    """Those of a sparse layer's results become :class:`Shortcut` modules."""
    for pad in list(graph.graph.nodes):
        channels = _new_channels(pad)
        if channels is None:
            continue
        source, stride, subsampled = pad.args[0], (1, 1), None
        if source.op == "call_function" and source.target is operator.getitem and len(source.users) == 1:
            subsampled, stride, source = source, _strides(source.args[1]), source.args[0]
        sparse = source.op == "call_module" and isinstance(
            graph.get_submodule(source.target), (SparseConv2d, FusedConv2d)
        )
        if stride is None or not sparse:
            continue
        name = next(name for i in count() if not hasattr(graph, name := f"shortcut_{i}"))
        graph.add_submodule(name, Shortcut(stride, channels))
        with graph.graph.inserting_before(pad):
            pad.replace_all_uses_with(graph.graph.call_module(name, (source,)))
        graph.graph.erase_node(pad)
        if subsampled is not None:
            graph.graph.erase_node(subsampled)
    graph.recompile()


def _new_channels(node: fx.Node) -> tuple[int, int] | None:
    """How many channels of zeros are put before and after a node's first argument, if that is all that is done."""
    if node.op != "call_function" or node.target is not F.pad or len(node.args) != 2:
        return None
    zeros = node.kwargs.get("mode", "constant") == "constant" and node.kwargs.get("value") in (None, 0)
    widths = node.args[1] if isinstance(node.args[1], (tuple, list)) else ()
    plain = len(widths) == 6 and all(isinstance(width, int) and width >= 0 for width in widths)
    return tuple(widths[4:]) if zeros and plain and not any(widths[:4]) else None


def _strides(index: object) -> tuple[int, int] | None:
    """(a, b) of an index ``[:, :, ::a, ::b]``."""
    slices = isinstance(index, tuple) and len(index) == 4 and all(isinstance(part, slice) for part in index)
    if not slices or any(part.start not in (None, 0) or part.stop is not None for part in index):
        return None
    steps = [1 if part.step is None else part.step for part in index]
    return (steps[2], steps[3]) if steps[:2] == [1, 1] and all(isinstance(step, int) for step in steps) else None

"""Squeeze-and-excitation in a traced network, as torchvision's and timm's models write it.

    input * gate(expand(activation(reduce(mean of input))))

With one module in the place of these six the layers around them run in one sequence (``sequence.py``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

from .convert import Choices
from .modules import SparseConv2d, SqueezeExcite

GATE_MODULES = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"}
GATE_CALLS = {torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.hardsigmoid: "hardsigmoid", "sigmoid": "sigmoid"}
PRODUCTS = (operator.mul, torch.mul, "mul")


def replace_squeeze_excitations(
    graph: fx.GraphModule, prefix: str, choices: Choices, activation_of: Callable, in_place: Callable
) -> None:
    """They become :class:`SqueezeExcite` modules, which is said in ``choices``, where names have a prefix.

    ``activation_of(graph, node)`` names the activation that a node is, if it is one; ``in_place(graph, node)`` tells
    whether it changes its input.
    """
    count: dict[int, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = graph.get_submodule(node.target)
            count[id(module)] = count.get(id(module), 0) + 1
    for product in list(graph.graph.nodes):
        chain = _chain(graph, product, activation_of, count)
        if chain is None:
            continue
        source, nodes, activation, gate = chain
        *_, reduce, expand = (node for node in nodes if isinstance(_module(graph, node), (nn.Conv2d, SparseConv2d)))
        if _disturbed(graph, nodes, product, in_place):
            continue
        layers = [_plain(graph.get_submodule(node.target)) for node in (reduce, expand)]
        graph.set_submodule(expand.target, SqueezeExcite(*layers, activation, gate))
        with graph.graph.inserting_before(product):
            product.replace_all_uses_with(graph.graph.call_module(expand.target, (source,)))
        choices.pop(prefix + reduce.target, None)
        if (choice := choices.get(prefix + expand.target)) is not None:
            choices[prefix + expand.target] = choice.kept_dense("squeeze-and-excitation, with the layer before it")
        for node in (product, *reversed(nodes)):
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()


def _plain(layer: nn.Module) -> nn.Conv2d:
    return (layer.to_dense() if isinstance(layer, SparseConv2d) else layer).requires_grad_(False)


def _module(graph: fx.GraphModule, node: object) -> nn.Module | None:
    return graph.get_submodule(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _chain(graph: fx.GraphModule, product: fx.Node, activation_of, count: dict[int, int]) -> tuple | None:
    """(source, nodes from the mean to the gate, activation, gate) of a product that is such a one."""
    is_product = product.op in ("call_function", "call_method") and product.target in PRODUCTS
    if not is_product or len(product.args) != 2 or product.kwargs:
        return None
    for scale, source in (product.args, reversed(product.args)):
        gate = _gate(graph, scale)
        expand = scale.args[0] if gate else None
        if not gate or not _is_layer(graph, expand, count):
            continue
        reduce, activation, inner = expand.args[0], "none", []
        if isinstance(reduce, fx.Node) and (found := activation_of(graph, reduce)) and len(reduce.users) == 1:
            inner.append(reduce)
            reduce, activation = reduce.args[0], found
        if not _is_layer(graph, reduce, count):
            continue
        mean = reduce.args[0]
        each = _module(graph, expand).out_channels == _module(graph, reduce).in_channels  # not one gate for all
        if each and isinstance(source, fx.Node) and _is_mean(graph, mean, source):
            return source, [mean, reduce, *inner, expand, scale], activation, gate
    return None


def _disturbed(graph: fx.GraphModule, nodes: list[fx.Node], product: fx.Node, in_place: Callable) -> bool:
    """Whether something may change the source between its mean and the product."""
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    between = (node for node, place in order.items() if order[nodes[0]] < place < order[product])
    return any(in_place(graph, node) for node in between if node not in nodes)


def _gate(graph: fx.GraphModule, node: object) -> str | None:
    if not isinstance(node, fx.Node) or len(node.users) != 1 or len(node.args) != 1:
        return None
    module = _module(graph, node)
    if module is not None:
        hooked = module._forward_hooks or module._forward_pre_hooks
        return None if hooked else GATE_MODULES.get(type(module))
    return GATE_CALLS.get(node.target) if node.op in ("call_function", "call_method") else None


def _is_layer(graph: fx.GraphModule, node: object, count: dict[int, int]) -> bool:
    layer = _module(graph, node)
    if type(layer) not in (nn.Conv2d, SparseConv2d) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    once = count[id(layer)] == 1 and len(node.users) == 1 and len(node.args) == 1 and not node.kwargs
    pixel = tuple(layer.kernel_size) == tuple(layer.stride) == (1, 1) and layer.groups == 1
    return once and pixel and layer.padding in ((0, 0), "valid", "same")


def _is_mean(graph: fx.GraphModule, node: object, source: fx.Node) -> bool:
    if not isinstance(node, fx.Node) or len(node.users) != 1 or not node.args or node.args[0] is not source:
        return False
    module = _module(graph, node)
    if module is not None:
        hooked = module._forward_hooks or module._forward_pre_hooks
        return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)) and not hooked
    if node.target is F.adaptive_avg_pool2d:
        return node.args[1:] in ((1,), ((1, 1),)) and not node.kwargs
    if node.op == "call_method" and node.target == "mean":
        dims = node.args[1] if len(node.args) == 2 else None
        pixels = isinstance(dims, (tuple, list)) and sorted(dims) in ([2, 3], [-2, -1])
        return pixels and node.kwargs == {"keepdim": True}
    return False

"""optimize_for_inference: fewer passes over memory around the sparse layers.

    conv -> batch-norm -> (+ identity) -> relu          one module, FusedConv2d: batch-norm in the weights, the rest
                                                        done to results while they are in the cache
    max-pool                                            MaxPool2d of modules/fused.py
    shortcuts without parameters                        Shortcut of modules/fused.py: shortcuts.py
    squeeze-and-excitation                              one module, its small layers dense: squeeze_excite.py
    dropout and stochastic depth in eval mode, Identity gone
    convolutions of a few input channels, depthwise     computed by the sparse kernels, too: few_channels.py
    large activations                                   in the memory of those of the last forward: arena.py
    runs of such layers                                 without Python between them: sequence.py; activations stay as
                                                        the kernels read them, image by image

The model is traced by torch.fx, as a whole or, where control flow forbids it, child by child. A traced piece is used
only if it gives what the original gave on the example inputs.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import fusion as folding
from torch.nn.utils import parametrize

from ..measure.machine import timed_on
from ..measure.timing import compare, device_of
from . import ops
from .arena import hooked_by_others, reuse_memory, reuses
from .convert import Choices, choices, convert, keep_choices, to_dense
from .few_channels import packed_whole
from .modules import FusedConv2d, MaxPool2d, Shortcut, SparseConv2d, SparseModule, SqueezeExcite
from .modules.plans import Watched
from .recorded import check_calls, check_near, cloned, record_calls
from .sequence import in_strips, leave_strips, run_in_sequence, runs_in_sequence
from .shortcuts import replace_shortcuts
from .squeeze_excite import replace_squeeze_excitations
from .surgery import call, copied

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
ACTIVATION_CALLS = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    "relu": "relu",
    "relu_": "relu",
}
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def optimize_for_inference(
    model: nn.Module, example_inputs: object, mapping: Mapping[str, Mapping] | None = None
) -> nn.Module:
    """A copy of the model for inference, with pruned layers sparse where that is faster and their neighbours fused.

    Batch-norm is folded into convolutions and linear layers; ReLU, ReLU6, SiLU, Hardswish and residual additions are
    done by the sparse convolutions before them; max-pool and squeeze-and-excitation are operators of ours; the
    convolution of an image's few channels and depthwise ones, though dense, may go through the sparse kernels. What is
    fused is kept only if the network is faster so.
    Parts that torch.fx cannot trace stay as :func:`convert` makes them, which is said in a warning. Memory of
    activations of 1 MiB or more is kept from one forward to the next, as much as a forward takes at once. From the
    third forward of a size on, layers that follow each other run without Python between them (hooks, replaced layers
    and other parameters are seen; a forward with any of them goes layer by layer).

    Args:
        example_inputs: a tensor, or a tuple of positional, or a dict of named arguments of the forward.
        mapping: settings of layers by name glob, as :func:`convert` takes them.

    Returns:
        The optimised model, in eval mode, its parameters without ``requires_grad``; a change of weights through
        ``.data``, which leaves no trace, is not seen. ``choices()`` tells what was chosen
        for each layer; :func:`to_dense` gives plain modules, fused the same way.

    Raises:
        TypeError: not a module. RuntimeError: results that differ.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module, got {type(model).__name__}")
    # On the CPU layers are chosen anew, with batch-norm folded; on a GPU those that are sparse stay so.
    made = choices(model)
    chosen = made and device_of(model, example_inputs).type == "cpu"
    model = (to_dense(model) if chosen else copied(model)).eval().requires_grad_(False)
    untraced: dict[str, str] = {}
    traced = _traced(model, "", lambda: call(model, example_inputs), untraced)
    if untraced:
        said = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(untraced.items())[:3])
        warnings.warn(f"batch-norm and activations are not fused where torch.fx can't trace: {said}", stacklevel=2)
    keep_choices(traced, None if chosen else made)
    converted = convert(traced, example_inputs, inplace=True, mapping=mapping)
    for module in converted.modules():
        if isinstance(module, SparseConv2d):
            module.freeze()
    network = _fastest(converted, example_inputs)
    with torch.no_grad():
        if reuses(lambda: call(network, example_inputs)):
            reuse_memory(network)
    return network


class _Tracer(fx.Tracer):
    """Keeps whole what has hooks or parametrisations, which a trace would lose."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        kept = module._forward_hooks or module._forward_pre_hooks or parametrize.is_parametrized(module)
        whole = isinstance(module, (torch.jit.ScriptModule, SparseModule, Watched))  # what was fused before, too
        return bool(kept) or whole or super().is_leaf_module(module, qualified_name)


def _traced(module: nn.Module, name: str, run: Callable[[], object], untraced: dict[str, str]) -> nn.Module:
    """The module as a graph with batch-norm folded; or itself, with the children of which that can be made replaced.

    ``run`` runs the whole model, so that the inputs of this module are seen.
    """
    if not list(module.children()):
        return module
    calls = record_calls(module, run)
    try:
        if not calls:  # a list of modules, perhaps
            raise RuntimeError("it is not called")
        if hooked_by_others(module):
            raise RuntimeError("its hooks would be lost")
        # Layers are the original's own, but folded ones are new and put in the piece alone.
        # The forward of one that was optimised before can't be traced.
        graph = copy.deepcopy(module.graph) if runs_in_sequence(module) else _Tracer().trace(module)
        piece = fx.GraphModule(module, graph, type(module).__name__)
        _erase_identities(piece)
        _fold_batch_norms(piece)
        check_calls(piece, calls)
        return piece
    except Exception as error:  # torch.fx raises many kinds, among them its users' own
        if calls:
            untraced[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    del calls
    for child_name, child in list(module.named_children()):
        full = f"{name}.{child_name}" if name else child_name
        if any(isinstance(m, (*CONVOLUTIONS, nn.Linear)) for m in child.modules()) and list(child.children()):
            setattr(module, child_name, _traced(child, full, run, untraced))
    return module


# What follows changes graphs. A node's module:
def _module(graph: fx.GraphModule, node: object) -> nn.Module | None:
    is_call = isinstance(node, fx.Node) and node.op == "call_module"
    return graph.get_submodule(node.target) if is_call else None


def _calls_of(graph: fx.GraphModule) -> Counter:
    return Counter(id(_module(graph, node)) for node in graph.graph.nodes if node.op == "call_module")


def _plain(module: nn.Module | None, kinds: tuple[type, ...]) -> bool:
    """Whether a module is of one of the kinds, and nothing hangs on it that a fused one would lose."""
    return type(module) in kinds and not (module._forward_hooks or module._forward_pre_hooks)


def _erase_identities(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        stochastic_depth = node.op == "call_function" and getattr(node.target, "__name__", "") == "stochastic_depth"
        idle = stochastic_depth and False in (node.kwargs.get("training"), *node.args[3:4])
        if (_plain(_module(graph, node), IDENTITIES) or idle) and node.args:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()


def _fold_batch_norms(graph: fx.GraphModule) -> None:
    count = _calls_of(graph)
    for node in list(graph.graph.nodes):
        norm = _module(graph, node)
        before = node.args[0] if _plain(norm, BATCH_NORMS) and node.args else None
        layer = _module(graph, before)
        if not _plain(layer, (*CONVOLUTIONS, nn.Linear, SparseConv2d)) or norm.running_mean is None:
            continue
        if len(before.users) > 1 or count[id(layer)] > 1:
            continue
        if isinstance(layer, nn.Linear):
            folded = folding.fuse_linear_bn_eval(layer, norm)
        elif isinstance(layer, SparseConv2d):
            folded = layer.with_weights_of(folding.fuse_conv_bn_eval(layer.to_dense(), norm))
        else:
            folded = folding.fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, CONVOLUTIONS[3:]))
        graph.set_submodule(before.target, folded.requires_grad_(False))
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()


def _activation(graph: fx.GraphModule, node: fx.Node) -> str | None:
    module = _module(graph, node)
    if module is not None:
        return ACTIVATION_MODULES.get(type(module)) if _plain(module, tuple(ACTIVATION_MODULES)) else None
    return ACTIVATION_CALLS.get(node.target) if node.op in ("call_function", "call_method") else None


def _is_addition(node: fx.Node) -> bool:
    plain = len(node.args) == 2 and not node.kwargs  # torch.add has alpha
    return node.op in ("call_function", "call_method") and node.target in ADDITIONS and plain


def _in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    module = _module(graph, node)
    if module is not None:
        return getattr(module, "inplace", False)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or name in ("iadd", "isub", "imul", "setitem")
    return node.op in ("call_function", "call_method") and (in_place or bool(node.kwargs.get("inplace")))


def _fuse_epilogues(graph: fx.GraphModule) -> None:
    """conv -> (+ residual) -> activation becomes one module, called where the last of these was."""
    count = _calls_of(graph)
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    taken: set[fx.Node] = set()

    def fusible(node: object) -> bool:
        module = _module(graph, node)
        once = isinstance(module, SparseConv2d) and count[id(module)] == 1 and len(node.users) == 1
        return once and _plain(module, (SparseConv2d,)) and node not in taken and len(node.args) == 1

    for conv in list(graph.graph.nodes):
        if not fusible(conv):
            continue
        chain, residual, activation = [conv], None, "none"
        after = next(iter(conv.users))
        if _is_addition(after):
            others = [arg for arg in after.args if arg is not conv]
            # x += conv changes x for others, too.
            changes = _in_place(graph, after) and after.args[0] is not conv and len(after.args[0].users) > 1
            if len(others) == 1 and isinstance(others[0], fx.Node) and not changes:
                residual = others[0]
                chain.append(after)
                after = next(iter(after.users)) if len(after.users) == 1 else None
        if after is not None and (found := _activation(graph, after)):
            activation = found
            chain.append(after)
        if len(chain) == 1 or _disturbed(graph, chain, order):
            continue
        taken.add(conv)
        graph.set_submodule(conv.target, FusedConv2d(_module(graph, conv), activation))
        last = chain[-1]
        with graph.graph.inserting_before(last):
            fused = graph.graph.call_module(conv.target, (conv.args[0], residual) if residual else (conv.args[0],))
        order[fused] = order[last]
        last.replace_all_uses_with(fused)
        for node in reversed(chain):
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()


def _disturbed(graph: fx.GraphModule, chain: list[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether something between the convolution and the end of the chain may change the convolution's input in place.

    Nothing that a convolution or linear layer gave since can be that input, or a view of it.
    """
    for node, place in order.items():
        if not order[chain[0]] < place < order[chain[-1]] or node in chain or not _in_place(graph, node):
            continue
        target = node.args[0] if node.args else None
        layers = (*CONVOLUTIONS, nn.Linear, SparseModule, FusedConv2d)
        if not (isinstance(_module(graph, target), layers) and order[target] > order[chain[0]]):
            return True
    return False


def _replace_pools(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        pool = _module(graph, node)
        if not _plain(pool, (nn.MaxPool2d,)) or pool.ceil_mode or pool.return_indices:
            continue
        pair = torch.nn.modules.utils._pair
        # Of a kernel of 1 x 1 the result may be the input itself, which something may change in place.
        if pair(pool.dilation) == (1, 1) and pair(pool.kernel_size) != (1, 1):
            geometry = (pair(pool.kernel_size), pair(pool.stride), pair(pool.padding))
            graph.set_submodule(node.target, MaxPool2d(*geometry))


def _turn_edges(graph: fx.GraphModule) -> None:
    """What sparse convolutions are given by anything else is turned to ``[N, C, H, W]``, once for all of them."""

    def sparse(node: fx.Node) -> bool:
        return isinstance(_module(graph, node), (SparseModule, FusedConv2d, Shortcut))

    for node in list(graph.graph.nodes):
        users = [user for user in node.users if sparse(user)]
        if users and not sparse(node) and node.op != "get_attr":
            with graph.graph.inserting_after(node):
                turned = graph.graph.call_method("contiguous", (node,))
            for user in users:
                user.replace_input_with(node, turned)
    graph.recompile()


def _keep_lanes(graph: fx.GraphModule) -> None:
    """What only sparse convolutions read stays in lanes from one to the next, where tensor cores compute them."""
    count = _calls_of(graph)
    for node in graph.graph.nodes:
        conv = _module(graph, node)
        if _plain(conv, (SparseConv2d,)) and count[id(conv)] == 1 and len(node.args) == 1:
            graph.set_submodule(node.target, FusedConv2d(conv))  # as the residual of another, perhaps
    fused = {node for node in graph.graph.nodes if isinstance(_module(graph, node), FusedConv2d)}
    for node in fused:
        once = _calls_of(graph)[id(_module(graph, node))] == 1
        _module(graph, node).lanes = once and bool(node.users) and fused.issuperset(node.users)
    graph.recompile()


def _on_tensor_cores(model: nn.Module) -> bool:
    sparse = [module for module in model.modules() if isinstance(module, SparseConv2d)]
    found = {(module.values.device, module.vector) for module in sparse}
    return any(ops.for_tensor_cores(on) and ops.takes_plans(on, torch.float16, vector) for on, vector in found)


def _fused(model: nn.Module, channels_last: bool, turn: bool, lanes: bool = False) -> nn.Module:
    """A copy with the graphs' epilogues and pools fused, and the convolutions left dense stored in a format."""
    model = copy.deepcopy(model)
    made = Choices(choices(model), seconds=choices(model).seconds)
    for name, piece in [(n, m) for n, m in model.named_modules() if isinstance(m, fx.GraphModule)]:
        replace_squeeze_excitations(piece, f"{name}." if name else "", made, _activation, _in_place)
        _fuse_epilogues(piece)
        _replace_pools(piece)
        replace_shortcuts(piece)
        if turn:
            _turn_edges(piece)
        if lanes:
            _keep_lanes(piece)
    for module in model.modules():
        if type(module) is SqueezeExcite:
            module.plain = False
        if type(module) is nn.Conv2d:
            module.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    renamed = Choices(seconds=made.seconds)
    for name, choice in made.items():
        inside = isinstance(model.get_submodule(name), FusedConv2d)
        renamed[f"{name}.conv" if inside else name] = choice
    keep_choices(model, renamed)
    return model


def _fastest(converted: nn.Module, example_inputs: object) -> nn.Module:
    """The network as converted or fused, whichever is faster; fused in each of several layouts."""
    networks = {"converted": converted, "lines": _fused(converted, False, False)}
    if any(type(module) is nn.Conv2d for module in converted.modules()):
        networks["channels_last"] = _fused(converted, True, False)
        if any(isinstance(module, SparseConv2d) for module in converted.modules()):
            networks["turned"] = _fused(converted, True, True)
    if any(isinstance(module, SparseConv2d) for module in converted.modules()):
        for name, groups in (("packed", False), ("grouped", True)):
            if (packed := packed_whole(converted, groups)) is not None:
                networks[name] = _fused(packed, False, False)
    if _on_tensor_cores(converted):
        networks["lanes"] = _fused(converted, False, False, lanes=True)
    for piece in [piece for network in networks.values() for piece in network.modules()]:
        if isinstance(piece, fx.GraphModule):
            run_in_sequence(piece)
    timed = dict(rounds=9, min_time=0.005, **timed_on(device_of(converted, example_inputs)))
    with torch.no_grad():
        expected = call(converted, cloned(example_inputs))
        for network in networks.values():
            check_near(expected, call(network, cloned(example_inputs)))
        engines = {name: partial(call, network, example_inputs) for name, network in networks.items()}
        timings = compare(engines, warmup=2, **timed)
        network = networks[min(timings, key=lambda name: timings[name].min)]
        if in_strips(network):
            # Strips are chosen by a model of costs; here is what they are worth.
            engines = {"strips": network, "images": copy.deepcopy(network)}
            leave_strips(engines["images"])
            calls = {name: partial(call, engine, example_inputs) for name, engine in engines.items()}
            timings = compare(calls, warmup=3, **timed)
            network = engines[min(timings, key=lambda name: timings[name].min)]
    return network

"""The calls of a traced network that a sequence (``sequence.py``) can make, and what has to stay as it is for that."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import fx, nn

from .modules import FusedConv2d, MaxPool2d, Shortcut, SparseConv2d, SparseLinear, SqueezeExcite

if TYPE_CHECKING:
    from .sequence import Program

Shapes = dict[fx.Node, torch.Size | None]  # of contiguous float32 tensors on the CPU; None for all else

# What is set on layers of ours that are no convolutions.
SETTINGS = {
    MaxPool2d: ("kernel_size", "stride", "padding"),
    Shortcut: ("stride", "new_channels"),
    SqueezeExcite: ("activation", "gate", "plain"),
}


def expect(places: tuple[list, list, list], dictionary: dict, key: object, value: object) -> None:
    for column, entry in zip(places, (dictionary, key, value), strict=True):
        column.append(entry)


def step_of(network: fx.GraphModule, node: fx.Node, shapes: Shapes) -> Step | None:
    """How a sequence makes a node's call; None if it can't."""
    if any(shapes.get(arg) is None for arg in node.all_input_nodes) or shapes.get(node) is None or node.kwargs:
        return None
    module = network.get_submodule(node.target) if node.op == "call_module" else None
    return _own(node, module, shapes) or _of_torch(node, module, shapes)


class Step:
    """One call.

    Attributes:
        convolves: whether it is a sparse convolution's.
    """

    convolves = False

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def add(self, sequence: torch.ScriptObject, places: dict[fx.Node, int]) -> int:
        """The place of its result."""
        raise NotImplementedError

    def expect(self, program: Program) -> None:
        """Tells the program what it has to find as it is now."""


# Layers of ours, which tell when something is set on them or hooked to them.
def _own(node: fx.Node, module: nn.Module | None, shapes: Shapes) -> Step | None:
    kind = type(module)
    if any(not isinstance(arg, fx.Node) for arg in node.args) or len(node.args) not in (1, 2):
        return None
    if kind in SETTINGS:
        return _Setting(node, module) if len(node.args) == 1 and not getattr(module, "plain", False) else None
    conv = module._modules.get("conv") if kind is FusedConv2d else module
    if type(conv) is not SparseConv2d or conv.channels_last or (conv is module and len(node.args) != 1):
        return None
    key = (shapes[node.args[0]], module.activation if kind is FusedConv2d else "none")
    remembered = conv._plans is not None and key in conv._plans.bound
    if not remembered or (len(node.args) == 2 and shapes[node.args[1]] != shapes[node]):
        return None
    return _Convolution(node, module, conv, key)


class _Own(Step):
    def __init__(self, node: fx.Node, module: nn.Module) -> None:
        super().__init__(node)
        self.module = module

    def expect(self, program: Program) -> None:
        self._expect_plain(program, self.module)

    @staticmethod
    def _expect_plain(program: Program, module: nn.Module) -> None:
        program.hooks += [module._forward_hooks, module._forward_pre_hooks]
        expect(program.watched, module.__dict__, "forward", None)


class _Setting(_Own):
    def add(self, sequence: torch.ScriptObject, places: dict[fx.Node, int]) -> int:
        input = places[self.node.args[0]]
        if type(self.module) is SqueezeExcite:
            own = [self.module._parameters[name] for name in SqueezeExcite.PARAMETERS]
            return sequence.squeeze_excite(input, *own, self.module.activation, self.module.gate)
        step = sequence.max_pool2d if type(self.module) is MaxPool2d else sequence.shortcut
        return step(input, *(list(getattr(self.module, name)) for name in SETTINGS[type(self.module)]))

    def expect(self, program: Program) -> None:
        super().expect(program)
        for name in SETTINGS[type(self.module)]:
            expect(program.watched, self.module.__dict__, name, getattr(self.module, name))
        for name, parameter in self.module._parameters.items():
            expect(program.always, self.module._parameters, name, parameter)


class _Convolution(_Own):
    convolves = True

    def __init__(self, node: fx.Node, module: nn.Module, conv: SparseConv2d, key: tuple) -> None:
        super().__init__(node, module)
        self.conv, self.plans, self.key = conv, conv._plans, key

    def add(self, sequence: torch.ScriptObject, places: dict[fx.Node, int]) -> int:
        input, *residual = (places[arg] for arg in self.node.args)
        own = self.conv._parameters  # has no bias where there is none
        bound = self.plans.bound[self.key]
        return sequence.conv2d(bound, own["values"], own.get("bias"), input, *residual or (None,))

    def expect(self, program: Program) -> None:
        super().expect(program)
        watched = partial(expect, program.watched)
        for name in ("values", "bias"):
            expect(program.always, self.conv._parameters, name, self.conv._parameters.get(name))
        watched(self.conv.__dict__, "_plans", self.plans)
        watched(self.plans.bound, self.key, self.plans.bound[self.key])
        if self.module is not self.conv:
            self._expect_plain(program, self.conv)
            watched(self.module._modules, "conv", self.conv)
            watched(self.module.__dict__, "activation", self.module.activation)


# What follows the convolutions: torch's own, and linear layers.
def _of_torch(node: fx.Node, module: nn.Module | None, shapes: Shapes) -> Step | None:
    if not node.args or node.all_input_nodes != [node.args[0]]:
        return None
    arguments, maps = node.args[1:], len(shapes[node.args[0]]) == 4
    if node.op == "call_function":
        averages = node.target is F.adaptive_avg_pool2d and maps and arguments in ((1,), ((1, 1),))
        flattens = node.target is torch.flatten and arguments == (1,)
        return _Plain(node, "average_pool") if averages else _Plain(node, "flatten") if flattens else None
    if arguments:
        return None
    if type(module) is nn.AdaptiveAvgPool2d and maps and module.output_size in (1, (1, 1)):
        return _Plain(node, "average_pool", module, ("output_size",))
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return _Plain(node, "flatten", module, ("start_dim", "end_dim"))
    if type(module) is nn.Linear:
        return _Linear(node, "dense_linear", module, ("weight", "bias"))
    if type(module) is SparseLinear and len(shapes[node.args[0]]) == 2:
        chosen = module._shapes and module._shapes.made.get((shapes[node.args[0]], torch.float32, "cpu"))
        sparse = module._shapes is None or (chosen is not None and chosen.kernel != "dense")
        names = ("values", "crow_indices", "col_indices", "row_indices", "bias")
        return _Linear(node, "linear", module, names, ("out_features",)) if sparse else None
    return None


class _Plain(Step):
    """A method of the sequence with the attributes of a module that it takes, which nothing tells the change of."""

    def __init__(self, node: fx.Node, method: str, module: nn.Module | None = None, settings: tuple = ()) -> None:
        super().__init__(node)
        self.method, self.module, self.settings = method, module, settings

    def add(self, sequence: torch.ScriptObject, places: dict[fx.Node, int]) -> int:
        return getattr(sequence, self.method)(places[self.node.args[0]])

    def expect(self, program: Program) -> None:
        if self.module is None:
            return
        program.unwatched_hooks += [self.module._forward_hooks, self.module._forward_pre_hooks]
        for name in (*self.settings, "forward"):
            holder = next((d for d in self._holders() if name in d), self.module.__dict__)
            expect(program.always, holder, name, holder.get(name))

    def _holders(self) -> tuple[dict, dict, dict]:
        return self.module._parameters, self.module._buffers, self.module.__dict__


class _Linear(_Plain):
    def __init__(self, node: fx.Node, method: str, module: nn.Module, tensors: tuple, numbers: tuple = ()) -> None:
        super().__init__(node, method, module, (*tensors, *numbers))

    def add(self, sequence: torch.ScriptObject, places: dict[fx.Node, int]) -> int:
        own = [getattr(self.module, name) for name in self.settings]
        return getattr(sequence, self.method)(places[self.node.args[0]], *own)

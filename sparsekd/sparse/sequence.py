"""Runs of a fused network's layers without Python between them (csrc/planned_sequence.h says what that gains).

A traced network is kept as it is. Beside it, for each size of its inputs, lies a program: the same graph with every run
of layers whose calls are remembered (``modules/plans.py``) as one call. It is taken as long as it would do what the
network's own code does: as long as no layer was replaced, set to something else or hooked.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode

from ..measure.tuned import mode
from . import ops  # noqa: F401  (registers the class)
from .modules.plans import changes
from .steps import Step, expect, step_of

MOST_PROGRAMS = 4  # of a network, for as many sizes of its inputs


def run_in_sequence(network: fx.GraphModule) -> None:
    """Lets a traced network run its remembered layers in sequences, from the third forward of a size on."""
    _install(network)
    if hasattr(network, "_register_deepcopy_hook"):  # copies compile their graph anew, which loses this
        network._register_deepcopy_hook(_install)


def _install(network: fx.GraphModule) -> None:
    kind = type(network)  # each graph has a class of its own
    own, programs = kind.forward, Programs()
    kind.programs = programs

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling() or kwargs or not programs.fit(args):
            return own(self, *args, **kwargs)
        return programs.run(self, own, args)

    kind.forward = forward


def runs_in_sequence(module: nn.Module) -> bool:
    return hasattr(type(module), "programs")


def in_strips(model: nn.Module) -> bool:
    """Whether activations stay in strips between layers of any of the traced networks in a model."""
    return any(programs.in_strips for programs in _programs(model))


def leave_strips(model: nn.Module) -> None:
    """Has all activations in images from now on."""
    for programs in _programs(model):
        programs.start("never")


def _programs(model: nn.Module) -> list[Programs]:
    return [type(piece).programs for piece in model.modules() if runs_in_sequence(piece)]


class Unfit(Exception):
    """A program met what it was not made for."""


class Programs:
    """The programs of one network, by sizes of its inputs."""

    def __init__(self) -> None:
        self.start("auto")
        self.hooks = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)

    def start(self, strips: str) -> None:
        """Forgets all programs; ``strips`` as PlannedSequence.output takes it."""
        self.strips, self.in_strips = strips, False
        self.by_size: dict[tuple, Program | None] = {}
        self.tried: dict[tuple, int] = {}  # changes when a program was made last, or -1

    def fit(self, args: tuple) -> bool:
        """Whether remembered calls may be taken at all."""
        if _get_current_function_mode() is not None or torch._C._len_torch_dispatch_stack():
            return False  # a mode is to see every operator
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch._C._get_tracing_state() is not None:
            return False
        tensors = all(type(arg) is Tensor and arg.dtype == torch.float32 and arg.device.type == "cpu" for arg in args)
        return tensors and not any(self.hooks)

    def run(self, network: fx.GraphModule, own: Callable, args: tuple) -> object:
        size = tuple(arg.shape for arg in args)
        program = self.by_size.get(size)
        if program is not None and program.holds():
            try:
                return program.run(*args)
            except Unfit:
                pass
        if size not in self.tried:
            if len(self.tried) < MOST_PROGRAMS:
                self.tried[size] = -1  # layers remember their calls of this size from now on
        elif self.tried[size] != changes[0]:
            self.tried[size] = changes[0]
            shapes = _Shapes(network)
            output = shapes.run(*args)
            self.by_size[size] = Program.of(network, shapes.of, self)
            return output
        return own(network, *args)


class Program:
    """What a network does with inputs of one size, as long as certain dictionaries hold certain things.

    Parameters, modules of others and layers of torch are looked at each time, as nothing tells of their change; what is
    set on or hooked to layers of ours only when something was (``Watched``).
    """

    def __init__(self, graph: fx.GraphModule | None) -> None:
        self.run = graph
        self.always: tuple[list, list, list] = ([], [], [])  # dictionaries, keys, values
        self.watched: tuple[list, list, list] = ([], [], [])
        self.hooks: list[dict] = []
        self.unwatched_hooks: list[dict] = []
        self.changes = -1

    def holds(self) -> bool:
        now = changes[0]
        if now != self.changes:
            if any(self.hooks) or not _hold(self.watched):
                return False
            self.changes = now
        return not any(self.unwatched_hooks) and _hold(self.always)

    @staticmethod
    def of(network: fx.GraphModule, shapes: dict[fx.Node, torch.Size | None], programs: Programs) -> Program | None:
        """None where no layer's call is remembered."""
        steps = {node: step for node in network.graph.nodes if (step := step_of(network, node, shapes)) is not None}
        runs = _runs(network.graph, steps)
        if not runs:
            return None
        program = Program(None)
        program.run = _with_runs(network, steps, runs, programs)
        paths: set[tuple[int, str]] = set()
        for node in network.graph.nodes:
            if node.op == "call_module":
                _expect_path(program, network, node.target, paths)
            elif node.op == "get_attr":  # of which the program has what lay there when it was made
                *path, name = node.target.split(".")
                owner = _expect_path(program, network, ".".join(path), paths)
                for dictionary in (owner._parameters, owner._buffers, owner.__dict__):
                    expect(program.always, dictionary, name, dictionary.get(name))
        for run in runs:
            for node in run:
                steps[node].expect(program)
        return program


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shapes of its tensors."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.of: dict[fx.Node, torch.Size | None] = {}

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        plain = type(result) is Tensor and result.dtype == torch.float32 and result.device.type == "cpu"
        self.of[node] = result.shape if plain and result.is_contiguous() else None
        return result


def _hold(places: tuple[list, list, list]) -> bool:
    dictionaries, keys, values = places
    return all(map(is_, map(dict.get, dictionaries, keys), values))


def _expect_path(program: Program, root: nn.Module, path: str, known: set[tuple[int, str]]) -> nn.Module:
    module = root
    for name in filter(None, path.split(".")):
        child = module._modules.get(name)
        if (id(module), name) not in known:
            known.add((id(module), name))
            expect(program.always, module._modules, name, child)
        module = child
    return module


def _runs(graph: fx.Graph, steps: dict[fx.Node, Step]) -> list[list[fx.Node]]:
    """Steps of the graph that follow each other."""
    runs: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node in steps:
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) > 1 and any(steps[node].convolves for node in run)]


def _with_runs(
    network: fx.GraphModule, steps: dict[fx.Node, Step], runs: list[list[fx.Node]], programs: Programs
) -> fx.GraphModule:
    """The graph with each run as one call; its other layers are the network's own."""
    firsts = {run[0]: run for run in runs}
    inside = {node for run in runs for node in run}
    graph, copied = fx.Graph(), {}
    for node in network.graph.nodes:
        if node in firsts:
            run = firsts[node]
            within = set(run)
            inputs = list(dict.fromkeys(arg for step in run for arg in step.all_input_nodes if arg not in within))
            outputs = [step for step in run if not within.issuperset(step.users)]
            sequence = _sequence(run, steps, inputs, outputs, programs)
            called = graph.call_function(sequence, tuple(copied[arg] for arg in inputs))
            for i, output in enumerate(outputs):
                copied[output] = graph.call_function(_item, (called, i))
        elif node not in inside:
            copied[node] = graph.node_copy(node, lambda arg: copied[arg])
    return fx.GraphModule(network, graph)


def _item(results: list[Tensor], i: int) -> Tensor:
    return results[i]


def _sequence(
    run: list[fx.Node],
    steps: dict[fx.Node, Step],
    inputs: list[fx.Node],
    outputs: list[fx.Node],
    programs: Programs,
) -> Callable[..., list[Tensor]]:
    sequence = torch.classes.sparsekd.PlannedSequence(len(inputs))
    places = {node: i for i, node in enumerate(inputs)}
    for node in run:
        places[node] = steps[node].add(sequence, places)
    sequence.output([places[node] for node in outputs], programs.strips, mode() != "off")
    programs.in_strips = programs.in_strips or bool(sequence.in_strips())
    start = sequence.run

    def run_layers(*activations: Tensor) -> list[Tensor]:
        results = start(list(activations))
        if results is None:
            raise Unfit
        return results

    return run_layers

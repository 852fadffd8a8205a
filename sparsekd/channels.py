"""Whole channels taken out of a network, and channels put in another order, through all layers that they pass.

Which layers share their channels is told by the dependency graph of Torch-Pruning (Fang et al., "DepGraph: towards any
structural pruning", CVPR 2023; ``pip install torch-pruning``), which also does the cutting.

    conv1 [8, 3]   bn1 [8]   conv2 [16, 8]          channel 5 of conv1 goes:  conv1 [7, 3]   bn1 [7]   conv2 [16, 7]
    conv2 and the shortcut that is added to it      a channel goes where it goes in both
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .pruning.budget import check_sparsity
from .pruning.layers import CONVOLUTIONS, PRUNABLE, Ignored, find_prunable
from .pruning.patterns import Layout, lowest
from .pruning.permutation import Permutation
from .sparse.dispatch import evaluating
from .sparse.surgery import call, copied

PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.PReLU)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """A layer that has the channels of a group, and where."""

    module: nn.Module
    produces: bool  # as its output channels
    channels: Tensor  # int64 [n], the group's channel ...
    positions: Tensor  # int64 [n], ... that lies at this index of the module (several for one behind a flatten)


class Graph:
    """The channels that layers of a model share.

    Raises:
        ValueError: Torch-Pruning is not installed, or can't trace the model.
    """

    def __init__(self, model: nn.Module, example_inputs: object) -> None:
        try:
            import torch_pruning
        except ImportError as error:
            raise ValueError(
                f"Expected the package torch-pruning (pip install torch-pruning), got none: {error}"
            ) from None
        self._tp = torch_pruning
        modes = {module: module.training for module in model.modules()}
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        example = example_inputs if isinstance(example_inputs, (tuple, list, dict)) else (example_inputs,)
        try:
            for parameter in frozen:  # autograd's graph is what is traced
                parameter.requires_grad_(True)
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                self._graph = torch_pruning.DependencyGraph().build_dependency(model, example, verbose=False)
        except Exception as error:  # a tracer of any model raises anything
            raise ValueError(f"Expected a model that Torch-Pruning can trace, got: {_first_line(error)}") from error
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for module, mode in modes.items():
                module.training = mode

    def sharing(self, layer: nn.Module) -> list[Member] | None:
        """All that has the output channels of a layer; None where something among it is not a layer of known kind, or
        where the graph does not know whose channel is whose (as behind a concatenation that is flattened)."""
        if layer not in self._graph.module2node:
            return None
        pruner = self._graph.get_pruner_of_module(layer)
        channels = pruner.get_out_channels(layer)
        found = []
        for item in self._graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(channels))):
            module, produces = item.dep.target.module, self._graph.is_out_channel_pruning_fn(item.dep.handler)
            if type(module).__module__ == self._tp.ops.__name__:
                if getattr(module, "offsets", ()) is None:
                    return None  # a concatenation or split whose parts it could not tell
                continue  # an operation, which has no parameters
            if not isinstance(module, (*PRUNABLE, *PER_CHANNEL)) or _grouped(module):
                return None
            found.append(Member(module, produces, torch.tensor(item.root_idxs), torch.tensor(item.idxs)))
        return found

    def remove(self, layer: nn.Module, channels: list[int]) -> None:
        """Takes output channels of a layer out of all that has them."""
        pruner = self._graph.get_pruner_of_module(layer)
        self._graph.get_pruning_group(layer, pruner.prune_out_channels, channels).prune(record_history=False)


def remove_channels(
    model: nn.Module,
    example_inputs: object,
    sparsity: float | None = None,
    scores: Mapping[str, Tensor] | None = None,
    ignored_layers: Ignored = "first_last",
    round_to: int = 1,
) -> nn.Module:
    """A copy of the model without the channels that are pruned: smaller and dense, for every device and engine.

    Without ``sparsity`` those go whose filters are zero in each layer that produces them, as a Pruner with
    ``pattern="filter"`` leaves them; what else such a channel was, a bias or the shift of a batch-norm, goes too, which
    a model notices unless that is zero: retrain it, or ``recalibrate_batch_norm``. With ``sparsity`` the channels of
    the lowest scores go, whatever they are.

    Args:
        example_inputs: a tensor, or a tuple of positional, or a dict of named arguments of the forward.
        sparsity: fraction of the channels of each layer to remove, in [0, 1).
        scores: parameter name to scores of the weight's shape (:func:`sparsekd.gather_importance`); by default |w|. A
            channel has the mean over its filter, layers whose outputs are added those of all of them together.
        ignored_layers: as in :class:`sparsekd.Pruner`; these keep their output channels.
        round_to: how many channels remain is a multiple of this, or all of them.

    Returns:
        A model of the same class with new Parameters: make its optimizer anew. Save it whole, or its state_dict with
        the way to build it.

    Raises:
        TypeError, ValueError: arguments out of range; scores without a prunable layer; a model that can't be traced, or
            whose output would change its shape (name its last layers in ``ignored_layers``).
    """
    _check(model)
    if sparsity is not None:
        sparsity = check_sparsity(sparsity)
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"Expected round_to to be a whole number from 1 on, got {round_to!r}")
    layers = find_prunable(model, ignored_layers)
    smaller = copied(model)
    modules, names = dict(smaller.named_modules()), {module: name for name, module in smaller.named_modules()}
    chosen = {modules[name.rpartition(".")[0]]: name for name in layers}
    values = _channel_scores(chosen, scores, sparsity)
    with evaluating(smaller):
        before = _shapes(call(smaller, example_inputs))
    graph, seen, plans = Graph(smaller, example_inputs), set(), []
    for layer in chosen:
        if layer in seen or _depthwise(layer):
            continue
        members = graph.sharing(layer)
        producers = [
            m for m in members or () if m.produces and isinstance(m.module, PRUNABLE) and not _depthwise(m.module)
        ]
        seen.update(member.module for member in producers)
        if not producers or any(member.module not in chosen for member in producers):
            continue
        together = torch.zeros(int(max(member.channels.max() for member in producers)) + 1, dtype=torch.float64)
        for member in producers:
            together.index_add_(0, member.channels, values[member.module][member.positions])
        gone = together == 0 if sparsity is None else lowest(together, round(sparsity * len(together)))
        if sparsity is None:
            lost = [int((values[member.module] == 0).sum()) for member in producers]
            for member, count in zip(producers, lost, strict=True):
                if count > int(gone.sum()):
                    said = names[member.module], count - int(gone.sum())
                    _log.info("%s: %d pruned channels stay, as they are added to others that are not", *said)
        indices = _rounded(together, gone, round_to)
        if indices:
            plans.append((layer, indices))
    for layer, indices in plans:
        graph.remove(layer, indices)
    for name, parameter in model.named_parameters():
        smaller.get_parameter(name).requires_grad_(parameter.requires_grad)  # Torch-Pruning makes new ones
    try:
        with evaluating(smaller):
            after = _shapes(call(smaller, example_inputs))
    except RuntimeError as error:
        raise ValueError(f"Expected a model that Torch-Pruning cuts right, got: {_first_line(error)}") from error
    if after != before:
        raise ValueError(
            f"Expected outputs of shape {before} without the channels too, got {after}: name the layers that make them "
            "in ignored_layers"
        )
    return smaller


def fold_permutations(
    model: nn.Module, example_inputs: object, permutations: Mapping[str, Permutation | Tensor]
) -> nn.Module:
    """A copy of the model with output channels in the order of their groups, and all that reads them in that order too.

    After pruning with ``pattern="4x1-permuted"`` the channels of a group then are neighbours, the model computes what
    it did, and no order is stored. Where the graph does not allow it (the outputs of the model, slices, channels that a
    group norm or a grouped convolution reads, ...) a layer stays as it is: :func:`sparsekd.convert` finds the groups
    and keeps their order in the packed weight.

    Args:
        permutations: parameter name to the grouping, ``pruner.permutations``, or an order int64 ``[K]``.

    Raises:
        TypeError, ValueError: a name that is no prunable weight, an order that is none of its channels; a model that
            can't be traced.
    """
    _check(model)
    known, orders = find_prunable(model, ()), {}
    for name, given in permutations.items():
        order = given.order if isinstance(given, Permutation) else given
        if name not in known:
            raise ValueError(f"Expected permutations of weights of convolutions and linear layers, got one of {name}")
        channels = _output_channels(known[name])
        if not isinstance(order, Tensor) or not torch.equal(order.cpu().sort().values, torch.arange(channels)):
            raise ValueError(f"Expected an order of the {channels} output channels of {name}, got another")
        orders[name.rpartition(".")[0]] = order.cpu()
    folded = copied(model)
    graph, modules = Graph(folded, example_inputs), dict(folded.named_modules())
    with evaluating(folded):
        want = call(folded, example_inputs)
    moved: set[nn.Module] = set()
    for name, order in orders.items():
        if modules[name] in moved:
            _log.info("%s: its order is kept in the packed weight, as its channels are added to others", name)
            continue
        members = graph.sharing(modules[name])
        whole = all(len(member.channels.unique()) == len(order) for member in members or ())
        if members is None or not whole or all(member.produces for member in members):
            _log.info("%s: its order is kept in the packed weight", name)
            continue
        before = {member.module: _state(member.module) for member in members}
        try:
            _reorder(members, order)
            with evaluating(folded):
                same = _close(call(folded, example_inputs), want)
        except (RuntimeError, IndexError):
            same = False
        if not same:  # channels that are mixed on a way the graph does not show
            for module, state in before.items():
                _restore(module, state)
            _log.info("%s: its order is kept in the packed weight", name)
            continue
        moved.update(member.module for member in members if member.produces)
    return folded


# --- parts -----------------------------------------------------------------------------------------------------------


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected model to be a torch.nn.Module, got {type(model).__name__}")


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels == module.out_channels > 1


def _grouped(module: nn.Module) -> bool:
    """Whether the place of a channel says which others it meets."""
    return isinstance(module, CONVOLUTIONS) and module.groups > 1 and not _depthwise(module)


def _width(module: nn.Module, produces: bool) -> int | None:
    """How many channels a module has on that side; None where it does not say."""
    if isinstance(module, nn.Linear):
        return module.out_features if produces else module.in_features
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels if produces else module.in_channels
    return getattr(module, "num_features", None)


def _output_channels(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _channel_scores(
    chosen: Mapping[nn.Module, str], scores: Mapping[str, Tensor] | None, sparsity: float | None
) -> dict[nn.Module, Tensor]:
    """Per layer float64 [K]: the mean score of each filter; where zeros are asked for, how many weights are none."""
    if scores is not None and sparsity is None:
        raise ValueError("Expected a sparsity with scores, got none")
    found = {}
    for layer, name in chosen.items():
        weight = layer.weight.detach()
        own = (weight != 0).double() if sparsity is None else weight.abs()
        if scores is not None:
            if name not in scores or scores[name].shape != weight.shape:
                got = tuple(scores[name].shape) if name in scores else "none"
                raise ValueError(f"Expected scores of shape {tuple(weight.shape)} for {name}, got {got}")
            own = scores[name]
        found[layer] = Layout.of(layer).rows(own.double().cpu()).flatten(1).mean(1)
    return found


def _rounded(together: Tensor, gone: Tensor, round_to: int) -> list[int]:
    """The channels that go: fewer than are marked, so that the rest is a multiple of ``round_to``, and at least one."""
    keep = len(gone) - int(gone.sum())
    keep = min(max(-(-keep // round_to) * round_to, 1), len(gone))
    marked = together.masked_fill(~gone, torch.inf)
    return marked.argsort(stable=True)[: len(gone) - keep].sort().values.tolist()


def _shapes(output: object) -> object:
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, Mapping):
        return {key: _shapes(value) for key, value in output.items()}
    return [_shapes(value) for value in output] if isinstance(output, (tuple, list)) else None


def _close(got: object, want: object) -> bool:
    """Within rounding: sums over channels are taken in another order."""
    if isinstance(want, Tensor):
        if not want.is_floating_point():
            return torch.equal(got, want)
        error = (got.double() - want.double()).abs().max() if want.numel() else torch.zeros(())
        return bool(error <= 100 * torch.finfo(want.dtype).eps * want.double().abs().max()) if want.numel() else True
    if isinstance(want, Mapping):
        return all(_close(got[key], value) for key, value in want.items())
    if isinstance(want, (tuple, list)):
        return all(_close(one, other) for one, other in zip(got, want, strict=True))
    return True


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@torch.no_grad()
def _restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, value in module.state_dict().items():
        value.copy_(state[name])


@torch.no_grad()
def _reorder(members: list[Member], order: Tensor) -> None:
    """The channel at place j becomes what was at place order[j], in every member."""
    for member in members:
        source = _sources(member, order)
        module = member.module
        if isinstance(module, PRUNABLE) and not _depthwise(module):
            transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
            module.weight.copy_(module.weight.index_select(int(member.produces == transposed), source))
            if member.produces and module.bias is not None:
                module.bias.copy_(module.bias[source])
        else:
            for value in module.state_dict().values():
                if value.dim() and value.shape[0] == len(source):
                    value.copy_(value[source])


def _sources(member: Member, order: Tensor) -> Tensor:
    """For each index of the member's channel dimension the index whose content comes there."""
    size = _width(member.module, member.produces) or int(member.positions.max()) + 1
    source = torch.arange(size)
    places: dict[int, list[int]] = {}
    for channel, position in sorted(zip(member.channels.tolist(), member.positions.tolist(), strict=True)):
        places.setdefault(channel, []).append(position)
    for channel, positions in places.items():
        source[torch.tensor(positions)] = torch.tensor(places[int(order[channel])])
    return source


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""Whether a saved state is one of a Pruner: looked at whole before anything is taken from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor, nn

from .budget import check_sparsity
from .layers import check_count, check_keys, check_like
from .patterns import Layout
from .permutation import Permutation


def check_state(
    state: object,
    settings: Mapping[str, object],
    weights: Mapping[str, nn.Parameter],
    layouts: Mapping[str, Layout],
    model_state: Mapping[str, Tensor],
    last: int,
) -> dict[str, Permutation]:
    """The permutations in ``state``; TypeError or ValueError unless it is of a Pruner with these settings and weights.

    Args:
        model_state: the model's own state_dict, which a snapshot has to be like.
        last: the step from which on a Pruner is finished.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"Expected state to be a dict of Pruner.state_dict(), got {type(state).__name__}")
    parts = ("settings", "masks", "steps", "finished", "gathered", "layers", "permutations", "regrown", "snapshot")
    check_keys("a Pruner's state", state, parts)
    check_keys("settings", state["settings"], settings)
    for key, own in settings.items():
        if state["settings"][key] != own:
            raise ValueError(f"Expected the state of a Pruner with {key}={own!r}, got {state['settings'][key]!r}")
    check_keys("masks", state["masks"], weights)
    for name, weight in weights.items():
        check_like(f"the mask of {name}", state["masks"][name], weight, (torch.bool,))
    check_count("steps", state["steps"])
    check_count("regrown", state["regrown"])
    if state["layers"] is not None:
        check_keys("layers", state["layers"], weights)
        for name, sparsity in state["layers"].items():
            check_sparsity(sparsity, f"the sparsity of {name}")
    check_keys("permutations", state["permutations"], weights if state["permutations"] else ())
    permutations = {}
    for name, made in state["permutations"].items():
        check_keys(f"the permutation of {name}", made, [field.name for field in fields(Permutation)])
        order = made["order"]
        channels = layouts[name].rows(torch.empty(weights[name].shape, device="meta")).shape[0]
        if not isinstance(order, Tensor) or not torch.equal(order.cpu().sort().values, torch.arange(channels)):
            raise ValueError(f"Expected an order of the {channels} output channels of {name}, got another")
        permutations[name] = Permutation(**made)
    if state["snapshot"] is not None:
        check_keys("the snapshot", state["snapshot"], model_state)
        for name, value in model_state.items():
            check_like(f"the snapshot of {name}", state["snapshot"][name], value, (value.dtype,))
    if not isinstance(state["finished"], bool):
        raise ValueError(f"Expected finished to be a bool, got {state['finished']!r}")
    if state["finished"] != (state["steps"] >= last):
        raise ValueError(f"Expected finished from step {last} on, got {state['finished']} at step {state['steps']}")
    return permutations

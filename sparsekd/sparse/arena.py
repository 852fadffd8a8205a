"""Memory of a network's activations that is used again in its next forward (csrc/arena.h says why and how).

Only ``torch.nn.Module.__call__`` is touched, by two hooks of the root: the thread that runs a forward takes large CPU
tensors from the network's arena. Results may be kept as long as one likes; their memory goes back when they end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from . import ops  # noqa: F401  (registers the class)


class Arena:
    """The hooks of one network. A copy, of a network too, has an arena of its own; pickles hold no memory."""

    def __init__(self) -> None:
        self.memory = torch.classes.sparsekd.Arena()

    def enter(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self.memory.enter()

    def leave(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self.memory.leave()

    def idle(self) -> int:
        """Bytes that wait for the next forward."""
        return self.memory.idle()

    def __reduce__(self) -> tuple:
        return (Arena, ())


def reuse_memory(model: nn.Module) -> Arena:
    """Lets the forwards of a network take its activations of 1 MiB or more from one arena; returns it."""
    hooks = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    arena = next((owner for owner in hooks if isinstance(owner, Arena)), None)
    if arena is None:
        arena = _hooked(model)
        # Deep copies of a graph lose the hooks of its root. Where torch can't tell of copies, they go without.
        if isinstance(model, fx.GraphModule) and hasattr(model, "_register_deepcopy_hook"):
            model._register_deepcopy_hook(_hooked)
    return arena


def hooked_by_others(module: nn.Module) -> bool:
    """Whether a module has forward hooks besides those of an arena."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return not all(isinstance(getattr(hook, "__self__", None), Arena) for hook in hooks)


def _hooked(model: nn.Module) -> Arena:
    arena = Arena()
    model.register_forward_pre_hook(arena.enter)
    model.register_forward_hook(arena.leave, always_call=True)
    return arena


def reuses(run: Callable[[], object]) -> bool:
    """Whether ``run()``, a forward, gives back memory that an arena would keep."""
    arena = Arena()
    arena.enter()
    try:
        run()
    finally:
        arena.leave()
    return arena.idle() > 0

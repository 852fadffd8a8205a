"""What a module was called with and gave, and whether another gives the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .problem import rounding_of


def record_calls(module: nn.Module, run: Callable[[], object]) -> list[tuple[tuple, dict, object]]:
    """Arguments and results of each call of the module, as they were before anything changed them in place."""
    given, calls = [], []

    def before(_, args, kwargs):
        given.append(cloned((args, kwargs)))

    def after(_, args, kwargs, output):
        calls.append((*given.pop(), cloned(output)))

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def cloned(value: object) -> object:
    """The same with tensors of its own, for who changes its input in place."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def check_calls(piece: nn.Module, calls: list[tuple[tuple, dict, object]]) -> None:
    with torch.no_grad():
        for args, kwargs, output in calls:
            check_near(output, piece(*args, **kwargs))


def check_near(expected: object, got: object) -> None:
    """Raises unless results are the same up to rounding, and infinite or no numbers in the same places."""
    for one, other in zip(_tensors(expected), _tensors(got), strict=True):
        if one.shape != other.shape:
            raise RuntimeError(f"Expected a result of shape {tuple(one.shape)}, got {tuple(other.shape)}")
        if one.is_floating_point() and one.numel():
            finite = one.isfinite()
            same = finite | (one == other) | (one.isnan() & other.isnan())
            if not same.all():
                raise RuntimeError("Expected infinite results and NaN where the original has them, got others")
            scale, error = float(one.where(finite, 0).abs().max()), float((one - other).where(finite, 0).abs().max())
            # Rounding differs from layer to layer, of a half type by its last bits; a wrong graph would be off by the
            # size of the result.
            rounding = max(1e-3, 8 * rounding_of(one))
            if not error <= rounding * scale + 1e-6:
                raise RuntimeError(f"Expected the results of the original, got {error:.3g} off (largest {scale:.3g})")


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]

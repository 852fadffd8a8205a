"""What models answer with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def logits_of(output: object, whose: str = "model") -> Tensor:
    """The logits in a model's output: a tensor, its ``.logits``, or the first element of a tuple or list."""
    found = output
    if not isinstance(found, Tensor):
        found = getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if not isinstance(found, Tensor):
        raise TypeError(
            f"Expected the {whose} to give logits (a tensor, an object with .logits or a tuple that starts with them), "
            f"got {type(output).__name__}"
        )
    return found

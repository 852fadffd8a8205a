"""What models, and modules within them, answer with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def logits_of(output: object, whose: str = "model") -> Tensor:
    """The logits in a model's output: a tensor, its ``.logits``, a dict's, or the first element of a tuple or list."""
    found = output
    if not isinstance(found, Tensor):
        found = getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if not isinstance(found, Tensor):
        raise TypeError(
            f"Expected the {whose} to give logits (a tensor, an object or dict with logits or a tuple that starts with "
            f"them), got {type(output).__name__}"
        )
    return found


def feature_of(output: object) -> Tensor | None:
    """The tensor in what an inner module gives: itself, the first of a tuple or list, or the ``last_hidden_state`` or
    ``logits`` of a dict or object. None where there is none."""
    found = [output]
    if isinstance(output, Mapping):
        found = [output.get(name) for name in ("last_hidden_state", "logits")]
    elif isinstance(output, (tuple, list)):
        found = output[:1]
    elif not isinstance(output, Tensor):
        found = [getattr(output, name, None) for name in ("last_hidden_state", "logits")]
    return next((one for one in found if isinstance(one, Tensor)), None)

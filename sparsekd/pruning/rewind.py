"""The state of a model that training goes back to after each cut (``IterativeSL``'s ``rewind_step``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .mask_keeper import MaskKeeper


class Rewind:
    """Keeps the state of one step and goes back to it; the masks stay.

    Args:
        at: the step, 0 for the state of now.
    """

    def __init__(self, model: nn.Module, keeper: MaskKeeper, at: int) -> None:
        self._model, self._keeper, self._at = model, keeper, at
        self._state: dict[str, Tensor] | None = None
        if at == 0:
            self._keep()

    @torch.no_grad()
    def after(self, step: int, cut: bool, last: bool) -> None:
        """To be called after each step."""
        if cut and self._state is not None:
            state = self._model.state_dict()
            for name, value in self._state.items():
                state[name].copy_(value)
            self._keeper.drop_state(self._model.parameters())
            self._keeper.hold()
        if step == self._at:
            self._keep()
        if last:
            self._state = None

    def state_dict(self) -> dict[str, Tensor] | None:
        return None if self._state is None else dict(self._state)

    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        self._state = None if state is None else {name: value.clone() for name, value in state.items()}

    def _keep(self) -> None:
        self._state = {name: value.detach().clone() for name, value in self._model.state_dict().items()}

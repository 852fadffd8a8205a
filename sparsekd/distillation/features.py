"""Hints: the student's feature maps drawn towards the teacher's.

    mean over the pairs of  mean (adapter(student feature) - teacher feature)^2

An adapter (1 x 1 convolution, or a linear map for ``[N, C]`` features) is trained beside the student where channels
differ; where only the spatial size differs, the teacher's map is average-pooled. After Romero et al., "FitNets: hints for
thin deep nets", ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn


class FeatureHints(nn.Module):
    """Hooks on pairs ``{student path: teacher path}``; its parameters are the adapters', made at the first batch.

    Raises:
        ValueError: a path that names no module.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, pairs: Mapping[str, str]) -> None:
        super().__init__()
        self.pairs = dict(pairs)
        self.adapters = nn.ModuleDict()
        self._seen: dict[tuple[str, str], Tensor] = {}
        self._handles: list = []
        for whose, model, paths in (("student", student, self.pairs), ("teacher", teacher, self.pairs.values())):
            for path in paths:
                try:
                    module = model.get_submodule(path)
                except AttributeError:
                    self.close()
                    raise ValueError(f"Expected {path!r} to be a module of the {whose}, got none of that name") from None
                self._handles.append(module.register_forward_hook(self._keeper(whose, path)))

    def _keeper(self, whose: str, path: str):
        def keep(module, args, output):
            if not isinstance(output, Tensor):
                raise TypeError(f"Expected {path!r} of the {whose} to give a tensor, got {type(output).__name__}")
            self._seen[whose, path] = output

        return keep

    def forward(self) -> Tensor:
        """The loss of the features that the last forward of both models left."""
        losses = []
        for path, taught in self.pairs.items():
            if ("student", path) not in self._seen or ("teacher", taught) not in self._seen:
                raise RuntimeError(f"Expected {path!r} and {taught!r} to run in the forward, got one that did not")
            own, target = self._seen["student", path], self._seen["teacher", taught].detach()
            if own.dim() != target.dim() or own.dim() not in (2, 4):
                raise ValueError(
                    "Expected features [N, C] or [N, C, H, W] of the same kind, "
                    f"got {tuple(own.shape)} of {path!r} and {tuple(target.shape)} of {taught!r}"
                )
            key = path.replace(".", "/")
            if key not in self.adapters:
                self.adapters[key] = self._adapter(own, target)
            if own.dim() == 4 and own.shape[2:] != target.shape[2:]:
                target = F.adaptive_avg_pool2d(target, own.shape[2:])
            losses.append(F.mse_loss(self.adapters[key](own), target))
        self._seen.clear()
        return sum(losses) / len(losses)

    @staticmethod
    def _adapter(own: Tensor, target: Tensor) -> nn.Module:
        if own.shape[1] == target.shape[1]:
            return nn.Identity()
        made = nn.Linear if own.dim() == 2 else lambda i, o: nn.Conv2d(i, o, 1)
        return made(own.shape[1], target.shape[1]).to(own)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Makes the adapters of a saved ``adapters.state_dict()`` again."""
        for key, weight in state.items():
            name, _, last = key.rpartition(".")
            if last == "weight":
                own, target = (weight.new_zeros((0, size) + (1,) * (weight.dim() - 2)) for size in (weight.shape[1], weight.shape[0]))
                self.adapters[name] = self._adapter(own, target)
        self.adapters.load_state_dict(state)

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen.clear()

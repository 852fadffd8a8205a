"""Feature hints: inner outputs of the student drawn towards those of the teacher.

    loss = mean over pairs of  mean (adapter(student feature) - teacher feature)^2

    student feature [N, C_s, H_s, W_s] -> pool to the smaller H, W -> adapter C_s -> C_t --+
    teacher feature [N, C_t, H_t, W_t] -> pool to the smaller H, W -----------------------+-> mean squared error

After Romero et al., "FitNets: hints for thin deep nets", ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init


class FeatureHints:
    """The loss between features of two networks, taken by forward hooks while it is entered as a context manager.

    Args:
        student, teacher: the networks.
        pairs: ``{student path: teacher path}``, dotted paths as in ``named_modules()``. Outputs are tensors of one
            shape, or ``[N, C, H, W]`` or ``[N, C]`` of differing channels and sizes. A module that runs several times
            in a forward gives its last output.

    Where channels differ an adapter (1 x 1 convolution or linear layer, with bias) is made when the first batch shows
    them; ``adapters`` holds those, to be trained with the student and thrown away afterwards.

    Raises:
        ValueError: no pairs, or a path that names no module.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, pairs: Mapping[str, str]) -> None:
        if not isinstance(pairs, Mapping):
            raise TypeError(
                f"Expected features as a dict from student paths to teacher paths, got {type(pairs).__name__}"
            )
        if not pairs:
            raise ValueError("Expected features to name at least one pair of modules, got none")
        self.pairs = dict(pairs)
        self.adapters = nn.ModuleDict()  # by the number of the pair: paths hold dots, which keys may not
        self._student = student
        self._modules = [
            (_submodule(student, "student", own), _submodule(teacher, "teacher", taught))
            for own, taught in self.pairs.items()
        ]
        self._seen: dict[tuple[str, int], Tensor] = {}
        self._handles: list = []

    def __enter__(self) -> FeatureHints:
        for index, ((own, taught), names) in enumerate(zip(self._modules, self.pairs.items(), strict=True)):
            self._handles.append(own.register_forward_hook(self._keeper("student", index, names[0])))
            self._handles.append(taught.register_forward_hook(self._keeper("teacher", index, names[1])))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def _keeper(self, whose: str, index: int, path: str):
        def keep(module: nn.Module, args: object, output: object) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(f"Expected {path!r} of the {whose} to give a tensor, got {type(output).__name__}")
            # A copy: what follows may change the output in place, as ReLU(inplace=True) does.
            self._seen[whose, index] = output.clone()

        return keep

    def loss(self) -> Tensor:
        """The loss of the features that both networks' last forwards left, a scalar; it may be taken once per forward.

        Raises:
            RuntimeError: a module that didn't run. ValueError: features that can't be compared.
        """
        terms = []
        for index, (own_path, taught_path) in enumerate(self.pairs.items()):
            for whose, path in (("student", own_path), ("teacher", taught_path)):
                if (whose, index) not in self._seen:
                    raise RuntimeError(f"Expected {path!r} of the {whose} to run in its forward, got no output of it")
            own, taught = self._seen["student", index], self._seen["teacher", index].detach()
            if own.shape != taught.shape:
                own, taught = self._matched(str(index), own, taught, f"{own_path!r} and {taught_path!r}")
            terms.append(F.mse_loss(own, taught.to(own.dtype)))
        self._seen.clear()
        return sum(terms[1:], start=terms[0]) / len(terms)

    def _matched(self, key: str, own: Tensor, taught: Tensor, named: str) -> tuple[Tensor, Tensor]:
        if own.dim() != taught.dim() or own.dim() not in (2, 4) or own.shape[0] != taught.shape[0]:
            raise ValueError(
                f"Expected features of one shape, or both [N, C] or [N, C, H, W], at {named}, "
                f"got {tuple(own.shape)} and {tuple(taught.shape)}"
            )
        if own.shape[2:] != taught.shape[2:]:
            # To the smaller of both, never up: pooling up would only repeat values.
            size = [min(a, b) for a, b in zip(own.shape[2:], taught.shape[2:], strict=True)]
            own, taught = F.adaptive_avg_pool2d(own, size), F.adaptive_avg_pool2d(taught, size)
        if own.shape[1] != taught.shape[1]:
            if key not in self.adapters:
                channels, like = (own.shape[1], taught.shape[1]), {"device": own.device, "dtype": own.dtype}
                self.adapters[key] = nn.Linear(*channels, **like) if own.dim() == 2 else nn.Conv2d(*channels, 1, **like)
            own = self.adapters[key](own)
        return own, taught

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the adapters made so far."""
        return self.adapters.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.adapters.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Makes the adapters that the state holds, and no others."""
        made, device = nn.ModuleDict(), next((p.device for p in self._student.parameters()), None)
        for name, weight in state.items():
            key, _, kind = name.partition(".")
            if kind != "weight":
                continue
            out_channels, in_channels = weight.shape[:2]
            # Not initialised, so that resuming draws no random numbers.
            like = {"device": device, "dtype": weight.dtype}
            if weight.dim() == 2:
                made[key] = skip_init(nn.Linear, in_channels, out_channels, **like)
            else:
                made[key] = skip_init(nn.Conv2d, in_channels, out_channels, 1, **like)
        made.load_state_dict(state)
        self.adapters = made


def _submodule(model: nn.Module, whose: str, path: object) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    if path not in modules:
        last = str(path).rpartition(".")[2]
        near = [name for name in modules if name and name.rpartition(".")[2] == last] or [n for n in modules if n]
        raise ValueError(
            f"Expected features to name modules of the {whose}, such as {', '.join(near[:5]) or 'none (it has none)'}, "
            f"got {path!r}"
        )
    return modules[path]

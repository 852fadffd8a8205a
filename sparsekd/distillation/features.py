"""Feature hints: inner outputs of the student drawn towards those of the teacher.

    loss = mean over pairs of  mean (adapter(student feature) - teacher feature)^2      ("fitnet")
                               or another of ``feature_losses.py``, without an adapter

    student feature [N, C_s, H_s, W_s] -> pool to the smaller H, W -> adapter C_s -> C_t --+
    teacher feature [N, C_t, H_t, W_t] -> pool to the smaller H, W -----------------------+-> mean squared error

After Romero et al., "FitNets: hints for thin deep nets", ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from .feature_losses import FEATURE_LOSSES
from .outputs import feature_of


class FeatureHints:
    """The loss between features of two networks, taken by forward hooks while it is entered as a context manager.

    Args:
        student, teacher: the networks.
        pairs: ``{student path: teacher path}``, dotted paths as in ``named_modules()``. Outputs are tensors, tuples
            that start with one, or dicts or objects with ``last_hidden_state`` or ``logits``. A module that runs
            several times in a forward gives its last output.
        loss: of a pair, one of :data:`FEATURE_LOSSES` or a callable ``(student feature, teacher feature) -> scalar``.
            Both features are float32 at least, under autocast too; the teacher's takes no gradient.

    For "fitnet" features are of one shape, or ``[N, C, H, W]`` or ``[N, C]`` of differing channels and sizes: the
    larger map is pooled to the smaller, and where channels differ an adapter (1 x 1 convolution or linear layer, with
    bias) is made when the first batch shows them; ``adapters`` holds those, to be trained with the student and thrown
    away afterwards. "at" pools too. Other losses take features as they are.

    Raises:
        ValueError: no pairs, a path that names no module, or an unknown loss. TypeError: arguments of another kind.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Mapping[str, str],
        loss: str | Callable[[Tensor, Tensor], Tensor] = "fitnet",
    ) -> None:
        if not isinstance(pairs, Mapping):
            raise TypeError(
                f"Expected features as a dict from student paths to teacher paths, got {type(pairs).__name__}"
            )
        if not pairs:
            raise ValueError("Expected features to name at least one pair of modules, got none")
        if isinstance(loss, str) and loss not in FEATURE_LOSSES:
            raise ValueError(f"Expected a feature loss out of {', '.join(FEATURE_LOSSES)} or a callable, got {loss!r}")
        if not isinstance(loss, str) and not callable(loss):
            raise TypeError(f"Expected a feature loss as a name or a callable, got {type(loss).__name__}")
        self.pairs, self._named = dict(pairs), loss if isinstance(loss, str) else None
        self._of = FEATURE_LOSSES[loss] if isinstance(loss, str) else loss
        self.name = self._named or getattr(loss, "__name__", type(loss).__name__)
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
            feature = feature_of(output)
            if feature is None:
                raise TypeError(
                    f"Expected {path!r} of the {whose} to give a tensor, or a tuple or dict with one, "
                    f"got {type(output).__name__}"
                )
            # A copy: what follows may change the output in place, as ReLU(inplace=True) does.
            self._seen[whose, index] = feature.clone()

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
            # Not in the half type of an autocast forward: adapters are trained in this one.
            own = own.to(torch.float64 if own.dtype == torch.float64 else torch.float32)
            taught = taught.to(own.dtype)
            if own.shape != taught.shape and self._named in ("fitnet", "at"):
                own, taught = self._matched(str(index), own, taught, f"{own_path!r} and {taught_path!r}")
            terms.append(self._of(own, taught))
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
        if own.shape[1] != taught.shape[1] and self._named == "fitnet":
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

"""What an importance is given: means over batches of a statistic of gradients, or of the inputs of layers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layers import check_count, check_keys, check_like
from .sharding import is_distributed, is_sharded, local, whole_of_part

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# What is gathered of a batch, of a weight w and its gradient g; "x^2" is of a layer's inputs, see InputGatherer.
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "|g|": lambda w, g: g.abs(),
    "|w g|": lambda w, g: (w * g).abs(),
    "w g": lambda w, g: w * g,
    "g^2": lambda w, g: g.square(),
}


class GradientGatherer:
    """Means over batches of |dL/dw| or another statistic, taken by hooks when autograd has accumulated a gradient.

    A batch is what accumulates between two calls of :meth:`take_in`. The hook copies the gradient as accumulated so far
    and a later backward overwrites the copy, so it does not matter how often backward runs for one optimiser step, nor
    what becomes of ``.grad`` afterwards (clipping, unscaling, ``zero_grad``).

    Args:
        weights: parameter name to parameter. Of one that FSDP2 shards, this rank's part is gathered.
        statistic: of :data:`STATISTICS`.
        scaler: a GradScaler, by whose scale the gradients of each batch are divided.

    Raises:
        RuntimeError: a parameter is frozen, so that it will never have a gradient.
    """

    gathered = "a gradient of each weight"
    of_parts = True  # of a sharded weight this rank's part is gathered, else the whole

    def __init__(self, weights: Mapping[str, nn.Parameter], statistic: str = "|g|", scaler: object = None) -> None:
        frozen = [name for name, weight in weights.items() if not weight.requires_grad]
        if frozen:
            raise RuntimeError(
                f"Expected gradients of each weight to be pruned, got requires_grad=False for {', '.join(frozen)}: "
                "name these in ignored_layers or take another importance"
            )
        self._of, self._scaler = STATISTICS[statistic], scaler
        self._begin(weights)

    def _begin(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.weights = dict(weights)
        self.pending: dict[str, Tensor] = {}  # the statistic of the batch under way
        self.skipped = 0  # batches left out for non-finite gradients
        self._handles: list = []
        self.forget()

    def forget(self) -> None:
        """Starts a new mean."""
        self.sums: dict[str, Tensor] = {}
        self.seen = dict.fromkeys(self.weights, 0)  # batches in which a weight had a gradient
        self.batches = self._overflowed = 0

    def attach(self) -> None:
        """Sets the hooks, if they are not set."""
        if not self._handles:
            for name, weight in self.weights.items():
                self._handles.append(weight.register_post_accumulate_grad_hook(_hook(weakref.ref(self), name)))

    def take(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Called by the hooks."""
        weight, gradient = local(weight.detach()), local(gradient.detach())
        if self._scaler is not None and self._scaler.is_enabled():
            gradient = gradient.float() / self._scaler.get_scale()
        self.pending[name] = self._of(weight, gradient)

    def detach(self) -> None:
        """Removes the hooks and frees what was gathered."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.pending = [], {}
        self.forget()

    @torch.no_grad()
    def take_in(self) -> None:
        """Adds the batch under way to the means, unless one of its gradients is not finite."""
        pending, self.pending = self.pending, {}
        if not pending:
            return
        device = next(iter(pending.values())).device
        # The greatest of all: NaN and infinity survive a maximum, and the device is waited for once. A part of a
        # sharded weight may be empty.
        ends = [end.to(device, torch.float64).abs() for v in pending.values() if v.numel() for end in v.aminmax()]
        greatest = torch.stack(ends).amax() if ends else torch.zeros(())
        if not bool(greatest.isfinite()):
            self.skipped += 1
            self._overflowed += 1
            if self.skipped == 1:
                warnings.warn(
                    "Expected finite gradients, got a batch with non-finite ones: such batches are left out of the "
                    "importance (this is said once)",
                    stacklevel=3,
                )
            return
        self.batches += 1
        for name, value in pending.items():
            self.seen[name] += 1
            if name in self.sums:
                self.sums[name] += value.to(self.sums[name].device)
            else:
                # Sums in half precision would stop growing after a few hundred batches.
                self.sums[name] = value.to(torch.float64 if value.dtype == torch.float64 else torch.float32, copy=True)

    def only_overflows(self) -> bool:
        """Whether the means are empty because all batches, on all ranks, were left out: the next may be finite."""
        counts = torch.tensor([self.batches, self._overflowed])
        if is_distributed():
            counts = counts.to(local(next(iter(self.weights.values()))).device)
            dist.all_reduce(counts)
        return int(counts[0]) == 0 < int(counts[1])

    def means(self) -> dict[str, Tensor]:
        """Parameter name to the mean of the statistic over the batches, of all ranks under torch.distributed.

        A batch in which a weight had no part counts as a gradient of zero.

        Raises:
            RuntimeError: a parameter had a gradient in no batch, on no rank. It names the parameters.
        """
        sums, seen, batches = self.sums, self.seen, self.batches
        if is_distributed():
            sums, seen, batches = self._all_reduced()
        missing = [name for name, count in seen.items() if count == 0]
        if missing:
            left_out = f" ({self.skipped} batches with non-finite gradients were left out)" if self.skipped else ""
            raise RuntimeError(f"Expected {self.gathered} to be pruned, got none for {', '.join(missing)}{left_out}")
        means = {name: sums[name].to(local(weight).device) / batches for name, weight in self.weights.items()}
        if not self.of_parts:
            return means
        return {name: whole_of_part(mean, self.weights[name]) for name, mean in means.items()}

    def _like(self, weight: Tensor) -> Tensor:
        """Of the shape of what is gathered for a weight."""
        return local(weight) if self.of_parts else weight

    def _all_reduced(self) -> tuple[dict[str, Tensor], dict[str, int], int]:
        device = local(next(iter(self.weights.values()))).device
        counts = torch.tensor([self.batches, *self.seen.values()], device=device)
        dist.all_reduce(counts)
        batches, *seen = counts.tolist()
        sums = {}
        for name, weight in self.weights.items():
            # A rank without a gradient takes part all the same: the others wait for it.
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            own = self.sums.get(name)
            sums[name] = torch.zeros(self._like(weight).shape, dtype=dtype, device=local(weight).device)
            if own is not None:
                sums[name].copy_(own)
            if self.of_parts and is_sharded(weight):
                # FSDP has averaged this gradient over the ranks; each has its own part of it.
                sums[name] *= dist.get_world_size()
            else:
                dist.all_reduce(sums[name])
        return sums, dict(zip(self.weights, seen, strict=True)), batches

    def state_dict(self) -> dict:
        return {
            "sums": {name: value.clone() for name, value in self.sums.items()},
            "pending": {name: value.clone() for name, value in self.pending.items()},
            "seen": dict(self.seen),
            "batches": self.batches,
            "skipped": self.skipped,
        }

    def check_state(self, state: object) -> None:
        """ValueError unless :meth:`load_state_dict` can take the state."""
        check_keys("gathered", state, ("sums", "pending", "seen", "batches", "skipped"))
        check_keys("gathered seen", state["seen"], self.weights)
        for part in ("sums", "pending"):
            # A weight may have no part in what was gathered so far, but no stranger may.
            got = state[part]
            got = {**dict.fromkeys(self.weights), **got} if isinstance(got, Mapping) else got
            check_keys(f"gathered {part}", got, self.weights)
            for name, value in state[part].items():
                check_like(f"the gathered {part} of {name}", value, self._like(self.weights[name]), FLOATS)
        for name, count in {"batches": state["batches"], "skipped": state["skipped"], **state["seen"]}.items():
            check_count(f"gathered {name}", count)
        for name, count in state["seen"].items():
            if count > state["batches"] or (count > 0) != (name in state["sums"]):
                raise ValueError(f"Expected gathered sums that fit the batches seen, got others for {name}")

    def load_state_dict(self, state: Mapping) -> None:
        for part in ("sums", "pending"):
            copies = {n: value.to(local(self.weights[n]).device, copy=True) for n, value in state[part].items()}
            setattr(self, part, copies)
        self.seen = dict(state["seen"])
        self.batches, self.skipped = state["batches"], state["skipped"]


def _hook(gatherer: weakref.ref, name: str) -> Callable[[Tensor], None]:
    # A weak reference: the model must not keep the gatherer, and with it every weight, alive.
    def take(parameter: Tensor) -> None:
        owner = gatherer()
        if owner is not None and parameter.grad is not None:
            owner.take(name, parameter, parameter.grad)

    return take


class InputGatherer(GradientGatherer):
    """Means over batches of the mean square of the inputs that each weight meets, taken by hooks of the forward.

    Forwards count in which the layer is in the mode (train or eval) that it has when the hooks are set, so that a
    validation on the way does not. Of a convolution the mean is over samples and output pixels, for each place of the
    kernel, zeros of the padding included; of a transposed one over all input pixels.

    Args:
        owners: parameter name to the layer that owns it.
    """

    gathered = "inputs of each layer"
    of_parts = False  # each rank has inputs of its own, to all of a sharded weight

    def __init__(self, owners: Mapping[str, nn.Module]) -> None:
        self._owners = dict(owners)
        self._modes: dict[str, bool] = {}
        self._counts: dict[str, int] = {}  # forwards of the batch under way
        self._begin({name: module.weight for name, module in owners.items()})

    def attach(self) -> None:
        if not self._handles:
            for name, module in self._owners.items():
                self._modes[name] = module.training
                self._handles.append(module.register_forward_pre_hook(_input_hook(weakref.ref(self), name)))

    @torch.no_grad()
    def see(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Called by the hooks."""
        if module.training != self._modes[name] or not isinstance(x, Tensor) or x.numel() == 0:
            return
        squares = mean_square_inputs(module, x.detach()).expand(module.weight.shape)
        count = self._counts.get(name, 0) if name in self.pending else 0
        before = self.pending.get(name, 0)
        self.pending[name] = (before * count + squares) / (count + 1)
        self._counts[name] = count + 1


def mean_square_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """The mean of x^2 over all that a layer multiplies by each weight, broadcastable to the weight."""
    squares = x.float().square() if x.dtype != torch.float64 else x.square()
    if isinstance(module, nn.Linear):
        return squares.flatten(0, -2).mean(0) if squares.dim() > 1 else squares
    spatial = module.weight.dim() - 2
    if squares.dim() == spatial + 1:
        squares = squares[None]
    if module.transposed:
        return squares.transpose(0, 1).flatten(1).mean(1).view(-1, *[1] * (spatial + 1))
    # The gradient of the sum of outputs with respect to one filter of ones per group.
    shape = (module.groups, *module.weight.shape[1:])
    with torch.enable_grad():
        ones = torch.ones(shape, dtype=squares.dtype, device=squares.device, requires_grad=True)
        out = module._conv_forward(squares, ones, None)
        (sums,) = torch.autograd.grad(out.sum(), ones)
    rows = sums / (out.numel() / module.groups)
    return rows.repeat_interleave(module.weight.shape[0] // module.groups, 0)


def _input_hook(gatherer: weakref.ref, name: str) -> Callable:
    def see(module: nn.Module, args: tuple) -> None:
        owner = gatherer()
        if owner is not None and args:
            owner.see(name, module, args[0])

    return see

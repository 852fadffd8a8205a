"""SparseConv2d: its plans, its memory format, and weights of pattern 2:4."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from .. import ops
from ..formats_24 import TwoOfFour
from .convolution import SparseConv
from .plain import check_plain
from .plans import LayerPlans, Size, Watched
from .two_of_four import Plan24, filled_mask, plan_24


class SparseConv2d(Watched, SparseConv):
    """2-d convolution with sparse weights and dense activations.

    Constructor, attributes and behaviour are those of :class:`torch.nn.Conv2d`. Usually made by :meth:`from_dense`; a
    module made directly keeps every weight until a mask or a checkpoint says otherwise.

    Args:
        mask: bool ``[out_channels, in_channels / groups, R, S]``, True = keep; None keeps all weights.
        vector: V output channels share their columns (1: unstructured).

    Input ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``; float32, float64 (half types are computed in float32).
    The output has the memory format that ``nn.Conv2d`` would give. Errors as in :func:`sparsekd.sparse.ops.conv2d`.
    """

    _kind = nn.Conv2d
    _plans: LayerPlans | None = None
    frozen = False  # see `freeze`
    pattern: str | None = None  # "2:4": computed by `ops.conv2d_24`
    _plan_24: Plan24 | None = None

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        mask: Tensor | None = None,
        vector: int | str = 1,
        permute: bool | Tensor = False,
        pattern: str | None = None,
    ) -> SparseConv2d:
        """Packs ``conv``; the original is left as it is.

        Args:
            conv: the plain module.
            mask: bool, the weight's shape, True = keep (the kept weights may be 0). None takes the weight's zeros; a
                vector is then kept when any of its weights is non-zero.
            vector: V, or "auto": the largest V whose groups of consecutive output channels share their columns. Output
                channels need not be a multiple of V.
            permute: True groups equal output channels that are not neighbours; or the permutation to use.
            pattern: None, or "2:4", for sparse tensor cores (see :func:`sparsekd.sparse.ops.conv2d_24`): two of each
                four input channels are kept, of which a group has a multiple of 16. It is for float16 and bfloat16 on
                CUDA, best in channels_last; elsewhere it takes as long as the dense layer. Where the weight's zeros
                are taken and a four has more than two, zeros are kept as well. ``vector`` is then 1.

        Raises:
            TypeError: not torch's module, one with another forward, a complex weight, or a mask that is not bool.
            ValueError: a mask of another shape, or one that does not fit V or the pattern; a lazy module that has seen
                no input; an unknown pattern.
        """
        if pattern is None:
            return super().from_dense(conv, mask, vector, permute)
        if pattern != "2:4":
            raise ValueError(f'Expected pattern to be None or "2:4", got {pattern!r}')
        if vector not in (1, "auto") or permute is not False:
            raise ValueError(f'Expected pattern="2:4" with vector=1 and permute=False, got {vector!r} and {permute!r}')
        check_plain(conv, nn.Conv2d, "forward", "_conv_forward")
        module = super().from_dense(conv, filled_mask(conv.weight, mask, conv.groups))
        module.pattern = pattern
        module._plan_24 = module._planned_24(*module._indices())
        return module

    def with_weights_of(self, dense: nn.Conv2d) -> SparseConv2d:
        """A copy with weights and bias of a plain module of the same sizes, whose other weights must be zero."""
        made = copy.deepcopy(self)
        made.values = nn.Parameter(self._gather(dense.weight.detach()), requires_grad=False)
        made.bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
        return made

    def _planned_24(self, crow: Tensor, col: Tensor, rows: Tensor | None) -> Plan24:
        return plan_24(crow, col, rows, self.weight_shape, self.groups)

    def _set_pattern(self, indices: tuple[Tensor | None, ...], copy: bool = False) -> None:
        super()._set_pattern(indices, copy)
        if self.pattern is not None:
            # A module that comes from meta has no pattern yet: the use of it would tell.
            with contextlib.suppress(ValueError):
                self._plan_24 = self._planned_24(*self._indices())

    def _check_pattern(self, values: Tensor, crow: Tensor, col: Tensor, rows: Tensor | None) -> None:
        super()._check_pattern(values, crow, col, rows)
        if self.pattern is not None:
            if values.shape[1] != 1:
                raise ValueError(f'Expected values [n, 1] of pattern "2:4", got {tuple(values.shape)}')
            self._planned_24(crow, col, rows)

    def packed_24(self) -> TwoOfFour:
        """Values and metadata as :func:`sparsekd.sparse.ops.conv2d_24` takes them; differentiable in ``values``."""
        if self._plan_24 is None or self._plan_24.col_indices is not self.col_indices:
            self._plan_24 = self._planned_24(*self._indices())
        return self._plan_24.packed(self.values)

    def _pattern_repr(self) -> str:
        return super()._pattern_repr() + ("" if self.pattern is None else f", pattern={self.pattern!r}")

    def _take(self, conv: nn.Conv2d, mask: Tensor | None, vector: int | str, permute: bool | Tensor) -> None:
        # nn.Conv2d answers in channels_last when its weight is so stored, even to an input that is not.
        self.channels_last = suggest_memory_format(conv.weight) == torch.channels_last
        super()._take(conv, mask, vector, permute)

    def to_dense(self) -> nn.Conv2d:
        dense = super().to_dense()
        return dense.to(memory_format=torch.channels_last) if self.channels_last else dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        super()._apply(fn, recurse)
        # `.to(memory_format=...)` changes tensors of 4 dimensions only, and the packed weight has 2. A side of 1 stays
        # 1: the format of some such weights is ambiguous, and then not taken for channels_last.
        stored = torch.channels_last if self.channels_last else torch.contiguous_format
        like = torch.empty([min(n, 2) for n in self.weight_shape], device=self.values.device).to(memory_format=stored)
        self.channels_last = suggest_memory_format(fn(like)) == torch.channels_last
        return self

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        # A remembered call may depend on it.
        if (plans := self.__dict__.get("_plans")) is not None:
            plans.forget_calls()

    def __getstate__(self) -> dict:
        # A copy may wake up on another device, which wants plans of its own.
        return {name: value for name, value in self.__dict__.items() if name != "_plans"}

    def freeze(self) -> None:
        """For inference alone, on the CPU: values are kept in the order in which they are read, too.

        Values that change in place are read again, as far as their version counter tells: a change through
        ``values.data`` is not seen.
        """
        self.frozen, self._plans = True, None

    def plan_for(self, input: Tensor, size: Size) -> ops.Plan | None:
        """What the kernels read in place of the pattern, made at the first inference of a size ``[N, C, H, W]``.

        None where they gain nothing by it, and in training, whose backward reads the pattern.
        """
        if torch.is_grad_enabled() or isinstance(self.padding, str) or self.pattern is not None:
            return None
        device = input.device
        lowered = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if lowered else input.dtype
        cores = ops.takes_core_plans(device, dtype, self.vector)
        if not cores and not ops.takes_plans(device, dtype, self.vector):
            return None
        if cores and self.padding_mode != "zeros":
            return None  # its input is of another size
        compiling, lanes = torch.compiler.is_compiling(), ops.for_tensor_cores(device) and not cores
        if not lanes and (compiling or type(self.col_indices) is not Tensor):
            return None  # such a plan is for one size, which a trace may not be
        plans = self._plans
        known = plans is not None and plans.pattern is self.col_indices
        if compiling:  # a compiler traces what is there
            return plans.last if known and plans.last is not None and plans.last.lanes else None
        if not known:
            plans = self._plans = LayerPlans(self.col_indices)
        return plans.plan(size, lambda: self._make_plan(size, not cores), lanes)

    def _make_plan(self, size: Size, tensor_cores: bool) -> ops.Plan | None:
        return ops.conv2d_plan(
            self.crow_indices,
            self.col_indices,
            vector=self.vector,
            input_size=size,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            ordered=self.frozen,
            tensor_cores=tensor_cores,
        )

    def again(self, input: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor | None:
        """``activation(self(input) + residual)`` by a call that is remembered; None where there is none for it."""
        if torch.compiler.is_compiling() or (plans := self._plans) is None or type(input) is not Tensor:
            return None
        if torch._C._get_tracing_state() is not None:  # torch.jit.trace's, which would not see the call
            return None
        call = plans.calls.get((input.shape, activation))
        # Of these, looked up past nn.Module's own way, others may be put in: by functional_call, say.
        own = self._parameters
        return None if call is None else call(input, own.get("values"), own.get("bias"), residual)

    def remember(self, input: Tensor, activation: str = "none") -> None:
        """To be called after a call with a plan that went the long way, for :meth:`again`."""
        own = self._parameters
        plain = own.get("values") is self.values and own.get("bias") is self.bias and type(input) is Tensor
        if plain and input.is_cpu and input.dim() == 4 and input.dtype == torch.float32:
            geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
            geometry = (self.out_channels, *map(list, geometry), self.groups)
            self._plans.remember(input.shape, activation, self.row_indices, geometry)

    def forward(self, input: Tensor) -> Tensor:
        output = self.again(input)
        if output is None:
            output = self._forward(input)
        if self.channels_last:
            # Not `contiguous()`, which leaves the strides of sides of 1 alone, by which torch tells the format later.
            batched = output if output.dim() == 4 else output.unsqueeze(0)
            batched = batched.to(memory_format=torch.channels_last)
            output = batched if output.dim() == 4 else batched.squeeze(0)
        return output

    def _forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        self._check_shape(input)
        if self.runs_dense(input):
            return self._shapes.dense(self)(input)
        plan = self.plan_for(input, (*(1,) * (4 - input.dim()), *input.shape))
        if plan is not None and self.padding_mode == "zeros":
            self.remember(input)
            if (output := self.again(input)) is not None:  # all inferences take the same way, and give the same bits
                return output
        input, padding = self._padded(input)
        geometry = {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": self.groups}
        geometry["kernel_size"] = self.kernel_size
        if self.pattern is not None:
            return ops.conv2d_24(input, *self.packed_24(), self.bias, **geometry)
        geometry |= {"out_channels": self.out_channels, "row_indices": self.row_indices}
        packed = (self.values, self.crow_indices, self.col_indices)
        if plan is not None:
            return ops.conv2d_fused(input, *packed, shift=self.bias, plan=plan, **geometry)
        return ops.conv2d(input, *packed, self.bias, transpose=self._plan(), **geometry)

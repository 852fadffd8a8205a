"""SparseConv2d and SparseLinear: sparse weights, dense activations, in the place of nn.Conv2d and nn.Linear.

A module owns ``values [n_vectors, V]`` as its Parameter and the pattern as int32 tensors (``formats.py``). Gradient,
optimiser state and update exist only at the non-zeros, so retraining costs the density and nothing revives a pruned
weight. ``state_dict()`` holds these tensors; loading also understands the plain module's keys (a dense ``weight``).

The pattern is no buffer, because buffers are averaged (``AveragedModel(use_buffers=True)``) and sent around at each
forward (DistributedDataParallel), which is right for statistics and ruins or wastes indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from . import formats, ops

PATTERN = ("crow_indices", "col_indices", "row_indices")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class SparseModule(nn.Module):
    """What SparseConv2d and SparseLinear share: the packed weight. Not made directly."""

    values: Tensor
    bias: Tensor | None
    crow_indices: Tensor
    col_indices: Tensor
    row_indices: Tensor | None
    transpose: Tensor | None  # the plan of `ops.transpose_pattern`, while training
    _planned: Tensor | None  # the col_indices that it is of
    groups: int

    # Subclasses say these two.
    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The dense weight's shape."""
        raise NotImplementedError

    _taps = 1  # columns per input channel

    def _adopt(self, dense: nn.Module, mask: Tensor | None, vector: int | str, permute: bool | Tensor) -> None:
        """Packs a plain module's weight and takes over its bias, mode and trainability."""
        weight, bias = dense.weight, dense.bias
        if weight.dtype not in DTYPES:
            raise TypeError(f"Expected a weight of dtype {', '.join(map(str, DTYPES))}, got {weight.dtype}")
        if weight.numel() == 0:
            raise ValueError(f"Expected a weight of at least one element, got shape {tuple(weight.shape)}")
        source = weight
        if weight.is_meta:
            if mask is None:
                raise ValueError("Expected a mask for a weight on meta, whose zeros are not known, got None")
            # A mask on the CPU gives the pattern without the weight's numbers.
            source = torch.zeros((), dtype=weight.dtype, device="cpu").expand(weight.shape)
        packed = formats.pack(source, mask, vector, self.groups, permute)
        self.values = nn.Parameter(packed.values.to(weight.device), requires_grad=weight.requires_grad)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self._set_pattern(packed[1:])
        self.train(dense.training)

    def _set_pattern(self, indices: tuple[Tensor | None, ...], copy: bool = False) -> None:
        # Tensors made in inference mode could not be saved for a later backward.
        with torch.inference_mode(False):
            for name, tensor in zip(PATTERN, indices, strict=True):
                if tensor is not None:
                    tensor = tensor.detach().to(self.values.device, copy=copy).contiguous()
                setattr(self, name, tensor)
        self.transpose = self._planned = None

    def _refresh_transpose(self) -> None:
        # Only training walks the transposed pattern; in eval mode the rare backward makes it on the fly.
        self.transpose, self._planned = None, self.col_indices
        if self.training and not self.values.is_meta:
            # `train()` is often called at the end of an evaluation in inference mode.
            with torch.inference_mode(False):
                self.transpose = self._transposed(self.vector, self.crow_indices, self.col_indices, self.row_indices)

    def _transposed(self, vector: int, crow: Tensor, col: Tensor, rows: Tensor | None) -> Tensor:
        return ops.transpose_pattern(
            crow,
            col,
            rows,
            vector=vector,
            out_channels=self.weight_shape[0],
            in_channels=self.weight_shape[1] * self.groups,
            taps=self._taps,
            groups=self.groups,
        )

    def train(self, mode: bool = True):
        super().train(mode)
        if mode != (self.transpose is not None):
            self._refresh_transpose()
        return self

    def _plan(self) -> Tensor | None:
        # Who sets `training` itself passes by `train()`. A compiler traces what is there.
        if self.training and self.transpose is None and not torch.compiler.is_compiling():
            self._refresh_transpose()
        # `functional_call` may have put another pattern in the place of the one that was planned.
        return self.transpose if self._planned is self.col_indices else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        super()._apply(fn, recurse)
        # The pattern follows the values, rather than be given to `fn`: `to_empty` would leave any numbers in it.
        before, device = self.crow_indices.device, self.values.device
        if before.type == "meta" and device.type != "meta":
            self._set_pattern(self._pattern_by_size())
        elif before != device:
            self._set_pattern(self._indices())
            self._refresh_transpose()
        return self

    def _pattern_by_size(self) -> tuple[Tensor, Tensor, None]:
        """The pattern of a module that was made on meta, of which only sizes are known."""
        columns, n_vectors = math.prod(self.weight_shape[1:]), self.values.shape[0]
        row_groups = self.crow_indices.shape[0] - 1
        if n_vectors == row_groups * columns:  # everything is kept
            crow = torch.arange(0, n_vectors + 1, columns, dtype=torch.int32, device="cpu")
            return crow, torch.arange(columns, dtype=torch.int32, device="cpu").repeat(row_groups), None
        # Zeros are no pattern, which every use will tell until a state dict brings one.
        return *(torch.zeros(t.shape, dtype=torch.int32, device="cpu") for t in self._indices()[:2]), None

    def reset_parameters(self) -> None:
        """New random values, as the plain module draws them; the pattern stays."""
        dense = torch.empty(self.weight_shape, dtype=self.values.dtype, device=self.values.device)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        with torch.no_grad():
            self.values.copy_(formats.gather(dense, *self._indices(), self.vector, self.groups))
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(self.weight_shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def vector(self) -> int:
        """V: output channels that share their columns."""
        return self.values.shape[1]

    @property
    def nnz(self) -> int:
        """Weights that are kept (padding of the last row groups left out)."""
        per_group = self.weight_shape[0] // self.groups
        vectors = self.crow_indices.diff().view(self.groups, -1)  # of each row group
        first = torch.arange(vectors.shape[1], device=vectors.device) * self.vector
        return int((vectors * (per_group - first).clamp(max=self.vector)).sum())

    @property
    def density(self) -> float:
        """nnz over the size of the dense weight, 0..1."""
        return self.nnz / math.prod(self.weight_shape)

    @property
    def sparsity(self) -> float:
        """Fraction of the dense weight that is removed, 0..1."""
        return 1.0 - self.density

    def _indices(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.crow_indices, self.col_indices, self.row_indices

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at each use; differentiable in ``values``, not to be assigned."""
        return formats.unpack(self.values, *self._indices(), self.weight_shape, self.groups)

    @property
    def mask(self) -> Tensor:
        """bool, the dense weight's shape, True = kept."""
        ones = torch.ones_like(self.values, requires_grad=False)
        return formats.unpack(ones, *self._indices(), self.weight_shape, self.groups) != 0

    def __setattr__(self, name: str, value: object) -> None:
        if name == "weight":
            # nn.Module would tell of a key, or of a property.
            raise AttributeError(
                "Expected weight to be read only (change `values`, or load a state dict), got a new one"
            )
        super().__setattr__(name, value)

    def _pattern_repr(self) -> str:
        known = "" if self.values.is_meta else f"sparsity={self.sparsity:.4g}, "
        return f"{known}vector={self.vector}"

    @staticmethod
    def _check_input(input: Tensor) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(f"Expected a torch.Tensor as input, got {type(input).__name__}")
        if input.layout != torch.strided:
            raise TypeError(f"Expected a dense input (torch.strided), got one of layout {input.layout}")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in zip(PATTERN, self._indices(), strict=True):
            if tensor is not None:
                # A copy, so that an average taken in place over a state dict does not round the indices down.
                destination[prefix + name] = tensor.clone()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Takes packed keys, of any pattern that fits the module, or the plain module's dense ``weight``."""
        state = dict(state_dict)
        indices = tuple(state.pop(prefix + name, None) for name in PATTERN)
        dense, values = state.pop(prefix + "weight", None), state.get(prefix + "values")
        whole = values is not None and indices[0] is not None and indices[1] is not None
        try:
            if dense is not None:
                # A plain checkpoint knows no pattern, which therefore stays.
                state[prefix + "values"] = self._gather(dense)
            elif whole:
                self._check_pattern(values, *indices)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            error_msgs.append(f"{prefix}{'values' if dense is None else 'weight'}: {str(error).splitlines()[0]}")
            return
        if dense is None and whole and values.shape != self.values.shape:
            with torch.inference_mode(False), torch.no_grad():
                self.values.data = self.values.new_empty(values.shape)
            self.values.grad = None
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if dense is None and whole:
            self._set_pattern(indices, copy=not local_metadata.get("assign_to_params_buffers", False))
        elif dense is None and strict:
            missing_keys += [
                prefix + name for name, tensor in zip(PATTERN[:2], indices, strict=False) if tensor is None
            ]
        self._refresh_transpose()

    def _gather(self, dense: Tensor) -> Tensor:
        """The values of a dense weight, which is zero outside the pattern."""
        if not isinstance(dense, Tensor):
            raise TypeError(f"Expected a torch.Tensor, got {type(dense).__name__}")
        if dense.shape != self.weight_shape:
            raise ValueError(f"Expected a dense weight of shape {self.weight_shape}, got {tuple(dense.shape)}")
        if dense.is_meta or self.values.is_meta:
            raise ValueError("Expected numbers of a dense weight and of the module's pattern, got tensors on meta")
        dense = dense.detach().to(self.values.device)
        outside = int(((dense != 0) & ~self.mask).sum())
        if outside:
            raise ValueError(
                f"Expected zeros outside the pattern ({self.nnz} kept), got {outside} non-zeros outside it"
            )
        return formats.gather(dense, *self._indices(), self.vector, self.groups)

    def _check_pattern(self, values: Tensor, crow: Tensor, col: Tensor, rows: Tensor | None) -> None:
        """Raises unless a checkpoint's tensors are a pattern of this module."""
        for tensor in (values, crow, col, *([] if rows is None else [rows])):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"Expected a torch.Tensor, got {type(tensor).__name__}")
        if values.dim() != 2 or col.dim() != 1 or values.shape[0] != col.shape[0]:
            raise ValueError(
                f"Expected values [n, V] and col_indices [n], got {tuple(values.shape)} and {tuple(col.shape)}"
            )
        if crow.is_meta or col.is_meta:
            return
        indices = [None if t is None else t.detach().cpu().contiguous() for t in (crow, col, rows)]
        self._transposed(values.shape[1], *indices)
        place = formats.flat_positions(*indices, values.shape[1], self.weight_shape, self.groups)[:, 0]
        twice = place.numel() - place.unique().numel()
        if twice:
            raise ValueError(f"Expected each column once in a row group, got {twice} repeated ones")


def _options(parameter: Tensor) -> dict:
    return {"device": parameter.device, "dtype": parameter.dtype}


def _keep_all(weight: Tensor) -> Tensor:
    # On the CPU for a weight on meta, as a mask from outside would be.
    return torch.ones(weight.shape, dtype=torch.bool, device="cpu" if weight.is_meta else weight.device)


def _check_plain(module: nn.Module, kind: type[nn.Module], *methods: str) -> None:
    """Raises unless ``module`` computes what ``kind`` computes and has its weight."""
    if not isinstance(module, kind):
        raise TypeError(f"Expected torch.nn.{kind.__name__}, got {type(module).__name__}")
    if any(getattr(type(module), method) is not getattr(kind, method) for method in methods):
        raise TypeError(
            f"Expected a module with the forward of torch.nn.{kind.__name__}, got {type(module).__name__} with another"
        )
    if isinstance(module.weight, nn.UninitializedParameter):
        raise ValueError(f"Expected {type(module).__name__} with its weight made, got one that has not seen an input")


class SparseConv2d(SparseModule):
    """2-d convolution with sparse weights and dense activations.

    Constructor, attributes and behaviour are those of :class:`torch.nn.Conv2d`. Usually made by :meth:`from_dense`; a
    module made directly keeps every weight until a mask or a checkpoint says otherwise.

    Args:
        mask: bool ``[out_channels, in_channels / groups, R, S]``, True = keep; None keeps all weights.
        vector: V output channels share their columns (1: unstructured).

    Input ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``; float32, float64 (half types are computed in float32).
    The output has the memory format that ``nn.Conv2d`` would give. Errors as in :func:`sparsekd.sparse.ops.conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        mask: Tensor | None = None,
        vector: int | str = 1,
    ) -> None:
        dense = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        super().__init__()
        self._take(dense, _keep_all(dense.weight) if mask is None else mask, vector, False)

    def _take(self, conv: nn.Conv2d, mask: Tensor | None, vector: int | str, permute: bool | Tensor) -> None:
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self.transposed, self.output_padding = False, (0, 0)
        # nn.Conv2d answers in channels_last when its weight is so stored, even to an input that is not.
        self.channels_last = suggest_memory_format(conv.weight) == torch.channels_last
        self._taps = self.kernel_size[0] * self.kernel_size[1]
        self._adopt(conv, mask, vector, permute)

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, mask: Tensor | None = None, vector: int | str = 1, permute: bool | Tensor = False
    ) -> SparseConv2d:
        """Packs ``conv``; the original is left as it is.

        Args:
            conv: the plain module.
            mask: bool, the weight's shape, True = keep (the kept weights may be 0). None takes the weight's zeros; a
                vector is then kept when any of its weights is non-zero.
            vector: V, or "auto": the largest V whose groups of consecutive output channels share their columns. Output
                channels need not be a multiple of V.
            permute: True groups equal output channels that are not neighbours; or the permutation to use.

        Raises:
            TypeError: not an ``nn.Conv2d``, one with another forward, a complex weight, or a mask that is not bool.
            ValueError: a mask of another shape, or one that does not fit V; a lazy module that has seen no input.
        """
        _check_plain(conv, nn.Conv2d, "forward", "_conv_forward")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._take(conv, mask, vector, permute)
        return module

    def to_dense(self) -> nn.Conv2d:
        """The plain module with the same weights (zeros where pruned), dtype, device and mode."""
        dense = nn.utils.skip_init(
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            **_options(self.values),
        )
        if self.channels_last:
            dense = dense.to(memory_format=torch.channels_last)
        return _copy_into(self, dense)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        super()._apply(fn, recurse)
        # `.to(memory_format=...)` changes tensors of 4 dimensions only, and the packed weight has 2. A side of 1 stays
        # 1: the format of some such weights is ambiguous, and then not taken for channels_last.
        stored = torch.channels_last if self.channels_last else torch.contiguous_format
        like = torch.empty([min(n, 2) for n in self.weight_shape], device=self.values.device).to(memory_format=stored)
        self.channels_last = suggest_memory_format(fn(like)) == torch.channels_last
        return self

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels:
            raise ValueError(
                f"Expected an input of shape [N, {self.in_channels}, H, W] or [{self.in_channels}, H, W], "
                f"got {list(input.shape)}"
            )
        padding = self.padding
        if self.padding_mode != "zeros":
            if padding == "same":
                sides = ops.same_padding(self.kernel_size, self.dilation)
            else:
                sides = [(0, 0), (0, 0)] if padding == "valid" else [(p, p) for p in padding]
            input = F.pad(input, (*sides[1], *sides[0]), mode=self.padding_mode)
            padding = (0, 0)
        output = ops.conv2d(
            input,
            self.values,
            self.crow_indices,
            self.col_indices,
            self.bias,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            row_indices=self.row_indices,
            transpose=self._plan(),
        )
        if self.channels_last:
            # Not `contiguous()`, which leaves the strides of sides of 1 alone, by which torch tells the format later.
            batched = output if output.dim() == 4 else output.unsqueeze(0)
            batched = batched.to(memory_format=torch.channels_last)
            output = batched if output.dim() == 4 else batched.squeeze(0)
        return output

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(self)}, {self._pattern_repr()}"


class SparseLinear(SparseModule):
    """Linear layer with sparse weights and dense activations; constructor and behaviour of :class:`torch.nn.Linear`.

    Args:
        mask: bool ``[out_features, in_features]``, True = keep; None keeps all weights.
        vector: V output features share their columns (1: unstructured).

    Input ``[..., in_features]``; dtypes and errors as in :func:`sparsekd.sparse.ops.linear`.
    """

    groups = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        mask: Tensor | None = None,
        vector: int | str = 1,
    ) -> None:
        dense = nn.Linear(in_features, out_features, bias, device, dtype)
        super().__init__()
        self._take(dense, _keep_all(dense.weight) if mask is None else mask, vector, False)

    def _take(self, linear: nn.Linear, mask: Tensor | None, vector: int | str, permute: bool | Tensor) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._adopt(linear, mask, vector, permute)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, mask: Tensor | None = None, vector: int | str = 1, permute: bool | Tensor = False
    ) -> SparseLinear:
        """Packs ``linear``; arguments and errors as in :meth:`SparseConv2d.from_dense`."""
        _check_plain(linear, nn.Linear, "forward")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._take(linear, mask, vector, permute)
        return module

    def to_dense(self) -> nn.Linear:
        """The plain module with the same weights (zeros where pruned), dtype, device and mode."""
        bias = self.bias is not None
        dense = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias, **_options(self.values))
        return _copy_into(self, dense)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(f"Expected an input of shape [..., {self.in_features}], got {list(input.shape)}")
        return ops.linear(
            input,
            self.values,
            self.crow_indices,
            self.col_indices,
            self.bias,
            out_features=self.out_features,
            row_indices=self.row_indices,
            transpose=self._plan(),
        )

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self._pattern_repr()}"


def _copy_into(module: SparseModule, dense: nn.Module) -> nn.Module:
    with torch.no_grad():
        dense.weight.copy_(module.weight)
        dense.weight.requires_grad_(module.values.requires_grad)
        if module.bias is not None:
            dense.bias.copy_(module.bias)
            dense.bias.requires_grad_(module.bias.requires_grad)
    return dense.train(module.training)

"""SparseConv2d and SparseLinear: sparse weights, dense activations, in the place of nn.Conv2d and nn.Linear.

A module owns ``values [n_vectors, V]`` as its Parameter and the pattern as int32 buffers (``formats.py``). Gradient,
optimiser state and update exist only at the non-zeros, so retraining costs the density and nothing revives a pruned
weight. ``state_dict()`` holds these tensors; loading also understands the plain module's keys (a dense ``weight``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import formats, ops


class SparseModule(nn.Module):
    """What SparseConv2d and SparseLinear share: the packed weight. Not made directly."""

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    row_indices: Tensor | None
    bias: Tensor | None
    groups: int

    # Subclasses say these two.
    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The dense weight's shape."""
        raise NotImplementedError

    _taps = 1  # columns per input channel

    def _adopt(self, dense: nn.Module, mask: Tensor | None, vector: int | str, permute: bool | Tensor) -> None:
        """Packs a plain module's weight and takes over its bias, mode and trainability."""
        weight = dense.weight
        if isinstance(weight, nn.UninitializedParameter):
            raise ValueError(f"Expected {type(dense).__name__} with its weight made, got one that has not seen an input")
        packed = formats.pack(weight, mask, vector, self.groups, permute)
        self.values = nn.Parameter(packed.values, requires_grad=weight.requires_grad)
        bias = dense.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.register_buffer("crow_indices", packed.crow_indices)
        self.register_buffer("col_indices", packed.col_indices)
        self.register_buffer("row_indices", packed.row_indices)
        self.register_buffer("transpose", None, persistent=False)
        self.train(dense.training)

    def _refresh_transpose(self) -> None:
        # Only training walks the transposed pattern; in eval mode the rare backward makes it on the fly.
        made = None
        if self.training and not self.col_indices.is_meta:
            made = ops.transpose_pattern(
                self.crow_indices,
                self.col_indices,
                self.row_indices,
                vector=self.vector,
                out_channels=self.weight_shape[0],
                in_channels=self.weight_shape[1] * self.groups,
                taps=self._taps,
                groups=self.groups,
            )
        self.transpose = made

    def train(self, mode: bool = True):
        super().train(mode)
        if mode != (self.transpose is not None):
            self._refresh_transpose()
        return self

    @property
    def vector(self) -> int:
        """V: output channels that share their columns."""
        return self.values.shape[1]

    @property
    def nnz(self) -> int:
        """Weights that are kept (padding of the last row groups left out)."""
        padded = formats.flat_positions(
            self.crow_indices, self.col_indices, self.row_indices, self.vector, self.weight_shape, self.groups
        )
        return int((padded < torch.Size(self.weight_shape).numel()).sum())

    @property
    def density(self) -> float:
        """nnz over the size of the dense weight, 0..1."""
        return self.nnz / max(torch.Size(self.weight_shape).numel(), 1)

    @property
    def sparsity(self) -> float:
        """Fraction of the dense weight that is removed, 0..1."""
        return 1.0 - self.density

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at each use; differentiable in ``values``, not to be assigned."""
        return formats.unpack(
            self.values, self.crow_indices, self.col_indices, self.row_indices, self.weight_shape, self.groups
        )

    @property
    def mask(self) -> Tensor:
        """bool, the dense weight's shape, True = kept."""
        ones = torch.ones_like(self.values)
        indices = (self.crow_indices, self.col_indices, self.row_indices)
        return formats.unpack(ones, *indices, self.weight_shape, self.groups) != 0

    def _pattern_repr(self) -> str:
        return f"sparsity={self.sparsity:.4g}, vector={self.vector}"

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Takes packed keys, of any pattern that fits the module, or the plain module's dense ``weight``."""
        state = dict(state_dict)
        names = ("crow_indices", "col_indices", "row_indices")
        dense = state.pop(prefix + "weight", None)
        if dense is not None:
            error = self._dense_to_packed(dense, state, prefix)
            if error:
                error_msgs.append(f"{prefix}weight: {error}")
                return
        elif all(prefix + name in state for name in ("values", "crow_indices", "col_indices")):
            error = self._resize_to(state, prefix)
            if error:
                error_msgs.append(f"{prefix}values: {error}")
                return
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if dense is not None:
            # A plain checkpoint knows no pattern, which therefore stays.
            for name in names:
                if prefix + name in missing_keys:
                    missing_keys.remove(prefix + name)
        self._refresh_transpose()

    def _dense_to_packed(self, dense: Tensor, state: dict, prefix: str) -> str | None:
        if dense.shape != self.weight_shape:
            return f"Expected a dense weight of shape {self.weight_shape}, got {tuple(dense.shape)}"
        outside = int(((dense != 0) & ~self.mask.to(dense.device)).sum())
        if outside:
            return f"Expected zeros outside the pattern ({self.nnz} kept), got {outside} non-zeros outside it"
        indices = [None if t is None else t.to(dense.device) for t in (self.crow_indices, self.col_indices, self.row_indices)]
        state[prefix + "values"] = formats.gather(dense, *indices, self.vector, self.groups)
        return None

    def _resize_to(self, state: dict, prefix: str) -> str | None:
        """Makes room for a checkpoint's pattern after checking that it is one."""
        values, crow, col = (state[prefix + name] for name in ("values", "crow_indices", "col_indices"))
        rows = state.get(prefix + "row_indices")
        if values.dim() != 2 or col.dim() != 1 or values.shape[0] != col.shape[0]:
            return f"Expected values [n, V] and col_indices [n], got {tuple(values.shape)} and {tuple(col.shape)}"
        if not values.is_meta:
            try:
                plain = [None if t is None else t.cpu().contiguous() for t in (crow, col, rows)]
                ops.transpose_pattern(
                    *plain,
                    vector=values.shape[1],
                    out_channels=self.weight_shape[0],
                    in_channels=self.weight_shape[1] * self.groups,
                    taps=self._taps,
                    groups=self.groups,
                )
            except (ValueError, IndexError, TypeError, RuntimeError) as error:
                return str(error).splitlines()[0]
        with torch.no_grad():
            if values.shape != self.values.shape:
                self.values.data = self.values.new_empty(values.shape)
                self.values.grad = None
            if crow.shape != self.crow_indices.shape:
                self.crow_indices = self.crow_indices.new_empty(crow.shape)
            if col.shape != self.col_indices.shape:
                self.col_indices = self.col_indices.new_empty(col.shape)
            if (rows is None) != (self.row_indices is None):
                self.row_indices = None if rows is None else self.crow_indices.new_empty(rows.shape)
        return None


def _options(parameter: Tensor) -> dict:
    return {"device": parameter.device, "dtype": parameter.dtype}


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
        self._take(dense, torch.ones_like(dense.weight, dtype=torch.bool) if mask is None else mask, vector, False)

    def _take(self, conv: nn.Conv2d, mask: Tensor | None, vector: int | str, permute: bool | Tensor) -> None:
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self.transposed, self.output_padding = False, (0, 0)
        # nn.Conv2d answers in channels_last when its weight is so stored, even to an input that is not.
        stored_channels_last = conv.weight.is_contiguous(memory_format=torch.channels_last)
        self.channels_last = stored_channels_last and not conv.weight.is_contiguous()
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
            TypeError: not an ``nn.Conv2d``, or a mask that is not bool.
            ValueError: a mask of another shape, or one that does not fit V.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"Expected torch.nn.Conv2d, got {type(conv).__name__}")
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

    def forward(self, input: Tensor) -> Tensor:
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
            transpose=self.transpose,
        )
        if self.channels_last and output.dim() == 4:
            output = output.contiguous(memory_format=torch.channels_last)
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
        self._take(dense, torch.ones_like(dense.weight, dtype=torch.bool) if mask is None else mask, vector, False)

    def _take(self, linear: nn.Linear, mask: Tensor | None, vector: int | str, permute: bool | Tensor) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._adopt(linear, mask, vector, permute)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, mask: Tensor | None = None, vector: int | str = 1, permute: bool | Tensor = False
    ) -> SparseLinear:
        """Packs ``linear``; arguments and errors as in :meth:`SparseConv2d.from_dense`."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"Expected torch.nn.Linear, got {type(linear).__name__}")
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
            transpose=self.transpose,
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

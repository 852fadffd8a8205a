"""SparseModule: the packed weight that SparseConv2d and SparseLinear share, and its exchange by state dicts.

A module owns ``values [n_vectors, V]`` as its Parameter and the pattern as int32 tensors (``formats.py``).
``state_dict()`` holds these tensors; loading also understands the plain module's keys (a dense ``weight``).

The pattern is no buffer, because buffers are averaged (``AveragedModel(use_buffers=True)``) and sent around at each
forward (DistributedDataParallel), which is right for statistics and ruins or wastes indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import formats, ops

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
    _shapes = None  # a `shapes.Shapes`, where `convert` measured the layer
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

    def runs_dense(self, input: Tensor) -> bool:
        """Whether inference on an input of this shape is left to the dense layer, which is faster there."""
        if self._shapes is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
            return False
        return input.device.type in ("cpu", "cuda") and input.numel() > 0 and self._shapes.prefers_dense(self, input)

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

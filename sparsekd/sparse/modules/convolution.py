"""What the sparse convolutions share, and SparseConv1d."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .packed import SparseModule
from .plain import check_plain, copy_into, keep_all, options


def _sides(padding: tuple[int, ...] | str, kernel_size: tuple, dilation: tuple) -> list[tuple[int, int]]:
    """(before, after) of each dimension."""
    if padding == "same":
        return ops.same_padding(kernel_size, dilation)
    return [(0, 0)] * len(kernel_size) if padding == "valid" else [(p, p) for p in padding]


class SparseConv(SparseModule):
    """What SparseConv1d and SparseConv2d share: torch's attributes, packing and back. Not made directly."""

    _kind: type[nn.Module]  # torch's

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        mask: Tensor | None = None,
        vector: int | str = 1,
    ) -> None:
        dense = self._kind(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        super().__init__()
        self._take(dense, keep_all(dense.weight) if mask is None else mask, vector, False)

    def _take(self, conv: nn.Module, mask: Tensor | None, vector: int | str, permute: bool | Tensor) -> None:
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self.transposed, self.output_padding = False, (0,) * len(conv.kernel_size)
        self._taps = math.prod(self.kernel_size)
        self._adopt(conv, mask, vector, permute)

    @classmethod
    def from_dense(
        cls, conv: nn.Module, mask: Tensor | None = None, vector: int | str = 1, permute: bool | Tensor = False
    ):
        """Packs ``conv``; arguments and errors as in :meth:`SparseConv2d.from_dense`."""
        check_plain(conv, cls._kind, "forward", "_conv_forward")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._take(conv, mask, vector, permute)
        return module

    def to_dense(self) -> nn.Module:
        """The plain module with the same weights (zeros where pruned), dtype, device and mode."""
        dense = nn.utils.skip_init(
            self._kind,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            **options(self.values),
        )
        return copy_into(self, dense)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _padded(self, input: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """The input, padded as padding_mode says, and the zeros that are left to the kernel."""
        if self.padding_mode == "zeros":
            return input, self.padding
        sides = _sides(self.padding, self.kernel_size, self.dilation)
        ends = [end for pair in reversed(sides) for end in pair]  # F.pad begins at the last dimension
        return F.pad(input, ends, mode=self.padding_mode), (0,) * len(sides)

    def extra_repr(self) -> str:
        return f"{self._kind.extra_repr(self)}, {self._pattern_repr()}"

    @staticmethod
    def _check_input(input: Tensor) -> None:
        SparseModule._check_input(input)
        if torch._C._get_tracing_state() is not None:  # it fails at operators that take symbolic sizes
            raise RuntimeError(
                "Expected torch.export or torch.compile to trace a sparse convolution, got torch.jit.trace"
            )

    def _check_shape(self, input: Tensor) -> None:
        image = ("L", "H, W")[len(self.kernel_size) - 1]
        lengths = len(self.kernel_size) + 1
        if input.dim() not in (lengths, lengths + 1) or input.shape[-lengths] != self.in_channels:
            raise ValueError(
                f"Expected an input of shape [N, {self.in_channels}, {image}] or [{self.in_channels}, {image}], "
                f"got {list(input.shape)}"
            )


class SparseConv1d(SparseConv):
    """1-d convolution with sparse weights and dense activations, computed as a 2-d one of height 1.

    Constructor, attributes and behaviour are those of :class:`torch.nn.Conv1d`; ``mask`` is bool ``[out_channels,
    in_channels / groups, S]`` and the input ``[N, in_channels, L]`` or ``[in_channels, L]``, else as
    :class:`SparseConv2d`.
    """

    _kind = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        self._check_shape(input)
        if self.runs_dense(input):
            return self._shapes.dense(self)(input)
        input, padding = self._padded(input)
        return ops.conv2d(
            input.unsqueeze(-2),
            self.values,
            self.crow_indices,
            self.col_indices,
            self.bias,
            out_channels=self.out_channels,
            kernel_size=(1, *self.kernel_size),
            stride=(1, *self.stride),
            padding=padding if isinstance(padding, str) else (0, *padding),
            dilation=(1, *self.dilation),
            groups=self.groups,
            row_indices=self.row_indices,
            transpose=self._plan(),
        ).squeeze(-2)

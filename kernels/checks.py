"""What every kernel here checks before it is launched, and the sizes that follow. As ``csrc/check.h`` does in C++."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INT32_LIMIT = 2**31 - 1


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def uses_tf32(convolution: bool) -> bool:
    """Whether torch's own convolutions, or its matrix products, compute fp32 in TF32 by the user's settings."""
    if hasattr(torch.backends, "fp32_precision"):  # allow_tf32, its older name, raises where both are used
        backend = torch.backends.cudnn.conv if convolution else torch.backends.cuda.matmul
        return backend.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32 if convolution else torch.backends.cuda.matmul.allow_tf32


def precision_of(dtype: torch.dtype, convolution: bool = True) -> str:
    """``tl.dot``'s ``input_precision``."""
    return "tf32" if dtype == torch.float32 and uses_tf32(convolution) else "ieee"


def check_dim(tensor: Tensor, name: str, dim: int) -> None:
    if tensor.dim() != dim:
        raise ValueError(f"Expected {name} with {dim} dimensions, got shape {tuple(tensor.shape)}")


def check_floating(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"Expected {name} of dtype float32, float16, bfloat16 or float64, got {tensor.dtype}")


def check_like(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise ValueError(f"Expected {name} on {like.device} as {like_name}, got {tensor.device}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"Expected {name} of dtype {like.dtype} as {like_name}, got {tensor.dtype}")


def check_indices(tensor: Tensor, name: str, like: Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"Expected {name} of dtype int32, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"Expected {name} on {like.device}, got {tensor.device}")
    check_dim(tensor, name, 1)
    if not tensor.is_contiguous():
        raise ValueError(f"Expected contiguous {name}, got strides {tensor.stride()}")


def check_channels(tensor: Tensor | None, name: str, input: Tensor, channels: int) -> Tensor | None:
    if tensor is None:
        return None
    check_like(tensor, name, input, "input")
    if tensor.shape != (channels,):
        raise ValueError(f"Expected {name} of shape ({channels},), got {tuple(tensor.shape)}")
    return tensor.contiguous()


def check_pattern(
    crow: Tensor, col: Tensor, rows: Tensor | None, like: Tensor, out_channels: int, groups: int, vector: int
) -> None:
    """Shapes of a packed weight's indices. What they hold is not looked at: that would wait for the device."""
    if vector < 1:
        raise ValueError(f"Expected values of shape [n_vectors, V] with V >= 1, got V = {vector}")
    if groups < 1 or out_channels < groups or out_channels % groups:
        raise ValueError(
            f"Expected a number of output channels divisible by groups, got {out_channels} and groups={groups}"
        )
    most = max(out_channels // groups, 1024)
    if vector > most:
        raise ValueError(
            f"Expected V of at most {most} for {out_channels // groups} output channels per group, got V = {vector}"
        )
    check_indices(crow, "crow_indices", like)
    check_indices(col, "col_indices", like)
    expected = groups * cdiv(out_channels // groups, vector) + 1
    if crow.shape[0] != expected:
        raise ValueError(f"Expected crow_indices of size {expected} (row groups + 1), got {crow.shape[0]}")
    if rows is not None:
        check_indices(rows, "row_indices", like)
        if rows.shape[0] != out_channels:
            raise ValueError(f"Expected row_indices of size {out_channels} (output channels), got {rows.shape[0]}")


def check_values(values: Tensor, like: Tensor, like_name: str, col: Tensor) -> None:
    check_dim(values, "values", 2)
    check_like(values, "values", like, like_name)
    if values.shape[0] != col.shape[0]:
        raise ValueError(f"Expected values of size {col.shape[0]} (the number of col_indices), got {values.shape[0]}")


def check_loss_settings(temperature: float, alpha: float, label_smoothing: float, target: Tensor | None) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"Expected temperature to be positive and finite, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"Expected alpha in [0, 1], got {alpha}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"Expected label_smoothing in [0, 1], got {label_smoothing}")
    if target is None and alpha != 1:
        raise ValueError(f"Expected a target unless alpha is 1, got none with alpha={alpha}")


def check_target(target: Tensor | None, like: Tensor, rows: int) -> None:
    if target is None:
        return
    if target.dtype != torch.int64:
        raise TypeError(f"Expected target of dtype int64 (class indices), got {target.dtype}")
    if target.device != like.device:
        raise ValueError(f"Expected target on {like.device}, got {target.device}")
    if target.shape != (rows,):
        raise ValueError(f"Expected target of shape ({rows},), got {tuple(target.shape)}")


class Geometry(NamedTuple):
    """A convolution's sizes, as its op takes them."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def is_point(self) -> bool:
        """Whether each output pixel is of one input pixel, the one at its place."""
        return self[:3] == ((1, 1), (1, 1), (0, 0))


def checked_geometry(input_size, kernel_size, stride, padding, dilation, groups) -> tuple[Geometry, tuple[int, int]]:
    """The geometry and the output's height and width."""
    if len(input_size) != 4:
        raise ValueError(f"Expected an input of 4 dimensions [N, C, H, W], got shape {tuple(input_size)}")
    pairs = {"kernel_size": (kernel_size, 1), "stride": (stride, 1), "padding": (padding, 0), "dilation": (dilation, 1)}
    for name, (pair, least) in pairs.items():
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"Expected two values of at least {least} for {name}, got {list(pair)}")
    if groups < 1 or input_size[1] < groups or input_size[1] % groups:
        raise ValueError(
            f"Expected a number of input channels divisible by groups, got {input_size[1]} and groups={groups}"
        )
    output = []
    for d, what in ((0, "height"), (1, "width")):
        padded = input_size[2 + d] + 2 * padding[d]
        reach = (kernel_size[d] - 1) * dilation[d] + 1
        if input_size[2 + d] < 1 or padded < reach:
            raise ValueError(
                f"Expected a padded input at least as large as the kernel ({reach} in {what}), got {padded} from an "
                f"input of shape {tuple(input_size)}"
            )
        output.append((padded - reach) // stride[d] + 1)
    geometry = Geometry(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups)
    return geometry, (output[0], output[1])


def checked_grad_geometry(grad_output: Tensor, input_size, *geometry) -> Geometry:
    """The geometry of the convolution whose results ``grad_output`` belongs to."""
    check_dim(grad_output, "grad_output", 4)
    checked, output = checked_geometry(input_size, *geometry)
    expected = (input_size[0], grad_output.shape[1], *output)
    if tuple(grad_output.shape) != expected:
        raise ValueError(f"Expected grad_output of shape {expected}, got {tuple(grad_output.shape)}")
    return checked

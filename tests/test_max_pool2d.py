"""max_pool2d: what it refuses, and what torch asks of an operator. Results are compared in test_fusion.py."""

import pytest
import torch
from conftest import check_op
from torch.nn import functional as F

from sparsekd.sparse import ops


@pytest.mark.parametrize("size", [(2, 3, 9, 8), (3, 9, 8), (0, 3, 9, 8), (2, 0, 9, 8)])
def test_registered(size):
    check_op(torch.ops.sparsekd.max_pool2d, (torch.randn(size), (3, 2), (2, 3), (1, 0)), ())


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 33, 64, 200])
def test_every_width_and_phase(width, stride):
    x = torch.randn(2, 3, 7, width)
    for kernel in range(1, min(width, 6) + 1):
        want = F.max_pool2d(x, (3, kernel), (1, stride), (1, kernel // 2))
        assert torch.equal(ops.max_pool2d(x, (3, kernel), (1, stride), (1, kernel // 2)), want)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(4, 4), 2, 2), ValueError, "Expected input with 3 or 4 dimensions, got shape"),
        ((torch.zeros(1, 4, 4).half(), 2, 2), TypeError, "Expected input of dtype Float or Double, got Half"),
        ((torch.zeros(1, 4, 4), 0, 1), ValueError, "Expected two values of at least 1 and below 2.31 for kernel_size"),
        ((torch.zeros(1, 4, 4), 2, 0), ValueError, "Expected two values of at least 1 and below 2.31 for stride, got"),
        ((torch.zeros(1, 4, 4), 2**32, 2, 2**31), ValueError, "below 2.31 for kernel_size"),
        ((torch.zeros(1, 4, 4), 3, 1, 2), ValueError, "Expected padding from 0 to half of kernel_size"),
        ((torch.zeros(1, 4, 4), 3, 1, -1), ValueError, "Expected two values of at least 0 and below 2.31 for padding"),
        ((torch.zeros(1, 2, 4), 3, 1), ValueError, "Expected an input of at least the kernel"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.max_pool2d(*arguments)


@pytest.mark.parametrize("lengths", [(1, 2, 2), (2, 3, 2), (2, 2, 0)])
def test_lists_of_another_length_are_not_read(lengths):
    """torch does not look at the lengths that a schema says."""
    geometry = [[of] * length for of, length in zip((2, 2, 1), lengths, strict=True)]
    with pytest.raises(ValueError, match="Expected two values of at least"):
        torch.ops.sparsekd.max_pool2d(torch.zeros(1, 4, 4), *geometry)
    with pytest.raises(ValueError, match="Expected two values of at least"):
        torch.classes.sparsekd.PlannedSequence(1).max_pool2d(0, *geometry)


def test_is_for_inference():
    with pytest.raises(RuntimeError, match="use torch.nn.functional.max_pool2d"):
        ops.max_pool2d(torch.zeros(1, 4, 4, requires_grad=True), 2, 2)

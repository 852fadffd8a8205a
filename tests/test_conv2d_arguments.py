"""What conv2d and its gradients refuse: arguments that do not fit, and forged ones."""

import pytest
import torch
from conftest import assert_near
from test_conv2d import OPS, int32

from sparsekd.sparse import ops


def test_forgeries_are_refused():
    """Straight through torch.ops, past every check in Python. Each is one sentence, and none reads foreign memory."""
    input, values, grad = torch.randn(1, 2, 5, 5), torch.randn(3, 1), torch.randn(1, 2, 3, 3)
    crow, col = int32(0, 2, 3), int32(0, 17, 9)
    plan = OPS.transpose_pattern(crow, col, None, 1, 2, 2, 9, 1)
    good = {
        "input": input,
        "values": values,
        "crow": crow,
        "col": col,
        "rows": None,
        "plan": None,
        "bias": None,
        "out_channels": 2,
        "kernel": (3, 3),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "groups": 1,
    }
    order = {
        "conv2d": [*good],
        "conv2d_input_grad": [
            *("grad", "values", "crow", "col", "rows", "plan", "size"),
            *("kernel", "stride", "padding", "dilation", "groups"),
        ],
        "conv2d_weight_grad": [
            *("input", "grad", "crow", "col", "rows", "vector"),
            *("kernel", "stride", "padding", "dilation", "groups"),
        ],
        "transpose_pattern": ["crow", "col", "rows", "vector", "out_channels", "in_channels", "taps", "groups"],
    }
    good |= {"grad": grad, "size": (1, 2, 5, 5), "vector": 1, "in_channels": 2, "taps": 9}
    for name, names in order.items():
        getattr(OPS, name)(*(good[key] for key in names))  # the unforged call works

    every, convolutions = tuple(order), tuple(order)[:3]
    packed = ("conv2d", "conv2d_input_grad")
    places = plan.clone()
    places[-1] = 3  # one past the last value
    negative = plan.clone()
    negative[-1] = -1
    far_column = plan.clone()
    far_column[3] = 2 * 9
    starts = plan.clone()
    starts[1] = 100
    forged = [
        # the pattern
        (every, {"col": int32(0, 18, 9)}, IndexError, r"Expected col_indices in 0\.\.17.*, got"),
        (every, {"col": int32(0, -1, 9)}, IndexError, r"Expected col_indices in 0\.\.17.*, got"),
        (every, {"col": int32(0, 2**31 - 1, 9)}, IndexError, r"Expected col_indices in 0\.\.17.*, got"),
        (every, {"col": int32(0, -(2**31), 9)}, IndexError, r"Expected col_indices in 0\.\.17.*, got"),
        (every, {"crow": int32(0, 4, 3)}, ValueError, "Expected non-decreasing crow_indices, got 4 before 3"),
        (every, {"crow": int32(0, -1, 3)}, ValueError, "Expected non-decreasing crow_indices, got 0 before -1"),
        (every, {"crow": int32(1, 2, 3)}, ValueError, r"Expected crow_indices\[0\] to be 0, got 1"),
        (every, {"crow": int32(0, 2, 4)}, ValueError, "Expected the last of crow_indices to be 3 .*, got 4"),
        (every, {"crow": int32(0, 2, 2)}, ValueError, "Expected the last of crow_indices to be 3 .*, got 2"),
        (every, {"crow": int32(0, 3)}, ValueError, "Expected crow_indices of size 3 .*, got shape"),
        (every, {"crow": int32()}, ValueError, "Expected crow_indices of size 3 .*, got shape"),
        (every, {"crow": crow.long()}, TypeError, "Expected crow_indices of dtype Int, got Long"),
        (every, {"col": col.long()}, TypeError, "Expected col_indices of dtype Int, got Long"),
        (every, {"col": col.float()}, TypeError, "Expected col_indices of dtype Int, got Float"),
        (every, {"col": col[:, None]}, ValueError, "Expected col_indices with 1 dimensions, got shape"),
        (every, {"crow": crow[None]}, ValueError, "Expected crow_indices with 1 dimensions, got shape"),
        (every, {"col": int32(0, 1, 17, 1, 9)[::2]}, ValueError, "Expected contiguous col_indices, got strides"),
        (every, {"rows": int32(0, 0)}, ValueError, "Expected row_indices to permute .*, got 0 at 1"),
        (every, {"rows": int32(0, 2)}, ValueError, "Expected row_indices to permute .*, got 2 at 1"),
        (every, {"rows": int32(-1, 0)}, ValueError, "Expected row_indices to permute .*, got -1 at 0"),
        (every, {"rows": int32(0)}, ValueError, "Expected row_indices of size 2 .*, got shape"),
        (every, {"rows": torch.tensor([0, 1])}, TypeError, "Expected row_indices of dtype Int, got Long"),
        (
            every,
            {"rows": int32(1, 0), "groups": 2, "col": int32(0, 8, 1)},
            ValueError,
            "Expected row_indices to permute .* of each convolution group, got 1 at 0",
        ),
        (packed, {"values": values[:2]}, ValueError, "Expected values of size 3 .*, got shape"),
        (packed, {"values": values[:, 0]}, ValueError, "Expected values with 2 dimensions, got shape"),
        (packed, {"values": values[:, :0]}, ValueError, "V >= 1, got V = 0"),
        (packed, {"values": values.double()}, TypeError, "Expected values of dtype Float .*, got Double"),
        (packed, {"values": values.long()}, TypeError, "Expected values of dtype Float .*, got Long"),
        # one tensor without numbers among those that have them
        (every, {"col": col.to("meta")}, ValueError, "Expected col_indices on cpu, got meta"),
        (every, {"rows": int32(0, 1).to("meta")}, ValueError, "Expected row_indices on cpu, got meta"),
        (packed, {"values": values.to("meta")}, ValueError, "Expected values on cpu, got meta"),
        (("conv2d",), {"bias": torch.zeros(2, device="meta")}, ValueError, "Expected bias on cpu, got meta"),
        (("conv2d_weight_grad",), {"grad": grad.to("meta")}, ValueError, "Expected grad_output on cpu, got meta"),
        (("conv2d_weight_grad", "transpose_pattern"), {"vector": 0}, ValueError, "V >= 1, got V = 0"),
        (("conv2d_weight_grad", "transpose_pattern"), {"vector": -1}, ValueError, "V >= 1, got V = -1"),
        # sizes and dtypes
        (("conv2d", "conv2d_weight_grad"), {"input": input[0]}, ValueError, "Expected an input of 4 dimensions"),
        (("conv2d", "conv2d_weight_grad"), {"input": input.int()}, TypeError, "Expected input of dtype .*, got Int"),
        (("conv2d",), {"input": input.double()}, TypeError, "Expected values of dtype Double .*, got Float"),
        (("conv2d_weight_grad",), {"grad": grad.double()}, TypeError, "Expected grad_output of dtype Float .*, got"),
        (("conv2d_input_grad",), {"grad": grad.int()}, TypeError, "Expected grad_output of dtype .*, got Int"),
        (convolutions[1:], {"grad": grad[0]}, ValueError, "Expected grad_output with 4 dimensions, got shape"),
        (convolutions[1:], {"grad": grad[..., :2]}, ValueError, r"Expected grad_output of shape \[1, 2, 3, 3\], got"),
        (("conv2d_input_grad",), {"size": (2, 2, 5, 5)}, ValueError, r"Expected grad_output of shape \[2, .*, got"),
        (("conv2d",), {"bias": torch.zeros(3)}, ValueError, "Expected bias of size 2 .*, got shape"),
        (("conv2d",), {"bias": torch.zeros(1, 2)}, ValueError, "Expected bias with 1 dimensions, got shape"),
        (("conv2d",), {"bias": torch.zeros(2).double()}, TypeError, "Expected bias of dtype Float .*, got Double"),
        (("conv2d", "transpose_pattern"), {"out_channels": 0}, ValueError, "Expected .*output channels.*, got"),
        (("conv2d", "transpose_pattern"), {"out_channels": -2}, ValueError, "Expected .*output channels.*, got"),
        (("conv2d", "transpose_pattern"), {"out_channels": 3}, ValueError, "Expected crow_indices of size 4"),
        (("transpose_pattern",), {"taps": 0}, ValueError, "at least one tap, got"),
        (("transpose_pattern",), {"in_channels": 0}, ValueError, "Expected input channels divisible by groups.*, got"),
        # geometry
        (every, {"groups": 0}, ValueError, "Expected .* divisible by groups.*, got"),
        (every, {"groups": -1}, ValueError, "Expected .* divisible by groups.*, got"),
        (every, {"groups": 3}, ValueError, "Expected .* divisible by groups.*, got"),
        (convolutions, {"stride": (0, 1)}, ValueError, "Expected two values of at least 1 .* for stride, got"),
        (convolutions, {"stride": (1, -1)}, ValueError, "Expected two values of at least 1 .* for stride, got"),
        (convolutions, {"dilation": (0, 1)}, ValueError, "Expected two values of at least 1 .* for dilation, got"),
        (convolutions, {"padding": (-1, 0)}, ValueError, "Expected two values of at least 0 .* for padding, got"),
        (convolutions, {"kernel": (3, 0)}, ValueError, "Expected two values of at least 1 .* for kernel_size, got"),
        (convolutions, {"kernel": (3, 3, 3)}, ValueError, "Expected two values of at least 1 .* for kernel_size, got"),
        (convolutions, {"kernel": (6, 3)}, ValueError, r"at least as large as the kernel \(6 in height\), got 5"),
        (convolutions, {"dilation": (1, 3)}, ValueError, r"at least as large as the kernel \(7 in width\), got 5"),
        # the plan of another pattern
        (("conv2d_input_grad",), {"plan": plan[:-1]}, ValueError, "Expected a transpose plan .*, got 8 entries"),
        (("conv2d_input_grad",), {"plan": plan[:2]}, ValueError, "Expected a transpose plan .*, got 2 entries"),
        (("conv2d_input_grad",), {"plan": int32()}, ValueError, "Expected a transpose plan .*, got 0 entries"),
        (("conv2d_input_grad",), {"plan": plan.long()}, TypeError, "Expected transpose of dtype Int .*, got Long"),
        (("conv2d_input_grad",), {"plan": places}, ValueError, "to point into 3 values, got 3"),
        (("conv2d_input_grad",), {"plan": negative}, ValueError, "to point into 3 values, got -1"),
        (("conv2d_input_grad",), {"plan": far_column}, IndexError, r"transpose plan's columns in 0\.\.17, got 18"),
        (("conv2d_input_grad",), {"plan": starts}, ValueError, "Expected .*the transpose plan's row starts.*, got"),
    ]
    for touched, changes, error, message in forged:
        for name in touched:
            with pytest.raises(error, match=message):
                result = getattr(OPS, name)(*((good | changes)[key] for key in order[name]))
                pytest.fail(f"{name} took {changes} and gave {result}")


def test_numbers_beyond_all_measure():
    """Sizes near the ends of int64, where sums and products of them would wrap around, and strides of many phases."""
    input, values = torch.randn(1, 1, 5, 5), torch.randn(1, 1)
    crow, col = int32(0, 1), int32(0)

    def call(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
        return OPS.conv2d(input, values, crow, col, None, None, None, 1, kernel, stride, padding, dilation, 1)

    for huge in (2**31, 2**40, 2**62, 2**63 - 1):
        for name in ("kernel", "stride", "padding", "dilation"):
            with pytest.raises(ValueError, match=r"Expected .*, got"):
                call(**{name: (huge, huge)})
    for huge in (2**20, 2**31, 2**62, 2**63 - 1):
        with pytest.raises(ValueError, match="Expected V of at most 1024 for 1 output channels per group, got V = "):
            OPS.transpose_pattern(crow, col, None, huge, 1, 1, 1, 1)
    # Large but possible: one output pixel.
    stride = (2**31 - 1, 40000)
    want = input[:, :, :1, :1] * values
    assert_near(call(stride=stride), want)
    grad = torch.ones(1, 1, 1, 1)
    got = OPS.conv2d_input_grad(grad, values, crow, col, None, None, (1, 1, 5, 5), (1, 1), stride, (0, 0), (1, 1), 1)
    assert got[0, 0, 0, 0] == values[0, 0] and got.count_nonzero() == 1


def test_devices_without_a_kernel():
    values, crow, col = torch.randn(1, 1), int32(0, 1), int32(0)

    class Elsewhere(torch.Tensor):
        device = torch.device("xpu:0")

    with pytest.raises(NotImplementedError, match="Expected input on cpu, got xpu:0"):
        ops.conv2d(torch.randn(1, 1, 2, 2).as_subclass(Elsewhere), values, crow, col, out_channels=1, kernel_size=1)
    # On meta there are shapes but no numbers.
    meta = ops.conv2d(
        *(t.to("meta") for t in (torch.randn(2, 1, 5, 5), values, crow, col)), out_channels=1, kernel_size=3
    )
    assert meta.is_meta and meta.shape == (2, 1, 3, 3)


def test_python_arguments():
    values, crow, col = torch.randn(1, 1), int32(0, 1), int32(0)
    input = torch.randn(1, 1, 4, 4)

    def call(input=input, **changes):
        return ops.conv2d(input, values, crow, col, **{"out_channels": 1, "kernel_size": 1} | changes)

    for wrong in (torch.randn(4, 4), torch.randn(1, 1, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"Expected an input of 3 or 4 dimensions .*, got shape"):
            call(wrong)
    with pytest.raises(ValueError, match='Expected padding to be numbers, "same" or "valid", got \'full\''):
        call(padding="full")
    with pytest.raises(ValueError, match='Expected stride 1 with padding="same", got'):
        call(padding="same", stride=2)

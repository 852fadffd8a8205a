"""What torch asks of conv2d: registration, gradients, half precision, the compiler, threads."""

import dataclasses
import math

import pytest
import torch
from conftest import assert_near, check_gradients, check_op
from test_conv2d import OPS, Case, check_case, laid_out, make, run_op

from sparsekd.sparse import ops

SAMPLES = {
    "plain": Case(),
    "channels_last": Case(batch=2, layout="channels_last", permuted=True, vector=2, filters_per_group=5),
    "strided, grouped": Case(batch=2, groups=3, stride=(2, 3), padding=(1, 2), dilation=(2, 1), layout="turned"),
    "planned": Case(planned=True, dtype=torch.float64, vector=4, filters_per_group=8, bias=False),
    "one channel": Case(channels_per_group=1, filters_per_group=1, layout="channels_last", size=(5, 5)),
    "one pixel": Case(kernel=(1, 1), size=(1, 1), layout="channels_last", batch=2),
    "empty": Case(density=0.0, bias=False),
    "no image": Case(batch=0),
    "half": Case(dtype=torch.float16, layout="channels_last"),
}


def op_arguments(case):
    """Positional arguments of conv2d, conv2d_input_grad, conv2d_weight_grad, transpose_pattern."""
    input, _, packed, bias = make(case)
    out_channels, taps = case.groups * case.filters_per_group, math.prod(case.kernel)
    pattern = (case.vector, out_channels, input.shape[1], taps, case.groups)
    plan = OPS.transpose_pattern(*packed[1:], *pattern) if case.planned else None
    geometry = (case.kernel, *case.geometry)
    output = OPS.conv2d(input, *packed, plan, bias, out_channels, *geometry)
    grad = laid_out(torch.randn(output.shape).to(case.dtype), case.layout)
    return {
        "conv2d": (input, *packed, plan, bias, out_channels, *geometry),
        "conv2d_input_grad": (grad, *packed, plan, list(input.shape), *geometry),
        "conv2d_weight_grad": (input, grad, *packed[1:], case.vector, *geometry),
        "transpose_pattern": (*packed[1:], *pattern),
    }


DIFFERENTIABLE = {"conv2d": (0, 1, 6), "conv2d_input_grad": (0, 1), "conv2d_weight_grad": (0, 1)}


@pytest.mark.parametrize("name", ["conv2d", "conv2d_input_grad", "conv2d_weight_grad", "transpose_pattern"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(name, sample):
    check_op(getattr(OPS, name), op_arguments(SAMPLES[sample])[name], DIFFERENTIABLE.get(name, ()))


SMALL = [
    Case(channels_per_group=2, filters_per_group=2, size=(3, 2), kernel=(2, 3), padding=(1, 1)),
    Case(batch=2, channels_per_group=2, filters_per_group=3, size=(3, 2), kernel=(2, 2), vector=2, permuted=True),
    Case(groups=2, channels_per_group=1, filters_per_group=3, size=(5, 4), stride=(2, 1), vector=2, layout="turned"),
    Case(size=(5, 4), channels_per_group=2, filters_per_group=2, dilation=(2, 1), layout="channels_last", planned=True),
]


@pytest.mark.parametrize("case", SMALL, ids=["plain", "permuted vectors", "strided, grouped", "planned"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck_and_gradgradcheck(name, case):
    case = dataclasses.replace(case, dtype=torch.float64, density=0.6)
    arguments = op_arguments(case)[name]
    check_gradients(getattr(OPS, name), arguments, DIFFERENTIABLE[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("vector", [1, 4])
def test_half_types_are_float32_rounded_once(dtype, layout, vector):
    case = Case(batch=2, padding=(1, 1), stride=(2, 1), dtype=dtype, layout=layout, vector=vector)
    got, *_ = check_case(case)
    input, _, packed, bias = make(case)
    wide = run_op(case, input.float(), packed._replace(values=packed.values.float()), bias.float())
    assert torch.equal(got, wide.to(dtype))


def gradients(function, input, values, bias):
    tensors = [t.detach().requires_grad_() for t in (input, values, bias)]
    output = function(*tensors)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return output, *torch.autograd.grad((output * weights).sum(), tensors)


@pytest.mark.parametrize(
    "case,backend,dynamic",
    [
        (Case(batch=2, padding=(1, 1), vector=2, filters_per_group=6, planned=True), "inductor", None),
        (Case(batch=2, stride=(2, 1), layout="channels_last", permuted=True), "aot_eager", None),
        (Case(batch=3, groups=3, dilation=(1, 2), dtype=torch.float64), "aot_eager", True),
        (Case(padding="same", kernel=(2, 4), vector=4, filters_per_group=5), "aot_eager", None),
    ],
    ids=["inductor", "channels_last", "dynamic", "same"],
)
def test_compiled_equals_eager(case, backend, dynamic):
    torch._dynamo.reset()
    input, _, packed, bias = make(case)
    plan = None
    if case.planned:
        plan = OPS.transpose_pattern(*packed[1:], case.vector, 6, 3, 9, 1)

    def function(input, values, bias):
        # Something before and after, for the compiler to fuse with.
        output = ops.conv2d(
            input * 2,
            values,
            packed.crow_indices,
            packed.col_indices,
            bias,
            out_channels=case.groups * case.filters_per_group,
            kernel_size=case.kernel,
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            groups=case.groups,
            row_indices=packed.row_indices,
            transpose=plan,
        )
        return output.relu()

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (input, torch.cat([input, input])[1:]) if dynamic else (input,):
        want, got = (gradients(f, batch, packed.values, bias) for f in (function, compiled))
        for left, right in zip(got, want, strict=True):
            assert left.stride() == right.stride()
            assert_near(left, right)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("vector", [1, 4])
def test_the_same_bits_on_any_number_of_threads(two_thread_counts, batch, vector):
    case = Case(
        batch=batch,
        channels_per_group=48,
        filters_per_group=40,
        size=(21, 19),
        padding=(1, 1),
        vector=vector,
        planned=True,
    )
    input, _, packed, bias = make(case)

    def function(input, values, bias):
        return run_op(case, input, packed._replace(values=values), bias)

    one, two = two_thread_counts(lambda: gradients(function, input, packed.values, bias)[:3])
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left, right)

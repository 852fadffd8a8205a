"""The operators on a GPU, against float64 on the CPU. benchmarks/gpu_run.sh --rehearse runs them interpreted."""

import contextlib
import dataclasses
import os

import interpreted
import pytest
import test_conv2d
import test_cuda_conv2d_24
import test_kernels_linear
import test_linear
import test_linear_kd_loss
import torch
import torch.nn.functional as F
from conftest import assert_near
from test_kernels_conv2d import random_case

from sparsekd.sparse import formats, ops, reference
from sparsekd.sparse.modules import SparseConv2d

REHEARSE = os.environ.get("SPARSEKD_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSE else "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSE or torch.cuda.is_available()), reason="needs a GPU, or SPARSEKD_REHEARSE=1"),
]


@pytest.fixture(autouse=True)
def kernels():
    with interpreted.as_cpu_ops() if REHEARSE else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def exact_fp32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_device(tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def convolution(case, input, packed, bias):
    values, crow, col, rows = packed
    stride, padding, dilation, groups = case.geometry
    geometry = dict(kernel_size=case.kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    out_channels = case.groups * case.filters_per_group
    return ops.conv2d(input, values, crow, col, bias, out_channels=out_channels, row_indices=rows, **geometry)


SEEDS = [(seed, None) for seed in range(4 if REHEARSE else 60)]
SEEDS += [] if REHEARSE else [(seed, backend) for backend in ("triton", "cuda") for seed in range(60, 80)]


def by(backend, dtype):
    """Within it one backend alone serves; None: whichever is chosen."""
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA C++ kernels compute in float32")
    return contextlib.nullcontext() if backend is None else ops.only_backend(backend)


@pytest.mark.parametrize("seed, backend", SEEDS)
def test_random_convolutions(seed, backend):
    """Forward and gradients."""
    case = dataclasses.replace(random_case(seed), layout="contiguous")
    with by(backend, case.dtype):
        check_convolution(case)


def check_convolution(case):
    input, weight, packed, bias = test_conv2d.make(case)
    moved, values = input.to(DEVICE).requires_grad_(), packed.values.to(DEVICE).requires_grad_()
    got = convolution(case, moved, [values, *on_device(packed[1:])], bias.to(DEVICE) if case.bias else None)
    wide, dense = input.double().requires_grad_(), weight.double().requires_grad_()
    want = F.conv2d(wide, dense, bias.double() if case.bias else None, *case.geometry)
    assert_near(got.cpu(), want, case.dtype)
    grad = torch.randn(want.shape, dtype=torch.float64).to(case.dtype)
    got_grads = torch.autograd.grad(got, (moved, values), grad.to(DEVICE))
    want_grads = torch.autograd.grad(want, (wide, dense), grad.double())
    assert_near(got_grads[0].cpu(), want_grads[0], case.dtype, "input gradient")
    gathered = formats.gather(want_grads[1], *packed[1:], case.vector, case.groups)
    assert_near(got_grads[1].cpu(), gathered, case.dtype, "values gradient")


@pytest.mark.parametrize("seed, backend", SEEDS[:4] if REHEARSE else SEEDS[40:])
def test_random_linear(seed, backend):
    """Forward and gradients."""
    case = test_kernels_linear.random_case(seed)
    input, weight, packed, bias = test_linear.make(case)
    moved = [t.to(DEVICE).requires_grad_() for t in (input, packed.values, bias)]
    wide = [t.double().requires_grad_() for t in (input, weight, bias)]
    with by(backend, case.dtype):
        pattern = packed._replace(**dict(zip(packed._fields[1:], on_device(packed[1:]), strict=True)))
        got = test_linear.run_op(case, moved[0], pattern._replace(values=moved[1]), moved[2])
        want = F.linear(wide[0], wide[1], wide[2] if case.bias else None)
        assert_near(got.cpu(), want, case.dtype)
        grad = torch.randn(want.shape, dtype=torch.float64).to(case.dtype)
        got_grads = torch.autograd.grad(got, moved[:2], grad.to(DEVICE))
    want_grads = list(torch.autograd.grad(want, wide[:2], grad.double()))
    want_grads[1] = formats.gather(want_grads[1], *packed[1:], case.vector)
    for one, other in zip(got_grads, want_grads, strict=True):
        assert_near(one.cpu(), other, case.dtype, "a gradient")


@pytest.mark.parametrize("classes", [10] if REHEARSE else [2, 10, 1000, 20011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kd_loss(classes, dtype):
    student, teacher = (3 * torch.randn(7, classes)).to(dtype), (3 * torch.randn(7, classes)).to(dtype)
    target = torch.randint(classes, (7,))
    wide = student.double().detach().requires_grad_()
    moved = student.clone().to(DEVICE).requires_grad_()
    got = ops.kd_loss(moved, teacher.to(DEVICE), target.to(DEVICE))
    want = reference.kd_loss_reference(wide, teacher.double(), target)
    assert got.item() == pytest.approx(want.item(), rel=1e-4)
    got.backward(), want.backward()
    assert_near(moved.grad.cpu(), wide.grad, dtype)


@pytest.mark.parametrize("seed", range(4 if REHEARSE else 60))
def test_random_linear_kd_loss(seed):
    case = test_linear_kd_loss.random_case(seed)
    made, target = test_linear_kd_loss.make(case)
    tensors = test_linear_kd_loss.learned(on_device(made))
    wide = test_linear_kd_loss.learned(made)
    got = test_linear_kd_loss.run(case, tensors, None if target is None else target.to(DEVICE))
    want = test_linear_kd_loss.run_reference(case, wide, target)
    if want.isnan():
        assert got.isnan()
        return
    tolerance = test_linear_kd_loss.TOLERANCE[case.dtype]
    assert abs(got.item() - want.item()) <= 3 * tolerance * max(want.item(), 0.1)


@pytest.mark.skipif(REHEARSE, reason="there is no graph to capture on the CPU")
def test_a_graph_captures_it():
    case = test_conv2d.Case(batch=2, filters_per_group=16, vector=8, padding=(1, 1), dtype=torch.float16)
    input, _, packed, bias = test_conv2d.make(case)
    input, bias, packed = input.to(DEVICE), bias.to(DEVICE), on_device(packed)
    want = convolution(case, input, packed, bias)  # compiles, and makes the plan
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = convolution(case, input, packed, bias)
    graph.replay()
    assert torch.equal(got, want)


def test_compiled_equals_eager():
    torch._dynamo.reset()
    case = test_conv2d.Case(filters_per_group=8, vector=8, padding=(1, 1), size=(4, 4))
    input, _, packed, bias = test_conv2d.make(case)
    input, bias, packed = input.to(DEVICE), bias.to(DEVICE), on_device(packed)

    def function(x):
        return convolution(case, x * 2, packed, bias).relu()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if REHEARSE else "inductor")
    assert_near(compiled(input), function(input))


@pytest.mark.parametrize("seed", range(4 if REHEARSE else 80))
def test_2_to_4_convolutions(seed):
    case = test_cuda_conv2d_24.draw(seed)
    input, values, metadata, generator = test_cuda_conv2d_24.operands(case)
    bias = torch.randn(case.geometry[0], generator=generator).to(case.dtype)
    with torch.no_grad():
        got = torch.ops.sparsekd.conv2d_24(*on_device([input, values, metadata, bias]), *case.geometry)
    want = reference.conv2d_24_reference(input.double(), values.double(), metadata, bias.double(), *case.geometry)
    assert_near(got.cpu(), want, case.dtype, str(case))


@pytest.mark.parametrize("vector", [1, 4, 16])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_module_reads_the_values_of_the_moment(vector, format):
    """By its plan, and in a graph that was captured before they changed."""
    torch.manual_seed(vector)
    mask = (torch.rand(32 // vector, 24, 3, 3) < 0.2).repeat_interleave(vector, 0)
    conv = SparseConv2d.from_dense(torch.nn.Conv2d(24, 32, 3, padding=1).to(DEVICE).eval(), mask.to(DEVICE), vector)
    input = torch.randn(4, 24, 15, 14, device=DEVICE).contiguous(memory_format=format)

    def check(got):
        want = F.conv2d(input.double(), conv.weight.double(), conv.bias.double(), padding=1)
        assert_near(got.cpu(), want.cpu(), torch.float32)

    with torch.no_grad():
        check(conv(input))
        conv.values.mul_(-2)
        check(conv(input))
        if not REHEARSE:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = conv(input)
            conv.values.mul_(3)
            graph.replay()
            check(captured)
            assert conv._plans.by_size
        conv.values.mul_(3)
        check(conv(input))

"""The operators on CUDA as far as they go without a GPU: fake tensors, and what a tensor elsewhere is told."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsekd.sparse import formats, formats_24, ops

GEOMETRY = ((3, 3), (2, 1), (1, 1), (1, 2), 2)  # kernel, stride, padding, dilation, groups

pytestmark = pytest.mark.skipif(
    # Not conv2d, which Triton serves as well.
    not torch._C._dispatch_has_kernel_for_dispatch_key("sparsekd::conv2d_planned", "CUDA"),
    reason="sparsekd is built without its CUDA half, for which a toolkit is needed",
)


def samples(dtype=torch.float32, memory_format=torch.contiguous_format):
    """{operator: arguments}, small and on the CPU."""
    mask = (torch.rand(6, 3, 3, 3) < 0.4).repeat_interleave(2, 0)
    values, *pattern = formats.pack(torch.randn(12, 3, 3, 3).to(dtype), mask, 2, 2)
    input = torch.randn(4, 6, 9, 8).to(dtype).contiguous(memory_format=memory_format)
    grad_output = torch.randn(4, 12, 5, 6).to(dtype).contiguous(memory_format=memory_format)
    shift = torch.randn(12).to(dtype)
    plan = ops.transpose_pattern(*pattern, vector=2, out_channels=12, in_channels=6, taps=9, groups=2)
    weight = torch.randn(10, 7).to(dtype)
    packed, *of_linear = formats.pack(weight, torch.rand(10, 7) < 0.5, 1)
    rows, grad_rows = torch.randn(3, 7).to(dtype), torch.randn(3, 10).to(dtype)
    flat = ops.transpose_pattern(*of_linear, vector=1, out_channels=10, in_channels=7, taps=1)
    two_of_four = (torch.arange(16).view(1, 16, 1, 1) % 4 < 2).expand(12, 16, 3, 3)
    kept = formats_24.pack_24(torch.randn(12, 16, 3, 3).to(dtype), two_of_four, 2)
    wide = torch.randn(4, 32, 9, 8).to(dtype).contiguous(memory_format=memory_format)
    logits, target = torch.randn(2, 5, 10).to(dtype), torch.randint(10, (5,))
    return {
        "conv2d": (input, values, *pattern, plan, shift, 12, *GEOMETRY),
        "conv2d_fused": (input, values, *pattern, shift, shift, grad_output, "relu", 12, *GEOMETRY),
        "conv2d_input_grad": (grad_output, values, *pattern, plan, (4, 6, 9, 8), *GEOMETRY),
        "conv2d_weight_grad": (input, grad_output, *pattern, 2, *GEOMETRY),
        "conv2d_24": (wide, *kept, shift, 12, *GEOMETRY),
        "conv2d_24_fused": (wide, *kept, shift, shift, grad_output, "silu", 12, *GEOMETRY),
        "linear": (rows, packed, *of_linear, flat, None, 10),
        "linear_input_grad": (grad_rows, packed, *of_linear, flat, 7),
        "linear_weight_grad": (rows, grad_rows, *of_linear, 1),
        "transpose_pattern": (*of_linear, 1, 10, 7, 1, 1),
        "kd_loss_forward": (*logits, target, 4.0, 0.5, -100, 0.1, False, True),
    }


NAMES = tuple(samples())


def on_cuda(mode, argument):
    if not isinstance(argument, torch.Tensor):
        return argument
    with mode:
        made = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="cuda")
    return made


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_fakes_are_as_the_real_results(name, dtype, memory_format):
    arguments = samples(dtype, memory_format)[name]
    op = getattr(torch.ops.sparsekd, name)
    mode = FakeTensorMode()
    with mode:
        fakes = outputs(op(*(on_cuda(mode, argument) for argument in arguments)))
    for fake, real in zip(fakes, outputs(op(*arguments)), strict=True):
        assert fake.device.type == "cuda"
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "transpose_pattern"])
def test_a_tensor_on_another_device_is_named(name):
    """As in a call whose input was moved to the GPU, and its weight forgotten."""
    arguments = samples()[name]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, pytest.raises(ValueError, match="Expected .* on cuda.*, got cpu"):
        getattr(torch.ops.sparsekd, name)(on_cuda(mode, arguments[0]), *arguments[1:])


@pytest.mark.parametrize("name", NAMES)
def test_a_cpu_tensor_for_the_cuda_kernel_is_an_error(name):
    op = getattr(torch.ops.sparsekd, name).default
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(ValueError, match="Expected .* on cuda, got cpu"):
        op.redispatch(cuda, *samples()[name])

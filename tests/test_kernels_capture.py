"""What a graph of CUDA may capture: nothing that a launcher does waits for the device or copies from the host.

Launchers run on fake tensors of the device "cuda", which need no GPU, and every operator of torch that they call is
looked at. Launches of kernels are noted in place of run.
"""

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from sparsekd.kernels import conv2d, kd_loss, linear, linear_kd_loss, plans, registration, static, weight_grad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekd.sparse import ops

ATEN = torch.ops.aten
WAITS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.unique_dim.default}


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        from_host = [x for x in given if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dim()]
        if function in WAITS or from_host:
            raise RuntimeError(f"{function} waits, as what it takes is {'on the host' if from_host else 'read there'}")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def watched():
    with FakeTensorMode(), static.recording() as launches, Watch():
        yield launches


def tensors(stride=1, dtype=torch.float16):
    integers = dict(dtype=torch.int32, device="cuda")
    input = torch.empty(2, 16, 9, 8, dtype=dtype, device="cuda")
    grad = torch.empty(2, 32, -(-9 // stride), -(-8 // stride), dtype=dtype, device="cuda")
    pattern = torch.empty(3, **integers), torch.empty(40, **integers), torch.empty(32, **integers)
    return (
        input,
        grad,
        torch.empty(40, 16, dtype=dtype, device="cuda"),
        pattern,
        ([3, 3], [stride] * 2, [1, 1], [1, 1], 1),
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions(watched, stride):
    input, grad, values, pattern, geometry = tensors(stride)
    bias = torch.empty(32, dtype=torch.float16, device="cuda")
    conv2d.conv2d(input, values, *pattern, None, bias, 32, *geometry)
    assert conv2d.conv2d_input_grad(grad, values, *pattern, None, list(input.shape), *geometry).shape == input.shape
    assert weight_grad.conv2d_weight_grad(input, grad, *pattern, 16, *geometry).shape == values.shape
    assert {"_conv2d_kernel", "_conv2d_weight_grad_kernel"} <= {launch.kernel.__name__ for launch in watched}


def test_linear(watched):
    _, _, values, pattern, _ = tensors()
    input, grad = (torch.empty(5, n, dtype=torch.float16, device="cuda") for n in (64, 32))
    linear.linear(input, values, *pattern, None, None, 32)
    linear.linear_input_grad(grad, values, *pattern, None, 64)
    linear.linear_weight_grad(input, grad, *pattern, 16)
    assert len(watched) >= 3


@pytest.mark.parametrize("labels", [True, False])
def test_losses(watched, labels):
    logits = torch.empty(6, 10, device="cuda")
    target = torch.empty(6, dtype=torch.int64, device="cuda") if labels else None
    settings = (target, 4.0, 0.5 if labels else 1.0)
    kd_loss.kd_loss_forward(logits, logits, *settings, -100, 0.1, False, True)
    hidden, weight = torch.empty(2, 3, 4, device="cuda"), torch.empty(10, 4, device="cuda")
    more = ("jsd", 0.5, -100, 0.1, False, 2, [True, True, False])
    linear_kd_loss.linear_kd_loss(hidden, weight, None, hidden, weight, None, *settings, *more)
    assert len(watched) > 2


@pytest.mark.parametrize(
    "wrong", [lambda x: x.sum().item(), lambda x: torch.tensor([1, 2], device="cuda"), torch.nonzero]
)
def test_what_waits_is_seen(watched, wrong):
    with pytest.raises((RuntimeError, torch._subclasses.fake_tensor.DataDependentOutputException)):
        wrong(torch.empty(3, device="cuda"))


def test_a_plan_made_while_capturing_is_not_kept(monkeypatch):
    """It holds nothing before the graph has run."""
    crow, made = torch.tensor([0, 1, 4], dtype=torch.int32), []
    monkeypatch.setattr(plans, "_capturing", lambda tensor: True)
    for _ in range(2):
        plans._once((crow,), ("order",), lambda: made.append(1))
    assert len(made) == 2


def test_a_compiler_sees_the_kernels_inside():
    """``torch.compile`` of the triton_op on tensors of a GPU, as far as one can go without: to the traced graph."""
    targets = []

    def traced(module, inputs):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return make_boxed_func(module.forward)

    with FakeTensorMode():
        input, _, values, pattern, geometry = tensors()
        op = registration.triton_op("conv2d")
        compiled = aot_function(lambda x, *packed: op(x * 2, *packed, None, None, 32, *geometry).relu(), traced)
        assert compiled(input, values, *pattern).shape == (2, 32, 9, 8)
    assert targets.count("triton_kernel_wrapper_functional") == 2  # to lanes, and the convolution
    assert "aten.relu.default" in targets


def test_dynamo_traces_a_call_on_cuda_whole():
    """All that stands before the operators there, choice of plans and checks of the device included."""

    def function(input, values, crow, col, hidden, target):
        vector = 1 if ops.takes_plans(input.device, torch.float32, 16) else values.shape[1]
        y = ops.conv2d(input * 2, values, crow, col, out_channels=32, kernel_size=3, padding=1).relu() * vector
        z = ops.linear(hidden, values, crow, col, out_features=32)
        return y.sum() + ops.kd_loss(z, z, target) + ops.linear_kd_loss(z, z, z, z, target)

    with FakeTensorMode():
        input, _, values, (crow, col, _), _ = tensors(dtype=torch.float32)
        hidden, target = torch.empty(5, 64, device="cuda"), torch.empty(5, dtype=torch.int64, device="cuda")
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert compiled(input, values, crow, col, hidden, target).device.type == "cuda"

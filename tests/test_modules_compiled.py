"""SparseConv2d and SparseLinear in what torch does with modules: modes, hooks, torch.compile, torch.export."""

import pytest
import torch
from conftest import assert_near
from test_modules import conv, linear, twin
from torch import nn

from sparsekd.sparse import ops

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Using padding='same'")]

# --- training and eval -----------------------------------------------------------------------------------------------


def gradients(module, x):
    return torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])


@pytest.mark.parametrize("plain", [conv(4, 6, 3, groups=2), linear(7, 6)], ids=["conv", "linear"])
def test_gradients_are_right_in_any_mode(plain, monkeypatch):
    module = twin(plain, vector=2)
    x = torch.randn((2, 4, 7, 6) if isinstance(plain, nn.Conv2d) else (5, 7), requires_grad=True)
    want = gradients(module, x)
    assert module.transpose is not None

    def check():
        for left, right in zip(gradients(module, x), want, strict=True):
            assert torch.equal(left, right)

    assert module.eval() is module
    assert module.transpose is None  # inference keeps no second index
    check()
    module.train()
    check()
    with torch.inference_mode():  # as an evaluation that puts the mode back at its end
        module.eval()(x)
        module.train()
    check()
    module.eval()
    module.training = True
    check()
    assert module.transpose is not None
    with torch.no_grad():
        assert not module(x).requires_grad
    # The plan is made once, not at every step.
    monkeypatch.setattr(ops, "transpose_pattern", None)
    check()


def test_hooks():
    module = twin(conv(3, 4, 3))
    seen = []
    module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    module.register_forward_hook(lambda m, args, output: output + 1)
    module.register_full_backward_hook(lambda m, grad_input, grad_output: seen.append((grad_input[0], grad_output[0])))
    module.values.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    output = module(x)
    assert_near(output, module.to_dense()(x * 2) + 1)
    output.sum().backward()
    shapes = [item for item in seen if isinstance(item, torch.Size)]
    assert shapes == [module.values.shape] and len(seen) == 2
    assert x.grad is not None


# --- compile and export ----------------------------------------------------------------------------------------------


COMPILED = {
    "conv": (conv(4, 6, 3, padding=1), {"vector": 2}, (2, 4, 7, 6)),
    "circular, permuted, channels_last": (
        conv(4, 6, 3, padding=(1, 2), stride=2, padding_mode="circular").to(memory_format=torch.channels_last),
        {"vector": 2, "permute": True},
        (4, 7, 6),
    ),
    "same": (conv(4, 4, (2, 3), padding="same", groups=4, bias=False), {}, (2, 4, 7, 6)),
    "linear": (linear(7, 6), {"vector": 4}, (3, 7)),
    "linear, more dimensions": (linear(7, 6, bias=False), {}, (3, 2, 7)),
}


@pytest.mark.parametrize(
    "name,backend", [*((name, "aot_eager") for name in COMPILED), ("conv", "inductor"), ("linear", "inductor")]
)
def test_compiled_equals_eager(name, backend):
    torch._dynamo.reset()
    plain, options, shape = COMPILED[name]
    module = twin(plain, **options)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn(shape, requires_grad=True)
    for training in (True, False):
        module.train(training)
        want, got = module(x), compiled(x)
        assert got.stride() == want.stride()
        assert_near(got, want)
        parameters = [x, *module.parameters()]
        # The weight itself may be part of a loss, too.
        loss = [out.square().sum() + module.weight.abs().sum() for out in (got, want)]
        for left, right in zip(*(torch.autograd.grad(each, parameters) for each in loss), strict=True):
            assert_near(left, right)


def test_compiled_loss_on_the_weight():
    torch._dynamo.reset()
    module = twin(conv(3, 4, 3), vector=2)
    penalty = torch.compile(lambda: module.weight.square().sum(), fullgraph=True, backend="aot_eager")
    assert_near(torch.autograd.grad(penalty(), module.values)[0], 2 * module.values)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["conv", "linear", "linear, more dimensions"])
def test_exported(name, strict, training, tmp_path):
    plain, options, shape = COMPILED[name]
    model = nn.Sequential(twin(plain, **options), nn.ReLU()).train(training)
    x = torch.randn(shape)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    op = getattr(torch.ops.sparsekd, "conv2d" if name == "conv" else "linear").default
    assert [node.target for node in exported.graph.nodes].count(op) == 1
    torch.export.save(exported, tmp_path / "model.pt2")
    for program in (exported, torch.export.load(tmp_path / "model.pt2")):
        for input in (x, torch.cat([x, x])):
            assert torch.equal(program.module()(input), model(input))

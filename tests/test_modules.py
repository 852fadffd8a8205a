"""SparseConv2d and SparseLinear against nn.Conv2d and nn.Linear with the same, masked, weight."""

import copy
import dataclasses
import math

import pytest
import torch
from conftest import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.testing._internal.common_modules import module_db

from sparsekd.sparse import formats
from sparsekd.sparse.modules import SparseConv2d, SparseLinear

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # torch tells that it copies the input for even kernels
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]


def twin(plain, mask=None, vector=1, permute=False):
    kind = SparseConv2d if isinstance(plain, nn.Conv2d) else SparseLinear
    return kind.from_dense(plain, mask, vector, permute)


def prune(plain, sparsity=0.7, seed=0):
    """The module with zeros in its weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        plain.weight[torch.rand(plain.weight.shape, generator=generator) < sparsity] = 0
    return plain


def conv(*arguments, sparsity=0.7, **options):
    return prune(nn.Conv2d(*arguments, **options), sparsity)


def linear(*arguments, sparsity=0.7, **options):
    return prune(nn.Linear(*arguments, **options), sparsity)


def at_kept(module, dense):
    """A dense tensor of the weight's shape at the packed positions."""
    return formats.gather(dense, *indices_of(module), module.vector, module.groups)


def indices_of(module):
    return module.crow_indices, module.col_indices, module.row_indices


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_conv_worked_by_hand():
    plain = nn.Conv2d(1, 2, 2)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([[[[2.0, 0], [0, 3]]], [[[0, -1], [0, 0]]]]))
        plain.bias.copy_(torch.tensor([10.0, 0]))
    module = SparseConv2d.from_dense(plain)
    assert module.values.tolist() == [[2], [3], [-1]]
    assert module.crow_indices.tolist() == [0, 2, 3] and module.col_indices.tolist() == [0, 3, 1]
    assert (module.nnz, module.density, module.vector) == (3, 3 / 8, 1)
    output = module(torch.arange(9.0).view(1, 1, 3, 3))
    assert output.tolist() == [[[[22, 27], [37, 42]], [[-1, -2], [-4, -5]]]]
    output.sum().backward()
    assert module.values.grad.tolist() == [[8], [24], [12]] and module.bias.grad.tolist() == [4, 4]


def test_linear_worked_by_hand():
    plain = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([[2.0, 0, 3], [0, 4, 0]]))
    module = SparseLinear.from_dense(plain)
    assert module.values.tolist() == [[2], [3], [4]] and module.bias is None
    assert module(torch.tensor([1.0, 10, 100])).tolist() == [302, 40]


# --- random configurations -------------------------------------------------------------------------------------------


def check_against(plain, module, input, layout=True):
    """Output, its strides, and the gradients of input, weight and bias."""
    dtype = input.dtype
    inputs = [input.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    want, got = plain(inputs[0]), module(inputs[1])
    assert got.dtype == want.dtype
    assert_near(got, want, dtype, "output")
    if layout and want.numel() and isinstance(plain, nn.Conv2d):
        assert got.stride() == want.stride()  # sides of 1 as well, by which the next layer tells the format
    assert got.is_contiguous() or not want.is_contiguous()
    grad = torch.randn_like(want)
    want.backward(grad)
    got.backward(grad)
    assert_near(inputs[1].grad, inputs[0].grad, dtype, "input gradient")
    assert module.values.grad.shape == module.values.shape
    assert_near(module.values.grad, at_kept(module, plain.weight.grad), dtype, "weight gradient")
    if plain.bias is None:
        assert module.bias is None
    else:
        assert_near(module.bias.grad, plain.bias.grad, dtype, "bias gradient")


@dataclasses.dataclass(frozen=True)
class Case:
    """One nn.Conv2d, what is kept of it, how it is packed, and its input."""

    arguments: dict
    size: tuple
    batch: int | None  # None: an input of three dimensions
    keep: str
    explicit: bool  # a mask, rather than the weight's zeros
    vector: int | str
    permute: bool
    bias: bool
    dtype: torch.dtype
    channels_last: tuple  # of (weight, input)
    training: bool
    seed: int

    def make(self):
        """(plain module with a masked weight, its sparse twin, input)."""
        torch.manual_seed(self.seed)
        plain = nn.Conv2d(**self.arguments, bias=self.bias, dtype=self.dtype).train(self.training)
        mask = self.mask(plain)
        given = mask if self.explicit else None
        whole = copy.deepcopy(plain)
        with torch.no_grad():
            plain.weight.mul_(mask)
        # An explicit mask removes what is not zero yet.
        source = whole if self.explicit else copy.deepcopy(plain)
        if self.channels_last[0]:
            plain, source = (m.to(memory_format=torch.channels_last) for m in (plain, source))
        shape = (self.arguments["in_channels"], *self.size)
        input = torch.randn(shape if self.batch is None else (self.batch, *shape), dtype=self.dtype)
        if self.channels_last[1] and input.dim() == 4:
            input = input.contiguous(memory_format=torch.channels_last)
        return plain, SparseConv2d.from_dense(source, given, self.vector, self.permute), input

    def mask(self, plain):
        """Output channels in runs of V share their columns, in the order that `permute` undoes."""
        weight, groups = plain.weight, plain.groups
        if self.keep in ("all", "none"):
            return torch.full_like(weight, self.keep == "all", dtype=torch.bool)
        run = 2 if self.vector == "auto" else self.vector
        per_group, columns = weight.shape[0] // groups, math.prod(weight.shape[1:])
        row_groups = -(-per_group // run)
        keep = torch.rand(groups, row_groups, 1, columns) < 0.4
        if self.keep == "empty rows":
            keep &= torch.rand(groups, row_groups, 1, 1) < 0.5
        mask = keep.expand(-1, -1, run, -1).reshape(groups, row_groups * run, columns)[:, :per_group]
        if self.permute:
            mask = mask[:, torch.randperm(per_group)]
        return mask.reshape(weight.shape)


@st.composite
def cases(draw):
    pair = st.one_of(st.integers(1, 7).map(lambda k: (k, k)), st.tuples(st.integers(1, 7), st.integers(1, 7)))
    kernel = draw(pair)
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    depthwise = draw(st.sampled_from([False, False, True]))
    padding = draw(
        st.one_of(
            st.integers(0, 4), st.tuples(st.integers(0, 4), st.integers(0, 4)), st.sampled_from(["same", "valid"])
        )
    )
    stride = (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    if padding == "same":
        sides = [-(-d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True)]
    else:
        sides = [0, 0] if padding == "valid" else [padding] * 2 if isinstance(padding, int) else padding
    # Large enough for the kernel, and for reflect, which needs more than it pads.
    least = [max(side + 1, d * (k - 1) + 1 - 2 * side) for k, d, side in zip(kernel, dilation, sides, strict=True)]
    filters = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9]))
    return Case(
        arguments={
            "in_channels": groups * (1 if depthwise else draw(st.integers(1, 5))),
            "out_channels": groups * filters,
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
        },
        size=tuple(n + draw(st.sampled_from([0, 1, 2, 4, 7])) for n in least),
        batch=draw(st.sampled_from([0, 1, 1, 2, None])),
        keep=draw(st.sampled_from(["some", "some", "empty rows", "none", "all"])),
        explicit=draw(st.booleans()),
        vector=draw(st.sampled_from([1, 2, 3, 4, 8, "auto"])),
        permute=draw(st.booleans()),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        channels_last=draw(st.tuples(st.booleans(), st.booleans())),
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=350)
@given(cases())
def test_random_convolutions(case):
    plain, module, input = case.make()
    assert torch.equal(module.weight, plain.weight)
    # In float64 torch convolves group by group, and takes images of one pixel, whose format is ambiguous, for
    # contiguous.
    pixels = {math.prod(input.shape[-2:]), math.prod(module(input).shape[-2:])}
    quirk = case.dtype == torch.float64 and plain.groups > 1 and 1 in pixels
    check_against(plain, module, input, layout=not quirk)
    assert module.training == case.training


@settings(max_examples=100)
@given(
    st.sampled_from([(), (0,), (1,), (5,), (3, 4), (2, 0), (2, 3, 2)]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([1, 2, 3, 4, 8, "auto"]),
    st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_random_linear_layers(leading, in_features, out_features, vector, sparsity, bias, permute, dtype, seed):
    torch.manual_seed(seed)
    plain = prune(nn.Linear(in_features, out_features, bias, dtype=dtype), sparsity, seed)
    module = SparseLinear.from_dense(plain, vector=vector, permute=permute)
    assert torch.equal(module.weight, plain.weight)
    check_against(plain, module, torch.randn(*leading, in_features, dtype=dtype))


MODULE_INFOS = [info for info in module_db if info.module_cls in (nn.Conv2d, nn.Linear)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("info", MODULE_INFOS, ids=lambda info: info.name)
def test_inputs_that_torch_tests_its_own_modules_with(info, dtype, requires_grad, training):
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training)
    assert samples
    for sample in samples:
        built, given = sample.constructor_input, sample.forward_input
        plain = prune(info.module_cls(*built.args, **built.kwargs, dtype=dtype), 0.5).train(training)
        for vector in (1, 2):
            module = twin(plain, vector=vector)
            want = plain(*given.args, **given.kwargs)
            got = module(*given.args, **given.kwargs)
            assert_near(got, want)
            assert got.is_contiguous() == want.is_contiguous() and got.requires_grad
            input = [*given.args, *given.kwargs.values()][0]
            sources = [[input] if requires_grad else [], list(plain.parameters()), list(module.parameters())]
            grad = torch.randn_like(want)
            want_grads = torch.autograd.grad(want, sources[0] + sources[1], grad)
            got_grads = torch.autograd.grad(got, sources[0] + sources[2], grad)
            for name, got_grad, want_grad in zip(
                (["input"] if requires_grad else []) + [name for name, _ in module.named_parameters()],
                got_grads,
                want_grads,
                strict=True,
            ):
                assert_near(got_grad, at_kept(module, want_grad) if name == "values" else want_grad, what=name)


GRADCHECKED = {
    "plain": (conv(2, 3, (2, 3), padding=1), {}, (1, 2, 4, 3)),
    "grouped, strided": (conv(4, 6, 3, stride=2, groups=2, bias=False), {"vector": 2}, (2, 4, 5, 5)),
    "depthwise, permuted": (conv(3, 6, 2, groups=3), {"vector": 2, "permute": True}, (3, 4, 3)),
    "reflect": (conv(2, 2, 3, padding=1, padding_mode="reflect"), {"vector": "auto"}, (1, 2, 3, 4)),
    "linear": (linear(4, 3), {"vector": 2}, (2, 2, 4)),
}


@pytest.mark.parametrize("name", GRADCHECKED)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(name, training):
    plain, options, shape = GRADCHECKED[name]
    module = twin(plain, **options).double().train(training)
    parameters = dict(module.named_parameters())
    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def function(input, *tensors):
        return functional_call(module, dict(zip(parameters, tensors, strict=True)), input)

    assert torch.autograd.gradcheck(function, (input, *parameters.values()))
    assert torch.autograd.gradcheck(
        lambda values: functional_call(Weight(module), {"module.values": values}), module.values
    )


class Weight(nn.Module):
    """Gives a module's dense weight, for the functions that call modules."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self):
        return self.module.weight


@pytest.mark.parametrize("plain", [conv(3, 5, 3), linear(6, 5)], ids=["conv", "linear"])
def test_weight_is_differentiable(plain):
    module = twin(plain, vector=2)
    factor = torch.randn_like(plain.weight)
    (module.weight * factor).sum().backward()
    assert torch.equal(module.values.grad, at_kept(module, factor))
    module.requires_grad_(False)
    assert not module.weight.requires_grad


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plain", [conv(4, 6, 3, padding=1), linear(7, 6)], ids=["conv", "linear"])
def test_half_types(plain, dtype):
    x = torch.randn((2, 4, 7, 6) if isinstance(plain, nn.Conv2d) else (5, 7)).to(dtype)
    module = twin(plain).to(dtype)
    assert module.crow_indices.dtype == module.col_indices.dtype == torch.int32
    assert {p.dtype for p in module.parameters()} == {dtype}
    # The same rounded numbers in float32: only the result is rounded.
    wide = module.to_dense().float()
    got, want = module(x), wide(x.float())
    assert got.dtype == dtype
    assert_near(got, want, dtype)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.float())
    assert module.values.grad.dtype == dtype
    assert_near(module.values.grad, at_kept(module, wide.weight.grad), dtype)
    # Converted before is the same as converted after.
    assert torch.equal(twin(copy.deepcopy(plain).to(dtype)).weight, module.weight)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("plain", [conv(4, 6, 3), conv(4, 6, 3, padding=1, padding_mode="reflect"), linear(7, 6)])
def test_autocast(plain, own, autocast):
    plain = copy.deepcopy(plain).to(own)
    module = twin(plain)
    x = torch.randn((2, 4, 7, 6) if isinstance(plain, nn.Conv2d) else (5, 7)).to(own)
    with torch.autocast("cpu", dtype=autocast):
        want, got = plain(x), module(x)
    assert got.dtype == want.dtype
    # torch rounds once more, inside.
    narrow = max(torch.finfo(got.dtype).eps, torch.finfo(own).eps)
    torch.testing.assert_close(got, want, rtol=4 * narrow, atol=4 * narrow)
    got.sum().backward()
    want.sum().backward()
    assert module.values.grad.dtype == plain.weight.grad.dtype == own
    assert_near(module.values.grad, at_kept(module, plain.weight.grad), torch.bfloat16)
    with torch.autocast("cpu", enabled=False):
        assert module(x).dtype == own


# --- memory formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel,channels", [(3, 4), (1, 4), (3, 1), (1, 1)])
@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize("when", ["before", "after", "undone"])
def test_memory_format_of_the_weight_decides_as_in_torch(kernel, channels, batch, when):
    """A channels_last module answers in channels_last; `.to(memory_format)` works on the twin as on the original."""
    plain = conv(channels, 6, kernel)
    module = None
    if when != "before":
        module = twin(plain)
    plain = plain.to(memory_format=torch.channels_last)
    module = twin(plain) if module is None else module.to(memory_format=torch.channels_last)
    if when == "undone":
        # torch does not undo it where the strides of contiguous weights are ambiguous.
        plain = twin(plain).to_dense().to(memory_format=torch.contiguous_format)
        module = nn.Sequential(module).to(memory_format=torch.contiguous_format)[0]
    shape = (channels, 5, 6) if batch is None else (batch, channels, 5, 6)
    for x in (torch.randn(shape), torch.randn(shape).transpose(-1, -2).contiguous().transpose(-1, -2)):
        assert module(x).stride() == plain(x).stride()
    if batch is not None:
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        assert module(x).stride() == plain(x).stride() and module(x[0]).stride() == plain(x[0]).stride()
    kept = copy.deepcopy(module).double()
    assert kept(torch.randn(shape).double()).stride() == plain(torch.randn(shape)).stride()

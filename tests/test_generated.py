"""Code that is made for final patterns: what the interpreting kernels and float64 say, on any layer."""

import ctypes
import mmap
import os
import random

import pytest
import torch
from conftest import ISA_FLAGS, assert_near, cpu_flags, printed_under_isa, python_under_isa
from test_strips import Net, check, fused, random_net  # noqa: F401  (for other interpreters)
from torch import nn
from torch.overrides import BaseTorchFunctionMode

from sparsekd.sparse.modules import FusedConv2d, SparseConv2d
from sparsekd.sparse.modules.fused import ACTIVATIONS

needs_avx512 = pytest.mark.skipif(not ISA_FLAGS["avx512"] <= cpu_flags(), reason="code is made with AVX-512 alone")


def always(code, wish="always"):
    """What a new interpreter prints that makes code wherever it can."""
    return printed_under_isa("avx512", code, SPARSEKD_GENERATE=wish).split()


def random_layer(seed):
    """A frozen layer, its input and perhaps a residual."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    groups, vector = draw.choice([1, 1, 1, 2, 3]), draw.choice([1, 1, 1, 2, 3, 4, 8, 30])
    channels, rows = groups * draw.randint(1, 40), groups * draw.randint(1, 70)
    kernel = [draw.choice([1, 1, 3, 2]), draw.choice([1, 3, 5])] if draw.random() < 0.6 else [1, 1]
    dilation = draw.choice([1, 1, 2])
    padding = [draw.randint(0, dilation * (k - 1)) for k in kernel]
    stride = draw.choice([1, 1, 2, (1, 2)])
    size = [dilation * (k - 1) + 1 + draw.randint(0, 30) for k in kernel]
    conv = nn.Conv2d(channels, rows, kernel, stride, padding, dilation, groups, bias=draw.random() < 0.7)
    in_group = rows // groups
    kept = torch.rand(groups, -(-in_group // vector), 1, *conv.weight.shape[1:]) < draw.choice([0.03, 0.1, 0.4, 1])
    kept[:, draw.randrange(kept.shape[1])] = False
    mask = kept.expand(-1, -1, vector, -1, -1, -1).flatten(1, 2)[:, :in_group].reshape(conv.weight.shape)
    permute = vector > 1 and draw.random() < 0.2
    sparse = SparseConv2d.from_dense(conv, None if permute else mask, vector=vector, permute=permute)
    sparse.freeze()
    layer = FusedConv2d(sparse, draw.choice(list(ACTIVATIONS))).requires_grad_(False)
    input = torch.randn(draw.randint(1, 5), channels, *size)
    with torch.no_grad():
        shape = sparse.to_dense()(input).shape
    return layer, input, torch.randn(shape) if draw.random() < 0.5 else None


@torch.no_grad()
def check_layer(seed):
    """How many bytes of code the layer has."""
    layer, input, residual = random_layer(seed)
    got, again = layer(input, residual), layer(input, residual)
    assert torch.equal(got, again), seed
    want = layer.conv.to_dense().double()(input.double())
    want = ACTIVATIONS[layer.activation](want if residual is None else want + residual)
    assert_near(got, want, torch.float32, f"seed {seed}")
    torch.set_num_threads(2)
    assert torch.equal(layer(input, residual), got), seed
    torch.set_num_threads(1)
    return layer.conv._plans.bound[input.shape, layer.activation].code_bytes(layer.conv.vector)


def between_guards(input, last):
    """A copy of the input in memory of its own: the page before it can't be read, or the one behind its end."""
    page, size = mmap.PAGESIZE, input.numel() * input.element_size()
    pages = -(-size // page)
    whole = mmap.mmap(-1, (pages + 2) * page)
    memory = torch.frombuffer(whole, dtype=torch.uint8)
    for guard in (0, (pages + 1) * page):
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(memory.data_ptr() + guard), page, 0) == 0  # PROT_NONE
    begin = (pages + 1) * page - size if last else page
    return memory[begin : begin + size].view(input.dtype).view(input.shape).copy_(input)


@torch.no_grad()
def check_in_place(seed):
    """Whether the layer reads its images where they lie."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    groups, vector, dilation = draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 4]), draw.choice([1, 1, 2, 3])
    kernel = [draw.choice([1, 3, 3, 5, 7]) for _ in range(2)]
    padding = [dilation * (kernel[0] - 1) // 2, dilation * (kernel[1] - 1) // 2]
    if draw.random() < 0.2:
        padding[0] = draw.randint(0, 2 * padding[0])  # images become lower or higher
    size = [draw.randint(dilation * (kernel[0] - 1) + 1, 35), draw.randint(3, 35)]
    channels, rows, bias = groups * draw.randint(1, 30), groups * vector * draw.randint(1, 20), draw.random() < 0.7
    conv = nn.Conv2d(channels, rows, kernel, 1, padding, dilation, groups, bias)
    kept = torch.rand(conv.out_channels // vector, *conv.weight.shape[1:]) < draw.choice([0.03, 0.1, 0.4])
    sparse = SparseConv2d.from_dense(conv, kept.repeat_interleave(vector, 0), vector=vector)
    sparse.freeze()
    layer = FusedConv2d(sparse, draw.choice(list(ACTIVATIONS))).requires_grad_(False)
    input = torch.randn(draw.randint(1, 4), conv.in_channels, *size)
    want = sparse.to_dense().double()(input.double())
    residual = torch.randn(want.shape) if draw.random() < 0.5 else None
    want = ACTIVATIONS[layer.activation](want if residual is None else want + residual)
    for last in (False, True):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_near(layer(between_guards(input, last), residual), want, torch.float32, f"seed {seed}")
    torch.set_num_threads(1)
    return layer.conv._plans.bound[input.shape, layer.activation].in_place(vector)


@needs_avx512
def test_images_that_are_read_in_place():
    code = "import test_generated as t\nprint(*[int(t.check_in_place(seed)) for seed in range(80)])"
    assert 40 < sum(map(int, always(code))) < 80


@needs_avx512
def test_random_layers():
    code = "import test_generated as t\nprint(*[t.check_layer(seed) for seed in range(120)])"
    made = [int(size) for size in always(code)]
    assert sum(size > 0 for size in made) > 100, made


@needs_avx512
@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="a sanitized loop does not fuse multiplying and adding")
def test_networks_in_strips():
    code = "import test_generated as t\nprint(sum(len(t.check(*t.random_net(seed))) for seed in range(40)))"
    assert int(always(code)[0]) > 40


@needs_avx512
def test_no_code_where_it_is_not_wanted():
    code = "import test_generated as t\nprint(*[t.check_layer(seed) for seed in range(4)])"
    assert always(code, "never") == ["0"] * 4
    code = "import sparsekd, torch\ntorch.ops.sparsekd.generates_code()"
    run = python_under_isa("avx512", code, SPARSEKD_GENERATE="no")
    assert "Expected SPARSEKD_GENERATE to be auto, always or never, got no" in run.stderr


@pytest.fixture
def large():
    """A layer that is worth code, and its input."""
    torch.manual_seed(0)
    return fused(64, 60, (3, 3), density=0.1), torch.randn(1, 64, 28, 28)


def has_code(layer, input):
    return layer.conv._plans.bound[input.shape, layer.activation].code_bytes(layer.conv.vector) > 0


@torch.no_grad()
def test_the_same_bits_as_without(large):
    layer, input = large
    got = layer(input)
    assert has_code(layer, input) == bool(torch.ops.sparsekd.generates_code())
    with BaseTorchFunctionMode():  # goes the long way
        assert torch.equal(layer(input), got)


@torch.no_grad()
def test_values_that_change_are_read_again(large):
    layer, input = large
    before = layer(input)
    layer.conv.values.mul_(2)
    layer.conv.bias.mul_(2)
    assert_near(layer(input), 2 * before)


@torch.no_grad()
def test_an_input_that_lies_elsewhere(large):
    layer, input = large
    want = layer(input)
    beside = torch.zeros(input.numel() + 1)[1:].view_as(input).copy_(input)
    assert_near(layer(beside), want)
    assert_near(layer(input.transpose(2, 3).contiguous().transpose(2, 3)), want)


@torch.no_grad()
def test_nan_stays_nan(large):
    layer, input = large
    input[0, 0, 10, 10] = torch.nan
    with BaseTorchFunctionMode():
        reached = torch.isnan(layer(input))
    assert 0 < reached.sum() < 9 * 60 and torch.equal(torch.isnan(layer(input)), reached)


@torch.no_grad()
def test_nothing_is_written_beside_results(large):
    layer, input = large
    net = Net(input)
    net.add(layer, net.add(fused(64, 64, (1, 1), density=0.1), 0))
    assert check(net)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
def test_ways_that_are_measured_give_the_same_bits(threads):
    before = torch.get_num_threads()
    net = Net(torch.randn(3, 64, 28, 28))
    place = net.add(fused(64, 64, (1, 1), density=0.1), 0)
    for _ in range(3):
        place = net.add(fused(64, 64, (3, 3), density=0.1), place, place)
    try:
        torch.set_num_threads(threads)
        sequence = net.sequence([place])
        assert len(sequence.in_strips()) == 4
        for _ in range(12):  # more than are compared
            assert torch.equal(sequence.run([net.values[0]])[0], net.values[place])
    finally:
        torch.set_num_threads(before)


def test_the_sample_is_not_of_one_kind():
    layers = [random_layer(seed)[0].conv for seed in range(120)]
    assert {conv.vector for conv in layers} == {1, 2, 3, 4, 8, 30}
    assert {conv.groups for conv in layers} == {1, 2, 3}

"""Code of patterns that are trained, and the memory of results that a step hands to the next."""

import gc
import os

import pytest
import torch
from conftest import assert_near
from test_generated import always, needs_avx512, random_layer
from torch import nn

from sparsekd.sparse import formats, ops
from sparsekd.sparse.modules import SparseConv2d

OPS = torch.ops.sparsekd
needs_code = pytest.mark.skipif(not OPS.generates_code(), reason="no code is made here")


def step(conv, input, grad):
    """The output, and the gradients of input, values and bias."""
    output = conv(input)
    return [output, *torch.autograd.grad(output, [input, *conv.parameters()], grad)]


def expected(conv, input, grad):
    dense, input = conv.to_dense().double(), input.detach().double().requires_grad_()
    output, of_input, of_weight, *of_bias = step(dense, input, grad.double())
    return [output, of_input, formats.gather(of_weight, *conv._indices(), conv.vector, conv.groups), *of_bias]


def check(conv, input, what):
    input = input.detach().requires_grad_()
    grad = torch.randn(conv.to_dense()(input).shape)
    first = step(conv, input, grad)
    for got, want in zip(first, expected(conv, input, grad), strict=True):
        assert_near(got, want, torch.float32, what)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, step(conv, input, grad), first)), what
    torch.set_num_threads(1)


def check_random(seed):
    """Bytes of code that were made for a layer that is trained."""
    layer, input, _ = random_layer(seed)
    before = OPS.kept_code_bytes()
    conv = layer.conv.requires_grad_().train()
    check(conv, input, f"seed {seed}")
    return OPS.kept_code_bytes() - before


@needs_avx512
def test_random_layers():
    code = "import test_kept_code as t\nprint(*[t.check_random(seed) for seed in range(40)])"
    made = [int(size) for size in always(code)]
    assert sum(size > 0 for size in made) > 30, made


def layer(stride=1):
    """One that is trained by code, and its input."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 96, 3, stride, padding=1)
    sparse = SparseConv2d.from_dense(conv, torch.rand_like(conv.weight) < 0.1).train()
    return sparse, torch.randn(16, 64, 28, 28)


@needs_code
@pytest.mark.parametrize("stride", [1, 2])
def test_code_ends_with_its_pattern(stride):
    gc.collect()
    before = OPS.kept_code_bytes()
    conv, input = layer(stride)
    check(conv, input, "training")
    made = OPS.kept_code_bytes() - before
    assert made > 10 * conv.nnz
    check(conv, input, "the next step")
    assert OPS.kept_code_bytes() - before == made
    conv.eval()
    assert OPS.kept_code_bytes() == before


@needs_code
def test_values_that_change_are_seen():
    conv, input = layer()
    check(conv, input, "before")
    conv.values.data.mul_(-2)
    check(conv, input, "after")


@needs_code
def test_a_pattern_that_changes_unseen_has_new_code():
    conv, input = layer()
    check(conv, input, "before")
    other = layer()[0]
    mask = torch.zeros_like(other.mask).flatten()
    mask[torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(1))[: other.nnz]] = True
    other = SparseConv2d.from_dense(nn.Conv2d(64, 96, 3, padding=1), mask.view(other.weight_shape)).train()
    for own, given in zip(
        (conv.crow_indices, conv.col_indices, conv.transpose),
        (other.crow_indices, other.col_indices, other.transpose),
        strict=True,
    ):
        own.numpy()[:] = given.numpy()  # no version counter tells
    check(conv, input, "after")


@needs_code
def test_a_plan_for_more_values_than_there_are():
    conv, input = layer()
    check(conv, input, "before")
    half = conv.nnz // 2
    crow = conv.crow_indices.clamp(max=half)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    grad = torch.randn(16, 96, 28, 28)
    with pytest.raises(ValueError, match="Expected the transpose plan to point into"):
        OPS.conv2d_input_grad(
            grad, conv.values[:half], crow, conv.col_indices[:half], None, conv.transpose, input.shape, *geometry
        )


@needs_code
def test_more_sizes_than_code_is_kept_for():
    conv, input = layer()
    for size in range(8, 20):
        check(conv, input[:2, :, :size, :size], f"size {size}")


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="a sanitized build leaves memory to malloc, to see more of it")
def test_results_wait_for_the_next():
    conv, input = layer()
    OPS.results_release()
    assert OPS.results_idle() == 0
    large = torch.cat([input] * 3)
    with torch.no_grad():
        call = (conv.values, conv.crow_indices, conv.col_indices)
        first = ops.conv2d(large, *call, out_channels=96, kernel_size=3, padding=1)
        assert first.nbytes > 4 << 20 and OPS.results_idle() == 0
        place, kept = first.data_ptr(), first.clone()
        second = ops.conv2d(large, *call, out_channels=96, kernel_size=3, padding=1)
        assert second.data_ptr() != place  # which is in use
        view = first[:1]
        del first
        assert OPS.results_idle() == 0  # and still is
        del view
        assert OPS.results_idle() >= second.nbytes
        third = ops.conv2d(large, *call, out_channels=96, kernel_size=3, padding=1)
        assert third.data_ptr() == place and OPS.results_idle() == 0
        assert torch.equal(third, kept)
        third.resize_(1 << 24)  # as any tensor can be
        del third, second
    OPS.results_release()
    assert OPS.results_idle() == 0

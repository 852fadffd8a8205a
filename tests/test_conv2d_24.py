"""conv2d with 2:4 weights, its packed form and its gradients, against nn.functional.conv2d on the masked weight."""

import functools
import math
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, check_gradients, check_op

from sparsekd.sparse import formats_24, ops, reference
from sparsekd.sparse.ops import dense

OPS = torch.ops.sparsekd


def mask_24(shape):
    out, channels, *kernel = shape
    return (torch.rand(out, channels // 4, 4, *kernel).argsort(2).argsort(2) < 2).view(shape)


def packed(shape, groups=1, dtype=torch.float64):
    weight, mask = torch.randn(shape, dtype=dtype), mask_24(shape)
    return weight * mask, formats_24.pack_24(weight, mask, groups)


# --- the format ------------------------------------------------------------------------------------------------------


def test_packed_by_hand():
    weight = torch.zeros(2, 16, 1, 1)
    weight[0, [0, 2], 0, 0] = torch.tensor([1.0, 2.0])
    weight[0, [6, 7], 0, 0] = torch.tensor([3.0, 4.0])
    weight[1, [9], 0, 0] = 5.0  # and a zero beside it, the last of its four
    values, metadata = formats_24.pack_24(weight)
    assert values[0, 0].tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
    assert values[1, 0].tolist() == [0, 0, 0, 0, 5, 0, 0, 0]
    assert metadata.shape == (1, 1, 1, 32)
    # Of row 0 the places 0 2, 2 3, and what fills up, 2 3 2 3; of row 1 2 3, 2 3, 1 3, 2 3.
    word = metadata[0, 0, 0]
    assert word[0] & 0xFFFF == 0b1110_1110_1110_1000
    assert word[4] & 0xFFFF == 0b1110_1101_1110_1110
    # Channels 16 and up, and rows 2 and up, are none: 0 1.
    assert word[1] & 0xFFFF == word[2] & 0xFFFF == word[8] & 0xFFFF == 0b0100_0100_0100_0100


@pytest.mark.parametrize("seed", range(20))
def test_back_to_the_dense_weight(seed):
    r = random.Random(seed)
    groups = r.choice([1, 1, 2, 3])
    shape = (
        groups * r.choice([1, 8, 15, 16, 17, 40]),
        r.choice([16, 48, 64, 80, 144]),
        r.choice([1, 3]),
        r.choice([1, 2]),
    )
    weight, (values, metadata) = packed(shape, groups, torch.float32)
    assert torch.equal(formats_24.unpack_24(values, metadata, shape, groups), weight)
    assert torch.equal(formats_24.gather_24(weight, metadata, groups), values)
    again = formats_24.pack_24(weight, None, groups)  # random weights are not zero
    assert torch.equal(again.values, values) and torch.equal(again.metadata, metadata)
    assert tuple(metadata.shape) == formats_24.metadata_shape(shape, groups)


def test_half_of_a_mask_of_the_pattern():
    """What `Pruner` chooses fits."""
    from sparsekd.pruning import patterns

    scores = torch.rand(20, 32, 3, 3)
    units = patterns.find_pattern("2:4").units(scores, patterns.Layout())
    mask = units.mask(torch.ones(units.scores.shape[0], dtype=torch.bool), scores.shape)
    values, metadata = formats_24.pack_24(scores, mask)
    assert torch.equal(formats_24.unpack_24(values, metadata, scores.shape), scores * mask)


def test_what_does_not_fit_is_refused():
    weight, mask = torch.randn(4, 16, 1, 1), mask_24((4, 16, 1, 1))
    with pytest.raises(ValueError, match="at most two non-zeros in each four consecutive input channels, got 16 of 16"):
        formats_24.pack_24(weight)
    mask[1, :4] = torch.tensor([True, False, False, False]).view(4, 1, 1)
    with pytest.raises(ValueError, match="a mask that keeps two of each four consecutive input channels, got 1 of 16"):
        formats_24.pack_24(weight, mask)
    with pytest.raises(ValueError, match="multiple of 16 input channels per group for 2:4 weights, got 8"):
        formats_24.pack_24(torch.zeros(4, 8, 1, 1))
    with pytest.raises(ValueError, match="4 dimensions"):
        formats_24.pack_24(torch.zeros(4, 16))
    with pytest.raises(ValueError, match="divisible by groups=3, got 4"):
        formats_24.pack_24(torch.zeros(4, 16, 1, 1), None, 3)
    with pytest.raises(TypeError, match="torch.bool"):
        formats_24.pack_24(weight, mask.float())
    with pytest.raises(ValueError, match="Expected metadata int32"):
        formats_24.unpack_24(torch.zeros(4, 1, 8), torch.zeros(1, 1, 1, 31, dtype=torch.int32), (4, 16, 1, 1))


# --- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 3])
def test_against_the_dense_convolution(groups, layout, dtype):
    weight, (values, metadata) = packed((12, 32, 3, 2), groups)
    values = values.to(dtype)
    weight = formats_24.unpack_24(values.double(), metadata, weight.shape, groups)
    input = torch.randn(2, 32 * groups, 9, 8).to(dtype, memory_format=layout)
    bias = torch.randn(12).to(dtype)
    geometry = dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=groups)
    got = ops.conv2d_24(input, values, metadata, bias, kernel_size=(3, 2), **geometry)
    assert_near(got, F.conv2d(input.double(), weight, bias.double(), **geometry), dtype)
    assert got.dtype == dtype and got.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_fused(activation):
    _, (values, metadata) = packed((12, 16, 3, 3))
    input, residual = torch.randn(2, 16, 5, 6, dtype=torch.float64), torch.randn(2, 12, 5, 6, dtype=torch.float64)
    scale, shift = torch.randn(2, 12, dtype=torch.float64)
    finish = dict(scale=scale, shift=shift, residual=residual, activation=activation)
    got = ops.conv2d_24_fused(input, values, metadata, kernel_size=3, padding="same", **finish)
    want = reference.conv2d_24_fused_reference(
        input, values, metadata, scale, shift, residual, activation, 12, (3, 3), (1, 1), (1, 1), (1, 1), 1
    )
    assert_near(got, want)
    one = ops.conv2d_24_fused(
        input[0], values, metadata, kernel_size=3, padding=1, **finish | {"residual": residual[0]}
    )
    assert_near(one, want[0])


GEOMETRY = (12, (3, 3), (2, 1), (1, 1), (1, 1), 2)


def sample():
    _, (values, metadata) = packed((12, 16, 3, 3), 2)
    input, bias = torch.randn(2, 32, 5, 4, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    return [input, values, metadata, bias, *GEOMETRY]


def test_gradients():
    _, (values, metadata) = packed((2, 16, 1, 2))
    input, bias = torch.randn(1, 16, 2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    geometry = (2, (1, 2), (2, 1), (1, 0), (1, 1), 1)
    check_gradients(OPS.conv2d_24, [input, values, metadata, bias, *geometry], (0, 1, 3))


def test_only_what_is_kept_has_a_gradient():
    weight, (values, metadata) = packed((8, 16, 3, 3))
    input = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    values.requires_grad_()
    weight.requires_grad_()
    ops.conv2d_24(input, values, metadata, kernel_size=3).square().sum().backward()
    F.conv2d(input, weight).square().sum().backward()
    assert_near(values.grad, formats_24.gather_24(weight.grad, metadata))


def test_opcheck():
    check_op(OPS.conv2d_24, sample(), (0, 1, 3))


def test_opcheck_fused():
    input, values, metadata, shift, *geometry = sample()
    residual = torch.randn(2, 12, 3, 4, dtype=torch.float64)
    check_op(OPS.conv2d_24_fused, [input, values, metadata, None, shift, residual, "silu", *geometry], ())


def test_fused_refuses_a_gradient():
    input, values, metadata, *_ = sample()
    with pytest.raises(RuntimeError, match="Expected conv2d_24_fused under torch.no_grad"):
        ops.conv2d_24_fused(input.requires_grad_(), values, metadata, kernel_size=3, groups=2)


def test_compiled():
    arguments = sample()

    def function(input, values):
        return OPS.conv2d_24(input, values, *arguments[2:]).relu()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments[:2]), function(*arguments[:2]))


def test_without_images():
    _, (values, metadata) = packed((12, 16, 3, 3))
    input = torch.zeros(0, 16, 5, 5, dtype=torch.float64)
    assert ops.conv2d_24(input, values, metadata, kernel_size=3).shape == (0, 12, 3, 3)


BAD = {
    "values of another dtype": (
        1,
        lambda t: t.float(),
        TypeError,
        "Expected values of dtype Double as input, got Float",
    ),
    "values of another size": (1, lambda t: t[:, :, :-1], ValueError, "Expected values of size 8 in dimension 2"),
    "metadata of another dtype": (2, lambda t: t.long(), TypeError, "Expected metadata of dtype Int, got Long"),
    "metadata cut short": (2, lambda t: t[:, :, :, :31], ValueError, r"Expected metadata of shape \[2, 9, 1, 32\]"),
    "metadata that names a place twice": (2, lambda t: t * 0, IndexError, "two places of four ascend, got 0 and 0"),
    "a bias for other channels": (3, lambda t: t[:-1], ValueError, "Expected bias of size 12"),
    "an input of 3 dimensions": (0, lambda t: t[0], ValueError, "Expected an input of 4 dimensions"),
    "channels that are no multiple of 16": (
        0,
        lambda t: t[:, :24],
        ValueError,
        "multiple of 16 input channels per group",
    ),
    "an input without numbers": (0, lambda t: t.long(), TypeError, "Expected input of dtype Float"),
    "groups that don't divide": (9, lambda _: 5, ValueError, "divisible by groups"),
    "a kernel that is larger": (5, lambda _: (9, 9), ValueError, "at least as large as the kernel"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_told(name):
    position, change, error, says = BAD[name]
    arguments = sample()
    arguments[position] = change(arguments[position])
    with pytest.raises(error, match=says), torch.no_grad():
        OPS.conv2d_24(*arguments)


def test_autocast():
    _, (values, metadata) = packed((12, 16, 3, 3), dtype=torch.float32)
    input = torch.randn(1, 16, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.conv2d_24(input, values, metadata, kernel_size=3)
    assert got.dtype == torch.bfloat16 and math.isfinite(float(got.sum()))


# --- what CUDA's kernel does not take --------------------------------------------------------------------------------


def taken(keys, *args):
    return "the kernel"


@pytest.fixture
def served():
    """What stands before the kernels on CUDA, called on the CPU."""
    ops.fallbacks.clear()
    yield lambda name, native: functools.partial(dense.served(name, native, "cpu"), None)
    ops.fallbacks.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_where_the_kernel_takes_no_such_dtype(served, dtype):
    shape, geometry = (8, 32, 3, 3), ((3, 3), (2, 1), (1, 1), (1, 1), 1)
    _, weight = packed(shape, dtype=dtype)
    x = torch.randn(2, 32, 7, 6, dtype=dtype).to(memory_format=torch.channels_last)
    bias, residual = torch.randn(8, dtype=dtype), torch.randn(2, 8, 4, 6, dtype=dtype)
    fused = (x, *weight, bias, bias, residual, "silu", 8, *geometry)
    run = served("conv2d_24_fused", taken)
    with pytest.warns(RuntimeWarning, match="Expected float16 or bfloat16, .* the dense backend serves it"):
        got = run(*fused)
    assert_near(got, OPS.conv2d_24_fused(*fused))
    assert got.is_contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        assert torch.equal(run(*fused), got)
    assert ops.fallbacks == {("conv2d_24_fused", "cuda", "dense"): 2}
    plain = (x, *weight, bias, 8, *geometry)
    with pytest.warns(RuntimeWarning, match="for conv2d_24 on cpu, got float"):
        assert_near(served("conv2d_24", taken)(*plain), OPS.conv2d_24(*plain))
    with ops.strict_backends(), pytest.raises(RuntimeError, match="Expected float16 or bfloat16"):
        run(*fused)
    with pytest.raises(TypeError, match="Expected residual of dtype"):
        run(*fused[:5], residual.half(), *fused[6:])


def test_half_is_the_kernels_where_it_is_built(served):
    _, weight = packed((8, 32, 1, 1), dtype=torch.float16)
    plain = (torch.randn(2, 32, 3, 3).half(), *weight, None, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    assert served("conv2d_24", taken)(*plain) == "the kernel"
    assert not ops.fallbacks
    with pytest.warns(RuntimeWarning, match="Expected a build with CUDA C"):
        assert_near(served("conv2d_24", None)(*plain), OPS.conv2d_24(*plain))

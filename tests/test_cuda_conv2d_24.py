"""The 2:4 convolution's CUDA kernel, run by the emulator and checked, against nn.functional.conv2d in float64."""

import dataclasses
import random

import emulated
import pytest
import torch
from cases import Convolution
from conftest import assert_near
from test_cuda_conv2d import ACTIVATIONS, sampled
from test_cuda_conv2d_tensor import HALVES, LARGE, device

from sparsekd.sparse import formats_24, reference


def draw(seed):
    r = random.Random(seed)
    kernel = r.choice([(1, 1), (3, 3), (1, 3), (2, 2), (3, 2)])
    dilation = (r.choice([1, 1, 2]), r.choice([1, 1, 2]))
    size = tuple(max(r.choice([1, 3, 7, 8, 9, 11]), (k - 1) * d + 1) for k, d in zip(kernel, dilation, strict=True))
    return Convolution(
        batch=r.choice([1, 1, 2, 3]),
        groups=r.choice([1, 1, 1, 2]),
        channels=r.choice([16, 16, 32, 48, 64, 80, 144]),
        filters=r.choice([1, 7, 8, 16, 24, 30, 64, 72]),
        kernel=kernel,
        stride=r.choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 2)]),
        dilation=dilation,
        padding=(r.choice([0, 0, 1, 2]), r.choice([0, 1, 1, 3])),
        size=size,
        dtype=r.choice(HALVES),
        channels_last=r.random() < 0.6,
        seed=seed,
    )


def mask_24(out, channels, kernel, generator=None):
    """Two of each four input channels, drawn at random."""
    scores = torch.rand(out, channels // 4, 4, *kernel, generator=generator)
    return (scores.argsort(2).argsort(2) < 2).view(out, channels, *kernel)


def operands(case):
    generator = torch.Generator().manual_seed(case.seed)
    weight = torch.randn(case.weight_shape, generator=generator)
    mask = mask_24(case.groups * case.filters, case.channels, case.kernel, generator)
    values, metadata = formats_24.pack_24(weight.to(case.dtype), mask, case.groups)
    return case.input(generator), values, metadata, generator


def check(case, biased, multiprocessors=108, shared_bytes=LARGE):
    input, values, metadata, generator = operands(case)
    bias = torch.randn(case.geometry[0], generator=generator).to(case.dtype) if biased else None
    with device(8, shared_bytes, multiprocessors):
        got = emulated.in_two_orders("conv2d_24", input, values, metadata, bias, *case.geometry)
    wide = [None if t is None else t.double() for t in (input, values, bias)]
    want = reference.conv2d_24_reference(wide[0], wide[1], metadata, wide[2], *case.geometry)
    assert_near(got, want, case.dtype, str(case))
    assert got.is_contiguous(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)


@pytest.mark.parametrize("seed", sampled(range(80), 64))
def test_against_the_oracle(seed):
    check(draw(seed), biased=seed % 2)


# Tiles of a block: output channels and pixels, and groups of warps; and filters, kernel, size and multiprocessors where
# it is the cheapest.
TILES = {
    (128, 128, 1): (128, 3, 16, 1),
    (64, 64, 2): (64, 3, 16, 1),
    (128, 64, 3): (128, 3, 8, 108),
    (64, 64, 1): (64, 1, 16, 108),
}


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(tile):
    (rows, pixels, groups), (filters, kernel, size, multiprocessors) = tile, TILES[tile]
    case = dataclasses.replace(draw(0), filters=filters, channels=80, stride=(1, 1), dilation=(1, 1), groups=1, batch=1)
    case = dataclasses.replace(case, kernel=(kernel, kernel), padding=(kernel // 2,) * 2, size=(size, size))
    check(case, True, multiprocessors, LARGE)
    assert emulated.emulator().functions.emulator_last_shared_bytes() == 48 * groups * (
        rows * 4 + pixels * 8 + rows // 2
    )


@pytest.mark.parametrize("filters", [24, 30])
def test_fused_against_the_oracle(filters):
    case = dataclasses.replace(draw(filters), filters=filters, groups=2, channels=32, size=(9, 11))
    input, values, metadata, generator = operands(case)
    plain = reference.conv2d_24_reference(input.double(), values.double(), metadata, None, *case.geometry)
    scale, shift = (torch.randn(case.geometry[0], generator=generator).to(case.dtype) for _ in range(2))
    residual = torch.randn(plain.shape, generator=generator).to(case.dtype)
    finish = (scale, shift, residual, ACTIVATIONS[filters % len(ACTIVATIONS)])
    got = emulated.in_two_orders("conv2d_24_fused", input, values, metadata, *finish, *case.geometry)
    wide = [t.double() for t in (input, values)], [t.double() for t in finish[:3]]
    want = reference.conv2d_24_fused_reference(*wide[0], metadata, *wide[1], finish[3], *case.geometry)
    assert_near(got, want, case.dtype, str(case))


def test_forged_metadata_reads_no_foreign_memory():
    """Any bits choose among four values in registers; the checker would tell of an access that they misled."""
    case = dataclasses.replace(draw(1), channels=80, filters=24)
    input, values, metadata, generator = operands(case)
    for forged in (torch.zeros_like(metadata), torch.full_like(metadata, -1)):
        emulated.emulator().ops.conv2d_24(input, values, forged, None, *case.geometry)
    forged = torch.randint(-(2**31), 2**31, metadata.shape, generator=generator, dtype=torch.int32)
    emulated.in_two_orders("conv2d_24", input, values, forged, None, *case.geometry)


def test_infinities_stay_with_the_pixels_that_read_them():
    """What fills up a tile is multiplied by zero, and 0 * inf is no number: it must not be an activation."""
    case = dataclasses.replace(draw(3), kernel=(1, 1), stride=(1, 1), padding=(0, 0), size=(5, 5), channels=80)
    case = dataclasses.replace(case, batch=1, groups=1, filters=24)
    input, values, metadata, _ = operands(case)
    input[:, :, 2, 2] = torch.inf
    got = emulated.emulator().ops.conv2d_24(input, values, metadata, None, *case.geometry)
    finite = got.isfinite()
    assert finite.sum() == 24 * 24 and not finite[:, :, 2, 2].any()


@pytest.mark.parametrize(
    "major, shared_bytes, says",
    [(7, LARGE, "compute capability 8.0 or later for 2:4 weights, got 7.x"), (8, 16 << 10, "48 KiB of shared memory")],
)
def test_a_device_that_lacks_something(major, shared_bytes, says):
    case = draw(2)
    input, values, metadata, _ = operands(case)
    with device(major, shared_bytes), pytest.raises(NotImplementedError, match=f"Expected .*{says}"):
        emulated.emulator().ops.conv2d_24(input, values, metadata, None, *case.geometry)


def test_float32_is_refused():
    case = draw(2)
    input, values, metadata, _ = operands(case)
    with pytest.raises(TypeError, match="Expected input of dtype Half or BFloat16 for 2:4 weights on cuda, got Float"):
        emulated.emulator().ops.conv2d_24(input.float(), values.float(), metadata, None, *case.geometry)


def test_an_input_that_begins_within_a_vector():
    case = dataclasses.replace(draw(5), channels_last=True)
    input, values, metadata, _ = operands(case)
    shifted = torch.cat([input.new_zeros(1), input.permute(0, 2, 3, 1).flatten()])[1:]
    n, c, h, w = input.shape
    shifted = shifted.view(n, h, w, c).permute(0, 3, 1, 2)
    assert shifted.data_ptr() % 16
    arguments = values, metadata, None, *case.geometry
    assert torch.equal(
        emulated.emulator().ops.conv2d_24(shifted, *arguments), emulated.emulator().ops.conv2d_24(input, *arguments)
    )


def test_what_memory_is_asked_for():
    """Shared memory without bank conflicts, and global memory in whole sectors."""
    case = dataclasses.replace(draw(0), filters=128, channels=64, kernel=(3, 3), stride=(1, 1), dilation=(1, 1))
    case = dataclasses.replace(case, padding=(1, 1), size=(16, 16), groups=1, batch=1, channels_last=True)
    input, values, metadata, _ = operands(case)
    with emulated.counting(), device(8, LARGE, 1):
        emulated.emulator().ops.conv2d_24(input, values, metadata, None, *case.geometry)
        costs = emulated.costs("conv2d_24")
    for (space, kind, size), (actual, ideal) in costs.items():
        assert actual <= 1.05 * ideal, f"{space} {kind} of {size} bytes: {actual} of {ideal}"
    assert ("shared", "read", 16) in costs and ("global", "write", 16) in costs

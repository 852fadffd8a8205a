"""conv2d on tensor cores, run by the emulator and checked, against nn.functional.conv2d in float64."""

import contextlib
import ctypes
import dataclasses
import random

import emulated
import pytest
import torch
from conftest import assert_near
from test_cuda_conv2d import ACTIVATIONS, Case, operands

from sparsekd.sparse import formats, reference

LARGE, SMALL = 163 << 10, 99 << 10  # shared memory of a block on 8.0 and on 8.6
HALVES = [torch.float16, torch.bfloat16]


def draw(seed):
    r = random.Random(seed)
    kernel = r.choice([(1, 1), (3, 3), (3, 3), (1, 3), (2, 2), (5, 5)])
    dilation = (r.choice([1, 1, 2]), r.choice([1, 1, 2]))
    size = tuple(max(r.choice([1, 3, 7, 8, 9, 14, 17]), (k - 1) * d + 1) for k, d in zip(kernel, dilation, strict=True))
    vector = r.choice([8, 8, 16, 16, 32, 64, 9, 24, 80])
    return Case(
        batch=r.choice([1, 1, 2, 3, 8, 9]),
        groups=r.choice([1, 1, 1, 2]),
        channels=r.choice([1, 2, 9, 17, 40]),
        filters=vector * r.choice([1, 2, 3]) - r.choice([0, 0, 1, vector - 1]),
        kernel=kernel,
        stride=r.choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 2)]),
        dilation=dilation,
        padding=(r.choice([0, 0, 1, 2]), r.choice([0, 1, 1, 3])),
        size=size,
        vector=vector,
        density=r.choice([0.02, 0.1, 0.3, 1.0]),
        permuted=r.random() < 0.3,
        shuffled=r.random() < 0.3,
        dtype=r.choice(HALVES),
        channels_last=r.random() < 0.3,
        seed=seed,
    )


def calls():
    """(on tensor cores, on CUDA cores instead)"""
    counts = [ctypes.c_int64(), ctypes.c_int64()]
    emulated.emulator().functions.sparsekd_conv2d_calls(*map(ctypes.byref, counts))
    return tuple(count.value for count in counts)


@contextlib.contextmanager
def device(major, shared_bytes=LARGE, multiprocessors=108):
    set_device = emulated.emulator().functions.emulator_set_device
    set_device(major, shared_bytes, multiprocessors)
    try:
        yield
    finally:
        set_device(8, LARGE, 108)


@pytest.mark.parametrize("seed", [*range(16), *(pytest.param(s, marks=pytest.mark.slow) for s in range(16, 80))])
def test_against_the_oracle(seed):
    case = draw(seed)
    input, values, crow, col, rows, geometry, generator = operands(case)
    bias = torch.randn(geometry[0], generator=generator).to(case.dtype) if seed % 2 else None
    before = calls()
    # On few multiprocessors a block of threads goes on from tile to tile.
    with device(8, SMALL if seed % 3 == 0 else LARGE, 1 if seed % 4 < 3 else 108):
        got = emulated.in_two_orders("conv2d", input, values, crow, col, rows, None, bias, *geometry)
    assert calls() == (before[0] + 2, before[1])
    wide = [None if t is None else t.double() for t in (input, values, bias)]
    want = reference.conv2d_reference(wide[0], wide[1], crow, col, rows, wide[2], *geometry)
    assert_near(got, want, case.dtype, str(case))


@pytest.mark.parametrize(
    "seed", [*range(200, 216), *(pytest.param(s, marks=pytest.mark.slow) for s in range(216, 280))]
)
def test_whole_rows_against_the_oracle(seed):
    """Images whose rows lie one behind the other, wide enough that a tile of them does not compute more than others."""
    r = random.Random(seed)
    size = r.choice([6, 7, 9, 14, 23]), r.choice([6, 7, 13, 14, 14, 28, 29])
    case = dataclasses.replace(draw(seed), size=size, batch=r.choice([1, 3, 8, 8, 9, 16]), channels_last=False)
    padding, stride, dilation = (
        r.choice([(0, 0), (1, 1)]),
        r.choice([(1, 1), (1, 1), (2, 2)]),
        r.choice([(1, 1), (2, 1)]),
    )
    case = dataclasses.replace(
        case, padding=padding, stride=stride, dilation=dilation, kernel=r.choice([(1, 1), (3, 3)])
    )
    case = dataclasses.replace(case, channels=min(case.channels, 17), density=min(case.density, 0.3))
    input, values, crow, col, rows, geometry, generator = operands(case)
    scale, shift = (torch.randn(geometry[0], generator=generator).to(case.dtype) for _ in range(2))
    plain = reference.conv2d_reference(input.double(), values.double(), crow, col, rows, None, *geometry)
    residual = torch.randn(plain.shape, generator=generator).to(case.dtype)
    finish = (scale, shift, residual if seed % 2 else None, ACTIVATIONS[seed % len(ACTIVATIONS)])
    with device(8, SMALL if seed % 3 == 0 else LARGE, 1 if seed % 4 < 3 else 108):
        got = emulated.in_two_orders("conv2d_fused", input, values, crow, col, rows, *finish, *geometry)
    wide = [None if t is None else t.double() for t in (input, values, *finish[:3])]
    want = reference.conv2d_fused_reference(wide[0], wide[1], crow, col, rows, *wide[2:], finish[3], *geometry)
    assert_near(got, want, case.dtype, str(case))


@pytest.mark.parametrize("vector", [8, 16, 32, 64])
def test_fused_against_the_oracle(vector):
    case = dataclasses.replace(draw(vector), vector=vector, filters=vector + 3, density=0.3, size=(9, 11), groups=2)
    input, values, crow, col, rows, geometry, generator = operands(case)
    plain = reference.conv2d_reference(input.double(), values.double(), crow, col, rows, None, *geometry)
    scale, shift = (torch.randn(geometry[0], generator=generator).to(case.dtype) for _ in range(2))
    residual = torch.randn(plain.shape, generator=generator).to(case.dtype)
    finish = (scale, shift, residual, ACTIVATIONS[vector % len(ACTIVATIONS)])
    got = emulated.in_two_orders("conv2d_fused", input, values, crow, col, rows, *finish, *geometry)
    wide = [t.double() for t in (input, values)], [t.double() for t in finish[:3]]
    want = reference.conv2d_fused_reference(*wide[0], crow, col, rows, *wide[1], finish[3], *geometry)
    assert_near(got, want, case.dtype, str(case))


def layer(vector, channels=16, filters=None, seed=0, density=0.2):
    generator = torch.Generator().manual_seed(seed)
    filters = filters or 2 * vector
    mask = (torch.rand(filters // vector, channels, 3, 3, generator=generator) < density).repeat_interleave(vector, 0)
    weight = torch.randn(mask.shape, generator=generator)
    values, crow, col, rows = formats.pack(weight, mask, vector)
    return values.half(), crow, col, mask, (filters, (3, 3), (1, 1), (1, 1), (1, 1), 1)


@pytest.mark.parametrize("vector", [8, 16])
def test_infinities_stay_with_the_rows_that_read_them(vector):
    """What fills up a matrix is multiplied by zero, and 0 * inf is no number: it must not be an activation."""
    values, crow, col, mask, geometry = layer(vector, filters=8 * vector, density=0.05)
    for channel in range(16):  # any may lie where the staged planes begin
        input = torch.ones(2, 16, 5, 5, dtype=torch.float16)
        input[:, channel] = torch.inf
        got = emulated.emulator().ops.conv2d(input, values, crow, col, None, None, None, *geometry)
        untouched = ~mask[:, channel].flatten(1).any(1)
        assert 0 < untouched.sum() < len(untouched), "the pattern should have rows with and without that channel"
        assert got[:, untouched].isfinite().all(), f"channel {channel}"


@pytest.mark.parametrize("channels", [24, 300])
def test_tile_after_tile(channels):
    """With one buffer for all channels, and with many blocks of them."""
    values, crow, col, _, geometry = layer(16, channels=channels, density=0.02 if channels == 300 else 0.2)
    input = torch.randn(2, channels, 17, 9, dtype=torch.float16)
    with device(8, SMALL, 1):
        got = emulated.in_two_orders("conv2d", input, values, crow, col, None, None, None, *geometry)
    want = reference.conv2d_reference(input.double(), values.double(), crow, col, None, None, *geometry)
    assert_near(got, want, torch.float16)


def test_without_tensor_cores_it_runs_on_cuda_cores_and_says_so(capfd):
    values, crow, col, _, geometry = layer(8)
    input = torch.randn(1, 16, 5, 5, dtype=torch.float16)
    before = calls()
    torch.set_warn_always(True)
    with device(7):
        got = emulated.emulator().ops.conv2d(input, values, crow, col, None, None, None, *geometry)
    torch.set_warn_always(False)
    assert calls() == (before[0], before[1] + 1)
    assert "expected compute capability 8.0 or later, got 7" in capfd.readouterr().err
    want = reference.conv2d_reference(input.double(), values.double(), crow, col, None, None, *geometry)
    assert_near(got, want, torch.float16)


def test_wrong_indices_read_no_foreign_memory():
    values, crow, col, _, geometry = layer(16)
    input = torch.randn(1, 16, 5, 5, dtype=torch.float16)
    for wrong_crow, wrong_col in [(crow, col + 10_000), (crow, col - 10_000), (crow * 1000, col), (crow - 50, col)]:
        emulated.emulator().ops.conv2d(input, values, wrong_crow, wrong_col, None, None, None, *geometry)

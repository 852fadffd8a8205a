"""conv2d's CUDA kernels, run by the emulator and checked, against nn.functional.conv2d in float64."""

import contextlib
import ctypes
import dataclasses
import random
import re

import emulated
import pytest
import torch
from cases import Convolution
from conftest import assert_near
from torch._prims_common import suggest_memory_format

from sparsekd.sparse import formats, reference


def sampled(seeds, count):
    """The first ``count`` run in `make test`, all of them in `make test-all`."""
    return [pytest.param(seed, marks=[] if i < count else pytest.mark.slow) for i, seed in enumerate(seeds)]


ACTIVATIONS = list(reference.ACTIVATIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(Convolution):
    """One convolution, in the arguments of the packer and of the operator."""

    vector: int
    density: float
    permuted: bool
    shuffled: bool  # columns of a row in any order


def draw(seed):
    r = random.Random(seed)
    kernel = r.choice([(1, 1), (3, 3), (3, 3), (1, 3), (2, 2), (5, 5)])
    dilation = (r.choice([1, 1, 2]), r.choice([1, 1, 2]))
    size = tuple(max(r.choice([1, 3, 7, 8, 9, 14, 17]), (k - 1) * d + 1) for k, d in zip(kernel, dilation, strict=True))
    return Case(
        batch=r.choice([1, 1, 2, 3, 8, 16, 16, 17]),
        groups=r.choice([1, 1, 1, 2, 3]),
        channels=r.choice([1, 2, 3, 5, 9, 17]),
        filters=r.choice([1, 2, 3, 5, 8, 11]),
        kernel=kernel,
        stride=r.choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 2)]),
        dilation=dilation,
        padding=(r.choice([0, 0, 1, 2]), r.choice([0, 1, 1, 3])),
        size=size,
        vector=r.choice([1, 1, 2, 3, 4, 5, 8, 16]),
        density=r.choice([0.0, 0.05, 0.3, 0.3, 1.0]),
        permuted=r.random() < 0.3,
        shuffled=r.random() < 0.3,
        dtype=r.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
        channels_last=r.random() < 0.2,
        seed=seed,
    )


def operands(case):
    generator = torch.Generator().manual_seed(case.seed)
    shape, per_group = case.weight_shape, case.filters
    columns = case.channels * case.kernel[0] * case.kernel[1]
    packed = -(-per_group // case.vector)
    kept = torch.rand(case.groups, packed, columns, generator=generator) < case.density
    kept[:, packed // 2] = False  # a row without non-zeros
    mask = kept.repeat_interleave(case.vector, 1)[:, :per_group].reshape(shape)
    weight = torch.randn(shape, generator=generator)
    permute = False
    if case.permuted:
        order = [torch.randperm(per_group, generator=generator) + g * per_group for g in range(case.groups)]
        permute = torch.cat(order).to(torch.int32)
        mask = torch.empty_like(mask).index_copy_(0, permute.long(), mask)
    values, crow, col, rows = formats.pack(weight, mask, case.vector, case.groups, permute)
    if case.shuffled:
        for begin, end in zip(crow[:-1].tolist(), crow[1:].tolist(), strict=True):
            order = torch.randperm(end - begin, generator=generator) + begin
            values[begin:end], col[begin:end] = values[order], col[order]
    return case.input(generator), values.to(case.dtype), crow, col, rows, case.geometry, generator


@pytest.mark.parametrize("seed", range(80))
def test_against_the_oracle(seed):
    case = draw(seed)
    input, values, crow, col, rows, geometry, generator = operands(case)
    bias = torch.randn(geometry[0], generator=generator).to(case.dtype) if seed % 2 else None
    got = emulated.in_two_orders("conv2d", input, values, crow, col, rows, None, bias, *geometry)
    wide = [None if t is None else t.double() for t in (input, values, bias)]
    want = reference.conv2d_reference(wide[0], wide[1], crow, col, rows, wide[2], *geometry)
    assert_near(got, want, case.dtype, str(case))
    assert got.is_contiguous(memory_format=suggest_memory_format(input))


def draw_wide(seed):
    """What is computed by runs of positions rather than by rectangles, most of the time."""
    r = random.Random(seed)
    size = r.choice([5, 6, 7, 9, 14, 23]), r.choice([7, 14, 17, 28, 29, 41])
    batch, vector = r.choice([1, 2, 3, 4, 4, 4, 5, 8]), r.choice([1, 1, 2, 2, 4, 4, 8])
    kernel, dilation = r.choice([(1, 1), (3, 3), (3, 3), (3, 3), (1, 3), (2, 2)]), r.choice([(1, 1), (1, 1), (2, 1)])
    case = dataclasses.replace(draw(seed), size=size, batch=batch, vector=vector, kernel=kernel, dilation=dilation)
    channels, stride = min(case.channels, 5), r.choice([(1, 1), (1, 1), (1, 1), (2, 1), (2, 2)])
    return dataclasses.replace(
        case, channels=channels, stride=stride, padding=r.choice([(0, 0), (1, 1), (1, 1), (0, 2)])
    )


@pytest.mark.parametrize("seed", sampled(range(500, 660), 50))
def test_runs_against_the_oracle(seed):
    case = dataclasses.replace(draw_wide(seed), channels_last=False)
    input, values, crow, col, rows, geometry, generator = operands(case)
    scale, shift = (torch.randn(geometry[0], generator=generator).to(case.dtype) for _ in range(2))
    plain = reference.conv2d_reference(input.double(), values.double(), crow, col, rows, None, *geometry)
    residual = torch.randn(plain.shape, generator=generator).to(case.dtype) if seed % 2 else None
    got = emulated.in_two_orders(
        "conv2d_fused", input, values, crow, col, rows, scale, shift, residual, "relu", *geometry
    )
    added = residual.double() if seed % 2 else None
    want = reference.conv2d_fused_reference(
        input.double(), values.double(), crow, col, rows, scale.double(), shift.double(), added, "relu", *geometry
    )
    assert_near(got, want, case.dtype, str(case))


HEADER = (emulated.ROOT / "csrc" / "cuda" / "conv2d.h").read_text()
VARIANTS = re.findall(r"\{(\d[\d, ]*)\}", HEADER.partition("kConv2dVariants[] = {")[2].partition("};")[0])


@contextlib.contextmanager
def variant_alone(index):
    chosen = ctypes.c_int.in_dll(emulated.emulator().functions, "emulator_conv2d_variant")
    chosen.value = index
    try:
        yield
    finally:
        chosen.value = -1


@pytest.mark.parametrize("seed", sampled(range(60), 2))
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=lambda i: VARIANTS[i].replace(", ", "-"))
def test_each_variant_against_the_oracle(index, seed):
    """Whatever the host side would choose; what a variant can't take (runs are of rows side by side) is drawn anew."""
    vector = int(VARIANTS[index].partition(",")[0])
    for attempt in range(20):
        r = random.Random(1000 * attempt + 100 * index + seed)
        case = dataclasses.replace(
            draw_wide(r.randrange(10**6)),
            vector=r.choice({1: [1], 2: [2], 4: [3, 4], 8: [5, 8, 16]}[vector]),
            channels_last=False,
            filters=r.choice([5, 16, 40]),
            density=r.choice([0.1, 0.5, 1.0]),
        )
        if vector == 8:
            case = dataclasses.replace(case, dtype=torch.float32)
        input, values, crow, col, rows, geometry, _ = operands(case)
        with variant_alone(index):
            try:
                got = emulated.in_two_orders("conv2d", input, values, crow, col, rows, None, None, *geometry)
            except NotImplementedError:
                continue
        want = reference.conv2d_reference(input.double(), values.double(), crow, col, rows, None, *geometry)
        assert_near(got, want, case.dtype, str(case))
        return
    raise AssertionError("Expected a case for the variant, got none")


@pytest.mark.parametrize("vector", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(7, 7), (8, 14)], ids=str)
def test_parts_of_a_warp_share_out_rows_of_any_length(size, vector):
    """Few positions: a warp's parts take non-zeros in turn, and those left over are computed by all."""
    generator = torch.Generator().manual_seed(vector)
    mask = torch.zeros(12, 27, dtype=torch.bool)
    for length, row in enumerate(mask):
        row[torch.randperm(27, generator=generator)[:length]] = True
    mask = mask.repeat_interleave(vector, 0).reshape(-1, 3, 3, 3)
    weight = torch.randint(-4, 5, mask.shape, generator=generator).float()  # sums are exact in any order
    values, crow, col, rows = formats.pack(weight, mask, vector, 1)
    input = torch.randint(-8, 9, (1, 3, *size), generator=generator).float()
    geometry = mask.shape[0], (3, 3), (1, 1), (1, 1), (1, 1), 1
    got = emulated.in_two_orders("conv2d", input, values, crow, col, rows, None, None, *geometry)
    want = torch.nn.functional.conv2d(input, weight * mask, padding=1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("vector", [1, 2])
def test_long_rows_are_sorted_by_several_warps(vector):
    """More entries than the warps of a block of threads hold at once, beside short rows and many rows to rank."""
    generator = torch.Generator().manual_seed(vector)
    mask = torch.zeros(3, 1100 * 2, dtype=torch.bool)
    mask[0], mask[2, ::7] = True, True
    mask = mask.repeat_interleave(vector, 0).reshape(-1, 1100, 1, 2)
    weight = torch.randint(-4, 5, mask.shape, generator=generator).float()  # sums are exact in any order
    values, crow, col, rows = formats.pack(weight, mask, vector, 1)
    input = torch.randint(-8, 9, (1, 1100, 2, 3), generator=generator).float()
    geometry = mask.shape[0], (1, 2), (1, 1), (0, 0), (1, 1), 1
    got = emulated.in_two_orders("conv2d", input, values, crow, col, rows, None, None, *geometry)
    assert torch.equal(got, torch.nn.functional.conv2d(input, weight * mask))


@pytest.mark.parametrize("seed", range(100, 110))
def test_fused_against_the_oracle(seed):
    case = draw(seed)
    input, values, crow, col, rows, geometry, generator = operands(case)
    plain = reference.conv2d_reference(input.double(), values.double(), crow, col, rows, None, *geometry)
    scale, shift = (torch.randn(geometry[0], generator=generator).to(case.dtype) for _ in range(2))
    residual = torch.randn(plain.shape, generator=generator).to(case.dtype)
    activation = ACTIVATIONS[seed % len(ACTIVATIONS)]
    got = emulated.in_two_orders(
        "conv2d_fused", input, values, crow, col, rows, scale, shift, residual, activation, *geometry
    )
    wide = [t.double() for t in (input, values)], [t.double() for t in (scale, shift, residual)]
    want = reference.conv2d_fused_reference(*wide[0], crow, col, rows, *wide[1], activation, *geometry)
    assert_near(got, want, case.dtype, str(case))


@pytest.mark.parametrize("seed", sampled(range(900, 960), 12))
def test_planes_in_one_piece(seed):
    """1 x 1 convolutions, whose lanes are neighbours in a plane and not images."""
    r = random.Random(seed)
    size = r.choice([(2, 2), (4, 1), (1, 12), (14, 14), (8, 7), (28, 28), (6, 23)])
    case = dataclasses.replace(
        draw(seed), kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), size=size, channels_last=False
    )
    case = dataclasses.replace(case, dtype=torch.float32, filters=r.choice([1, 5, 16, 40, 70]))
    input, values, crow, col, rows, geometry, generator = operands(case)
    shift = torch.randn(geometry[0], generator=generator)
    residual = torch.randn(case.batch, geometry[0], *size, generator=generator) if seed % 2 else None
    activation = r.choice(["none", "relu", "relu6", "silu"])
    arguments = (shift, residual, activation)
    got = emulated.in_two_orders("conv2d_fused", input, values, crow, col, rows, None, *arguments, *geometry)
    wide = [None if t is None else t.double() for t in (input, values, shift, residual)]
    want = reference.conv2d_fused_reference(*wide[:2], crow, col, rows, None, *wide[2:], activation, *geometry)
    assert_near(got, want, case.dtype, str(case))


@pytest.mark.parametrize("seed", sampled(range(200, 280), 20))
def test_input_grad_against_the_oracle(seed):
    check_input_grad(draw(seed), seed)


@pytest.mark.parametrize("seed", sampled(range(700, 780), 24))
def test_interleaved_input_grad_against_the_oracle(seed):
    """Of stride 2, whose four phases one launch computes."""
    r = random.Random(seed)
    case = dataclasses.replace(draw_wide(seed), stride=(2, 2), batch=r.choice([1, 2, 4, 5, 8, 16]))
    check_input_grad(
        dataclasses.replace(case, size=(r.choice([5, 6, 12, 13, 28]), r.choice([7, 14, 28, 41, 56]))), seed
    )


def check_input_grad(case, seed):
    input, values, crow, col, rows, geometry, generator = operands(case)
    plain = reference.conv2d_reference(input.double(), values.double(), crow, col, rows, None, *geometry)
    grad_output = torch.randn(plain.shape, generator=generator).to(case.dtype)
    if case.channels_last:
        grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    transpose = None
    if seed % 2:
        taps = case.kernel[0] * case.kernel[1]
        sizes = (case.vector, geometry[0], input.shape[1], taps, case.groups)
        transpose = emulated.emulator().ops.transpose_pattern(crow, col, rows, *sizes)
    size = tuple(input.shape)
    got = emulated.in_two_orders(
        "conv2d_input_grad", grad_output, values, crow, col, rows, transpose, size, *geometry[1:]
    )
    want = reference.conv2d_input_grad_reference(
        grad_output.double(), values.double(), crow, col, rows, size, *geometry[1:]
    )
    assert_near(got, want, case.dtype, str(case))
    assert got.is_contiguous(memory_format=suggest_memory_format(grad_output))


@pytest.mark.parametrize("seed", sampled(range(300, 380), 20))
def test_weight_grad_against_the_oracle(seed):
    case = draw(seed)
    input, values, crow, col, rows, geometry, generator = operands(case)
    plain = reference.conv2d_reference(input.double(), values.double(), crow, col, rows, None, *geometry)
    grad_output = torch.randn(plain.shape, generator=generator).to(case.dtype)
    got = emulated.in_two_orders("conv2d_weight_grad", input, grad_output, crow, col, rows, case.vector, *geometry[1:])
    want = reference.conv2d_weight_grad_reference(
        input.double(), grad_output.double(), crow, col, rows, case.vector, *geometry[1:]
    )
    assert_near(got, want, case.dtype, str(case))

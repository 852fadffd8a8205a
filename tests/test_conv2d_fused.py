"""conv2d_fused against torch on the dense weight: scale, shift, residual, activation in all combinations and paths."""

import itertools
import math

import pytest
import torch
from conftest import assert_near, check_op
from test_conv2d import Case, laid_out, make

from sparsekd.sparse import ops, reference

OPS = torch.ops.sparsekd

CASES = {
    "lines": Case(batch=2, size=(9, 17), padding=(1, 1), dtype=torch.float64),
    "strips": Case(channels_per_group=40, filters_per_group=12, padding=(1, 1), size=(9, 11), layout="channels_last"),
    "images in lanes": Case(
        batch=9, channels_per_group=32, filters_per_group=16, padding=(1, 1), size=(5, 5), density=0.9
    ),
    "pixels": Case(batch=2, kernel=(1, 1), channels_per_group=16, filters_per_group=9, size=(8, 9)),
    "pixels of all images": Case(batch=5, kernel=(1, 1), channels_per_group=16, filters_per_group=9, size=(7, 7)),
    "pixels last": Case(batch=2, kernel=(1, 1), channels_per_group=16, size=(6, 6), layout="channels_last"),
    "strided": Case(stride=(2, 2), padding=(1, 1), size=(15, 15), vector=4, filters_per_group=9),
    "permuted": Case(groups=2, vector=2, permuted=True, filters_per_group=5, padding=(1, 1)),
    "permuted last": Case(groups=2, vector=2, permuted=True, filters_per_group=5, layout="channels_last", size=(6, 7)),
}


def finished(case, packed, input, has_scale, has_shift, has_residual, activation):
    """(ours, the oracle's) results."""
    channels = case.groups * case.filters_per_group
    scale = torch.randn(channels, dtype=case.dtype) if has_scale else None
    shift = torch.randn(channels, dtype=case.dtype) if has_shift else None
    indices = packed.crow_indices, packed.col_indices, packed.row_indices
    plain = (input, packed.values, *indices)
    stride, padding, dilation, groups = case.geometry
    shape = reference.conv2d_reference(*plain, None, channels, case.kernel, *case.geometry).shape
    residual = laid_out(torch.randn(shape, dtype=case.dtype), case.layout) if has_residual else None
    got = ops.conv2d_fused(
        input,
        packed.values,
        *indices[:2],
        row_indices=packed.row_indices,
        scale=scale,
        shift=shift,
        residual=residual,
        activation=activation,
        out_channels=channels,
        kernel_size=case.kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    exact = [None if t is None else t.double() for t in (input, packed.values, scale, shift, residual)]
    want = reference.conv2d_fused_reference(
        *exact[:2], *indices, *exact[2:], activation, channels, case.kernel, *case.geometry
    )
    return got, want


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_combination(case):
    input, _, packed, _ = make(case)
    for flags in itertools.product([False, True], repeat=3):
        for activation in reference.ACTIVATIONS:
            got, want = finished(case, packed, input, *flags, activation)
            assert_near(got, want, case.dtype, f"{flags} {activation}")
            if case.layout == "channels_last":
                assert got.is_contiguous(memory_format=torch.channels_last)


def one_weight():
    """A 1 x 1 convolution that passes its one channel through."""
    index = torch.tensor([0], dtype=torch.int32)
    return torch.ones(1, 1), torch.tensor([0, 1], dtype=torch.int32), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_activations_at_their_ends(activation, dtype):
    x = torch.tensor([-math.inf, -1e30, -200, -100, -88, -20, -6, -3, -1e-3, -0.0, 0.0, 1e-3, 3, 6, 20, 1e30, math.inf])
    x = torch.cat([x, torch.linspace(-8, 8, 30)]).to(dtype)
    values, crow, col = one_weight()
    got = ops.conv2d_fused(
        x.view(1, 1, 1, -1), values.to(dtype), crow, col, out_channels=1, kernel_size=1, activation=activation
    ).flatten()
    want = reference.ACTIVATIONS[activation](x.double()).to(dtype)
    if activation in ("silu", "hardswish"):  # torch's are NaN at -inf (-inf * 0); the limit, 0, is as good
        got, want = got[1:], want[1:]
    torch.testing.assert_close(got, want, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-30)


def test_nan_passes_through():
    values, crow, col = one_weight()
    x = torch.full((1, 1, 3, 7), math.nan)
    for activation in reference.ACTIVATIONS:
        assert (
            ops.conv2d_fused(x, values, crow, col, out_channels=1, kernel_size=1, activation=activation).isnan().all()
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_float32_rounded_once(dtype):
    case = Case(padding=(1, 1), dtype=dtype)
    input, _, packed, _ = make(case)
    got, want = finished(case, packed, input, True, True, True, "relu")
    assert got.dtype == dtype
    assert_near(got, want, dtype)


def test_without_a_batch():
    case = Case(padding=(1, 1))
    input, _, packed, _ = make(case)
    residual = torch.randn(1, 4, 8, 9)
    arguments = dict(out_channels=4, kernel_size=3, padding=1, activation="relu")
    pattern = packed.values, packed.crow_indices, packed.col_indices
    one = ops.conv2d_fused(input[0], *pattern, residual=residual[0], **arguments)
    assert torch.equal(one, ops.conv2d_fused(input, *pattern, residual=residual, **arguments)[0])


def sample():
    case = Case(padding=(1, 1))
    input, _, packed, _ = make(case)
    scale, shift, residual = torch.randn(4), torch.randn(4), torch.randn(1, 4, 8, 9)
    return [
        input, packed.values, packed.crow_indices, packed.col_indices, None, scale, shift, residual, "relu", 4, (3, 3),
        (1, 1), (1, 1), (1, 1), 1,
    ]  # fmt: skip


def test_opcheck():
    check_op(OPS.conv2d_fused, sample(), ())


@pytest.mark.parametrize("position", [0, 1, 5, 6, 7])
def test_a_gradient_is_refused(position):
    arguments = sample()
    arguments[position].requires_grad_()
    with pytest.raises(RuntimeError, match="Expected conv2d_fused under torch.no_grad.*use conv2d"):
        OPS.conv2d_fused(*arguments)
    with torch.no_grad():
        OPS.conv2d_fused(*arguments)


@pytest.mark.parametrize(
    "position, value, said",
    [
        (5, torch.ones(3), "Expected scale of size 4 in dimension 0"),
        (5, torch.ones(4, 1), "Expected scale with 1 dimensions"),
        (6, torch.ones(4).double(), "Expected shift of dtype Float as input, got Double"),
        (6, torch.ones(4, device="meta"), "Expected shift on cpu, got meta"),
        (7, torch.ones(1, 4, 8, 8), r"Expected a residual of the output's shape \[1, 4, 8, 9\], got \[1, 4, 8, 8\]"),
        (7, torch.ones(1, 4, 8, 9).double(), "Expected residual of dtype Float as input, got Double"),
        (8, "gelu", "Expected activation to be none, relu, relu6, silu or hardswish, got gelu"),
    ],
)
def test_what_it_refuses(position, value, said):
    arguments = sample()
    arguments[position] = value
    with pytest.raises((ValueError, TypeError), match=said):
        OPS.conv2d_fused(*arguments)


def check_sample():
    """For each instruction set (conftest.checks_under_isa)."""
    for case in CASES.values():
        test_every_combination(case)


def test_instruction_sets(isa_checks):
    assert isa_checks["conv2d_fused"] == "ok"


@pytest.mark.parametrize("kernel, padding", [((3, 3), (1, 1)), ((5, 5), (2, 2)), ((1, 1), (0, 0)), ((3, 2), (1, 0))])
@pytest.mark.parametrize("vector", [1, 4])
def test_ends_of_lines_and_images_hold_their_own(two_thread_counts, kernel, padding, vector):
    """What a vector has beyond the end of a line is overwritten, and beyond an image never written."""
    for size in ((14, 14), (7, 7), (28, 28), (5, 13), (3, 3), (40, 9), (1, 31), (2, 56), (64, 60)):
        case = Case(
            batch=2,
            channels_per_group=24,
            filters_per_group=20,
            kernel=kernel,
            padding=padding,
            size=size,
            vector=vector,
        )
        if size[0] + 2 * padding[0] < kernel[0] or size[1] + 2 * padding[1] < kernel[1]:
            continue
        input, _, packed, _ = make(case)

        def once(case=case, packed=packed, input=input):
            torch.manual_seed(1)
            return finished(case, packed, input, False, True, True, "relu")

        (one, want), (two, _) = two_thread_counts(once)
        assert_near(one, want, case.dtype, f"{size}")
        assert torch.equal(one, two), size

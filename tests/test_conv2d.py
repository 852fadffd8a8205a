"""conv2d with a sparse weight, and its gradients, against nn.functional.conv2d on the masked dense weight."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, python_under_isa
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.sparse import formats, ops, reference

OPS = torch.ops.sparsekd


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_worked_by_hand():
    # One channel of 3 x 3, two filters of 2 x 2: [[2, .], [., 3]] and [[., -1], [., .]], bias 10 and 0.
    input = torch.arange(9.0).view(1, 1, 3, 3)
    values = torch.tensor([[2.0], [3.0], [-1.0]], requires_grad=True)
    crow, col = int32(0, 2, 3), int32(0, 3, 1)
    bias = torch.tensor([10.0, 0.0], requires_grad=True)
    input.requires_grad_()
    output = ops.conv2d(input, values, crow, col, bias, out_channels=2, kernel_size=2)
    # 2 * top left + 3 * bottom right + 10, and -1 * top right
    assert output.tolist() == [[[[22, 27], [37, 42]], [[-1, -2], [-4, -5]]]]
    output.sum().backward()
    assert input.grad.tolist() == [[[[2, 1, -1], [2, 4, 2], [0, 3, 3]]]]
    assert values.grad.tolist() == [[8], [24], [12]]  # sums of the four pixels that each weight sees
    assert bias.grad.tolist() == [4, 4]


def test_transpose_pattern_worked_by_hand():
    # Two input channels, 1 x 2 taps, two rows packed as one group of V = 2: columns (c, s) = (0, 1) and (1, 0).
    plan = ops.transpose_pattern(int32(0, 2), int32(1, 2), None, vector=2, out_channels=2, in_channels=2, taps=2)
    # Channel 0 holds (row 0, tap 1), (row 1, tap 1) at places 0 and 1; channel 1 the same of tap 0 at 2 and 3.
    assert plan.tolist() == [0, 2, 4] + [1, 3, 0, 2] + [0, 1, 2, 3]


# --- against the oracle ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution, in the arguments of nn.functional.conv2d and of the packer."""

    batch: int = 1
    groups: int = 1
    channels_per_group: int = 3
    filters_per_group: int = 4
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    dilation: tuple = (1, 1)
    padding: tuple = (0, 0)
    size: tuple = (8, 9)
    vector: int = 1
    permuted: bool = False
    density: float = 0.3
    empty_rows: bool = False
    bias: bool = True
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    planned: bool = False
    seed: int = 0

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation, self.groups


def laid_out(tensor, layout):
    """The same numbers under other strides."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "every_other":
        return torch.stack([tensor, torch.full_like(tensor, math.nan)], -1).flatten(-2)[..., ::2]
    if layout == "turned":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "offset":
        return torch.cat([tensor.new_full((1,), math.nan), tensor.flatten()])[1:].view(tensor.shape)
    assert layout == "contiguous"
    return tensor


LAYOUTS = ["contiguous", "channels_last", "every_other", "turned", "offset"]


def make(case):
    """(input, dense weight with zeros, packed weight, bias) of a case."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    columns = case.channels_per_group * math.prod(case.kernel)
    packed_rows = -(-case.filters_per_group // case.vector)
    keep = torch.rand(case.groups, packed_rows, 1, columns, generator=generator) < case.density
    if case.empty_rows:
        keep &= torch.rand(case.groups, packed_rows, 1, 1, generator=generator) < 0.5
    mask = keep.expand(-1, -1, case.vector, -1).reshape(case.groups, packed_rows * case.vector, columns)
    mask = mask[:, : case.filters_per_group].reshape(-1, case.channels_per_group, *case.kernel).clone()
    out_channels, order = mask.shape[0], False
    if case.permuted:
        order = torch.cat(
            [
                torch.randperm(case.filters_per_group, generator=generator) + group * case.filters_per_group
                for group in range(case.groups)
            ]
        )
        mask[order] = mask.clone()
    weight = normal(*mask.shape) * mask
    packed = formats.pack(weight, mask, case.vector, case.groups, order)
    input = normal(case.batch, case.groups * case.channels_per_group, *case.size)
    return laid_out(input, case.layout), weight, packed, normal(out_channels) if case.bias else None


def run_op(case, input, packed, bias):
    plan = None
    if case.planned:
        plan = ops.transpose_pattern(
            *packed[1:],
            vector=case.vector,
            out_channels=case.groups * case.filters_per_group,
            in_channels=input.shape[1],
            taps=math.prod(case.kernel),
            groups=case.groups,
        )
    return ops.conv2d(
        input,
        packed.values,
        packed.crow_indices,
        packed.col_indices,
        bias,
        out_channels=case.groups * case.filters_per_group,
        kernel_size=case.kernel,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.groups,
        row_indices=packed.row_indices,
        transpose=plan,
    )


def check_case(case):
    """Output and the gradients of input, values and bias, against torch on the dense weight in float64."""
    input, weight, packed, bias = make(case)
    tensors = [t.detach().requires_grad_() for t in (input, packed.values, bias) if t is not None]
    got = run_op(case, tensors[0], packed._replace(values=tensors[1]), tensors[2] if case.bias else None)
    grad_output = torch.randn(got.shape, generator=torch.Generator().manual_seed(case.seed + 1), dtype=torch.float64)
    grad_output = grad_output.to(case.dtype)
    got_grads = torch.autograd.grad(got, tensors, laid_out(grad_output, case.layout))

    wide = [t.detach().double().requires_grad_() for t in (input, weight, bias) if t is not None]
    want = F.conv2d(wide[0], wide[1], wide[2] if case.bias else None, *case.geometry)
    want_grads = list(torch.autograd.grad(want, wide, grad_output.double()))
    want_grads[1] = formats.gather(want_grads[1], *packed[1:], case.vector, case.groups)

    assert got.dtype == case.dtype
    assert_near(got, want, case.dtype, "output")
    for what, got_grad, want_grad, tensor in zip(
        ("input gradient", "values gradient", "bias gradient"), got_grads, want_grads, tensors, strict=False
    ):
        assert got_grad.dtype == tensor.dtype
        assert_near(got_grad, want_grad, case.dtype, what)
    return got, input, weight, bias


@st.composite
def cases(draw):
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    # The padded input is at least as large as the kernel, often just so.
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    beyond = draw(st.tuples(st.sampled_from([0, 1, 2, 5, 8, 14]), st.sampled_from([0, 1, 3, 6, 9, 19])))
    depthwise = draw(st.sampled_from([False, False, True]))
    density, empty_rows = draw(st.sampled_from([(0.0, False), (0.1, False), (0.4, False), (0.4, True), (1.0, False)]))
    return Case(
        batch=draw(st.sampled_from([1, 2, 0])),
        groups=draw(st.integers(2, 6) if depthwise else st.sampled_from([1, 1, 2, 3])),
        channels_per_group=1 if depthwise else draw(st.integers(1, 7)),
        filters_per_group=draw(st.sampled_from([1, 2]) if depthwise else st.sampled_from([1, 2, 3, 5, 7, 8, 16, 17])),
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        dilation=dilation,
        padding=padding,
        size=(least[0] + beyond[0], least[1] + beyond[1]),
        vector=draw(st.sampled_from([1, 1, 2, 3, 4, 5, 8, 16])),
        permuted=draw(st.booleans()),
        density=density,
        empty_rows=empty_rows,
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        layout=draw(st.sampled_from(LAYOUTS)),
        planned=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=400)
@given(cases())
def test_random_configurations(case):
    got, input, weight, bias = check_case(case)
    if case.batch:
        assert got.stride() == F.conv2d(input, weight, bias, *case.geometry).stride()


def test_references_mean_the_same():
    # The oracle that other tests and benchmarks use is tied to torch here.
    case = Case(batch=2, groups=2, filters_per_group=5, vector=2, permuted=True, stride=(2, 1), padding=(1, 2))
    input, weight, packed, bias = make(case)
    want = F.conv2d(input, weight, bias, *case.geometry)
    assert torch.equal(reference.conv2d_reference(input, *packed, bias, 10, case.kernel, *case.geometry), want)
    grad = torch.randn_like(want)
    got = OPS.conv2d_input_grad(grad, *packed, None, input.shape, case.kernel, *case.geometry)
    assert_near(got, reference.conv2d_input_grad_reference(grad, *packed, input.shape, case.kernel, *case.geometry))
    arguments = (input, grad, *packed[1:], 2, case.kernel, *case.geometry)
    assert_near(OPS.conv2d_weight_grad(*arguments), reference.conv2d_weight_grad_reference(*arguments))


@pytest.mark.parametrize("kernel,dilation", [((3, 3), (1, 1)), ((2, 4), (1, 1)), ((4, 1), (3, 2)), ((5, 2), (2, 3))])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch tells that it copies the input for even kernels
def test_padding_by_name(kernel, dilation, padding):
    case = Case(kernel=kernel, dilation=dilation, size=(13, 11), vector=2, dtype=torch.float64)
    input, weight, packed, bias = make(case)
    got = run_op(dataclasses.replace(case, padding=padding), input, packed, bias)
    assert_near(got, F.conv2d(input, weight, bias, 1, padding, dilation))


def test_without_a_batch():
    case = Case(dtype=torch.float64)
    input, weight, packed, bias = make(case)
    got = run_op(case, input[0], packed, bias)
    assert_near(got, F.conv2d(input[0], weight, bias))


@pytest.mark.parametrize("vector", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size,channels,filters", [((32, 33), 40, 35), ((56, 56), 24, 16), ((7, 7), 160, 24)])
def test_sizes_of_several_tiles_and_blocks(vector, dtype, size, channels, filters):
    # Large enough for the kernels to cut pixels into tiles and channels into blocks; random cases are too small.
    check_case(
        Case(
            batch=3,
            channels_per_group=channels,
            filters_per_group=filters,
            size=size,
            padding=(1, 1),
            vector=vector,
            dtype=dtype,
            planned=True,
        )
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_more_images_than_lie_side_by_side(stride):
    """A weight gradient takes pixels of 1 x 1 kernels as one line, of so many images at a time; some are left."""
    for batch, vector in ((21, 1), (45, 4)):
        check_case(Case(batch=batch, kernel=(1, 1), stride=(stride, stride), size=(7 * stride,) * 2, vector=vector))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pixels_in_whole_vectors(stride, layout):
    """Those of 1 x 1 kernels a weight gradient reads where they lie, if they are an image's own and side by side."""
    size = (16 * stride, 16 * stride)
    check_case(Case(channels_per_group=5, kernel=(1, 1), stride=(stride, stride), size=size, layout=layout))


@pytest.mark.parametrize("vector", [1, 4, 16])
@pytest.mark.parametrize("stride", [1, 2])
def test_layers_of_a_real_network(vector, stride):
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        check_case(
            Case(
                batch=4,
                channels_per_group=channels,
                filters_per_group=channels,
                size=(size, size),
                padding=(1, 1),
                stride=(stride, stride),
                vector=vector,
                density=0.1,
            )
        )


def in_any_order(packed):
    """The same weight with the columns of each row group shuffled, and where each was."""
    order = []
    for begin, end in itertools.pairwise(packed.crow_indices.tolist()):
        row = list(range(begin, end))
        random.Random(begin).shuffle(row)
        order += row
    return packed._replace(values=packed.values[order], col_indices=packed.col_indices[order]), order


def test_columns_in_any_order_and_twice():
    """Kernels search among sorted columns for speed only; a column named twice counts twice."""
    case = Case(batch=2, channels_per_group=200, filters_per_group=6, size=(14, 14), density=0.5, dtype=torch.float64)
    input, _, packed, bias = make(case)
    shuffled, order = in_any_order(packed)
    assert_near(run_op(case, input, shuffled, bias), run_op(case, input, packed, bias))
    planned = dataclasses.replace(case, planned=True)
    for one in (case, planned):
        grads = []
        for weight in (packed, shuffled):
            tensors = [input.clone().requires_grad_(), weight.values.clone().requires_grad_()]
            output = run_op(one, tensors[0], weight._replace(values=tensors[1]), bias)
            grads.append(torch.autograd.grad(output.square().sum(), tensors))
        assert_near(grads[1][0], grads[0][0])
        assert_near(grads[1][1], grads[0][1][order])

    twice = ops.conv2d(
        torch.ones(1, 1, 1, 1), torch.tensor([[2.0], [3.0]]), int32(0, 2), int32(0, 0), out_channels=1, kernel_size=1
    )
    assert twice.item() == 5


def test_infinity_and_nan_reach_only_their_own_outputs():
    # Planes are padded with zeros and tiles run over the ends of lines: none of that may touch a result.
    case = Case(channels_per_group=2, filters_per_group=3, padding=(1, 1), density=1.0, layout="every_other")
    input, weight, packed, bias = make(case)
    input = input.clone()
    input[0, 0, 2, 8], input[0, 1, 7, 0] = math.inf, math.nan
    got, want = run_op(case, input, packed, bias), F.conv2d(input, weight, bias, padding=1)
    assert torch.equal(got.isfinite(), want.isfinite())
    assert_near(got[got.isfinite()], want[want.isfinite()])


def test_needs_only_the_gradients_that_are_asked_for():
    case = Case(batch=2)
    input, _, packed, bias = make(case)
    given = (input, packed.values, bias)
    for chosen in itertools.product((False, True), repeat=3):
        tensors = [t.clone().requires_grad_(wanted) for t, wanted in zip(given, chosen, strict=True)]
        output = run_op(case, tensors[0], packed._replace(values=tensors[1]), tensors[2])
        assert output.requires_grad == any(chosen)
        if any(chosen):
            output.sum().backward()
            assert tuple(t.grad is not None for t in tensors) == chosen


STRIPS = [
    Case(size=(14, 14), padding=(1, 1)),
    Case(batch=3, size=(7, 7), padding=(1, 1)),
    Case(batch=9, size=(7, 9), padding=(1, 0), vector=2),
    Case(batch=2, size=(15, 13), stride=(2, 2), padding=(1, 1)),
    Case(batch=5, size=(9, 8), stride=(3, 2), kernel=(3, 2), padding=(2, 1), permuted=True, vector=4),
    Case(batch=2, groups=2, size=(11, 10), dilation=(2, 1), padding=(2, 1), planned=True),
    Case(batch=2, size=(5, 6), kernel=(1, 1), padding=(1, 1), layout="channels_last", vector=3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", STRIPS, ids=lambda case: f"{case.batch}x{case.size[0]}x{case.size[1]}")
def test_rows_so_long_that_maps_are_cut_into_strips(case, dtype):
    """Small maps under rows of hundreds of weights: turning pixels into lanes pays (csrc/cpu/lanes.h)."""
    check_case(dataclasses.replace(case, channels_per_group=72, filters_per_group=46, density=0.5, dtype=dtype))


# --- threads and instruction sets ------------------------------------------------------------------------------------


def check_sample():
    """A few cases per width of a SIMD vector; for each instruction set (conftest.checks_under_isa)."""
    for vector, dtype in itertools.product((1, 2, 3, 4, 8, 16), (torch.float32, torch.float64)):
        for case in (
            Case(batch=2, filters_per_group=17, size=(9, 13), padding=(1, 2), stride=(2, 1), permuted=True),
            Case(channels_per_group=64, filters_per_group=24, size=(20, 21), groups=2, density=0.2),
            Case(channels_per_group=3, filters_per_group=8, size=(2, 2), kernel=(1, 1), density=1.0),
        ):
            check_case(dataclasses.replace(case, vector=vector, dtype=dtype))


def test_instruction_sets(isa_checks):
    assert isa_checks["conv2d"] == "ok"


def test_an_unknown_instruction_set_is_told():
    code = "import torch; from sparsekd.sparse import ops; ops.cpu_isa()"
    run = python_under_isa("avx1024", code)
    assert run.returncode != 0
    assert "ValueError: Expected SPARSEKD_CPU_ISA to be baseline, avx2 or avx512, got avx1024" in run.stderr
    assert python_under_isa("", code).returncode == 0  # set to nothing counts as not set

"""conv2d with a sparse weight, and its gradients, against nn.functional.conv2d on the masked dense weight."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, check_gradients, check_op, python_under_isa
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


def test_columns_in_any_order_and_twice():
    """Kernels search among sorted columns for speed only; a column named twice counts twice."""
    case = Case(batch=2, channels_per_group=200, filters_per_group=6, size=(14, 14), density=0.5, dtype=torch.float64)
    input, _, packed, bias = make(case)
    order = []
    for begin, end in itertools.pairwise(packed.crow_indices.tolist()):
        row = list(range(begin, end))
        random.Random(begin).shuffle(row)
        order += row
    shuffled = packed._replace(values=packed.values[order], col_indices=packed.col_indices[order])
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


# --- registration, gradients, precision, compiler --------------------------------------------------------------------

SAMPLES = {
    "plain": Case(),
    "channels_last": Case(batch=2, layout="channels_last", permuted=True, vector=2, filters_per_group=5),
    "strided, grouped": Case(batch=2, groups=3, stride=(2, 3), padding=(1, 2), dilation=(2, 1), layout="turned"),
    "planned": Case(planned=True, dtype=torch.float64, vector=4, filters_per_group=8, bias=False),
    "one channel": Case(channels_per_group=1, filters_per_group=1, layout="channels_last", size=(5, 5)),
    "one pixel": Case(kernel=(1, 1), size=(1, 1), layout="channels_last", batch=2),
    "empty": Case(density=0.0, bias=False),
    "no image": Case(batch=0),
    "half": Case(dtype=torch.float16, layout="channels_last"),
}


def op_arguments(case):
    """Positional arguments of conv2d, conv2d_input_grad, conv2d_weight_grad, transpose_pattern."""
    input, _, packed, bias = make(case)
    out_channels, taps = case.groups * case.filters_per_group, math.prod(case.kernel)
    pattern = (case.vector, out_channels, input.shape[1], taps, case.groups)
    plan = OPS.transpose_pattern(*packed[1:], *pattern) if case.planned else None
    geometry = (case.kernel, *case.geometry)
    output = OPS.conv2d(input, *packed, plan, bias, out_channels, *geometry)
    grad = laid_out(torch.randn(output.shape).to(case.dtype), case.layout)
    return {
        "conv2d": (input, *packed, plan, bias, out_channels, *geometry),
        "conv2d_input_grad": (grad, *packed, plan, list(input.shape), *geometry),
        "conv2d_weight_grad": (input, grad, *packed[1:], case.vector, *geometry),
        "transpose_pattern": (*packed[1:], *pattern),
    }


DIFFERENTIABLE = {"conv2d": (0, 1, 6), "conv2d_input_grad": (0, 1), "conv2d_weight_grad": (0, 1)}


@pytest.mark.parametrize("name", ["conv2d", "conv2d_input_grad", "conv2d_weight_grad", "transpose_pattern"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(name, sample):
    check_op(getattr(OPS, name), op_arguments(SAMPLES[sample])[name], DIFFERENTIABLE.get(name, ()))


SMALL = [
    Case(channels_per_group=2, filters_per_group=2, size=(3, 2), kernel=(2, 3), padding=(1, 1)),
    Case(batch=2, channels_per_group=2, filters_per_group=3, size=(3, 2), kernel=(2, 2), vector=2, permuted=True),
    Case(groups=2, channels_per_group=1, filters_per_group=3, size=(5, 4), stride=(2, 1), vector=2, layout="turned"),
    Case(size=(5, 4), channels_per_group=2, filters_per_group=2, dilation=(2, 1), layout="channels_last", planned=True),
]


@pytest.mark.parametrize("case", SMALL, ids=["plain", "permuted vectors", "strided, grouped", "planned"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck_and_gradgradcheck(name, case):
    case = dataclasses.replace(case, dtype=torch.float64, density=0.6)
    arguments = op_arguments(case)[name]
    check_gradients(getattr(OPS, name), arguments, DIFFERENTIABLE[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("vector", [1, 4])
def test_half_types_are_float32_rounded_once(dtype, layout, vector):
    case = Case(batch=2, padding=(1, 1), stride=(2, 1), dtype=dtype, layout=layout, vector=vector)
    got, *_ = check_case(case)
    input, _, packed, bias = make(case)
    wide = run_op(case, input.float(), packed._replace(values=packed.values.float()), bias.float())
    assert torch.equal(got, wide.to(dtype))


def gradients(function, input, values, bias):
    tensors = [t.detach().requires_grad_() for t in (input, values, bias)]
    output = function(*tensors)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return output, *torch.autograd.grad((output * weights).sum(), tensors)


@pytest.mark.parametrize(
    "case,backend,dynamic",
    [
        (Case(batch=2, padding=(1, 1), vector=2, filters_per_group=6, planned=True), "inductor", None),
        (Case(batch=2, stride=(2, 1), layout="channels_last", permuted=True), "aot_eager", None),
        (Case(batch=3, groups=3, dilation=(1, 2), dtype=torch.float64), "aot_eager", True),
        (Case(padding="same", kernel=(2, 4), vector=4, filters_per_group=5), "aot_eager", None),
    ],
    ids=["inductor", "channels_last", "dynamic", "same"],
)
def test_compiled_equals_eager(case, backend, dynamic):
    torch._dynamo.reset()
    input, _, packed, bias = make(case)
    plan = None
    if case.planned:
        plan = OPS.transpose_pattern(*packed[1:], case.vector, 6, 3, 9, 1)

    def function(input, values, bias):
        # Something before and after, for the compiler to fuse with.
        output = ops.conv2d(
            input * 2,
            values,
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
        return output.relu()

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (input, torch.cat([input, input])[1:]) if dynamic else (input,):
        want, got = (gradients(f, batch, packed.values, bias) for f in (function, compiled))
        for left, right in zip(got, want, strict=True):
            assert left.stride() == right.stride()
            assert_near(left, right)


# --- arguments that don't fit, and forged ones -----------------------------------------------------------------------


def test_forgeries_are_refused():
    """Straight through torch.ops, past every check in Python. Each is one sentence, and none reads foreign memory."""
    input, values, grad = torch.randn(1, 2, 5, 5), torch.randn(3, 1), torch.randn(1, 2, 3, 3)
    crow, col = int32(0, 2, 3), int32(0, 17, 9)
    plan = OPS.transpose_pattern(crow, col, None, 1, 2, 2, 9, 1)
    good = {
        "input": input,
        "values": values,
        "crow": crow,
        "col": col,
        "rows": None,
        "plan": None,
        "bias": None,
        "out_channels": 2,
        "kernel": (3, 3),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "groups": 1,
    }
    order = {
        "conv2d": [*good],
        "conv2d_input_grad": [
            *("grad", "values", "crow", "col", "rows", "plan", "size"),
            *("kernel", "stride", "padding", "dilation", "groups"),
        ],
        "conv2d_weight_grad": [
            *("input", "grad", "crow", "col", "rows", "vector"),
            *("kernel", "stride", "padding", "dilation", "groups"),
        ],
        "transpose_pattern": ["crow", "col", "rows", "vector", "out_channels", "in_channels", "taps", "groups"],
    }
    good |= {"grad": grad, "size": (1, 2, 5, 5), "vector": 1, "in_channels": 2, "taps": 9}
    for name, names in order.items():
        getattr(OPS, name)(*(good[key] for key in names))  # the unforged call works

    every, convolutions = tuple(order), tuple(order)[:3]
    packed = ("conv2d", "conv2d_input_grad")
    places = plan.clone()
    places[-1] = 3  # one past the last value
    negative = plan.clone()
    negative[-1] = -1
    far_column = plan.clone()
    far_column[3] = 2 * 9
    starts = plan.clone()
    starts[1] = 100
    forged = [
        # the pattern
        (every, {"col": int32(0, 18, 9)}, IndexError, r"Expected col_indices in 0\.\.17.*, got"),
        (every, {"col": int32(0, -1, 9)}, IndexError, r"Expected col_indices in 0\.\.17.*, got"),
        (every, {"col": int32(0, 2**31 - 1, 9)}, IndexError, r"Expected col_indices in 0\.\.17.*, got"),
        (every, {"col": int32(0, -(2**31), 9)}, IndexError, r"Expected col_indices in 0\.\.17.*, got"),
        (every, {"crow": int32(0, 4, 3)}, ValueError, "Expected non-decreasing crow_indices, got 4 before 3"),
        (every, {"crow": int32(0, -1, 3)}, ValueError, "Expected non-decreasing crow_indices, got 0 before -1"),
        (every, {"crow": int32(1, 2, 3)}, ValueError, r"Expected crow_indices\[0\] to be 0, got 1"),
        (every, {"crow": int32(0, 2, 4)}, ValueError, "Expected the last of crow_indices to be 3 .*, got 4"),
        (every, {"crow": int32(0, 2, 2)}, ValueError, "Expected the last of crow_indices to be 3 .*, got 2"),
        (every, {"crow": int32(0, 3)}, ValueError, "Expected crow_indices of size 3 .*, got shape"),
        (every, {"crow": int32()}, ValueError, "Expected crow_indices of size 3 .*, got shape"),
        (every, {"crow": crow.long()}, TypeError, "Expected crow_indices of dtype Int, got Long"),
        (every, {"col": col.long()}, TypeError, "Expected col_indices of dtype Int, got Long"),
        (every, {"col": col.float()}, TypeError, "Expected col_indices of dtype Int, got Float"),
        (every, {"col": col[:, None]}, ValueError, "Expected col_indices with 1 dimensions, got shape"),
        (every, {"crow": crow[None]}, ValueError, "Expected crow_indices with 1 dimensions, got shape"),
        (every, {"col": int32(0, 1, 17, 1, 9)[::2]}, ValueError, "Expected contiguous col_indices, got strides"),
        (every, {"rows": int32(0, 0)}, ValueError, "Expected row_indices to permute .*, got 0 at 1"),
        (every, {"rows": int32(0, 2)}, ValueError, "Expected row_indices to permute .*, got 2 at 1"),
        (every, {"rows": int32(-1, 0)}, ValueError, "Expected row_indices to permute .*, got -1 at 0"),
        (every, {"rows": int32(0)}, ValueError, "Expected row_indices of size 2 .*, got shape"),
        (every, {"rows": torch.tensor([0, 1])}, TypeError, "Expected row_indices of dtype Int, got Long"),
        (
            every,
            {"rows": int32(1, 0), "groups": 2, "col": int32(0, 8, 1)},
            ValueError,
            "Expected row_indices to permute .* of each convolution group, got 1 at 0",
        ),
        (packed, {"values": values[:2]}, ValueError, "Expected values of size 3 .*, got shape"),
        (packed, {"values": values[:, 0]}, ValueError, "Expected values with 2 dimensions, got shape"),
        (packed, {"values": values[:, :0]}, ValueError, "V >= 1, got V = 0"),
        (packed, {"values": values.double()}, TypeError, "Expected values of dtype Float .*, got Double"),
        (packed, {"values": values.long()}, TypeError, "Expected values of dtype Float .*, got Long"),
        # one tensor without numbers among those that have them
        (every, {"col": col.to("meta")}, ValueError, "Expected col_indices on cpu, got meta"),
        (every, {"rows": int32(0, 1).to("meta")}, ValueError, "Expected row_indices on cpu, got meta"),
        (packed, {"values": values.to("meta")}, ValueError, "Expected values on cpu, got meta"),
        (("conv2d",), {"bias": torch.zeros(2, device="meta")}, ValueError, "Expected bias on cpu, got meta"),
        (("conv2d_weight_grad",), {"grad": grad.to("meta")}, ValueError, "Expected grad_output on cpu, got meta"),
        (("conv2d_weight_grad", "transpose_pattern"), {"vector": 0}, ValueError, "V >= 1, got V = 0"),
        (("conv2d_weight_grad", "transpose_pattern"), {"vector": -1}, ValueError, "V >= 1, got V = -1"),
        # sizes and dtypes
        (("conv2d", "conv2d_weight_grad"), {"input": input[0]}, ValueError, "Expected an input of 4 dimensions"),
        (("conv2d", "conv2d_weight_grad"), {"input": input.int()}, TypeError, "Expected input of dtype .*, got Int"),
        (("conv2d",), {"input": input.double()}, TypeError, "Expected values of dtype Double .*, got Float"),
        (("conv2d_weight_grad",), {"grad": grad.double()}, TypeError, "Expected grad_output of dtype Float .*, got"),
        (("conv2d_input_grad",), {"grad": grad.int()}, TypeError, "Expected grad_output of dtype .*, got Int"),
        (convolutions[1:], {"grad": grad[0]}, ValueError, "Expected grad_output with 4 dimensions, got shape"),
        (convolutions[1:], {"grad": grad[..., :2]}, ValueError, r"Expected grad_output of shape \[1, 2, 3, 3\], got"),
        (("conv2d_input_grad",), {"size": (2, 2, 5, 5)}, ValueError, r"Expected grad_output of shape \[2, .*, got"),
        (("conv2d",), {"bias": torch.zeros(3)}, ValueError, "Expected bias of size 2 .*, got shape"),
        (("conv2d",), {"bias": torch.zeros(1, 2)}, ValueError, "Expected bias with 1 dimensions, got shape"),
        (("conv2d",), {"bias": torch.zeros(2).double()}, TypeError, "Expected bias of dtype Float .*, got Double"),
        (("conv2d", "transpose_pattern"), {"out_channels": 0}, ValueError, "Expected .*output channels.*, got"),
        (("conv2d", "transpose_pattern"), {"out_channels": -2}, ValueError, "Expected .*output channels.*, got"),
        (("conv2d", "transpose_pattern"), {"out_channels": 3}, ValueError, "Expected crow_indices of size 4"),
        (("transpose_pattern",), {"taps": 0}, ValueError, "at least one tap, got"),
        (("transpose_pattern",), {"in_channels": 0}, ValueError, "Expected input channels divisible by groups.*, got"),
        # geometry
        (every, {"groups": 0}, ValueError, "Expected .* divisible by groups.*, got"),
        (every, {"groups": -1}, ValueError, "Expected .* divisible by groups.*, got"),
        (every, {"groups": 3}, ValueError, "Expected .* divisible by groups.*, got"),
        (convolutions, {"stride": (0, 1)}, ValueError, "Expected two values of at least 1 .* for stride, got"),
        (convolutions, {"stride": (1, -1)}, ValueError, "Expected two values of at least 1 .* for stride, got"),
        (convolutions, {"dilation": (0, 1)}, ValueError, "Expected two values of at least 1 .* for dilation, got"),
        (convolutions, {"padding": (-1, 0)}, ValueError, "Expected two values of at least 0 .* for padding, got"),
        (convolutions, {"kernel": (3, 0)}, ValueError, "Expected two values of at least 1 .* for kernel_size, got"),
        (convolutions, {"kernel": (3, 3, 3)}, ValueError, "Expected two values of at least 1 .* for kernel_size, got"),
        (convolutions, {"kernel": (6, 3)}, ValueError, r"at least as large as the kernel \(6 in height\), got 5"),
        (convolutions, {"dilation": (1, 3)}, ValueError, r"at least as large as the kernel \(7 in width\), got 5"),
        # the plan of another pattern
        (("conv2d_input_grad",), {"plan": plan[:-1]}, ValueError, "Expected a transpose plan .*, got 8 entries"),
        (("conv2d_input_grad",), {"plan": plan[:2]}, ValueError, "Expected a transpose plan .*, got 2 entries"),
        (("conv2d_input_grad",), {"plan": int32()}, ValueError, "Expected a transpose plan .*, got 0 entries"),
        (("conv2d_input_grad",), {"plan": plan.long()}, TypeError, "Expected transpose of dtype Int .*, got Long"),
        (("conv2d_input_grad",), {"plan": places}, ValueError, "to point into 3 values, got 3"),
        (("conv2d_input_grad",), {"plan": negative}, ValueError, "to point into 3 values, got -1"),
        (("conv2d_input_grad",), {"plan": far_column}, IndexError, r"transpose plan's columns in 0\.\.17, got 18"),
        (("conv2d_input_grad",), {"plan": starts}, ValueError, "Expected .*the transpose plan's row starts.*, got"),
    ]
    for touched, changes, error, message in forged:
        for name in touched:
            with pytest.raises(error, match=message):
                result = getattr(OPS, name)(*((good | changes)[key] for key in order[name]))
                pytest.fail(f"{name} took {changes} and gave {result}")


def test_numbers_beyond_all_measure():
    """Sizes near the ends of int64, where sums and products of them would wrap around, and strides of many phases."""
    input, values = torch.randn(1, 1, 5, 5), torch.randn(1, 1)
    crow, col = int32(0, 1), int32(0)

    def call(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
        return OPS.conv2d(input, values, crow, col, None, None, None, 1, kernel, stride, padding, dilation, 1)

    for huge in (2**31, 2**40, 2**62, 2**63 - 1):
        for name in ("kernel", "stride", "padding", "dilation"):
            with pytest.raises(ValueError, match=r"Expected .*, got"):
                call(**{name: (huge, huge)})
    for huge in (2**20, 2**31, 2**62, 2**63 - 1):
        with pytest.raises(ValueError, match="Expected V of at most 1024 for 1 output channels per group, got V = "):
            OPS.transpose_pattern(crow, col, None, huge, 1, 1, 1, 1)
    # Large but possible: one output pixel.
    stride = (2**31 - 1, 40000)
    want = input[:, :, :1, :1] * values
    assert_near(call(stride=stride), want)
    grad = torch.ones(1, 1, 1, 1)
    got = OPS.conv2d_input_grad(grad, values, crow, col, None, None, (1, 1, 5, 5), (1, 1), stride, (0, 0), (1, 1), 1)
    assert got[0, 0, 0, 0] == values[0, 0] and got.count_nonzero() == 1


def test_devices_without_a_kernel():
    values, crow, col = torch.randn(1, 1), int32(0, 1), int32(0)

    class Elsewhere(torch.Tensor):
        device = torch.device("xpu:0")

    with pytest.raises(NotImplementedError, match="Expected input on cpu, got xpu:0"):
        ops.conv2d(torch.randn(1, 1, 2, 2).as_subclass(Elsewhere), values, crow, col, out_channels=1, kernel_size=1)
    # On meta there are shapes but no numbers.
    meta = ops.conv2d(
        *(t.to("meta") for t in (torch.randn(2, 1, 5, 5), values, crow, col)), out_channels=1, kernel_size=3
    )
    assert meta.is_meta and meta.shape == (2, 1, 3, 3)


def test_python_arguments():
    values, crow, col = torch.randn(1, 1), int32(0, 1), int32(0)
    input = torch.randn(1, 1, 4, 4)

    def call(input=input, **changes):
        return ops.conv2d(input, values, crow, col, **{"out_channels": 1, "kernel_size": 1} | changes)

    for wrong in (torch.randn(4, 4), torch.randn(1, 1, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"Expected an input of 3 or 4 dimensions .*, got shape"):
            call(wrong)
    with pytest.raises(ValueError, match='Expected padding to be numbers, "same" or "valid", got \'full\''):
        call(padding="full")
    with pytest.raises(ValueError, match='Expected stride 1 with padding="same", got'):
        call(padding="same", stride=2)


# --- threads and instruction sets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("vector", [1, 4])
def test_the_same_bits_on_any_number_of_threads(two_thread_counts, batch, vector):
    case = Case(
        batch=batch,
        channels_per_group=48,
        filters_per_group=40,
        size=(21, 19),
        padding=(1, 1),
        vector=vector,
        planned=True,
    )
    input, _, packed, bias = make(case)

    def function(input, values, bias):
        return run_op(case, input, packed._replace(values=values), bias)

    one, two = two_thread_counts(lambda: gradients(function, input, packed.values, bias)[:3])
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left, right)


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

"""linear with a sparse weight, and its gradients, against nn.functional.linear on the masked dense weight."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, check_gradients, check_op
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.sparse import formats, ops, reference

OPS = torch.ops.sparsekd


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_worked_by_hand():
    # weight [[2, ., 3], [., ., .], [., 4, .]]
    input = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]], requires_grad=True)
    values = torch.tensor([[2.0], [3.0], [4.0]], requires_grad=True)
    bias = torch.tensor([0.5, 7.0, 0.0], requires_grad=True)
    output = ops.linear(input, values, int32(0, 2, 2, 3), int32(0, 2, 1), bias, out_features=3)
    assert output.tolist() == [[302.5, 7, 40], [604.5, 7, 80]]
    output.sum().backward()
    assert input.grad.tolist() == [[2, 4, 3]] * 2
    assert values.grad.tolist() == [[3], [300], [30]]
    assert bias.grad.tolist() == [2, 2, 2]


@dataclasses.dataclass(frozen=True)
class Case:
    """One linear layer."""

    leading: tuple = (5,)  # the input's shape without its features
    in_features: int = 12
    out_features: int = 7
    vector: int = 1
    permuted: bool = False
    density: float = 0.3
    bias: bool = True
    dtype: torch.dtype = torch.float32
    turned: bool = False  # features not the fastest dimension in memory
    planned: bool = False
    seed: int = 0


def make(case):
    """(input, dense weight with zeros, packed weight, bias) of a case."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    packed_rows = -(-case.out_features // case.vector)
    keep = torch.rand(packed_rows, 1, case.in_features, generator=generator) < case.density
    mask = keep.expand(-1, case.vector, -1).reshape(-1, case.in_features)[: case.out_features].clone()
    order = False
    if case.permuted:
        order = torch.randperm(case.out_features, generator=generator)
        mask[order] = mask.clone()
    weight = normal(*mask.shape) * mask
    input = normal(*case.leading, case.in_features)
    if case.turned:
        input = input.movedim(-1, 0).contiguous().movedim(0, -1)
    return input, weight, formats.pack(weight, mask, case.vector, 1, order), normal(case.out_features)


def run_op(case, input, packed, bias):
    plan = None
    if case.planned:
        plan = OPS.transpose_pattern(*packed[1:], case.vector, case.out_features, case.in_features, 1, 1)
    return ops.linear(
        input,
        packed.values,
        packed.crow_indices,
        packed.col_indices,
        bias if case.bias else None,
        out_features=case.out_features,
        row_indices=packed.row_indices,
        transpose=plan,
    )


def check_case(case):
    """Output and the gradients of input, values and bias, against torch on the dense weight in float64."""
    input, weight, packed, bias = make(case)
    tensors = [t.detach().requires_grad_() for t in (input, packed.values, bias)]
    got = run_op(case, tensors[0], packed._replace(values=tensors[1]), tensors[2])
    grad_output = torch.randn(got.shape, generator=torch.Generator().manual_seed(case.seed + 1), dtype=torch.float64)
    grad_output = grad_output.to(case.dtype)
    got_grads = torch.autograd.grad(got, tensors[: 2 + case.bias], grad_output)

    wide = [t.detach().double().requires_grad_() for t in (input, weight, bias)]
    want = F.linear(wide[0], wide[1], wide[2] if case.bias else None)
    want_grads = list(torch.autograd.grad(want, wide[: 2 + case.bias], grad_output.double()))
    want_grads[1] = formats.gather(want_grads[1], *packed[1:], case.vector)
    assert got.dtype == case.dtype and got.is_contiguous()
    assert_near(got, want, case.dtype, "output")
    names = ("input gradient", "values gradient", "bias gradient")
    for what, got_grad, want_grad in zip(names, got_grads, want_grads, strict=False):
        assert got_grad.dtype == case.dtype
        assert_near(got_grad, want_grad, case.dtype, what)


@settings(max_examples=150)
@given(
    st.builds(
        Case,
        leading=st.sampled_from([(), (0,), (1,), (5,), (64,), (3, 4), (2, 0), (2, 3, 5)]),
        in_features=st.sampled_from([1, 2, 3, 8, 17, 64, 100]),
        out_features=st.sampled_from([1, 2, 3, 7, 8, 16, 33]),
        vector=st.sampled_from([1, 1, 2, 3, 4, 5, 8, 16]),
        permuted=st.booleans(),
        density=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
        bias=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        turned=st.booleans(),
        planned=st.booleans(),
        seed=st.integers(0, 2**31),
    )
)
def test_random_configurations(case):
    check_case(case)


@pytest.mark.parametrize("rows", [0, 1, 5, 64, 1000])
@pytest.mark.parametrize("vector", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_a_real_layer(rows, vector, dtype):
    check_case(Case((rows,), 300, 130, vector, dtype=dtype, density=0.1, planned=rows % 2 == 0))


def test_no_rows_give_zero_gradients():
    """Once a division by the number of tiles, of which there are none."""
    for call in (
        OPS.linear_weight_grad(torch.randn(0, 3), torch.randn(0, 2), int32(0, 1, 2), int32(0, 2), None, 1),
        OPS.linear_weight_grad(torch.randn(0, 3), torch.randn(0, 2), int32(0, 1), int32(2), None, 2),
    ):
        assert call.numel() == 2 and not call.any()


def test_reference_means_the_same():
    input, weight, packed, bias = make(Case(vector=2, permuted=True))
    assert torch.equal(reference.linear_reference(input, *packed, bias, 7), F.linear(input, weight, bias))


SAMPLES = {
    "plain": Case(),
    "permuted": Case((1,), vector=2, permuted=True, bias=False),
    "planned": Case((3,), vector=4, out_features=8, planned=True, dtype=torch.float64),
    "empty": Case(density=0.0),
    "no rows": Case((0,)),
    "half": Case(dtype=torch.bfloat16, turned=True),
}
DIFFERENTIABLE = {"linear": (0, 1, 6), "linear_input_grad": (0, 1), "linear_weight_grad": (0, 1)}


def op_arguments(case):
    """Positional arguments of linear, linear_input_grad and linear_weight_grad."""
    input, _, packed, bias = make(case)
    plan = None
    if case.planned:
        plan = OPS.transpose_pattern(*packed[1:], case.vector, case.out_features, case.in_features, 1, 1)
    grad = torch.randn(input.shape[0], case.out_features).to(case.dtype)
    return {
        "linear": (input, *packed, plan, bias if case.bias else None, case.out_features),
        "linear_input_grad": (grad, *packed, plan, case.in_features),
        "linear_weight_grad": (input, grad, *packed[1:], case.vector),
    }


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(name, sample):
    check_op(getattr(OPS, name), op_arguments(SAMPLES[sample])[name], DIFFERENTIABLE[name])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("case", [Case((3,), 4, 3), Case((2,), 4, 5, vector=2, permuted=True, planned=True)], ids="12")
def test_gradcheck_and_gradgradcheck(name, case):
    arguments = op_arguments(dataclasses.replace(case, dtype=torch.float64, density=0.6))[name]
    check_gradients(getattr(OPS, name), arguments, DIFFERENTIABLE[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_float32_rounded_once(dtype):
    case = Case((6,), vector=2, dtype=dtype)
    check_case(case)
    input, _, packed, bias = make(case)
    wide = run_op(case, input.float(), packed._replace(values=packed.values.float()), bias.float())
    assert torch.equal(run_op(case, input, packed, bias), wide.to(dtype))


def gradients(function, input, values, bias):
    tensors = [t.detach().requires_grad_() for t in (input, values, bias)]
    output = function(*tensors)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return output, *torch.autograd.grad((output * weights).sum(), tensors)


@pytest.mark.parametrize("backend,dynamic", [("inductor", None), ("aot_eager", True)])
def test_compiled_equals_eager(backend, dynamic):
    torch._dynamo.reset()
    case = Case((4, 3), vector=2, permuted=True, planned=True)
    input, _, packed, bias = make(case)
    plan = OPS.transpose_pattern(*packed[1:], case.vector, case.out_features, case.in_features, 1, 1)

    def function(input, values, bias):
        return ops.linear(
            input * 2,
            values,
            packed.crow_indices,
            packed.col_indices,
            bias,
            out_features=case.out_features,
            row_indices=packed.row_indices,
            transpose=plan,
        ).relu()

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (input, torch.cat([input, input])) if dynamic else (input,):
        want, got = (gradients(f, batch, packed.values, bias) for f in (function, compiled))
        for left, right in zip(got, want, strict=True):
            assert_near(left, right)


def test_forgeries_are_refused():
    input, values, grad = torch.randn(4, 6), torch.randn(3, 1), torch.randn(4, 2)
    crow, col = int32(0, 2, 3), int32(0, 5, 2)
    plan = OPS.transpose_pattern(crow, col, None, 1, 2, 6, 1, 1)
    good = {"input": input, "values": values, "crow": crow, "col": col, "rows": None, "plan": None, "bias": None}
    good |= {"out_features": 2, "in_features": 6, "grad": grad, "vector": 1}
    order = {
        "linear": ["input", "values", "crow", "col", "rows", "plan", "bias", "out_features"],
        "linear_input_grad": ["grad", "values", "crow", "col", "rows", "plan", "in_features"],
        "linear_weight_grad": ["input", "grad", "crow", "col", "rows", "vector"],
    }
    for name, names in order.items():
        getattr(OPS, name)(*(good[key] for key in names))  # the unforged call works
    every, packed, backward = tuple(order), tuple(order)[:2], ("linear_input_grad",)
    place = plan.clone()
    place[-1] = 3
    far_column = plan.clone()
    far_column[7] = 2
    forged = [
        (every, {"col": int32(0, 6, 2)}, IndexError, r"Expected col_indices in 0\.\.5.*, got"),
        (every, {"col": int32(0, -1, 2)}, IndexError, r"Expected col_indices in 0\.\.5.*, got"),
        (every, {"crow": int32(0, 4, 3)}, ValueError, "Expected non-decreasing crow_indices, got 4 before 3"),
        (every, {"crow": int32(0, 3)}, ValueError, "Expected crow_indices of size 3 .*, got shape"),
        (every, {"crow": crow.long()}, TypeError, "Expected crow_indices of dtype Int, got Long"),
        (every, {"col": col.long()}, TypeError, "Expected col_indices of dtype Int, got Long"),
        (every, {"col": col[:, None]}, ValueError, "Expected col_indices with 1 dimensions, got shape"),
        (every, {"rows": int32(1, 1)}, ValueError, "Expected row_indices to permute .*, got 1 at 1"),
        (packed, {"values": values[:2]}, ValueError, "Expected values of size 3 .*, got shape"),
        (packed, {"values": values[:, 0]}, ValueError, "Expected values with 2 dimensions, got shape"),
        (packed, {"values": values.double()}, TypeError, "Expected values of dtype Float .*, got Double"),
        (("linear",), {"input": input.int()}, TypeError, "Expected input of dtype .*, got Int"),
        (("linear",), {"input": input[0]}, ValueError, "Expected input with 2 dimensions, got shape"),
        (("linear", "linear_weight_grad"), {"input": input[:, :5]}, IndexError, r"Expected col_indices in 0\.\.4"),
        (("linear",), {"bias": torch.zeros(3)}, ValueError, "Expected bias of size 2 .*, got shape"),
        (("linear",), {"bias": torch.zeros(2).half()}, TypeError, "Expected bias of dtype Float .*, got Half"),
        (("linear",), {"out_features": 0}, ValueError, "Expected .*output channels.*, got 0"),
        (("linear_weight_grad",), {"grad": grad[:3]}, ValueError, "Expected grad_output of size 4 .*, got shape"),
        (("linear_weight_grad",), {"grad": grad.double()}, TypeError, "Expected grad_output of dtype Float .*, got"),
        (("linear_weight_grad",), {"vector": 0}, ValueError, "V >= 1, got V = 0"),
        (("linear_input_grad", "linear_weight_grad"), {"grad": grad[0]}, ValueError, "Expected grad_output with 2 dim"),
        (every, {"col": col.to("meta")}, ValueError, "Expected col_indices on cpu, got meta"),
        (packed, {"values": values.to("meta")}, ValueError, "Expected values on cpu, got meta"),
        (("linear",), {"bias": torch.zeros(2, device="meta")}, ValueError, "Expected bias on cpu, got meta"),
        (("linear_weight_grad",), {"grad": grad.to("meta")}, ValueError, "Expected grad_output on cpu, got meta"),
        (backward, {"in_features": 0}, ValueError, "Expected input channels .*, got 0"),
        (backward, {"plan": plan[:-1]}, ValueError, "Expected a transpose plan .*, got 12 entries"),
        (backward, {"plan": place}, ValueError, "to point into 3 values, got 3"),
        (backward, {"plan": far_column}, IndexError, r"transpose plan's columns in 0\.\.1, got 2"),
    ]
    for touched, changes, error, message in forged:
        for name in touched:
            with pytest.raises(error, match=message):
                result = getattr(OPS, name)(*((good | changes)[key] for key in order[name]))
                pytest.fail(f"{name} took {changes} and gave {result}")
    with pytest.raises(ValueError, match="Expected an input of at least 1 dimension .*, got a scalar"):
        ops.linear(torch.tensor(1.0), values, crow, col, out_features=2)


@pytest.mark.parametrize("rows", [1, 70])
def test_the_same_bits_on_any_number_of_threads(two_thread_counts, rows):
    case = Case((rows,), 200, 90, vector=2, planned=True)
    input, _, packed, bias = make(case)

    def function(input, values, bias):
        return run_op(case, input, packed._replace(values=values), bias)

    one, two = two_thread_counts(lambda: gradients(function, input, packed.values, bias)[:3])
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left, right)


def check_sample():
    """A few cases per width of a SIMD vector; for each instruction set (conftest.checks_under_isa)."""
    for vector, dtype, rows in itertools.product((1, 2, 4, 8), (torch.float32, torch.float64), (1, 37)):
        check_case(Case((rows,), 90, 41, vector, dtype=dtype))


def test_instruction_sets(isa_checks):
    assert isa_checks["linear"] == "ok"

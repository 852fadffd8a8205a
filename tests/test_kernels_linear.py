"""The Triton kernels behind linear and its gradients, through Triton's interpreter (interpreted.py).

The cases, oracles and gradients are those of test_linear.py: here the same ops run these kernels.
"""

import dataclasses
import random

import interpreted
import pytest
import test_linear as same
import torch
from conftest import assert_near, check_gradients, check_op
from sparsekd.kernels import checks, configs, linear, registration
from test_kernels_conv2d import with_config
from test_linear import OPS, Case, int32

pytestmark = pytest.mark.skipif(not interpreted.SUPPORTED, reason=interpreted.REASON)

NAMES = ("linear", "linear_input_grad", "linear_weight_grad")


@pytest.fixture(autouse=True)
def kernels():
    """The ops of CPU tensors run the Triton kernels, interpreted."""
    with interpreted.as_cpu_ops():
        yield


def random_case(seed):
    r = random.Random(seed)
    return Case(
        leading=r.choice([(), (0,), (1,), (5,), (33,), (3, 4), (2, 0), (2, 3, 5)]),
        in_features=r.choice([1, 2, 3, 8, 17, 64]),
        out_features=r.choice([1, 3, 7, 8, 16, 17, 40]),
        vector=r.choice([8, 8, 8, 16, 16, 32, 64, 128, 3, 1]),
        permuted=r.random() < 0.4,
        density=r.choice([0.0, 0.05, 0.4, 0.4, 1.0]),
        bias=r.random() < 0.5,
        dtype=r.choice([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]),
        turned=r.random() < 0.3,
        seed=seed,
    )


def random_config(seed):
    r = random.Random(-1 - seed)
    return configs.Config(
        block_m=r.choice([16, 64]),
        block_n=r.choice([8, 16, 64]),
        block_k=r.choice([16, 64]),
        split_k=r.choice([1, 1, 2, 4]),
        lanes=r.random() < 0.3,
        programs=r.choice([0, 0, 3]),
    )


@pytest.mark.parametrize("seed", [pytest.param(s, marks=pytest.mark.slow if s >= 12 else ()) for s in range(120)])
def test_random_configurations(monkeypatch, seed):
    """Output and the gradients of input, values and bias."""
    case, config = random_case(seed), random_config(seed)
    with_config(monkeypatch, config)
    try:
        same.check_case(case)
    except Exception as error:
        raise AssertionError(f"{case} with {config}: {error!r}") from error


def test_worked_by_hand():
    same.test_worked_by_hand()


def test_precision_is_that_of_matrix_products(monkeypatch):
    """What the user set for torch.nn.functional.linear, not for convolutions."""
    asked = []
    monkeypatch.setattr(checks, "uses_tf32", lambda convolution: not convolution)
    monkeypatch.setattr(linear, "conv2d", lambda *args, precision, **more: asked.append(precision) or args[0])
    linear.linear(*same.op_arguments(Case(vector=8))["linear"])
    assert asked == ["tf32"]


SAMPLES = {
    "vectors": Case((3,), vector=8, dtype=torch.float64),
    "permuted": Case((1,), vector=8, permuted=True, bias=False),
    "no column": Case(density=0.0, vector=8),
    "no rows": Case((0,), vector=8),
    "half": Case(dtype=torch.bfloat16, vector=16, turned=True),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, sample):
    arguments = same.op_arguments(SAMPLES[sample])[name]
    check_op(getattr(OPS, name), arguments, same.DIFFERENTIABLE[name] if sample == "vectors" else ())


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_the_triton_op(name):
    op = registration.triton_op(name)
    arguments = same.op_arguments(SAMPLES["permuted"])[name]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_and_gradgradcheck(monkeypatch, name):
    with_config(monkeypatch, configs.Config(16, 8, 16))
    case = Case((2,), 2, 3, vector=2, permuted=True, dtype=torch.float64, density=0.6)
    check_gradients(getattr(OPS, name), same.op_arguments(case)[name], same.DIFFERENTIABLE[name])


def test_infinity_and_nan_reach_only_their_own_outputs():
    values, crow, col = torch.ones(2, 8), int32(0, 2), int32(0, 2)
    input = torch.tensor([[1.0, torch.inf, 2.0], [torch.nan, 0.0, 1.0], [4.0, torch.nan, 5.0]])
    output = OPS.linear(input, values, crow, col, None, None, None, 8)
    assert output[:, 0].isnan().tolist() == [False, True, False]
    assert torch.equal(output[[0, 2]], torch.tensor([[3.0], [9.0]]).expand(2, 8))


def test_the_same_in_every_run(monkeypatch):
    with_config(monkeypatch, configs.Config(16, 8, 16, split_k=4))
    case = Case((20,), 64, 8, vector=8, density=1.0)
    input, _, packed, bias = same.make(case)

    def run(x, values, b):
        return same.run_op(case, x, packed._replace(values=values), b)

    first = same.gradients(run, input, packed.values, bias)
    monkeypatch.setattr(interpreted, "order_seed", 1)
    second = same.gradients(run, input, packed.values, bias)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiled_equals_eager():
    torch._dynamo.reset()
    case = Case((4, 3), vector=8, permuted=True)
    input, _, packed, bias = same.make(case)

    def function(x, values, b):
        return same.run_op(case, x * 2, packed._replace(values=values), b).relu()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want, got = (same.gradients(f, input, packed.values, bias) for f in (function, compiled))
    for left, right in zip(got, want, strict=True):
        assert_near(left, right)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(input=torch.ones(12)), "Expected input with 2 dimensions"),
        (dict(input=torch.ones(5, 12).int()), "Expected input of dtype float32, float16"),
        (dict(values=torch.ones(1, 8)), r"Expected values of size .* \(the number of col_indices\), got 1"),
        (dict(crow=int32(0)), r"Expected crow_indices of size 2 \(row groups \+ 1\), got 1"),
        (dict(bias=torch.ones(3)), r"Expected bias of shape \(7,\), got \(3,\)"),
    ],
)
def test_what_it_refuses(change, said):
    names = ("input", "values", "crow", "col", "rows", "plan", "bias", "out_features")
    given = dict(zip(names, same.op_arguments(dataclasses.replace(Case(), vector=8))["linear"], strict=True))
    with pytest.raises((ValueError, TypeError), match=said):
        OPS.linear(*(given | change).values())

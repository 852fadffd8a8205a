"""The Triton kernels behind conv2d, conv2d_fused and their gradients, through Triton's interpreter (interpreted.py).

The cases, oracles and gradients are those of test_conv2d.py: here the same ops run these kernels.
"""

import dataclasses
import math
import random

import interpreted
import pytest
import test_conv2d
import test_conv2d_registered as registered
import torch
import torch.nn.functional as F
from conftest import assert_near, check_gradients, check_op
from sparsekd.kernels import configs, registration
from test_conv2d import OPS, Case, check_case, in_any_order, int32, make, run_op

from sparsekd.sparse import ops, reference

pytestmark = pytest.mark.skipif(not interpreted.SUPPORTED, reason=interpreted.REASON)


@pytest.fixture(autouse=True)
def kernels():
    """The ops of CPU tensors run the Triton kernels, interpreted."""
    with interpreted.as_cpu_ops():
        yield


def pick(random, *choices):
    return random.choice(choices)


def random_case(seed):
    """A convolution of a few tiles at most: the interpreter takes about a millisecond for one step of one program."""
    r = random.Random(seed)
    kernel = pick(r, (1, 1), (3, 3), (3, 3), (2, 3), (1, 4), (5, 2))
    dilation = pick(r, (1, 1), (1, 1), (2, 1), (1, 3))
    padding = pick(r, (0, 0), (1, 1), (2, 0), (0, 3))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    beyond = pick(r, (0, 0), (4, 5), (1, 6), (7, 2))
    depthwise = r.random() < 0.1
    density, empty_rows = pick(r, (0.0, False), (0.15, False), (0.4, False), (0.4, True), (1.0, False))
    return Case(
        batch=pick(r, 1, 1, 1, 2, 2, 9, 0) if not depthwise else 2,
        groups=pick(r, 2, 3) if depthwise else pick(r, 1, 1, 1, 2, 3),
        channels_per_group=1 if depthwise else pick(r, 1, 2, 3, 5, 8),
        filters_per_group=pick(r, 1, 2) if depthwise else pick(r, 1, 3, 8, 16, 17, 24),
        kernel=kernel,
        stride=pick(r, (1, 1), (1, 1), (2, 2), (2, 1), (1, 3)),
        dilation=dilation,
        padding=padding,
        size=(least[0] + beyond[0], least[1] + beyond[1]),
        vector=pick(r, 8, 8, 8, 16, 16, 16, 32, 64, 128, 3, 1),
        permuted=r.random() < 0.4,
        density=density,
        empty_rows=empty_rows,
        bias=r.random() < 0.5,
        dtype=pick(r, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16),
        layout=pick(r, "contiguous", "contiguous", "channels_last", "every_other", "turned"),
        seed=seed,
    )


def random_config(seed, case):
    """Tiles of any kind that leave few programs and steps."""
    r = random.Random(-1 - seed)
    large = case.batch > 3 or case.vector > 32
    return configs.Config(
        block_m=pick(r, 64, 128) if large else pick(r, 16, 32, 128),
        block_n=pick(r, 64, 128) if large else pick(r, 8, 16, 64),
        block_k=64 if large else pick(r, 16, 32),
        split_k=pick(r, 1, 1, 2) if large else pick(r, 1, 1, 2, 4),
        lanes=r.random() < 0.5,
        programs=pick(r, 0, 0, 3),
    )


def with_config(monkeypatch, config):
    monkeypatch.setattr(configs, "config_for", lambda problem, device, run: config)


def check_random(monkeypatch, seed):
    case, config = random_case(seed), random_config(seed, random_case(seed))
    with_config(monkeypatch, config)
    try:
        got, input, weight, bias = check_case(case)
    except Exception as error:
        raise AssertionError(f"{case} with {config}: {error!r}") from error
    if case.batch and case.layout in ("contiguous", "channels_last"):
        assert got.stride() == F.conv2d(input, weight, bias, *case.geometry).stride()


@pytest.mark.parametrize("seed", range(24))
def test_random_configurations(monkeypatch, seed):
    check_random(monkeypatch, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24, 300))
def test_more_random_configurations(monkeypatch, seed):
    check_random(monkeypatch, seed)


# --- the rest of an op's list ----------------------------------------------------------------------------------------


def test_worked_by_hand():
    test_conv2d.test_worked_by_hand()


SAMPLES = {
    "vectors": Case(batch=2, filters_per_group=11, vector=8, padding=(1, 1), size=(4, 5)),
    "permuted, strided, grouped": Case(
        batch=2,
        groups=2,
        filters_per_group=9,
        vector=8,
        permuted=True,
        stride=(2, 1),
        padding=(1, 2),
        dilation=(1, 2),
        size=(5, 4),
    ),
    "one pixel": Case(kernel=(1, 1), size=(1, 1), vector=16, filters_per_group=16),
    "no column": Case(density=0.0, vector=8, filters_per_group=8),
    "no image": Case(batch=0, vector=8, filters_per_group=8),
    "half": Case(vector=16, filters_per_group=16, dtype=torch.float16, layout="channels_last"),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", ["conv2d", "conv2d_input_grad", "conv2d_weight_grad"])
def test_opcheck(name, sample):
    arguments = registered.op_arguments(SAMPLES[sample])[name]
    check_op(getattr(OPS, name), arguments, registered.DIFFERENTIABLE[name] if sample == "vectors" else ())


@pytest.mark.parametrize("name", ["conv2d", "conv2d_input_grad", "conv2d_weight_grad"])
def test_opcheck_of_the_triton_op(name):
    """Without gradients of its own: those are of the op that it stands behind. Symbolic sizes pass through."""
    arguments = registered.op_arguments(SAMPLES["permuted, strided, grouped"])[name]
    check_triton_op(name, arguments)


def check_triton_op(name, arguments):
    op = registration.triton_op(name)
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_of_fused():
    case = SAMPLES["half"]
    input, _, packed, bias = make(case)
    more = (bias, bias, None, "silu", case.filters_per_group, case.kernel, *case.geometry)
    check_op(OPS.conv2d_fused, (input, *packed, *more), ())
    check_triton_op("conv2d_fused", (input, *packed, *more))


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("name", ["conv2d", "conv2d_input_grad", "conv2d_weight_grad"])
def test_gradcheck(monkeypatch, name, lanes):
    with_config(monkeypatch, configs.Config(16, 8, 16, lanes=lanes))
    case = Case(channels_per_group=2, filters_per_group=3, size=(3, 2), kernel=(2, 2), vector=8, dtype=torch.float64)
    arguments = registered.op_arguments(dataclasses.replace(case, density=0.6, stride=(2, 1), padding=(1, 0)))[name]
    check_gradients(getattr(OPS, name), arguments, registered.DIFFERENTIABLE[name])


FUSED = Case(batch=2, filters_per_group=11, vector=8, permuted=True, padding=(1, 1), size=(5, 6))


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fused(monkeypatch, split_k, layout):
    from test_conv2d_fused import finished

    with_config(monkeypatch, configs.Config(64, 16, 32, split_k=split_k))
    for dtype, flags, activation in FINISHES:
        case = dataclasses.replace(FUSED, layout=layout, dtype=dtype)
        input, _, packed, _ = make(case)
        got, want = finished(case, packed, input, *flags, activation)
        assert_near(got, want, dtype, f"{flags} {activation}")
        assert got.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize("seed", [pytest.param(s, marks=pytest.mark.slow if s >= 6 else ()) for s in range(60)])
def test_random_fused(monkeypatch, seed):
    """Every epilogue over random convolutions and tiles."""
    from test_conv2d_fused import finished

    case, config, r = (
        random_case(5000 + seed),
        random_config(5000 + seed, random_case(5000 + seed)),
        random.Random(seed),
    )
    with_config(monkeypatch, config)
    flags, activation = [r.random() < 0.6 for _ in range(3)], r.choice(list(reference.ACTIVATIONS))
    input, _, packed, _ = make(case)
    got, want = finished(case, packed, input, *flags, activation)
    assert_near(got, want, case.dtype, f"{case} with {config}, {flags} {activation}")


# dtype, (scale, shift, residual), activation
FINISHES = [
    (torch.float32, (True, True, True), "silu"),
    (torch.float64, (False, True, False), "relu6"),
    (torch.float16, (True, False, True), "hardswish"),
    (torch.bfloat16, (False, False, True), "relu"),
]


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_activations_at_their_ends(activation):
    import test_conv2d_fused

    if activation in ("none", "relu", "relu6"):
        test_conv2d_fused.test_activations_at_their_ends(activation, torch.float64)
    values, crow, col = test_conv2d_fused.one_weight()
    x = torch.tensor([-20.0, -3.0, -0.5, 0.0, 1.0, 5.0, 80.0, math.nan]).view(1, 1, 1, -1).double()
    got = ops.conv2d_fused(x, values.double(), crow, col, out_channels=1, kernel_size=1, activation=activation)
    torch.testing.assert_close(got, reference.ACTIVATIONS[activation](x), rtol=1e-12, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("lanes", [False, True])
def test_infinity_and_nan_reach_only_their_own_outputs(monkeypatch, lanes):
    """A tile is filled up with columns and pixels that are nobody's: none of that may touch a result."""
    with_config(monkeypatch, configs.Config(64, 16, 32, lanes=lanes))
    case = Case(channels_per_group=2, filters_per_group=8, vector=8, padding=(1, 1), density=0.5)
    input, weight, packed, bias = make(case)
    input = input.clone()
    input[0, 0, 2, 8], input[0, 1, 7, 0] = math.inf, math.nan
    got = run_op(case, input, packed, bias)
    # In the dense oracle 0 * inf is NaN, so which outputs a weight brings a bad pixel to is counted.
    reached = F.conv2d((~input.isfinite()).float(), (weight != 0).float(), padding=1) > 0
    want = F.conv2d(torch.where(input.isfinite(), input, 0.0), weight, bias, padding=1)
    assert torch.equal(~got.isfinite(), reached)
    assert_near(got[~reached], want[~reached])


@pytest.mark.parametrize("kind", ["borders", "lanes", "no borders", "a point"])
def test_wrong_indices_read_and_write_nothing_foreign(monkeypatch, kind):
    """interpreted.py raises on an address outside of the tensors. Wrong indices give wrong numbers at worst."""
    with_config(monkeypatch, configs.Config(64, 16, 32, lanes=kind == "lanes"))
    padding, kernel = ((1, 1) if kind in ("borders", "lanes") else (0, 0)), ((1, 1) if kind == "a point" else (3, 3))
    case = Case(filters_per_group=16, vector=8, permuted=True, padding=padding, kernel=kernel, size=(4, 5))
    input, _, packed, bias = make(case)
    grad = torch.randn_like(run_op(case, input, packed, bias))
    big, columns = 2**31 - 1, 3 * math.prod(kernel)
    n = packed.col_indices.shape[0]
    for crow in (int32(0, big, n), int32(-5, 3, n), int32(4, 2, 0), int32(-big, big, big)):
        for col, rows in (
            (packed.col_indices, packed.row_indices),
            (torch.full_like(packed.col_indices, columns), packed.row_indices),
            (torch.full_like(packed.col_indices, -1), packed.row_indices),
            (torch.full_like(packed.col_indices, 1 - columns), torch.full_like(packed.row_indices, -1)),
            (torch.full_like(packed.col_indices, big), torch.full_like(packed.row_indices, big)),
        ):
            geometry = (case.kernel, *case.geometry)
            wrong = packed._replace(crow_indices=crow, col_indices=col, row_indices=rows)
            run_op(case, input, wrong, bias)
            OPS.conv2d_input_grad(grad, *wrong, None, list(input.shape), *geometry)
            OPS.conv2d_weight_grad(input, grad, *wrong[1:], 8, *geometry)


def test_the_same_in_every_run(monkeypatch):
    """Split sums are added in order, so that no digit depends on which program is first."""
    with_config(monkeypatch, configs.Config(64, 16, 16, split_k=2))
    case = Case(channels_per_group=8, filters_per_group=16, vector=8, padding=(1, 1), size=(4, 5))
    first = registered.gradients(*once(case))
    monkeypatch.setattr(interpreted, "order_seed", 1)
    second = registered.gradients(*once(case))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def once(case):
    input, _, packed, bias = make(case)
    return lambda x, values, b: run_op(case, x, packed._replace(values=values), b), input, packed.values, bias


def test_columns_in_any_order_and_twice():
    case = Case(batch=2, channels_per_group=9, filters_per_group=11, vector=8, density=0.5, dtype=torch.float64)
    input, _, packed, bias = make(case)
    assert_near(run_op(case, input, in_any_order(packed)[0], bias), run_op(case, input, packed, bias))


@pytest.mark.parametrize("seed", range(8))
def test_transpose_pattern_is_the_one_of_the_cpu(seed):
    from sparsekd.kernels import plans

    case = random_case(1000 + seed)
    _, _, packed, _ = make(case)
    pattern = (case.vector, case.groups * case.filters_per_group, case.groups * case.channels_per_group)
    got = plans.transpose_pattern(*packed[1:], *pattern, math.prod(case.kernel), case.groups)
    with interpreted.cpu_kernels():
        want = OPS.transpose_pattern(*packed[1:], *pattern, math.prod(case.kernel), case.groups)
    assert torch.equal(got, want)


def test_a_plan_is_made_once_and_anew_when_the_pattern_changes(monkeypatch):
    from sparsekd.kernels import plans

    made = []
    plain = plans._order
    monkeypatch.setattr(plans, "_order", lambda counts: made.append(1) or plain(counts))
    crow = int32(0, 1, 4)
    assert plans.heaviest_first(crow).tolist() == [1, 0] and plans.heaviest_first(crow).tolist() == [1, 0]
    assert len(made) == 1
    crow[1] = 3
    assert plans.heaviest_first(crow).tolist() == [0, 1]
    assert plans.heaviest_first(crow.clone()).tolist() == [0, 1]
    assert len(made) == 3


@pytest.mark.parametrize(
    "position, value, said",
    [
        (0, torch.ones(2, 4, 8), "Expected an input of 4 dimensions"),
        (0, torch.ones(2, 3, 8, 9, dtype=torch.int32), "Expected input of dtype float32, float16"),
        (1, torch.ones(3, 8), "Expected values of size .* \\(the number of col_indices\\), got 3"),
        (1, torch.ones(6), "Expected values with 2 dimensions"),
        (2, torch.zeros(3, dtype=torch.int64), "Expected crow_indices of dtype int32, got torch.int64"),
        (2, int32(0, 1), "Expected crow_indices of size 3 \\(row groups \\+ 1\\), got 2"),
        (4, int32(0, 1), "Expected row_indices of size 11 \\(output channels\\), got 2"),
        (6, torch.ones(3), r"Expected bias of shape \(11,\), got \(3,\)"),
        (6, torch.ones(11).double(), "Expected bias of dtype torch.float32 as input, got torch.float64"),
        (8, (9, 9), "Expected a padded input at least as large as the kernel"),
        (9, (0, 1), r"Expected two values of at least 1 for stride, got \[0, 1\]"),
        (12, 2, "divisible by groups"),
    ],
)
def test_what_it_refuses(position, value, said):
    case = Case(batch=2, filters_per_group=11, vector=8, permuted=True)
    arguments = list(registered.op_arguments(case)["conv2d"])
    arguments[position] = value
    with pytest.raises((ValueError, TypeError), match=said):
        OPS.conv2d(*arguments)

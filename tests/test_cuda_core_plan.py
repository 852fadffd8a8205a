"""Plans for CUDA cores: in the emulator, and who uses them."""

import dataclasses
from types import SimpleNamespace

import emulated
import pytest
import torch
from conftest import assert_near
from test_cuda_conv2d import ACTIVATIONS, draw, draw_wide, operands, sampled
from torch import nn

from sparsekd.sparse import ops, reference
from sparsekd.sparse.modules import FusedConv2d, SparseConv2d
from sparsekd.sparse.modules.plans import LayerPlans
from sparsekd.sparse.ops import conv2d_planned

PLANNED = ("conv2d_tiling", "conv2d_plan", "conv2d_planned")


def plan_of(crow, col, vector, size, geometry):
    tiling = emulated.emulator().ops.conv2d_tiling(col, vector, size, *geometry, False)
    if not tiling:
        return None, tiling
    return emulated.in_two_orders("conv2d_plan", crow, col, tiling, vector, size, *geometry), tiling


@pytest.mark.parametrize("seed", sampled(range(700, 800), 24))
def test_against_the_oracle(seed):
    case = draw(seed) if seed % 2 else draw_wide(seed)
    case = dataclasses.replace(case, channels_last=seed % 5 == 0)
    input, values, crow, col, rows, geometry, generator = operands(case)
    plan, tiling = plan_of(crow, col, case.vector, input.shape, geometry)
    wide = input.double(), values.double()
    plain = reference.conv2d_reference(*wide, crow, col, rows, None, *geometry)
    scale, shift = (torch.randn(geometry[0], generator=generator).to(case.dtype) for _ in range(2))
    residual = torch.randn(plain.shape, generator=generator).to(case.dtype) if seed % 3 else None
    finish = scale, shift, residual, ACTIVATIONS[seed % len(ACTIVATIONS)]
    got = emulated.in_two_orders("conv2d_planned", input, values, plan, tiling, rows, *finish, False, *geometry)
    added = residual.double() if seed % 3 else None
    want = reference.conv2d_fused_reference(
        *wide, crow, col, rows, scale.double(), shift.double(), added, finish[3], *geometry
    )
    assert_near(got, want, case.dtype, str(case))
    if case.dtype == torch.float32 and not case.channels_last:
        unplanned = emulated.emulator().ops.conv2d_fused(input, values, crow, col, rows, *finish, *geometry)
        assert torch.equal(got, unplanned) and got.stride() == unplanned.stride()


def test_errors():
    case = dataclasses.replace(draw(700), batch=2, size=(9, 8), dtype=torch.float32, channels_last=False)
    input, values, crow, col, rows, geometry, _ = operands(case)
    plan, tiling = plan_of(crow, col, case.vector, input.shape, geometry)
    op = emulated.emulator().ops.conv2d_planned
    finish = (rows, None, None, None, "none")
    for wrong in ([*tiling[:-1], tiling[-1] + 1], [8, *tiling[1:]]):
        with pytest.raises(ValueError, match="Expected a tiling"):
            op(input, values, plan, wrong, *finish, False, *geometry)
    with pytest.raises(ValueError, match="Expected a tiling .* input of this size"):
        op(torch.randn(2, input.shape[1], 57, 57), values, plan, tiling, *finish, False, *geometry)
    with pytest.raises(ValueError, match="Expected plan .*tiling's plan"):
        op(input, values, plan[:-1], tiling, *finish, False, *geometry)
    with pytest.raises(ValueError, match=r"Expected an input \[N, C, H, W\] and no result in lanes"):
        op(input, values, plan, tiling, *finish, True, *geometry)


def test_a_plan_of_another_pattern_reads_no_foreign_memory():
    case = dataclasses.replace(draw(700), size=(9, 8), vector=1, density=0.3, dtype=torch.float32, channels_last=False)
    input, values, crow, col, rows, geometry, _ = operands(case)
    plan, tiling = plan_of(crow, col, 1, input.shape, geometry)
    for other in (col.flip(0), torch.zeros_like(col), torch.full_like(col, 2**31 - 1)):
        emulated.in_two_orders("conv2d_plan", crow, other, tiling, 1, input.shape, *geometry)
        foreign = emulated.emulator().ops.conv2d_plan(crow, other, tiling, 1, input.shape, *geometry)
        finish = (rows, None, None, None, "none", False)
        emulated.emulator().ops.conv2d_planned(input, values, foreign, tiling, *finish, *geometry)


# ---- who uses them ----


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The emulator's kernels as the CPU's, and how often each was called."""
    monkeypatch.setattr(ops, "takes_plans", lambda *_: False)
    monkeypatch.setattr(ops, "takes_core_plans", lambda *_: True)
    monkeypatch.setattr(ops, "for_tensor_cores", lambda device: True)
    with emulated.as_cpu_ops(PLANNED) as calls:
        yield calls


def sparse_conv(vector, seed=0):
    torch.manual_seed(seed)
    conv = nn.Conv2d(6, 8, 3, padding=1).eval()
    mask = (torch.rand(8 // vector, 6, 3, 3) < 0.3).repeat_interleave(vector, 0)
    return SparseConv2d.from_dense(conv, mask, vector)


def dense(conv, input):
    with torch.no_grad():
        return torch.nn.functional.conv2d(input.double(), conv.weight.double(), conv.bias.double(), padding=1)


CHANGES = {
    "in place": lambda conv: conv.values.data.mul_(3),
    "a step": lambda conv: step(conv),
    "load_state_dict": lambda conv: conv.load_state_dict(sparse_conv(conv.vector, seed=1).state_dict()),
    "another parameter": lambda conv: setattr(conv, "values", nn.Parameter(conv.values.detach() + 1)),
    "in half": lambda conv: conv.half().float(),
}


def step(conv):
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1, momentum=0.9)
    conv.values.grad, conv.bias.grad = torch.ones_like(conv.values), torch.ones_like(conv.bias)
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("vector", [1, 4])
def test_the_module_keeps_its_plan_and_reads_its_values(on_the_cpu, vector, change):
    conv, image = sparse_conv(vector), torch.randn(2, 6, 7, 9)
    with torch.no_grad():
        for _ in range(3):
            assert_near(conv(image), dense(conv, image), torch.float32)
        assert on_the_cpu == {"conv2d_tiling": 1, "conv2d_plan": 1, "conv2d_planned": 3}
        change(conv)
        assert_near(conv(image), dense(conv, image), torch.float32)
        assert_near(conv(image[:1, :, :5]), dense(conv, image[:1, :, :5]), torch.float32)
    fused = FusedConv2d(conv, "relu")
    residual = torch.randn(2, 8, 7, 9)
    with torch.no_grad():
        assert_near(fused(image, residual), (dense(conv, image) + residual).relu(), torch.float32)
    assert on_the_cpu["conv2d_planned"] == 6


@pytest.mark.parametrize("tf32", [False, True])
def test_what_triton_or_tensor_cores_compute_takes_no_such_plan(monkeypatch, tf32):
    monkeypatch.setattr(conv2d_planned, "_built_for", lambda device: True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        takes = {
            (dtype, vector)
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
            for vector in (1, 4, 8, 32)
            if ops.takes_core_plans(torch.device("cuda"), dtype, vector)
        }
    narrow = {(torch.float32, v) for v in (1, 4)}  # of half types results don't leave flat planes as they lie
    assert takes == narrow | (set() if tf32 else {(torch.float32, 8), (torch.float32, 32)})
    with ops.only_backend("triton"):
        assert not ops.takes_core_plans(torch.device("cuda"), torch.float32, 1)


def test_no_plan_is_kept_of_a_capture(monkeypatch):
    plans, made = LayerPlans(SimpleNamespace(is_cuda=True)), []
    make = lambda: made.append("plan") or "plan"  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert plans.plan((1, 2, 3, 4), make) is None and not made
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert plans.plan((1, 2, 3, 4), make) == "plan"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert plans.plan((1, 2, 3, 4), make) == "plan" and len(made) == 1
    assert plans.plan((1, 2, 3, 4), make, lanes=True) is None

"""conv2d on tensor cores with its plan made once, on activations in lanes: in the emulator, and who uses it.

The modules call ``torch.ops.sparsekd``, where the CPU has no such kernels: here those of the emulator are put there.
"""

import copy
import dataclasses
import re

import emulated
import pytest
import torch
from conftest import assert_near
from test_cuda_conv2d import ACTIVATIONS, operands
from test_cuda_conv2d_tensor import device, draw, layer
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsekd.sparse import fusion, ops, reference
from sparsekd.sparse.convert import Choices
from sparsekd.sparse.modules import FusedConv2d, SparseConv2d
from sparsekd.sparse.modules.plans import MOST_PLANS
from sparsekd.sparse.ops import conv2d_planned

SEEDS = [*range(100, 106), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(106, 166))]
PLANNED = ("conv2d_tiling", "conv2d_plan", "conv2d_planned")


def plan_of(crow, col, vector, size, geometry):
    tiling = emulated.emulator().ops.conv2d_tiling(col, vector, size, *geometry)
    return emulated.in_two_orders("conv2d_plan", crow, col, tiling, vector, size, *geometry), tiling


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize(
    "seed", [*range(100, 106), *(pytest.param(s, marks=pytest.mark.slow) for s in range(106, 140))]
)
def test_against_the_oracle(seed):
    """Images and lanes in, images and lanes out, by a plan that was made for another size of image."""
    in_lanes, to_lanes = seed % 2, seed // 2 % 2
    case = draw(seed)
    case = dataclasses.replace(case, batch=8 * (1 + seed % 3 // 2) if in_lanes or to_lanes else case.batch)
    input, values, crow, col, rows, geometry, generator = operands(case)
    batch, channels, height, width = input.shape
    plan, tiling = plan_of(crow, col, case.vector, (batch, channels, height + seed % 5, width + seed % 3), geometry)
    plain = reference.conv2d_reference(*wide(input, values), crow, col, rows, None, *geometry)
    scale, shift = (torch.randn(geometry[0], generator=generator).to(case.dtype) for _ in range(2))
    residual = torch.randn(plain.shape, generator=generator).to(case.dtype) if seed % 3 else None
    activation = ACTIVATIONS[seed % len(ACTIVATIONS)]
    got = emulated.in_two_orders(
        "conv2d_planned",
        ops.to_lanes(input) if in_lanes else input,
        values,
        plan,
        tiling,
        rows,
        scale,
        shift,
        residual if residual is None or not to_lanes else ops.to_lanes(residual),
        activation,
        bool(to_lanes),
        *geometry,
    )
    assert got.dim() == (5 if to_lanes else 4)
    got = ops.from_lanes(got) if to_lanes else got
    want = reference.conv2d_fused_reference(
        *wide(input, values), crow, col, rows, *wide(scale, shift, residual), activation, *geometry
    )
    assert_near(got, want, case.dtype, str(case))


@pytest.mark.parametrize("vector", [8, 16, 80])
def test_a_foreign_plan_reads_no_foreign_memory(vector):
    values, crow, col, _, geometry = layer(vector)
    input = torch.randn(8, 16, 6, 5, dtype=torch.float16)
    plan, tiling = plan_of(crow, col, vector, input.shape, geometry)
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, plan.shape, generator=generator, dtype=torch.int64).int()
    near = torch.randint(-40, 4000, plan.shape, generator=generator, dtype=torch.int32)
    slices = 2 * -(-vector // tiling[0])
    uninitialized = "shared memory.* before it was written"
    for foreign in (anything, near, torch.full_like(plan, 2**31 - 1), plan.flip(0)):
        # With the order of the slices as it was, each row of the output is made once.
        for order, allowed in ((foreign, f"output|{uninitialized}"), (plan, uninitialized)):
            indices = torch.cat([order[:slices], foreign[slices:]])
            finish = (None, None, None, None, "none", True)
            try:
                emulated.emulator().ops.conv2d_planned(input, values, indices, tiling, *finish, *geometry)
            except RuntimeError as error:
                assert re.search(allowed, str(error)), str(error)


def test_errors():
    values, crow, col, _, geometry = layer(8)
    input = torch.randn(8, 16, 5, 5, dtype=torch.float16)
    plan, tiling = plan_of(crow, col, 8, input.shape, geometry)
    op = emulated.emulator().ops.conv2d_planned
    finish = (None, None, None, None, "none", False)
    wrong = [], tiling[:-1], [7, *tiling[1:]], [*tiling[:5], 64, 63, 1], [*tiling[:5], 8, 9, 1]
    for bad in (*wrong, *([*tiling[:7], n] for n in (0, 1000)), *([*tiling[:6], n, 1] for n in (0, 1025))):
        with pytest.raises(ValueError, match="Expected a tiling"):
            op(input, values, plan, bad, *finish, *geometry)
    with pytest.raises(ValueError, match="Expected plan .*tiling's plan"):
        op(input, values, plan[:-1], tiling, *finish, *geometry)
    with pytest.raises(TypeError, match="Expected input of dtype Half or BFloat16, got Float"):
        op(input.float(), values.float(), plan, tiling, *finish, *geometry)
    with pytest.raises(ValueError, match="Expected activations in lanes"):
        op(torch.zeros(1, 16, 5, 5, 4).half(), values, plan, tiling, *finish, *geometry)
    with device(7), pytest.raises(NotImplementedError, match="compute capability 8.0"):
        op(input, values, plan, tiling, *finish, *geometry)
    with device(7):
        assert emulated.emulator().ops.conv2d_tiling(col, 8, input.shape, *geometry) == []


@pytest.mark.parametrize("to_lanes", [False, True])
@pytest.mark.parametrize("width, row_places", [(14, 24), (9, 16), (30, 24)])
def test_tiles_of_whole_rows_fit_any_size(width, row_places, to_lanes):
    """Made for 14 columns: of others a tile takes what it can. Of 24 places a row, tiles begin at three of them."""
    values, crow, col, _, geometry = layer(16)
    tiling = (16, 1, 16, 2, 8, 14, row_places, 16)  # 8 * 16 places
    plan = emulated.in_two_orders("conv2d_plan", crow, col, tiling, 16, (8, 16, 14, 14), *geometry)
    input = torch.randn(8, 16, 11, width, dtype=torch.float16)
    finish = (None, None, None, None, "none", to_lanes)
    got = emulated.in_two_orders("conv2d_planned", input, values, plan, tiling, *finish, *geometry)
    if to_lanes:
        got = got.permute(0, 4, 1, 2, 3).flatten(0, 1)
    want = reference.conv2d_reference(input.double(), values.double(), crow, col, None, None, *geometry)
    assert_near(got, want, torch.float16)


def test_results_in_lanes_are_stored_by_whole_sectors():
    values, crow, col, _, geometry = layer(16, filters=64)
    input = torch.randn(2, 16, 14, 14, 8, dtype=torch.float16)
    plan, tiling = plan_of(crow, col, 16, (16, 16, 14, 14), geometry)
    with emulated.counting():
        emulated.emulator().ops.conv2d_planned(
            input, values, plan, tiling, None, None, None, None, "none", True, *geometry
        )
    actual, ideal = emulated.costs("conv2d_tensor_kernel")["global", "write", 16]
    assert actual <= 1.15 * ideal


def test_results_of_few_images_are_stored_by_whole_sectors():
    """They fill no lanes, so that the tiling of their plan is one for images."""
    values, crow, col, _, geometry = layer(16, filters=64)
    input = torch.randn(2, 16, 28, 28, dtype=torch.float16)
    plan, tiling = plan_of(crow, col, 16, input.shape, geometry)
    with emulated.counting():
        got = emulated.emulator().ops.conv2d_planned(
            input, values, plan, tiling, None, None, None, None, "none", False, *geometry
        )
    # In strips, two of each image: they go through lanes, from which the images are taken.
    actual, ideal = emulated.costs("conv2d_tensor_kernel")["global", "write", 16]
    assert actual <= 1.15 * ideal
    actual, _ = emulated.costs("from_lanes16_kernel")["global", "write", 2]
    # Every second strip of 14 rows begins in the middle of a sector.
    assert actual <= 1.5 * got.numel() * 2 / 32


# ---- who uses them ----


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The emulator's kernels as the CPU's, and how often each was called."""
    halves = (torch.float16, torch.bfloat16)
    monkeypatch.setattr(ops, "takes_plans", lambda device, dtype, vector: vector >= 8 and dtype in halves)
    for module in (ops, conv2d_planned):
        monkeypatch.setattr(module, "for_tensor_cores", lambda device: True)
    monkeypatch.setattr(ops, "takes_core_plans", lambda *_: False)
    with emulated.as_cpu_ops(PLANNED) as calls:
        yield calls


def sparse_conv(channels, filters, kernel, vector=8, stride=1, seed=0):
    torch.manual_seed(seed)
    conv = nn.Conv2d(channels, filters, kernel, stride, kernel // 2).half().eval().requires_grad_(False)
    mask = (torch.rand(filters // vector, channels, kernel, kernel) < 0.3).repeat_interleave(vector, 0)
    mask[::vector, 0, 0, 0] = True
    mask = mask.unflatten(0, (-1, vector)).any(1, keepdim=True).expand(-1, vector, -1, -1, -1).flatten(0, 1)
    return SparseConv2d.from_dense(conv, mask, vector)


def test_the_module_keeps_its_plans(on_the_cpu):
    conv = sparse_conv(6, 16, 3)
    image = torch.randn(2, 6, 7, 7).half()
    with torch.no_grad():
        want = ops.conv2d(image.float(), conv.values.float(), *conv._indices()[:2], conv.bias.float(), out_channels=16,
                          kernel_size=3, padding=1)  # fmt: skip
        for _ in range(3):
            assert_near(conv(image), want.double(), torch.float16)
        assert on_the_cpu == {"conv2d_tiling": 1, "conv2d_plan": 1, "conv2d_planned": 3}
        conv.values.mul_(2)  # is no part of the plan
        conv.bias.mul_(2)
        assert_near(conv(image), 2 * want.double(), torch.float16)
        assert_near(conv(image[0]), 2 * want[0].double(), torch.float16)  # of another size
        assert on_the_cpu["conv2d_plan"] == 2
        for height in range(4, 4 + 2 * MOST_PLANS):
            conv(torch.randn(1, 6, height, 5).half())
        assert len(conv._plans.by_size) == MOST_PLANS
        state = conv.state_dict()
        other = sparse_conv(6, 16, 3, seed=1)
        conv.load_state_dict(other.state_dict())  # another pattern
        assert_near(conv(image), other(image).double(), torch.float16)
        assert_near(copy.deepcopy(conv)(image), other(image).double(), torch.float16)
        assert "_plans" in vars(conv) and "_plans" not in vars(copy.deepcopy(conv))
        assert set(state) == {"values", "bias", "crow_indices", "col_indices"}


def test_training_and_other_dtypes_need_no_plan(on_the_cpu):
    conv = sparse_conv(6, 16, 3)
    conv.values.requires_grad_()
    conv(torch.randn(2, 6, 7, 7).half()).float().sum().backward()
    assert conv.values.grad.isfinite().all()
    with torch.no_grad():
        conv.float()(torch.randn(2, 6, 7, 7))
        sparse_conv(6, 16, 3, vector=4)(torch.randn(2, 6, 7, 7).half())
    assert on_the_cpu == dict.fromkeys(PLANNED, 0)


@pytest.mark.slow
def test_a_compiler_finds_the_plan_that_is_there(on_the_cpu):
    conv = sparse_conv(6, 16, 3)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = conv(torch.ones(2, 6, 7, 7).half())
        before = dict(on_the_cpu)
        assert torch.equal(compiled(torch.ones(2, 6, 7, 7).half()), want)
        compiled(torch.ones(3, 6, 9, 7).half())
    assert on_the_cpu == before | {"conv2d_planned": before["conv2d_planned"] + 2}


@pytest.mark.parametrize("dims, to_lanes", [(4, False), (4, True), (5, False), (5, True)])
def test_fakes_are_as_the_real_results(dims, to_lanes, on_the_cpu):
    conv = sparse_conv(6, 16, 3)
    input = torch.randn(8, 6, 7, 5).half()
    plan = ops.conv2d_plan(*conv._indices()[:2], vector=8, input_size=input.shape, out_channels=16, kernel_size=3)
    with torch.no_grad():
        arguments = (
            ops.to_lanes(input) if dims == 5 else input,
            conv.values,
            *plan[:2],
            None,
            None,
            None,
            None,
            "none",
        )
        arguments = (*arguments, to_lanes, 16, (3, 3), (1, 1), (0, 0), (1, 1), 1)
        real = torch.ops.sparsekd.conv2d_planned(*arguments)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = torch.ops.sparsekd.conv2d_planned(*fakes)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = sparse_conv(6, 16, 1), sparse_conv(16, 16, 3, stride=2, seed=1)
        self.down, self.conv3 = sparse_conv(6, 16, 1, stride=2, seed=2), sparse_conv(16, 16, 3, 16, seed=3)

    def forward(self, x):
        y = self.conv2(torch.relu(self.conv1(x)))
        y = torch.relu(y + self.down(x))
        return torch.relu(self.conv3(y) + y).mean((2, 3))


def test_activations_stay_in_lanes_between_sparse_layers(on_the_cpu):
    model = Block().eval()
    graph = fx.GraphModule(model, fusion._Tracer().trace(model))
    graph._sparsekd_choices = Choices(seconds=0.0)
    fused = fusion._fused(graph, False, False, lanes=True)
    kept = {name for name, module in fused.named_modules() if isinstance(module, FusedConv2d) and module.lanes}
    assert kept == {"conv1", "conv2", "down"}  # the last one's result is read by a mean
    shapes = []
    for name in ("conv1", "conv2", "down", "conv3"):
        fused.get_submodule(name).register_forward_hook(lambda _, args, out: shapes.append(out.dim()))
    for batch, dims in ((8, [4, 5, 5, 5]), (3, [4, 4, 4, 4])):
        shapes.clear()
        image = torch.randn(batch, 6, 10, 10).half()
        with torch.no_grad():
            assert_near(fused(image), model(image).double(), torch.float16)
        assert sorted(shapes) == dims

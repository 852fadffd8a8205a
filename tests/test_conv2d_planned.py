"""Plans of the CPU's convolution: offsets of a pattern's columns made once (csrc/cpu/spmm.h)."""

import copy

import pytest
import torch
from conftest import assert_near
from torch import nn

from sparsekd.sparse import ops
from sparsekd.sparse.modules import FusedConv2d, SparseConv2d

pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRIES = {
    "3x3": dict(kernel_size=3, padding=1),
    "1x1": dict(kernel_size=1),
    "strided": dict(kernel_size=3, padding=1, stride=2),
    "strided 1x1": dict(kernel_size=1, stride=2),
    "dilated": dict(kernel_size=3, padding=2, dilation=2),
    "groups": dict(kernel_size=3, padding=1, groups=2),
    "wide": dict(kernel_size=(1, 5), padding=(0, 1)),
}


def layer(geometry, vector=1, channels=(12, 10)):
    conv = nn.Conv2d(*channels, **geometry)
    groups = channels[1] // conv.groups // vector * conv.groups
    mask = (torch.rand(groups, 1, conv.weight[0].numel()) < 0.3).expand(-1, vector, -1).reshape(conv.weight.shape)
    return SparseConv2d.from_dense(conv, mask, vector)


def arguments(conv):
    names = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(conv, name) for name in names}


def planned(conv, x, plan):
    pattern = (conv.values, conv.crow_indices, conv.col_indices)
    with torch.no_grad():
        return ops.conv2d_fused(
            x, *pattern, shift=conv.bias, plan=plan, row_indices=conv.row_indices, **arguments(conv)
        )


def plan_of(conv, size, ordered=False):
    return ops.conv2d_plan(
        conv.crow_indices,
        conv.col_indices,
        vector=conv.vector,
        input_size=tuple(size),
        ordered=ordered,
        **arguments(conv),
    )


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("vector", [1, 5])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_plan_changes_nothing(geometry, vector, ordered):
    conv = layer(geometry, vector)
    plan = plan_of(conv, (2, 12, 15, 13), ordered)
    # The size that it was made for, others, another memory format, another dtype, no image.
    for x in (torch.randn(2, 12, 15, 13), torch.randn(3, 12, 9, 28), torch.randn(1, 12, 15, 13).double()):
        module = copy.deepcopy(conv).to(x.dtype)
        for given in (x, x.contiguous(memory_format=torch.channels_last), x[:0]):
            want = module(given)  # with gradients, so without a plan
            assert module._plans is None
            got = planned(module, given, plan)
            assert torch.equal(got, want) and got.stride() == want.stride()
    # 1x1 kernels read an input where it lies, if that is aligned.
    x = torch.randn(2 * 12 * 15 * 13 + 1)[1:].view(2, 12, 15, 13)
    assert torch.equal(planned(conv, x, plan), conv(x))


@pytest.mark.parametrize("vector", [1, 4])
def test_blocks_of_channels_in_one_stream(vector):
    conv, x = layer(GEOMETRIES["3x3"], vector, (320, 24)), torch.randn(1, 320, 14, 14)
    plan, want = plan_of(conv, x.shape, ordered=True), conv(x)
    entries, blocks = torch.arange(conv.col_indices.numel()), plan.tiling[2]
    assert blocks > 1 or vector > 1  # rows of four are worth fewer
    assert torch.equal(plan.order.long().sort()[0], entries)
    assert torch.equal(plan.order.long(), entries) == (blocks == 1)
    assert torch.equal(planned(conv, x, plan), want)
    assert torch.equal(planned(conv, x, plan_of(conv, x.shape)), want)


def test_a_frozen_layer_sees_that_its_values_change():
    conv, x = layer(GEOMETRIES["3x3"], 1, (320, 24)), torch.randn(1, 320, 14, 14)
    conv.freeze()
    for change in (
        lambda: None,
        lambda: conv.values.mul_(2),
        lambda: setattr(conv, "values", nn.Parameter(-conv.values)),
    ):
        with torch.no_grad():
            change()
        want = conv(x)  # with gradients, so without a plan, and perhaps with sums in another order
        with torch.no_grad():
            assert_near(conv(x), want)
            assert torch.equal(conv(x), conv(x))
    with torch.inference_mode():  # whose tensors count no changes
        conv.values = nn.Parameter(conv.values.clone(), requires_grad=False)
        for _ in range(3):
            before = conv(x)
        conv.values.mul_(-1)
        torch.testing.assert_close(conv(x) + before, 2 * conv.bias.view(-1, 1, 1).expand_as(before), atol=1e-4, rtol=0)
    assert copy.deepcopy(conv).frozen


def test_a_module_plans_each_size_once(monkeypatch):
    conv, made = layer(GEOMETRIES["3x3"]), []
    plan = ops.conv2d_plan
    monkeypatch.setattr(
        ops, "conv2d_plan", lambda *args, **kwargs: made.append(kwargs["input_size"]) or plan(*args, **kwargs)
    )
    sizes = [(1, 12, 8, 8), (2, 12, 8, 8), (12, 9, 9)]
    for _ in range(2):
        for size in sizes:
            x = torch.randn(size)
            with torch.no_grad():
                got = conv(x)
            assert torch.equal(got, conv(x))
    assert made == [(1, 12, 8, 8), (2, 12, 8, 8), (1, 12, 9, 9)]
    # Values that change are seen, and another pattern is planned anew.
    with torch.no_grad():
        conv.values.mul_(-2)
        x = torch.randn(sizes[0])
        before = conv(x)
        other = layer(GEOMETRIES["3x3"])
        conv.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(conv(x), other(x)) and not torch.equal(before, other(x))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("ordered", [False, True])
def test_foreign_plans_read_nothing_foreign(geometry, ordered):
    """An error, or numbers of the input's own pixels; the sanitizers look on (make sanitize)."""
    conv, x = layer(geometry), torch.randn(2, 12, 15, 13)
    plan = plan_of(conv, x.shape, ordered)
    rows, count = conv.crow_indices.numel(), conv.col_indices.numel()
    for at in range(rows + count, plan.indices.numel(), max(count // 7, 1)):  # starts, then offsets
        for offset in (-1, -(2**31), 2**31 - 1, 10**6, 0, int(plan.indices[rows + count :].max()) + 1):
            indices = plan.indices.clone()  # starts, offsets, and the order, in which values are brought as it was
            indices[at] = offset
            try:
                planned(conv, x, plan._replace(indices=indices))
            except (IndexError, RuntimeError) as error:
                assert "Expected" in str(error)
    kind, pitch, blocks, *taps = plan.tiling
    others = ((0, blocks, *taps), (pitch, blocks, *(0 for _ in taps)), (2**31 - 1, blocks, *(tap + 1 for tap in taps)))
    for tiling in ((kind, *other) for other in others):
        assert torch.equal(planned(conv, x, plan._replace(tiling=tiling)), conv(x))
    wrong = [(kind, pitch, number, *taps) for number in (blocks + 1, 0, 13)]
    for tiling in ((), (1 - kind, *plan.tiling[1:]), [-5] * len(plan.tiling), *wrong):
        with pytest.raises(ValueError, match="Expected a (tiling|plan)"):
            planned(conv, x, plan._replace(tiling=tuple(tiling)))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_plan_is_what_is_read(geometry):
    """With all its columns at the first one's place, the numbers are others; for another size they are made anew."""
    conv, x = layer(geometry), torch.randn(2, 12, 15, 13)
    plan = plan_of(conv, x.shape)
    offsets = plan.indices[-conv.col_indices.numel() - 1 : -1]
    offsets[:] = int(offsets.min())
    assert not torch.equal(planned(conv, x, plan), conv(x))
    other = torch.randn(2, 12, 30, 40)
    assert plan_of(conv, other.shape).tiling != plan.tiling
    assert torch.equal(planned(conv, other, plan), conv(other))


def test_errors():
    conv, x = layer(GEOMETRIES["3x3"]), torch.randn(2, 12, 15, 13)
    plan = plan_of(conv, x.shape)
    with pytest.raises(ValueError, match=r"Expected a plan of conv2d_plan with .* entries .*, got"):
        planned(conv, x, plan._replace(indices=plan.indices[:-1]))
    with pytest.raises(ValueError, match="on the CPU, got an input of 5 dimensions"):
        planned(conv, x[None], plan)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    pattern = (conv.crow_indices, conv.col_indices)
    for tiling in ([1, 2], [-1] * 12, [2**31] * 12, [1] * 13):
        with pytest.raises(ValueError, match="Expected a tiling"):
            torch.ops.sparsekd.conv2d_plan(*pattern, tiling, 1, x.shape, 10, *geometry)
    with pytest.raises(IndexError, match="Expected col_indices in 0..107, got 108"):
        col = conv.col_indices.clone()
        col[-1] = 108
        torch.ops.sparsekd.conv2d_plan(conv.crow_indices, col, plan.tiling, 1, x.shape, 10, *geometry)
    assert plan_of(conv, (0, 12, 8, 8)) is None
    arguments = (conv.values, plan.indices, plan.tiling, None, None, conv.bias, None, "none", False, 10, *geometry)
    with pytest.raises(RuntimeError, match="Expected conv2d_planned under torch.no_grad.*use conv2d$"):
        torch.ops.sparsekd.conv2d_planned(x, *arguments)


def test_lanes_are_for_tensor_cores():
    """What was fused for a GPU gives images on the CPU."""
    conv = layer(GEOMETRIES["3x3"]).requires_grad_(False)
    fused = FusedConv2d(conv)
    fused.lanes = True
    x = torch.randn(8, 12, 5, 5)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(fused(x), conv(x))

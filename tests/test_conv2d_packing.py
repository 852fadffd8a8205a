"""Images on their way into lanes (csrc/cpu/strips.h): every way in, with foreign numbers on both sides of tensors."""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import printed_under_isa
from test_generated import between_guards

from sparsekd.sparse import ops

pytestmark = pytest.mark.usefixtures("one_thread")


def between_nans(tensor):
    """The same tensor between NaNs: what is read past its ends and not thrown away shows in the result."""
    room = torch.full((tensor.numel() + 64,), float("nan"))
    place = room[32:-32].view(tensor.shape)
    return place.copy_(tensor)


def case(seed):
    pick = torch.Generator().manual_seed(seed)

    def draw(*choices):
        return choices[torch.randint(len(choices), (), generator=pick)]

    geometry = {
        "stride": (draw(1, 1, 2, 3), draw(1, 1, 2)) if draw(0, 0, 1) else draw(1, 1, 2),
        "dilation": draw(1, 1, 1, 2),
        "padding": (draw(0, 1, 2, 3), draw(0, 1, 1, 2)),
    }
    kernel = (draw(1, 2, 3, 3, 5), draw(1, 3, 3, 4))
    # Small maps, those of a strip's width and one more, and wide ones.
    size = (draw(1, 3, 4, 7, 8, 9, 14, 15, 16, 23), draw(2, 4, 5, 7, 8, 10, 14, 16, 17, 28))
    dilation = geometry["dilation"]
    size = tuple(max(n, dilation * (k - 1) + 1) for n, k in zip(size, kernel, strict=True))
    x = torch.randn(draw(1, 1, 2, 5, 9, 16, 17), 3, *size, generator=pick)
    weight = torch.randn(9, 3, *kernel, generator=pick)
    weight *= torch.rand(weight.shape, generator=pick) < draw(0.3, 0.9)
    return x, weight, geometry


@pytest.mark.parametrize("first", range(0, 80, 10))
def test_every_way_in(first):
    for seed in range(first, first + 10):
        x, weight, geometry = case(seed)
        mask = weight != 0
        crow = torch.cat([torch.zeros(1, dtype=torch.int64), mask.flatten(1).sum(1).cumsum(0)]).int()
        col = mask.flatten(1).nonzero()[:, 1].int()
        values = weight[mask].unsqueeze(1).requires_grad_()
        given = between_nans(x).requires_grad_()
        shape = dict(out_channels=9, kernel_size=weight.shape[2:], **geometry)
        got = ops.conv2d(given, values, crow, col, **shape)
        wide, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
        want = F.conv2d(wide, wide_weight, **geometry)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        grad = torch.randn(got.shape)
        got.backward(between_nans(grad))
        want.backward(grad.double())
        torch.testing.assert_close(given.grad.double(), wide.grad, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(values.grad[:, 0].double(), wide_weight.grad[mask], atol=1e-3, rtol=1e-4)
        # A plan changes no bit.
        with torch.no_grad():
            plan = ops.conv2d_plan(crow, col, vector=1, input_size=tuple(x.shape), **shape)
            assert torch.equal(ops.conv2d_fused(given, values, crow, col, plan=plan, **shape), got)


@torch.no_grad()
def check_lying(seed):
    """A 1 x 1 kernel on images of any number of pixels, before and behind which nothing may be read."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    vector, groups, activation = (
        draw.choice([1, 4, 4, 8]),
        draw.choice([1, 1, 2]),
        draw.choice(["none", "relu", "silu"]),
    )
    rows, channels = groups * vector * draw.randint(1, 12), groups * draw.randint(1, 70)
    x = torch.randn(draw.randint(1, 4), channels, draw.randint(3, 15), draw.randint(3, 15))
    kept = torch.rand(rows // vector, channels // groups) < draw.choice([0.1, 0.4])
    values = torch.randn(int(kept.sum()), vector)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]).int()
    weight = torch.zeros(rows // vector, channels // groups, vector)
    weight[kept] = values
    weight = weight.transpose(1, 2).reshape(rows, channels // groups, 1, 1)
    residual, bias = torch.randn(len(x), rows, *x.shape[2:]), torch.randn(rows)
    want = F.conv2d(x.double(), weight.double(), bias.double(), groups=groups) + residual
    want = {"none": lambda y: y, "relu": F.relu, "silu": F.silu}[activation](want)
    layer = dict(out_channels=rows, kernel_size=1, groups=groups, activation=activation)
    for last in (False, True):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            given = between_guards(x, last)
            got = ops.conv2d_fused(
                given, values, crow, kept.nonzero()[:, 1].int(), shift=bias, residual=residual, **layer
            )
            torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5, msg=lambda m: f"seed {seed}: {m}")


def test_pixels_that_are_read_where_they_lie(isa):
    code = "import test_conv2d_packing as t\nfor seed in range(60): t.check_lying(seed)\nprint('fine')"
    assert printed_under_isa(isa, code).split() == ["fine"]

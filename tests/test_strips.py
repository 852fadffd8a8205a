"""Layers whose activations stay in strips: to the last bit what each of them makes by itself."""

import os
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, printed_under_isa
from torch import nn

from sparsekd.sparse.modules import FusedConv2d, MaxPool2d, Shortcut, SparseConv2d, SqueezeExcite
from sparsekd.sparse.modules.fused import ACTIVATIONS


def fused(in_channels, out_channels, kernel, stride=1, vector=1, groups=1, dilation=1, activation="relu", density=0.3):
    padding = [dilation * (k - 1) // 2 for k in kernel]
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=density < 0.5)
    in_group = out_channels // groups
    kept = torch.rand(groups, -(-in_group // vector), 1, *conv.weight.shape[1:]) < density
    mask = kept.expand(-1, -1, vector, -1, -1, -1).flatten(1, 2)[:, :in_group].reshape(conv.weight.shape)
    sparse = SparseConv2d.from_dense(conv, mask, vector=vector)
    sparse.freeze()
    return FusedConv2d(sparse, activation).requires_grad_(False)


class Net:
    """Layers of a sequence and what they make one by one. Place 0 is the input."""

    def __init__(self, input):
        self.layers, self.values = [], [input]

    def add(self, layer, input, residual=None):
        args = [self.values[input]] + ([] if residual is None else [self.values[residual]])
        with torch.no_grad():
            self.values.append(layer(*args))
            layer(*args)  # a call is remembered when it was made once
        self.layers.append((layer, input, residual))
        return len(self.values) - 1

    def sequence(self, outputs, strips="always"):
        sequence = torch.classes.sparsekd.PlannedSequence(1)
        for layer, input, residual in self.layers:
            if isinstance(layer, MaxPool2d):
                sequence.max_pool2d(input, list(layer.kernel_size), list(layer.stride), list(layer.padding))
                continue
            if isinstance(layer, Shortcut):
                sequence.shortcut(input, list(layer.stride), list(layer.new_channels))
                continue
            if isinstance(layer, SqueezeExcite):
                weights = (layer.reduce, layer.reduce_bias, layer.expand, layer.expand_bias)
                sequence.squeeze_excite(input, *weights, layer.activation, layer.gate)
                continue
            conv = layer.conv
            bound = conv._plans.bound[self.values[input].shape, layer.activation]
            sequence.conv2d(bound, conv.values, conv.bias, input, residual)
        sequence.output(outputs, strips)
        return sequence


@torch.no_grad()
def run(sequence, input):
    return sequence.run([input])


def check(net, outputs=None):
    """Steps in strips of a sequence, which has to make what its layers make."""
    outputs = outputs or [len(net.values) - 1]
    sequence = net.sequence(outputs)
    for _ in range(2):  # the second time memory holds what the first one left
        for place, got in zip(outputs, run(sequence, net.values[0]), strict=True):
            want = net.values[place]
            assert (
                torch.equal(got, want)
                or (got.isnan() == want.isnan()).all()
                and torch.equal(got.nan_to_num(), want.nan_to_num())
            ), f"place {place}: {(got - want).abs().max()}"
    return set(sequence.in_strips())


def random_net(seed):
    of = random.Random(seed)
    torch.manual_seed(seed)
    vector, groups = of.choice([1, 1, 2, 4, 8]), of.choice([1, 1, 1, 2])
    batch, size = of.choice([1, 1, 2, 3, 4, 5, 8]), [of.choice([3, 7, 8, 12, 13, 16, 24, 28, 32]) for _ in range(2)]
    channels = [groups * of.randint(1, 10) for _ in range(3)]
    net = Net(torch.randn(batch, channels[0], *size))
    for _ in range(of.randint(2, 9)):
        input = len(net.values) - 1 if of.random() < 0.8 else of.randrange(len(net.values))
        value = net.values[input]
        small = min(value.shape[2:]) < 3
        if of.random() < 0.15 and not small:
            kernel = of.choice([(3, 3), (2, 2), (3, 2)])
            net.add(MaxPool2d(kernel, (2, 2), tuple(k // 2 for k in kernel)), input)
            continue
        if of.random() < 0.1:
            channels_of = value.shape[1]
            inner = nn.Conv2d(channels_of, 3, 1), nn.Conv2d(3, channels_of, 1, bias=False)
            net.add(SqueezeExcite(*inner, "silu", of.choice(["sigmoid", "hardsigmoid"])).requires_grad_(False), input)
            continue
        if of.random() < 0.1:
            new = (groups * of.randint(0, 2), groups * of.randint(0, 2))
            net.add(Shortcut(of.choice([(2, 2), (2, 2), (1, 1), (1, 2)]), new), input)
            continue
        kernel = of.choice([(1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (3, 1), (7, 7), (2, 2) if not small else (1, 3)])
        depthwise = of.random() < 0.2
        layer = fused(
            value.shape[1],
            value.shape[1] * of.choice([1, vector]) if depthwise else of.choice([*channels, value.shape[1]]),
            kernel,
            stride=of.choice([1, 1, 1, 2]) if not small else 1,
            vector=vector,
            groups=value.shape[1] if depthwise else groups,
            dilation=of.choice([1, 1, 1, 2]) if min(value.shape[2:]) > 8 else 1,
            activation=of.choice(["relu", "relu", "none", "relu6", "silu", "hardswish"]),
            density=of.choice([0.1, 0.3, 0.6, 1.0]),
        )
        place = net.add(layer, input)
        alike = [i for i, other in enumerate(net.values[:-1]) if other.shape == net.values[place].shape]
        if alike and of.random() < 0.5:
            net.layers.pop(), net.values.pop()
            net.add(layer, input, of.choice(alike))
    outputs = [len(net.values) - 1] + [i for i in range(1, len(net.values) - 1) if of.random() < 0.15]
    return net, outputs


@pytest.mark.parametrize("part", range(8))
def test_random_networks(part):
    kept = 0
    for seed in range(part * 25, part * 25 + 25):
        net, outputs = random_net(seed)
        kept += len(check(net, outputs))
    assert kept > 50


def test_under_every_instruction_set(isa):
    code = "import test_strips as t\nprint(sum(len(t.check(*t.random_net(seed))) for seed in range(60)))"
    assert int(printed_under_isa(isa, code)) > 60


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 6])
def test_bits_do_not_depend_on_threads(threads, batch):
    before = torch.get_num_threads()
    net = Net(torch.randn(batch, 3, 64, 64))
    place = net.add(fused(3, 16, (7, 7), 2, density=1.0), 0)
    place = net.add(MaxPool2d((3, 3), (2, 2), (1, 1)), place)
    for _ in range(2):
        place = net.add(fused(16, 16, (3, 3)), net.add(fused(16, 16, (3, 3)), place), place)
    short = net.add(fused(16, 24, (1, 1), 2, activation="none"), place)
    place = net.add(fused(24, 24, (3, 3)), net.add(fused(16, 24, (3, 3), 2), place), short)
    try:
        torch.set_num_threads(threads)
        assert len(check(net)) > 6  # one whose sums would be made in another order stays by itself
    finally:
        torch.set_num_threads(before)


def two_layers(size=(2, 4, 16, 16), **options):
    net = Net(torch.randn(size))
    net.add(fused(4, 5, (3, 3), **options), net.add(fused(4, 4, (3, 3)), 0))
    return net


@pytest.mark.parametrize("batch", [7, 17, 33])  # that groups of images do not divide: else strips would be regrouped
def test_images_that_the_same_strips_make(two_thread_counts, batch):
    """A kernel that spans the image reads images of what other layers keep in strips."""
    net = Net(torch.randn(batch, 8, 16, 16))
    half = net.add(fused(8, 6, (3, 3), stride=2), 0)
    conv = nn.Conv2d(6, 10, 9, padding=8)
    sparse = SparseConv2d.from_dense(conv, torch.rand(conv.weight.shape) < 0.2)
    sparse.freeze()
    whole = net.add(FusedConv2d(sparse, "relu").requires_grad_(False), half)
    net.add(fused(8, 10, (3, 3)), 0, whole)
    assert two_thread_counts(lambda: check(net)) == [{1, 2, 3}, {1, 2, 3}]


def test_what_a_chain_makes_is_a_convolution():
    net = two_layers()
    want = net.values[0]
    for layer, *_ in net.layers:
        conv = layer.conv
        want = ACTIVATIONS[layer.activation](F.conv2d(want, conv.to_dense().weight, conv.bias, padding=1))
    assert check(net) == {1, 2}
    assert_near(run(net.sequence([2]), net.values[0])[0], want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pixel", [(0, 0), (5, 4), (11, 9), (2, 5)])
def test_one_pixel_spoils_no_more_than_it_reaches(value, pixel):
    net = Net(torch.randn(2, 4, 12, 10))
    net.values[0][1, 2][pixel] = value
    net.add(fused(4, 5, (3, 3)), net.add(MaxPool2d((3, 3), (2, 2), (1, 1)), net.add(fused(4, 4, (3, 3)), 0)))
    check(net)
    assert net.values[-1][0].isfinite().all()


@pytest.mark.parametrize(("activation", "kept"), [("none", {1, 3}), ("silu", {1, 3}), ("relu", {1, 2, 3})])
def test_pools_of_negative_numbers_see_no_zeros_around_them(activation, kept):
    net, first = Net(torch.randn(2, 4, 16, 16)), fused(4, 4, (3, 3), activation=activation)
    first.conv.bias -= 5
    net.add(fused(4, 5, (3, 3)), net.add(MaxPool2d((3, 3), (2, 2), (1, 1)), net.add(first, 0)))
    assert check(net) == kept


def test_rows_that_pad_and_groups():
    for vector, groups in ((4, 1), (8, 1), (2, 2), (4, 2)):
        net = Net(torch.randn(3, 2 * groups, 14, 14))
        place = net.add(fused(2 * groups, 6 * groups, (3, 3), vector=vector, groups=groups), 0)
        net.add(fused(6 * groups, 6 * groups, (1, 1), vector=vector, groups=groups), place, place)
        whole = groups == 1 or 6 % vector == 0
        assert (len(check(net)) == 2) == whole


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"kernel": (5, 5), "dilation": 2}, {"vector": 2}])
def test_depthwise_layers_are_members(threads, options):
    before = torch.get_num_threads()
    net = Net(torch.randn(1, 6, 40, 40))
    wide = net.add(fused(6, 150, (1, 1), activation="relu6"), 0)
    options = {"kernel": (3, 3), "activation": "relu6", "density": 0.5, **options}
    apart = net.add(fused(150, 150 * options.get("vector", 1), groups=150, **options), wide)
    net.add(fused(150 * options.get("vector", 1), 6, (1, 1), activation="none"), apart)
    try:
        torch.set_num_threads(threads)
        assert check(net) == {1, 2, 3}
    finally:
        torch.set_num_threads(before)
    conv = net.layers[1][0].conv
    want = F.conv2d(net.values[1], conv.to_dense().weight, conv.bias, conv.stride, conv.padding, conv.dilation, 150)
    assert_near(net.values[2], want.clamp(0, 6))


def test_values_that_change_are_seen():
    net = two_layers()
    sequence = net.sequence([2])
    run(sequence, net.values[0])
    net.layers[1][0].conv.values.mul_(2)
    with torch.no_grad():
        want = net.layers[1][0](net.values[1])
    assert torch.equal(run(sequence, net.values[0])[0], want)


def test_results_are_their_callers_own():
    net = two_layers()
    sequence = net.sequence([1, 2])
    first = run(sequence, net.values[0])
    kept = [result.clone() for result in first]
    run(sequence, net.values[0] + 1)
    assert all(map(torch.equal, first, kept))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.double(),
        lambda x: x[:1],
        lambda x: x[..., :-1],
        lambda x: x.to_sparse(),
        lambda x: x[0],
        lambda x: x.to_mkldnn(),
        torch._neg_view,  # of numbers that lie in memory with the other sign
        lambda x: torch._efficientzerotensor(x.shape),  # that has no memory
    ],
)
def test_another_input_is_not_taken(spoil):
    net = two_layers()
    assert run(net.sequence([2]), spoil(net.values[0])) is None


def test_inputs_of_other_strides_are_taken():
    net = two_layers()
    sequence = net.sequence([2])
    for x in (
        net.values[0].to(memory_format=torch.channels_last),
        net.values[0].transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(run(sequence, x)[0], net.values[2])


def test_values_that_do_not_fit_are_not_taken():
    net = two_layers()
    conv = net.layers[1][0].conv
    sequence = net.sequence([2])
    for data in (conv.values.data[:-1], conv.values.data.double(), conv.values.data.repeat(1, 2)):
        conv.values.data, kept = data, conv.values.data
        assert run(sequence, net.values[0]) is None
        conv.values.data = kept
    assert torch.equal(run(sequence, net.values[0])[0], net.values[2])


@pytest.mark.parametrize("size", [(5, 5), (16, 16)])
def test_gates_of_an_image_are_of_its_own_numbers(size):
    """Those of others, however large, are in the same vectors."""
    net = Net(torch.randn(8, 4, *size) * torch.logspace(-25, 25, 8).view(-1, 1, 1, 1))
    gates = SqueezeExcite(nn.Conv2d(5, 2, 1), nn.Conv2d(2, 5, 1), "silu", "sigmoid").requires_grad_(False)
    net.add(gates, net.add(fused(4, 5, (1, 1), activation="none"), 0))
    assert check(net) == {1, 2}


def test_gates_that_do_not_fit_are_not_taken():
    net = two_layers()
    gates = SqueezeExcite(nn.Conv2d(5, 2, 1), nn.Conv2d(2, 5, 1), "relu", "sigmoid").requires_grad_(False)
    net.add(gates, 2)
    sequence = net.sequence([3])
    assert sequence.in_strips() == [1, 2, 3]
    kept = {name: parameter.data for name, parameter in gates.named_parameters()}
    for channels, hidden, dtype in ((4, 2, None), (6, 2, None), (5, 3, None), (5, 2, torch.float64)):
        other = nn.Conv2d(channels, hidden, 1), nn.Conv2d(2, channels, 1, dtype=dtype)
        other = SqueezeExcite(*other, "relu", "sigmoid")
        for name, parameter in gates.named_parameters():
            parameter.data = getattr(other, name).data
        assert run(sequence, net.values[0]) is None
    for name, parameter in gates.named_parameters():
        parameter.data = kept[name]
    assert torch.equal(run(sequence, net.values[0])[0], net.values[3])


def test_gradients_are_not_asked_of_it():
    net = two_layers()
    assert net.sequence([2]).run([net.values[0]]) is None


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="a sanitized build has small tiles, so that costs differ")
def test_costs_decide():
    small, large = Net(torch.randn(1, 8, 4, 4)), Net(torch.randn(1, 64, 32, 32))
    small.add(fused(8, 8, (1, 1)), small.add(fused(8, 8, (1, 1)), 0))
    place = 0
    for _ in range(4):
        place = large.add(fused(64, 64, (3, 3), density=0.1), place)
    assert small.sequence([2], strips="auto").in_strips() == []
    assert large.sequence([4], strips="auto").in_strips() == [1, 2, 3, 4]


def test_never_is_never():
    assert two_layers().sequence([2], strips="never").in_strips() == []
    with pytest.raises(ValueError, match="Expected strips to be auto, always or never, got sometimes"):
        two_layers().sequence([2], strips="sometimes")

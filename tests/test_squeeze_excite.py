"""squeeze_excite: the operator, the module that stands for six, and how a network comes to have it."""

import warnings
from types import SimpleNamespace as Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, check_op, printed_under_isa
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekd
from sparsekd.sparse import fusion, ops, reference
from sparsekd.sparse.convert import Choices
from sparsekd.sparse.fusion import _activation, _in_place
from sparsekd.sparse.modules import MaxPool2d, SqueezeExcite
from sparsekd.sparse.squeeze_excite import replace_squeeze_excitations


def arguments(channels=6, hidden=3, bias=True):
    biases = (torch.randn(hidden), torch.randn(channels)) if bias else (None, None)
    return torch.randn(hidden, channels), biases[0], torch.randn(channels, hidden), biases[1]


def test_by_hand():
    x = torch.tensor([[[[1.0, 3.0]], [[2.0, -2.0]]]])  # means 2 and 0
    reduce, expand = torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0], [-1.0]])
    got = ops.squeeze_excite(x, reduce, torch.tensor([1.0]), expand, torch.tensor([0.0, 3.0]), "relu", "hardsigmoid")
    gates = [1.0, 0.5]  # (3 + 3) / 6 and (-3 + 3 + 3) / 6
    torch.testing.assert_close(got, x * torch.tensor(gates).view(1, 2, 1, 1))


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("size", [(2, 6, 5, 7), (1, 6, 1, 1), (3, 6, 20, 33), (0, 6, 4, 4)])
def test_the_oracle(size, gate, activation):
    x = torch.randn(size)
    for bias in (False, True):
        given = arguments(bias=bias)
        want = reference.squeeze_excite_reference(x.double(), *(t if t is None else t.double() for t in given),
                                                  activation, gate)  # fmt: skip
        assert_near(ops.squeeze_excite(x, *given, activation, gate), want.float())


def test_registered():
    check_op(torch.ops.sparsekd.squeeze_excite, (torch.randn(2, 6, 4, 3), *arguments(), "silu", "sigmoid"), ())


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-42, 0.0])
def test_pixels_in_any_order_have_one_mean(scale):
    x = torch.randn(1, 6, 31, 37) * torch.logspace(-20, 6, 31).view(31, 1) * scale
    given = arguments()
    got = ops.squeeze_excite(x, *given)
    for _ in range(3):
        order = torch.randperm(31 * 37)
        mixed = ops.squeeze_excite(x.flatten(2)[..., order].view(x.shape), *given)
        assert torch.equal(mixed.flatten(2), got.flatten(2)[..., order])


def test_large_numbers_count_wherever_they_are():
    """Those that cancel each other say to which place all are rounded, also at the end of what vectors cover."""
    x = torch.randn(1, 6, 31, 37)
    x.flatten(2)[..., :2] = torch.tensor([1e30, -1e30])
    given = arguments()
    got = ops.squeeze_excite(x, *given).flatten(2)
    for shift in (16, 1130, 1145):
        mixed = ops.squeeze_excite(x.flatten(2).roll(shift, 2).view(x.shape), *given)
        assert torch.equal(mixed.flatten(2), got.roll(shift, 2))


def test_sums_of_large_numbers_are_exact():
    large = torch.rand(1, 6, 2048) * 1e30
    large[..., ::2] *= 1e-13  # whose digits end further down
    x, given = torch.cat([large, -large], 2), arguments()
    got = ops.squeeze_excite(x.view(1, 6, 64, 64), *given).flatten(2)
    order = torch.randperm(4096)
    mixed = ops.squeeze_excite(x[..., order].view(1, 6, 64, 64), *given)
    assert torch.equal(mixed.flatten(2), got[..., order])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_spoils_its_image_only(value):
    x = torch.randn(2, 6, 5, 5)
    x[1, 2, 3, 3] = value
    got = ops.squeeze_excite(x, *arguments())
    assert got[0].isfinite().all() and not got[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(6, 5, 5)}, ValueError, "Expected input with 4 dimensions"),
        ({0: torch.zeros(1, 6, 5, 5).double()}, TypeError, "Expected input of dtype Float, got Double"),
        ({1: torch.zeros(3, 5)}, ValueError, r"Expected reduce of shape \[3, 6\], got \[3, 5\]"),
        ({2: torch.zeros(4)}, ValueError, r"Expected reduce_bias of shape \[3\], got \[4\]"),
        ({3: torch.zeros(6, 3).double()}, TypeError, "Expected expand of dtype Float"),
        ({4: torch.zeros(1)}, ValueError, r"Expected expand_bias of shape \[6\], got \[1\]"),
        ({5: "gelu"}, ValueError, "Expected activation to be none, relu, relu6, silu or hardswish, got gelu"),
        ({6: "tanh"}, ValueError, "Expected gate to be sigmoid or hardsigmoid, got tanh"),
        ({0: torch.zeros(1, 6, 5, 5, requires_grad=True)}, RuntimeError, "use torch's own layers"),
    ],
)
def test_errors(change, error, message):
    given = [torch.zeros(1, 6, 5, 5), *arguments(), "relu", "sigmoid"]
    with pytest.raises(error, match=message):
        ops.squeeze_excite(*(change.get(i, argument) for i, argument in enumerate(given)))


def test_under_every_instruction_set(isa):
    printed_under_isa(isa, "import test_squeeze_excite as t\nt.test_the_oracle((3, 6, 20, 33), 'sigmoid', 'silu')")


class Block(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 8, 3, padding=1), nn.SiLU()
        self.reduce, self.inner, self.expand, self.gate = (
            nn.Conv2d(8, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2, 8, 1),
            nn.Sigmoid(),
        )
        self.pool, self.last, self.way = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), way
        self.one = nn.Conv2d(2, 1, 1)

    def forward(self, x):
        x = self.act(self.conv(x))
        if self.way == "torchvision":
            return self.last(self.gate(self.expand(self.inner(self.reduce(self.pool(x))))) * x)
        if self.way == "timm":
            return self.last(x * self.expand(self.inner(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid())
        if self.way == "hard":
            scale = self.expand(F.hardswish(self.reduce(F.adaptive_avg_pool2d(x, 1))))
            return self.last(torch.mul(x, F.hardsigmoid(scale)))
        if self.way == "one gate for all":
            return self.last(x * self.gate(self.one(self.inner(self.reduce(self.pool(x))))))
        scale = self.gate(self.expand(self.inner(self.reduce(self.pool(x)))))
        if self.way == "changed before":
            x.add_(1)
            return self.last(x * scale)
        if self.way == "of another":
            return self.last(scale * (x + 1))
        return self.last(scale * x) + scale.sum()  # "used twice"


WAYS = ["torchvision", "timm", "hard", "changed before", "of another", "used twice", "one gate for all"]


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_found_where_it_is(way, layout):
    x, model = torch.randn(2, 4, 9, 9).to(memory_format=layout), Block(way).eval().requires_grad_(False)
    graph, choices = fx.symbolic_trace(model), Choices()
    replace_squeeze_excitations(graph, "", choices, _activation, _in_place)
    made = [module for module in graph.modules() if isinstance(module, SqueezeExcite)]
    assert len(made) == (way in ("torchvision", "timm", "hard"))
    torch.testing.assert_close(graph(x), model(x))


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.namespaces = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.namespaces.add(function.namespace)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*stay dense.*:UserWarning")
def test_a_network_in_one_sequence(monkeypatch):
    """What the layers make one by one, the sequence makes; and it sees other weights."""
    # The fused one, whichever was faster at the moment.
    monkeypatch.setattr(fusion, "compare", lambda names, **_: {name: Namespace(min=name != "lines") for name in names})
    model = nn.Sequential(*(Block("torchvision") for _ in range(2))).eval()
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        conv.weight.mul_(torch.rand_like(conv.weight) < 0.3)
    x = torch.randn(2, 4, 9, 9)
    sparse = {name: {"kernel": "sparse"} for name in ("*conv", "*last")}
    fast = sparsekd.optimize_for_inference(model, x, mapping=sparse)
    want = model(x)
    for _ in range(4):
        torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-5)
    excite = next(module for module in fast.modules() if isinstance(module, SqueezeExcite))
    excite.expand_bias = nn.Parameter(excite.expand_bias + 1, requires_grad=False)
    changed = fast(x)
    assert not torch.allclose(changed, want, rtol=1e-3)
    dense, called = sparsekd.to_dense(nn.Sequential(fast, MaxPool2d((3, 3), (2, 2), (1, 1)))), Called()
    with called:
        torch.testing.assert_close(dense(x), F.max_pool2d(changed, 3, 2, 1), rtol=1e-4, atol=1e-5)
    assert called.namespaces == {"aten"}  # which exporters know
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sparsekd.optimize_for_inference(fast, x, mapping={"*": {"kernel": "sparse"}})
    torch.testing.assert_close(again(x), changed, rtol=1e-4, atol=1e-5)
    assert [m.plain for m in again.modules() if isinstance(m, SqueezeExcite)] == [False, False]

"""optimize_for_inference: what is fused, what must not be, and that it computes what the model did."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import StochasticDepth

import sparsekd
from sparsekd.sparse import fusion
from sparsekd.sparse.modules import FusedConv2d, MaxPool2d, SparseConv2d

FORCED = {"*": {"kernel": "sparse"}}


def pruned(model):
    """The model in eval mode, 80% of its weights zero, with statistics that are not 0 and 1."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight[torch.rand_like(module.weight) < 0.8] = 0
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
                module.bias.normal_()
    return model.eval()


def fused(model, x, turn=False):
    """The fused network, whether it is the fastest or not, after a check that it computes what the model does."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        want, before = model(x), copy.deepcopy(model.state_dict())
        target = copy.deepcopy(model).requires_grad_(False)
        traced = fusion._traced(target, "", lambda: target(x), {})
        result = fusion._fused(fusion.convert(traced, x, inplace=True, mapping=FORCED), turn, turn)
        assert_near(result(x), want)
        torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    return result


def epilogues(model):
    """{name: (activation, whether something is added)} of the fused convolutions."""
    found = {}
    for piece in model.modules():
        if isinstance(piece, torch.fx.GraphModule):
            for node in piece.graph.nodes:
                if node.op == "call_module" and isinstance(module := piece.get_submodule(node.target), FusedConv2d):
                    found[node.target] = (module.activation, len(node.args) == 2)
    return found


@pytest.fixture
def x():
    return torch.randn(2, 8, 12, 12)


def conv(channels=8, out=8, **options):
    return nn.Conv2d(channels, out, 3, padding=1, **options)


class Block(nn.Module):
    """A residual block with its own way of adding and of finishing."""

    def __init__(self, add, finish, downsample=False):
        super().__init__()
        self.conv1, self.bn1 = conv(bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv(bias=False), nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)) if downsample else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.add, self.finish = add, finish

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.finish(self.add(self.bn2(self.conv2(y)), self.downsample(x)))


def in_place(y, x):
    y += x
    return y


@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("add", [in_place, lambda y, x: x + y, torch.add, lambda y, x: y.add_(x)])
def test_residual_blocks(x, add, downsample):
    result = fused(pruned(Block(add, F.relu, downsample)), x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.modules())
    found = epilogues(result)
    assert found.pop("conv1") == ("relu", False)
    assert list(found.values()) == [("relu", True)] and set(found) <= {"conv2", "downsample.0"}


@pytest.mark.parametrize(
    "finish, name",
    [
        (nn.ReLU6(inplace=True), "relu6"),
        (nn.SiLU(), "silu"),
        (nn.Hardswish(), "hardswish"),
        (lambda y: F.relu6(y, inplace=True), "relu6"),
        (F.silu, "silu"),
        (F.hardswish, "hardswish"),
        (torch.relu_, "relu"),
        (lambda y: y.relu(), "relu"),
        (lambda y: y, "none"),
        (torch.tanh, "none"),
    ],
)
def test_activations(x, finish, name):
    assert epilogues(fused(pruned(Block(torch.add, finish)), x))["conv2"] == (name, True)


def test_what_does_nothing_in_eval_mode_is_gone(x):
    model = nn.Sequential(
        conv(), nn.Dropout(0.5), nn.Identity(), nn.BatchNorm2d(8), StochasticDepth(0.5, "row"), nn.ReLU()
    )
    result = fused(pruned(model), x)
    assert epilogues(result) == {"0": ("relu", False)} and len(list(result.graph.nodes)) == 3


def test_linear_and_transposed_layers_take_their_batch_norm(x):
    layers = [
        nn.ConvTranspose2d(8, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(2500, 6),
        nn.BatchNorm1d(6),
    ]
    result = fused(pruned(nn.Sequential(*layers)), x)
    assert not any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in result.modules())


class Untouchable(nn.Module):
    """conv, something that forbids fusing, relu."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.other, self.bn, self.relu = conv(), conv(), nn.BatchNorm2d(8), nn.ReLU()
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def changed_input(m, x):
    y = m.conv(x)  # of x before it is changed
    x = x.clone()
    z = m.other(x)
    view = z.view(z.shape)
    late = m.conv(z)
    view.mul_(2)
    return torch.relu(late + z) + y


def residual_that_others_see(m, x):
    kept = torch.tanh(x)
    return torch.relu(kept.add_(m.conv(x))) + kept


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.relu(m.conv(m.conv(x))),  # called twice
        lambda m, x: (lambda y: torch.relu(y) + y.mean())(m.conv(x)),  # used twice
        lambda m, x: m.relu(torch.tanh(m.conv(x))),
        lambda m, x: torch.relu(torch.add(m.conv(x), x, alpha=2)),
        lambda m, x: torch.relu(m.bn(x) + m.bn(m.conv(x) * 2)),
        changed_input,
        residual_that_others_see,
    ],
)
def test_what_must_not_be_fused(x, forward):
    result = fused(pruned(Untouchable(forward)), x)
    assert "conv" not in epilogues(result)


def test_an_input_changed_before_the_sum_forbids_the_sum(x):
    def forward(m, x):
        x = torch.tanh(x)
        y = m.conv(x)
        x.mul_(3)
        return torch.relu(y + x)

    assert epilogues(fused(pruned(Untouchable(forward)), x)) == {}


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.bn(m.conv(m.conv(x))),  # called twice
        lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)),  # used twice
    ],
)
def test_layers_that_keep_their_batch_norm(x, forward):
    result = fused(pruned(Untouchable(lambda m, x: torch.relu(m.other(forward(m, x))))), x)
    assert isinstance(result.bn, nn.BatchNorm2d) and epilogues(result) == {"other": ("relu", False)}


def test_residuals_that_are_broadcast_or_no_tensors(x):
    def forward(m, x):
        return torch.relu(m.conv(x) + x.mean((2, 3), keepdim=True)) + torch.relu(m.other(x) + x.shape[2])

    assert epilogues(fused(pruned(Untouchable(forward)), x)) == {"conv": ("relu", True), "other": ("relu", True)}


def test_hooks_are_kept_and_called(x):
    model = pruned(Block(torch.add, F.relu))
    seen = []
    model.relu.register_forward_hook(lambda *_: seen.append(1))
    result = fused(model, x)
    seen.clear()
    result(x)
    assert seen == [1] and set(epilogues(result)) == {"conv2"}


def test_hooks_of_a_block_are_called_and_its_inside_is_left_alone(x):
    model = pruned(nn.Sequential(Block(torch.add, F.relu), conv(), nn.ReLU()))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    result = fused(model, x)
    seen.clear()
    result(x)
    assert seen == [1] and epilogues(result) == {"1": ("relu", False)}


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(1), nn.MaxPool2d(5, ceil_mode=True), nn.MaxPool2d(2, dilation=3), nn.MaxPool2d(2, 1, 1)]
)
def test_pools_before_a_change_in_place(x, pool):
    def forward(m, x):
        y = m.conv(x)
        return m.pool(y).relu_().sum() + y

    model = Untouchable(forward)
    model.pool = pool
    assert isinstance(fused(pruned(model), x).pool, MaxPool2d) == (pool.padding == 1)


def test_turned_edges_compute_the_same(x):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), Block(torch.add, F.relu, True), nn.AdaptiveAvgPool2d(1))
    result = fused(pruned(model), x, turn=True)
    turned = [node.args[0].target for node in result.graph.nodes if node.target == "contiguous"]
    # Once for all that the pool feeds; the pool stands after a sparse convolution only because all are forced here.
    assert turned == ["input", "1"] and len(epilogues(result)) == 2


def test_what_cannot_be_traced_is_said_and_its_children_are_fused(x):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.rest = Block(torch.add, F.relu), nn.ModuleDict({"a": nn.Sequential(conv(), nn.ReLU())})

        def forward(self, x, flip=None):
            x = self.block(x if flip is None else -x)
            return self.rest["a"](x) if x.sum() > 0 else x

    model = pruned(Branches())
    with pytest.warns(UserWarning, match="not fused where torch.fx can't trace: the model: .*control flow"):
        result = sparsekd.optimize_for_inference(model, x, mapping=FORCED)
    assert_near(result(x), model(x))
    assert set(epilogues(fused(model, x))) == {"conv1", "conv2", "0"}
    flipped = sparsekd.optimize_for_inference(model, {"x": x, "flip": True}, mapping=FORCED)
    assert_near(flipped(x, flip=True), model(x, flip=True))


def test_a_child_whose_input_and_result_are_changed_in_place_is_fused(x):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Untouchable(lambda m, x: m.relu(m.conv(x.mul_(2))))

        def forward(self, x):
            x = x - 0.5
            y = self.block(x)
            y += x
            return y if y.sum() > 0 else -y

    assert epilogues(fused(pruned(Changing()), x)) == {"conv": ("relu", False)}
    own = Changing().eval().block  # whose example is not the same at the next forward
    result = sparsekd.optimize_for_inference(own, x.clone(), mapping=FORCED)
    assert_near(result(x.clone()), own(x.clone()))


def test_a_trace_that_took_a_wrong_turn_is_thrown_away(x):
    class Default(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x, mask=None):
            y = self.conv(x)
            return y if mask is None else y * 0

    model = pruned(Default())
    assert_near(fused(model, x)(x), model(x))


def test_the_result_is_for_inference_and_goes_back_to_dense(x):
    model = pruned(nn.Sequential(Block(torch.add, F.relu, True), nn.MaxPool2d(2)))
    result = fused(model, x)
    assert not any(parameter.requires_grad for parameter in result.parameters())
    with pytest.raises(RuntimeError, match="gradient"):
        result(x.clone().requires_grad_())
    for network in (result, copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        made = sparsekd.choices(network)
        assert len(made) == 3 and made.seconds > 0
        for name, choice in made.items():
            assert isinstance(network.get_submodule(name), SparseConv2d) and choice.kernel == "sparse"
    dense = sparsekd.to_dense(result)
    assert not any(isinstance(module, SparseConv2d) for module in dense.modules())
    assert_near(dense(x), model(x))
    assert sparsekd.report(result, x).layers


def test_the_original_is_unchanged_and_the_fastest_is_taken(x):
    model = pruned(nn.Sequential(Block(torch.add, F.relu), nn.MaxPool2d(2))).requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = sparsekd.optimize_for_inference(model.train(), x)
        again = sparsekd.optimize_for_inference(sparsekd.convert(model, x, mapping=FORCED), x)
    assert model.training and not result.training
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    for network in (result, again):
        assert_near(network(x), model.eval()(x))
    with pytest.raises(TypeError, match="Expected a torch.nn.Module, got str"):
        sparsekd.optimize_for_inference("resnet", x)


@pytest.mark.parametrize("size, reused", [(12, 0), (128, 2)])  # the latter of 1 MiB
def test_large_activations_use_their_memory_again(size, reused):
    x = torch.randn(2, 8, size, size)
    model = pruned(nn.Sequential(conv(), nn.ReLU(), conv()))
    result = sparsekd.optimize_for_inference(model, x, mapping=FORCED)
    assert len(result._forward_hooks) + len(result._forward_pre_hooks) == reused
    first = result(x)
    assert_near(first, model(x))
    kept = first.clone()
    result(-x)
    assert torch.equal(first, kept)  # what the caller holds is not written again
    assert_near(sparsekd.optimize_for_inference(result, x, mapping=FORCED)(x), kept)


@torch.no_grad()
@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_result_exports(x, tmp_path, turn, compiled):
    """Fused and with a dynamic batch; by AOTInductor to a library, too."""
    model = pruned(nn.Sequential(nn.Conv2d(8, 8, 3), nn.MaxPool2d(3, 2, 1), Block(torch.add, F.relu, True)))
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(fused(model, x, turn), (x,), dynamic_shapes=({0: batch},))
    assert exported.graph_module.code.count("sparsekd.conv2d_fused") == 2
    run = exported.module()
    if compiled:
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(package)
    for images in (x, x[:1], torch.randn(5, *x.shape[1:])):
        assert_near(run(images), model(images))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_max_pool_by_slices_is_torchs(data):
    kernel = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    size = [data.draw(st.integers(max(k - 2 * p, 1), 12)) for k, p in zip(kernel, padding, strict=True)]
    x = torch.randn(
        *data.draw(st.sampled_from([(), (2,)])),
        3,
        *size,
        dtype=data.draw(st.sampled_from([torch.float32, torch.float64])),
    )
    for value in (torch.nan, torch.inf, -torch.inf):
        x[torch.rand_like(x) < 0.05] = value
    layout = data.draw(st.sampled_from(["contiguous", "transposed", "channels_last"]))
    if layout == "transposed":
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "channels_last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    got, want = MaxPool2d(kernel, stride, padding)(x), F.max_pool2d(x, kernel, stride, padding)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got.is_contiguous() == want.is_contiguous()


def test_errors_of_the_fused_modules():
    with pytest.raises(ValueError, match="Expected activation out of none, relu, .*, got 'gelu'"):
        FusedConv2d(conv(), "gelu")
    with pytest.raises(ValueError, match="Expected an input of at least the kernel"):
        MaxPool2d((3, 3), (1, 1), (0, 0))(torch.zeros(1, 1, 2, 5))

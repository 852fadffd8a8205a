"""convert, to_dense, dense_state_dict, would_it_be_faster: the swap, and never by stealth."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn

import sparsekd
from sparsekd.sparse import convert as convert_module
from sparsekd.sparse.dispatch import Choice

FORCED = {"*": {"kernel": "sparse"}}


class Net(nn.Module):
    """A shared layer, batch-norm, a layer that is never called, and two inputs."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.conv2
        self.unused = nn.Linear(4, 4)
        self.fc = nn.Linear(8, 5)

    def forward(self, x, scale=1.0):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.again(self.conv2(x)))
        return self.fc(x.mean((2, 3))) * scale


def pruned(model, sparsity=0.8):
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight[torch.rand_like(module.weight) < sparsity] = 0
    return model


@pytest.fixture
def net():
    torch.manual_seed(0)
    return pruned(Net())


@pytest.fixture
def x():
    torch.manual_seed(2)
    return torch.randn(2, 3, 12, 12)


def convert(model, x, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tiny layers may well stay dense, which is said in a warning
        return sparsekd.convert(model, x, **kwargs)


def test_same_results_and_the_original_untouched(net, x):
    before = copy.deepcopy(net.state_dict())
    fast = convert(net, x, mapping=FORCED)
    assert isinstance(fast.conv1, sparsekd.SparseConv2d) and isinstance(net.conv1, nn.Conv2d)
    torch.testing.assert_close(fast.eval()(x), net.eval()(x))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_shared_layer_stays_shared(net, x):
    fast = convert(net, x, mapping=FORCED)
    assert fast.conv2 is fast.again


def test_inplace_changes_the_model_itself(net, x):
    assert convert(net, x, mapping=FORCED, inplace=True) is net
    assert isinstance(net.fc, sparsekd.SparseLinear)


@pytest.mark.parametrize("inputs", ["tensor", "tuple", "dict"])
def test_example_inputs_in_every_form(net, x, inputs):
    given = {"tensor": x, "tuple": (x, 2.0), "dict": {"x": x, "scale": 2.0}}[inputs]
    assert isinstance(convert(net, given, mapping=FORCED).fc, sparsekd.SparseLinear)


def test_modes_and_statistics_are_kept(net, x):
    net.train()
    net.bn1.eval()
    mean = net.bn1.running_mean.clone()
    fast = convert(net, x, mapping=FORCED)
    assert net.training and not net.bn1.training and fast.training and not fast.bn1.training
    assert fast.conv1.training
    assert torch.equal(net.bn1.running_mean, mean)


def test_choices_say_why(net, x):
    made = sparsekd.choices(convert(net, x))
    assert made["unused"].reason == "not called with example_inputs"
    assert all(choice.reason for choice in made.values())
    assert made["conv1"].dense_ms > 0 and made["conv1"].sparse_ms > 0


def test_a_layer_that_is_not_pruned_stays_as_it_is(x):
    torch.manual_seed(0)
    plain = Net()
    fast = sparsekd.convert(plain, x)
    assert type(fast.conv1) is nn.Conv2d
    assert "nothing to gain" in sparsekd.choices(fast)["conv1"].reason


def test_never_slower_dense_is_kept_when_it_wins(net, x, monkeypatch):
    def dense_wins(name, dense, sparse, inputs, rounds=7):
        return Choice(name, "Conv2d", "dense", "dense wins", sparsity=sparse.sparsity, sparse_ms=2.0, dense_ms=1.0)

    monkeypatch.setattr(convert_module, "choose", dense_wins)
    with pytest.warns(UserWarning, match="3 of 4 layers are pruned and stay dense"):
        fast = sparsekd.convert(net, x)
    assert not any(isinstance(m, sparsekd.SparseConv2d) for m in fast.modules())
    with pytest.raises(RuntimeError, match="Expected every pruned layer to become sparse, got"):
        sparsekd.convert(net, x, strict=True)


def test_the_whole_network_goes_back_when_it_is_slower(net, x, monkeypatch):
    """Layers may win alone and lose together: the network is timed too."""

    def sparse_wins(name, dense, sparse, inputs, rounds=7):
        times = {"sparse_ms": 1.0, "dense_ms": 2.0, "speedup": 2.0}
        return Choice(name, "Conv2d", "sparse", "wins", sparsity=sparse.sparsity, **times)

    class Timed:
        def __init__(self, seconds):
            self.min = seconds

    seconds = {("dense", False): 3.0, ("dense", True): 1.0, ("sparse", False): 2.0, ("sparse", True): 4.0}
    monkeypatch.setattr(convert_module, "choose", sparse_wins)
    monkeypatch.setattr(convert_module, "compare", lambda engines, **_: {key: Timed(seconds[key]) for key in engines})
    with pytest.warns(UserWarning, match=r"took 2e\+03 ms with sparse layers and 1e\+03 ms dense \(channels_last\)"):
        fast = sparsekd.convert(net, x)
    assert not any(isinstance(m, sparsekd.SparseConv2d) for m in fast.modules())
    # And the other way round, in channels_last.
    seconds["sparse", True] = 0.5
    fast = sparsekd.convert(net, x, filter_fn=lambda module, name: name != "conv1")
    convolutions = [m for m in fast.modules() if type(m) is nn.Conv2d and m.kernel_size != (1, 1)]
    assert convolutions and all(_channels_last(m.weight) for m in convolutions)
    assert any(isinstance(m, sparsekd.SparseConv2d) for m in fast.modules())
    assert not any(_channels_last(m.weight) for m in net.modules() if type(m) is nn.Conv2d and m.kernel_size != (1, 1))
    assert torch.allclose(fast(x), net(x), rtol=1e-4, atol=1e-5)


def test_dense_in_channels_last_where_that_is_fastest(net, x, monkeypatch):
    """And back: to_dense gives each weight as it was stored."""

    def dense_wins(name, dense, sparse, inputs, rounds=7):
        times = {"sparse_ms": 2.0, "dense_ms": 1.0, "speedup": 0.5}
        return Choice(name, "Conv2d", "dense", "dense wins", sparsity=sparse.sparsity, **times)

    class Timed:
        def __init__(self, key):
            self.min = 1.0 if key == ("dense", True) else 2.0

    monkeypatch.setattr(convert_module, "choose", dense_wins)
    monkeypatch.setattr(convert_module, "compare", lambda engines, **_: {key: Timed(key) for key in engines})
    fast = convert(net, x)
    assert _channels_last(fast.conv2.weight) and not _channels_last(net.conv2.weight)
    assert "2 dense ones are stored in channels_last" in sparsekd.choices(fast).summary()
    torch.testing.assert_close(fast.eval()(x), net.eval()(x))
    dense = sparsekd.to_dense(fast)
    assert not _channels_last(dense.conv2.weight) and torch.equal(dense(x), net(x))


def _channels_last(weight):
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_wrong_results_are_an_error_and_change_nothing(net, x, monkeypatch):
    original = sparsekd.SparseLinear.forward
    monkeypatch.setattr(sparsekd.SparseLinear, "forward", lambda self, input: original(self, input) + 1)
    with pytest.raises(RuntimeError, match="Expected sparse results of fc within"):
        convert(net, x, mapping=FORCED, inplace=True)
    assert isinstance(net.fc, nn.Linear)


def test_filter_and_mapping(net, x):
    fast = convert(net, x, filter_fn=lambda module, name: name != "fc", mapping=FORCED)
    assert type(fast.fc) is nn.Linear and isinstance(fast.conv1, sparsekd.SparseConv2d)
    fast = convert(net, x, mapping={"*": {"kernel": "sparse"}, "conv*": {"kernel": "dense"}})
    assert type(fast.conv1) is nn.Conv2d and isinstance(fast.fc, sparsekd.SparseLinear)
    fast = convert(net, x, mapping={"*": {"kernel": "sparse", "vector": 2}})
    assert fast.conv1.vector == 2
    torch.testing.assert_close(fast.eval()(x), net.eval()(x))
    with pytest.raises(ValueError, match="Expected settings out of kernel, vector, got speed"):
        sparsekd.convert(net, x, mapping={"*": {"speed": 1}})
    with pytest.raises(ValueError, match="Expected kernel to be one of auto, sparse, dense, got 'fast'"):
        sparsekd.convert(net, x, mapping={"*": {"kernel": "fast"}})


def test_layers_that_cannot_be_swapped_are_named(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    pruned(model)
    model[1].weight = model[0].weight
    torch_prune.l1_unstructured(model[2], "weight", 0.5)
    nn.utils.parametrizations.weight_norm(model[3])
    made = sparsekd.choices(convert(model, x, mapping=FORCED))
    assert "shares its weight with 1" in made["0"].reason
    assert made["2"].kernel == "sparse"
    assert "parametrised" in made["3"].reason


def test_a_model_that_is_one_layer(x):
    layer = pruned(nn.Conv2d(3, 4, 3))
    fast = convert(layer, x, mapping=FORCED)
    assert isinstance(fast, sparsekd.SparseConv2d)
    assert type(sparsekd.to_dense(fast)) is nn.Conv2d


def test_not_a_module():
    with pytest.raises(TypeError, match="Expected a torch.nn.Module, got int"):
        sparsekd.convert(3, torch.zeros(1))


def test_back_to_dense(net, x):
    fast = convert(net, x, mapping=FORCED)
    dense = sparsekd.to_dense(fast)
    assert list(dense.state_dict()) == list(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(dense.state_dict().values(), net.state_dict().values(), strict=True))
    assert dense.conv2 is dense.again and isinstance(fast.conv1, sparsekd.SparseConv2d)


def test_dense_state_dict_is_the_plain_models(net, x):
    """ahendriksen/msd_pytorch#3, nni#4422: a checkpoint that only the pruning tool can read."""
    fast = convert(net, x, mapping=FORCED)
    state = sparsekd.dense_state_dict(fast)
    assert list(state) == list(net.state_dict())
    Net().load_state_dict(state, strict=True)
    fast.load_state_dict(net.state_dict(), strict=True)


def test_deepcopy_and_pickle(net, x):
    """pytorch#37322: deepcopy of a pruned model breaks."""
    fast = convert(net, x, mapping=FORCED).eval()
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(x), fast(x))


def test_retraining_after_the_swap_keeps_the_holes(net, x):
    fast = convert(net, x, mapping=FORCED).train()
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        fast(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(fast.conv1.weight != 0, net.conv1.weight != 0)
    assert optimizer.state[fast.conv1.values]["momentum_buffer"].shape == fast.conv1.values.shape


def test_would_it_be_faster_tells_and_leaves_the_model_alone():
    conv = nn.Conv2d(16, 16, 3, padding=1)
    weight = conv.weight.clone()
    found = sparsekd.would_it_be_faster(conv, 0.9, (1, 16, 14, 14))
    assert found[""].sparsity == pytest.approx(0.9, abs=1e-3) and found[""].speedup > 0
    assert torch.equal(conv.weight, weight)
    assert sparsekd.would_it_be_faster(conv, 0.5, (1, 16, 14, 14), "4x1")[""].vector == 4
    with pytest.raises(ValueError, match="Expected sparsity in \\[0, 1\\), got 1.5"):
        sparsekd.would_it_be_faster(conv, 1.5, (1, 16, 14, 14))
    with pytest.raises(ValueError, match="Expected pattern to be"):
        sparsekd.would_it_be_faster(conv, 0.5, (1, 16, 14, 14), "2:4")

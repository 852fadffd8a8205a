"""convert on models with hooks, masks, lazy, scripted and shared parts: swapped where it can be, else left and said."""

import warnings

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn

import sparsekd
from sparsekd.sparse import convert as convert_module

FORCED = {"*": {"kernel": "sparse"}}


def convert(model, x, **kwargs):
    return sparsekd.convert(model, x, mapping=FORCED, **kwargs)


def reasons(model):
    return {name: choice.reason for name, choice in sparsekd.choices(model).items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "same", "dilation": 3},
        {"padding": 2, "stride": 2, "groups": 2, "bias": False},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "reflect"},
    ],
)
def test_conv1d_is_computed_in_two_dimensions(options):
    model = nn.Sequential(nn.Conv1d(4, 6, 5, **options)).eval()
    with torch.no_grad():
        model[0].weight[torch.rand_like(model[0].weight) < 0.8] = 0
    for x in (torch.randn(2, 4, 21), torch.randn(4, 21)):
        fast = convert(model, x)
        assert type(fast[0]) is sparsekd.SparseConv1d
        torch.testing.assert_close(fast(x), model(x))
    dense = sparsekd.to_dense(fast)
    assert type(dense[0]) is nn.Conv1d and repr(dense) == repr(model)
    assert torch.equal(dense[0].weight, model[0].weight)
    dense.load_state_dict(sparsekd.dense_state_dict(fast), strict=True)
    fast.load_state_dict(model.state_dict(), strict=True)


def test_conv1d_trains_and_is_saved(tmp_path):
    model = nn.Sequential(nn.Conv1d(4, 6, 3))
    with torch.no_grad():
        model[0].weight[torch.rand_like(model[0].weight) < 0.8] = 0
    x = torch.randn(2, 4, 9)
    fast = convert(model, x)
    for network in (fast, model):
        network(x).square().sum().backward()
    torch.testing.assert_close(fast[0].bias.grad, model[0].bias.grad)
    dense = model[0].weight.grad * (model[0].weight != 0)
    torch.testing.assert_close(fast[0].values.grad.sum(), dense.sum())
    sparsekd.save(fast, tmp_path / "m.safetensors")
    loaded = sparsekd.load(nn.Sequential(nn.Conv1d(4, 6, 3)), tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), fast(x))
    with pytest.raises(ValueError, match=r"Expected an input of shape \[N, 4, L\] or \[4, L\], got \[2, 3, 9\]"):
        fast(torch.randn(2, 3, 9))


def test_hooks_go_along_there_and_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    model[0].register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    x = torch.randn(1, 3, 6, 6)
    fast = convert(model, x)
    torch.testing.assert_close(fast(x), model(x))
    dense = sparsekd.to_dense(fast)
    assert type(dense[0]) is nn.Conv2d and torch.equal(dense(x), model(x))
    seen = []
    fast[0].register_forward_hook(lambda module, args, output: seen.append(1))
    model(x)
    assert not seen and len(model[0]._forward_hooks) == 1


def test_what_prune_removed_stays_removed():
    """pytorch#37322: such a model can't even be copied after a forward with gradients."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    for layer in model:
        torch_prune.l1_unstructured(layer, "weight", 0.9)
    torch_prune.random_unstructured(model[0], "bias", 2)
    x = torch.randn(1, 3, 8, 8)
    expected = model(x)
    keys = list(model.state_dict())
    fast = convert(model, x, filter_fn=lambda module, name: name == "0")
    assert list(model.state_dict()) == keys and torch_prune.is_pruned(model[0])
    assert type(fast[0]) is sparsekd.SparseConv2d and fast[0].sparsity == pytest.approx(0.9, abs=0.01)
    assert fast[0].values.requires_grad and int((fast[0].bias == 0).sum()) == 2
    assert torch_prune.is_pruned(fast[1])
    torch.testing.assert_close(fast(x), expected)
    for layer in model:
        torch_prune.remove(layer, "weight")
    torch_prune.remove(model[0], "bias")
    assert torch.equal(sparsekd.to_dense(fast)[0].weight, model[0].weight)


def test_lazy_layers_are_made_in_the_copy():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(4))
    x = torch.randn(1, 3, 6, 6)
    fast = convert(model, x)
    assert type(fast[0]) is sparsekd.SparseConv2d and type(fast[2]) is sparsekd.SparseLinear
    assert all(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters())


def test_what_is_left_alone_is_said():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1)))
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    second.bias = first.bias

    class Scaled(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    parametrised = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    model = nn.Sequential(scripted, first, second, Scaled(4, 4, 1), parametrised).eval()
    x = torch.randn(1, 4, 5, 5)
    fast = convert(model, x)
    assert torch.equal(fast(x), model(x))
    said = reasons(fast)
    assert said["0.0"] == "inside a scripted module"
    assert said["1"] == "shares its bias with 2" and said["2"] == "shares its bias with 2"
    assert said["3"] == "Scaled is a class of its own"
    assert "remove_parametrizations" in said["4"]


def test_attention_is_left_where_torch_passes_by_its_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), layer).eval()
    x = torch.randn(1, 5, 8)
    fast = convert(model, x)
    assert type(fast[0]) is sparsekd.SparseLinear
    said = reasons(fast)
    assert said["1.self_attn.out_proj"] == "not called with example_inputs"
    assert said["1.linear1"] == said["1.linear2"] == "nn.TransformerEncoderLayer reads its weight directly"
    torch.testing.assert_close(fast(x), model(x))


def test_answers_that_hang_on_the_last_bit():
    """A detector keeps the boxes whose score is above another's: one rounding decides how many come out."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            scores = self.conv(x).flatten()
            return scores[(scores * 1e7).long() % 2 == 0]

    x = torch.randn(1, 3, 16, 16)
    assert type(convert(Detector(), x).conv) is sparsekd.SparseConv2d


def test_a_wrong_whole_is_told_from_a_wavering_one(monkeypatch):
    """The layers are right alone, and the network is not: nothing excuses that."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    original = convert_module.put_in_place

    def wrong(model, swaps):
        model = original(model, swaps)
        return nn.Sequential(model, nn.ReLU())

    monkeypatch.setattr(convert_module, "put_in_place", wrong)
    with pytest.raises(RuntimeError, match="Expected sparse results of the whole network within"):
        convert(model, torch.randn(1, 3, 8, 8))


def test_random_numbers_of_the_user_are_left_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.dropout(self.fc(x), training=True)

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = Noisy()
    torch.manual_seed(3)
    convert(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(1), expected)


def test_in_the_precision_of_autocast():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = convert(model, x)
        assert fast(x).dtype == torch.bfloat16
        torch.testing.assert_close(fast(x), model(x), rtol=0.05, atol=0.05)


def test_what_the_search_cost_is_kept():
    fast = convert(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8))
    made = sparsekd.choices(fast)
    assert made.seconds > 0 and made.summary().startswith("1 of 1 layers are sparse; measuring and swapping took")

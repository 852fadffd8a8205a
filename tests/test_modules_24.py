"""SparseConv2d of pattern "2:4": as the masked dense layer, on the way there and back."""

import copy
import io

import pytest
import torch
from conftest import assert_near
from test_conv2d_24 import mask_24
from torch import nn

import sparsekd
from sparsekd.sparse.modules import SparseConv2d


def layers(groups=2, **options):
    """(plain with zeros, sparse)"""
    conv = nn.Conv2d(16 * groups, 4 * groups, 3, padding=1, groups=groups, **options)
    mask = mask_24(conv.weight.shape)
    sparse = SparseConv2d.from_dense(conv, mask, pattern="2:4")
    with torch.no_grad():
        conv.weight.mul_(mask)
    return conv, sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_as_the_masked_layer(mode, dtype):
    conv, sparse = layers(padding_mode=mode, dtype=dtype)
    input = torch.randn(2, 32, 6, 5, dtype=dtype)
    assert_near(sparse(input), conv.double()(input.double()), dtype)
    assert sparse.sparsity == 0.5 and "pattern='2:4'" in repr(sparse)
    assert torch.equal(sparse.weight.double(), conv.weight) and torch.equal(
        sparse.to_dense().weight.double(), conv.weight
    )


def test_training_moves_what_is_kept_alone():
    conv, sparse = layers()
    input = torch.randn(2, 32, 6, 5)
    for module in (conv, sparse):
        module(input).square().sum().backward()
    mask = sparse.mask
    assert_near(sparse.values.grad[:, 0], conv.weight.grad[mask])
    assert_near(sparse.bias.grad, conv.bias.grad)
    torch.optim.SGD(sparse.parameters(), 0.1).step()
    assert torch.equal(sparse.mask, mask) and torch.equal(sparse.weight != 0, mask)


def test_zeros_are_taken_and_filled_up():
    conv = nn.Conv2d(16, 4, 1)
    with torch.no_grad():
        conv.weight[:, 1::2] = 0
        conv.weight[0] = 0
    sparse = SparseConv2d.from_dense(conv, pattern="2:4")
    assert sparse.nnz == 4 * 8
    input = torch.randn(1, 16, 3, 3)
    assert_near(sparse(input), conv(input))


def test_saved_and_loaded(tmp_path):
    conv, sparse = layers()
    input = torch.randn(1, 32, 5, 5)
    want = sparse(input)
    other = SparseConv2d.from_dense(layers()[0], pattern="2:4")
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other(input), want)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(sparse), torch.load(buffer, weights_only=False)):
        assert twin._plan_24.col_indices is twin.col_indices and torch.equal(twin(input), want)
    sparsekd.save(nn.Sequential(sparse), tmp_path / "model.safetensors")
    loaded = sparsekd.load(nn.Sequential(layers()[0]), tmp_path / "model.safetensors")
    assert loaded[0].pattern == "2:4" and torch.equal(loaded(input), want)
    back = sparsekd.to_dense(loaded)
    assert type(back[0]) is nn.Conv2d and torch.equal(back[0].weight, conv.weight)


def test_another_pattern_is_not_loaded():
    _, sparse = layers()
    before = sparse.values.detach().clone()
    dense = SparseConv2d(32, 8, 3, padding=1, groups=2)
    with pytest.raises(RuntimeError, match="a mask that keeps two of each four consecutive input channels"):
        sparse.load_state_dict(dense.state_dict())
    assert torch.equal(sparse.values, before)


def test_from_meta():
    conv, sparse = layers()
    with torch.device("meta"):
        empty = nn.Conv2d(32, 8, 3, padding=1, groups=2)
    made = SparseConv2d.from_dense(empty, sparse.mask, pattern="2:4")
    assert made(torch.empty(1, 32, 5, 5, device="meta")).shape == (1, 8, 5, 5)
    made = made.to_empty(device="cpu")
    made.load_state_dict(sparse.state_dict())
    input = torch.randn(1, 32, 5, 5)
    assert torch.equal(made(input), sparse(input))


def test_compiled():
    _, sparse = layers()
    input = torch.randn(2, 32, 6, 5)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), sparse(input))


@torch.no_grad()
def test_fused():
    from sparsekd.sparse.modules import FusedConv2d

    conv, sparse = layers()
    input, residual = torch.randn(2, 32, 6, 5), torch.randn(2, 8, 6, 5)
    assert_near(FusedConv2d(sparse, "relu")(input, residual), (conv(input) + residual).relu())


def test_what_does_not_fit_is_refused():
    conv = nn.Conv2d(16, 4, 3)
    with pytest.raises(ValueError, match="at most two non-zeros"):
        SparseConv2d.from_dense(conv, pattern="2:4")
    with pytest.raises(ValueError, match="multiple of 16 input channels per group for 2:4 weights, got 8"):
        SparseConv2d.from_dense(nn.Conv2d(8, 4, 3), pattern="2:4")
    with pytest.raises(ValueError, match="Expected pattern to be None or \"2:4\", got '1:4'"):
        SparseConv2d.from_dense(conv, pattern="1:4")
    with pytest.raises(ValueError, match="with vector=1 and permute=False, got 4 and False"):
        SparseConv2d.from_dense(conv, pattern="2:4", vector=4)
    with pytest.raises(TypeError, match="Expected torch.nn.Conv2d, got Linear"):
        SparseConv2d.from_dense(nn.Linear(16, 4), pattern="2:4")

"""What SparseConv2d and SparseLinear own: parameters and pattern, in copies, on other devices, in state dicts."""

import copy
import functools
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import assert_near
from test_modules import conv, linear, twin
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from sparsekd.sparse.convert import dense_state_dict
from sparsekd.sparse.modules import SparseConv2d, SparseLinear

# A plain module, an input's shape.
KINDS = {
    "conv": (functools.partial(nn.Conv2d, 4, 6, 3), (2, 4, 7, 6)),
    "linear": (functools.partial(nn.Linear, 9, 6), (5, 9)),
}

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("kind", KINDS)]


def made(kind, seed=0, vector=1, permute=False, sparsity=0.7, **options):
    """A sparse module whose pattern and numbers depend on the seed."""
    torch.manual_seed(seed)
    plain = KINDS[kind][0](**options)
    mask = torch.rand(plain.weight.shape) < 1 - sparsity
    with torch.no_grad():
        plain.weight.mul_(mask)
    return twin(plain, vector=vector, permute=permute)


def input_of(kind, **options):
    return torch.randn(KINDS[kind][1], **options)


def snapshot(module):
    tensors = {**module.state_dict(), "plan": module.transpose}
    return {key: None if tensor is None else tensor.clone() for key, tensor in tensors.items()}


def assert_same_state(module, before):
    now = snapshot(module)
    assert list(now) == list(before)
    for key, tensor in before.items():
        assert now[key] is None if tensor is None else torch.equal(now[key], tensor), key


def assert_same_layer(module, other, kind):
    """The same weight, output and gradients, whatever went before."""
    assert torch.equal(module.weight, other.weight) and torch.equal(module.mask, other.mask)
    x = input_of(kind).to(module.values.dtype)
    results = []
    for each in (module, other):
        input = x.clone().requires_grad_()
        output = each(input)
        results.append([output, *torch.autograd.grad(output.square().sum(), [input, *each.parameters()])])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


# --- what there is ---------------------------------------------------------------------------------------------------


def test_values_are_the_only_weight(kind):
    module = made(kind, permute=True, vector=2)
    assert [name for name, _ in module.named_parameters()] == ["values", "bias"]
    assert list(module.buffers()) == []  # which would be averaged, and sent to all processes at each forward
    state = module.state_dict()
    assert list(state) == ["values", "bias", "crow_indices", "col_indices", "row_indices"]
    assert all(state[name].dtype == torch.int32 for name in list(state)[2:])
    assert list(made(kind, bias=False).state_dict()) == ["values", "crow_indices", "col_indices"]


# --- copies ----------------------------------------------------------------------------------------------------------


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved], ids=["deepcopy", "pickle", "save"]
)
@pytest.mark.parametrize("training", [True, False])
def test_copies_are_whole_and_apart(kind, way, training):
    module = made(kind, vector=2, permute=True).train(training)
    twin_ = way(module)
    assert type(twin_) is type(module) and twin_.training == training and repr(twin_) == repr(module)
    assert_same_layer(twin_, module, kind)
    before = snapshot(module)
    with torch.no_grad():
        twin_.values.add_(1)
        twin_.crow_indices.zero_()
    assert_same_state(module, before)


def test_other_dtypes_and_meta(kind):
    module = made(kind, vector=2, permute=True)
    before = snapshot(module)
    # Through a parent, as a model does it.
    assert nn.Sequential(module).double()[0] is module
    assert module.values.dtype == module.bias.dtype == torch.float64 and module.crow_indices.dtype == torch.int32
    module.to(torch.bfloat16).float()
    assert module.values.dtype == torch.float32
    assert not torch.equal(module.values, before["values"])  # bfloat16 was in between
    meta = copy.deepcopy(module).to("meta")
    assert all(tensor.is_meta for tensor in meta.state_dict().values()) and meta.transpose is None
    assert meta(input_of(kind, device="meta")).shape == module(input_of(kind)).shape
    assert meta.weight.shape == module.weight.shape
    assert {key: t.shape for key, t in meta.state_dict().items()} == {
        key: t.shape for key, t in module.state_dict().items()
    }


def test_made_on_meta(kind):
    plain = KINDS[kind][0](device="meta")
    sparse_kind, arguments = (SparseConv2d, (4, 6, 3)) if kind == "conv" else (SparseLinear, (9, 6))
    module = sparse_kind(*arguments, device="meta")
    with torch.device("meta"):
        other = sparse_kind(*arguments, vector=4)
    assert module.values.shape == (plain.weight.numel(), 1) and other.values.is_meta and other.bias.is_meta
    # A mask says what is kept before there are numbers.
    mask = torch.rand(plain.weight.shape) < 0.5
    assert twin(plain, mask).values.shape == (int(mask.sum()), 1)
    # Everything is kept: known without numbers.
    for filled in (nn.utils.skip_init(sparse_kind, *arguments), other.to_empty(device="cpu")):
        filled.reset_parameters()
        assert filled.sparsity == 0 and filled.mask.all() and filled.weight.all()
        assert_near(filled(x := input_of(kind)), filled.to_dense()(x))
    assert other.transpose is not None
    # Part is kept, and which is not known: said at any use, until a state dict tells.
    for training in (True, False):
        lost = made(kind, permute=True).to("meta").train(training).to_empty(device="cpu")
        with pytest.raises(ValueError, match="Expected the last of crow_indices to be .*, got 0"):
            lost(input_of(kind))
        lost.load_state_dict(made(kind, 1, vector=2).state_dict())
        assert_same_layer(lost, made(kind, 1, vector=2), kind)


def test_emptied_modules_keep_their_pattern(kind):
    module = made(kind, vector=2, permute=True)
    mask = module.mask
    module.to_empty(device="cpu")
    module.reset_parameters()
    assert torch.equal(module.mask, mask)


# --- state dicts -----------------------------------------------------------------------------------------------------


OTHERS = {
    "the same": {"seed": 0},
    "another pattern": {"seed": 1},
    "another V": {"seed": 1, "vector": 4},
    "permuted": {"seed": 1, "vector": 2, "permute": True},
    "nothing kept": {"seed": 1, "sparsity": 1.0},
    "all kept": {"seed": 1, "sparsity": 0.0, "vector": "auto"},
    "in eval mode": {"seed": 1, "training": False},
    "on meta": {"seed": 1, "device": "meta"},
}


@pytest.mark.parametrize("options", [{}, {"vector": 2, "permute": True}], ids=["plain", "permuted"])
@pytest.mark.parametrize(
    # nn.Module copies nothing onto meta, where it can only assign.
    "other,assign",
    [pair for pair in itertools.product(OTHERS, [False, True]) if pair != ("on meta", False)],
)
def test_state_dict_goes_into_a_module_of_any_pattern(kind, other, options, assign):
    module = made(kind, **options)
    state = module.state_dict()
    settings = dict(OTHERS[other])
    training, device = settings.pop("training", True), settings.pop("device", "cpu")
    target = made(kind, **settings).train(training).to(device)
    parameter, x = target.values, input_of(kind)
    if device == "cpu":
        target(x).sum().backward()  # a gradient of the old shape
    assert str(target.load_state_dict(state, strict=True, assign=assign)) == "<All keys matched successfully>"
    assert (target.transpose is not None) == training
    assert (target.values is parameter) != assign  # what an optimizer holds stays
    assert target.vector == module.vector and repr(target) == repr(module)
    for mode in (True, False):
        assert_same_layer(target.train(mode), module, kind)
    target.zero_grad()
    target(x).sum().backward()
    assert target.values.grad.shape == module.values.shape
    # Apart from the dictionary and from the module that it came from.
    before = snapshot(module)
    if not assign:
        with torch.no_grad():
            target.values.zero_()
        target.col_indices.zero_()
        assert_same_state(module, before)


def test_state_dict_through_a_file(kind, tmp_path):
    torch.save(nn.Sequential(made(kind)).state_dict(), tmp_path / "m.pt")
    target = nn.Sequential(made(kind, 1, 2, True))
    target.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert_same_layer(target[0], made(kind), kind)


def test_state_dict_is_read_in_inference_mode_too(kind):
    target = made(kind, 1, vector=2)
    with torch.inference_mode():
        target.load_state_dict(made(kind).state_dict())
    assert_same_layer(target, made(kind), kind)


def test_other_dtypes_are_cast_as_in_torch(kind):
    module = made(kind)
    for state in (copy.deepcopy(module).double().state_dict(), module.to_dense().double().state_dict()):
        target = made(kind)
        target.load_state_dict(state)
        assert target.values.dtype == torch.float32
        assert_same_layer(target, module, kind)


@pytest.mark.parametrize(
    "options", [{}, {"vector": 2}, {"vector": 4, "permute": True}], ids=["plain", "vector", "permuted"]
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_state_dict_is_understood(kind, options, assign):
    module = made(kind, **options)
    mask = module.mask
    plain = KINDS[kind][0]()
    with torch.no_grad():
        plain.weight.mul_(mask)
    model = nn.Sequential(nn.ReLU(), nn.Sequential(module))
    state = nn.Sequential(nn.ReLU(), nn.Sequential(plain)).state_dict()
    assert str(model.load_state_dict(state, strict=True, assign=assign)) == "<All keys matched successfully>"
    assert torch.equal(module.weight, plain.weight) and torch.equal(module.bias, plain.bias)
    assert torch.equal(module.mask, mask)  # a plain checkpoint knows no pattern, which stays
    x = input_of(kind)
    assert_near(module(x), plain(x))
    # And back.
    dense = dense_state_dict(model)
    assert list(dense) == list(state) and all(torch.equal(dense[key], state[key]) for key in state)
    nn.Sequential(nn.ReLU(), nn.Sequential(KINDS[kind][0]())).load_state_dict(dense, strict=True)


def refused(module, state, *messages):
    """The state dict is an error that says all of it, and the module is as before."""
    before = snapshot(module)
    with pytest.raises(RuntimeError) as caught:
        module.load_state_dict(state)
    for message in messages:
        assert message in str(caught.value)
    assert_same_state(module, before)


def test_non_zeros_outside_the_pattern_are_counted(kind):
    module = made(kind, vector=2)
    plain = KINDS[kind][0]()
    outside = int((plain.weight[~module.mask] != 0).sum())
    refused(
        module,
        plain.state_dict(),
        f"weight: Expected zeros outside the pattern ({module.nnz} kept), got {outside} non-zeros outside it",
    )
    with pytest.raises(RuntimeError, match=f"\\t0.weight: Expected zeros .*, got {outside} non-zeros"):
        nn.Sequential(module).load_state_dict(nn.Sequential(plain).state_dict())
    with torch.no_grad():
        plain.weight.mul_(module.mask)
        plain.weight[tuple((~module.mask).nonzero()[0])] = math.nan
    refused(module, plain.state_dict(), "got 1 non-zeros outside it")


def test_dense_keys_that_do_not_fit(kind):
    module = made(kind)
    state = module.to_dense().state_dict()
    refused(
        module, state | {"weight": state["weight"][:-1]}, "weight: Expected a dense weight of shape (6, ", "got (5, "
    )
    refused(module, state | {"weight": state["weight"].to("meta")}, "got tensors on meta")
    refused(module, state | {"weight": state["weight"].numpy()}, "weight: Expected a torch.Tensor, got ndarray")
    meta = copy.deepcopy(module).to("meta")
    with pytest.raises(RuntimeError, match="got tensors on meta"):
        meta.load_state_dict(state, assign=True)


def test_patterns_that_are_none(kind):
    module = made(kind, vector=2, permute=True)
    state = module.state_dict()
    columns = math.prod(module.weight_shape[1:])
    col, crow, rows = state["col_indices"], state["crow_indices"], state["row_indices"]
    far, repeated = col.clone(), col.clone()
    far[-1] = columns
    repeated[1] = repeated[0]
    assert crow[1] >= 2
    for key, forged, message in (
        ("col_indices", far, f"Expected col_indices in 0..{columns - 1}, got {columns}"),
        ("col_indices", -1 - col, f"Expected col_indices in 0..{columns - 1}, got -"),
        ("col_indices", repeated, "Expected each column once in a row group, got 1 repeated"),
        ("col_indices", col[:-1], "Expected values [n, V] and col_indices [n], got ("),
        ("col_indices", col.long(), "Expected col_indices of dtype Int, got Long"),
        ("col_indices", col.tolist(), "Expected a torch.Tensor, got list"),
        ("crow_indices", crow[:-1], "Expected crow_indices of size 4"),
        ("crow_indices", crow.flip(0), "Expected crow_indices[0] to be 0, got"),
        ("row_indices", torch.zeros_like(rows), "Expected row_indices to permute the output channels"),
        ("row_indices", rows[:-1], "Expected row_indices of size 6"),
        ("values", state["values"][:, 0], "Expected values [n, V] and col_indices [n], got ("),
        ("values", state["values"][:-1], "Expected values [n, V] and col_indices [n], got ("),
    ):
        refused(module, state | {key: forged}, f"values: {message}")
    # Of a larger layer.
    refused(module, twin(conv(5, 7, 3) if kind == "conv" else linear(10, 8)).state_dict(), "values: Expected ")


def test_keys_that_are_missing_or_too_many(kind):
    module = made(kind)
    state = made(kind, permute=True, vector=2).state_dict()
    own = module.state_dict()
    for key in ("values", "crow_indices", "col_indices", "bias"):
        # As nn.Module, which loads what there is and then tells what was missing.
        target = made(kind)
        with pytest.raises(RuntimeError, match=f'Missing key\\(s\\) in state_dict: "{key}"'):
            target.load_state_dict({name: tensor for name, tensor in own.items() if name != key})
        result = target.load_state_dict({name: t for name, t in own.items() if name != key}, strict=False)
        assert result.unexpected_keys == [] and result.missing_keys in ([], [key])
        assert_same_layer(target, module, kind)
    with pytest.raises(
        RuntimeError, match='Missing key\\(s\\) in state_dict: "values".*|"crow_indices", "col_indices"'
    ):
        module.load_state_dict({})
    with pytest.raises(RuntimeError, match='Unexpected key\\(s\\) in state_dict: "extra"'):
        module.load_state_dict(state | {"extra": torch.zeros(1)})
    assert str(made(kind, bias=False).load_state_dict(module.state_dict(), strict=False)) == (
        "_IncompatibleKeys(missing_keys=[], unexpected_keys=['bias'])"
    )
    # A pattern without its values is not taken, and the other way round not either where the sizes differ.
    target = made(kind)
    target.load_state_dict({name: state[name] for name in ("crow_indices", "col_indices", "row_indices")}, strict=False)
    assert_same_layer(target, made(kind), kind)
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        target.load_state_dict({"values": state["values"]}, strict=False)
    assert_same_layer(target, made(kind), kind)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint(kind, tmp_path):
    model = nn.Sequential(made(kind, vector=2, permute=True))
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path, no_dist=True)
    target = nn.Sequential(made(kind, vector=2, permute=True))
    with torch.no_grad():
        target[0].values.zero_()
    state = get_model_state_dict(target)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(target, state)
    assert_same_layer(target[0], model[0], kind)

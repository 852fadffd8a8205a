"""How SparseConv2d and SparseLinear are made, what they look like, and what they refuse."""

import copy

import pytest
import torch
from conftest import assert_near
from test_modules import check_against, conv, linear, prune, twin
from torch import nn

from sparsekd.sparse.modules import SparseConv2d, SparseLinear, SparseModule

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]

# --- taking over a plain module --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "plain", [conv(3, 5, 3), conv(3, 5, 2, bias=False), linear(6, 5)], ids=["conv", "bias", "linear"]
)
def test_from_dense_takes_what_the_module_is_and_leaves_it_alone(plain, dtype):
    plain = copy.deepcopy(plain).to(dtype).eval()
    plain.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    module = twin(plain, torch.rand_like(plain.weight, dtype=torch.float32) < 0.5)
    assert not module.training and not module.values.requires_grad
    assert module.values.dtype == dtype and (module.bias is None) == (plain.bias is None)
    if plain.bias is not None:
        assert module.bias.requires_grad and torch.equal(module.bias, plain.bias)
    # Training the one does not train the other.
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())
    assert type(plain) in (nn.Conv2d, nn.Linear) and plain.weight.grad is None
    plain.train().requires_grad_()
    if plain.bias is not None:
        plain.bias.requires_grad_(False)
    module = twin(plain)
    assert module.training and module.values.requires_grad
    assert module.bias is None or not module.bias.requires_grad


@pytest.mark.parametrize(
    "plain",
    [
        conv(3, 5, 3),
        conv(4, 6, (1, 3), stride=(2, 1), padding=(1, 0), dilation=2, groups=2, bias=False),
        conv(4, 4, 3, padding="same", padding_mode="circular").to(memory_format=torch.channels_last),
        linear(6, 5),
        linear(6, 5, bias=False),
    ],
    ids=["conv", "all arguments", "channels_last", "linear", "linear without bias"],
)
@pytest.mark.parametrize("vector,permute", [(1, False), (2, False), (4, True), ("auto", False)])
def test_to_dense_gives_the_plain_module_back(plain, vector, permute):
    plain = copy.deepcopy(plain).double().eval()
    plain.weight.requires_grad_(False)
    back = twin(plain, vector=vector, permute=permute).to_dense()
    assert type(back) is type(plain) and str(back) == str(plain)
    assert not back.training and not back.weight.requires_grad
    assert list(back.state_dict()) == list(plain.state_dict())
    for left, right in zip(back.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(left, right) and left.dtype == right.dtype and left.stride() == right.stride()
    assert back.weight is not plain.weight
    mask = torch.rand(plain.weight.shape) < 0.5
    assert torch.equal(twin(plain, mask).to_dense().weight, plain.weight * mask)


def test_which_weights_are_kept():
    plain = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 2, 0]]))
    # No mask: a vector is kept when any of its weights is non-zero.
    assert SparseLinear.from_dense(plain, vector=2).mask.tolist() == [[True, True, False]] * 2
    # A mask: what it says, whatever the weights are.
    mask = torch.tensor([[True, False, True], [False, False, True]])
    module = SparseLinear.from_dense(plain, mask)
    assert torch.equal(module.mask, mask) and module.values.tolist() == [[1], [0], [0]]
    assert (module.nnz, module.density, module.sparsity) == (3, 0.5, 0.5)
    with pytest.raises(ValueError, match="Expected a mask whose groups of 2 .* share their columns, got 1 columns"):
        SparseLinear.from_dense(plain, mask, vector=2)
    # Kept zeros are trained.
    module(torch.ones(1, 3)).sum().backward()
    assert module.values.grad.tolist() == [[1], [1], [1]]


def test_the_largest_vector_is_found():
    plain = nn.Conv2d(2, 6, 3)
    rows = torch.rand(2, 1, 2, 3, 3) < 0.5
    mask = rows.expand(2, 3, 2, 3, 3).reshape(6, 2, 3, 3)
    module = SparseConv2d.from_dense(plain, mask, "auto")
    assert module.vector == 3 and torch.equal(module.mask, mask)


def test_neighbours_by_permutation():
    plain = nn.Linear(2, 5)
    mask = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]], dtype=torch.bool)
    with pytest.raises(ValueError, match="Expected a mask whose groups of 2"):
        SparseLinear.from_dense(plain, mask, 2)
    for permute in (True, torch.tensor([4, 2, 1, 3, 0])):
        module = SparseLinear.from_dense(plain, mask, 2, permute)
        assert torch.equal(module.mask, mask) and module.row_indices.dtype == torch.int32
        assert module.nnz == 5 and module.values.shape == (3, 2)


@pytest.mark.parametrize("filters,vector", [(5, 2), (5, 8), (1, 4), (7, 3)])
def test_output_channels_that_are_no_multiple_of_the_vector(filters, vector):
    plain = conv(3, filters, 3, sparsity=0.9)
    module = twin(plain, vector=vector)
    check_against(plain, module, torch.randn(2, 3, 6, 7))
    assert module.nnz == int(module.mask.sum())


def test_parametrised_and_derived_modules():
    class Named(nn.Conv2d):
        """Computes what nn.Conv2d computes."""

    plain = prune(Named(3, 4, 3))
    check_against(plain, twin(plain), torch.randn(2, 3, 5, 5))
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    module = SparseConv2d.from_dense(normed)
    x = torch.randn(2, 3, 5, 5)
    assert module.values.is_leaf
    assert_near(module(x), normed(x))
    lazy = nn.LazyConv2d(4, 3)
    lazy(x)
    assert_near(SparseConv2d.from_dense(lazy)(x), lazy(x))


class Doubling(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


class Standardised(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Sigmoid(nn.Linear):
    def forward(self, input):
        return super().forward(input).sigmoid()


@pytest.mark.parametrize(
    "make,error,message",
    [
        (lambda: SparseConv2d.from_dense(nn.Linear(2, 2)), TypeError, "Expected torch.nn.Conv2d, got Linear"),
        (lambda: SparseConv2d.from_dense(nn.Conv1d(2, 2, 1)), TypeError, "Expected torch.nn.Conv2d, got Conv1d"),
        (lambda: SparseConv2d.from_dense(None), TypeError, "Expected torch.nn.Conv2d, got NoneType"),
        (lambda: SparseLinear.from_dense(nn.Conv2d(2, 2, 1)), TypeError, "Expected torch.nn.Linear, got Conv2d"),
        (
            lambda: SparseConv2d.from_dense(Doubling(2, 2, 1)),
            TypeError,
            "forward of torch.nn.Conv2d, got Doubling with",
        ),
        (lambda: SparseConv2d.from_dense(Standardised(2, 2, 1)), TypeError, "torch.nn.Conv2d, got Standardised with"),
        (lambda: SparseLinear.from_dense(Sigmoid(2, 2)), TypeError, "the forward of torch.nn.Linear, got Sigmoid with"),
        (lambda: SparseConv2d.from_dense(nn.LazyConv2d(2, 1)), ValueError, "Expected LazyConv2d with its weight made"),
        (
            lambda: SparseLinear.from_dense(nn.LazyLinear(2)),
            ValueError,
            "Expected LazyLinear with its weight made, got",
        ),
        (
            lambda: SparseConv2d.from_dense(nn.Conv2d(2, 2, 1, dtype=torch.complex64)),
            TypeError,
            "Expected a weight of dtype torch.float32, .*, got torch.complex64",
        ),
        (lambda: SparseLinear.from_dense(nn.Linear(0, 2)), ValueError, r"at least one element, got shape \(2, 0\)"),
        (lambda: SparseLinear(2, 0), ValueError, r"at least one element, got shape \(0, 2\)"),
        (
            lambda: SparseConv2d.from_dense(nn.Conv2d(2, 2, 1, device="meta")),
            ValueError,
            "Expected a mask .*, got None",
        ),
        (lambda: twin(conv(2, 2, 1), [[1]]), TypeError, "Expected a mask of dtype torch.bool .*, got list"),
        (lambda: twin(conv(2, 2, 1), torch.ones(2, 2, 1, 1)), TypeError, "Expected a mask of .*, got torch.float32"),
        (lambda: twin(conv(2, 2, 1), torch.ones(2, 2).bool()), ValueError, r"of shape \(2, 2, 1, 1\), got \(2, 2\)"),
        (lambda: twin(conv(2, 2, 1), vector=0), ValueError, "Expected vector to be .*, got 0"),
        (lambda: twin(conv(2, 2, 1), vector="all"), ValueError, "Expected vector to be .*, got 'all'"),
        (lambda: SparseConv2d(2, 2, 1, mask=torch.ones(2, 2).bool()), ValueError, "Expected a mask of shape .*, got"),
    ],
)
def test_errors_of_making_one(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# --- the face of nn.Conv2d and nn.Linear -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plain_kind,kind,arguments,options",
    [
        (nn.Conv2d, SparseConv2d, (3, 4, 3), {}),
        (nn.Conv2d, SparseConv2d, (4, 6, (2, 3), 2, (1, 0), (1, 2), 2, False, "circular", "cpu", torch.float64), {}),
        (nn.Conv2d, SparseConv2d, (4, 6, 3), {"padding": "same", "dtype": torch.bfloat16}),
        (nn.Linear, SparseLinear, (3, 4), {}),
        (nn.Linear, SparseLinear, (3, 4, False, "cpu", torch.float64), {}),
    ],
    ids=["conv", "all arguments", "named arguments", "linear", "linear, all arguments"],
)
def test_constructor_is_the_plain_modules(plain_kind, kind, arguments, options):
    torch.manual_seed(7)
    plain = plain_kind(*arguments, **options)
    torch.manual_seed(7)
    module = kind(*arguments, **options)
    assert torch.equal(module.weight, plain.weight) and module.sparsity == 0  # keeps all, and draws the same numbers
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert plain_kind is nn.Linear or getattr(module, name) == getattr(plain, name)
    for name in ("padding_mode", "transposed", "output_padding", "in_features", "out_features", "training"):
        assert getattr(module, name, None) == getattr(plain, name, None)
    assert (module.bias is None) == (plain.bias is None)
    assert module.extra_repr().startswith(plain.extra_repr() + ", ")
    torch.manual_seed(8)
    plain.reset_parameters()
    torch.manual_seed(8)
    module.reset_parameters()
    assert torch.equal(module.weight, plain.weight)
    assert plain.bias is None or torch.equal(module.bias, plain.bias)


def test_constructor_takes_a_mask():
    mask = (torch.rand(2, 1, 3, 3, 3) < 0.5).expand(2, 2, 3, 3, 3).reshape(4, 3, 3, 3)
    torch.manual_seed(7)
    plain = nn.Conv2d(3, 4, 3)
    torch.manual_seed(7)
    module = SparseConv2d(3, 4, 3, mask=mask, vector="auto")
    assert module.vector % 2 == 0 and torch.equal(module.weight, plain.weight * mask)
    module.reset_parameters()
    assert torch.equal(module.mask, mask) and module.weight.count_nonzero() == mask.sum()
    assert SparseLinear(3, 5, mask=torch.zeros(5, 3, dtype=torch.bool)).nnz == 0


def test_repr():
    mask = torch.tensor([[True, False], [True, False], [True, False], [False, False]])
    assert repr(SparseLinear(2, 4, mask=mask)) == (
        "SparseLinear(in_features=2, out_features=4, bias=True, sparsity=0.625, vector=1)"
    )
    module = SparseConv2d(1, 2, 2, padding=(1, 0), bias=False, vector=2)
    said = "SparseConv2d(1, 2, kernel_size=(2, 2), stride=(1, 1), padding=(1, 0), bias=False, {}vector=2)"
    assert repr(module) == said.format("sparsity=0, ")
    assert repr(module.to("meta")) == said.format("")  # where numbers are not known


def test_weight_is_read_only():
    for module in (twin(conv(2, 2, 1)), twin(linear(2, 2))):
        before = module.weight
        for new in (nn.Parameter(before.clone()), before.clone(), None):
            with pytest.raises(AttributeError, match="Expected weight to be read only .*, got a new one"):
                module.weight = new
        assert torch.equal(module.weight, before) and not isinstance(module.weight, nn.Parameter)
        assert [name for name, _ in module.named_parameters()] == ["values", "bias"]


@pytest.mark.parametrize(
    "input,error,message",
    [
        (torch.randn(1, 3, 5, 5), ValueError, r"\[N, 4, H, W\] or \[4, H, W\], got \[1, 3, 5, 5\]"),
        (torch.randn(5, 5), ValueError, r"\[N, 4, H, W\] or \[4, H, W\], got \[5, 5\]"),
        (torch.randn(1, 1, 4, 5, 5), ValueError, r"\[N, 4, H, W\] or \[4, H, W\], got \[1, 1, 4, 5, 5\]"),
        (torch.randn(1, 4, 2, 5), ValueError, r"at least as large as the kernel \(3 in height\), got 2"),
        (torch.randn(1, 4, 0, 5), ValueError, r"at least as large as the kernel \(3 in height\), got 0"),
        (torch.randn(1, 4, 5, 5).double(), TypeError, "Expected values of dtype Double as input, got Float"),
        (torch.ones(1, 4, 5, 5).int(), TypeError, "Expected input of dtype Float, .*, got Int"),
        (torch.ones(1, 4, 5, 5).cfloat(), TypeError, "Expected input of dtype Float, .*, got ComplexFloat"),
        (
            torch.ones(1, 4, 5, 5).to_sparse(),
            TypeError,
            "Expected a dense input .*, got one of layout torch.sparse_coo",
        ),
        ([[1.0]], TypeError, "Expected a torch.Tensor as input, got list"),
        (None, TypeError, "Expected a torch.Tensor as input, got NoneType"),
    ],
)
def test_inputs_that_do_not_fit_a_convolution(input, error, message):
    with pytest.raises(error, match=message) as caught:
        twin(conv(4, 6, 3))(input)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "input,error,message",
    [
        (torch.randn(2, 3), ValueError, r"\[\.\.\., 4\], got \[2, 3\]"),
        (torch.tensor(1.0), ValueError, r"\[\.\.\., 4\], got \[\]"),
        (torch.randn(2, 4).double(), TypeError, "Expected values of dtype Double as input, got Float"),
        (torch.ones(2, 4).long(), TypeError, "Expected input of dtype Float, .*, got Long"),
        (torch.ones(2, 4).to_sparse(), TypeError, "Expected a dense input .*, got one of layout torch.sparse_coo"),
        ((1.0, 2.0), TypeError, "Expected a torch.Tensor as input, got tuple"),
    ],
)
def test_inputs_that_do_not_fit_a_linear_layer(input, error, message):
    with pytest.raises(error, match=message) as caught:
        twin(linear(4, 6))(input)
    assert "\n" not in str(caught.value)


def test_base_class_is_not_made():
    assert issubclass(SparseConv2d, SparseModule) and issubclass(SparseLinear, SparseModule)
    with pytest.raises(NotImplementedError):
        _ = SparseModule().weight_shape

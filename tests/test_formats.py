"""V x 1 vector-CSR: the drawing of its own documentation, round trips, and the choice of V and of the row order."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.sparse import formats


def drawing():
    a, b, c, d, e = 1.0, 2.0, 3.0, 4.0, 5.0
    return torch.tensor([[a, 0, b, 0], [c, 0, d, 0], [0, e, 0, 0]])


def test_the_drawing_in_the_docstring():
    packed = formats.pack(drawing(), vector=2)
    assert packed.crow_indices.tolist() == [0, 2, 3]
    assert packed.col_indices.tolist() == [0, 2, 1]
    assert packed.values.tolist() == [[1, 3], [2, 4], [5, 0]]
    assert packed.row_indices is None
    assert {packed.crow_indices.dtype, packed.col_indices.dtype} == {torch.int32}
    assert torch.equal(formats.unpack(*packed, (3, 4)), drawing())
    positions = formats.flat_positions(packed.crow_indices, packed.col_indices, None, 2, (3, 4))
    assert positions.tolist() == [[0, 4], [2, 6], [9, 12]]  # 12 is the padding's


def test_groups_are_padded_each():
    weight = torch.arange(1.0, 7.0).view(6, 1)  # two groups of three rows, V = 2
    packed = formats.pack(weight, vector=2, groups=2)
    assert packed.crow_indices.tolist() == [0, 1, 2, 3, 4]
    assert packed.values.tolist() == [[1, 2], [3, 0], [4, 5], [6, 0]]


def test_row_indices_name_the_output_channel_of_each_packed_row():
    weight = torch.tensor([[1.0, 0], [0, 2], [3, 0]])
    packed = formats.pack(weight, vector=2, permute=torch.tensor([0, 2, 1]))
    assert packed.values.tolist() == [[1, 3], [2, 0]]
    assert packed.crow_indices.tolist() == [0, 1, 2] and packed.row_indices.tolist() == [0, 2, 1]
    assert torch.equal(formats.unpack(*packed, (3, 2)), weight)


@st.composite
def weights(draw):
    """(weight, mask or None, V, groups, permute): masks fit V in the order that permute gives."""
    groups = draw(st.integers(1, 3))
    per_group = draw(st.integers(1, 9))
    columns = draw(st.integers(1, 12))
    vector = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16]))
    density = draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    packed = -(-per_group // vector)
    keep = torch.rand(groups, packed, 1, columns, generator=generator) < density
    rows = keep.expand(-1, -1, vector, -1).reshape(groups, packed * vector, columns)[:, :per_group]
    mask = rows.reshape(groups * per_group, columns).clone()
    permute = draw(st.sampled_from([False, True, "given"]))
    if permute:
        order = torch.cat([torch.randperm(per_group, generator=generator) + g * per_group for g in range(groups)])
        mask[order] = mask.clone()
        permute = order if permute == "given" else True  # True finds an order that fits, too
    weight = torch.randn(mask.shape, generator=generator) * mask
    if draw(st.booleans()):
        weight = weight.double()
    return weight, mask if draw(st.booleans()) else None, vector, groups, permute


@settings(max_examples=200)
@given(weights())
def test_round_trips(sample):
    weight, mask, vector, groups, permute = sample
    values, *indices = packed = formats.pack(weight, mask, vector, groups, permute)
    assert torch.equal(formats.unpack(*packed, tuple(weight.shape), groups), weight)
    assert torch.equal(formats.gather(weight, *indices, vector, groups), values)
    assert values.dtype == weight.dtype and values.is_contiguous() and values.shape[1] == vector
    # Canonical: rows in order, columns rising within each row group, nothing twice.
    crow, col = packed.crow_indices.tolist(), packed.col_indices.tolist()
    assert crow[0] == 0 and crow[-1] == len(col)
    for begin, end in itertools.pairwise(crow):
        assert all(left < right for left, right in itertools.pairwise(col[begin:end]))
    if mask is not None:  # exactly the mask is kept, zeros inside it too
        kept = formats.unpack(torch.ones_like(values), *indices, tuple(weight.shape), groups) != 0
        assert torch.equal(kept, mask)


@settings(max_examples=100)
@given(weights())
def test_gather_then_unpack_is_the_masked_weight(sample):
    weight, mask, vector, groups, permute = sample
    _, *indices = formats.pack(weight, mask, vector, groups, permute)
    other = torch.randn(weight.shape, dtype=weight.dtype)
    values = formats.gather(other, *indices, vector, groups)
    kept = formats.unpack(torch.ones_like(values), *indices, tuple(weight.shape), groups) != 0
    assert torch.equal(formats.unpack(values, *indices, tuple(weight.shape), groups), other * kept)


def test_unpack_is_differentiable_in_values():
    values, *indices = formats.pack(drawing().double(), vector=2)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: formats.unpack(v, *indices, (3, 4)), values)
    formats.unpack(values, *indices, (3, 4)).sum().backward()
    assert values.grad.tolist() == [[1, 1], [1, 1], [1, 0]]  # the padding has none


def fits(mask, vector, groups):
    for group in mask.view(groups, -1, mask.shape[1]):
        for start in range(0, len(group), vector):
            if any(not torch.equal(row, group[start]) for row in group[start : start + vector]):
                return False
    return True


@settings(max_examples=200)
@given(st.data())
def test_largest_vector_against_brute_force(data):
    groups = data.draw(st.integers(1, 3))
    per_group = data.draw(st.integers(1, 8))
    # Few columns and runs of equal rows, so that sharing happens.
    rows = data.draw(st.lists(st.integers(0, 2), min_size=groups * per_group, max_size=groups * per_group))
    mask = torch.tensor([[row == 1, row == 2] for row in rows])
    best = max(vector for vector in range(1, per_group + 1) if fits(mask, vector, groups))
    assert formats.largest_vector(mask, groups) == best
    assert formats.pack(mask.float(), mask, "auto", groups).values.shape[1] == best


def test_largest_vector_of_a_uniform_mask_is_the_group():
    assert formats.largest_vector(torch.ones(6, 4, dtype=torch.bool)) == 6
    assert formats.largest_vector(torch.zeros(6, 4, dtype=torch.bool), groups=2) == 3


@settings(max_examples=200)
@given(st.data())
def test_grouping_permutation_brings_equal_channels_together(data):
    groups = data.draw(st.integers(1, 3))
    vector = data.draw(st.integers(1, 4))
    kinds = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
    per_group = len(kinds)
    mask = torch.tensor(kinds * groups)[:, None] == torch.arange(3)
    order = formats.grouping_permutation(mask, vector, groups).long()
    for group in range(groups):
        own = order[group * per_group : (group + 1) * per_group]
        assert sorted(own.tolist()) == list(range(group * per_group, (group + 1) * per_group))
        rows = mask[own]
        whole = sum(kinds.count(kind) // vector for kind in set(kinds))
        for start in range(0, whole * vector, vector):
            assert all(torch.equal(row, rows[start]) for row in rows[start : start + vector])
    assert order.dtype == torch.int64 and formats.grouping_permutation(mask, vector, groups).dtype == torch.int32


@settings(max_examples=200)
@given(st.data())
def test_largest_grouping_against_brute_force(data):
    """The largest power of two for which the order of grouping_permutation fits."""
    groups, per_group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 9))
    rows = data.draw(st.lists(st.integers(0, 2), min_size=groups * per_group, max_size=groups * per_group))
    mask = torch.tensor(rows)[:, None] == torch.arange(3)
    fitting = [1]
    for vector in (2, 4, 8):
        order = formats.grouping_permutation(mask, vector, groups).long()
        if vector <= per_group and fits(mask[order], vector, groups):
            fitting.append(vector)
    found = formats.largest_grouping(mask, groups)
    assert found == max(fitting)
    formats.pack(mask.float(), mask, found, groups, permute=True)


def test_permutation_lets_scattered_channels_share():
    mask = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=torch.bool)
    weight = mask.float()
    with pytest.raises(ValueError, match="share their columns"):
        formats.pack(weight, mask, 2)
    packed = formats.pack(weight, mask, 2, permute=True)
    assert packed.values.shape == (2, 2)
    assert torch.equal(formats.unpack(*packed, (4, 2)), weight)


def test_without_a_mask_a_vector_is_kept_for_any_of_its_weights():
    weight = torch.tensor([[1.0, 0, 0], [0, 2, 0]])
    assert formats.pack(weight, vector=2).values.tolist() == [[1, 0], [0, 2]]


def test_an_explicit_mask_keeps_zeros_and_drops_non_zeros():
    weight = torch.tensor([[0.0, 5.0]])
    packed = formats.pack(weight, torch.tensor([[True, False]]))
    assert packed.values.tolist() == [[0.0]] and packed.col_indices.tolist() == [0]


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        ({"mask": torch.ones(3, 4)}, TypeError, r"Expected a mask of dtype torch.bool .*, got torch.float32"),
        ({"mask": torch.ones(4, 3, dtype=torch.bool)}, ValueError, r"Expected a mask of shape \(3, 4\), got \(4, 3\)"),
        (
            {"mask": torch.ones(3, 4, dtype=torch.bool, device="meta")},
            ValueError,
            "Expected a mask on cpu, got meta",
        ),
        ({"mask": drawing() != 0, "vector": 3}, ValueError, "share their columns, got 3 columns"),
        ({"vector": 0}, ValueError, "Expected vector to be a whole number of at least 1 .*, got 0"),
        ({"vector": -1}, ValueError, "Expected vector .*, got -1"),
        ({"vector": 2.0}, ValueError, "Expected vector .*, got 2.0"),
        ({"vector": True}, ValueError, "Expected vector .*, got True"),
        ({"vector": "most"}, ValueError, "Expected vector .*, got 'most'"),
        ({"groups": 2}, ValueError, "Expected output channels divisible by groups=2, got 3"),
        ({"permute": torch.tensor([0, 1])}, ValueError, "Expected a permutation of 3 output channels"),
        ({"permute": torch.tensor([0, 1, 1])}, ValueError, "Expected a permutation of 3 output channels"),
        ({"permute": torch.tensor([0, 1, 2]), "groups": 3, "vector": 1}, None, None),
        ({"permute": torch.tensor([1, 0, 2]), "groups": 3}, ValueError, "inside each of 3 convolution groups"),
    ],
)
def test_errors(arguments, error, message):
    if error is None:
        formats.pack(drawing(), **arguments)
        return
    with pytest.raises(error, match=message):
        formats.pack(drawing(), **arguments)

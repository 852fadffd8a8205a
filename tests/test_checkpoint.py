"""save and load: really smaller, strict, and never half a file."""

import copy
import json
import random
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekd
from sparsekd.sparse import checkpoint


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 10))


@pytest.fixture
def x():
    torch.manual_seed(3)
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def converted(x):
    plain = model()
    with torch.no_grad():
        for layer in (plain[2], plain[4]):
            layer.weight[torch.rand_like(layer.weight) < 0.9] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparsekd.convert(plain, x, mapping={"[24]": {"kernel": "sparse"}}).eval()


def test_round_trip_into_a_plain_model(converted, x, tmp_path):
    sparsekd.save(converted, tmp_path / "m.safetensors")
    loaded = sparsekd.load(model(1).eval(), tmp_path / "m.safetensors")
    assert isinstance(loaded[2], sparsekd.SparseConv2d) and type(loaded[0]) is nn.Conv2d
    assert torch.equal(loaded(x), converted(x))
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), converted.state_dict().values(), strict=True)
    )


def test_round_trip_into_a_converted_model_of_another_pattern(converted, x, tmp_path):
    sparsekd.save(converted, tmp_path / "m.safetensors")
    other = model(1).eval()
    other[0] = sparsekd.SparseConv2d.from_dense(other[0])
    other[2] = sparsekd.SparseConv2d.from_dense(other[2], torch.rand_like(other[2].weight) < 0.5)
    loaded = sparsekd.load(other, tmp_path / "m.safetensors")
    assert type(loaded[0]) is nn.Conv2d
    assert torch.equal(loaded(x), converted(x))


@pytest.mark.parametrize("vector,permute", [(4, False), (4, True)])
def test_vectors_and_permutations_come_back(x, tmp_path, vector, permute):
    torch.manual_seed(0)
    plain = model().eval()
    rows = torch.rand(16, 1, 64 * 9) < 0.2
    mask = rows.expand(16, 4, 64 * 9).reshape(64, 64, 3, 3)
    if permute:
        mask = mask[torch.randperm(64)]
    plain[2] = sparsekd.SparseConv2d.from_dense(plain[2], mask, vector, permute)
    sparsekd.save(plain, tmp_path / "m.safetensors")
    loaded = sparsekd.load(model(1).eval(), tmp_path / "m.safetensors")
    assert loaded[2].vector == 4 and (loaded[2].row_indices is not None) == permute
    assert torch.equal(loaded(x), plain(x))


def test_it_is_really_smaller(converted, tmp_path):
    """sparseml#633, nni#3094, llm-compressor#790, wanda#65: the file of a pruned model is no smaller, or bigger."""
    sparsekd.save(converted, tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")
    for key in ("2.weight", "4.weight"):
        taken = sum(stored[f"{key}#{part}"].nbytes for part in ("nonzeros", "bitmask"))
        dense = sparsekd.dense_state_dict(converted)[key]
        kept = int(torch.count_nonzero(dense)) / dense.numel()
        assert taken <= dense.nbytes * (kept + 1 / 32) + 1


def test_a_pruned_model_that_is_not_converted_is_packed_too(tmp_path, x):
    plain = model().eval()
    with torch.no_grad():
        plain[4].weight[torch.rand_like(plain[4].weight) < 0.9] = 0
    sparsekd.save(plain, tmp_path / "m.safetensors")
    loaded = sparsekd.load(model(1).eval(), tmp_path / "m.safetensors")
    assert type(loaded[4]) is nn.Linear and torch.equal(loaded(x), plain(x))
    assert "4.weight#bitmask" in load_file(tmp_path / "m.safetensors")


def test_layers_of_one_shape_are_not_taken_for_tied(tmp_path):
    """Of a weight that isn't contiguous on the CPU a copy is packed, and the next copy may lie in its place."""
    plain = nn.Sequential(*(nn.Conv2d(32, 32, 3) for _ in range(6))).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for layer in plain:
            layer.weight[torch.rand_like(layer.weight) < 0.9] = 0
    sparsekd.save(plain, tmp_path / "m.safetensors")
    other = copy.deepcopy(plain)
    for layer in other:
        layer.reset_parameters()
    loaded = sparsekd.load(other, tmp_path / "m.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))


def test_tied_weights_are_stored_once(tmp_path):
    tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    tied[1].weight = tied[0].weight
    sparsekd.save(tied, tmp_path / "m.safetensors")
    assert "1.weight" not in load_file(tmp_path / "m.safetensors")
    other = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sparsekd.load(other, tmp_path / "m.safetensors")
    assert torch.equal(other[1].weight, tied[0].weight)


def test_half_and_buffers(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half()
    sparsekd.save(net, tmp_path / "m.safetensors")
    other = sparsekd.load(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half(), tmp_path / "m.safetensors")
    assert other[0].weight.dtype == torch.float16 and other[1].num_batches_tracked.dtype == torch.int64


def metadata_of(path):
    with safe_open(str(path), framework="pt") as file:
        return file.metadata()


def resealed(tensors, metadata, path):
    """A file with a checksum that fits, as someone who means harm would write it."""
    facts = {name: fact for name, fact in metadata.items() if name != "checksum"}
    save_file(tensors, path, {**facts, "checksum": checkpoint._checksum(tensors, facts)})


def unchanged_after(error, match, target, path):
    before = {key: value.clone() for key, value in target.state_dict().items()}
    kinds = [type(m) for m in target.modules()]
    with pytest.raises(error, match=match):
        sparsekd.load(target, path)
    assert [type(m) for m in target.modules()] == kinds
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_bad_files_are_one_sentence_and_change_nothing(converted, tmp_path):
    good = tmp_path / "m.safetensors"
    sparsekd.save(converted, good)
    unchanged_after(FileNotFoundError, "Expected a file saved by sparsekd.save, got", model(), tmp_path / "none")
    torn = tmp_path / "torn"
    torn.write_bytes(good.read_bytes()[:-100])
    unchanged_after(ValueError, "Expected a whole file saved by sparsekd.save", model(), torn)
    noise = tmp_path / "noise"
    noise.write_bytes(b"not a checkpoint at all")
    unchanged_after(ValueError, "Expected a whole file saved by sparsekd.save", model(), noise)
    foreign = tmp_path / "foreign"
    save_file({"a": torch.zeros(1)}, foreign)
    unchanged_after(ValueError, "without its mark", model(), foreign)
    stored, metadata = load_file(good), metadata_of(good)
    save_file(stored, tmp_path / "newer", {**metadata, "version": "99"})
    unchanged_after(ValueError, "Expected format version 2, got 99", model(), tmp_path / "newer")
    stored["2.weight#nonzeros"] = stored["2.weight#nonzeros"][:-1].clone()
    save_file(stored, tmp_path / "short", metadata)
    unchanged_after(ValueError, "whose checksum differs", model(), tmp_path / "short")
    resealed(stored, metadata, tmp_path / "short")
    unchanged_after(ValueError, "non-zeros of 2.weight", model(), tmp_path / "short")


def test_another_architecture(converted, tmp_path):
    """VainF/Torch-Pruning#436, jacobgil/pytorch-pruning#26: size mismatch, found half-way."""
    path = tmp_path / "m.safetensors"
    sparsekd.save(converted, path)
    unchanged_after(ValueError, "Expected a layer '2' in the model", nn.Sequential(nn.Conv2d(3, 64, 3)), path)
    other = nn.Sequential(*[*model()[:4], nn.Linear(64 * 16, 11)])
    unchanged_after(ValueError, "Expected '4' to be a convolution or Linear with a weight", other, path)
    longer = nn.Sequential(*model(), nn.Linear(10, 10))
    unchanged_after(ValueError, "Expected the keys of the model", longer, path)


def test_an_interrupted_save_leaves_the_old_file(converted, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    sparsekd.save(model(), path)
    before = path.read_bytes()

    def torn(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        sparsekd.save(converted, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_errors_of_save(tmp_path):
    with pytest.raises(TypeError, match="Expected a torch.nn.Module, got dict"):
        sparsekd.save({}, tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="Expected a folder to write"):
        sparsekd.save(model(), tmp_path / "no" / "m")


def test_a_shared_layer_comes_back_shared(tmp_path):
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < 0.9] = 0
    sparse = sparsekd.SparseLinear.from_dense(layer)
    sparsekd.save(nn.Sequential(sparse, sparse), tmp_path / "m.safetensors")
    plain = nn.Linear(64, 64)
    loaded = sparsekd.load(nn.Sequential(plain, plain), tmp_path / "m.safetensors")
    assert loaded[0] is loaded[1] and torch.equal(loaded[0].weight, sparse.weight)


def test_corrupted_files(converted, tmp_path):
    """200 of them: one flipped bit, in the header or anywhere; cut off; longer; another length of the header."""
    path, bad = tmp_path / "m.safetensors", tmp_path / "bad"
    sparsekd.save(converted, path)
    good, chance, target = path.read_bytes(), random.Random(0), model()
    header = 8 + int.from_bytes(good[:8], "little")
    before = {key: value.clone() for key, value in target.state_dict().items()}
    for number in range(200):
        content = bytearray(good)
        if number % 5 < 2:
            content[chance.randrange(header if number % 5 else len(good))] ^= 1 << chance.randrange(8)
        elif number % 5 == 2:
            del content[chance.randrange(len(good)) :]
        elif number % 5 == 3:
            content += chance.randbytes(chance.randrange(1, 100))
        else:
            content[:8] = chance.getrandbits(chance.randrange(1, 64)).to_bytes(8, "little")
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="Expected a whole file|Expected a file saved|Expected format version"):
            sparsekd.load(target, bad)
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


HOSTILE = {
    "a huge shape": ({"packed": {"2.weight": {"shape": [10**9, 10**9], "vector": 1}}}, "a bitmask"),
    "a negative side": ({"packed": {"2.weight": {"shape": [-64, -576], "vector": 1}}}, "of shape"),
    "a huge vector": ({"packed": {"2.weight": {"shape": [64, 64, 3, 3], "vector": 10**12}}}, "vector 1000000000000"),
    "no shape": ({"packed": {"2.weight": {}}}, "'shape'"),
    "a list for a dict": ({"packed": []}, "items"),
    "a missing source": ({"aliases": {"0.bias": "9.bias"}}, "Expected 9.bias, which 0.bias equals"),
    "aliases of numbers": ({"aliases": {"0.bias": 3}}, "names of tensors"),
    "deep brackets": ({"aliases": "[" * 100000}, "Expected a whole file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_allocate_nothing(converted, tmp_path, name):
    path = tmp_path / "m.safetensors"
    sparsekd.save(converted, path)
    facts, message = HOSTILE[name]
    said = {key: fact if isinstance(fact, str) else json.dumps(fact) for key, fact in facts.items()}
    resealed(load_file(path), {**metadata_of(path), **said}, path)
    unchanged_after(ValueError, message, model(), path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_half_the_size(converted, tmp_path, dtype, x):
    whole, half = tmp_path / "whole", tmp_path / "half"
    sparsekd.save(converted, whole)
    sparsekd.save(converted, half, dtype=dtype)
    stored = load_file(half)["2.weight#nonzeros"]
    assert stored.dtype == dtype and stored.nbytes * 2 == load_file(whole)["2.weight#nonzeros"].nbytes
    loaded = sparsekd.load(model(1).eval(), half)
    assert loaded[2].values.dtype == torch.float32
    torch.testing.assert_close(loaded(x), converted(x), rtol=0.02, atol=0.02)
    with torch.no_grad():
        converted[2].values[0] = 3.4e38 if dtype == torch.bfloat16 else 1e6
    with pytest.raises(ValueError, match="Expected values of 2.weight within the range of"):
        sparsekd.save(converted, half, dtype=dtype)
    with pytest.raises(TypeError, match="Expected dtype to be None or one of"):
        sparsekd.save(converted, half, dtype=torch.int8)


def test_a_resnet50_takes_14_percent(tmp_path):
    """float32 values, every layer pruned: packed weights take at most 13.5% of their dense bytes, the file 14%."""
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet50(weights=None)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.mul_(torch.rand_like(module.weight) < 0.1)
    path = tmp_path / "m.safetensors"
    sparsekd.save(net, path)
    stored, dense = load_file(path), net.state_dict()
    for key in {name.partition("#")[0] for name in stored if "#" in name}:
        taken = stored[f"{key}#nonzeros"].nbytes + stored[f"{key}#bitmask"].nbytes
        assert taken <= 0.135 * dense[key].nbytes
    assert path.stat().st_size <= 0.14 * sum(tensor.nbytes for tensor in dense.values())


def test_a_model_that_asks_for_its_version(tmp_path):
    """torchvision's MNASNet reads it from the state dict, and refuses one without."""

    class Versioned(nn.Sequential):
        _version = 2

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            if local_metadata.get("version") != 2:
                raise ValueError("no version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    net, path = Versioned(nn.Linear(8, 8)), tmp_path / "m.safetensors"
    net.load_state_dict(sparsekd.dense_state_dict(net))
    sparsekd.save(net, path)
    loaded = sparsekd.load(Versioned(nn.Linear(8, 8)), path)
    assert torch.equal(loaded[0].weight, net[0].weight)

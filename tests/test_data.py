"""The images: what can be counted or worked out by hand, and the loaders' promises."""

import sys
import types

import numpy as np
import pytest
import torch

from sparsekd import data


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return data.load("digits")


@pytest.fixture(scope="module")
def shapes():
    return data.load("shapes", size=2100)


def fingerprints(*parts):
    return {image.numpy().tobytes() for images in parts for image in images}


# What is loaded


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_types_and_normalisation(name, request):
    loaded = request.getfixturevalue(name)
    assert loaded.name == name and loaded.note.endswith(".") and loaded.synthetic == (name == "shapes")
    for images, labels in ((loaded.train_images, loaded.train_labels), (loaded.test_images, loaded.test_labels)):
        assert images.dtype == torch.float32 and images.shape == (len(labels), 3, 32, 32) and images.is_contiguous()
        assert labels.dtype == torch.int64 and labels.unique().tolist() == list(range(loaded.classes))
    # Exactly for the training images; the test images are scaled by the same figures, so only nearly.
    for images, tolerance in ((loaded.train_images, 1e-4), (loaded.test_images, 0.1)):
        assert images.mean((0, 2, 3)).abs().max() < tolerance
        assert (images.std((0, 2, 3)) - 1).abs().max() < tolerance


def test_digits_are_scikit_learns(digits):
    from sklearn.datasets import load_digits

    scans = load_digits()
    assert (len(digits.train_labels), len(digits.test_labels), digits.classes) == (1352, 445, 10)
    # The fourth, the eighth, ... of each digit.
    places = np.sort(np.concatenate([np.flatnonzero(scans.target == digit)[3::4] for digit in range(10)]))
    assert digits.test_labels.tolist() == scans.target[places].tolist()
    # The corner of an interpolated image is the corner of the scan, and the three channels are one.
    raw = torch.from_numpy(scans.images[places, 0, 7]).float() / 16
    corner = digits.test_images[:, 0, 0, 31]
    scale = (corner.max() - corner.min()) / (raw.max() - raw.min())
    torch.testing.assert_close(corner, (raw - raw.min()) * scale + corner.min())
    assert torch.equal(digits.train_images[:, 0], digits.train_images[:, 2])


def test_digits_have_their_share_of_each_class_in_the_test(digits):
    train, test = digits.train_labels.bincount(), digits.test_labels.bincount()
    assert torch.equal(test, (train + test) // 4)


def test_shapes_are_many_enough_and_balanced(shapes):
    assert data.SHAPES_SIZE >= 20000 and shapes.classes == len(data.SHAPES) == 12
    assert shapes.train_labels.bincount().tolist() == [150] * 12
    assert shapes.test_labels.bincount().tolist() == [25] * 12
    assert shapes.train_labels[:100].unique().numel() > 6  # not sorted by class


@pytest.mark.slow
def test_shapes_in_their_own_size():
    loaded = data.load("shapes")
    assert loaded.train_labels.bincount().tolist() == [1500] * 12
    assert loaded.test_labels.bincount().tolist() == [250] * 12


def test_shapes_no_image_twice(shapes):
    assert len(fingerprints(shapes.train_images, shapes.test_images)) == 2100


def test_shapes_come_from_the_seed_alone(shapes):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, other = data.load("shapes", size=2100), data.load("shapes", size=2100, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(again, field), getattr(shapes, field))
    ours = fingerprints(shapes.train_images, shapes.test_images)
    assert not ours & fingerprints(other.train_images, other.test_images)


def test_shapes_cannot_be_told_by_their_colour(shapes):
    means = torch.stack([shapes.train_images[shapes.train_labels == k].mean((0, 2, 3)) for k in range(12)])
    assert means.abs().max() < 0.35  # in units of a pixel's deviation; 150 images each


# u to the right and v downwards; inside is negative.
INSIDE = {
    "disc": [(0, 0), (0.5, 0.5)],
    "half disc": [(0, 0), (-0.8, -0.3)],
    "ring": [(0.65, 0), (0, -0.65)],
    "crescent": [(-0.6, 0), (0, 0.8)],
    "square": [(0, 0), (0.7, -0.7)],
    "frame": [(0.58, 0), (-0.6, 0.6)],
    "bar": [(0, 0), (0.9, 0.3)],
    "cross": [(0, 0), (0.85, 0), (0, -0.85)],
    "triangle": [(0, 0), (0, -0.7), (0.7, 0.55)],
    "pentagon": [(0, 0), (0, -0.85), (0, 0.7)],
    "star": [(0, 0), (0, -0.9)],
    "heart": [(0, 0), (0, 0.9), (-0.5, -0.6)],
}
OUTSIDE = {
    "disc": [(0.6, 0.6)],
    "half disc": [(0, -0.45)],
    "ring": [(0, 0), (0.65, 0.65)],
    "crescent": [(0.4, 0), (0.8, 0)],
    "square": [(0.75, 0)],
    "frame": [(0, 0), (0.8, 0)],
    "bar": [(0, 0.4)],
    "cross": [(0.5, 0.5), (-0.5, 0.5)],
    "triangle": [(0.5, -0.4), (0, 0.65)],
    "pentagon": [(0.6, -0.7), (0, 0.75)],
    "star": [(0, 0.7), (0.5, -0.6)],
    "heart": [(0, -0.7), (0.6, 0.6)],
}


@pytest.mark.parametrize("name", list(data.SHAPES))
def test_shapes_by_points(name):
    def at(points):
        u, v = torch.tensor(points, dtype=torch.float32).T
        return data.SHAPES[name](u, v)

    assert (at(INSIDE[name]) < 0).all() and (at(OUTSIDE[name]) > 0).all()
    grid = torch.linspace(-1.5, 1.5, 301)
    u, v = grid[None, :], grid[:, None]
    inside = data.SHAPES[name](u, v) < 0
    assert not (inside & (torch.hypot(u, v) > 1.12)).any()  # a drawn shape cannot leave the image by much
    assert torch.equal(inside, inside.flip(1)) or name == "crescent"


def test_polygon_area():
    """n/2 R^2 sin(2 pi / n), for a triangle and a pentagon of circumradius 0.9."""
    grid = torch.linspace(-1, 1, 801)
    for sides, area in ((3, 1.0522), (5, 1.9259)):
        inside = data._polygon(grid[None, :], grid[:, None], sides) < 0
        assert abs(float(inside.float().mean()) * 4 - area) < 0.01


# CIFAR-10, from a stand-in for torchvision's reader


class StandIn:
    def __init__(self, root, train, download):
        count = 20 if train else 10
        self.data = np.random.default_rng(int(train)).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = [index % 10 for index in range(count)]


def test_cifar10_layout(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision").datasets
    monkeypatch.setattr(datasets, "CIFAR10", StandIn)
    (tmp_path / "cifar-10-batches-py").mkdir()
    loaded = data.load("cifar10", root=tmp_path)
    assert not loaded.synthetic and loaded.augment and loaded.classes == 10
    assert loaded.train_images.shape == (20, 3, 32, 32) and loaded.test_labels.tolist() == list(range(10))
    raw = torch.from_numpy(StandIn(None, True, False).data).double() / 255  # [N, H, W, C]
    expected = (raw - raw.mean((0, 1, 2))) / raw.flatten(0, 2).std(0)
    torch.testing.assert_close(loaded.train_images.double(), expected.permute(0, 3, 1, 2), rtol=0, atol=1e-5)
    assert [loader.augment for loader in data.loaders(loaded)] == [True, False]
    assert not data.loaders(loaded, augment=False)[0].augment


def test_cifar10_is_never_fetched_unasked(tmp_path, monkeypatch):
    # A reader that can do nothing: an attempt to use it would be an ImportError.
    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.ModuleType("torchvision.datasets"))
    with pytest.raises(FileNotFoundError, match="^Expected CIFAR-10's folder .* got none"):
        data.load("cifar10", root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_cifar10_with_files_missing(tmp_path):
    pytest.importorskip("torchvision")
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(FileNotFoundError, match="^Expected the whole of CIFAR-10 in .* got missing or corrupt files$"):
        data.load("cifar10", root=tmp_path)


def test_cifar10_that_cannot_be_fetched(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision").datasets

    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(FileNotFoundError, match="^Expected to fetch CIFAR-10 in .* got: no route to host$"):
        data.load("cifar10", root=tmp_path, download=True)


# Loaders


def numbered(count, classes=1):
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, 4, 4).contiguous()
    return images, torch.arange(count) % classes


def order(loader):
    return [int(x) for images, _ in loader for x in images[:, 0, 0, 0]]


def test_loader_in_order():
    loader = data.Loader(*numbered(5), batch_size=2)
    assert len(loader) == 3 and [len(y) for _, y in loader] == [2, 2, 1]
    assert order(loader) == [0, 1, 2, 3, 4]


def test_loader_pairs_images_with_labels():
    for images, labels in data.Loader(*numbered(50, classes=7), batch_size=8, shuffle=True):
        assert torch.equal(images[:, 0, 0, 0].long() % 7, labels)


def test_loader_orders_by_seed_and_epoch_alone():
    first, second = (data.Loader(*numbered(100), batch_size=7, shuffle=True) for _ in range(2))
    epochs = [order(first) for _ in range(3)]
    assert first.epoch == 3
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second.epoch = 2  # resumed there
    assert order(second) == epochs[2] and order(second) not in epochs
    assert torch.equal(torch.get_rng_state(), before)
    other = data.Loader(*numbered(100), batch_size=7, shuffle=True, seed=1)
    assert order(other) not in epochs


def test_augmented_is_a_crop_of_the_padded_image_or_its_mirror():
    images = torch.randn(40, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    found = data.augmented(images, torch.Generator().manual_seed(1), padding=2)
    assert found.shape == images.shape
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    kinds = set()
    for index in range(40):
        matches = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            for crop in [padded[index, :, top : top + 5, left : left + 6]]
            if torch.equal(found[index], crop.flip(2) if mirrored else crop)
        ]
        assert len(matches) == 1
        kinds |= set(matches)
    assert {top for top, _, _ in kinds} == {left for _, left, _ in kinds} == set(range(5))
    assert {mirrored for _, _, mirrored in kinds} == {False, True}


def test_augmentation_is_reproducible(shapes):
    first, second = (data.loaders(shapes, augment=True)[0] for _ in range(2))
    (a, _), (b, _) = next(iter(first)), next(iter(second))
    plain, _ = next(iter(data.loaders(shapes)[0]))
    assert torch.equal(a, b) and not torch.equal(a, plain)


def test_loaders_cover_the_set(shapes):
    train, test = data.loaders(shapes)
    assert len(train) == 29 and sum(len(y) for _, y in train) == 1800  # 28 of 64 and one of 8
    assert torch.equal(torch.cat([y for _, y in test]), shapes.test_labels)
    assert next(iter(train))[0].shape == (64, 3, 32, 32)


# Few labels


def test_labels_fraction_is_exact_and_balanced(shapes):
    train, test = data.loaders(shapes, labels_fraction=0.1)
    told = train.labels != data.IGNORED
    assert data.IGNORED == -100 == torch.nn.CrossEntropyLoss().ignore_index
    assert train.labels[told].bincount().tolist() == [15] * 12 and int(told.sum()) == 180
    assert torch.equal(train.labels[told], shapes.train_labels[told])
    assert len(train.images) == 1800 and (test.labels != data.IGNORED).all()
    assert (shapes.train_labels >= 0).all()  # the set itself is untouched


def test_labelled_only_leaves_the_same_images(shapes):
    train, _ = data.loaders(shapes, labels_fraction=0.1)
    alone, _ = data.loaders(shapes, labels_fraction=0.1, labelled_only=True)
    told = train.labels != data.IGNORED
    assert torch.equal(alone.images, train.images[told]) and torch.equal(alone.labels, train.labels[told])
    assert len(alone) == 3  # 180 images, 64 at a time


def test_labels_are_chosen_by_the_seed(shapes):
    first, again, other = (data.loaders(shapes, seed=s, labels_fraction=0.1)[0].labels for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_class_keeps_a_label(shapes):
    train, _ = data.loaders(shapes, labels_fraction=1e-6, labelled_only=True)
    assert sorted(train.labels.tolist()) == list(range(12))


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: data.load("mnist"), "data to be one of digits, shapes, cifar10, got 'mnist'"),
        (lambda s: data.load("cifar10"), "a root folder for cifar10, got none"),
        (lambda s: data.load("digits", size=100), "a size for shapes only, got size=100 for digits"),
        (lambda s: data.load("shapes", size=83), "a size of at least 84 shapes, got 83"),
        (lambda s: data.load("shapes", size=2e3), "a size of at least 84 shapes, got 2000.0"),
        (lambda s: data.loaders(s, batch_size=0), "a batch size of at least 1, got 0"),
        (lambda s: data.loaders(s, labels_fraction=0), r"labels_fraction in \(0, 1\], got 0"),
        (lambda s: data.loaders(s, labels_fraction=1.5), r"labels_fraction in \(0, 1\], got 1.5"),
        (lambda s: data.loaders(s, labels_fraction=float("nan")), r"labels_fraction in \(0, 1\], got nan"),
        (lambda s: data.Loader(s.train_images[:3], s.train_labels[:2]), "as many labels as images.* got 2 and 3"),
        (lambda s: data.Loader(s.train_images[:0], s.train_labels[:0]), "at least one, got 0 and 0"),
    ],
)
def test_errors(call, message, shapes):
    with pytest.raises(ValueError, match=f"^Expected .*{message}$") as error:
        call(shapes)
    assert "\n" not in str(error.value)


def test_digits_are_not_mirrored(digits):
    with pytest.raises(ValueError, match="^Expected images that may be mirrored for augment, got digits$"):
        data.loaders(digits, augment=True)
    assert not data.loaders(digits)[0].augment

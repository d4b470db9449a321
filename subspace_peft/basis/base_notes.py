"""This machine's notes of the base weights that a stored basis was first trained on, by the basis's fingerprint.

They stand in for a record in the basis's own folder, which nothing writes unasked, and count only where it has none.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._io.atomic import write_text_aside
from .._io.untrusted import is_sha256, read_json
from .base_weights import KEY, WeightSample, joined, read_sample
from .basis import SubspaceBasis
from .cache import cache_home
from .living import alive


def note_file(fingerprint: str) -> Path:
    """Return the file of the note on a basis, whether there is one or not."""
    return cache_home() / "base_weights" / f"{fingerprint}.json"


def add_base_note(fingerprint: str, record: Mapping[str, Any]) -> None:
    """Note the base weights that tasks in a basis are trained on; what an earlier note says stays.

    A cache that cannot be written is no reason to fail.
    """
    more, before = read_sample(record), read_base_note(fingerprint)
    if (
        not is_sha256(fingerprint)
        or more is None
        or (before is not None and more.values.keys() <= before.values.keys())
    ):
        return
    with contextlib.suppress(OSError):
        write_text_aside(note_file(fingerprint), json.dumps(joined(before, more).record()))


def read_base_note(fingerprint: str) -> WeightSample | None:
    """Return the note on a basis; None where there is none that can be read."""
    if not is_sha256(fingerprint):
        return None
    try:
        return read_sample(read_json(note_file(fingerprint)))
    except (OSError, ValueError):
        return None


def known_weights(basis: SubspaceBasis) -> tuple[WeightSample, str] | None:
    """Return the base weights that a basis belongs to, and where that is on record.

    The basis's own record counts first; then what this process trained on it; then this machine's note. A random basis
    is the same, fingerprint and all, for every base model of its shapes, so only its own record counts.
    """
    if (own := read_sample(basis.info.get(KEY))) is not None:
        return own, "in the basis's own record" + (" of the first training in it" if own.taken == "training" else "")
    if belongs_to_none(basis):
        return None
    twin = alive(basis.fingerprint) or basis
    for record in (basis.first_trained_on, twin.first_trained_on, twin.info.get(KEY)):
        if (seen := read_sample(record)) is not None:
            return seen, "of the first training in the basis, in this process"
    noted = read_base_note(basis.fingerprint)
    return (
        None
        if noted is None
        else (noted, f"in this machine's note of the first training ({note_file(basis.fingerprint)})")
    )


def belongs_to_none(basis: SubspaceBasis) -> bool:
    """Return whether nothing in a basis comes from a base model or from adapters of one."""
    return basis.info.get("builder") == "random"


def take_record(basis: SubspaceBasis, sample: WeightSample) -> None:
    """Keep the base weights of the first training: in the record of a basis in memory, beside that of a stored one."""
    if basis.location is None:
        basis.info[KEY] = joined(read_sample(basis.info.get(KEY)), sample).record()
    else:
        # another object of the same basis may be asked later
        for each in (basis, alive(basis.fingerprint) or basis):
            each.first_trained_on = joined(read_sample(each.first_trained_on), sample).record()

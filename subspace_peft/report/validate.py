"""Check that a basis is what its record says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._shown import Facts
from ..basis.arrays import Raw, StoredReader, array_of, check_raw, columns_of, orthonormality, restored
from ..basis.layout import FLOATS, TOLERANCE
from ..basis.opened import open_to_look
from ..energy import DEFINITION, EnergyRecord, percent, share_of, sources_of
from ..errors import SubspaceError

if TYPE_CHECKING:
    from ..basis import SubspaceBasis

TOLERATED = 5e-3  # of a share on record: directions may be stored in int8


def validate_basis(basis: SubspaceBasis | str | Path, *, token: str | bool | None = None) -> Facts:
    """Read every tensor of a basis and check all that can be checked without its sources.

    Per module: sha256, shapes, finite values, orthonormal U and V, core statistics that go together. In all: the
    fingerprint, and a record of sources that fits the stored cores: as many, and what is said to be kept of each. Of a
    folder or Hub id the bytes are read without torch.

    Args:
        basis: a basis, its folder or its Hub id.
        token: as in huggingface_hub.

    Returns:
        ``{"location", "fingerprint", "modules", "problems": ["module …: …"], "orthonormality": largest error found,
        "energy_kept": of the sources, as on record}``; valid where `problems` is empty.

    Raises:
        SubspaceError: there is no basis, or its config or file header cannot be read at all.
    """
    if isinstance(basis, (str, Path)):
        stored = open_to_look(basis, token=token)
        reader = StoredReader(stored)
        found = _check(stored.entries, reader.raw, stored.precision, stored.info)
        return Facts({"location": stored.location, "fingerprint": stored.fingerprint, **found})
    found = _check(basis, lambda name: _raw_of(basis, name), basis.precision, basis.info)
    return Facts({"location": basis.location, "fingerprint": basis.fingerprint, **found})


def _raw_of(basis: SubspaceBasis, name: str) -> dict[str, Raw]:
    """Return the bytes of a module of a basis in this process."""
    from ..basis.module import tensor_bytes
    from ..basis.precision import KINDS

    raw = {}
    for key, value in basis.stored(name).items():
        raw[key] = (KINDS.get(value.dtype, str(value.dtype)), tuple(value.shape), tensor_bytes(value))
    check_raw(name, raw, basis.precision)
    return raw


def _check(
    names: Iterable[str], read: Callable[[str], dict[str, Raw]], precision: str | None, info: Mapping[str, Any]
) -> dict[str, Any]:
    problems: list[str] = []
    worst, count = 0.0, 0
    sources = len(info.get("sources") or [])
    held: np.ndarray[Any, Any] | None = np.zeros(sources)
    for name in names:
        count += 1
        try:
            raw = read(name)
        except SubspaceError as error:
            problems.append(str(error))
            held = None
            continue
        for side in ("U", "V"):
            columns = columns_of(raw, side)
            kind = raw[side][0]
            if precision is not None:
                # what is stored was held against its precision; what counts is what is made of it
                columns, kind = restored(columns).astype(np.float64), "F32"
            error = orthonormality(columns)
            worst = max(worst, error)
            if not error <= TOLERANCE[kind]:
                problems.append(
                    f"module {name!r}: {side} is not orthonormal: its Gram matrix is off by {error:.2g} (at most"
                    f" {TOLERANCE[kind]:g} for {FLOATS[kind]}). Build the basis again."
                )
        cores = array_of(raw["cores"]) if "cores" in raw else None
        if cores is not None and len(cores) != sources:
            problems.append(
                f"module {name!r}: {len(cores)} cores, but {sources} sources are on record. Build the basis again."
            )
        if cores is None or len(cores) != sources:
            held = None
        elif held is not None:
            held += np.square(cores.astype(np.float64)).sum((1, 2))
        if "core_rms" in raw and bool((array_of(raw["core_rms"]) < 0).any()):
            problems.append(f"module {name!r}: core_rms has negative values. Build the basis again.")
    if held is not None:
        problems += _contradicted(info, held)
    record = EnergyRecord.of(info)
    return {
        "modules": count,
        "orthonormality": worst,
        "energy_kept": record.kept,
        "energy_kept_at_least": record.at_least,
        "problems": problems,
    }


def _contradicted(info: Mapping[str, Any], held: np.ndarray[Any, Any]) -> list[str]:
    """Return which sources' energy kept is not that of their stored cores, ``Σ ‖C‖² / ‖ΔW‖²``.

    Args:
        info: of the basis. Records of earlier versions are not judged: some are of the basis that one was cut from.
        held: per source Σ ‖C‖² over all modules (N,) float64.
    """
    measured = info.get("measured")
    if not isinstance(measured, Mapping) or measured.get("definition") != DEFINITION:
        return []
    found = []
    for entry, known, square in zip(sources_of(info), EnergyRecord.of(info).sources, held.tolist(), strict=True):
        norm = entry.get("norm")
        if known.kept is None or not isinstance(norm, (int, float)) or not norm > 0:
            continue
        share = share_of(square, float(norm) ** 2)
        if abs(share - known.kept) > TOLERATED:
            found.append(
                f"source {known.name!r}: energy kept {percent(known.kept)} is on record, and its stored cores hold"
                f" {percent(share)}. The config was altered: fetch or build the basis again."
            )
    return found

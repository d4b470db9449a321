"""Check that a basis is what its record says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..basis import SubspaceBasis
from ..energy import DEFINITION, EnergyRecord, percent, share_of, sources_of
from ..errors import SubspaceError

TOLERATED = 5e-3  # of a share on record: directions may be stored in int8
# largest entry of |UᵀU − 1| that rounding to a dtype explains
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def validate_basis(basis: SubspaceBasis | str | Path, *, token: str | bool | None = None) -> dict[str, Any]:
    """Read every tensor of a basis and check all that can be checked without its sources.

    Per module: sha256, shapes, finite values, orthonormal U and V, core statistics that go together. In all: the
    fingerprint, and a record of sources that fits the stored cores: as many, and what is said to be kept of each.

    Args:
        basis: a basis, its folder or its Hub id.
        token: as in huggingface_hub.

    Returns:
        ``{"location", "fingerprint", "modules", "problems": ["module …: …"], "orthonormality": largest error found,
        "energy_kept": of the sources, as on record}``; valid where `problems` is empty.

    Raises:
        SubspaceError: there is no basis, or its config or file header cannot be read at all.
    """
    if not isinstance(basis, SubspaceBasis):
        basis = SubspaceBasis.from_pretrained(basis, token=token)
    problems: list[str] = []
    worst = 0.0
    sources = len(basis.info.get("sources") or [])
    held: torch.Tensor | None = torch.zeros(sources, dtype=torch.float64)
    for name in basis:
        try:
            module = basis[name]
            module.check(name)
        except SubspaceError as error:
            problems.append(str(error))
            held = None
            continue
        for side, directions in (("U", module.U.T), ("V", module.V)):
            gram = directions.double() @ directions.double().T
            error = float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max())
            worst = max(worst, error)
            if error > TOLERANCE[directions.dtype]:
                problems.append(
                    f"module {name!r}: {side} is not orthonormal: its Gram matrix is off by {error:.2g} (at most"
                    f" {TOLERANCE[directions.dtype]:g} for {str(directions.dtype).removeprefix('torch.')}). Build the"
                    " basis again."
                )
        if module.cores is not None and module.cores.shape[0] != sources:
            problems.append(
                f"module {name!r}: {module.cores.shape[0]} cores, but {sources} sources are on record. Build the basis"
                " again."
            )
        if module.cores is None or len(module.cores) != sources:
            held = None
        elif held is not None:
            held += module.cores.double().square().sum((1, 2))
        if module.core_rms is not None and bool((module.core_rms < 0).any()):
            problems.append(f"module {name!r}: core_rms has negative values. Build the basis again.")
    if held is not None:
        problems += _contradicted(basis.info, held)
    record = EnergyRecord.of(basis.info)
    return {
        "location": basis.location,
        "fingerprint": basis.fingerprint,
        "modules": len(basis),
        "orthonormality": worst,
        "energy_kept": record.kept,
        "energy_kept_at_least": record.at_least,
        "problems": problems,
    }


def _contradicted(info: Mapping[str, Any], held: torch.Tensor) -> list[str]:
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

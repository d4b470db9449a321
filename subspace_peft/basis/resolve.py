"""Find a basis by reference: path, Hub id or fingerprint, in the order that docs/architecture.md gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .._moved import moved_name
from ..errors import BadFileError, BasisMismatchError, BasisNotFoundError
from . import cache
from .basis import SubspaceBasis, alive, basis_of
from .basis_reference import BasisReference
from .locations import read_notes


def resolve_basis(
    reference: str | None,
    *,
    revision: str | None = None,
    fingerprint: str | None = None,
    near: Path | None = None,
    token: str | bool | None = None,
) -> SubspaceBasis:
    """Find and verify a basis.

    The places are tried in this order: the bases alive in this process and those that were fetched before, both by
    fingerprint; `reference`; the places where this machine has seen the fingerprint.

    Args:
        reference: a folder, relative to `near` or to the working directory, or a Hub id; None where none is known.
        revision: branch, tag or commit sha, for a Hub id.
        fingerprint: the sha256 that the basis must have; None for any.
        near: folder that a relative `reference` is tried from first.
        token: as in huggingface_hub.

    Raises:
        BasisNotFoundError: it is in none of these places; lists them.
        BadFileError: the files at `reference` are damaged.
        BasisMismatchError: `reference` holds a basis with another fingerprint; names both.
    """
    if fingerprint is not None:
        if (found := alive(fingerprint)) is not None:
            return found
        if (kept := cache.find(fingerprint)) is not None:
            return basis_of(kept)
    tried: list[str] = []
    wrong: BasisMismatchError | None = None
    places: list[tuple[str, str | None]] = []
    if reference is not None:
        if reference.startswith(("\\\\", "//")):
            raise BasisNotFoundError(
                f"The basis's recorded place {reference!r} is on another machine's share, and asking there would tell"
                " that machine who you are. If you trust it, say so yourself with `basis=`."
            )
        if near is not None and not os.path.isabs(reference):
            places.append((str(near / reference), None))
        places.append((reference, revision))
    hints = len(places)
    if fingerprint is not None:
        places += [(str(note["location"]), note.get("revision")) for note in read_notes(fingerprint)]
    for number, (place, at) in enumerate(places):
        try:
            basis = SubspaceBasis.from_pretrained(place, revision=at, fingerprint=fingerprint, token=token)
        except BasisMismatchError as error:
            wrong = wrong or error
        except BasisNotFoundError as error:
            tried.append(f"{place}: {str(error).splitlines()[0]}")
        except BadFileError as error:
            # damaged files where a basis was seen once are no reason to fail
            if number < hints:
                raise
            tried.append(f"{place}: {str(error).splitlines()[0]}")
        else:
            return basis
    if wrong is not None:
        raise wrong
    looked = "\n  ".join(tried) or "no path or Hub id is recorded"
    raise BasisNotFoundError(
        f"The basis {reference or ''} (fingerprint {fingerprint or 'not given'}) was not found:\n  {looked}\n"
        "Say where it is with `SubspaceConfig(basis=…)` or, for a saved task, set `config.basis` to its folder or Hub "
        "id; open it once with `SubspaceBasis.from_pretrained(…)` in this process; or save tasks with "
        "`save_basis=True` to make them self-contained."
    )


def resolve_reference(reference: BasisReference) -> SubspaceBasis:
    """Find and verify the basis that `reference` means. Raises as `resolve_basis`."""
    if reference.exact:
        return SubspaceBasis.from_pretrained(
            str(reference.location), fingerprint=reference.fingerprint, token=reference.token
        )
    return resolve_basis(
        reference.location,
        revision=reference.revision,
        fingerprint=reference.fingerprint,
        near=reference.near,
        token=reference.token,
    )


def require_same(basis: SubspaceBasis, fingerprint: str | None, what: str) -> None:
    """Check that `basis` is the one asked for.

    Args:
        basis: the basis given.
        fingerprint: the sha256 that it must have; None for any.
        what: what asks for it, for the message.

    Raises:
        BasisMismatchError: it is another one; names both fingerprints.
    """
    if fingerprint is not None and basis.fingerprint != fingerprint:
        raise BasisMismatchError(
            f"{what} needs the basis with fingerprint {fingerprint}, but got {basis.fingerprint} "
            f"({basis.location or 'in memory'}). Pass the basis it was trained on, or train it again on this one."
        )


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)

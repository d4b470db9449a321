"""Find a basis by reference: path, Hub id or fingerprint, in the order that docs/architecture.md gives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._io.places import is_absolute
from .._moved import moved_name
from ..errors import BadFileError, BasisMismatchError, BasisNotFoundError, HubUnavailableError
from ..hub import only_local
from . import cache
from .basis import SubspaceBasis, basis_of
from .basis_reference import BasisReference
from .files import record_of
from .living import alive
from .locations import read_notes
from .recorded import candidates


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
    fingerprint; the folders that `reference` may mean; the folders where this machine has seen the fingerprint; the
    Hub, where `reference` can be an id of it, and where the fingerprint was seen on it.

    Args:
        reference: a folder, relative to `near` or to the working directory, or a Hub id; None where none is known.
        revision: branch, tag or commit sha, for a Hub id.
        fingerprint: the sha256 that the basis must have; None for any.
        near: folder of the file that says `reference`; a relative one is tried from there first.
        token: as in huggingface_hub.

    Raises:
        BasisNotFoundError: it is in none of these places; lists them.
        BadFileError: the files at `reference` are damaged.
        BasisMismatchError: `reference` holds a basis with another fingerprint; names both.
        HubUnavailableError: the Hub does not answer, and the basis is nowhere else.
    """
    if fingerprint is not None:
        if (found := alive(fingerprint)) is not None:
            return found
        if (kept := cache.find(fingerprint)) is not None:
            return basis_of(record_of(kept))
    if reference is not None and reference.startswith(("\\\\", "//")):
        raise BasisNotFoundError(
            f"The basis's recorded place {reference!r} is on another machine's share, and asking there would tell"
            " that machine who you are. If you trust it, say so yourself with `basis=`."
        )
    tried: list[str] = []
    failed: BasisMismatchError | HubUnavailableError | None = None
    for place, at, recorded in _places(reference, revision, fingerprint, near):
        try:
            return SubspaceBasis.from_pretrained(place, revision=at, fingerprint=fingerprint, token=token)
        except (BasisNotFoundError, BasisMismatchError, BadFileError, HubUnavailableError) as error:
            # damaged files where a basis was seen once are no reason to fail
            if isinstance(error, BadFileError) and recorded:
                raise
            # a folder that happens to have the name says nothing of the basis
            if isinstance(error, BasisMismatchError) and recorded is not None:
                failed = failed or error
            if isinstance(error, HubUnavailableError) and not isinstance(error, BasisNotFoundError):
                failed = failed or error
            tried.append(f"{place}: {str(error).splitlines()[0]}")
    if failed is not None:
        raise failed
    looked = "\n  ".join(tried) or "no path or Hub id is recorded"
    raise BasisNotFoundError(
        f"The basis {reference or ''} (fingerprint {fingerprint or 'not given'}) was not found:\n  {looked}\n"
        "Say where it is with `SubspaceConfig(basis=…)` or, for a saved task, set `config.basis` to its folder or Hub "
        "id; open it once with `SubspaceBasis.from_pretrained(…)` in this process; or save tasks with "
        "`save_basis=True` to make them self-contained."
    )


def _places(
    reference: str | None, revision: str | None, fingerprint: str | None, near: Path | None
) -> Iterator[tuple[str, str | None, bool | None]]:
    """Yield the places to try, this machine's first, each with a revision and whether it is what is recorded.

    Of folders that only have the recorded one's name that is None.
    """
    on_hub: list[tuple[str, str | None, bool | None]] = []
    if reference is not None:
        beside = () if near is None else (near, near.parent)
        local = only_local(reference, revision, *beside)
        for place, recorded in candidates(reference, near).items():
            # what is not there is worth a line where nothing else is asked for
            if (local and recorded) or _is_dir(place):
                # whole, so that it cannot be taken for an id of the Hub
                yield os.path.abspath(place), None, recorded or None
        if not local:
            on_hub.append((reference, revision, True))
    for note in read_notes(fingerprint) if fingerprint is not None else ():
        location, at = str(note["location"]), note["revision"]
        if is_absolute(location):
            yield location, None, False
        elif not only_local(location, at):
            on_hub.append((location, at, False))
    yield from on_hub


def _is_dir(place: Path) -> bool:
    try:
        return place.is_dir()
    except (OSError, ValueError):
        return False


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

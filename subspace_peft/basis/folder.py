"""A basis's folder, written whole: its config, its tensors and a card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..cards import Place
from ..errors import SubspaceError
from .alteration import rehashed
from .card import write_card
from .files import BasisRecord, write_basis
from .source_places import shared_info


def write_with_card(record: BasisRecord, folder: Path, place: Place | None) -> Path:
    """Write the files of a basis into `folder`, and a card that loads it from `place`, or else from the folder.

    Args:
        record: what to write; places of its sources become relative to `place`.
        folder: made where it does not exist.
        place: where the basis will be loaded from, if not from the folder.

    Returns:
        The folder's absolute path.

    Raises:
        SubspaceError: modules were changed in place since the basis got its fingerprint; `folder` is a file.
        OSError: the disk refuses.
    """
    if wrong := rehashed(record.modules, record.digests):
        raise SubspaceError(
            f"{len(wrong)} modules of the basis were changed in place since it got its fingerprint (such as"
            f" {wrong[0]!r}): it is another basis now. If that is wanted, make it one, SubspaceBasis(dict(basis),"
            " basis.info), and save that; else load or build it again."
        )
    info = shared_info(record.info, folder.resolve() if place is None else None, record.fingerprint)
    record = replace(record, info=info)
    path = write_basis(record, folder)
    write_card(record, folder, place or Place.of_folder(folder))
    return path

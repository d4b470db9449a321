"""Read a saved task's `adapter_config.json`: say truly what is wrong with it, and which version wrote it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from .._io.untrusted import read_json
from ..basis.newer import upgrade_hint, written_by
from ..errors import BadFileError, BasisMismatchError, HubUnavailableError, NoConfigurationError, SubspaceError
from ..hub import only_local
from ..hub_requests import ask
from .config_check import unknown_keys
from .peft_type import SUBSPACE

# what may be said of a saved task when it is loaded
TAKEN = ("basis", "check_base_model")


def read_fields(file: str, known: Sequence[str], read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the values of a configuration's file.

    Args:
        file: its path.
        known: names of the fields that this version saves.
        read: PEFT's own reader of the file.

    Returns:
        PEFT's reading of it, without what a newer version of this package saved beside `known`, which is warned of.

    Raises:
        BadFileError: no JSON object, a method that PEFT does not know, or keys that no version writes into a saved
            task.
    """
    try:
        values = read_json(Path(file))
    except (OSError, ValueError) as error:
        raise BadFileError(f"{file}: no adapter's config ({error}). Fetch or save the adapter again.") from error
    kind = values.get("peft_type", SUBSPACE)
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise BadFileError(
            f"{file}: its peft_type is {str(kind)[:80]!r}, which this PEFT does not know."
            f"{upgrade_hint(values.get('subspace_version')) or ' Upgrade PEFT, or fetch the adapter again.'}"
        )
    unknown = unknown_keys(values, known) if kind == SUBSPACE else []
    if unknown:
        raise BadFileError(
            f"{file}: it has {', '.join(unknown[:5])}, which neither the version that saved it nor this"
            " one knows. The file was altered: fetch it again, or take that out."
        )
    found = read()
    hint = upgrade_hint(values.get("subspace_version"))
    more = sorted(set(found) - set(known)) if hint and kind == SUBSPACE else []
    if told := [str(key)[:80] for key in more if found[key] not in (None, False, [], {})]:
        warnings.warn(f"{file}: {', '.join(told)} not known here, and ignored.{hint}", stacklevel=3)
    # PEFT would take what it does not know for its own
    return {key: value for key, value in found.items() if key not in more}


def read_config(place: str, subfolder: str | None, revision: str | None, read: Callable[[], Any]) -> Any:
    """Return the configuration in a folder or Hub repository, of whatever method.

    Args:
        place: folder or Hub id.
        subfolder: in it.
        revision: branch, tag or commit sha on the Hub.
        read: PEFT's own reader of the place.

    Raises:
        SubspaceError: `place` can only be a folder, and there is none.
        BadFileError: the file makes no configuration; a TypeError as well where PEFT raises one.
        HubUnavailableError: the Hub does not answer.
    """
    if only_local(place, revision) and not os.path.isdir(os.path.join(place, subfolder or "")):
        raise SubspaceError(
            f"{place}: there is no such folder{f' {subfolder!r} in it' if subfolder else ''}. Pass the folder of a"
            " saved task or a Hub id, org/name (with revision= where a folder here is called like its first part)."
        )
    try:
        return ask(place, read)
    except (BadFileError, HubUnavailableError):
        raise
    except (SubspaceError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        # PEFT's own methods raise a TypeError for JSON that is no configuration
        kind = NoConfigurationError if isinstance(error, TypeError) else BadFileError
        file = Path(place, subfolder or "", "adapter_config.json")
        hint = upgrade_hint(written_by(file)) or " Fetch or save the task again."
        raise kind(f"{place}: its adapter_config.json makes no configuration ({error}).{hint}") from error


@contextmanager
def naming_newer_version(version: str | None) -> Iterator[None]:
    """Add to errors of a task's file that a newer version of this package wrote it, where one did."""
    try:
        yield
    except SubspaceError as error:
        hint = upgrade_hint(version)
        # what a place or the Hub refuses has nothing to do with versions
        if type(error) not in (SubspaceError, BadFileError, BasisMismatchError) or not hint or hint in str(error):
            raise
        raise type(error)(f"{error}{hint}") from error


def refuse_fields(own: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raise `SubspaceError` where a field of ours is given for a saved task, whose own value PEFT takes instead.

    Args:
        own: names of the fields that are not PEFT's own.
        given: the keywords of the call.
    """
    idle = [name for name in own if name in given]
    if idle:
        raise SubspaceError(
            f"{', '.join(f'{name}=' for name in idle)} has no effect on a saved task, which keeps what it was trained"
            " with. Leave it out; basis= and check_base_model= are taken."
        )
    # PEFT lets others through: they may be meant for the base model or the Hub
    for name in given:
        if near := get_close_matches(name, TAKEN, 1, 0.75):
            raise TypeError(f"got an unexpected keyword argument {name!r}; did you mean {near[0]}=?")

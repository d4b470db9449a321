"""The journal of a run: what is finished, so that a run that ends anywhere goes on from there to the same bytes.

A phase is recorded once its results are on disk, and the journal is written aside and renamed. What lies in the run's
folder and is not in the journal is of a phase that was interrupted; it is removed, and the phase begins again with its
own seed. Importing this module needs no torch.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._io.atomic import write_text_aside
from .._io.untrusted import read_json
from .._version import __version__
from ..basis.newer import upgrade_hint
from ..errors import BadFileError, SubspaceError
from .journal_checks import check_state
from .options import ContinualOptions

JOURNAL_FILE = "continual.json"
FORMAT = 1
#: The phases of a task, in their order. `probe`, `forward`, `refit` and `push` are recorded only where they are run.
PHASES = ("begin", "probe", "forward", "train", "absorb", "refit", "scores", "push", "done")


class Journal:
    """The journal in a run's folder.

    Attributes:
        folder: the run's folder.
        state: what is in the file: ``settings``, ``versions`` and ``tasks``; changed by `write` alone.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder, self.state = folder, state

    # -- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """Return the journal of a folder; None where there is none.

        Raises:
            BadFileError: it cannot be read, or is of a later version.
        """
        file = folder / JOURNAL_FILE
        if not file.is_file():
            return None
        hint = " Begin in another folder, or put back the file as it was."
        try:
            state = read_json(file)
            number = state.get("format_version")
            if isinstance(number, bool) or number != FORMAT:
                newer = isinstance(number, int) and number > FORMAT
                hint = upgrade_hint(state.get("subspace_peft_version"), newer) or hint
                raise ValueError(f"its format is {number!r}, this version reads {FORMAT}")
            check_state(state, PHASES)
        except (OSError, ValueError) as error:
            raise BadFileError(f"{file}: it is no journal of a run ({error}).{hint}") from error
        # an option that a later version brought is at its default, whichever version began the run
        settings = state["settings"]
        settings = {**settings, "options": {**ContinualOptions().record(), **settings["options"]}}
        return cls(folder, {**state, "settings": settings})

    @classmethod
    def create(cls, folder: Path, settings: Mapping[str, Any], version: Mapping[str, Any]) -> Journal:
        """Write the journal of a new run: no task is learned, and the first version of its basis is on disk.

        Args:
            folder: the run's folder.
            settings: what must not change while the run goes on, as JSON values.
            version: the facts of the first version.
        """
        state = {
            "format_version": FORMAT,
            "subspace_peft_version": __version__,
            "settings": dict(settings),
            "versions": [dict(version)],
            "tasks": [],
        }
        journal = cls(folder, {})
        journal.write(state)
        return journal

    def write(self, state: dict[str, Any]) -> None:
        """Put another state in the place of the present one; where the disk refuses, the present one stays.

        Raises:
            DiskError: the disk refuses.
        """
        text = json.dumps(state, indent=1, allow_nan=False) + "\n"
        write_text_aside(self.folder / JOURNAL_FILE, text)
        self.state = json.loads(text)

    # -- tasks ------------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The tasks in the order in which they were begun."""
        return list(self.state["tasks"])

    @property
    def versions(self) -> list[dict[str, Any]]:
        """The versions of the basis, from the first on."""
        return list(self.state["versions"])

    def task(self, name: str) -> dict[str, Any] | None:
        """Return a task's entry, or None."""
        return next((each for each in self.state["tasks"] if each["name"] == name), None)

    def learned(self) -> list[str]:
        """Return the names of the tasks that are finished."""
        return [each["name"] for each in self.state["tasks"] if "done" in each["phases"]]

    def unfinished(self) -> dict[str, Any] | None:
        """Return the entry of the task that was begun and is not finished, or None; it is the last one."""
        return next((each for each in self.state["tasks"] if "done" not in each["phases"]), None)

    def begin(self, name: str, facts: Mapping[str, Any]) -> None:
        """Record that a task is begun."""
        state = copy.deepcopy(self.state)
        state["tasks"].append({"name": name, **facts, "phases": {"begin": {}}})
        self.write(state)

    def phase(self, name: str, phase: str) -> dict[str, Any] | None:
        """Return what a finished phase of a task recorded; None where it is not finished."""
        entry = self.task(name)
        return None if entry is None else entry["phases"].get(phase)

    def record(
        self,
        name: str,
        phase: str,
        facts: Mapping[str, Any],
        *,
        version: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Record that a phase of a task is finished; its results have to be on disk.

        Args:
            name: the task.
            phase: one of `PHASES`.
            facts: its results, as JSON values; numbers have to be finite.
            version: the facts of the version of the basis that it made, if any.
            settings: settings that hold from now on.
        """
        if phase not in PHASES:
            raise ValueError(f"{phase!r} is no phase")
        state = copy.deepcopy(self.state)
        entry = next(each for each in state["tasks"] if each["name"] == name)
        entry["phases"][phase] = dict(facts)
        if version is not None:
            state["versions"].append(dict(version))
        state["settings"].update(settings or {})
        self.write(state)

    def drop(self, name: str) -> None:
        """Record that the unfinished task was never begun; what it had made is not in the journal any more."""
        state = copy.deepcopy(self.state)
        entry = next(each for each in state["tasks"] if each["name"] == name)
        first = entry["first_version"]
        state["tasks"].remove(entry)
        state["versions"] = [each for each in state["versions"] if each["version"] <= first]
        self.write(state)

    # -- settings ---------------------------------------------------------------------------------------------------

    def check_settings(self, settings: Mapping[str, Any], changeable: frozenset[str] = frozenset()) -> None:
        """Hold the settings that a run is continued with against those that it began with.

        Args:
            settings: nested mappings of JSON values.
            changeable: dotted names, such as ``options.max_k``, of what may change.

        Raises:
            SubspaceError: one is another; names it with both values.
        """
        wrong = changes(self.state["settings"], _plain(settings), changeable)
        if wrong:
            said = "; ".join(f"{name} was {old}, and is {new} now" for name, old, new in wrong)
            raise SubspaceError(
                f"{self.folder}: this run began with other settings: {said}. Go on with the earlier ones, or begin"
                " another run in another folder."
            )


def changes(old: Mapping[str, Any], new: Mapping[str, Any], ignored: frozenset[str] = frozenset()) -> list[Any]:
    """Return the leaves in which two nested mappings differ: (dotted name, old value, new value), as JSON texts."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        one, other = old.get(name), new.get(name)
        if name in ignored or one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            inner = frozenset(each[len(name) + 1 :] for each in ignored if each.startswith(f"{name}."))
            found += [(f"{name}.{path}", was, now) for path, was, now in changes(one, other, inner)]
        else:
            found.append((name, json.dumps(one), json.dumps(other)))
    return found


def seed_of(seed: int, *words: str) -> int:
    """Return the seed of a phase, from the run's seed and what the phase is: the same whatever was run before."""
    text = json.dumps([seed, *words])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def finite(what: str, value: Any) -> float:
    """Return a score as a number.

    Raises:
        SubspaceError: it is none, or not finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise SubspaceError(
            f"{what} is {value!r}. Give a function that returns one number, more being better."
        ) from None
    if not math.isfinite(number):
        raise SubspaceError(
            f"{what} is {number}. Look for examples without a label or a loss that is not finite, and lower the"
            " learning rate."
        )
    return number


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return json.loads(json.dumps(value))

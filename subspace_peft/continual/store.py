"""What lies in a run's folder: versions of the basis, each with its tasks, and the work of the task being learned."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .._io.atomic import SUFFIX
from .._io.folder_names import check_folder_names
from ..basis.dependents import all_noted, dependents_of
from ..errors import BadFileError, OccupiedError, SubspaceError
from ..logging import get_logger
from .journal import JOURNAL_FILE, Journal
from .lock import LOCK_FILE

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")

logger = get_logger()


class RunFolder:
    """The places in a run's folder.

    ``versions/N/basis`` is version N of the basis and ``versions/N/tasks/NAME`` a task on it, as PEFT loads it;
    ``work/NAME`` has what a task needs while it is learned.

    Args:
        root: the run's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def basis(self, version: int) -> Path:
        """Return the folder of a version of the basis."""
        return self.root / "versions" / str(version) / "basis"

    def newest_basis(self, journal: Journal) -> Path:
        """Return the folder of the newest version of the basis."""
        return self.basis(max(each["version"] for each in journal.versions))

    def task(self, version: int, name: str) -> Path:
        """Return the folder of a task on a version of the basis."""
        return self.root / "versions" / str(version) / "tasks" / name

    def work(self, name: str) -> Path:
        """Return the folder of what a task needs while it is learned."""
        return self.root / "work" / name

    def check_name(self, name: Any, known: Iterable[str]) -> None:
        """Check that a task's name can be a folder's.

        Raises:
            SubspaceError: it cannot.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise SubspaceError(
                f"The task's name {name!r} cannot be a folder's. Give up to 64 letters, digits, '.', '_' and '-',"
                " beginning with a letter or digit."
            )
        check_folder_names(self.root, [*known, name])

    def check_free(self) -> None:
        """Check that a run may begin here: what the folder holds would be taken for the run's, and removed.

        A first version that a learner was writing as it was ended does not count; a lock's file tells that of one.

        Raises:
            OccupiedError: the folder holds something else.
        """
        own = {LOCK_FILE, "versions"} if (self.root / LOCK_FILE).is_file() else set()
        others = sorted(each.name for each in self.root.iterdir() if each.name not in own)
        others = [name for name in others if not name.endswith(SUFFIX)]
        if not others:
            versions = self.root / "versions"
            others = [f"versions/{each.name}" for each in _folders(versions) if each.name != "1"]
            # tasks are learned once there is a journal
            others += [f"versions/1/tasks/{each.name}" for each in _folders(versions / "1" / "tasks")]
        if others:
            shown = ", ".join(others[:3]) + (" …" if len(others) > 3 else "")
            own = " If that is a run's, put its journal back." if "versions/" in shown else ""
            raise OccupiedError(
                f"{self.root} holds {shown}, and no run: there is no {JOURNAL_FILE}. Give an empty folder, or one that"
                f" is not there.{own}"
            )

    def begin(self) -> None:
        """Remove a first version that a learner was writing as it was ended."""
        _remove(self.basis(1).parent)

    def check_whole(self, journal: Journal) -> None:
        """Check that the newest version of the journal lies here with its tasks: only then is the rest superfluous.

        Raises:
            BadFileError: something of it is missing: removed, or the journal is an earlier one.
        """
        newest = max(each["version"] for each in journal.versions)
        needed = [self.basis(newest), *(self.task(newest, name) for name in journal.learned())]
        if missing := [each for each in needed if not each.is_dir()]:
            there = ", ".join(each.name for each in _folders(self.root / "versions")) or "none"
            raise BadFileError(
                f"{self.root}: the journal's newest version is {newest}, and {missing[0].relative_to(self.root)} is"
                f" missing; versions that are there: {there}. Put it back, or the {JOURNAL_FILE} that belongs to them;"
                " nothing was changed."
            )

    def clear(self, journal: Journal) -> None:
        """Remove what no finished phase made, and the versions that nothing needs.

        A version whose basis something outside the run's folder depends on stays, without the run's tasks in it.
        """
        listed = {each["version"]: each for each in journal.versions}
        newest = max(listed)
        unfinished = journal.unfinished()
        needed = {newest}
        if unfinished is not None:
            needed |= {number for number in listed if number >= unfinished["first_version"]}
        if journal.state["settings"]["options"].get("keep") == "all":
            needed |= set(listed)
        for folder in _folders(self.root / "versions"):
            number = int(folder.name) if folder.name.isdecimal() else None
            if number not in listed:
                _remove(folder)
            elif number not in needed:
                self._remove_version(folder, listed[number]["fingerprint"])
        for name in {each.name for each in _folders(self.root / "work")}:
            if unfinished is None or unfinished["name"] != name:
                _remove(self.work(name))
        with contextlib.suppress(OSError):
            (self.root / "work").rmdir()
        for left in list(self.root.rglob(f".*{SUFFIX}")):
            # of a file or folder that was being written aside
            _remove(left) if left.is_dir() else left.unlink()
        written = {each["name"] for each in journal.tasks if "train" in each["phases"]}
        for number in needed & set(listed):
            for folder in _folders(self.task(number, "-").parent):
                if folder.name not in written:
                    # of a training that was interrupted while it wrote its result, or begun again
                    _remove(folder)

    def _remove_version(self, folder: Path, fingerprint: str) -> None:
        others = [place for place in dependents_of(fingerprint) if self.root.resolve() not in Path(place).parents]
        if not others and all_noted(fingerprint):
            _remove(folder)
            return
        # those inside are on the newest version by now
        _remove(folder / "tasks")
        logger.info("%s stays: %s on that basis", folder, ", ".join(others[:3]) or "something else may be")


def _folders(place: Path) -> list[Path]:
    return sorted(each for each in place.iterdir() if each.is_dir()) if place.is_dir() else []


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)

"""What a run has come to: scores, growth of the basis, bytes beside one LoRA per task. Importing needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._shown import Shown, Table, size
from ..errors import SubspaceError
from ..report.pays import FLOAT32, break_even
from .journal import JOURNAL_FILE, PHASES, Journal
from .metrics import ScoreMatrix, columns

# phase that comes next → what a user is told of it
NEXT = {
    "probe": "probing whether it needs its own directions",
    "forward": "measuring forward transfer",
    "train": "training",
    "absorb": "absorbing its own directions",
    "refit": "refitting the basis",
    "scores": "scoring all tasks",
    "push": "pushing",
    "done": "tidying up",
}


@dataclass(frozen=True)
class Version:
    """A version of the basis, as far as a journal tells.

    Attributes:
        number: of the run, from 1 on.
        kind: ``start``, ``absorb`` or ``refit``.
        task: the task that it was made for; None of the first.
        k: module → (k_out, k_in).
        bytes: of its tensors' file.
        drift: of a refit, the largest share of its update's norm by which a task changed in a module, the one that it
            was made for included; else None.
        drifts: of a refit, the same of every task; empty where the journal, of an earlier version, does not have it.
    """

    number: int
    kind: str
    task: str | None
    k: dict[str, tuple[int, int]]
    bytes: int
    drift: float | None
    drifts: Mapping[str, float]

    def describe_k(self) -> str:
        """Return the range of its modules' numbers of directions: ``16`` or ``16–18``."""
        every = [side for sides in self.k.values() for side in sides]
        return f"{min(every)}" if min(every) == max(every) else f"{min(every)}–{max(every)}"


@dataclass(frozen=True, repr=False)
class RunStatus(Shown):
    """The state of a run.

    Attributes:
        folder: the run's folder.
        matrix: the scores.
        versions: the versions of the basis, from the first on.
        learned: the tasks that are learned.
        unfinished: the task that was begun and is not finished, and which phase comes next; or None.
        extra_rank: task → how many directions of its own it was given.
        changes: task → the largest change of a logit by the absorption of its own directions, where it was measured.
        task_bytes: task → bytes of its file.
        lora_bytes: task → bytes of a LoRA of the options' rank on the same modules, with the same classifier.
    """

    folder: str
    matrix: ScoreMatrix
    versions: tuple[Version, ...]
    learned: tuple[str, ...]
    unfinished: tuple[str, str] | None
    extra_rank: Mapping[str, int]
    changes: Mapping[str, float]
    task_bytes: Mapping[str, int]
    lora_bytes: Mapping[str, int]

    @property
    def growth(self) -> dict[str, list[tuple[int, int]]]:
        """Module → (k_out, k_in) at the start and after each task: k(t)."""
        found: dict[str, list[tuple[int, int]]] = {name: [sides] for name, sides in self.versions[0].k.items()}
        for task in self.learned:
            made = [version for version in self.versions if version.task == task]
            for name, series in found.items():
                series.append(made[-1].k[name] if made else series[-1])
        return found

    @property
    def stored(self) -> int:
        """Bytes of the newest basis and all tasks."""
        return self.versions[-1].bytes + sum(self.task_bytes.values())

    @property
    def loras(self) -> int:
        """Bytes of a LoRA for each task instead."""
        return sum(self.lora_bytes.values())

    def break_even(self) -> int | None:
        """Return from how many tasks on the run takes fewer bytes than a LoRA for each; None: never, or no task yet.

        As if all further tasks had the mean size of those learned, and the basis went on growing as it did.
        """
        count = len(self.task_bytes)
        if not count:
            return None
        grown = self.versions[-1].bytes - self.versions[0].bytes
        return break_even(self.versions[0].bytes, self.loras / count, (sum(self.task_bytes.values()) + grown) / count)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "folder": self.folder,
            "learned": list(self.learned),
            "unfinished": None
            if self.unfinished is None
            else dict(zip(("task", "next"), self.unfinished, strict=True)),
            **{name: value for name, value in self.matrix.to_dict().items() if name != "tasks"},
            "extra_rank": dict(self.extra_rank),
            "absorbed_change": dict(self.changes),
            "versions": [
                {
                    "version": each.number,
                    "kind": each.kind,
                    "task": each.task,
                    "k": {name: list(sides) for name, sides in each.k.items()},
                    "bytes": each.bytes,
                    "drift": each.drift,
                    "drifts": dict(each.drifts),
                }
                for each in self.versions
            ],
            "growth": {name: [list(sides) for sides in series] for name, series in self.growth.items()},
            "task_bytes": dict(self.task_bytes),
            "lora_bytes": dict(self.lora_bytes),
            "bytes": self.stored,
            "loras_bytes": self.loras,
            "break_even": self.break_even(),
        }

    def text(self, *, markdown: bool = False) -> str:
        """Return scores, growth and bytes as tables with a few lines.

        Args:
            markdown: as tables of Markdown.
        """
        if not self.learned:
            return "\n".join(["No task is learned yet.", *self._unfinished()])
        rows = [["start", self.versions[0].describe_k(), "", f"{self.versions[0].bytes:,}", "", ""]]
        for name in self.learned:
            made = [version for version in self.versions if version.task == name]
            now = made[-1] if made else None
            change = self.changes.get(name)
            rows.append(
                [
                    name,
                    now.describe_k() if now else "=",
                    str(self.extra_rank.get(name, 0)),
                    f"{now.bytes:,}" if now else "=",
                    f"{self.task_bytes.get(name, 0):,}",
                    "" if change is None else f"{change:.1e}",
                ]
            )
        head = ["after", "k", "own directions", "bytes of the basis", "bytes of the task", "largest change of a logit"]
        return "\n".join(
            [
                self.matrix.table(markdown=markdown),
                "",
                columns(head, rows, markdown=markdown),
                "",
                *self._refits(),
                self._bytes(),
                *self._unfinished(),
            ]
        )

    def figure(self, file: str | Path) -> Path:
        """Draw scores, growth and bytes by task into a PNG, written aside and renamed.

        Raises:
            SubspaceError: no task is learned yet.
            ImportError: matplotlib is missing; install subspace-peft[report].
        """
        from .figure import draw

        return draw(self, Path(file))

    def _refits(self) -> list[str]:
        return [
            f"Refitted after {each.task}: k={each.describe_k()}; {_said_of_drift(each, each.drift)} of its update's"
            " norm in a module."
            for each in self.versions
            if each.kind == "refit" and each.drift is not None
        ]

    def _bytes(self) -> str:
        count, at = len(self.task_bytes), self.break_even()
        pays = "it never pays at this growth" if at is None else f"smaller in all from {at} tasks on"
        of = f"{count} task{'s' * (count != 1)}"
        return f"The basis and {of} take {size(self.stored)}, a LoRA for each {size(self.loras)}: {pays}."

    def _unfinished(self) -> list[str]:
        if self.unfinished is None:
            return []
        name, phase = self.unfinished
        return [f"Task {name!r} was begun; next is {NEXT[phase]}. The same call or `resume` goes on from there."]

    def _shown_facts(self) -> Iterable[tuple[str, Any]]:
        yield from self.matrix._shown_facts()
        yield "k", self.versions[-1].describe_k()
        yield "bytes", f"{self.stored:,}"
        yield "unfinished", None if self.unfinished is None else self.unfinished[0]

    def _shown_table(self) -> Table:
        return self.matrix._shown_table()


def _said_of_drift(version: Version, largest: float) -> str:
    """Return by how much at most earlier tasks and the new one drifted in a refit, as the beginning of a sentence."""
    if not version.drifts:
        return f"a task, {version.task} included, drifted by at most {largest:.2%}"
    new = version.drifts.get(str(version.task), 0.0)
    earlier = [drift for name, drift in version.drifts.items() if name != version.task]
    if not earlier:
        return f"{version.task} drifted by at most {new:.2%}"
    return f"an earlier task drifted by at most {max(earlier):.2%}, {version.task} itself by {new:.2%}"


def read_status(folder: str | Path) -> RunStatus:
    """Read how far a run is, without torch.

    Args:
        folder: the run's folder.

    Raises:
        SubspaceError: no run lies there.
        BadFileError: its journal is damaged.
    """
    place = Path(folder).expanduser()
    journal = Journal.read(place)
    if journal is None:
        raise SubspaceError(
            f"{place} holds no run: there is no {JOURNAL_FILE}. Give the folder of a `ContinualLearner`, or the"
            " `--out` of `subspace-peft continual run`."
        )
    return status_of(journal)


def status_of(journal: Journal) -> RunStatus:
    """Return what a journal tells."""
    learned = tuple(journal.learned())
    done = [each["phases"] for each in journal.tasks if "done" in each["phases"]]
    rows = [[phases["scores"]["scores"].get(name) for name in learned[: t + 1]] for t, phases in enumerate(done)]
    measured = {name: phases["forward"] for name, phases in zip(learned, done, strict=True) if phases.get("forward")}
    matrix = ScoreMatrix(
        learned,
        rows,
        {name: each["core"] for name, each in measured.items()},
        {name: each["random"] for name, each in measured.items()},
    )
    versions = tuple(
        Version(
            each["version"],
            each["kind"],
            each["task"],
            {name: (sides[0], sides[1]) for name, sides in each["k"].items()},
            each["bytes"],
            each.get("drift"),
            each.get("drifts", {}),
        )
        for each in journal.versions
    )
    last, begun = (done[-1]["scores"] if done else {}), journal.unfinished()
    options = journal.state["settings"]["options"]
    shapes = journal.versions[0]["shapes"].values()
    lora = FLOAT32 * options["lora_rank"] * sum(out + inner for out, inner in shapes)
    return RunStatus(
        folder=str(journal.folder),
        matrix=matrix,
        versions=versions if begun is None else tuple(each for each in versions if each.task != begun["name"]),
        learned=learned,
        unfinished=None if begun is None else (begun["name"], next_phase(begun["phases"], options)),
        extra_rank={name: phases["train"]["extra_rank"] for name, phases in zip(learned, done, strict=True)},
        changes={
            name: phases["absorb"]["change"]
            for name, phases in zip(learned, done, strict=True)
            if phases["absorb"].get("change") is not None
        },
        task_bytes=dict(last.get("bytes", {})),
        lora_bytes={name: lora + head for name, head in last.get("head_bytes", {}).items()},
    )


def next_phase(phases: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Return the phase that comes after the last one that is finished, of those that the options ask for."""
    asked = {
        "forward": options["forward"],
        "refit": options["max_k"] or options["refit_every"],
        "push": options["push_basis_to"],
    }
    last = max(PHASES.index(name) for name in phases)
    return next(name for name in PHASES[last + 1 :] if asked.get(name, True))

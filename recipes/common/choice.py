"""The choice among this basis, it with own directions, and LoRA: the smallest that validation finds good enough."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace_peft._io.atomic import write_text_aside
from subspace_peft.errors import SubspaceError

from .jackknife import standard_error
from .methods import Method
from .run_cache import plain
from .sweep import best_rate, finite_score
from .table import write_texts

# what a run keeps beside what `compare` needs: the validation score without each fold of its examples
KEYS = ("without",)
HEADER = (
    "| candidate | validation | behind the best | its standard error | trained (adapter) | adapter bytes, without head"
    " | runs | steps | train s | learning rate | test |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Candidate:
    """A method at the learning rate that was best for it, and what its sweep cost.

    Attributes:
        method: the row.
        rate: its best learning rate, and `at_edge`, whether that is the smallest or largest of those tried.
        validation: its score there, −∞ where all runs diverged.
        without: the same without each fold of the validation examples, see `jackknife`.
        trained_adapter, bytes: parameters and bytes of the adapter, without the head.
        runs, steps, seconds: of the whole sweep: trainings, optimizer steps, seconds of training.
    """

    method: Method
    rate: float
    at_edge: bool
    validation: float
    without: Sequence[float | None]
    trained_adapter: int
    bytes: int
    runs: int
    steps: int
    seconds: float

    @classmethod
    def of(cls, method: Method, tried: Mapping[float, Mapping[str, Any]]) -> Candidate:
        """Return the candidate that a sweep, rate → result, makes of `method`."""
        rate = best_rate(tried)
        best = tried[rate]
        return cls(
            method=method,
            rate=rate,
            at_edge=rate in (min(tried), max(tried)),
            validation=finite_score(best["validation"]),
            without=best["without"],
            trained_adapter=best["trained_adapter"],
            bytes=best["bytes"],
            runs=len(tried),
            steps=sum(result["curve"][-1][0] for result in tried.values()),
            seconds=sum(result["seconds"] for result in tried.values()),
        )


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        chosen: the smallest candidate that the best one does not beat by more than noise.
        best: the one with the best validation score; of equals the smallest.
        candidates: all of them, by the parameters of their adapters.
        errors: per candidate the standard error of its distance to the best, 0 for the best one itself.
        standard_errors: how many of them a larger one has to be ahead.
    """

    chosen: Candidate
    best: Candidate
    candidates: tuple[Candidate, ...]
    errors: tuple[float, ...]
    standard_errors: float

    def sentence(self) -> str:
        """Return the choice in words."""
        runs, steps = (sum(getattr(each, name) for each in self.candidates) for name in ("runs", "steps"))
        seconds = sum(each.seconds for each in self.candidates)
        name, smallest = self.chosen.method.name, self.candidates[0]
        more = f", {self.chosen.trained_adapter - smallest.trained_adapter:,} more than {smallest.method.name}"
        error = self.errors[self.candidates.index(self.chosen)]
        if self.chosen is self.best:
            why = f"no other has a better validation score than its {self.best.validation:.3f}"
            if any(math.isfinite(each.validation) for each in self.smaller()):
                why += ", and the smaller ones are behind by more than noise"
        else:
            gap = self.best.validation - self.chosen.validation
            why = (
                f"{self.best.method.name} has the best validation score, {self.best.validation:.3f}, but is only"
                f" {gap:.3f} ahead, with a standard error of {error:.3f}; it would have to be"
                f" {self.standard_errors:g} of them ahead"
            )
        return (
            f"Chosen: {name}; {why}. It has {self.chosen.trained_adapter:,} parameters in its"
            f" adapter{more if self.chosen is not smallest else ''}, in {self.chosen.bytes:,} bytes. The choice cost"
            f" {runs} runs, {steps:,} steps, {seconds:.1f} seconds of training; {self.chosen.steps:,} of the steps"
            " were for the chosen one."
        )

    def smaller(self) -> tuple[Candidate, ...]:
        """Return the candidates that are smaller than the chosen one."""
        return self.candidates[: self.candidates.index(self.chosen)]


def choose_smallest(candidates: Sequence[Candidate], *, standard_errors: float = 1.0) -> Choice:
    """Choose the smallest candidate that the best one does not beat by more than noise.

    Noise is so many standard errors of the difference of both validation scores, over the validation examples. With 0
    of them the best one is chosen. What the draw of a seed adds is not in it.

    Raises:
        SubspaceError: there is none whose training converged.
    """
    ordered = tuple(sorted(candidates, key=lambda each: each.trained_adapter))
    converged = [each for each in ordered if math.isfinite(each.validation)]
    if not converged:
        raise SubspaceError(
            f"{', '.join(each.method.name for each in ordered)}: every training diverged. Look at the data, or give"
            " more warm-up."
        )
    best = max(converged, key=lambda each: each.validation)
    errors = tuple(
        0.0 if each is best else math.inf if each not in converged else standard_error(best.without, each.without)
        for each in ordered
    )
    within = [
        each
        for each, error in zip(ordered, errors, strict=True)
        if each is best or (each in converged and _within(best.validation - each.validation, error, standard_errors))
    ]
    return Choice(within[0], best, ordered, errors, standard_errors)


def _within(gap: float, error: float, standard_errors: float) -> bool:
    # 0 times an infinite error is no number
    return gap <= (standard_errors * error if standard_errors else 0.0)


def choice_table(choice: Choice, tests: Mapping[str, float | None]) -> str:
    """Return the candidates as a Markdown table; `tests`: method → test score, of those that were tested."""
    lines = [HEADER]
    for each, error in zip(choice.candidates, choice.errors, strict=True):
        name = f"**{each.method.name}**" if each is choice.chosen else each.method.name
        score, behind = "diverged", "–"
        if math.isfinite(each.validation):
            score, behind = f"{each.validation:.3f}", f"{choice.best.validation - each.validation:.3f}"
        spread = f"{error:.3f}" if error and math.isfinite(error) else "–"
        test = tests.get(each.method.name)
        lines.append(
            f"| {name} | {score} | {behind} | {spread} | {each.trained_adapter:,} | {each.bytes:,} | {each.runs} |"
            f" {each.steps:,} | {each.seconds:.1f} | {each.rate:g}{' *' if each.at_edge else ''} |"
            f" {'–' if test is None else f'{test:.3f}'} |"
        )
    if any(each.at_edge for each in choice.candidates):
        lines += ["", "\\* the smallest or largest rate that was tried: a further one may be better."]
    return "\n".join(lines) + "\n"


def write_choice(
    choice: Choice,
    folder: str | Path,
    *,
    title: str,
    settings: Mapping[str, Any],
    tests: Mapping[str, float | None],
) -> str:
    """Write `choice.json` and `choice.md` into `folder`.

    Returns:
        The Markdown text.
    """
    keys = ("rate", "at_edge", "validation", "trained_adapter", "bytes", "runs", "steps", "seconds")
    rows = [
        {
            "method": each.method.name,
            **{key: getattr(each, key) for key in keys},
            "behind": choice.best.validation - each.validation,
            "standard_error": error,
            "test": tests.get(each.method.name),
        }
        for each, error in zip(choice.candidates, choice.errors, strict=True)
    ]
    body = plain(
        {
            "title": title,
            "settings": settings,
            "chosen": choice.chosen.method.name,
            "best": choice.best.method.name,
            "standard_errors": choice.standard_errors,
            "cost": {key: sum(row[key] for row in rows) for key in ("runs", "steps", "seconds")},
            "candidates": rows,
        }
    )
    text = f"{title}\n\n{choice_table(choice, tests)}\n{choice.sentence()}\n"
    write_texts(folder, {"choice.json": json.dumps(body, indent=1, allow_nan=False) + "\n", "choice.md": text})
    return text


def note_choice(folder: str | Path, choice: Choice, tests: Mapping[str, float | None]) -> None:
    """Append to the card of the adapter in `folder`, a subspace task or a LoRA, how its kind was chosen."""
    card = Path(folder, "README.md")
    text = card.read_text(encoding="utf-8").rstrip("\n")
    body = f"## How its kind was chosen\n\n{choice.sentence()}\n\n{choice_table(choice, tests)}"
    write_text_aside(card, f"{text}\n\n{body}")

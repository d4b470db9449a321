"""Twelve instruction tasks from real texts, none in two of them: an instruction, inputs, answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from offline.instructions import LEXNAMES, NEWS, WORDNET, Synset, nouns
from offline.more_texts import MAILS, read_mail
from offline.more_texts import OPINIONS as OPINIONS_PACKAGE
from offline.packages import fetch
from offline.texts import CLEAR, CORPORA, SNIPPETS, Row, TextTask, plain

from subspace_peft.errors import SubspaceError

from ..tasks import text_tasks

LABELS = ("movies", "editorials", "reviews", "reuters", "newsgroups", "speech-parts", "noun-kinds")
PHRASES = ("classes", "words", "meanings", "subjects", "sentences")
# kinds of task in turn, so that a run that stops early has some of each
ORDER = (
    *("reviews", "noun-kinds", "sentences", "reuters", "classes", "movies"),
    *("meanings", "newsgroups", "subjects", "editorials", "words", "speech-parts"),
)
LAST = 5  # words of a sentence that are to be completed
GROUPS = {
    "alt.atheism": "atheism",
    "comp.graphics": "graphics",
    "comp.os.ms-windows.misc": "windows",
    "comp.sys.ibm.pc.hardware": "hardware",
    "comp.sys.mac.hardware": "mac",
    "comp.windows.x": "xserver",
    "misc.forsale": "sale",
    "rec.autos": "cars",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey",
    "sci.crypt": "encryption",
    "sci.electronics": "electronics",
    "sci.med": "medicine",
    "sci.space": "space",
    "soc.religion.christian": "church",
    "talk.politics.guns": "guns",
    "talk.politics.mideast": "israel",
    "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}
OPINIONS = {"good": "positive", "bad": "negative"}
# "adverb" would begin with the token that "adjective" begins with
PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "other"}
WORDS: dict[str, tuple[str, ...]] = {
    "movies": tuple(OPINIONS.values()),
    "editorials": tuple(OPINIONS.values()),
    "reviews": tuple(OPINIONS.values()),
    "reuters": tuple(NEWS.values()),
    "newsgroups": tuple(GROUPS.values()),
    "speech-parts": tuple(PARTS.values()),
    "noun-kinds": tuple(LEXNAMES.values()),
}
INSTRUCTIONS = {
    "movies": "Is this film review positive or negative?",
    "editorials": "Is the opinion in this newspaper editorial positive or negative?",
    "reviews": "Is this review positive or negative?",
    "reuters": f"Which topic is this news wire about? One of: {', '.join(WORDS['reuters'])}.",
    "newsgroups": "Name the topic of this posting in one word.",
    "speech-parts": "Is this the definition of a noun, a verb, an adjective or some other word?",
    "noun-kinds": f"What kind of thing is this? One of: {', '.join(WORDS['noun-kinds'])}.",
    "classes": "Name the wider class of things that this belongs to.",
    "words": "Which word has this definition?",
    "meanings": "Define the word as it is used in this example.",
    "subjects": "Write a subject line for this e-mail.",
    "sentences": f"Complete this sentence with its last {LAST} words.",
}


def facts(name: str) -> dict[str, Any]:
    """Return what decides a task's prompts, without reading any data.

    Raises:
        KeyError: there is no such task.
    """
    packages = (SNIPPETS, CORPORA, OPINIONS_PACKAGE, MAILS, WORDNET)
    return {
        "instruction": INSTRUCTIONS[name],
        "words": WORDS.get(name, ()),
        "packages": [package.sha256 for package in packages],
    }


@dataclass(frozen=True)
class PromptTask:
    """An instruction task.

    Attributes:
        texts: its inputs, each labelled with its answer.
        instruction: what is asked, the same of every input.
        words: the answers there are, where they are label words; else none.
    """

    texts: TextTask
    instruction: str
    words: tuple[str, ...] = ()


@cache
def prompt_tasks() -> dict[str, PromptTask]:
    """Return all tasks by name.

    Raises:
        SubspaceError: a text is in two of them.
    """
    known = text_tasks()
    first, second = in_halves(known["editorials"])
    defined = {plain(row.text) for name in ("speech-parts", "noun-kinds") for row in known[name].rows}
    rest = sorted(
        (noun for noun in nouns().values() if _fit(noun) and plain(noun.meaning) not in defined),
        key=lambda noun: noun.meaning,
    )
    # two synsets of one definition would be in two tasks, or two splits
    rest = list({plain(noun.meaning): noun for noun in rest}.values())
    found = [
        _labels(known["movies"], _sign),
        _labels(first, _sign),
        _labels(known["reviews"], OPINIONS.get),
        _labels(known["reuters"], NEWS.get),
        _labels(known["newsgroups"], GROUPS.get),
        _labels(known["speech-parts"], PARTS.get),
        _labels(known["noun-kinds"], str),
        *(
            PromptTask(TextTask(name, INSTRUCTIONS[name], list(rows)), INSTRUCTIONS[name])
            for name, rows in (
                ("classes", _classes(rest[0::3])),
                ("words", _words(rest[1::3])),
                ("meanings", _meanings(rest[2::3])),
                ("subjects", _subjects()),
                ("sentences", completions(second.rows)),
            )
        ),
    ]
    tasks = {task.texts.name: task for task in found}
    require_apart({name: [row.text for row in task.texts.rows] for name, task in tasks.items()})
    return tasks


def require_apart(texts: Mapping[str, Iterable[str]]) -> None:
    """Raise `SubspaceError` where two tasks have a text in common, case, links, names and punctuation aside.

    Args:
        texts: task → its inputs.
    """
    owner: dict[str, str] = {}
    for name, listed in texts.items():
        for text in listed:
            if owner.setdefault(plain(text), name) != name:
                raise SubspaceError(
                    f"Tasks {owner[plain(text)]!r} and {name!r} both have the text {text!r}: a held-out task's test"
                    " could be in the fleet's training. Leave it out of one."
                )


def in_halves(task: TextTask) -> tuple[TextTask, TextTask]:
    """Return two tasks, each with every second document of `task`."""
    order = {document: place for place, document in enumerate(sorted({row.document for row in task.rows}))}
    return tuple(  # type: ignore[return-value]
        TextTask(task.name, task.about, [row for row in task.rows if order[row.document] % 2 == half])
        for half in (0, 1)
    )


def completions(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield of each sentence of 12 to 40 words at most its fifteen words before the last five, and those five."""
    for row in rows:
        words = row.text.split()
        if 12 <= len(words) <= 40:
            yield Row(" ".join(words[-LAST - 15 : -LAST]), " ".join(words[-LAST:]), row.document)


def _labels(task: TextTask, word: Callable[[str], str | None]) -> PromptTask:
    rows = [Row(" ".join(row.text.split()), answer, row.document) for row in task.rows if (answer := word(row.label))]
    return PromptTask(TextTask(task.name, task.about, rows), INSTRUCTIONS[task.name], WORDS[task.name])


def _sign(rating: str) -> str | None:
    if abs(float(rating)) < CLEAR:
        return None
    return "positive" if float(rating) > 0 else "negative"


def _fit(noun: Synset) -> bool:
    return noun.words[0].islower() and 4 <= len(noun.meaning.split()) <= 25


def _classes(chosen: Iterable[Synset]) -> Iterator[Row]:
    known = nouns()
    for noun in chosen:
        if noun.above in known:
            yield Row(f"{noun.words[0]}: {noun.meaning}", known[noun.above].words[0])


def _words(chosen: Iterable[Synset]) -> Iterator[Row]:
    for noun in chosen:
        yield Row(noun.meaning, noun.words[0])


def _meanings(chosen: Iterable[Synset]) -> Iterator[Row]:
    for noun in chosen:
        if noun.examples and len(noun.examples[0].split()) >= 3:
            yield Row(f"{noun.words[0]}: {noun.examples[0]}", noun.meaning)


def _subjects() -> Iterator[Row]:
    for file in sorted(fetch(MAILS).rglob("*.txt")):
        subject, body = read_mail(file.read_bytes())
        # without marks of answers and lists
        subject = re.sub(r"(?i)^(\s*(re|fwd?|aw):|\s*\[[^\]]*\])+", "", subject).strip()
        if 3 <= len(plain(subject).split()) <= 10 and len(plain(body).split()) >= 12:
            yield Row(" ".join(body.split()[:60]), subject, plain(subject))

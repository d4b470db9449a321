"""Quotations with their authors, out of a dictionary of 1913."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from functools import cache

from offline.packages import Package, fetch, find

# GPL-2 or later; read as data, nothing of it is copied
DICTIONARY = Package(
    "dict-gcide",
    "0.48.5+nmu2",
    "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
    members=("*/dictd/gcide.dict.dz",),
    megabytes=14.8,
    registry="debian",
)
# quoted for their definitions, or not one author
NO_AUTHORS = ("Johnson", "Knight", "Blackstone", "Halliwell", "Dunglison", "Burrill", "Bailey", "Totten", "Bartlett")
SHORTEST, LONGEST = 5, 40  # words


@cache
def quotations() -> list[tuple[str, str]]:
    """Return (text, author) of every quotation that stands apart from its definition, in the dictionary's order."""
    content = gzip.decompress(find(fetch(DICTIONARY), "gcide.dict.dz").read_bytes()).decode("utf-8", "replace")
    found = []
    # every paragraph's last line says which edition it is from
    for paragraph in re.split(r"\n\s*\n", re.sub(r"(?m)^ *\[[^\]\n]*\]$", "", content)):
        if "--" not in paragraph:
            continue
        lines = paragraph.strip("\n").split("\n")
        # definitions are less far to the right
        if not all(line.startswith("      ") for line in lines):
            continue
        joined = " ".join(paragraph.split())
        hit = re.fullmatch(r"(.+?)\s*--\s*([A-Z][^-\[\](){}]{2,24}?)\.?", joined)
        if hit is None:
            continue
        text = re.sub(r"\[(ae|oe|AE|OE)\]", r"\1", hit[1])
        text = " ".join(re.sub(r"\[[^\]]*\]|[{}|\\]", " ", text).split())
        if SHORTEST <= len(text.split()) <= LONGEST and "--" not in text:
            found.append((text, hit[2].strip()))
    return found


def authors(least: int) -> list[str]:
    """Return the authors of at least so many quotations, the most quoted first."""
    counts = Counter(author for _, author in quotations())
    return [author for author, count in counts.most_common() if count >= least and author not in NO_AUTHORS]

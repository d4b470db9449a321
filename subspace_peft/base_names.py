"""Names of base models: which of them certainly mean one model, and which may or cannot.

A name is a Hub id in one of its spellings (``org/model``, ``org/model@main``, an address, a folder of the Hub's cache)
or a folder. What two folders hold, or a folder and a repository, no name can tell.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import SubspaceError

BASE = "__base__"  # in place of a task's name: the base model alone
SAME, DIFFERENT, UNKNOWN = "same", "different", "unknown"

HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
CACHED = re.compile(r"models--(?P<id>[^/]+)(/snapshots/[^/]+)?")  # where huggingface_hub keeps a repository
DRIVE = re.compile(r"[A-Za-z]:[\\/]")
NO_MODEL = ("datasets", "spaces", "collections", "papers", "api")
PAGES = ("tree", "blob", "resolve", "raw", "commit", "commits", "discussions", "edit")
# words in the names of copies that hold a model's weights, rounded or not, or in those of their formats
COPY_WORDS = frozenset(
    """
    meta hf bnb unsloth dynamic 4bit 8bit 2bit 3bit 6bit nf4 fp4 int4 int8 fp8 awq gptq gguf mlx bf16
    bfloat16 fp16 float16 fp32 w4a16 w8a8 w8a16 quantized quantised hqq aqlm exl2 exl3 g128 marlin onnx
    community base
    """.split()  # noqa: SIM905 - a list of thirty words is harder to read
)


@dataclass(frozen=True)
class BaseName:
    """A base model's name in its normal form.

    Attributes:
        text: the form to record: ``org/model`` of a Hub id in any spelling; a folder's as it was given.
        key: what two spellings of one name have in common.
        is_id: whether it is a Hub id, rather than a folder or another place.
        real: the folder on this machine that it leads to, symbolic links followed; None where there is none.
    """

    text: str
    key: str
    is_id: bool
    real: str | None = None

    @property
    def last(self) -> str:
        """The last part: the model's name without its owner or folder."""
        return self.text.replace("\\", "/").rstrip("/").rpartition("/")[2] or self.text

    @property
    def shown(self) -> str:
        """The name as others may see it: of a folder only its last part."""
        return self.text if self.is_id else f"…/{self.last}"


def read_name(name: str | os.PathLike[str] | None) -> BaseName | None:
    """Return a base model's name in its normal form; None where there is none."""
    text = "" if name is None else str(name).strip()
    return _read(text, os.getcwd(), os.environ.get("HF_ENDPOINT", "")) if text else None


@lru_cache(maxsize=4096)
def _read(text: str, here: str, endpoint: str) -> BaseName:
    # `here` only keeps readings in different working directories apart
    if (found := _of_address(text, endpoint)) is not None:
        return found
    windows = DRIVE.match(text) is not None or ("\\" in text and "/" not in text)
    place = text.replace("\\", "/") if windows or text.startswith(".\\") else text
    if (cached := _in_cache(place)) is not None:
        return cached
    real = None if windows else _folder(place)
    if real is not None and (cached := _in_cache(real)) is not None:
        return cached
    bare = place.rstrip("/")
    repo = bare.partition("@")[0]
    path_like = windows or place.startswith((".", "~", "/"))
    if not path_like and HUB_ID.fullmatch(repo):
        return BaseName(repo, repo.casefold(), True, real)
    key = posixpath.normpath(os.path.expanduser(place)) if bare else "/"
    # a path of Windows is the same in any letter case
    key = key.casefold() if windows else key
    return BaseName(text.rstrip("/\\") or text, f"path:{real or key}", False, real)


def _id_of(parts: Sequence[str]) -> BaseName | None:
    """Return the Hub id that an address's path begins with, or None."""
    if not parts or parts[0] in NO_MODEL:
        return None
    own = parts[:1] if len(parts) == 1 or parts[1] in PAGES else parts[:2]
    repo = "/".join(own).partition("@")[0]
    return BaseName(repo, repo.casefold(), True) if HUB_ID.fullmatch(repo) else None


def _of_address(text: str, endpoint: str) -> BaseName | None:
    """Return the Hub id in an address (``https://huggingface.co/org/model``, ``hf://org/model``), or None."""
    if text.startswith("file://"):
        return _read(unquote(urlsplit(text).path), os.getcwd(), endpoint)
    if text.startswith("hf://"):
        return _id_of(text.removeprefix("hf://").removeprefix("models/").split("/"))
    if text.partition("/")[0].casefold() in HUB_HOSTS and "/" in text:
        text = f"https://{text}"
    if not re.match("https?://", text):
        return None
    plain = text.partition("?")[0].partition("#")[0].rstrip("/")
    base = endpoint.rstrip("/")
    if base and plain.startswith(f"{base}/"):
        found = _id_of(plain.removeprefix(f"{base}/").split("/"))
    elif urlsplit(plain).hostname in HUB_HOSTS:
        found = _id_of([part for part in urlsplit(plain).path.split("/") if part])
    else:
        found = None
    return found or BaseName(plain, plain, False)


def _in_cache(place: str) -> BaseName | None:
    """Return the Hub id whose files a folder of huggingface_hub's cache holds, or None."""
    top = re.search(r"(?:^|/)(models--.*?)/*$", place)
    found = CACHED.fullmatch(top[1]) if top else None
    if found is None:
        return None
    repo = found["id"].replace("--", "/")
    return BaseName(repo, repo.casefold(), True) if HUB_ID.fullmatch(repo) else None


def _folder(place: str) -> str | None:
    """Return the folder that a path leads to, if there is one."""
    try:
        path = os.path.expanduser(place)
        return os.path.realpath(path) if os.path.isdir(path) else None
    except (OSError, ValueError, RuntimeError):  # a name that no disk takes
        return None


def out_of_cache(name: Any) -> Any:
    """Return the Hub id of a folder of the Hub's cache, which is on one machine only; any other name as it is."""
    if not isinstance(name, (str, Path)) or "models--" not in str(name):
        return name
    read = read_name(name)
    return read.text if read is not None and read.is_id else name


def shown_name(name: str | None) -> str | None:
    """Return a name as others may see it: as it is given, but of a folder only its last part."""
    read = read_name(name)
    return None if read is None else str(name) if read.is_id and "models--" not in str(name) else read.shown


def relation(one: str | None, other: str | None) -> str:
    """Tell whether two names are of one base model.

    Returns:
        ``same``: certainly: spellings of one Hub id, an id and its older form without an owner, or one folder.
        ``different``: two Hub ids that are no copies of one another by their names. ``unknown``: anything else, as a
        folder and a Hub id, two folders, another owner's copy, or no name at all.
    """
    first, second = read_name(one), read_name(other)
    if first is None or second is None:
        return UNKNOWN
    if first.key == second.key or (first.real is not None and first.real == second.real):
        return SAME
    if not (first.is_id and second.is_id):
        return UNKNOWN
    short, long = sorted((first.key, second.key), key=len)
    if "/" not in short and long.endswith(f"/{short}"):
        return SAME
    return UNKNOWN if _may_be_copies(first, second) else DIFFERENT


def _may_be_copies(one: BaseName, other: BaseName) -> bool:
    """Tell whether the names of two Hub ids differ in nothing but the owner and words for copies and formats."""
    words = [set(re.split(r"[-_.]+", name.last.casefold())) - COPY_WORDS for name in (one, other)]
    return words[0] == words[1]


def is_doubtful(one: str | None, other: str | None) -> bool:
    """Return whether two names, of which no spelling tells whether they are of one model, speak rather against it.

    They do where their last parts are other models' names, and where they are two folders that both exist.
    """
    first, second = read_name(one), read_name(other)
    if first is None or second is None or relation(one, other) != UNKNOWN:
        return False
    return (first.real is not None and second.real is not None) or not _may_be_copies(first, second)


def same_model(base: str | None, model: str | None) -> bool:
    """Return whether two names are certainly of one base model; an unknown name (None or empty) may be any model's."""
    return read_name(base) is None or read_name(model) is None or relation(base, model) == SAME


def difference(one: str, other: str) -> str:
    """Say how two names that are not certainly one model's differ."""
    first, second = read_name(one), read_name(other)
    if first is None or second is None:
        return "one of them is unknown"
    if not first.is_id and not second.is_id:
        alike = f" both called {first.last!r}" if first.last.casefold() == second.last.casefold() else ""
        return f"two folders{alike}, and folders may hold anything"
    if any("://" in each.text for each in (first, second)):
        return "one is an address that is not known to be the Hub's"
    if first.is_id != second.is_id:
        alike = " of the same name" if first.last.casefold() == second.last.casefold() else ""
        return f"a folder{alike} and a Hub id, and a folder may hold anything"
    if relation(one, other) == UNKNOWN:
        return "by its name another owner's or a quantised copy, which a name does not prove"
    return "two different models"


REMEDY = "If they are one model, say which: base_model_name= (--base-model-name)."


def common_name(names: Iterable[str | None]) -> str | None:
    """Return the base model that most of the names are of, as most spell it; None where none is given.

    A Hub id goes before a folder that is the same, and one with its owner before one without. Where no model is named
    by more than the others are, it is the first of them, see `majority`.
    """
    groups = _groups(names)
    return groups[0][0] if groups else None


def majority(names: Iterable[str | None]) -> str | None:
    """Return the base model that more of the names are of than of any other; None where there is no such."""
    groups = _groups(names)
    if len(groups) > 1 and groups[0][1] == groups[1][1]:
        return None
    return groups[0][0] if groups else None


def _groups(names: Iterable[str | None]) -> list[tuple[str, int]]:
    """Return per model the spelling to record and how many names are of it, the most frequent first."""
    counts = Counter(read.text for name in names if (read := read_name(name)) is not None)
    groups: list[list[str]] = []
    # an id without an owner may be several models' older form: it goes with one of them only, the largest
    for text in sorted(counts, key=lambda text: ("/" not in text, -counts[text])):
        near = [group for group in groups if relation(group[0], text) == SAME]
        if near:
            max(near, key=lambda group: sum(counts[each] for each in group)).append(text)
        else:
            groups.append([text])

    def first(group: list[str]) -> str:
        return max(group, key=lambda text: (read_name(text).is_id, "/" in text, counts[text]))  # type: ignore[union-attr]

    found = [(first(group), sum(counts[text] for text in group)) for group in groups]
    order = list(counts)
    return sorted(found, key=lambda each: (-each[1], order.index(each[0])))


def check_said(name: str | None) -> str | None:
    """Return a name that the user gives for a base model, in its normal form.

    Raises:
        SubspaceError: it is empty, or no name.
    """
    if name is None:
        return None
    read = read_name(name) if isinstance(name, (str, Path)) else None
    if read is None or any(ord(letter) < 32 for letter in read.text):
        raise SubspaceError(
            f"base_model_name={name!r}: give the base model's id on the Hub, 'org/model', or its folder."
        )
    return read.text


def said_of_basis(recorded: str | None, said: str | None) -> str | None:
    """Return the name of a basis's base model, where the user says one for it as well.

    Args:
        recorded: the basis's own record.
        said: the user's ``base_model_name``, or None.

    Raises:
        SubspaceError: both are Hub ids, of two models.
    """
    said = check_said(said)
    if said is None or read_name(recorded) is None:
        return said or recorded
    if relation(recorded, said) == DIFFERENT:
        raise SubspaceError(
            f"base_model_name={said!r}: the basis is recorded to be for {recorded!r}, which is another model on the"
            " Hub. Give that name, where the adapters are of that model, or build a basis for this one."
        )
    own = read_name(recorded)
    return said if own is not None and not own.is_id else recorded


def names_record(given: Mapping[str, str | None], taken: str | None, said: bool) -> dict[str, Any]:
    """Return what a basis records of its sources' names for the base model; empty where all give the one it records.

    Args:
        given: per source the name in its own configuration, or None.
        taken: the name that the basis records.
        said: whether the user said that name for all of them.

    Returns:
        ``said``; ``replaced``: per source with another spelling or name, that name (of a folder only the last part);
        ``unnamed``: the sources that name no base model.
    """
    replaced, unnamed = {}, []
    for source, name in given.items():
        read = read_name(name)
        if read is None:
            unnamed.append(source)
        elif str(name) != taken:
            replaced[source] = str(shown_name(name))
    found = {"said": said, "replaced": replaced, "unnamed": unnamed if taken is not None else []}
    return found if said or found["replaced"] or found["unnamed"] else {}


def merged_names(before: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of an updated basis's names: those of its sources before, where they are on record, and more.

    Args:
        before: as a basis's config has it, or anything else.
        more: of the new sources, see `names_record`.
    """
    old = before if isinstance(before, Mapping) and names_problem(before) is None else {}
    if not old or not more:
        return dict(old or more)
    return {
        "said": bool(old["said"] or more["said"]),
        "replaced": {**old["replaced"], **more["replaced"]},
        "unnamed": [*old["unnamed"], *more["unnamed"]],
    }


def names_problem(names: Any) -> str | None:
    """Return what is wrong with a record of `names_record` in a file, or None."""
    if not isinstance(names, Mapping) or not isinstance(names.get("said"), bool):
        return "base_model_names does not say whether the name was given by the user"
    replaced, unnamed = names.get("replaced"), names.get("unnamed")
    texts = isinstance(replaced, Mapping) and all(isinstance(text, str) for pair in replaced.items() for text in pair)
    listed = isinstance(unnamed, list) and all(isinstance(text, str) for text in unnamed)
    return None if texts and listed else "base_model_names lists something that is no name"


def known_names(info: Mapping[str, Any]) -> list[str]:
    """Return the names that a basis's record gives its base model.

    These are the recorded one, and Hub ids that the user said to be of the same model.
    """
    own, names = info.get("base_model_name_or_path"), info.get("base_model_names")
    found = [own] if isinstance(own, str) and own else []
    if names is not None and names_problem(names) is None and names["said"]:
        found += [
            name
            for name in names["replaced"].values()
            if isinstance(name, str) and (read := read_name(name)) is not None and read.is_id
        ]
    return list(dict.fromkeys(found))


def is_of(name: str | None, info: Mapping[str, Any]) -> bool:
    """Return whether a name is certainly that of a basis's base model, or one of both is unknown."""
    known = known_names(info)
    return not known or any(same_model(name, each) for each in known)

"""Expand what a user lists, text files, patterns and Hub collections among it, to single source adapters."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

from .._io.text import read_text
from ..errors import HubUnavailableError, SourceError
from ..hub import only_local
from ..hub_requests import ask
from .locate import CONFIG_FILE, WEIGHTS_FILE
from .open import is_one_source

LIST_SUFFIX = ".txt"
COLLECTION = re.compile(r"^(?:collection:|https?://[^/]+/collections/)(?P<slug>[^/\s]+/[^/\s]+)$")
MAGIC = re.compile(r"[*?\[]")


def expand(references: Any, *, token: str | bool | None = None) -> tuple[list[Any], list[dict[str, str]]]:
    """Return the single sources that one reference or many stand for, in order.

    A text file (``*.txt``) stands for the references on its lines (``#`` begins a comment; paths may be relative to
    the file), a pattern (``loras/*``, ``loras/**/adapter_config.json``) for the folders and ``.safetensors`` files
    that it matches, sorted, and ``collection:owner/slug`` (or the collection's URL) for the models in a Hub
    collection.

    Args:
        references: one source, or several, as `build_basis` takes them.
        token: as in huggingface_hub.

    Returns:
        The references, as `open_source` takes them; and one ``{"name", "location", "reason"}`` for each that could
        not be expanded.

    Raises:
        HubUnavailableError: the Hub does not answer when it is asked for a collection.
    """
    found: list[Any] = []
    bad: list[dict[str, str]] = []
    for reference in [references] if is_one_source(references) else list(references):
        try:
            found += _one(reference, token)
        except HubUnavailableError:
            raise  # the list itself is not known, and no source is bad
        except SourceError as error:
            bad.append({"name": str(reference), "location": str(reference), "reason": str(error)})
    return found, bad


def expand_or_raise(references: Any, *, token: str | bool | None = None) -> list[Any]:
    """Return what `expand` does, or raise where something is bad.

    Raises:
        SourceError: lists all that could not be expanded.
    """
    found, bad = expand(references, token=token)
    if bad:
        raise SourceError("\n".join(entry["reason"] for entry in bad))
    return found


def _one(reference: Any, token: str | bool | None, nested: bool = False) -> list[Any]:
    if not isinstance(reference, (str, Path)):
        return [reference]
    text = str(reference)
    if slug := COLLECTION.match(text):
        return _collection(slug["slug"], token)
    path = Path(text).expanduser()
    if path.suffix == LIST_SUFFIX and not path.is_dir():
        if nested:
            raise SourceError(f"{text}: a list within a list. Put its lines where it is named.")
        return _listed(path, token)
    # a folder's own name may hold brackets
    if MAGIC.search(text) and not path.exists():
        return _matched(text)
    return [reference]


def _listed(file: Path, token: str | bool | None) -> list[Any]:
    try:
        lines = read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{file}: cannot be read ({error}). A list of sources is a text file, one a line."
        ) from error
    # a "#" belongs to a name unless space is before it
    lines = [re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in lines]
    found, problems = [], []
    for line in filter(None, lines):
        beside = file.parent / line
        try:
            here = beside.exists() or (MAGIC.search(line) and glob.glob(str(beside), recursive=True))
            found += _one(str(beside) if here else line, token, nested=True)
        except HubUnavailableError:
            raise
        except SourceError as error:
            problems.append(str(error))
    if problems:
        raise SourceError(f"{file}: " + "; ".join(problems))
    if not found:
        raise SourceError(f"{file}: no source is listed in there. Write one folder or Hub id a line.")
    return found


def _matched(pattern: str) -> list[str]:
    hits = []
    for text in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True)):
        path = Path(text)
        if path.name in (CONFIG_FILE, WEIGHTS_FILE):
            hits.append(str(path.parent))
        elif path.is_dir() or path.suffix == ".safetensors":
            hits.append(text)
    if not hits:
        raise SourceError(f"{pattern}: the pattern matches no folder and no .safetensors file. Check it with `ls`.")
    return list(dict.fromkeys(hits))


def _collection(slug: str, token: str | bool | None) -> list[str]:
    from huggingface_hub import HfApi

    try:
        items = ask(f"collection:{slug}", lambda: HfApi(token=token).get_collection(slug)).items
    except HubUnavailableError:
        raise
    except (OSError, ValueError) as error:
        raise SourceError(
            f"collection:{slug}: the Hub gave no such collection ({error}). Its slug is the end of its address,"
            " owner/title-0123…."
        ) from error
    models = [item.item_id for item in items if item.item_type == "model"]
    if not models:
        raise SourceError(f"collection:{slug}: there is no model in it. A source is a model repository with a LoRA.")
    # what the Hub lists is on the Hub, whatever folders there are here
    return [f"{name}@main" if only_local(name) else name for name in models]

"""Builds written down in a file: YAML or JSON with sources and options, or the config in a basis's own folder."""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SourceError, SubspaceError
from ..hub import looks_like_path, split_inside
from .options import CONTROLS, BuildOptions

BASIS_CONFIG = "basis_config.json"
INPUTS = ("base_model", "like", "clusters", "precision", "max_memory")
SETTINGS = (*BuildOptions.names(), *INPUTS)
SOURCE_KEYS = ("model", "weight", "revision", "sha256", "name", "converted_from")
MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class BuildFile:
    """A build as a file describes it.

    Attributes:
        sources: references, as `build_basis` takes them, and mappings with a ``sha256`` that their file has to have.
        settings: options by their names, and the inputs ``base_model`` and ``like`` (ids or folders), ``clusters``,
            ``precision`` and ``max_memory``.
    """

    sources: list[Any] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def read_build_file(place: str | Path) -> BuildFile:
    """Read a build from a file, or from a basis's folder.

    Paths in the file are looked for beside it first, then from the working directory.

    Args:
        place: a YAML or JSON file, or the folder of a basis (or its `basis_config.json`), whose record it then is.

    Raises:
        SubspaceError: the file cannot be read, or has unknown keys; names them, and the nearest known ones.
    """
    file = Path(place).expanduser()
    file = file / BASIS_CONFIG if file.is_dir() else file
    given = _read(file)
    if "format_version" in given and "modules" in given:
        given = _from_basis(file, given)
    _check_keys(file, given, ("sources", *SETTINGS))
    listed = given.pop("sources", None) or []
    sources, weights = [], {}
    for entry in [listed] if isinstance(listed, (str, Mapping)) else listed:
        source, weight = _source(file, entry)
        sources.append(source)
        if weight is not None:
            weights[_location(source)] = weight
    if weights:
        others = given.get("weights", "equal")
        if others != "equal" and not isinstance(others, Mapping):
            raise SubspaceError(
                f"{file}: weights is {others!r}, and sources have weights of their own. Leave one of the two out."
            )
        given["weights"] = {**(others if isinstance(others, Mapping) else {}), **weights}
    for key in ("like", "base_model", "weights"):
        if isinstance(given.get(key), str):
            given[key] = _beside(file, given[key])
    return BuildFile(sources, given)


def open_sources(
    sources: list[Any], *, allow_bin: bool, base_model: Any, token: str | bool | None = None
) -> list[Any]:
    """Open those sources of a file whose hashes are on record, and hold them against those.

    Args:
        sources: of a `BuildFile`.
        allow_bin: take pickled weights too.
        base_model: as in `build_basis`.
        token: as in huggingface_hub.

    Returns:
        The same list with opened sources in the place of mappings.

    Raises:
        SourceError: sources that are not what they were; lists all of them.
    """
    from .record import recorded_source

    found, problems = [], []
    for each in sources:
        if not isinstance(each, Mapping):
            found.append(each)
            continue
        entry = {**each, "location": each["model"]}
        try:
            found.append(recorded_source(entry, allow_bin=allow_bin, base_model=base_model, token=token))
        except SourceError as error:
            problems.append(str(error))
    if problems:
        lines = "\n  ".join(problems)
        raise SourceError(f"{len(problems)} of {len(sources)} sources are not what they were:\n  {lines}")
    return found


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError("it is larger than any config")
        text = file.read_text(encoding="utf-8")
        given = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SubspaceError(
            f"{file}: no build can be read from it ({' '.join(str(error).split())}). Give a YAML or JSON file with"
            " `sources:` and options, or the folder of a basis."
        ) from error
    if not isinstance(given, dict):
        raise SubspaceError(f"{file}: it holds a {type(given).__name__}. Give a mapping with `sources:` and options.")
    return given


def _check_keys(file: Path, given: Mapping[Any, Any], known: Collection[str]) -> None:
    unknown = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            unknown.append(f"{key!r} (did you mean {near[0]!r}?)" if near else repr(key))
    if unknown:
        raise SubspaceError(f"{file}: unknown: {', '.join(unknown)}. Known are {', '.join(known)}.")


def _source(file: Path, entry: Any) -> tuple[Any, float | None]:
    """Return an entry of ``sources:`` as a reference, or with its hash as a mapping; and its weight."""
    if isinstance(entry, str):
        return _beside(file, entry), None
    if not isinstance(entry, Mapping):
        raise SubspaceError(f"{file}: source {entry!r}: give a path, a Hub id, or a mapping with `model:`.")
    if "location" in entry:  # copied from the list of a basis's config, which says more of each source
        entry = {"model": entry["location"], **{key: entry[key] for key in SOURCE_KEYS if key in entry}}
    _check_keys(file, entry, SOURCE_KEYS)
    if not isinstance(entry.get("model"), str):
        raise SubspaceError(f"{file}: source {dict(entry)!r}: give its path or Hub id as `model:`.")
    model, revision = _beside(file, entry["model"]), entry.get("revision")
    if entry.get("sha256"):
        return {**entry, "model": model}, entry.get("weight")
    name, colon, inside = model.partition(":")
    return f"{name}@{revision}{colon}{inside}" if revision else model, entry.get("weight")


def _location(source: Any) -> str:
    """Return the place that a fleet knows a source by: its reference without the revision."""
    text = source["model"] if isinstance(source, Mapping) else source
    if looks_like_path(text) or Path(text).expanduser().exists():
        return text
    repo, _, inside = split_inside(text)
    return repo if inside is None else f"{repo}:{inside}"


def _beside(file: Path, text: str) -> str:
    """Return a path beside the file where there is such a thing, else the text as it is."""
    beside = file.parent / text
    here = beside.exists() or bool(glob.has_magic(text) and glob.glob(str(beside), recursive=True))
    return str(beside) if here else text


def _from_basis(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the build that a basis's config records.

    Raises:
        SubspaceError: it has no such record, or that of more than a build.
    """
    build, precision = config.get("build"), config.get("precision")
    if not isinstance(build, dict):
        raise SubspaceError(f"{file}: it has no record of how the basis was built.")
    if (config.get("version") or 1) != 1:
        raise SubspaceError(
            f"{file}: version {config['version']} of a basis was made from an earlier one. Give the folder of its"
            " first version, or repeat an update with --from-config."
        )
    found: dict[str, Any] = {"sources": list(config.get("sources") or []), **build}
    if isinstance(precision, Mapping) and "stored" in precision:
        found["precision"] = precision["stored"]
    if build.get("builder") in CONTROLS:
        found["like"] = str(file.parent)
        if build["builder"] == "base-weights":
            found["target_modules"] = list(config["modules"])
    return found

"""Builds written down in a file: YAML or JSON with sources and options, or the config in a basis's own folder."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._io.settings_file import check_keys, read_settings
from ..errors import SourceError, SubspaceError
from ..hub import looks_like_path, split_inside
from ..hub_requests import patient
from .options import CONTROLS, WEIGHTS, BuildOptions

BASIS_CONFIG = "basis_config.json"
INPUTS = ("base_model", "like", "clusters", "precision", "max_memory")
SETTINGS = (*BuildOptions.names(), *INPUTS)
SOURCE_KEYS = ("model", "weight", "revision", "sha256", "name", "converted_from")
REMEDY = "Give a YAML or JSON file with `sources:` and options, or the folder of a basis."


@dataclass(frozen=True)
class BuildFile:
    """A build as a file describes it.

    Attributes:
        sources: references, as `build_basis` takes them, and mappings with a ``sha256`` that their file has to have.
        settings: options by their names, and the inputs ``base_model`` and ``like`` (ids or folders), ``clusters``,
            ``precision`` and ``max_memory``.
        own_weights: by a source's place, the ``weight`` that it has in the list.
        place: the file.
    """

    sources: list[Any] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    own_weights: dict[str, float] = field(default_factory=dict)
    place: Path = Path()

    def settings_for(self, sources: list[Any] | None) -> dict[str, Any]:
        """Return the settings, with weights by the places of the sources that they are of.

        Args:
            sources: those that take the place of the file's, if any.

        Raises:
            SubspaceError: the file of weights holds something else; a source has two weights.
        """
        from .weights import read_weights

        weights = self.settings.get("weights", "equal")
        if isinstance(weights, str):
            # a file that is not there is refused where it is used
            known = weights not in WEIGHTS and Path(weights).expanduser().is_file()
            weights = read_weights(weights)[1] if known else {}
        if not isinstance(weights, Mapping):
            return self.settings
        own = {} if sources else self.own_weights
        if not weights and not own:
            return self.settings
        places = _places(sources or self.sources)
        matched: dict[str, Any] = {}
        for key, value in weights.items():
            place = _place(self.place, str(key), places)
            if place in matched:
                raise SubspaceError(f"{self.place}: weights has two numbers for {place!r}. Leave one of them out.")
            matched[place] = value
        last = Counter(Path(place).name for place in places.values())
        for place in own:
            names = {place, self._name(place), *([Path(place).name] if last[Path(place).name] < 2 else [])}
            if twice := [key for key in matched if key in names]:
                raise SubspaceError(
                    f"{self.place}: source {place!r} has a weight of its own, and another one in weights, as"
                    f" {twice[0]!r}. Leave one of the two out."
                )
        return {**self.settings, "weights": {**matched, **own}}

    def _name(self, place: str) -> str | None:
        """Return the name that the file gives a source, if any."""
        named = [each for each in self.sources if isinstance(each, Mapping) and each["model"] == place]
        return named[0].get("name") if named else None


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
    given = read_settings(file, "build", REMEDY)
    writer = given.get("subspace_peft_version")
    if "format_version" in given and "modules" in given:
        given = _from_basis(file, given)
    _check_keys(file, given, ("sources", *SETTINGS), writer)
    listed = given.pop("sources", None)
    sources, weights = [], {}
    for entry in _listed(file, listed):
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
    for key in ("like", "base_model"):
        if given.get(key) is not None and not (isinstance(given[key], str) and given[key]):
            raise SubspaceError(f"{file}: {key}: {given[key]!r}: give a folder or a Hub id.")
    for key in ("like", "base_model", "weights"):
        if isinstance(given.get(key), str) and not (key == "weights" and given[key] in WEIGHTS):
            given[key] = _beside(file, given[key])
    _check_names(file, sources)
    return BuildFile(sources, given, weights, file)


@patient()
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


def _listed(file: Path, listed: Any) -> list[Any]:
    """Return the entries of ``sources:``."""
    if listed is None or isinstance(listed, list):
        return listed or []
    if isinstance(listed, (str, Mapping)):
        return [listed]
    raise SubspaceError(f"{file}: sources: {listed!r}: give a list of paths, Hub ids and mappings with `model:`.")


def _check_names(file: Path, sources: Sequence[Any]) -> None:
    """Raise `SubspaceError` where two sources have been given one name."""
    given = [str(each["name"]) for each in sources if isinstance(each, Mapping) and each.get("name")]
    if twice := [name for name, count in Counter(given).items() if count > 1]:
        raise SubspaceError(f"{file}: {', '.join(map(repr, twice))}: two sources have that name. Name them apart.")


def _check_keys(file: Path, given: Mapping[Any, Any], known: Collection[str], writer: Any = None) -> None:
    from ..basis.newer import upgrade_hint

    check_keys(file, given, known, upgrade_hint(writer))


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
    if odd := [key for key in ("name", "converted_from") if entry.get(key) is not None]:
        raise SubspaceError(
            f"{file}: source {entry['model']!r}: {odd[0]} goes with the source's `sha256:`, as in a basis's record."
            f" Leave {odd[0]} out, or give both."
        )
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


def _places(sources: Iterable[Any]) -> dict[Path, str]:
    """Return the places that a fleet will know the sources by, by where on the disk they are."""
    from ..sources.references import COLLECTION, expand

    found = {}
    for each in sources:
        if isinstance(each, str) and not COLLECTION.match(each):
            texts = [str(one) for one in expand(each)[0]]
        else:
            texts = [each["model"]] if isinstance(each, Mapping) else []
        for text in texts:
            if (path := Path(text).expanduser()).exists():
                found[path.resolve()] = text
    return found


def _place(file: Path, key: str, places: Mapping[Path, str]) -> str:
    """Return the place of the source that a key of ``weights`` means, looked for as sources are; else the key."""
    for path in (file.parent / key, Path(key).expanduser()):
        if path.exists() and (place := places.get(path.resolve())) is not None:
            return place
    return key


def _from_basis(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the build that a basis's config records.

    Raises:
        SubspaceError: it has no such record, or that of more than a build.
    """
    # it brings torch, which the command line's help does without
    from ..basis.source_places import found_sources

    build, precision = config.get("build"), config.get("precision")
    if not isinstance(build, dict):
        raise SubspaceError(f"{file}: it has no record of how the basis was built.")
    if (config.get("version") or 1) != 1:
        raise SubspaceError(
            f"{file}: version {config['version']} of a basis was made from an earlier one. Give the folder of its"
            " first version, or repeat an update with `rebuild_basis` (`subspace-peft build --from-config`)."
        )
    if not isinstance(config["modules"], Mapping):
        raise SubspaceError(f"{file}: modules: {config['modules']!r}: a basis's config has a mapping there.")
    sources = config.get("sources")
    if isinstance(sources, list):
        sources = found_sources(sources, file.parent, config.get("fingerprint"))
    found: dict[str, Any] = {"sources": sources, **build}
    if isinstance(precision, Mapping) and "stored" in precision:
        found["precision"] = precision["stored"]
    if build.get("builder") in CONTROLS:
        found["like"] = str(file.parent)
        if build["builder"] == "base-weights":
            found["target_modules"] = list(config["modules"])
    return found

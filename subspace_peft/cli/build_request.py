"""What ``subspace-peft build`` is asked for, by a file and by flags: put together and checked before it is begun."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..builders.build_file import BASIS_CONFIG, INPUTS, BuildFile, read_build_file
from ..builders.options import BuildOptions, Resources
from ..errors import SubspaceError
from .common import base_model, earlier_record, unfinished
from .flags import flag_of, given_options

PRECISIONS = ["float32", "bfloat16", "float16", "int8"]


@dataclass(frozen=True)
class Request:
    """A build as it was asked for, by a file and by flags.

    Attributes:
        sources: references; None where there are none.
        options: which basis to build.
        resources: how much building may take.
        inputs: ``base_model``, ``like``, ``clusters`` and ``precision``, where given.
        again: a basis to build again, from its own record.
    """

    sources: list[Any] | None
    options: BuildOptions
    resources: Resources
    inputs: dict[str, Any]
    again: str | None = None


def read_request(args: Namespace, out: Path | None, in_file: set[str]) -> Request:
    """Put together a file and the flags, which win, and check all that needs no source.

    Args:
        args: the flags.
        out: where the basis is to be written.
        in_file: gets the names of the settings that are the file's.
    """
    again = args.from_config
    file = BuildFile()
    given = given_options(args, BuildOptions)
    if again is not None:
        if args.config is not None:
            raise SubspaceError("--from-config and --config are two builds. Give one of them.")
        place = Path(again).expanduser()
        if place.is_file() and place.name != BASIS_CONFIG:
            again, file = None, read_build_file(place)
        elif place.is_file():
            again = str(place.parent)
        _check_again(args, given)
    elif args.config is not None:
        file = read_build_file(args.config)
    settings = {**(file.settings if "weights" in given else file.settings_for(args.sources)), **given}
    for name in INPUTS:
        if (value := getattr(args, name)) is not None:
            settings[name] = value
    in_file.update(name for name in file.settings if name not in given and getattr(args, name, None) is None)
    inputs = {name: settings.pop(name) for name in INPUTS if name in settings}
    resources = {key: inputs.pop(key) for key in ("max_memory",) if key in inputs}
    if args.quiet:
        resources["progress"] = False
    if out is not None:
        resources["work_folder"] = unfinished(out)
    options = BuildOptions(**settings)
    inputs = _checked(inputs)
    sources = list(args.sources or file.sources) or None
    if out is not None:
        _check_out(out, args.force, options, sources, inputs, again)
    return Request(sources, options, Resources(**resources), inputs, again)


def _check_again(args: Namespace, given: dict[str, Any]) -> None:
    """Raise `SubspaceError` where a rebuild is given what only a new build decides."""
    if args.sources:
        raise SubspaceError("--from-config takes the sources on record; leave the others out.")
    odd = [*given, *(name for name in ("like", "clusters") if getattr(args, name) is not None)]
    if odd:
        raise SubspaceError(
            f"--from-config takes the options on record; leave {flag_of(odd[0])} out. --config takes the same record"
            " as a beginning, of which flags change parts."
        )


def _checked(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs that are there, with numbers read; raise `SubspaceError` where they clash."""
    found = {name: value for name, value in inputs.items() if value is not None}
    if (precision := found.get("precision")) not in (None, *PRECISIONS):
        raise SubspaceError(
            f"precision={precision!r}: there is no such choice; choose one of {', '.join(PRECISIONS)}."
        )
    clusters = found.get("clusters")
    if isinstance(clusters, str) and clusters != "auto":
        if not clusters.isdecimal():
            raise SubspaceError(f"clusters={clusters!r}: give a number from 1 on, or 'auto'.")
        found["clusters"] = int(clusters)
    if clusters is not None and "like" in found:
        raise SubspaceError("clusters= does not go with like=: clusters are of sources.")
    return found


def _check_out(
    out: Path,
    force: bool,
    options: BuildOptions,
    sources: list[Any] | None,
    inputs: dict[str, Any],
    again: str | None,
) -> None:
    """Raise where the basis may not be written into `out`, before it is built.

    An earlier basis of the same call is no reason: whether it is the same shows when the new one is written, and until
    then the finished modules are kept.
    """
    from .._io.occupied import BASIS, CLUSTERS
    from ..basis.overwriting import Planned, check_target

    earlier = earlier_record(out)
    record = json.loads(json.dumps(options.record(), default=str))
    same = (
        earlier.get("fingerprint") == earlier_record(again).get("fingerprint")
        if again is not None
        else earlier.get("build") == record
        and (earlier.get("precision") or {}).get("stored", "float32") == inputs.get("precision", "float32")
        and _names(sources) in (None, _names([entry.get("location") for entry in earlier.get("sources") or []]))
    )
    clusters = inputs.get("clusters") is not None
    planned = Planned(CLUSTERS, certain=False) if clusters else Planned(BASIS, certain=not same)
    given = [each.get("model") if isinstance(each, dict) else each for each in sources or []]
    check_target(out, planned, overwrite=force, inputs=[*given, again, inputs.get("like")])


def _names(sources: list[Any] | None) -> list[str] | None:
    """Return the last parts of places, sorted; None where some of them stand for several sources, or are none."""
    places = [each.get("model") if isinstance(each, dict) else each for each in sources or []]
    if any(not isinstance(each, str) or each.endswith(".txt") or set(each) & set("*?[:@") for each in places):
        return None
    return sorted(Path(each).name for each in places)


def opened(request: Request) -> dict[str, Any]:
    """Return the arguments of builds and plans alike, with models and bases loaded."""
    from ..basis import SubspaceBasis
    from ..builders.build_file import open_sources

    model = base_model(request.inputs.get("base_model"))
    common: dict[str, Any] = {"base_model": model, "resources": request.resources}
    if request.again is not None:
        old, precision = SubspaceBasis.from_pretrained(request.again), request.inputs.get("precision")
        if old.precision is not None and precision not in (None, old.precision):
            raise SubspaceError(
                f"precision={precision!r}: {request.again} is stored as {old.precision}, and is built again as that."
                " --config takes the same record as a beginning, with another precision."
            )
        return {"basis": old, **common}
    sources = request.sources
    if sources is not None:
        sources = open_sources(sources, allow_bin=request.options.allow_bin, base_model=model)
    like = request.inputs.get("like")
    if like is not None:
        common["like"] = SubspaceBasis.from_pretrained(like)
    return {"sources": sources, "options": request.options, **common}

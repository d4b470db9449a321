"""Pass the findings of a fleet's scans on to the processes that did not read the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import SourceError
from ..sources.source import Source
from .distributed import ProcessGroup, disagreeing

Told = Sequence[tuple[dict[str, Any], Mapping[str, torch.Tensor]]]  # per process its facts and sketches


@dataclass(eq=False)
class ScannedFleet:
    """The findings of one pass over a fleet's files. Sources are numbered from 1, as listed.

    Attributes:
        listed: a text for every reference.
        sources: number → source, where it could be opened.
        sketches: number → its sketches, see `scan`, where it was scanned.
        reasons: number → why it is bad.
        offline: those of them that may be as good as any, but that the Hub may not be asked for.
    """

    listed: list[str]
    sources: dict[int, Source] = field(default_factory=dict)
    sketches: dict[int, torch.Tensor] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    offline: set[int] = field(default_factory=set)

    def bad(self) -> list[dict[str, str]]:
        """Return ``{"name", "location", "reason"}`` of every bad source, in order."""
        names = {number: self.listed[number - 1] for number in sorted(self.reasons)}
        return [{"name": name, "location": name, "reason": self.reasons[number]} for number, name in names.items()]

    def facts(self) -> dict[str, Any]:
        """Return the findings of this process, sketches aside, as JSON."""
        return {
            "listed": self.listed,
            "reasons": {str(number): reason for number, reason in self.reasons.items()},
            "offline": sorted(self.offline),
            "scanned": {
                str(number): [list(source.norms.values()), source.digest, sorted(source.dtypes), source.stamp]
                for number, source in self.sources.items()
                if number in self.sketches
            },
            # a state dict is hashed where it is opened: every process has its own
            "hashes": {str(number): source.digest for number, source in self.sources.items() if source.digest},
        }


def share_scans(processes: ProcessGroup, scanned: ScannedFleet) -> None:
    """Complete what this process knows of the sources by what the others found, so that all know the same.

    Args:
        processes: those of the build.
        scanned: completed here. A source that is bad in one process is so in all.

    Raises:
        SourceError: the processes were given different lists.
    """
    told = processes.share(scanned.facts(), {str(number): value for number, value in scanned.sketches.items()})
    _require_one_list(processes, told)
    # the main process's word goes first where several say something of one source, and all processes hear the same
    scanned.reasons.clear()
    several = len(set(processes.machines)) > 1
    for index, (facts, sketches) in enumerate(told):
        scanned.offline |= set(facts["offline"])
        for key, reason in facts["reasons"].items():
            # a file that one machine cannot read may be readable on another: say which
            place = f" ({processes.name_of(index)})" if several else ""
            scanned.reasons.setdefault(int(key), reason + place)
        # stamps and norms of files on this machine only: another one's files may be others
        if index in processes.neighbours:
            _take_over(scanned, facts["scanned"], sketches)
    _compare_hashes(processes, scanned, told)


def _require_one_list(processes: ProcessGroup, told: Told) -> None:
    odd = disagreeing([facts["listed"] for facts, _ in told])
    if odd is not None:
        raise SourceError(
            f"{processes.name_of(odd)} was given {len(told[odd][0]['listed'])} sources, {processes.name_of(0)}"
            f" {len(told[0][0]['listed'])}, and not the same ones. Give all processes the same list; a pattern finds"
            " what lies on its own machine."
        )


def _take_over(scanned: ScannedFleet, found: Mapping[str, Any], sketches: Mapping[str, torch.Tensor]) -> None:
    """Take over what another process of this machine found of the sources that this one did not scan."""
    for key, (norms, digest, dtypes, stamp) in found.items():
        number = int(key)
        source = scanned.sources.get(number)
        if source is None or number in scanned.sketches:
            continue
        source.norms = dict(zip(source.keys, norms, strict=True))
        source.digest, source.dtypes = source.digest or digest, set(dtypes)
        source.stamp = tuple(stamp) if stamp else None
        scanned.sketches[number] = sketches[key]


def _compare_hashes(processes: ProcessGroup, scanned: ScannedFleet, told: Told) -> None:
    """Note as bad every source that is not the same in all processes."""
    for key in {key for facts, _ in told for key in facts["hashes"]}:
        known = [(index, facts["hashes"][key]) for index, (facts, _) in enumerate(told) if key in facts["hashes"]]
        odd = disagreeing([digest for _, digest in known])
        if odd is not None:
            (first, one), (second, other) = known[0], known[odd]
            scanned.reasons.setdefault(
                int(key),
                f"{scanned.listed[int(key) - 1]}: it has sha256 {one} for {processes.name_of(first)}, and {other} for"
                f" {processes.name_of(second)}. Give all processes the same adapter.",
            )

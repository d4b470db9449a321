"""What the scans of a fleet's files found, passed on to the processes that did not read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import SourceError
from ..sources.source import Source
from .distributed import ProcessGroup, disagreeing


def share_scans(
    processes: ProcessGroup,
    listed: Sequence[str],
    opened: dict[int, Source],
    sketches: dict[int, torch.Tensor],
    reasons: dict[int, str],
) -> None:
    """Complete what this process knows of the sources by what the others found, so that all know the same.

    Args:
        listed: the references, which have to be the same in all processes.
        opened: number of a source → the source, scanned or skimmed.
        sketches: of those scanned here, what `scan` gave.
        reasons: why sources are bad; one that is bad in one process is so in all.

    Raises:
        SourceError: the processes were given different lists.
    """
    facts = {
        "listed": list(listed),
        "reasons": {str(number): reason for number, reason in reasons.items()},
        "scanned": {
            str(number): [
                list(source.norms.values()),
                source.digest,
                sorted(source.dtypes),
                source.stamp,
            ]
            for number, source in opened.items()
            if number in sketches
        },
        # a state dict is hashed where it is opened: every process has its own
        "hashes": {str(number): source.digest for number, source in opened.items() if source.digest},
    }
    told = processes.share(facts, {str(number): value for number, value in sketches.items()})
    # main's word goes first where several say something of one source, and all processes hear the same
    reasons.clear()
    odd = disagreeing([each["listed"] for each, _ in told])
    if odd is not None:
        raise SourceError(
            f"{processes.name_of(odd)} was given {len(told[odd][0]['listed'])} sources, {processes.name_of(0)}"
            f" {len(told[0][0]['listed'])}, and not the same ones. Give all processes the same list; a pattern finds"
            " what lies on its own machine."
        )
    several = len(set(processes.machines)) > 1
    for index, (each, tensors) in enumerate(told):
        for key, reason in each["reasons"].items():
            # what one machine cannot read, another may
            reasons.setdefault(int(key), reason + (f" ({processes.name_of(index)})" if several else ""))
        for key, (norms, digest, dtypes, stamp) in each["scanned"].items():
            source = opened.get(int(key))
            if source is None or int(key) in sketches or index not in processes.neighbours:
                continue
            source.norms = dict(zip(source.keys, norms, strict=True))
            source.digest, source.dtypes = source.digest or digest, set(dtypes)
            source.stamp = tuple(stamp) if stamp else None
            sketches[int(key)] = tensors[key]
    for key in {key for each, _ in told for key in each["hashes"]}:
        known = [(index, each["hashes"][key]) for index, (each, _) in enumerate(told) if key in each["hashes"]]
        odd = disagreeing([digest for _, digest in known])
        if odd is not None:
            (first, one), (second, other) = known[0], known[odd]
            reasons.setdefault(
                int(key),
                f"{listed[int(key) - 1]}: it has sha256 {one} for {processes.name_of(first)}, and {other} for"
                f" {processes.name_of(second)}. Give all processes the same adapter.",
            )

"""Open and scan a fleet's sources, the files divided among the processes of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._io.progress import progress_bar
from ..errors import HubOfflineError, HubUnavailableError, SourceError
from ..hub_requests import patient
from ..sources.open import open_source
from ..sources.source import IN_MEMORY, Source
from .distributed import ProcessGroup
from .distributed_scans import ScannedFleet, share_scans
from .duplicates import drawn
from .scan import scan, skim


def scan_fleet(
    references: Sequence[Any],
    *,
    processes: ProcessGroup,
    progress: bool,
    token: str | bool | None,
    allow_bin: bool,
    base_model: nn.Module | None,
) -> ScannedFleet:
    """Open every source and read it once.

    The processes of one machine divide the reading of the files among them; each machine reads all of them once, so
    that files of machines that share no disk are held against one another by their sha256.

    Args:
        references: each one source, as `open_source` takes it; numbered from 1.
        processes: the processes that do this together; each returns the same.
        progress: show a bar where it takes longer than two seconds.
        token: as in `open_source`.
        allow_bin: as in `open_source`.
        base_model: as in `open_source`.

    Raises:
        SourceError: the processes were given different lists.
        ProcessError: a process has failed.
        HubUnavailableError: the Hub does not answer, though it was waited for; names what was read.
    """
    scanned = ScannedFleet([named(reference) for reference in references])
    neighbours = processes.neighbours
    bar = progress_bar(references, desc="reading sources", unit="adapter", shown=progress and processes.main)
    for number, reference in enumerate(bar, 1):
        try:
            with patient(None if bar.disable else partial(bar.set_postfix_str, refresh=True)):
                source = open_source(reference, token=token, allow_bin=allow_bin, base_model=base_model)
            if source.location == IN_MEMORY:
                source.location = f"{IN_MEMORY}, number {number}"
            if processes.index == neighbours[number % len(neighbours)]:
                scanned.sketches[number] = _measure(source)
            else:
                skim(source)
            scanned.sources[number] = source
        except HubOfflineError as error:
            scanned.offline.add(number)
            scanned.reasons[number] = str(error)
        except HubUnavailableError as error:
            read = ", ".join([source.name for source in scanned.sources.values()][-3:])
            done = (
                f"{len(scanned.sources)} of {len(references)} sources were read before{read and ', the last: '}{read}"
            )
            raise HubUnavailableError(
                f"{error} {done}. What was fetched is kept, and the same call goes on from there."
            ) from error
        except SourceError as error:
            scanned.reasons[number] = str(error)
    drawn.cache_clear()
    if processes.count > 1:
        share_scans(processes, scanned)
    for number in scanned.reasons:
        scanned.sources.pop(number, None)
    return scanned


def _measure(source: Source) -> torch.Tensor:
    """Scan a source and return its sketches; refuse one that no basis can hold, or that does nothing."""
    if source.biases:
        raise SourceError(
            f"{source.location}: {source.biases[0]}: it was trained with bias={source.config['bias']!r}"
            f" ({len(source.biases)} biases), which no basis holds, and without which it is another adapter. Train it"
            " with bias='none'."
        )
    sketches = scan(source)
    if not any(source.norms.values()):
        raise SourceError(f"{source.location}: every lora_B is zero, so the adapter does nothing. Leave it out.")
    return sketches


def named(reference: Any) -> str:
    """Return a short text for a reference: its path or id, or its type where it is in memory."""
    if isinstance(reference, Source):
        return reference.location
    return str(reference) if isinstance(reference, (str, Path)) else type(reference).__name__

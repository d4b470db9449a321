"""Divide the modules among the processes of a build, and give each process those of the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .._io.progress import progress_bar
from ..basis import ModuleBasis
from .distributed import ProcessGroup, packed, unpacked
from .reader import Reader


def divide(
    processes: ProcessGroup, costs: Mapping[str, float], done: Collection[str]
) -> tuple[list[str], dict[str, int]]:
    """Return the modules that this process has to build, and module → the process that has it in the end.

    Args:
        processes: those of the build.
        costs: module → its share of the work.
        done: modules that this process has finished before; on a disk that others share they have them too.
    """
    finished = [set(told) for told, _ in processes.share([name for name in costs if name in done])]
    owners = {name: next((i for i, names in enumerate(finished) if name in names), -1) for name in costs}
    dealt = processes.deal({name: costs[name] for name, owner in owners.items() if owner < 0})
    return [name for name in costs if dealt.get(name) == processes.index], owners | dealt


def work(
    processes: ProcessGroup,
    reader: Reader,
    mine: Sequence[str],
    every: int,
    title: str,
    progress: bool,
    do: Callable[[str], None],
) -> None:
    """Do something with each module of this process's share, until a process is known to have failed.

    Args:
        processes: those of the build.
        reader: holds the factors of as many modules as fit.
        mine: the share.
        every: how many modules all processes have, for the bar.
        title: of the progress bar.
        progress: show it.
        do: gets the module's name.
    """
    bar = progress_bar(
        total=every,
        desc=title,
        unit="module",
        initial=every - len(mine),
        shown=progress and processes.main,
    )
    with bar:
        for group in reader.groups(list(mine)):
            if processes.stopped():
                break
            reader.hold(group)
            for name in group:
                if processes.stopped():
                    break
                do(name)
                bar.update()
    # a process that gave up its share early, because of another, has to hear of that first
    processes.exchange()


def collect(
    processes: ProcessGroup, owners: Mapping[str, int], own: Mapping[str, tuple[ModuleBasis, dict[str, Any]]]
) -> dict[str, tuple[ModuleBasis, dict[str, Any]]]:
    """Return every module's basis and facts in every process, each from the process that has it.

    They go one at a time, so that no process holds more of them than the basis itself.

    Args:
        processes: those of the build.
        owners: module → the process that has it.
        own: those of this process.

    Raises:
        ProcessError: a process has failed.
    """
    whole = {}
    for name, owner in owners.items():
        if processes.count == 1:
            whole[name] = own[name]
            continue
        mine = owner == processes.index
        payload = processes.exchange(packed(own[name][1], own[name][0].tensors()) if mine else b"")[owner]
        if mine:
            whole[name] = own[name]
        else:
            facts, tensors = unpacked(payload)
            whole[name] = ModuleBasis(**tensors), facts
    return whole

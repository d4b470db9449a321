"""Which process builds which modules, and how each gets those of the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..basis import ModuleBasis
from .processes import Team, packed, unpacked


def divide(team: Team, costs: Mapping[str, float], done: Collection[str]) -> tuple[list[str], dict[str, int]]:
    """The modules that this process has to build, and who has each in the end.

    Args:
        costs: module → its share of the work.
        done: modules that this process has finished before; on a disk that others share they have them too.
    """
    finished = [set(told) for told, _ in team.share([name for name in costs if name in done])]
    owners = {name: next((i for i, names in enumerate(finished) if name in names), -1) for name in costs}
    dealt = team.deal({name: costs[name] for name, owner in owners.items() if owner < 0})
    return [name for name in costs if dealt.get(name) == team.index], owners | dealt


def collect(
    team: Team, owners: Mapping[str, int], own: Mapping[str, tuple[ModuleBasis, dict[str, Any]]]
) -> dict[str, tuple[ModuleBasis, dict[str, Any]]]:
    """Every module's basis and facts in every process, each from who has it.

    They go one at a time, so that no process holds more of them than the basis itself.

    Raises:
        ProcessError: a process has failed.
    """
    # a process that gave up its share early, because of another, has to hear of that first
    team.exchange()
    whole = {}
    for name, owner in owners.items():
        if team.count == 1:
            whole[name] = own[name]
            continue
        mine = owner == team.index
        payload = team.exchange(packed(own[name][1], own[name][0].tensors()) if mine else b"")[owner]
        if mine:
            whole[name] = own[name]
        else:
            facts, tensors = unpacked(payload)
            whole[name] = ModuleBasis(**tensors), facts
    return whole

"""The verdict on clusters of bases, in the words of the one on a basis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..energy import percent, word
from .advice import NEXT
from .places import typed


def verdict_of_clusters(facts: Mapping[str, Any], place: str) -> list[str]:
    """Return three lines about clusters of bases, as `verdict_of` does of one basis.

    Args:
        facts: of `Clusters.to_dict`.
        place: their folder.
    """
    kept, single, count = facts["energy_kept"], facts["energy_kept_single"], len(facts["clusters"])
    place = typed(place)
    beside = "" if single is None else f", beside {percent(single)} that one basis of as many parameters keeps"
    said = f"The {count} bases keep" if count > 1 else "The one basis keeps"
    left_out = "What bases of the others keep of an adapter left out was not measured with these."
    if measured := [step for step in facts["steps"] if step["clusters"] == count]:
        step = measured[-1]
        left_out = (
            f"Of an adapter left out, {_bases(count)} of the others keep {percent(step['left_out'])},"
            f" {_bases(step['against'])} of equal size {percent(step['against_left_out'])}."
        )
    if count > 1 and single is not None and kept < single:
        advice = f"build one basis with -k {facts['single_k']}, which keeps more for as many parameters"
    else:
        advice = f"for the adapters of each cluster, with its basis {place}/cluster-N, {NEXT[word(kept)]}"
    return [
        f"{said} {percent(kept)} of their adapters' energy{beside}: {word(kept)}.",
        left_out,
        f"Next: {advice}; for new tasks, see `subspace-peft report {place}/cluster-0` before you train in one.",
    ]


def _bases(count: int) -> str:
    return "one basis" if count == 1 else f"{count} bases"

"""Cells: what a scheme leaves of a fleet, measured once, kept in the cache and in the committed results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.run_cache import digest, plain

from subspace_peft._io.atomic import write_text_aside
from subspace_peft.errors import SubspaceError

from ..bench import OutOfTime
from ..encoder import half_is_faster
from .members import Fleet, Judged, agreement, dense, kept
from .peers import PeerError
from .schemes import Scheme

VERSION = 1  # of what cells hold: another one is measured again
SCORES = ("validation", "test", "loss", "same", "change", "kept")


@dataclass(frozen=True)
class Plan:
    """A fleet, as far as it can be told without training it, and what is to be measured.

    Attributes:
        fleet: its name, and that of its file of results.
        variant: of this fleet among those of the file: a choice's name and a seed, say.
        settings: all that decides its adapters, JSON values.
        make: trains it, or takes it from the cache.
        schemes: to be measured.
    """

    fleet: str
    variant: str
    settings: Mapping[str, Any]
    make: Callable[[], Fleet]
    schemes: Sequence[Scheme]

    def key(self, scheme: Scheme) -> str:
        """Return what a cell is known by, in every machine's results."""
        decides = {
            "version": VERSION,
            "fleet": self.fleet,
            "variant": self.variant,
            **self.settings,
            "family": scheme.family,
            "scheme": scheme.settings,
        }
        return digest(decides)[:16]


class Results:
    """A fleet's file of results, written again after each cell.

    Args:
        file: where it is.
        cache: a folder of cells, which outlives a lost file.
    """

    def __init__(self, file: Path, cache: Path) -> None:
        self.file, self.cache = file, cache
        body = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.trained: dict[str, Any] = body.get("trained", {})
        self.cells: dict[str, Any] = {cell["key"]: cell for cell in body.get("cells", [])}

    def find(self, key: str) -> Mapping[str, Any] | None:
        """Return a cell that is done, from the results or else from the cache."""
        if key not in self.cells and (kept_in := self.cache / f"{key}.json").is_file():
            body = json.loads(kept_in.read_text(encoding="utf-8"))
            self.trained |= body["trained"]
            self.cells[key] = body["cell"]
            self.write()
        return self.cells.get(key)

    def add(self, cell: Mapping[str, Any]) -> None:
        """Keep a cell."""
        self.cells[cell["key"]] = plain(cell)
        own = {cell["adapters"]: self.trained[cell["adapters"]]}
        self.cache.mkdir(parents=True, exist_ok=True)
        write_text_aside(self.cache / f"{cell['key']}.json", json.dumps({"trained": own, "cell": plain(cell)}))
        self.write()

    def write(self) -> None:
        """Write the file, a line per cell."""
        head = f'{{"fleet":{json.dumps(self.file.stem)},\n"trained":{{'
        trained = ",\n".join(f"{json.dumps(key)}:{_line(value)}" for key, value in self.trained.items())
        cells = ",\n".join(map(_line, self.cells.values()))
        write_text_aside(self.file, f'{head}\n{trained}}},\n"cells":[\n{cells}\n]}}\n')


def _line(value: Any) -> str:
    return json.dumps(plain(value), separators=(",", ":"), ensure_ascii=False)


def perform(plan: Plan, results: Results, until: float = float("inf")) -> None:
    """Measure what is missing of a plan; the fleet is made only where something is.

    Raises:
        OutOfTime: the time is over; what is done is kept.
    """
    missing = [scheme for scheme in plan.schemes if results.find(plan.key(scheme)) is None]
    if not missing:
        return
    if time.time() > until:
        raise OutOfTime
    fleet = plan.make()
    references = {member.name: reference(member, fleet) for member in fleet.members}
    results.trained[fleet.digest] = {
        "variant": plan.variant,
        "settings": dict(plan.settings),
        "half": half_is_faster(),
        "bytes": lora_bytes(fleet),
        "members": {name: noted(*each) for name, each in references.items()},
    }
    for scheme in missing:
        if time.time() > until:
            raise OutOfTime
        began = time.time()
        try:
            results.add(cell_of(plan, scheme, fleet, references))
        except PeerError as error:
            print(f"{plan.fleet} {plan.variant}: left out, to be tried again: {error}", flush=True)
            continue
        cell = results.cells[plan.key(scheme)]
        shown = " ".join(map(str, [scheme.family, *scheme.settings.values()]))
        if "refused" in cell:
            print(f"{plan.fleet} {plan.variant} {shown}: {cell['refused']}", flush=True)
            continue
        mean = sum(values[1] for values in cell["members"].values()) / len(cell["members"])
        print(
            f"{time.strftime('%H:%M:%S')} {plan.fleet} {plan.variant} {shown}: {100 * mean:.1f},"
            f" {cell['bytes']:,} bytes ({time.time() - began:.0f} s)",
            flush=True,
        )


def reference(member: Any, fleet: Fleet) -> tuple[Judged, Judged]:
    """Return what the LoRA does, and what the base model does under the LoRA's head."""
    return member.judge(dense(fleet.factors(member.name))), member.judge({})


def noted(whole: Judged, bare: Judged) -> dict[str, list[float]]:
    """Return both's validation score, test score and loss."""
    return {
        name: [round(value, 5) for value in (each.validation, each.test, each.loss)]
        for name, each in (("lora", whole), ("bare", bare))
    }


def lora_bytes(fleet: Fleet) -> int:
    """Return the bytes of all LoRAs' factors in float32, heads aside."""
    return sum(4 * (each.B.numel() + each.A.numel()) for name in fleet.names for each in fleet.factors(name).values())


def cell_of(
    plan: Plan, scheme: Scheme, fleet: Fleet, references: Mapping[str, tuple[Judged, Judged]]
) -> dict[str, Any]:
    """Measure a scheme on all members of a fleet; one that cannot be is a cell that says why."""
    cell = {
        "key": plan.key(scheme),
        "variant": plan.variant,
        "adapters": fleet.digest,
        "family": scheme.family,
        "scheme": dict(scheme.settings),
    }
    try:
        made = scheme.compress(fleet)
    except SubspaceError as error:
        return {**cell, "refused": str(error)}
    members = {}
    for member in fleet.members:
        whole, bare = references[member.name]
        found = made.updates(member.name)
        judged = member.judge(found)
        beside = agreement(whole, bare, judged)
        values = (judged.validation, judged.test, judged.loss, beside["same"], beside["change"])
        energy = kept(dense(fleet.factors(member.name)), found)
        members[member.name] = [round(value, 5) for value in (*values, energy)]
    return {**cell, "bytes": made.bytes, **made.facts, "members": members}

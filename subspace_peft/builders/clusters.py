"""`build_clusters`: several bases for a fleet that one does not serve."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .._io.atomic import write_text_aside
from .._io.occupied import BASIS, CLUSTERS
from .._io.progress import progress_bar
from .._shown import Shown, Table
from ..basis import SubspaceBasis
from ..basis.overwriting import Planned, check_target, replacing
from ..basis.source_places import shared_entries
from ..energy import EnergyRecord, mean, percent
from ..errors import SubspaceError
from .build import built
from .distributed import ALONE, ProcessGroup, process_group
from .fleet_sample import Sample
from .ignored import warn_of_ignored
from .keywords import takes_options
from .options import BuildOptions, Resources
from .partition import Step, compared, partition
from .prepare import FleetBuild, prepare

MOST = 6
IN_VAIN = 2  # `auto` gives up when that many finer partitions in a row are not worth it
FILE = "clusters.json"


@dataclass(frozen=True, eq=False, repr=False)
class Clusters(Shown):
    """Bases of parts of a fleet.

    Attributes:
        bases: one per cluster, the one of most sources first.
        sources: per source ``name``, ``location``, ``cluster``, ``energy_kept`` by its cluster's basis and, of its
            energy in the modules compared, ``energy_kept_single`` by one basis of all sources that is as large as all
            these (bases and a core per source), both built with the source among theirs.
        k: directions of each basis.
        single_k: directions of that single one.
        modules: the modules compared.
        steps: finer partitions that were held against coarser ones on sources left out.
    """

    bases: list[SubspaceBasis]
    sources: list[dict[str, Any]]
    k: int
    single_k: int
    modules: list[str]
    steps: list[Step]

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "bases", len(self.bases)
        yield "k", self.k
        yield "sources", len(self.sources)
        kept = {key: mean(each[key] for each in self.sources) for key in ("energy_kept", "energy_kept_single")}
        yield "energy kept", percent(kept["energy_kept"])
        yield "by one basis as large", percent(kept["energy_kept_single"])

    def _shown_table(self) -> Table:
        rows = (
            (each["name"], each["cluster"], percent(each["energy_kept"]), percent(each["energy_kept_single"]))
            for each in self.sources
        )
        return ("source", "cluster", "energy kept", "by one basis"), rows, len(self.sources)

    def to_precision(self, precision: str) -> Clusters:
        """Return the same, with every basis in `precision`: see `SubspaceBasis.to_precision`."""
        bases = [basis.to_precision(precision) for basis in self.bases]
        return replace(self, bases=bases, sources=_with_kept(self.sources, bases))

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `clusters.json`."""
        means = {key: mean(each[key] for each in self.sources) for key in ("energy_kept", "energy_kept_single")}
        return {
            "clusters": [
                {
                    "folder": f"cluster-{number}",
                    "fingerprint": basis.fingerprint,
                    "sources": len(basis.info["sources"]),
                }
                for number, basis in enumerate(self.bases)
            ],
            "k": self.k,
            "single_k": self.single_k,
            **means,
            "modules_compared": self.modules,
            "steps": [asdict(step) for step in self.steps],
            "sources": self.sources,
        }

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write every basis to ``folder/cluster-<n>``, then `clusters.json`.

        Args:
            folder: made where it does not exist.
            overwrite: see `SubspaceBasis.save_pretrained`.

        Raises:
            OccupiedError: something else lies in `folder` or in a cluster's, and `overwrite` is off.
            OSError: the disk refuses.
        """
        folder = Path(folder)
        for number, basis in enumerate(self.bases):
            check_target(folder / f"cluster-{number}", Planned(BASIS, basis.fingerprint), overwrite=overwrite)
        planned = Planned(CLUSTERS, " ".join(basis.fingerprint for basis in self.bases))
        facts = {**self.to_dict(), "sources": shared_entries(self.sources, folder)}
        text = json.dumps(facts, indent=2, sort_keys=True, allow_nan=False) + "\n"
        with replacing(folder, planned, overwrite=overwrite):
            for number, basis in enumerate(self.bases):
                basis.save_pretrained(folder / f"cluster-{number}", overwrite=overwrite)
            write_text_aside(folder / FILE, text)
        return folder


@process_group()
@takes_options(options=BuildOptions, resources=Resources)
def build_clusters(
    sources: Iterable[Any],
    clusters: int | str = "auto",
    *,
    options: BuildOptions,
    resources: Resources,
    base_model: Any = None,
) -> Clusters:
    """Divide a fleet into clusters and build a basis of each, where one basis keeps too little.

    Each source goes to the basis that keeps most of its energy; the bases are
    built again of the sources they got, until no source moves (as k-means does, with subspaces for centres: Bradley
    and Mangasarian 2000). Starts are without chance. Of several processes the first does this, all build the bases. It
    happens on up to 8 modules, evenly spread, as many as a third of `max_memory` holds.

    ``auto`` takes a finer partition only where it keeps more of sources that were left out (with their shared-seed
    group, in up to 5 folds, each held against the best basis) than the coarser one does with as many stored
    parameters, bases and one core per source together, by more than two standard errors of the paired differences. A
    single basis of n·k directions holds all that n of k do, but its cores are n² times as large: clusters save cores,
    so they pay with many sources that have little in common.

    Args:
        sources: as in `build_basis`.
        clusters: how many at most (some may turn out empty), or ``auto``: 1 to 6, as long as one of the next two
            parameters is worth it.
        options: as in `build_basis`, with a number of directions for `k`; its fields are keywords of their own, too.
        resources: as in `build_basis`; its fields are keywords of their own, too.
        base_model: as in `build_basis`.

    Raises:
        SourceError: bad sources; lists all of them.
        SubspaceError: arguments that clash; more clusters than sources.
    """
    with process_group() as processes:
        if processes.main:
            warn_of_ignored(options, sources=sources, like=None, base_model=base_model)
        whole = prepare_clusters(sources, clusters, options, resources, base_model=base_model, processes=processes)
        fleet, k = whole.fleet, int(options.size[0])
        # one process decides: values that are equal but for rounding may compare otherwise on another machine
        shown = resources.progress and processes.main
        with progress_bar(desc="comparing clusters", unit="basis", shown=shown) as bar:
            found = None
            if processes.main:
                sample = Sample(fleet, resources.memory // 3, options.alternations, bar.update)
                found = _divided(sample, clusters, k)
        found = processes.share(found)[0][0]
        bases = []
        for number, part in enumerate(found["parts"]):
            members = [fleet.sources[i] for i in part]
            basis = built(members, options, resources, base_model=base_model)
            basis.info["cluster"] = {"number": number, "of": len(found["parts"])}
            basis.info["skipped"] = fleet.skipped
            bases.append(basis)
        steps = [Step(**each) for each in found["steps"]]
        return Clusters(bases, _with_kept(found["sources"], bases), k, found["single_k"], found["modules"], steps)


def prepare_clusters(
    sources: Iterable[Any],
    clusters: int | str,
    options: BuildOptions,
    resources: Resources,
    *,
    base_model: Any = None,
    processes: ProcessGroup = ALONE,
) -> FleetBuild:
    """Read and check everything that clusters are built from, and one basis of all sources, which may be the outcome.

    Args:
        sources: as in `build_clusters`.
        clusters: as in `build_clusters`.
        options: as in `build_clusters`.
        resources: as in `build_clusters`.
        base_model: as in `build_clusters`.
        processes: those that build together.

    Raises:
        SourceError: bad sources; lists all of them.
        SubspaceError: arguments that clash; more clusters than sources.
    """
    if clusters != "auto" and (isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 1):
        raise SubspaceError(f"clusters={clusters!r}: give a number from 1 on, or 'auto'.")
    options.check_clusters()
    build = prepare(sources, options, resources, base_model=base_model, processes=processes)
    assert isinstance(build, FleetBuild)  # only the builders of controls are no fleet's
    count = len(build.fleet.sources)
    if clusters != "auto" and clusters > count:
        raise SubspaceError(f"clusters={clusters}, and there are {count} sources. Give at most that many.")
    return build


def _with_kept(sources: list[dict[str, Any]], bases: list[SubspaceBasis]) -> list[dict[str, Any]]:
    """Return the sources' entries with the energy kept that their bases have on record."""
    kept = [{each.name: each.kept for each in EnergyRecord.of(basis.info).sources} for basis in bases]
    return [{**entry, "energy_kept": kept[entry["cluster"]].get(entry["name"])} for entry in sources]


def _divided(sample: Sample, clusters: int | str, k: int) -> dict[str, Any]:
    """Return the parts, the steps that led to them, and how much is kept of each source; JSON-ready."""
    fleet, count = sample.fleet, len(sample.fleet.sources)
    parts, steps = partition(sample, 1, k), []
    for number in range(2, min(MOST, count) + 1) if clusters == "auto" else [clusters]:
        finer = partition(sample, number, k)
        if len(finer) <= len(parts):
            continue
        step = compared(sample, finer, parts, k)
        steps.append(asdict(step))
        if step.taken or clusters != "auto":
            parts = finer
        elif number >= len(parts) + IN_VAIN:
            break
    single_k = sample.equal_k(1, sample.numbers(len(parts), k))
    single = sample.kept(sample.fit(range(count), single_k), range(count))
    entries: list[dict[str, Any]] = [{} for _ in range(count)]
    for number, part in enumerate(parts):
        for i in part:
            source = fleet.sources[i]
            entries[i] = {
                "name": source.name,
                "location": source.location,
                "cluster": number,
                "energy_kept_single": single[i],
            }
    return {"parts": parts, "steps": steps, "sources": entries, "single_k": single_k, "modules": sample.names}

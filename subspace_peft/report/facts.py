"""`report_basis`: is this basis worth anything, for this fleet? From weights alone."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from .._io.atomic import write_text_aside
from ..basis import SubspaceBasis
from ..builders.fleet import Fleet, gather
from ..builders.rebuild import sources_on_record
from ..errors import SubspaceError
from .measure import ModuleFindings, mean, measure_module
from .sample import draw_folds, draw_sample
from .verdict import useful_k, verdict

SAMPLE = 64
MANY_COLUMNS = 256  # ranks in all, from which only MODULES of the modules are measured unless all are asked for
MODULES = 16


@dataclass(frozen=True)
class FleetReport:
    """What `report_basis` found.

    Attributes:
        basis: its place, fingerprint, builder, base model, number of modules, k, bytes, numbers per task.
        numbers: means over the modules measured: ``kept`` (energy the basis keeps of its own fleet, that of the
            sources it was built from), ``kept_of_new`` (of adapters that it was not built from), ``null_kept`` (a
            basis of noise adapters of equal strength, of them), ``unseen`` (a basis of the other folds, of those left
            out), ``random``, ``mean_only``, ``k_for_share``, ``above`` (output and input directions above the null,
            medians), ``k_for_new_tasks`` (see `useful_k`), ``break_even`` adapters, ``bytes_per_lora``,
            ``bytes_per_task``, ``bytes_of_basis``, ``sources``, ``in_seed_groups``. None where it could not be
            measured.
        verdict: sentences.
        modules: per measured module what `ModuleFindings` says.
        sources: per adapter name, location, seed_group, norm, ``in_basis``, ``kept``, ``unseen`` and ``mean_only``,
            means over modules.
        skipped: adapters that could not be used, each with its reason.
        how: how it was measured: modules and sources of how many, folds, seed.
    """

    basis: dict[str, Any]
    numbers: dict[str, Any]
    verdict: list[str]
    modules: dict[str, ModuleFindings] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    how: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: what is not a number is null."""
        return _plain(asdict(self))

    def save(self, folder: str | Path) -> Path:
        """Write ``report.html`` (one file, readable offline), ``report.json`` and the figures' PNGs; returns the
        page's path.

        Raises:
            ImportError: matplotlib is missing; install subspace-peft[report].
        """
        from .figures import draw
        from .page import page

        folder = Path(folder).expanduser()
        if folder.is_file():
            raise SubspaceError(f"{folder} is a file; a report is written into a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        figures = draw(self, folder)
        write_text_aside(folder / "report.json", json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        write_text_aside(folder / "report.html", page(self, figures))
        return folder / "report.html"


def report_basis(
    basis: SubspaceBasis | str | Path,
    sources: Iterable[Any] | None = None,
    *,
    sample: int = SAMPLE,
    modules: int | None = None,
    seed: int = 0,
    allow_bin: bool = False,
    base_model: nn.Module | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> FleetReport:
    """Hold a basis against a fleet of adapters: what it keeps of them, and what a basis keeps of adapters that it has
    not seen.

    Everything comes from the updates ΔW in factored form; no model is run. Energies are means over adapters and
    modules.

    Args:
        basis: the basis, its folder or its Hub id.
        sources: the fleet, as `build_basis` takes it; default: the sources that the basis's config names, where they
            still are what they were. With none at hand the report says what the config knows.
        sample: measure on at most so many adapters, drawn at random; whole shared-seed groups come together.
        modules: measure so many modules, spread over the depth; default: all of small fleets, 16 of large ones.
        seed: of the sample, the folds and the null.
        allow_bin, base_model, token, progress: as in `build_basis`.

    Raises:
        SourceError: adapters were given, and none can be used.
        BasisNotFoundError: there is no such basis.
        SubspaceError: the adapters and the basis have no module in common.
    """
    if not isinstance(basis, SubspaceBasis):
        basis = SubspaceBasis.from_pretrained(basis, token=token)
    if sample < 2 or (modules is not None and modules < 1):
        raise SubspaceError(f"sample={sample}, modules={modules}: give at least 2 adapters and 1 module.")
    missing: list[dict[str, str]] = []
    if sources is None:
        found, problems = sources_on_record(basis, base_model=base_model, token=token)
        missing = [{"name": "", "location": "", "reason": problem} for problem in problems]
        if not found:
            return _from_config(basis, missing)
        sources = found
    fleet = gather(
        sources,
        skip_bad=True,
        partial=True,
        token=token,
        progress=progress,
        allow_bin=allow_bin,
        base_model=base_model,
    )
    return _measured(basis, fleet, missing, sample, modules, seed, progress)


def _measured(
    basis: SubspaceBasis,
    fleet: Fleet,
    missing: list[dict[str, str]],
    sample: int,
    modules: int | None,
    seed: int,
    progress: bool,
) -> FleetReport:
    places = {name: found for name in fleet.modules if (found := basis.find(name)) is not None}
    if not places:
        raise SubspaceError(
            f"{basis.location or 'The basis'}: its modules ({next(iter(basis))!r}, …) are none of the adapters'"
            f" ({fleet.modules[0]!r}, …). They belong to different base models."
        )
    drawn = draw_sample(fleet.groups, sample, seed)
    folds = draw_folds([fleet.groups[i] for i in drawn], seed)
    chosen = list(places)
    columns = max(
        sum(fleet.sources[i].shape(name)[2] for i in drawn if name in fleet.sources[i].keys) for name in places
    )
    limit = modules if modules is not None else (MODULES if columns > MANY_COLUMNS else len(chosen))
    if len(chosen) > limit:
        chosen = [chosen[round(i * (len(chosen) - 1) / max(1, limit - 1))] for i in range(limit)]
    measured: dict[str, ModuleFindings] = {}
    per_source: list[dict[str, list[float]]] = [{"kept": [], "unseen": [], "mean_only": []} for _ in drawn]
    for name in tqdm(chosen, desc="measuring", unit="module", delay=2, disable=not progress):
        members = [
            n for n, i in enumerate(drawn) if name in fleet.sources[i].keys and fleet.sources[i].norms.get(name, 0) > 0
        ]
        if not members:
            continue
        updates = [fleet.sources[drawn[n]].factors(name) for n in members]
        module = basis[places[name]]
        cores = [module.project((update.B, update.A)) for update in updates]
        kept = [
            min(1.0, float(core.square().sum()) / update.norm() ** 2)
            for core, update in zip(cores, updates, strict=True)
        ]
        source_weights = fleet.source_weights([drawn[n] for n in members])
        size = (module.k_out, module.k_in)
        findings = measure_module(updates, source_weights, [folds[n] for n in members], kept, size, seed)
        measured[name] = findings
        for n, *values in zip(members, findings.kept, findings.unseen_here, findings.mean_only, strict=True):
            for key, value in zip(per_source[n], values, strict=True):
                if value is not None:
                    per_source[n][key].append(value)
    own = {entry.get("sha256") for entry in basis.info.get("sources") or []}
    entries = []
    for i, values in zip(drawn, per_source, strict=True):
        source = fleet.sources[i]
        entries.append(
            {
                "name": source.name,
                "location": source.location,
                "seed_group": fleet.groups[i],
                "norm": math.sqrt(sum(norm**2 for norm in source.norms.values())),
                "in_basis": source.sha256 in own,
                **{key: mean(each) for key, each in values.items()},
            }
        )
    numbers = _numbers(basis, fleet, drawn, measured, entries)
    how = {
        "modules": [len(measured), len(basis)],
        "sources": [len(drawn), len(fleet.sources)],
        "folds": len(set(folds)),
        "left_out": "one by one" if len(set(folds)) == len({fleet.groups[i] for i in drawn}) else "in folds",
        "seed": seed,
    }
    skipped = [*fleet.skipped, *missing]
    return FleetReport(_basis_facts(basis), numbers, verdict(numbers), measured, entries, skipped, how)


def _numbers(
    basis: SubspaceBasis,
    fleet: Fleet,
    drawn: Sequence[int],
    measured: dict[str, ModuleFindings],
    entries: list[dict[str, Any]],
) -> dict[str, Any]:
    modules = list(measured.values())
    above = tuple(round(statistics.median(getattr(m, f"above_{side}") for m in modules)) for side in ("out", "in"))
    groups = Counter(fleet.groups)
    sizes = [_bytes_of(fleet, i, basis) for i in drawn]
    shapes = basis.shapes().values()
    per_lora, per_task = statistics.mean(sizes), 4 * sum(shape["k_out"] * shape["k_in"] for shape in shapes)
    stored = _basis_facts(basis)["bytes"]
    saved = per_lora - per_task
    return {
        "kept": mean([e["kept"] for e in entries if e["in_basis"]]),
        "kept_of_new": mean([e["kept"] for e in entries if not e["in_basis"]]),
        "null_kept": mean([_at(m.ks, m.null, min(m.size)) for m in modules]),
        "unseen": mean([e["unseen"] for e in entries]),
        "random": mean([m.size[0] * m.size[1] / (m.shape[0] * m.shape[1]) for m in modules]),
        "mean_only": mean([e["mean_only"] for e in entries]),
        "k_for_share": max(m.k_for_share for m in modules),
        "above": above,
        "k_for_new_tasks": useful_k(*_curves(modules)),
        "bytes_per_lora": round(per_lora),
        "bytes_per_task": per_task,
        "bytes_of_basis": stored,
        "break_even": None if saved <= 0 else math.ceil(stored / saved),
        "sources": len(fleet.sources),
        "in_seed_groups": sum(size for size in groups.values() if size > 1),
    }


def _curves(modules: Sequence[ModuleFindings]) -> tuple[list[int], list[float], list[float]]:
    """Sizes that all modules have, and the means over modules of what is kept of adapters left out, and by random
    directions."""
    ks = [k for k in modules[0].ks if all(k in module.ks for module in modules)]
    means = [
        [statistics.mean(getattr(module, key)[module.ks.index(k)] for module in modules) for k in ks]
        for key in ("unseen", "random")
    ]
    return ks, *means


def _bytes_of(fleet: Fleet, i: int, basis: SubspaceBasis) -> int:
    """What a source's factors take, as they are stored, of modules that the basis has."""
    source = fleet.sources[i]
    width = 4 if "float32" in source.dtypes else 8 if "float64" in source.dtypes else 2
    shapes = [source.shape(name) for name in source.keys if basis.find(name) is not None]
    return width * sum(rank * (out + inner) for out, inner, rank in shapes)


def _from_config(basis: SubspaceBasis, missing: list[dict[str, str]]) -> FleetReport:
    """What can be said without a single adapter at hand."""
    found = basis.info.get("measured") or {}
    groups = Counter(entry.get("seed_group") for entry in basis.info.get("sources") or [])
    facts = _basis_facts(basis)
    numbers = {
        "kept": found.get("energy_kept"),
        "kept_of_new": None,
        "null_kept": None,
        "unseen": found.get("energy_left_out"),
        "random": found.get("energy_random"),
        "mean_only": None,
        "k_for_share": None,
        "above": None,
        "k_for_new_tasks": None,
        "bytes_per_lora": None,
        "bytes_per_task": facts["bytes_per_task"],
        "bytes_of_basis": facts["bytes"],
        "break_even": None,
        "sources": sum(groups.values()),
        "in_seed_groups": sum(size for size in groups.values() if size > 1),
    }
    words = [
        (
            "None of its source adapters is at hand: this is what its config says. Pass the fleet with --fleet to have"
            " it measured."
        ),
        *verdict(numbers),
    ]
    return FleetReport(facts, numbers, words, skipped=missing, how={"modules": [0, len(basis)], "sources": [0, 0]})


def _basis_facts(basis: SubspaceBasis) -> dict[str, Any]:
    shapes = list(basis.shapes().values())
    frozen = sum(s["k_out"] * s["out"] + s["k_in"] * s["in"] for s in shapes)
    return {
        "location": basis.location,
        "revision": basis.revision,
        "fingerprint": basis.fingerprint,
        "base_model": basis.base_model,
        "builder": basis.info.get("builder"),
        "modules": len(basis),
        "k": basis.describe_k(),
        "bytes": 4 * frozen if basis.file is None else basis.file.stat().st_size,
        "bytes_per_task": 4 * sum(s["k_out"] * s["k_in"] for s in shapes),
    }


def _at(ks: Sequence[int], values: Sequence[float], k: int) -> float:
    """A curve's value at k, between its points on a straight line."""
    if k <= ks[0] or k >= ks[-1]:
        return values[0] if k <= ks[0] else values[-1]
    place = next(i for i, other in enumerate(ks) if other >= k)
    low, high = ks[place - 1], ks[place]
    return values[place - 1] + (values[place] - values[place - 1]) * (k - low) / (high - low)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

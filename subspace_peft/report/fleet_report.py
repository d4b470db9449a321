"""`report_basis`: is this basis worth anything, for this fleet? From weights alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .._io.atomic import write_text_aside
from .._io.occupied import REPORT
from .._shown import Shown, Table, fingerprint, short
from ..base_names import check_said
from ..basis import SubspaceBasis
from ..basis.overwriting import Planned, replacing
from ..basis.source_places import shared_entries
from ..builders.fleet import gather
from ..builders.rebuild import sources_on_record
from ..energy import EnergyRecord, percent
from ..errors import SubspaceError
from .facts import LEFT_OUT, ReportFacts
from .figures import draw
from .measure_fleet import measure_fleet
from .numbers import basis_facts, measured_numbers, recorded_numbers
from .page import page
from .verdict import verdict

SAMPLE = 64


class FleetReport(Shown, ReportFacts):
    """The result of `report_basis`; its attributes are those of `ReportFacts`."""

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "modules", self.basis.get("modules")
        yield "k", str(self.basis.get("k", "")).removeprefix("k=") or None
        yield "adapters", self.numbers.get("sources")
        words = {"kept": "energy kept", LEFT_OUT: "of adapters left out", "random": "by a random basis"}
        for key, label in (words | {"null_kept": "of noise"}).items():
            value = self.numbers.get(key)
            yield label, None if value is None else percent(value)
        yield "basis", fingerprint(self.basis.get("fingerprint"))
        yield "verdict", short(self.verdict[0], 160) if self.verdict else None

    def _shown_table(self) -> Table:
        rows = (
            (entry["name"], percent(entry.get("kept")), percent(entry.get(LEFT_OUT)), f"{entry['norm']:.4g}")
            for entry in self.sources
        )
        return ("adapter", "energy kept", "left out", "norm of ΔW"), rows, len(self.sources)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``report.html`` (one file, readable offline), ``report.json`` and the figures' PNGs.

        Args:
            folder: Made where it does not exist.
            overwrite: Write into a folder of something else too, or replace the report on another basis.

        Returns:
            The page's path.

        Raises:
            ImportError: matplotlib is missing; install subspace-peft[report].
            OccupiedError: something else lies in `folder`, and `overwrite` is off.
            SubspaceError: `folder` is a file.
        """
        folder = Path(folder).expanduser()
        with replacing(folder, Planned(REPORT, self.basis.get("fingerprint")), overwrite=overwrite):
            figures, shared = draw(self, folder), self._shared(folder)
            write_text_aside(folder / "report.json", json.dumps(shared.to_dict(), indent=1, allow_nan=False) + "\n")
            write_text_aside(folder / "report.html", page(shared, figures))
        return folder / "report.html"

    def _shared(self, folder: Path) -> FleetReport:
        """Return the report without the places of this machine."""
        (basis,) = shared_entries([self.basis], folder)
        entries = {key: shared_entries(getattr(self, key), folder) for key in ("sources", "skipped")}
        return replace(self, basis=basis, **entries)


def report_basis(
    basis: SubspaceBasis | str | Path,
    sources: Iterable[Any] | None = None,
    *,
    sample: int = SAMPLE,
    modules: int | None = None,
    seed: int = 0,
    allow_bin: bool = False,
    base_model: nn.Module | None = None,
    base_model_name: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> FleetReport:
    """Measure what a basis keeps of a fleet, and what a basis of the fleet keeps of adapters left out of it.

    Everything comes from the updates ΔW in factored form; no model is run. Energies are as `subspace_peft.energy`
    defines them.

    Args:
        basis: the basis, its folder or its Hub id.
        sources: the fleet, as `build_basis` takes it; default: the sources that the basis's config names, where they
            still are what they were. With none at hand the report gives what the config has on record.
        sample: measure on at most so many adapters, drawn at random; whole shared-seed groups come together.
        modules: measure so many modules, spread over the depth; default: all of small fleets, 16 of large ones.
        seed: of the sample, the folds and the null.
        allow_bin: as in `build_basis`.
        base_model: as in `build_basis`.
        base_model_name: as in `build_basis`.
        token: as in `build_basis`.
        progress: as in `build_basis`.

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
        base_model_name=check_said(base_model_name),
    )
    measured = measure_fleet(basis, fleet, sample=sample, modules=modules, seed=seed, progress=progress)
    numbers = measured_numbers(basis, fleet, measured)
    return FleetReport(
        basis_facts(basis),
        numbers,
        verdict(numbers),
        measured.modules,
        measured.sources,
        [*fleet.skipped, *missing],
        measured.how,
    )


def _from_config(basis: SubspaceBasis, missing: list[dict[str, str]]) -> FleetReport:
    """Return what the basis's config has on record, where no adapter is at hand."""
    numbers = recorded_numbers(basis)
    words = [
        "None of its source adapters is at hand: this is what its config says. Pass the fleet, sources= (--fleet),"
        " to have it measured.",
        *verdict(numbers),
    ]
    if over := EnergyRecord.of(basis.info).over_modules:
        named = {"left_out": "adapters left out", "random": "random directions", "null": "noise", "kept": "its fleet"}
        words.append(
            f"An earlier version recorded the energy of {', '.join(named[key] for key in over)} as means over modules."
        )
    how = {"modules": [0, len(basis)], "sources": [0, 0]}
    return FleetReport(basis_facts(basis), numbers, words, skipped=missing, how=how)

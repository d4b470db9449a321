"""`report_basis`: is this basis worth anything, for this fleet? From weights alone."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn

from .._io.atomic import write_text_aside
from .._io.occupied import FIGURES, REPORT, REPORT_PAGE, TABLES
from .._io.warn import warn_caller
from .._shown import Shown, Table, fingerprint
from .._version import __version__
from ..base_names import check_said
from ..basis import SubspaceBasis
from ..basis.overwriting import Planned, replacing
from ..basis.source_places import shared_entries
from ..builders.fleet import gather
from ..builders.rebuild import sources_on_record
from ..energy import EnergyRecord, percent
from ..errors import SubspaceError
from .choices import choices_of
from .commands import making_command
from .facts import LEFT_OUT, ReportFacts
from .figures import draw
from .headlines import headlines
from .measure_fleet import measure_fleet
from .numbers import basis_facts, measured_numbers, recorded_numbers
from .page import page
from .places import seen_from_here
from .tables import write_tables
from .terms import WORDS
from .verdict import LIMITS, verdict, verdict_on_record

SAMPLE = 64


class FleetReport(Shown, ReportFacts):
    """The result of `report_basis`; its attributes are those of `ReportFacts`."""

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "modules", self.basis.get("modules")
        yield "k", str(self.basis.get("k", "")).removeprefix("k=") or None
        yield "adapters", self.numbers.get("sources")
        words = {"kept": "energy kept of them", "null_kept": "of noise of their strength"}
        for key, label in (words | {LEFT_OUT: "of adapters left out", "random": "by random directions"}).items():
            value = self.numbers.get(key)
            yield label, None if value is None else percent(value)
        yield "basis", fingerprint(self.basis.get("fingerprint"))
        for headline in headlines(self.numbers, self.made.get("basis"), self.basis.get("builder")):
            yield headline.use.lower(), headline.word

    def _shown_table(self) -> Table:
        rows = (
            (entry["name"], percent(entry.get("kept")), percent(entry.get(LEFT_OUT)), f"{entry['norm']:.4g}")
            for entry in self.sources
        )
        return ("adapter", "energy kept", "left out", "norm of ΔW"), rows, len(self.sources)

    def _repr_html_(self) -> str:
        if not hasattr(self, "numbers"):  # half made
            return super()._repr_html_()
        told = []
        for each in headlines(self.numbers, self.made.get("basis"), self.basis.get("builder")):
            share = "" if each.share is None else f", {percent(each.share)} {each.of}"
            said = f"{WORDS.get(each.word, each.word)}{share}. Next: {each.advice.replace('`', '')}"
            told.append(f"<p><strong>{html.escape(each.use)}</strong>: {html.escape(said)}.</p>")
        return f"<div>{''.join(told)}{super()._repr_html_()}</div>"

    def save(self, place: str | Path, *, files: bool = False, overwrite: bool = False) -> Path:
        """Write the report as one HTML file, readable offline.

        Args:
            place: A folder, made where it does not exist, into which ``report.html`` is written; or the file, a name
                that ends in ``.html``.
            files: Write ``report.json``, the tables as CSV and the figures as PNG into the folder as well.
            overwrite: Write into a folder of something else too, or replace a file or the report on another basis.

        Returns:
            The page's path.

        Raises:
            ImportError: `files` is on, and matplotlib is missing; install subspace-peft[report].
            OccupiedError: something else lies there, and `overwrite` is off.
            SubspaceError: `place` is a file of another kind; or it is to hold several.
        """
        page_file, folder = page_place(place), page_place(place).parent
        if files and is_page(place):
            raise SubspaceError(
                f"{place}: with files=True (--files) several files are written. Give the name of a folder."
            )
        shared = self._shared(folder)
        with replacing(Path(place).expanduser(), planned_report(place, self.basis), overwrite=overwrite):
            write_text_aside(page_file, page(shared))
            if files:
                draw(self, folder)
                write_tables(self, folder)
                write_text_aside(
                    folder / "report.json", json.dumps(shared.to_dict(), indent=1, allow_nan=False) + "\n"
                )
        old = [name for name in ("report.json", *FIGURES, *TABLES) if (folder / name).exists()]
        if old and not files and not is_page(place):
            warn_caller(
                f"{folder}: {', '.join(old)} there {'is' if len(old) == 1 else 'are'} of an earlier report, and not"
                " written any more. Pass files=True (--files) to have such files written again, or remove them."
            )
        return page_file

    def _shared(self, folder: Path) -> FleetReport:
        """Return the report without the places of this machine."""
        (basis,) = shared_entries([self.basis], folder)
        entries = {key: shared_entries(getattr(self, key), folder) for key in ("sources", "skipped")}
        return replace(self, basis=basis, **entries)


def is_page(place: str | Path) -> bool:
    """Return whether a place is that of the page itself, by its name."""
    return Path(place).suffix.lower() == ".html" and not Path(place).expanduser().is_dir()


def page_place(place: str | Path) -> Path:
    """Return the file that the page is written to."""
    path = Path(place).expanduser()
    return path if is_page(path) else path / "report.html"


def planned_report(place: str | Path, basis: Mapping[str, Any]) -> Planned:
    """Return what a report writes at a place.

    Args:
        place: as for `FleetReport.save`.
        basis: with its ``fingerprint``.
    """
    return Planned(REPORT_PAGE if is_page(place) else REPORT, basis.get("fingerprint"))


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
    listed = sources if sources is None or isinstance(sources, (str, Path)) else list(sources)
    given = {
        "sample": None if sample == SAMPLE else sample,
        "modules": modules,
        "seed": seed or None,
        "allow_bin": allow_bin or None,
        "base_model": base_model,
        "base_model_name": base_model_name,
    }
    given = {name: value for name, value in given.items() if value is not None}
    made = _made(basis, making_command(basis, listed, given))
    missing: list[dict[str, str]] = []
    if listed is None:
        found, problems = sources_on_record(basis, base_model=base_model, token=token)
        missing = [{"name": "", "location": "", "reason": problem} for problem in problems]
        if not found:
            return _from_config(basis, missing, made)
        listed = found
    fleet = gather(
        listed,
        skip_bad=True,
        partial=True,
        token=token,
        progress=progress,
        allow_bin=allow_bin,
        base_model=base_model,
        base_model_name=check_said(base_model_name),
    )
    measured = measure_fleet(basis, fleet, sample=sample, modules=modules, seed=seed, progress=progress)
    choices = choices_of(basis, fleet, measured)
    numbers = measured_numbers(basis, fleet, measured, choices)
    return FleetReport(
        basis_facts(basis),
        numbers,
        verdict(numbers),
        measured.modules,
        measured.sources,
        [*fleet.skipped, *missing],
        measured.how,
        measured.curves,
        choices,
        made,
    )


def _made(basis: SubspaceBasis, command: str) -> dict[str, str]:
    now = datetime.now(timezone.utc)
    place = seen_from_here(basis.location) if basis.location else ""
    return {"date": now.strftime("%Y-%m-%d %H:%M UTC"), "version": __version__, "command": command, "basis": place}


def _from_config(basis: SubspaceBasis, missing: list[dict[str, str]], made: dict[str, str]) -> FleetReport:
    """Return what the basis's config has on record, where no adapter is at hand."""
    numbers = recorded_numbers(basis)
    if not numbers["built_from"]:
        controls = verdict_on_record(basis.info, made["basis"] or None, basis.shapes())
        how = {"modules": [0, len(basis)], "sources": [0, 0]}
        return FleetReport(basis_facts(basis), numbers, [*controls, LIMITS], skipped=missing, how=how, made=made)
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
    return FleetReport(basis_facts(basis), numbers, words, skipped=missing, how=how, made=made)

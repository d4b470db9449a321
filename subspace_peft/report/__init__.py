"""Is this basis worth anything? Facts, spectra and nulls; what its fleet has in common; whether its file is whole.

Each name is loaded when it is first used: looking at a basis or checking it needs neither PEFT nor what trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .analyze import FleetAnalysis, analyze_fleet
    from .fleet_report import FleetReport, report_basis
    from .inspect import inspect_path
    from .null import null_basis
    from .validate import validate_basis
    from .verdict import verdict_of

_PLACES = {
    "FleetAnalysis": "analyze",
    "FleetReport": "fleet_report",
    "analyze_fleet": "analyze",
    "inspect_path": "inspect",
    "null_basis": "null",
    "report_basis": "fleet_report",
    "validate_basis": "validate",
    "verdict_of": "verdict",
}

__all__ = [
    "FleetAnalysis",
    "FleetReport",
    "analyze_fleet",
    "inspect_path",
    "null_basis",
    "report_basis",
    "validate_basis",
    "verdict_of",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = attach(__name__, _PLACES)

"""Is this basis worth anything? Facts, spectra and nulls; what its fleet has in common; whether its file is whole."""

from .analyze import FleetAnalysis, analyze_fleet
from .fleet_report import FleetReport, report_basis
from .inspect import inspect_path
from .null import null_basis
from .validate import validate_basis

__all__ = [
    "FleetAnalysis",
    "FleetReport",
    "analyze_fleet",
    "inspect_path",
    "null_basis",
    "report_basis",
    "validate_basis",
]

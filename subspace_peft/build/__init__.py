"""How a basis comes to be: reading source adapters, and the builders."""

from .build import build_basis
from .clusters import Clusters, build_clusters
from .complete import complete_basis
from .factors import Factors
from .plan import BuildPlan, plan_build
from .references import expand, expand_or_raise
from .rerun import rebuild_basis, sources_on_record
from .sources import Source, is_one_source, open_source
from .update import update_basis

__all__ = [
    "BuildPlan",
    "Clusters",
    "Factors",
    "Source",
    "build_basis",
    "build_clusters",
    "complete_basis",
    "expand",
    "expand_or_raise",
    "is_one_source",
    "open_source",
    "plan_build",
    "rebuild_basis",
    "sources_on_record",
    "update_basis",
]

"""Build bases: from a fleet of sources to orthonormal directions, and what changes a basis afterwards."""

from .build import build_basis
from .clusters import Clusters, build_clusters
from .complete import complete_basis
from .dry_run import BuildPlan, plan_build
from .rebuild import rebuild_basis, sources_on_record
from .update import update_basis

__all__ = [
    "BuildPlan",
    "Clusters",
    "build_basis",
    "build_clusters",
    "complete_basis",
    "plan_build",
    "rebuild_basis",
    "sources_on_record",
    "update_basis",
]

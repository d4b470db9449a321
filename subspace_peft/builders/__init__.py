"""Build bases: from a fleet of sources to orthonormal directions, and ways to change a basis afterwards.

Names are loaded when they are first used, so that the command line can read the options without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .build import build_basis
    from .clusters import Clusters, build_clusters
    from .complete import complete_basis
    from .dry_run import BuildPlan, plan_build, plan_rebuild
    from .options import BuildOptions, CompleteOptions, Resources, UpdateOptions
    from .rebuild import rebuild_basis, sources_on_record
    from .refit import RefitPlan, plan_refit, refit_basis
    from .update import update_basis

_PLACES = {
    "BuildOptions": "options",
    "BuildPlan": "dry_run",
    "Clusters": "clusters",
    "CompleteOptions": "options",
    "RefitPlan": "refit",
    "Resources": "options",
    "UpdateOptions": "options",
    "build_basis": "build",
    "build_clusters": "clusters",
    "complete_basis": "complete",
    "plan_build": "dry_run",
    "plan_rebuild": "dry_run",
    "plan_refit": "refit",
    "rebuild_basis": "rebuild",
    "refit_basis": "refit",
    "sources_on_record": "rebuild",
    "update_basis": "update",
}

__all__ = [
    "BuildOptions",
    "BuildPlan",
    "Clusters",
    "CompleteOptions",
    "RefitPlan",
    "Resources",
    "UpdateOptions",
    "build_basis",
    "build_clusters",
    "complete_basis",
    "plan_build",
    "plan_rebuild",
    "plan_refit",
    "rebuild_basis",
    "refit_basis",
    "sources_on_record",
    "update_basis",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = attach(__name__, _PLACES)

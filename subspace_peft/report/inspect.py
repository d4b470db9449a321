"""Read the facts about a basis or a task on disk, for people and for programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._io.hints import hint
from .._shown import Facts
from ..basis.arrays import StoredReader
from ..basis.base_weights import NOT_RECORDED, recorded_weights
from ..basis.layout import describe_k, k_range
from ..basis.opened import open_to_look
from ..basis.stored import CONFIG_FILE, StoredBasis
from ..energy import EnergyRecord, lower_bound, sources_of
from ..errors import BasisNotFoundError, HubUnavailableError, SubspaceError
from ..hub import only_local, split_revision
from .verdict import verdict_on_record

if TYPE_CHECKING:
    from ..tasks.read import SavedTask

SHARES = ("kept", "random", "left_out", "null")


def inspect_path(path: str | Path, *, verify: bool = True) -> Facts:
    """Return the facts about a folder or Hub id.

    Args:
        path: a basis or a saved task.
        verify: read every tensor of a basis and hold it against its hash.

    Returns:
        ``{"kind": "basis" | "task", …}``, JSON-ready. It is a dict that is shown in short;
        ``dict(facts)`` is the whole of it.

    Raises:
        SubspaceError: neither is there, or it is damaged.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / CONFIG_FILE).is_file():
        if (folder / "adapter_config.json").is_file():
            return Facts(_task(folder))
        # of tasks alone: it brings PEFT, which a basis needs nothing of
        from ..tasks.pipeline_task import check_one_task

        check_one_task(folder)
        raise SubspaceError(
            f"{folder}: neither a basis ({CONFIG_FILE}) nor a task (adapter_config.json) is in there.{hint(folder)}"
        )
    try:
        basis = open_to_look(folder if folder.exists() else path)
    except BasisNotFoundError as error:
        if folder.exists() or only_local(str(path)):
            raise
        try:
            return Facts(_task(path))
        except HubUnavailableError:
            raise
        except SubspaceError as other:
            raise SubspaceError(f"{path}: neither a basis ({error}) nor a task ({other}).") from error
    return Facts(_basis(basis, verify))


def _basis(basis: StoredBasis, verify: bool) -> dict[str, Any]:
    if verify:
        for _ in StoredReader(basis).verify():
            pass
    shapes, record = basis.shapes(), EnergyRecord.of(basis.info)
    facts = {
        "kind": "basis",
        "location": basis.location,
        "revision": basis.revision,
        "fingerprint": basis.fingerprint,
        "verified": verify,
        "base_model": basis.info.get("base_model_name_or_path"),
        "base_weights": recorded_weights(basis.info),
        "base_weights_recorded": recorded_weights(basis.info) != NOT_RECORDED,
        "base_model_names": basis.info.get("base_model_names"),
        "builder": basis.info.get("builder"),
        "build": basis.info.get("build"),
        "modules": len(shapes),
        "k": describe_k(shapes),
        "k_range": k_range(shapes),
        "frozen_numbers": sum(s["k_out"] * s["out"] + s["k_in"] * s["in"] for s in shapes.values()),
        "core_numbers_per_task": sum(s["k_out"] * s["k_in"] for s in shapes.values()),
        "precision": basis.info.get("precision"),
        "bytes": basis.file.stat().st_size,
        "sources": [
            {**entry, **({"energy_kept_at_least": True} if lower_bound(entry, basis.info) else {})}
            for entry in sources_of(basis.info)
        ],
        "skipped": basis.info.get("skipped", []),
        "shapes": shapes,
    }
    energies = {f"energy_{key}": value for key in SHARES if (value := getattr(record, key)) is not None}
    bounds = {"energy_kept_at_least": True} if record.at_least else {}
    over = {"energy_over_modules": list(record.over_modules)} if record.over_modules else {}
    said = {"verdict": verdict_on_record(basis.info, basis.location, shapes)}
    return facts | basis.info.get("measured", {}) | energies | bounds | over | said


def _task(path: str | Path) -> dict[str, Any]:
    from ..tasks import read_task
    from ..tuner.card import sizes_of
    from ..tuner.task_file import WEIGHTS_FILE

    repo, revision = (str(path), None) if Path(path).is_dir() else split_revision(str(path))
    task = read_task(repo, **({"revision": revision} if revision else {}))
    config = task.config
    sizes = sizes_of(Path(str(config.loaded_from.folder)) / WEIGHTS_FILE)
    return {
        "kind": "task",
        "location": str(path),
        "base_model": config.base_model_name_or_path,
        "task_type": config.task_type,
        "coefficients": config.coefficients,
        "mean_gain": config.mean_gain,
        "alpha": config.alpha,
        "basis": config.to_dict()["basis"],
        "basis_revision": config.basis_revision,
        "basis_fingerprint": config.basis_fingerprint,
        "carries_basis": config.basis_modules is not None,
        "modules": len(task.cores),
        "parameters": sizes["numbers"],
        "own_parameters": sizes["own"],
        "own_directions": sizes["directions"],
        "other_tensors": sorted(task.extras),
        "bytes": sizes["bytes"],
        "update_norms": {name: _norm(task, name) for name in task.cores},
    }


def _norm(task: SavedTask, name: str) -> float:
    """Return ‖ΔW‖_F of a module: of the core, since U and V are orthonormal, and of own directions beside it."""
    core = task.cores[name]
    if name not in task.own:
        return float(core.norm())
    import torch

    from ..sources import Factors

    (B, A), module = task.own[name], task.modules[name]
    U, V = module.U.double(), module.V.double()
    return Factors(torch.cat([U @ core, B.double()], 1), torch.cat([V, A.double()])).norm()

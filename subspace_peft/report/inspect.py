"""The facts about a basis or a task on disk, for people and for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..basis import SubspaceBasis
from ..basis.files import CONFIG_FILE, TENSORS_FILE
from ..errors import SubspaceError


def inspect_path(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """What a folder or Hub id holds.

    Args:
        path: a basis or a saved task.
        verify: read every tensor of a basis and hold it against its hash.

    Returns:
        ``{"kind": "basis" | "task", …}``, JSON-ready.

    Raises:
        SubspaceError: neither is there, or it is damaged.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / CONFIG_FILE).is_file():
        if (folder / "adapter_config.json").is_file():
            return _task(path)
        raise SubspaceError(f"{folder}: neither a basis ({CONFIG_FILE}) nor a task (adapter_config.json) is in there.")
    return _basis(SubspaceBasis.from_pretrained(path), verify)


def _basis(basis: SubspaceBasis, verify: bool) -> dict[str, Any]:
    if verify:
        for name in basis:
            basis[name]
    shapes = basis.shapes()
    file = Path(basis.location or "") / TENSORS_FILE
    facts = {
        "kind": "basis",
        "location": basis.location,
        "revision": basis.revision,
        "fingerprint": basis.fingerprint,
        "verified": verify,
        "base_model": basis.base_model,
        "builder": basis.info.get("builder"),
        "build": basis.info.get("build"),
        "modules": len(basis),
        "k": basis.describe_k(),
        "frozen_numbers": sum(s["k_out"] * s["out"] + s["k_in"] * s["in"] for s in shapes.values()),
        "core_numbers_per_task": sum(s["k_out"] * s["k_in"] for s in shapes.values()),
        "bytes": file.stat().st_size if file.is_file() else None,
        "sources": basis.info.get("sources", []),
        "skipped": basis.info.get("skipped", []),
        "shapes": shapes,
    }
    return facts | basis.info.get("measured", {})


def _task(path: str | Path) -> dict[str, Any]:
    from ..convert import read_task

    task = read_task(path)
    config = task.config
    file = Path(path) / "adapter_model.safetensors"
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
        "other_tensors": sorted(task.extras),
        "bytes": file.stat().st_size,
        "update_norms": {name: float(core.norm()) for name, core in task.cores.items()},
    }

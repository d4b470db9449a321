"""Pack one task for a bundle: its bytes, its configuration, and its entry in the index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .._version import __version__
from ..basis import SubspaceBasis
from ..basis.module import tensor_bytes
from ..basis.recorded import on_disk
from ..errors import BadFileError, SubspaceError
from ..sources import Factors
from ..tasks.read import SavedTask
from ..tuner.config import SubspaceConfig
from .bundle import Bundle
from .dtypes import NAMES
from .format import check_name
from .named import Named

# fields that every task of a bundle has alike: its cores are stored, not how they were trained
PLAIN = {
    "coefficients": "core",
    "mean_gain": "none",
    "start": "zero",
    "r": 8,
    "dropout": 0.0,
    "seed": 0,
    "save_basis": None,
    "basis_modules": None,
    "init_weights": True,
    "inference_mode": True,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "bundle": None,
}


@dataclass(eq=False)
class Packed:
    """A task that is about to be written into a bundle's file.

    Attributes:
        name: Its name in the bundle.
        config: Its whole configuration, as JSON values.
        modules: Module → [k_out, k_in], in the order of its parameters.
        tensors: (key, dtype, shape) in the order of their bytes. A task that has a core only can be a row.
        data: Returns the bytes.
        entry: Further values of its entry in the index.
    """

    name: str
    config: dict[str, Any]
    modules: dict[str, list[int]]
    tensors: list[tuple[str, str, tuple[int, ...]]]
    data: Callable[[], bytes]
    entry: dict[str, Any] = field(default_factory=dict)


def pack(
    named: Named,
    dtype: torch.dtype = torch.float32,
    *,
    metrics: Mapping[str, Any] | None = None,
    id2label: Mapping[int, str] | None = None,
    **entry: Any,
) -> Packed:
    """Pack one task: its bytes, and its entry in the index.

    Args:
        named: The task.
        dtype: The dtype of its cores and of its own directions.
        metrics: Scores to record.
        id2label: Names of its classes, where its own config does not have them.
        **entry: Further values for its entry in the index.

    Raises:
        SubspaceError: The basis is not stored by itself, a dtype is not known to bundles, or the metrics are not JSON.
        BadFileError: A tensor holds NaN or infinite values.
    """
    name, task = check_name(named.name), named.task
    own = {module: _balanced(*sides) for module, sides in task.own.items() if sides[0].shape[1]}
    modules = sorted(task.cores, key=_natural)
    row = torch.cat([task.cores[module].T.reshape(-1) for module in modules]).to(dtype)
    tensors = {"core": row}
    tensors |= {f"extra/{key}": value for key, value in sorted(task.extras.items())}
    for module, (B, A) in sorted(own.items()):
        tensors |= {f"B/{module}": B.to(dtype), f"A/{module}": A.to(dtype)}
    for key, value in tensors.items():
        if value.dtype not in NAMES:
            raise SubspaceError(f"Task {name!r}: {key} has dtype {value.dtype}, which a bundle does not hold.")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise BadFileError(
                f"Task {name!r}: {key} holds NaN or infinite values (in {value.dtype}). Leave it out, or train it"
                " again."
            )
    # wide dtypes first, so that every tensor within a task's bytes is aligned to its dtype
    order = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)
    data = b"".join(tensor_bytes(tensors[key]) for key in order)
    more = {"source": named.source, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), **entry}
    if own:
        # the name that it had when own directions were residuals, by which earlier versions read it
        more["residual_rank"] = max(B.shape[1] for B, _ in own.values())
    if metrics is not None:
        more["metrics"] = dict(metrics)
    config = _config(task, name, id2label)
    try:
        json.dumps(more, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SubspaceError(
            f"Task {name!r}: its metrics are not JSON values ({error}). Give finite numbers and texts."
        ) from error
    return Packed(
        name,
        config,
        {module: list(task.cores[module].shape) for module in modules},
        [(key, NAMES[tensors[key].dtype], tuple(tensors[key].shape)) for key in order],
        lambda: data,
        more,
    )


def _balanced(B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same product with both sides of one size, so that neither leaves float16's range."""
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        return B, A  # which is said where all tensors are looked at
    P, S, T = Factors(B.double(), A.double()).canonical()
    return P * S.sqrt(), (T * S.sqrt()).T


def _natural(name: str) -> list[Any]:
    # layer 2 before layer 10, as models have them
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def kept(bundle: Bundle, name: str) -> Packed:
    """Make a packed task of one that is in a bundle; its bytes are read and verified when they are asked for."""
    entry = {key: value for key, value in bundle.entry(name).items() if key not in ("config", "modules")}
    start, end = bundle.span(name)
    config = {**bundle.index["config"], **bundle.entry(name).get("config", {})}
    return Packed(
        name,
        config,
        {module: list(size) for module, size in bundle.sizes(name).items()},
        bundle.tensors(name),
        lambda: bundle.raw(name),
        {**entry, "bytes": end - start},
    )


def _place(config: SubspaceConfig, basis: SubspaceBasis) -> str | None:
    """Return where the basis is by the task's own word: another copy of it may be in use in this process."""
    reference = config.basis_reference
    if basis.revision or reference.location is None:
        return basis.location
    found = on_disk(reference.location, basis.fingerprint, reference.near)
    return basis.location if found is None else str(found)


def _config(task: SavedTask, name: str, id2label: Mapping[int, str] | None) -> dict[str, Any]:
    basis = task.config.resolve()
    if basis is None:
        raise SubspaceError(
            f"Task {name!r} carries its basis in its own file. A bundle refers to a stored one: save that basis by"
            " itself, and say where it is with basis=…."
        )
    if basis.location is None:
        raise SubspaceError(
            f"The basis of task {name!r} lives in memory only: `basis.save_pretrained(folder)` before the tasks are"
            " packed."
        )
    ranks = {module: task.own[module][0].shape[1] if module in task.own else 0 for module in task.cores}
    config = {
        **task.config.to_dict(),
        **task.config.sizes.fields_of_own(ranks),
        **PLAIN,
        "target_modules": sorted(task.cores),
        "subspace_version": __version__,
        "basis": _place(task.config, basis),
        "basis_revision": basis.revision,
        "basis_fingerprint": basis.fingerprint,
    }
    if id2label is not None:
        config["id2label"] = {int(index): str(label) for index, label in id2label.items()}
    return json.loads(json.dumps(config))

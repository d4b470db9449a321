"""A fleet of LoRAs → one bundle on a basis, with an honest account of what is kept, lost and saved."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .._moved import moved_name
from ..basis import SubspaceBasis
from ..basis.files import TENSORS_FILE
from ..convert.project import Projection, project_lora
from ..errors import BadFileError, SourceError, SubspaceError
from ..sources import Source, is_one_source, open_source
from .format import BUNDLE_FILE
from .named import named_tasks
from .residual import Residual, residual_of
from .write import Packed, pack, write_bundle


@dataclass(frozen=True)
class Share:
    """Where the energy ‖ΔW‖² of a module, or of a whole adapter, went: three shares that sum to 1.

    Attributes:
        kept: in the basis, ‖C‖² / ‖ΔW‖².
        residual: in the low-rank residual that is stored beside.
        lost: in neither.
    """

    kept: float
    residual: float
    lost: float


@dataclass(frozen=True)
class CompressedAdapter:
    """What became of one adapter.

    Attributes:
        name: in the bundle.
        location: what it was made from.
        total: the whole adapter's shares.
        modules: module → its shares.
        residual_rank: of the residual that is stored, 0 for none.
        verdict: `Projection.verdict` of the projection alone.
        bytes_before: of its file (of its tensors, where it is in memory).
        bytes_after: in the bundle, its part of the index aside.
        refused: why it is not in the bundle, or None.
    """

    name: str
    location: str
    total: Share | None = None
    modules: dict[str, Share] = field(default_factory=dict)
    residual_rank: int = 0
    verdict: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    refused: str | None = None


@dataclass(frozen=True)
class Storage:
    """Bytes, of files that were written and read.

    Attributes:
        adapters: how many are in the bundle.
        before: of their files.
        basis: of the basis's tensors' file.
        bundle: of the bundle's file, index and all.
        after: basis and bundle.
        per_adapter_before, per_adapter_after: means, the basis aside.
        break_even: from how many adapters of these means on the basis is paid for; None: never.
    """

    adapters: int
    before: int
    basis: int
    bundle: int
    after: int
    per_adapter_before: float
    per_adapter_after: float
    break_even: int | None


@dataclass(frozen=True)
class CompressionReport:
    """What `compress_fleet` did.

    Attributes:
        folder: of the bundle.
        adapters: what became of each.
        storage: bytes before and after.
        min_energy, residual: as asked for.
    """

    folder: str
    adapters: list[CompressedAdapter]
    storage: Storage
    min_energy: float
    residual: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def compress_fleet(
    loras: Iterable[Any],
    basis: SubspaceBasis | str | Path,
    out: str | Path,
    *,
    min_energy: float = 0.5,
    residual: int = 0,
    skip_bad: bool = False,
    check_base_model: bool = True,
    dtype: torch.dtype = torch.float32,
    token: str | bool | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Project existing LoRAs on a basis and pack them into one bundle.

    An adapter of which the basis keeps less than `min_energy` gets the best low-rank approximation of what is missing,
    at the smallest rank up to `residual`, the same in all modules, that lifts it there; where none does, it is
    refused. Loaded again (`load_task`, `extract_task`), such a task is a stock LoRA: projection and residual, exactly.

    Args:
        loras: folders, Hub ids with ``@revision``, state dicts, ``(state_dict, config)`` or PeftModels.
        basis: the basis, its folder or its Hub id; it has to be stored.
        out: the bundle's folder.
        min_energy: share of ‖ΔW‖² from 0 to 1 that has to be in basis and residual together. Whether the *function*
            survives is for the task's own metric to say.
        residual: highest rank of a residual; 0 keeps none.
        skip_bad: leave out what is refused or cannot be read, and report it; else that is an error, which lists all.
        check_base_model: refuse a LoRA whose config names another base model than the basis.
        dtype: of stored cores and residuals.
        token: as in huggingface_hub.
        progress: show a bar where it takes longer than two seconds.

    Returns:
        The energy kept per adapter and module, and the storage table.

    Raises:
        SubspaceError: some adapters are refused and `skip_bad` is off, or all are; a basis in memory only; two of one
            name; a threshold or rank that cannot be.
        OSError: the disk refuses; an earlier bundle stays.
    """
    if not 0 <= min_energy <= 1:
        raise SubspaceError(f"min_energy={min_energy!r}: give a share from 0 to 1.")
    if not isinstance(residual, int) or isinstance(residual, bool) or residual < 0:
        raise SubspaceError(f"residual={residual!r}: give a rank, 0 for none; 1 to 4 are usual.")
    if not isinstance(basis, SubspaceBasis):
        basis = SubspaceBasis.from_pretrained(basis, token=token)
    if basis.location is None:
        raise SubspaceError(
            "The basis lives in memory only: `basis.save_pretrained(folder)` before a bundle refers to it."
        )
    packed: dict[str, Packed] = {}
    report: list[CompressedAdapter] = []
    given = [loras] if is_one_source(loras) else list(loras)
    for lora in tqdm(given, desc="compressing", unit="adapter", delay=2, disable=not progress):
        what, task = _one(lora, basis, min_energy, residual, check_base_model, dtype, token)
        if task is not None and what.name in packed:
            other = packed[what.name].entry["source"]["location"]
            what, task = replace(what, refused=f"{other} is called {what.name!r} as well: rename its folder"), None
        if task is not None:
            packed[what.name] = task
        report.append(what)
    bad = [each for each in report if each.refused]
    if bad and not (skip_bad and packed):
        reasons = "\n  ".join(f"{each.location}: {each.refused}" for each in bad)
        remedy = "" if skip_bad else " Pass skip_bad=True (--skip-bad) to leave them out."
        raise SubspaceError(f"{len(bad)} of {len(report)} adapters cannot be compressed.{remedy}\n  {reasons}")
    if not packed:
        raise SubspaceError("No adapters were given; there is nothing to compress.")
    folder = Path(out)
    write_bundle(list(packed.values()), folder, dtype)
    stored = [each for each in report if not each.refused]
    return CompressionReport(str(folder), report, storage(stored, basis, folder / BUNDLE_FILE), min_energy, residual)


def _one(
    lora: Any,
    basis: SubspaceBasis,
    min_energy: float,
    most: int,
    check_base_model: bool,
    dtype: torch.dtype,
    token: str | bool | None,
) -> tuple[CompressedAdapter, Packed | None]:
    named = str(lora) if isinstance(lora, (str, Path)) else "in memory"
    try:
        source = open_source(lora, token=token)
        before = _bytes(source)
        projection = project_lora(source, basis, check_base_model=check_base_model)
        what = CompressedAdapter(source.name, named, verdict=projection.verdict, bytes_before=before)
        residuals: dict[str, Residual] = {}
        rank, (total, modules) = 0, shares(projection, {}, 0)
        if most and not enough(total, min_energy):
            residuals = _residuals(projection)
            for rank in range(1, min(most, max(len(each.S) for each in residuals.values())) + 1):
                total, modules = shares(projection, residuals, rank)
                if enough(total, min_energy):
                    break
        what = replace(what, total=total, modules=modules, residual_rank=rank)
        if not enough(total, min_energy):
            with_it = f" and {total.residual:.3f} in a residual of rank {rank}" if rank else ""
            more = "a higher residual rank" if most else "a residual (residual=, --residual)"
            return (
                replace(
                    what,
                    refused=(
                        f"the basis keeps {total.kept:.3f} of its energy{with_it}, less than min_energy={min_energy}:"
                        f" allow {more}, lower the threshold, or build the basis from adapters like this one"
                    ),
                ),
                None,
            )
        (task,) = named_tasks([projection])
        kept = {module: residuals[module].factors(rank) for module in residuals} if rank else {}
        task = replace(task, task=replace(task.task, residual=kept))
        entry = pack(task, dtype, energy_kept=total.kept, energy_residual=total.residual)
        return replace(what, bytes_after=entry.entry["bytes"]), entry
    except (SourceError, BadFileError, SubspaceError) as error:
        name = Path(named.partition("@")[0]).name or named
        return CompressedAdapter(name, named, refused=str(error)), None


def _residuals(projection: Projection) -> dict[str, Residual]:
    source, basis, found = projection.source, projection.basis, {}
    for key in source.keys:
        name = str(basis.find(key))
        found[source.aliases.get(key, key)] = residual_of(basis[name], source.factors(key), projection.cores[name])
    return found


def enough(share: Share, min_energy: float) -> bool:
    """Whether basis and residual hold that much. A residual of full rank is all there is, but shares sum to 1 only as
    far as a stored basis is orthonormal: to float32's precision."""
    return share.kept + share.residual >= min_energy - 1e-6


def shares(projection: Projection, residuals: dict[str, Residual], rank: int) -> tuple[Share, dict[str, Share]]:
    """The whole adapter's shares, and every module's: each computed by itself, so that their sum tells whether the
    algebra holds."""
    modules, sums = {}, [0.0, 0.0, 0.0, 0.0]
    for key in projection.source.keys:
        name, core = projection.source.aliases.get(key, key), projection.cores[str(projection.basis.find(key))]
        total = projection.source.norm(key) ** 2
        # stored bases are orthonormal to float32's precision, so a core may seem to hold a little more than there is
        kept = min(total, float(core.square().sum()))
        residual = residuals[name].energy(rank) if name in residuals else 0.0
        lost = residuals[name].lost(rank) if name in residuals else total - kept
        # a module whose update is zero is kept whole
        modules[name] = Share(kept / total, residual / total, lost / total) if total else Share(1.0, 0.0, 0.0)
        sums = [old + new for old, new in zip(sums, (kept, residual, lost, total), strict=True)]
    return Share(*(each / sums[3] for each in sums[:3])), modules


def storage(stored: list[CompressedAdapter], basis: SubspaceBasis, file: Path) -> Storage:
    """Bytes of files as they are on the disk."""
    before, after = sum(each.bytes_before for each in stored), file.stat().st_size
    own = (basis.file or Path(str(basis.location), TENSORS_FILE)).stat().st_size
    one, other = before / len(stored), after / len(stored)
    even = None if other >= one else math.ceil(own / (one - other))
    return Storage(len(stored), before, own, after, own + after, one, other, even)


def _bytes(source: Source) -> int:
    if source.file is not None:
        return source.file.stat().st_size
    keys = [key for sides in source.keys.values() for key in sides.values()]
    return sum(source.read(key).nbytes for key in (*keys, *source.other_keys))


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)

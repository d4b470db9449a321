"""Compress a fleet of LoRAs into one bundle on a basis, and account for the energy kept and the bytes saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._io.occupied import BUNDLE
from .._io.progress import progress_bar
from .._io.warn import warn_caller
from .._moved import moved_name
from ..base_names import said_of_basis
from ..basis import SubspaceBasis
from ..basis.overwriting import Planned, check_target
from ..convert.project import project_lora
from ..convert.projection import Projection
from ..convert.residual import fits_of, residual_in
from ..energy import percent
from ..errors import BadFileError, HubUnavailableError, SourceError, SubspaceError
from ..hub_requests import patient
from ..sources import Source, expand, open_source
from ..tuner.base_record import hold_against
from .compression_report import CompressedAdapter, CompressionReport, Share, reason_of, storage
from .format import BUNDLE_FILE
from .named import named_tasks
from .pack import Packed, pack
from .write import write_bundle


@patient()
def compress_fleet(
    loras: Any,
    basis: SubspaceBasis | str | Path,
    out: str | Path,
    *,
    min_energy: float = 0.5,
    residual: int = 0,
    skip_bad: bool = False,
    check_base_model: bool = True,
    base_model_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    token: str | bool | None = None,
    progress: bool = True,
    allow_bin: bool = False,
    base_model: nn.Module | None = None,
) -> CompressionReport:
    """Project existing LoRAs on a basis and pack them into one bundle.

    An adapter of which the basis keeps less than `min_energy` gets a residual of low rank, fitted together with its
    core as `project_lora` does it. Its rank is the smallest one, up to `residual` and the same in all modules, that
    reaches `min_energy`; where none does, the adapter is refused. The search for it begins at an estimate from above,
    by the singular values of what the projection leaves. Shares in the report and in the bundle's index are of the
    fit: `kept` is what the basis alone keeps, `residual` what core and residual together hold beyond that.

    Loaded again (`load_task`, `extract_task`), such a task has the residual in directions of its own, `extra_rank`: it
    is a subspace adapter, trainable further, and exactly core and residual together; ``as_lora=True`` gives a stock
    LoRA of the same, and ``own_directions=False`` the projection on the basis.

    Args:
        loras: One or several, as `build_basis` takes its sources: folders, files, Hub ids, patterns (``loras/*``),
            text files of such references (``fleet.txt``), Hub collections, state dicts, ``(state_dict, config)`` pairs
            or live PeftModels.
        basis: The basis, its folder or its Hub id; it has to be stored.
        out: The bundle's folder.
        min_energy: Share of ‖ΔW‖², from 0 to 1, that basis and residual together have to hold. Only the task's own
            metric can say whether the *function* survives.
        residual: Highest rank of a residual; 0 keeps none.
        skip_bad: Leave out adapters that are refused or cannot be read, and report them, instead of raising an error
            that lists them all.
        check_base_model: Refuse a LoRA whose config names another base model than the basis.
        base_model_name: The base model that all LoRAs are of, whatever their configs say; held against the basis's.
        dtype: The dtype of stored cores and residuals.
        overwrite: See `bundle_tasks`.
        token: As in huggingface_hub.
        progress: Show a bar where it takes longer than two seconds.
        allow_bin: Take pickled weights too, read with ``weights_only=True``.
        base_model: As in `project_lora`: the model on which adapters that are no LoRA are converted.

    Returns:
        The energy kept per adapter and module, and the bytes before and after.

    Raises:
        SubspaceError: Some adapters are refused and `skip_bad` is off, or all are refused; the basis lives in memory
            only; or a threshold or rank is out of range.
        BasisMismatchError: `base_model` has other weights than the basis has on record.
        OSError: The disk refuses; an earlier bundle stays.
    """
    if not 0 <= min_energy <= 1:
        raise SubspaceError(f"min_energy={min_energy!r}: give a share from 0 to 1.")
    if not isinstance(residual, int) or isinstance(residual, bool) or residual < 0:
        raise SubspaceError(f"residual={residual!r}: give a rank, 0 for none; 1 to 4 are usual.")
    if residual and not min_energy:
        warn_caller(
            f"residual={residual} (--residual) has no effect with min_energy=0 (--min-energy 0), of which no adapter"
            " falls short."
        )
    if not isinstance(basis, SubspaceBasis):
        basis = SubspaceBasis.from_pretrained(basis, token=token)
    if basis.location is None:
        raise SubspaceError(
            "The basis lives in memory only: `basis.save_pretrained(folder)` before a bundle refers to it."
        )
    said_of_basis(basis.base_model, base_model_name)
    if base_model is not None and check_base_model:
        hold_against(basis, base_model)
    packed: dict[str, Packed] = {}
    report: list[CompressedAdapter] = []
    given, bad = expand(loras, token=token)
    report += [CompressedAdapter(each["name"], each["location"], refused=each["reason"]) for each in bad]
    # which names the tasks get is known once they are read
    soon = Planned(BUNDLE, basis.fingerprint)
    check_target(out, soon, overwrite=overwrite, inputs=given, needed=[basis.location])
    how = {"token": token, "allow_bin": allow_bin, "base_model": base_model}
    for lora in progress_bar(given, desc="compressing", unit="adapter", shown=progress):
        what, tasks = _one(lora, basis, min_energy, residual, check_base_model, dtype, how, base_model_name)
        clash = next((task.name for task in tasks if task.name in packed), None)
        if clash is not None:
            other = packed[clash].entry["source"]["location"]
            why = (
                "it is listed twice: list it once"
                if other == what.location
                else f"{other} is called {clash!r} as well: rename its folder"
            )
            what, tasks = replace(what, refused=why), []
        packed |= {task.name: task for task in tasks}
        report.append(what)
    refused = [each for each in report if each.refused]
    if refused and not (skip_bad and packed):
        reasons = "\n  ".join(map(reason_of, refused))
        remedy = "" if skip_bad else " Pass skip_bad=True (--skip-bad) to leave them out."
        raise SubspaceError(f"{len(refused)} of {len(report)} adapters cannot be compressed.{remedy}\n  {reasons}")
    if not packed:
        raise SubspaceError("No adapters were given; there is nothing to compress.")
    folder = Path(out)
    write_bundle(list(packed.values()), folder, dtype, overwrite=overwrite)
    stored = [each for each in report if not each.refused]
    return CompressionReport(str(folder), report, storage(stored, basis, folder / BUNDLE_FILE), min_energy, residual)


def _one(
    lora: Any,
    basis: SubspaceBasis,
    min_energy: float,
    most: int,
    check_base_model: bool,
    dtype: torch.dtype,
    how: Mapping[str, Any],
    base_model_name: str | None,
) -> tuple[CompressedAdapter, list[Packed]]:
    named = str(lora) if isinstance(lora, (str, Path)) else "in memory"
    try:
        source = open_source(lora, **how)
        before = _bytes(source)
        projection = project_lora(source, basis, check_base_model=check_base_model, base_model_name=base_model_name)
        what = CompressedAdapter(
            source.name,
            named,
            verdict=projection.verdict,
            bytes_before=before,
            converted_from=source.converted,
            lost_in_conversion=source.lost,
        )
        total, modules = shares(projection)
        rank = 0
        if most and not enough(total, min_energy):
            rank, projection = _with_residual(projection, min_energy, most)
            total, modules = shares(projection)
        what = replace(what, total=total, modules=modules, residual_rank=rank)
        if not enough(total, min_energy):
            with_it = f" and {percent(total.residual)} in a residual of rank {rank}" if rank else ""
            more = "a higher residual rank" if most else "a residual, residual= (--residual)"
            return (
                replace(
                    what,
                    refused=(
                        f"the basis keeps {percent(total.kept)} of its energy{with_it}, less than"
                        f" min_energy={min_energy}: allow {more}, lower the threshold, or build the basis"
                        " from adapters like this one"
                    ),
                ),
                [],
            )
        packed = []
        for task, of in zip(named_tasks([projection]), list(projection.parts.values()) or [projection], strict=True):
            share = shares(of)[0]
            packed.append(pack(task, dtype, energy_kept=share.kept, energy_residual=share.residual))
        parts = [each.name for each in packed] if len(packed) > 1 else []
        return replace(what, parts=parts, bytes_after=sum(each.entry["bytes"] for each in packed)), packed
    except HubUnavailableError:
        raise  # the adapter may be as good as any
    except (SourceError, BadFileError, SubspaceError) as error:
        name = Path(named.partition("@")[0]).name or named
        return CompressedAdapter(name, named, refused=str(error)), []


def _with_residual(projection: Projection, min_energy: float, most: int) -> tuple[int, Projection]:
    """Return the smallest rank that holds enough, or the highest allowed, and the projection with a residual of it."""
    sources = {name: projection.source.factors(name) for name in projection.places}
    # more than the LoRA's rank has nothing to hold
    highest = max(1, min(most, max(each.rank for each in sources.values())))

    def fitted(rank: int) -> Projection:
        ranks = {name: min(rank, each.rank, *each.shape) for name, each in sources.items()}
        return projection.with_fits(fits_of(projection, ranks))

    rank = min(highest, _estimate(projection, min_energy))
    found = fitted(rank)
    while rank < highest and not enough(shares(found)[0], min_energy):
        rank += 1
        found = fitted(rank)
    while rank > 1 and enough(shares(fewer := fitted(rank - 1))[0], min_energy):
        rank, found = rank - 1, fewer
    return rank, found


def _estimate(projection: Projection, min_energy: float) -> int:
    """Return the rank at which the projection and the leading part of what it leaves hold enough."""
    lost = [residual_in(projection, name).S.square() for name in projection.places]
    total = sum(projection.source.norm(name) ** 2 for name in projection.places)
    for rank in range(1, longest := max(map(len, lost))):
        held = projection.energy_kept + sum(float(each[:rank].sum()) for each in lost) / total
        if held >= min_energy:
            return rank
    return longest


def enough(share: Share, min_energy: float) -> bool:
    """Return whether basis and residual hold that share of the energy.

    With a residual of full rank nothing is lost, but what the basis keeps is known only as far as the stored one is
    orthonormal, which is to float32's precision: hence the tolerance.
    """
    return share.kept + share.residual >= min_energy - 1e-6


def shares(projection: Projection) -> tuple[Share, dict[str, Share]]:
    """Return the shares of the whole adapter's energy, and of every module's.

    Args:
        projection: The projected LoRA; its own directions are the residual.
    """
    energies, added = projection.energy, projection.energy_own
    modules, sums = {}, [0.0, 0.0, 0.0, 0.0]
    for key, place in projection.places.items():
        total = projection.source.norm(key) ** 2
        kept, residual = energies[place], added[place]
        share = Share(kept, residual, 1 - kept - residual)
        modules[projection.source.aliases.get(key, key)] = share
        sums = [
            old + total * new for old, new in zip(sums, (share.kept, share.residual, share.lost, 1.0), strict=True)
        ]
    # an update that is zero is kept whole
    return Share(*(each / sums[3] for each in sums[:3])) if sums[3] else Share(1.0, 0.0, 0.0), modules


def _bytes(source: Source) -> int:
    if source.file is not None:
        return source.file.stat().st_size
    keys = [key for sides in source.keys.values() for key in sides.values()]
    return sum(source.read(key).nbytes for key in (*keys, *source.other_keys))


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)

"""The account of a compressed fleet: the energy kept of each adapter, and the bytes before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._shown import Shown, Table, short, size
from ..basis import SubspaceBasis
from ..basis.files import TENSORS_FILE
from ..energy import mean, percent


@dataclass(frozen=True)
class Share:
    """Shares of the energy ‖ΔW‖² of a module, or of a whole adapter; they sum to 1.

    Attributes:
        kept: In the basis, ‖C‖² / ‖ΔW‖².
        residual: In the low-rank residual that is stored beside it.
        lost: In neither.
    """

    kept: float
    residual: float
    lost: float


@dataclass(frozen=True, repr=False)
class CompressedAdapter(Shown):
    """The outcome for one adapter.

    Attributes:
        name: Its name in the bundle.
        location: The place of the LoRA.
        total: Shares of the whole adapter's energy.
        modules: Module → shares of its energy.
        residual_rank: Rank of the residual that is stored, 0 for none.
        verdict: `Projection.verdict` of the projection without the residual.
        bytes_before: Bytes of its file, or of its tensors if it is in memory.
        bytes_after: Bytes in the bundle, its part of the index aside.
        refused: The reason why it is not in the bundle, or None.
        converted_from: What it was converted from to a LoRA, or None.
        lost_in_conversion: Share of its own update's energy that the conversion lost; the other shares are of what it
            left.
        parts: Of a pipeline's LoRA that adapts several models, the names of its tasks: ``<name>.unet`` and so on.
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
    converted_from: str | None = None
    lost_in_conversion: float = 0.0
    parts: list[str] = field(default_factory=list)

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "name", repr(self.name)
        yield "refused", self.refused
        if self.total is not None:
            yield "energy kept", percent(self.total.kept)
            yield "energy in the residual", percent(self.total.residual) if self.residual_rank else None
        yield "residual rank", self.residual_rank or None
        yield "verdict", self.verdict or None
        yield "size", f"{size(self.bytes_before)} → {size(self.bytes_after)}"
        yield "modules", len(self.modules) or None

    def _shown_table(self) -> Table:
        rows = ((name, percent(share.kept), percent(share.residual)) for name, share in self.modules.items())
        return ("module", "energy kept", "in the residual"), rows, len(self.modules)


@dataclass(frozen=True)
class Storage:
    """Sizes in bytes, of files as they are on the disk.

    Attributes:
        adapters: Number of adapters in the bundle.
        before: Bytes of their files.
        basis: Bytes of the basis's tensors.
        bundle: Bytes of the bundle's file, index included.
        after: Bytes of basis and bundle together.
        per_adapter_before: Mean bytes of an adapter's file.
        per_adapter_after: Mean bytes of an adapter in the bundle, without the basis.
        break_even: Number of such adapters from which on basis and bundle are smaller than the files; None: never.
    """

    adapters: int
    before: int
    basis: int
    bundle: int
    after: int
    per_adapter_before: float
    per_adapter_after: float
    break_even: int | None


@dataclass(frozen=True, repr=False)
class CompressionReport(Shown):
    """The account of `compress_fleet`.

    Attributes:
        folder: The bundle's folder.
        adapters: The outcome for each adapter.
        storage: Bytes before and after.
        min_energy: The argument of that name.
        residual: The argument of that name.
    """

    folder: str
    adapters: list[CompressedAdapter]
    storage: Storage
    min_energy: float
    residual: int

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        stored, refused = self.storage, sum(adapter.refused is not None for adapter in self.adapters)
        kept = [adapter.total.kept for adapter in self.adapters if adapter.total and adapter.refused is None]
        yield "adapters", stored.adapters
        yield "refused", refused or None
        yield "energy kept", f"{percent(mean(kept))} on average, {percent(min(kept))} at least" if kept else None
        yield "bytes", f"{stored.before:,} → {stored.after:,} with the basis ({stored.basis:,})"
        yield "smaller in all", "never" if stored.break_even is None else f"from {stored.break_even:,} adapters on"
        yield "at", short(self.folder)

    def _shown_table(self) -> Table:
        rows = (
            (
                each.name,
                each.refused or (percent(each.total.kept) if each.total else ""),
                each.residual_rank,
                f"{size(each.bytes_before)} → {size(each.bytes_after)}",
            )
            for each in self.adapters
        )
        return ("adapter", "energy kept", "residual rank", "size"), rows, len(self.adapters)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def reason_of(each: CompressedAdapter) -> str:
    """Return where a refused adapter lies, and why it was refused; most reasons name the place themselves."""
    reason = str(each.refused)
    return reason if reason.startswith(f"{each.location}: ") else f"{each.location}: {reason}"


def storage(stored: list[CompressedAdapter], basis: SubspaceBasis, file: Path) -> Storage:
    """Sum up the bytes of the files on the disk.

    Args:
        stored: The adapters that are in the bundle.
        basis: Their basis, stored in a folder.
        file: The bundle's file.
    """
    before, after = sum(each.bytes_before for each in stored), file.stat().st_size
    own = (basis.file or Path(str(basis.location), TENSORS_FILE)).stat().st_size
    one, other = before / len(stored), after / len(stored)
    even = None if other >= one else math.ceil(own / (one - other))
    return Storage(len(stored), before, own, after, own + after, one, other, even)

"""Compute a task's LoRA factors, all of one rank: exact, or truncated by an SVD of nothing larger than a core."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._io.warn import warn_caller
from ..basis import ModuleBasis
from ..errors import SubspaceError
from ..sources import Factors
from ..tasks.read import SavedTask

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, eq=False)
class FactoredTask:
    """A task's LoRA factors.

    Attributes:
        factors: Module → ``(B, A)``, (out, r) and (r, in).
        r: Their rank, the same in all modules: the lower ones are filled up with zeros.
        kept: The energy ‖B A‖² of all modules together.
        total: The energy ‖ΔW‖² of the task; more than `kept` where a lower rank was asked for.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    r: int
    kept: float
    total: float


def factored(read: SavedTask, rank: int | None, pad_to: int | str | None, dtype: torch.dtype) -> FactoredTask:
    """Compute the factors of every module of a task; arguments, warnings and errors are those of `export_lora`."""
    factors, kept, total = {}, 0.0, 0.0
    for name in read.cores:
        B, A, part, whole = task_factors(read, name, rank)
        factors[name] = B, A
        kept, total = kept + part, total + whole
    most = max(B.shape[1] for B, _ in factors.values())
    if rank is not None and rank > most:
        warn_caller(
            f"export_lora: rank={rank} (--rank {rank}) has no effect: the task's rank is {most}. pad_to="
            " (--pad-to) fills up to a higher one."
        )
    r = _padded(most, pad_to)
    filled = {}
    for name, (B, A) in factors.items():
        fill = r - B.shape[1]
        B, A = torch.nn.functional.pad(B, (0, fill)), torch.nn.functional.pad(A, (0, 0, 0, fill))
        filled[name] = B.to(dtype), A.to(dtype)
    return FactoredTask(filled, r, kept, total)


def lora_factors(
    module: ModuleBasis, core: torch.Tensor, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute LoRA factors of ``U core V``, or of its best approximation of a given rank.

    Args:
        module: The basis of the module, with orthonormal U and V.
        core: (k_out, k_in), in units of ΔW.
        rank: The rank of the approximation; None is exact.

    Returns:
        ``(B, A)``, (out, r) and (r, in) float64.
    """
    U, V = module.U.double(), module.V.double()
    core = core.double()
    if rank is not None and rank < min(core.shape):
        P, S, Th = torch.linalg.svd(core, full_matrices=False)
        return U @ (P[:, :rank] * S[:rank]), Th[:rank] @ V
    return (U @ core, V) if core.shape[1] <= core.shape[0] else (U, core @ V)


def task_factors(
    read: SavedTask, name: str, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Compute LoRA factors of one module of a task, own directions and all, or of its best approximation.

    The factors of the core and those of the own directions stand side by side: rank k + φ, exact. A lower one is
    reached by thin QRs of both sides and an SVD of (k + φ) × (k + φ).

    Args:
        read: The task.
        name: The module.
        rank: The rank of the approximation; None is exact.

    Returns:
        ``B`` (out, r) and ``A`` (r, in) float64; the energy ‖B A‖², and that of the whole update.
    """
    core = read.cores[name]
    if name not in read.own:
        squares = torch.linalg.svdvals(core).square()
        return *lora_factors(read.modules[name], core, rank), float(squares[:rank].sum()), float(squares.sum())
    pairs = lora_factors(read.modules[name], core), read.own[name]
    B, A = (torch.cat([pair[side].double() for pair in pairs], 1 - side) for side in (0, 1))
    if rank is None or rank >= B.shape[1]:
        energy = Factors(B, A).norm() ** 2
        return B, A, energy, energy
    P, S, T = Factors(B, A).canonical()
    return P[:, :rank] * S[:rank], T[:, :rank].T, float(S[:rank].square().sum()), float(S.square().sum())


def _padded(rank: int, pad_to: int | str | None) -> int:
    if pad_to is None:
        return rank
    if pad_to == "vllm":
        fits = [r for r in VLLM_RANKS if r >= rank]
        if not fits:
            raise SubspaceError(
                f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this task needs {rank}: pass rank= as well."
            )
        return fits[0]
    if not isinstance(pad_to, int) or isinstance(pad_to, bool) or pad_to < rank:
        raise SubspaceError(
            f"pad_to={pad_to!r}: the task has rank {rank}; give at least that, or 'vllm', or a smaller rank=."
        )
    return pad_to

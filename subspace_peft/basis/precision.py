"""Bases stored in fewer bits: rounding U and V, making them orthonormal again, and the energy that this loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .._moved import moved_name
from ..errors import BadFileError, SubspaceError
from .layout import SCALES, SIDES, STORED_AS, TOLERANCE, digest_of, not_orthonormal, stored_problem
from .module import FLOAT_DTYPES, ModuleBasis, facts_of, tensor_bytes
from .module_store import ModuleStore

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
KINDS = {**FLOAT_DTYPES, torch.int8: "I8"}  # in safetensors' words
STEPS = 127


class RoundedModules(ModuleStore):
    """Modules held in memory as they are stored, each turned back into float32 when it is asked for.

    Args:
        precision: what U and V are stored as, one of `PRECISIONS`.
        modules: module name → its tensors as a file holds them, by name.
    """

    def __init__(self, precision: str, modules: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self.precision: str = precision
        self.entries = modules

    def __getitem__(self, name: str) -> ModuleBasis:
        return restored(self.entries[name], self.precision, name)

    def shapes(self) -> dict[str, dict[str, int]]:
        """Return the sizes of the stored tensors; no module is made for it."""
        return {
            name: {
                "out": each["U"].shape[0],
                "in": each["V"].shape[1],
                "k_out": each["U"].shape[1],
                "k_in": each["V"].shape[0],
                "directions": len(each["G"]) if "G" in each else 0,
            }
            for name, each in self.entries.items()
        }

    def stored(self, name: str) -> Mapping[str, torch.Tensor]:
        """Return a module's tensors as a file holds them, by name."""
        return self.entries[name]

    def held(self, name: str) -> Mapping[str, torch.Tensor]:
        """Return a module's tensors as a file holds them, by name."""
        return self.entries[name]

    def digests(self) -> dict[str, str]:
        """Return the modules' digests, of their tensors as stored."""
        return {name: stored_digest(tensors) for name, tensors in self.entries.items()}


def reduced(module: ModuleBasis, precision: str, name: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return a module's tensors as they are stored, and the loss.

    U and V are rounded: to the dtype, or to int8 with one float32 scale per direction (its largest entry becomes 127).
    Tensors of a core's size stay float32. M, G and the sources' cores are turned to the directions that come back, so
    that they stay the least-squares optimum there.

    Args:
        module: the module, float32 or wider.
        precision: ``bfloat16``, ``float16`` or ``int8``.
        name: the module's name, for messages.

    Returns:
        The tensors by their names in the file, and the loss:

        - ``orthonormality``: largest entry of |UᵀU − 1| and |VVᵀ − 1| as stored;
        - ``energy_lost``: share of the energy of cores of RMS `core_rms` (of equal entries where there is none) that
          the stored directions do not keep;
        - ``energy_lost_at_most``: the same for any update in the basis.

    Raises:
        SubspaceError: rounding leaves U or V too far from orthonormal; names the module.
    """
    stored: dict[str, torch.Tensor] = {}
    for side in SIDES:
        directions = getattr(module, side).float()
        if precision == "int8":
            stored[side], stored[SCALES[side]] = _to_int8(directions, dim=0 if side == "U" else 1)
        else:
            stored[side] = directions.to(PRECISIONS[precision])
    new, off = {}, 0.0
    for side in SIDES:
        new[side], error = _orthonormal(stored, side)
        off = max(off, error)
    if not off <= TOLERANCE[STORED_AS[precision]]:
        raise SubspaceError(
            f"Module {name!r}: stored as {precision} its directions would be off orthonormal by {off:.2g} (at most"
            f" {TOLERANCE[STORED_AS[precision]]:g}): a few of their entries are far larger than the others. Choose"
            " bfloat16 or float32."
        )
    # T_u = U'ᵀ U (k_out, k_out) and T_v = V V'ᵀ (k_in, k_in), float64: the old directions seen in the new ones. A core
    # C becomes T_u C T_v, its projection on the new basis.
    left = new["U"].T.double() @ module.U.double()
    right = module.V.double() @ new["V"].T.double()
    # With independent entries of RMS ρ, E‖T_u C T_v‖² = Σ_ij ρ_ij² ‖T_u e_i‖² ‖e_jᵀ T_v‖²; these are norms of T_u's
    # columns and of T_v's rows. Any core keeps at least σ_min(T_u)² σ_min(T_v)² of its energy.
    rms = torch.ones(module.k_out, module.k_in) if module.core_rms is None else module.core_rms
    energy = rms.double().square()
    kept = left.square().sum(0) @ energy @ right.square().sum(1)
    worst = [float(torch.linalg.svdvals(each)[-1]) ** 2 for each in (left, right)]
    for key in ("M", "G", "cores"):
        if (value := getattr(module, key)) is not None:
            turned = left @ value.double() @ right
            if key == "G":
                # frozen directions have unit norm, which a projection shrinks
                norms = turned.flatten(1).norm(dim=1)[:, None, None]
                turned = turned / norms.clamp_min(1e-300)
            stored[key] = turned.float().contiguous()
    for key in ("core_rms", "spectrum_out", "spectrum_in"):
        if (value := getattr(module, key)) is not None:
            stored[key] = value.float()
    return stored, {
        "orthonormality": off,
        "energy_lost": max(0.0, 1 - float(kept / energy.sum().clamp_min(1e-300))),
        "energy_lost_at_most": max(0.0, 1 - worst[0] * worst[1]),
    }


def restored(stored: Mapping[str, torch.Tensor], precision: str, name: str) -> ModuleBasis:
    """Return the module that stored tensors stand for: float32, with U and V made orthonormal again.

    ``U (UᵀU)^(−1/2)`` is the orthonormal matrix nearest to U (Löwdin 1950; Higham 1986, polar decomposition). Unlike
    QR it favours no direction over another. It is computed in float64 from the stored bytes, so it is the same every
    time on one platform.

    Args:
        stored: the tensors by their names in the file.
        precision: what U and V are stored as.
        name: the module's name, for messages.

    Raises:
        BadFileError: dtypes or scales are not those of this precision, or the directions are further from orthonormal
            than its rounding explains; names the module.
    """
    problem = stored_problem({key: facts_of(each) for key, each in stored.items()}, precision)
    if problem is not None:
        raise BadFileError(f"module {name!r}: {problem}. The file is damaged: fetch or build it again.")
    sides = {}
    for side in SIDES:
        sides[side], off = _orthonormal(stored, side)
        if not off <= TOLERANCE[STORED_AS[precision]]:
            raise BadFileError(not_orthonormal(name, side, off, precision))
    others = {key: value for key, value in stored.items() if key not in (*SIDES, *SCALES.values())}
    return ModuleBasis(**sides, **others)


def stored_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 (hex) of a module as it is stored: `ModuleBasis.digest` for tensors that may be int8 too."""
    return digest_of(
        {key: (KINDS[value.dtype], tuple(value.shape), tensor_bytes(value)) for key, value in tensors.items()}
    )


def _to_int8(directions: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round directions, which lie along `dim`, to −127 … 127, and return them with their scales (k,) float32."""
    scale = directions.abs().amax(dim).clamp_min(1e-30) / STEPS
    steps = directions / scale.unsqueeze(dim)
    return steps.round().clamp(-STEPS, STEPS).to(torch.int8), scale


def _orthonormal(stored: Mapping[str, torch.Tensor], side: str) -> tuple[torch.Tensor, float]:
    """Return the nearest orthonormal directions, float32, and how far the stored ones are from orthonormal.

    That is the largest entry of |Gram matrix − 1|, and infinite where the directions are linearly dependent.
    """
    columns = stored[side].double()
    scale = stored.get(SCALES[side])
    if scale is not None:
        columns = columns * (scale.double() if side == "U" else scale.double()[:, None])
    columns = columns if side == "U" else columns.T  # (n, k) of either side
    gram = columns.T @ columns
    off = float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max())
    # UᵀU = Q diag(λ) Qᵀ gives (UᵀU)^(−1/2) = Q diag(λ^(−1/2)) Qᵀ; one far off, or with NaN, is not decomposed
    values, vectors = torch.linalg.eigh(gram) if off < 1 else (gram.new_zeros(1), gram)
    if float(values[0]) <= 0:
        return columns.float(), float("inf")
    made = (columns @ (vectors * values.rsqrt()) @ vectors.T).float()
    return (made if side == "U" else made.T).contiguous(), off


def summary(precision: str, fingerprint: str, lost: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return a basis's ``info["precision"]``: the mean of `energy_lost` over modules, the worst of the others.

    Args:
        precision: what U and V are stored as.
        fingerprint: that of the float32 basis.
        lost: per module, the loss that `reduced` returns.
    """
    each = list(lost.values())
    return {
        "stored": precision,
        "of": fingerprint,
        "energy_lost": sum(one["energy_lost"] for one in each) / len(each),
        "energy_lost_at_most": max(one["energy_lost_at_most"] for one in each),
        "orthonormality": max(one["orthonormality"] for one in each),
    }


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)

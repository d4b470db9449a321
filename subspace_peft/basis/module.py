"""The shared basis of one target module: two orthonormal matrices and what belongs to them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._shown import Shown, Table
from ..errors import BasisMismatchError, SubspaceError
from .layout import TENSOR_NAMES as TENSOR_NAMES  # its place in earlier versions
from .layout import TensorFacts, check_tensors, digest_of
from .layout import combine_digests as combine_digests

FLOAT_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, eq=False, repr=False)
class ModuleBasis(Shown):
    """The frozen part of ``ΔW = s · U (g·M/s + C) V`` for one module.

    Attributes:
        U: (out, k_out) float, orthonormal columns: the output basis.
        V: (k_in, in) float, orthonormal rows: the input basis.
        M: (k_out, k_in) float or None: the fleet's mean core, in units of ΔW.
        G: (m, k_out, k_in) float or None: frozen directions of unit Frobenius norm for the `directions` coefficients;
            zero where a truncation left nothing of one.
        core_rms: (k_out, k_in) float or None: root mean square of the sources' cores, entry by entry.
        cores: (N, k_out, k_in) float or None: the sources' own cores, in the order of the basis's list of sources.
        spectrum_out: (n,) float or None: eigenvalues of the output second moment, descending, as fractions of the
            fleet's (weighted) energy.
        spectrum_in: (n,) float or None: the same for the input side.
    """

    U: torch.Tensor
    V: torch.Tensor
    M: torch.Tensor | None = None
    G: torch.Tensor | None = None
    core_rms: torch.Tensor | None = None
    cores: torch.Tensor | None = None
    spectrum_out: torch.Tensor | None = None
    spectrum_in: torch.Tensor | None = None

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "out × in", f"{self.out_features} × {self.in_features}"
        yield "k", f"{self.k_out}" if self.k_out == self.k_in else f"{self.k_out} out, {self.k_in} in"
        yield "dtype", str(self.U.dtype).removeprefix("torch.")
        yield "device", None if self.U.device.type == "cpu" else self.U.device
        yield "with", ", ".join(name for name in self.tensors() if name not in "UV") or None

    def _shown_table(self) -> Table:
        tensors = self.tensors()
        rows = (
            (name, " × ".join(map(str, value.shape)), str(value.dtype).removeprefix("torch."))
            for name, value in tensors.items()
        )
        return ("tensor", "shape", "dtype"), rows, len(tensors)

    @property
    def k_out(self) -> int:
        """Number of output directions."""
        return self.U.shape[1]

    @property
    def k_in(self) -> int:
        """Number of input directions."""
        return self.V.shape[0]

    @property
    def out_features(self) -> int:
        """Table of the module's weight."""
        return self.U.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the module's weight."""
        return self.V.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are present, by name."""
        return {name: value for name in TENSOR_NAMES if (value := getattr(self, name)) is not None}

    def check(self, name: str) -> None:
        """Check that shapes agree, dtypes are floats and values finite.

        Args:
            name: the module's name, for messages.

        Raises:
            SubspaceError: they are not; names the module and the tensor.
        """
        check_tensors(name, {key: facts_of(value) for key, value in self.tensors().items()})

    def digest(self) -> str:
        """Return the sha256 (hex) over names, dtypes, shapes and bytes of the tensors.

        It is a function of bytes, not of the mathematics: equal bases that were computed on other hardware differ.
        """
        found = {key: (FLOAT_DTYPES[each.dtype], tuple(each.shape), each) for key, each in self.tensors().items()}
        return digest_of({key: (kind, shape, tensor_bytes(each)) for key, (kind, shape, each) in found.items()})

    def project(self, delta: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the core ``C = Uᵀ ΔW Vᵀ`` of an update, the least-squares optimum for orthonormal U and V.

        Args:
            delta: ΔW as one tensor (out, in), or in factored form ``(B, A)`` with B (out, r) and A (r, in).

        Returns:
            C (k_out, k_in), in the wider of the dtypes involved.

        Raises:
            BasisMismatchError: the update's shape is not (out, in).
        """
        B, A = delta if isinstance(delta, tuple) else (delta, None)
        shape = (B.shape[0], A.shape[1]) if A is not None else tuple(B.shape)
        if shape != (self.out_features, self.in_features):
            raise BasisMismatchError(
                f"Cannot project an update of shape {shape} on a basis for {(self.out_features, self.in_features)}: "
                "they belong to different modules or to different base models."
            )
        dtype = torch.promote_types(B.dtype, self.U.dtype)
        # both products go from the outside in: nothing of size out × in is formed from factors
        left = self.U.to(dtype).T @ B.to(dtype)
        if A is None:
            return left @ self.V.to(dtype).T
        return left @ (A.to(dtype) @ self.V.to(dtype).T)

    def reconstruct(self, core: torch.Tensor) -> torch.Tensor:
        """Return the update ``ΔW = U C V`` (out, in) that a core (k_out, k_in) stands for.

        Raises:
            BasisMismatchError: the core has another shape.
        """
        if tuple(core.shape) != (self.k_out, self.k_in):
            raise BasisMismatchError(
                f"Cannot reconstruct from a core of shape {tuple(core.shape)}: this basis has cores of shape "
                f"{(self.k_out, self.k_in)}. The coefficients belong to another basis."
            )
        dtype = torch.promote_types(core.dtype, self.U.dtype)
        return (self.U.to(dtype) @ core.to(dtype)) @ self.V.to(dtype)

    def truncate(self, k_out: int, k_in: int) -> ModuleBasis:
        """Return the leading `k_out` and `k_in` directions, with M, G, core_rms and cores cut alike.

        Spectra are kept whole: they are of the fleet, not of the basis.

        Raises:
            SubspaceError: a size is below 1.
        """
        if k_out < 1 or k_in < 1:
            raise SubspaceError(f"Cannot truncate to k_out={k_out}, k_in={k_in}: both must be at least 1.")
        a, b = min(k_out, self.k_out), min(k_in, self.k_in)
        G = None
        if self.G is not None:
            cut = self.G[:, :a, :b]
            # directions whose weight lay outside the kept block shrink and are made unit-norm again; those of which
            # nothing is left stay, as zeros, so that the number of coefficients does not depend on the values in G
            norms = cut.flatten(1).norm(dim=1)[:, None, None]
            lost = self.G[:, a:].flatten(1).any(1) | self.G[:, :, b:].flatten(1).any(1)
            unit = torch.where(norms > 1e-6, cut / norms.clamp_min(1e-6), torch.zeros_like(cut))
            # one that loses nothing stays bit for bit: a task that keeps its size on a grown basis stays what it was
            G = torch.where(lost[:, None, None], unit, cut).contiguous()
        return replace(
            self,
            U=self.U[:, :a].contiguous(),
            V=self.V[:b].contiguous(),
            M=None if self.M is None else self.M[:a, :b].contiguous(),
            core_rms=None if self.core_rms is None else self.core_rms[:a, :b].contiguous(),
            cores=None if self.cores is None else self.cores[:, :a, :b].contiguous(),
            G=G,
        )


def module_shape(module: ModuleBasis) -> dict[str, int]:
    """Return a module's sizes ``{"out", "in", "k_out", "k_in", "directions"}``; ``directions`` is the length of G."""
    return {
        "out": module.out_features,
        "in": module.in_features,
        "k_out": module.k_out,
        "k_in": module.k_in,
        "directions": 0 if module.G is None else module.G.shape[0],
    }


def tensor_sha256(value: torch.Tensor) -> str:
    """Return the sha256 (hex) of one tensor's bytes."""
    return hashlib.sha256(tensor_bytes(value)).hexdigest()


def tensor_bytes(value: torch.Tensor) -> bytes:
    """Return a tensor's values in row-major order, as safetensors stores them."""
    # flat first: a matrix of one column counts as contiguous whatever its stride, and then cannot be viewed as bytes
    return value.detach().cpu().contiguous().flatten().clone().view(torch.uint8).numpy().tobytes()


def facts_of(value: torch.Tensor) -> TensorFacts:
    """Return what checks ask of a tensor; one without data, on the meta device, passes for finite."""
    return TensorFacts(
        FLOAT_DTYPES.get(value.dtype) or {torch.int8: "I8"}.get(value.dtype, str(value.dtype)),
        tuple(value.shape),
        lambda: value.device.type == "meta" or bool(torch.isfinite(value).all()),
        lambda: bool((value > 0).all()),
    )


def fix_signs(directions: torch.Tensor) -> torch.Tensor:
    """Return (n, k) with the sign of each column such that its entry of largest magnitude is positive.

    Singular vectors have no sign of their own; this one makes the bytes, and so the fingerprint, reproducible.
    """
    if directions.numel() == 0:
        return directions
    top = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return directions * torch.where(top < 0, -1.0, 1.0).to(directions.dtype)

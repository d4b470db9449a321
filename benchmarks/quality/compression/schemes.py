"""Schemes: ways to store a fleet, each a function from a fleet and settings to what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import alone, in_basis, joint_diagonal, peers
from .members import Fleet
from .storing import Compressed

FAMILIES = {
    "LoRA": alone.as_trained,
    "SVD": alone.truncated,
    "cores": in_basis.cores,
    "cores + own": in_basis.with_own,
    "cores + own to energy": in_basis.to_energy,
    "clusters": in_basis.clustered,
    "given basis": in_basis.given,
    "JD-Full, random start": joint_diagonal.full,
    "JD-Diag": joint_diagonal.diagonal,
    "vlora-dev": peers.vlora,
    "lorashare": peers.lorashare,
}


@dataclass(frozen=True)
class Scheme:
    """A way to store a fleet.

    Attributes:
        family: of `FAMILIES`.
        settings: of its function, JSON values.
    """

    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def compress(self, fleet: Fleet) -> Compressed:
        """Store the fleet so."""
        return FAMILIES[self.family](fleet, **self.settings)


def _each(family: str, *many: Mapping[str, Any]) -> list[Scheme]:
    return [Scheme(family, settings) for settings in many]


def _stored(basis: str, core: str) -> dict[str, str]:
    return {"basis": basis, "core": core}


FULL, WHOLE, FOURTH = _stored("float32", "float32"), _stored("int8", "int8"), _stored("int8", "int4")
SIZES = (8, 16, 24, 32, 48, 64, 80)


def alone_schemes() -> list[Scheme]:
    """Return the schemes that look at one adapter at a time."""
    return [
        *_each("LoRA", *({"kind": kind} for kind in ("bfloat16", "int8", "int4"))),
        *_each("SVD", *({"rank": r, "kind": kind} for r in (1, 2, 3, 4, 6) for kind in ("float32", "int8", "int4"))),
        *_each("SVD", *({"rank": 8, "kind": kind} for kind in ("int8", "int4"))),
    ]


def shared_schemes(most: int) -> list[Scheme]:
    """Return the schemes on one basis, or a few, of a fleet that spans `most` directions."""
    sizes = [k for k in (*SIZES, 96, 128, 192) if k < most]
    some = [k for k in (16, 32, 64) if k < most]
    found = [
        *_each("cores", *({"k": k, **how} for k in sizes for how in (FULL, WHOLE, FOURTH))),
        *_each("cores", {"k": min(most, 256), **FULL}, {"k": 32, **_stored("bfloat16", "bfloat16")}),
        *_each("cores", *({"k": k, "builder": "random", **FULL} for k in some)),
        *_each("cores", *({"k": k, "builder": "eigenlora", **FULL} for k in some)),
        *_each("cores", *({"budget": budget, **FULL} for budget in (1024, 4096, 9216))),
        *_each(
            "cores + own",
            *({"k": k, "own": own, **how} for k in (8, 16, 32) for own in (1, 2, 4) for how in (FULL, WHOLE, FOURTH)),
        ),
        *_each(
            "cores + own to energy",
            *({"k": k, "energy": energy, **WHOLE} for k in (16, 32) for energy in (0.8, 0.9, 0.95)),
        ),
        *_each("clusters", *({"k": k, "clusters": n, **FULL} for k in (16, 32) for n in (2, 4))),
        *_each("JD-Full, random start", *({"k": k} for k in some)),
        *_each("JD-Diag", *({"k": k} for k in (*some, min(most, 96)))),
    ]
    return found


def peer_schemes() -> list[Scheme]:
    """Return those of other packages, with so many numbers per adapter, all that is shared counted in."""
    counts = (2100, 4200, 8400, 16800)
    return [scheme for name in ("vlora-dev", "lorashare") for scheme in _each(name, *({"numbers": n} for n in counts))]


def every(most: int) -> list[Scheme]:
    """Return all schemes for a fleet of LoRAs that spans `most` directions per side."""
    return [*alone_schemes(), *shared_schemes(most), *peer_schemes()]


def several(most: int) -> list[Scheme]:
    """Return the chief schemes of `every`: for more seeds, and for fleets of many adapters, where each costs more."""
    sizes = [k for k in (8, 16, 24, 32, 48, 64, 96) if k < most]
    return [
        *_each("LoRA", {"kind": "int8"}, {"kind": "int4"}),
        *_each("SVD", *({"rank": r, "kind": kind} for r in (1, 2, 4) for kind in ("float32", "int4"))),
        *_each("cores", *({"k": k, **how} for k in sizes for how in (FULL, FOURTH))),
        *_each("cores", *({"k": k, "builder": "random", **FULL} for k in (32,))),
        *_each("cores + own", *({"k": k, "own": own, **FOURTH} for k in (8, 16, 32) for own in (1, 2))),
        *_each("clusters", *({"k": k, "clusters": 4, **FULL} for k in (16, 32))),
        *_each("JD-Diag", *({"k": k} for k in (32, 96) if k <= most)),
        *_each("vlora-dev", *({"numbers": n} for n in (4200, 8400))),
        *_each("lorashare", *({"numbers": n} for n in (4200, 8400))),
    ]


def few() -> list[Scheme]:
    """Return a dozen schemes, for a fleet of hundreds."""
    return [
        *_each("LoRA", {"kind": "int8"}, {"kind": "int4"}),
        *_each("SVD", *({"rank": r, "kind": "int4"} for r in (1, 2, 4))),
        *_each("cores", *({"k": k, **how} for k in (16, 32, 64) for how in (FULL, FOURTH))),
        *_each("cores + own", {"k": 32, "own": 1, **FOURTH}),
        *_each("clusters", {"k": 16, "clusters": 6, **FULL}),
    ]


def brief(*, shared_inputs: bool = False) -> list[Scheme]:
    """Return few schemes, for fleets that are held against each other.

    Args:
        shared_inputs: whether the adapters' inputs lie in few directions, so that `k_in` is worth less than `k`.
    """
    inner = (None, 8, 16) if shared_inputs else (None,)
    return [
        *_each("LoRA", {"kind": "float32"}, {"kind": "int8"}, {"kind": "int4"}),
        *_each("SVD", *({"rank": r, "kind": "int4"} for r in (1, 2, 3, 4, 6))),
        *_each(
            "cores",
            *(
                {"k": k, **({} if n is None else {"k_in": n}), **WHOLE}
                for k in (8, 16, 32, 48, 64)
                for n in inner
                if n is None or n < k
            ),
        ),
    ]


def in_given() -> list[Scheme]:
    """Return those of a fleet that was trained in one basis."""
    kinds = (("float32", "float32"), ("int8", "int8"), ("int8", "int4"))
    return _each("given basis", *(_stored(*each) for each in kinds))

"""What the page computes another k's figures from: sizes of what is stored, and the command that builds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..basis import SubspaceBasis
from ..basis.precision import PRECISIONS
from ..builders.fleet import Fleet
from .commands import building_command, built_alike
from .curves import MOST
from .measure_fleet import FleetMeasurement, in_order

FLOAT32 = 4


def choices_of(basis: SubspaceBasis, fleet: Fleet, measured: FleetMeasurement) -> dict[str, Any]:
    """Return the sizes, JSON-ready.

    That is: ``modules``, per module of the basis its ``shape`` (out, in), its ``size`` (k_out, k_in), the ``spans`` of
    the fleet (at most, where it was not measured), and ``directions`` G; ``bytes_of_entry`` of U and V and
    ``bytes_of_direction`` of their scales; ``adapters``; ``bytes_of_loras``, theirs together; ``k``, the basis's
    largest one; ``k_most``, up to which the curves go; ``same``, whether the basis was built of this fleet as another
    k of it would be; and ``begin`` and ``out`` of the command that builds one.

    Args:
        basis: the reported one.
        fleet: all of it.
        measured: of a sample.
    """
    precision = basis.precision or "float32"
    modules = {}
    names = {found: name for name in fleet.modules if (found := basis.find(name)) is not None}
    for key, shape in sorted(basis.shapes().items(), key=lambda each: in_order(each[0])):
        name = names.get(key, key)
        curve = measured.curves.get(name)
        columns = sum(source.shape(name)[2] for source in fleet.sources if name in source.keys)
        spans = curve["spans"] if curve else [min(columns, shape["out"]), min(columns, shape["in"])]
        modules[name] = {
            "shape": [shape["out"], shape["in"]],
            "size": [shape["k_out"], shape["k_in"]],
            "spans": spans,
            "directions": shape.get("directions") or 0,
        }
    return {
        "modules": modules,
        "bytes_of_entry": PRECISIONS[precision].itemsize,
        "bytes_of_direction": FLOAT32 if PRECISIONS[precision] == torch.int8 else 0,
        "adapters": len(fleet.sources),
        "bytes_of_loras": sum(bytes_of_lora(fleet, i, basis) for i in range(len(fleet.sources))),
        "k": max(max(each["size"]) for each in modules.values()),
        "k_most": min(MOST, max(max(each["spans"]) for each in modules.values())),
        "same": built_alike(basis, fleet),
        **building_command(basis, fleet),
    }


def stored(choices: Mapping[str, Any], k: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Return the bytes of a basis's tensors without the sources' cores, and those of a task in it.

    Args:
        choices: of `choices_of`.
        k: per module k_out and k_in.
    """
    basis = task = 0
    for name, module in choices["modules"].items():
        (out, inner), (a, b) = module["shape"], k[name]
        core = FLOAT32 * a * b
        task += core
        basis += choices["bytes_of_entry"] * (out * a + inner * b) + choices["bytes_of_direction"] * (a + b)
        # the mean core and the root mean square of the cores, the spectra
        basis += (2 + module["directions"]) * core + FLOAT32 * sum(module["spans"])
    return basis, task


def bytes_of_lora(fleet: Fleet, i: int, basis: SubspaceBasis) -> int:
    """Return the bytes of a source's factors, as they are stored, of modules that the basis has."""
    source = fleet.sources[i]
    width = 4 if "float32" in source.dtypes else 8 if "float64" in source.dtypes else 2
    shapes = [source.shape(name) for name in source.keys if basis.find(name) is not None]
    return width * sum(rank * (out + inner) for out, inner, rank in shapes)

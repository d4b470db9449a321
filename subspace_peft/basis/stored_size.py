"""The bytes of a basis's file, before there is one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .precision import KINDS, PRECISIONS, SCALES

SHA256 = 64  # characters of the fingerprint in the file's metadata


@dataclass(frozen=True)
class ModuleSize:
    """The sizes of what is stored of a module.

    Attributes:
        out: rows of the weight.
        inner: its columns.
        k_out: output directions.
        k_in: input directions.
        cores: how many tensors of a core's size are stored, as a module's U and V have their own shapes: name → how
            many lie in that tensor, None for a single core.
        spectra: name → length.
    """

    out: int
    inner: int
    k_out: int
    k_in: int
    cores: Mapping[str, int | None]
    spectra: Mapping[str, int]


def stored_bytes(modules: Mapping[str, ModuleSize], precision: str = "float32") -> int:
    """Return the bytes of ``basis.safetensors``: the tensors, and the header that names them.

    Args:
        modules: module → sizes.
        precision: what U and V are stored as.
    """
    header: dict[str, object] = {"__metadata__": {"fingerprint": "0" * SHA256}}
    end = 0
    for name, size in modules.items():
        for key, dtype, shape in _tensors(size, precision):
            begin, end = end, end + dtype.itemsize * int(torch.Size(shape).numel())
            header[f"{name}.{key}"] = {"dtype": KINDS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"))
    # safetensors: eight bytes that say how long the header is, and the header filled up to a multiple of eight
    return 8 + (len(text.encode()) + 7) // 8 * 8 + end


def _tensors(size: ModuleSize, precision: str) -> Iterable[tuple[str, torch.dtype, tuple[int, ...]]]:
    dtype = PRECISIONS[precision]
    yield "U", dtype, (size.out, size.k_out)
    yield "V", dtype, (size.k_in, size.inner)
    if precision == "int8":
        yield SCALES["U"], torch.float32, (size.k_out,)
        yield SCALES["V"], torch.float32, (size.k_in,)
    core = (size.k_out, size.k_in)
    for key, count in size.cores.items():
        yield key, torch.float32, core if count is None else (count, *core)
    for key, length in size.spectra.items():
        yield key, torch.float32, (length,)

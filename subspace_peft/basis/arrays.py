"""A stored basis's tensors in numpy: read byte range by byte range, verified, and measured, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from ..errors import BadFileError, SubspaceError
from .layout import (
    FLOATS,
    SCALES,
    SIDES,
    STORED_AS,
    TENSOR_NAMES,
    TOLERANCE,
    TensorFacts,
    check_tensors,
    digest_of,
    not_orthonormal,
    stored_problem,
)
from .stored import StoredBasis, check_digest, check_sides

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "i1"}
Raw = tuple[str, tuple[int, ...], bytes]  # dtype in safetensors' words, shape, bytes


class StoredReader:
    """Reads the modules of a stored basis, each verified.

    Args:
        stored: the basis's folder, opened.
    """

    def __init__(self, stored: StoredBasis) -> None:
        self.stored = stored
        self._ranges: dict[str, tuple[str, tuple[int, ...], int, int]] | None = None

    def raw(self, name: str) -> dict[str, Raw]:
        """Return a module's tensors as they are in the file, by name.

        Raises:
            BadFileError: the file cannot be read, is not what the config says, or holds values that no basis has.
        """
        stored, file = self.stored, self.stored.file
        names = TENSOR_NAMES if stored.precision is None else (*TENSOR_NAMES, *SCALES.values())
        try:
            self._ranges = _ranges(file) if self._ranges is None else self._ranges
            found = {key: self._ranges[f"{name}.{key}"] for key in names if f"{name}.{key}" in self._ranges}
            raw = {}
            with open(file, "rb") as stream:
                for key, (kind, shape, start, stop) in found.items():
                    stream.seek(start)
                    raw[key] = (kind, shape, stream.read(stop - start))
                    if len(raw[key][2]) != stop - start:
                        raise OSError(f"it ends before byte {stop:,}")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise BadFileError(
                f"{file}: cannot be read ({error}). The file is damaged or incomplete: fetch or build it again."
            ) from error
        check_sides(file, name, raw)
        try:
            check_raw(name, raw, stored.precision)
        except SubspaceError as error:
            raise BadFileError(f"{file}: {error}") from None
        check_digest(file, name, digest_of(raw), stored.entries)
        return raw

    def verify(self) -> Iterator[str]:
        """Read and verify every module; yield its name."""
        for name in self.stored.entries:
            self.raw(name)
            yield name


def check_raw(name: str, raw: Mapping[str, Raw], precision: str | None) -> None:
    """Check a module's tensors as they are stored: dtypes, shapes, finite values, in a lower precision directions too.

    Args:
        name: the module's name, for messages.
        raw: its tensors by name.
        precision: what U and V are stored as, where it is not what they are given as.

    Raises:
        SubspaceError: they are not what a basis has; names the module and the tensor.
    """
    facts = {key: _facts(each) for key, each in raw.items()}
    if precision is None:
        check_tensors(name, facts)
        return
    if problem := stored_problem(facts, precision):
        raise BadFileError(f"module {name!r}: {problem}. The file is damaged: fetch or build it again.")
    for side in SIDES:
        off = orthonormality(columns_of(raw, side))
        if not off <= TOLERANCE[STORED_AS[precision]]:
            raise BadFileError(not_orthonormal(name, side, off, precision))
    # as the module that they stand for, whose U and V are float32
    check_tensors(
        name,
        {key: each for key, each in facts.items() if key not in (*SIDES, *SCALES.values())}
        | {side: TensorFacts("F32", facts[side].shape, lambda: True) for side in SIDES},
    )


def array_of(raw: Raw) -> np.ndarray[Any, Any]:
    """Return a tensor's values: bfloat16 as float32, all else as it is stored."""
    kind, shape, data = raw
    if kind == "BF16":
        # the upper half of a float32's bits
        wide = np.frombuffer(data, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    return np.frombuffer(data, NUMPY[kind]).reshape(shape)


def columns_of(raw: Mapping[str, Raw], side: str) -> np.ndarray[Any, Any]:
    """Return the directions of a side as columns (n, k) float64, scales applied."""
    columns = array_of(raw[side]).astype(np.float64)
    columns = columns if side == "U" else columns.T
    scale = raw.get(SCALES[side])
    return columns if scale is None else columns * array_of(scale).astype(np.float64)


def orthonormality(columns: np.ndarray[Any, Any]) -> float:
    """Return how far columns (n, k) are from orthonormal: the largest entry of |Gram matrix − 1|."""
    gram = columns.T @ columns
    return float(np.abs(gram - np.eye(len(gram))).max(initial=0.0))


def restored(columns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the orthonormal columns nearest to these, rounded to float32, as `precision.restored` gives them."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    return ((columns @ (vectors / np.sqrt(values))) @ vectors.T).astype(np.float32)


def _facts(raw: Raw) -> TensorFacts:
    kind, shape, _ = raw
    known = kind in FLOATS or kind in NUMPY
    return TensorFacts(
        kind,
        shape,
        lambda: not known or bool(np.isfinite(array_of(raw)).all()),
        lambda: not known or bool((array_of(raw) > 0).all()),
    )


def _ranges(file: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Return tensor name → dtype, shape, first byte and the byte after its last, from a safetensors file's header."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        # opened before, so the header is one that safetensors accepts
        entries = json.loads(stream.read(length))
    begin = 8 + length
    return {
        name: (entry["dtype"], tuple(entry["shape"]), *(begin + offset for offset in entry["data_offsets"]))
        for name, entry in entries.items()
        if name != "__metadata__"
    }

"""The format of a bundle's file: a safetensors header, checked against the file's size before any allocation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .._moved import moved_name
from ..base_names import BASE
from ..basis.newer import upgrade_hint
from ..errors import BadFileError, SubspaceError

BUNDLE_FILE = "bundle.safetensors"
FORMAT_VERSION = 1
HEADER_LIMIT = 100_000_000  # as in safetensors itself
NAME_LIMIT = 200
SIDES = ("B", "A")  # of a task's own directions, by module: (out, φ) and (φ, in)

# bytes of one number, by dtype in safetensors' words
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorRange:
    """The place of one tensor in the file.

    Attributes:
        dtype: Its name in safetensors, such as ``F32``.
        shape: Its sizes.
        start: Its first byte, counted from the file's beginning.
        end: The byte behind its last one.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_name(name: object, where: str = "") -> str:
    """Return `name` if a task may be called so; it becomes a folder's name on extraction.

    Args:
        name: The name.
        where: The beginning of the message.

    Raises:
        SubspaceError: It is not text, is empty or too long, means another folder, holds a separator or a control
            character, or means the base model.
    """
    bad = (
        not isinstance(name, str)
        or not 0 < len(name) <= NAME_LIMIT
        or name.startswith(".")
        or name == BASE
        or re.search(r'[\\/:*?"<>|\x00-\x1f\x7f]', name)
        or name != name.strip()
    )
    if bad:
        raise SubspaceError(
            f"{where}{name!r} cannot be a task's name, which is also a folder's: give up to {NAME_LIMIT} characters"
            " without "
            f'separators and any of :*?"<>|, not beginning with a dot, and not {BASE!r}.'
        )
    return str(name)


def parse_length(data: bytes, size: int, where: str) -> int:
    """Return the number of the header's bytes, from the file's first eight.

    Args:
        data: The first eight bytes.
        size: Size of the whole file, in bytes.
        where: The file, for messages.

    Raises:
        BadFileError: They claim more than the file holds, or more than a header may have.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length < 2 or length > min(size - 8, HEADER_LIMIT):
        raise BadFileError(
            f"{where}: its header claims {length:,} bytes in a file of {size:,}. It is truncated or not a bundle:"
            " fetch or make it again."
        )
    return length


def parse_header(data: bytes, size: int, where: str) -> tuple[dict[str, TensorRange], dict[str, Any]]:
    """Read the tensors' places and the index from a header's JSON.

    Args:
        data: The header, without its length.
        size: Size of the whole file, in bytes.
        where: The file, for messages.

    Returns:
        The tensors' places by name, and the index.

    Raises:
        BadFileError: It is not a bundle's, has a newer format, or has tensors whose offsets do not fit their shapes or
            the file.
    """
    try:
        header = json.loads(data)
        metadata = header.pop("__metadata__", None) or {}
        if "bank" not in metadata:
            raise ValueError("it is another safetensors file, without a bundle's index of tasks")
        pieces = {name: _piece(name, entry, 8 + len(data), size) for name, entry in header.items()}
        index = json.loads(metadata["bank"])
        if "config" not in index:
            raise ValueError("it is a bank's file; `bundle_tasks(bank, folder)` makes a bundle of a bank")
        if index["format_version"] != FORMAT_VERSION:
            version = index["format_version"]
            newer = isinstance(version, int) and version > FORMAT_VERSION
            hint = upgrade_hint(index.get("subspace_peft_version"), newer)
            raise ValueError(f"format version {version}, this subspace_peft reads {FORMAT_VERSION}.{hint}")
        _check_index(index, pieces)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadFileError(
            f"{where}: not a readable bundle ({type(error).__name__}: {error}). Fetch it again, or make it with"
            " `bundle_tasks`."
        ) from error
    return pieces, index


def _piece(name: str, entry: Mapping[str, Any], base: int, size: int) -> TensorRange:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = (*shape, begin, end)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise ValueError(f"{name} has sizes that are not whole numbers")
    if dtype not in ITEM_SIZES:
        raise ValueError(f"{name} has dtype {dtype}")
    if math.prod(shape) * ITEM_SIZES[dtype] != end - begin or base + end > size:
        raise ValueError(f"{name} claims {shape} of {dtype} in bytes {begin} to {end} of a file of {size}")
    return TensorRange(dtype, tuple(shape), base + begin, base + end)


def _check_index(index: Mapping[str, Any], pieces: Mapping[str, TensorRange]) -> None:
    names = [*index["tasks"], *index["apart"]]
    if len(set(names)) != len(names):
        raise ValueError("two tasks have one name")
    for name in names:
        check_name(name)
        if not isinstance(index["entries"][name]["sha256"], str):
            raise ValueError(f"task {name!r} has no sha256")
    if not isinstance(index["basis_fingerprint"], str) or not isinstance(index["config"], dict):
        raise ValueError("it does not say which basis it is on")
    for modules in (
        index["modules"],
        *(entry["modules"] for entry in index["entries"].values() if "modules" in entry),
    ):
        for module, side in modules.items():
            if len(side) != 2 or not all(isinstance(k, int) and k > 0 for k in side):
                raise ValueError(f"module {module!r} has sizes {side}")
    cores = pieces["cores"]
    if cores.shape != (len(index["tasks"]), width(index["modules"])):
        raise ValueError(
            f"cores has shape {cores.shape}, for {len(index['tasks'])} tasks of {width(index['modules'])} parameters"
        )
    for number, name in enumerate(index["apart"]):
        wanted = (width(index["entries"][name].get("modules", index["modules"])),)
        if pieces[f"{number}/core"].shape != wanted:
            raise ValueError(f"task {name!r} has a core of shape {pieces[f'{number}/core'].shape}, not {wanted}")
    for key in pieces:
        number, _, rest = key.partition("/")
        side, slash, module = rest.partition("/")
        if slash and side in SIDES and number.isdecimal() and int(number) < len(index["apart"]):
            name = index["apart"][int(number)]
            if module not in index["entries"][name].get("modules", index["modules"]):
                raise ValueError(f"task {name!r} has own directions in module {module!r}, and no core")
            _check_sides(pieces, number, name, module)


def _check_sides(pieces: Mapping[str, TensorRange], number: str, name: str, module: str) -> None:
    """Raise `ValueError` where a module does not have both sides of a task's own directions, or they do not fit."""
    shapes = [pieces[key].shape if (key := f"{number}/{side}/{module}") in pieces else () for side in SIDES]
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][0]:
        raise ValueError(
            f"task {name!r} has own directions in module {module!r} of shapes B {shapes[0] or 'missing'} and A"
            f" {shapes[1] or 'missing'}, which are no factors of one update"
        )


def width(modules: Mapping[str, Iterable[int]]) -> int:
    """Count the parameters of a task with cores of these sizes, module → (k_out, k_in)."""
    return sum(math.prod(size) for size in modules.values())


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], index: Mapping[str, Any]) -> bytes:
    """Encode length and header of a file.

    Args:
        tensors: (name, dtype, shape) of the tensors, in the order in which they lie one behind the other.
        index: The index, which goes into the header's metadata.

    Raises:
        SubspaceError: The index has more bytes than safetensors allows.
    """
    header: dict[str, Any] = {"__metadata__": {"bank": json.dumps(index, sort_keys=True, allow_nan=False)}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise SubspaceError(
            f"The index of {len(index['entries']):,} tasks has {len(text):,} bytes, more than safetensors allows."
        )
    return len(text).to_bytes(8, "little") + text


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)

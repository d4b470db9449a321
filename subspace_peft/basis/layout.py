"""The tensors of a stored basis by name and dtype, and what they must be; without torch, so that looking is quick."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import SubspaceError

TENSOR_NAMES = ("U", "V", "M", "G", "core_rms", "cores", "spectrum_out", "spectrum_in")
SIDES = ("U", "V")
SCALES = {"U": "U_scale", "V": "V_scale"}
# dtypes in safetensors' words, and in torch's
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
STORED_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
# largest entry of |UᵀU − 1| that rounding explains; int8 of a direction with one entry far above the others comes near
TOLERANCE = {"F64": 1e-5, "F32": 1e-5, "F16": 5e-3, "BF16": 4e-2, "I8": 1e-1}


@dataclass(frozen=True)
class TensorFacts:
    """What checks ask of a tensor.

    Attributes:
        kind: its dtype in safetensors' words; that of torch or numpy where safetensors has none.
        shape: its sizes.
        finite: tells whether all values are finite; called only where it matters.
        positive: tells whether all values are above zero.
    """

    kind: str
    shape: tuple[int, ...]
    finite: Callable[[], bool]
    positive: Callable[[], bool] = lambda: True


def check_tensors(name: str, tensors: Mapping[str, TensorFacts]) -> None:
    """Check that a module's shapes agree, dtypes are floats and values finite.

    Args:
        name: the module's name, for messages.
        tensors: those that are present, by name; U and V always.

    Raises:
        SubspaceError: they are not; names the module and the tensor.
    """
    U, V = tensors["U"], tensors["V"]
    if len(U.shape) != 2 or len(V.shape) != 2:
        raise SubspaceError(
            f"Basis of module {name!r}: U must be (out, k_out) and V (k_in, in), got {U.shape} and "
            f"{V.shape}. The file is not a subspace_peft basis, or it is damaged: build it again."
        )
    core = (U.shape[1], V.shape[0])
    expected = {"M": core, "core_rms": core}
    # a tensor without dimensions lacks the first one too, for which the 0 stands
    expected |= {key: (*(tensors[key].shape[:1] or (0,)), *core) for key in ("G", "cores") if key in tensors}
    for key, value in tensors.items():
        if value.kind not in FLOATS:
            said = "torch.int8" if value.kind == "I8" else value.kind
            raise SubspaceError(
                f"Basis of module {name!r}: {key} has dtype {said}; expected one of "
                f"{', '.join(f'torch.{each}' for each in FLOATS.values())}. Build the basis again."
            )
        if key in expected and value.shape != expected[key]:
            raise SubspaceError(
                f"Basis of module {name!r}: {key} has shape {value.shape}, but U and V ask for "
                f"{expected[key]}. Build the basis again."
            )
        if not value.finite():
            raise SubspaceError(
                f"Basis of module {name!r}: {key} holds NaN or infinite values. A source adapter is broken, or the"
                " file is damaged: check the sources and build the basis again."
            )


def stored_problem(tensors: Mapping[str, TensorFacts], precision: str) -> str | None:
    """Return what is wrong with the dtypes, shapes and scales of tensors stored in a lower precision, or None."""
    for side in SIDES:
        value, scale = tensors[side], tensors.get(SCALES[side])
        if value.kind != STORED_AS[precision]:
            return f"{side} has dtype {value.kind}, and the config says {precision}"
        if len(value.shape) != 2:
            return f"{side} has shape {value.shape}"
        if precision != "int8":
            if not value.finite():
                return f"{side} holds NaN or infinite values"
            continue
        count = value.shape[1 if side == "U" else 0]
        if scale is None:
            return f"{side} is int8 and has no {SCALES[side]}"
        if scale.kind != "F32" or scale.shape != (count,):
            return f"{SCALES[side]} is {scale.kind} of shape {scale.shape}, not float32 of ({count},)"
        if not (scale.finite() and scale.positive()):
            return f"{SCALES[side]} holds values that are not positive numbers"
    return None


def not_orthonormal(name: str, side: str, off: float, precision: str) -> str:
    """Return what is said of a module's stored directions that rounding to `precision` does not explain."""
    return (
        f"module {name!r}: {side} is not orthonormal: its Gram matrix is off by {off:.2g} (at most "
        f"{TOLERANCE[STORED_AS[precision]]:g} as {precision}). The file is damaged: fetch or build it again."
    )


def digest_of(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> str:
    """Return the sha256 (hex) of a module's tensors by name: of names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for key, (kind, shape, data) in sorted(tensors.items()):
        total.update(f"{key}:{kind}:{list(shape)};".encode())
        total.update(data)
    return total.hexdigest()


def combine_digests(digests: Mapping[str, str]) -> str:
    """Return the fingerprint of a basis: sha256 (hex) over its modules' names and digests, in sorted order."""
    total = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()


def k_range(shapes: Mapping[str, Mapping[str, int]]) -> list[int]:
    """Return the fewest and the most directions that a side of a module has."""
    sizes = {side for shape in shapes.values() for side in (shape["k_out"], shape["k_in"])}
    return [min(sizes), max(sizes)]


def describe_k(shapes: Mapping[str, Mapping[str, int]]) -> str:
    """Return ``k=16``, or ``k=8…16`` where modules or sides differ."""
    low, high = k_range(shapes)
    return f"k={low}" if low == high else f"k={low}…{high}"

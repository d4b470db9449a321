"""Checks that a configuration's values are of their kinds: a saved task's config may come from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from .._io.untrusted import MOST_DIRECTIONS, is_finite, is_name, is_revision, is_sha256, is_whole, pattern_problem
from ..basis import SubspaceBasis
from ..basis.base_weights import weights_problem
from ..basis.newer import is_newer
from ..basis.schema import MOST_FEATURES, shape_problem
from ..errors import SubspaceError
from .coefficients import KINDS
from .loaded_from import LoadedFrom

CARRIED = ("U", "V", "M", "G")
MOST_PROBED = 4096
Check = Callable[[Any], "str | None"]


def check_values(values: Mapping[str, Any]) -> None:
    """Check a configuration's fields one by one.

    Args:
        values: field → value.

    Raises:
        SubspaceError: a value is of a wrong kind or size; names the first, and its kind or range.
    """
    for name, check in CHECKS.items():
        value = values[name]
        wanted = check(value)
        if wanted is not None:
            shown = f"a {type(value).__name__}" if isinstance(value, (Mapping, list, set, tuple)) else _short(value)
            # of one entry of a dict
            raise SubspaceError(f"{name}{wanted}." if wanted.startswith("[") else f"{name}={shown}: {wanted}.")


def check_choices(values: Mapping[str, Any]) -> None:
    """Check a configuration's choices, and that they go with one another.

    Args:
        values: field → value, each checked by `check_values`.

    Raises:
        SubspaceError: there is no such choice, or it does not go with another; names the first.
    """
    for name, choices in (("coefficients", KINDS), ("mean_gain", ("none", "fixed", "trainable"))):
        if values[name] not in choices:
            raise SubspaceError(f"{name}={values[name]!r}: choose one of {', '.join(choices)}.")
    if values["coefficients"] == "none" and values["mean_gain"] != "trainable":
        raise SubspaceError("coefficients='none' trains only the mean core's gain, so it needs mean_gain='trainable'.")
    if values["coefficients"] == "none" and values["start"] not in ("zero", "mean"):
        raise SubspaceError(
            f"start={values['start']!r}: coefficients='none' has only the mean's gain and cannot stand for a source;"
            " start at 'zero' or 'mean'."
        )
    if values["target_parameters"]:
        raise SubspaceError(
            f"target_parameters={values['target_parameters']!r} is not supported: a basis has two sides, which such a"
            " stack of weights shares among experts. Name layers in target_modules; LoRA can adapt parameters."
        )
    if values["bias"] not in ("none", "all", "subspace_only"):
        raise SubspaceError(f"bias={values['bias']!r}: choose one of none, all, subspace_only.")
    basis = values["basis"]
    if not (basis is None or isinstance(basis, (str, Path, SubspaceBasis))):
        raise SubspaceError(f"basis={type(basis).__name__}: give a SubspaceBasis, the folder of one, or a Hub id.")
    if not (basis is None or isinstance(basis, SubspaceBasis) or is_name(str(basis))):
        raise SubspaceError(
            f"basis={str(basis)[:80]!r}: that can be no place. Give the folder of a basis, or a Hub id."
        )


def unknown_keys(values: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Return the keys of a saved task's config that no version writes.

    None are reported where a newer PEFT or subspace_peft saved the config, which may know more.

    Args:
        values: key → value in the config's file.
        known: the keys that this version writes.
    """
    if values.get("subspace_version") is None:
        return []
    import peft

    newer = is_newer(values["subspace_version"]) or is_newer(values.get("peft_version"), peft.__version__)
    return [] if newer else sorted(str(key)[:80] for key in set(values) - set(known))


def _short(value: Any) -> str:
    huge = isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30
    return "a number of more than 30 digits" if huge else repr(value)[:100]


# -- kinds of values --------------------------------------------------------------------------------------------------


def _none_or(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _be(kind: Callable[[Any], bool], wanted: str) -> Check:
    return lambda value: None if kind(value) else wanted


def _one_pattern(value: Any) -> str | None:
    if not isinstance(value, str):
        return "give text"
    problem = pattern_problem(value)
    return None if problem is None else f"{problem}. Name the modules, or write a simpler expression"


def _names_or_pattern(value: Any) -> str | None:
    if isinstance(value, str):
        return _one_pattern(value)
    listed = isinstance(value, (list, tuple, set, frozenset))
    return (
        None if listed and all(is_name(name) for name in value) else "give names of modules, or one regular expression"
    )


def _patterns(value: Any) -> str | None:
    if isinstance(value, str):
        return _one_pattern(value)
    if not isinstance(value, (list, tuple, set)):
        return "give a name, or a list of names"
    return next((problem for item in value if (problem := _one_pattern(item))), None)


def _by_pattern(fits: Callable[[Any], bool], holds: str, wanted: str) -> Check:
    """Return a check for a dict, end of a module's name → `holds`, whose values fit; `wanted` says what does."""

    def check(value: Any) -> str | None:
        if not isinstance(value, Mapping):
            return f"give a dict, end of a module's name → {holds}"
        for pattern, one in value.items():
            if problem := _one_pattern(pattern):
                return f"[{str(pattern)[:80]!r}]: {problem}"
            if not fits(one):
                return f"[{str(pattern)[:80]!r}]={_short(one)}: give {wanted}"
        return None

    return check


def _one_size_or_two(k: Any) -> bool:
    pair = isinstance(k, (list, tuple)) and len(k) == 2
    return all(map(is_whole, k if pair else [k]))


def _own_rank(value: Any) -> bool:
    return is_whole(value, least=0)


def _layers(value: Any) -> bool:
    return all(is_whole(i, least=0) for i in (value if isinstance(value, (list, tuple, set, range)) else [value]))


def _tokens(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    named = not isinstance(value, Mapping) or all(is_name(name) for name in value)
    return named and all(
        isinstance(one, (list, tuple)) and all(is_whole(i, least=0, most=MOST_FEATURES) for i in one) for one in lists
    )


def _shapes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        is_name(name)
        and isinstance(shape, (list, tuple))
        and len(shape) in (2, 4)
        and all(is_whole(n, most=MOST_FEATURES) for n in shape)
        for name, shape in value.items()
    )


def _carried(value: Any) -> str | None:
    if not isinstance(value, Mapping) or not value:
        return "give what a task with its own basis was saved with"
    for name, entry in value.items():
        hashes = entry.get("sha256") if isinstance(entry, Mapping) else None
        if not isinstance(hashes, Mapping) or not {"U", "V"} <= hashes.keys() <= set(CARRIED):
            return f"module {str(name)[:80]!r} has no hashes of its U and V"
        if not all(is_sha256(digest) for digest in hashes.values()):
            return f"module {name!r} has a hash that is no sha256"
        if problem := shape_problem(name, entry.get("shape")):
            return problem
    return None


def _names_by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and all(is_name(name) and is_name(own) for name, own in value.items())


_text = _be(is_name, "give text")
_maybe_text = _none_or(_text)
_maybe_path = _none_or(
    _be(lambda value: value == "" or (is_name(str(value)) and isinstance(value, (str, Path))), "give text")
)
_flag = _be(lambda value: isinstance(value, bool), "give true or false")
_OWN_RANK = f"a whole number from 0 to {MOST_DIRECTIONS:,}"
_size = _be(is_whole, f"give a whole number of at least 1 and at most {MOST_DIRECTIONS:,}")

CHECKS: dict[str, Check] = {
    "basis_revision": _none_or(_be(is_revision, "give a branch, tag or commit sha")),
    "basis_fingerprint": _maybe_text,
    "basis_part": _none_or(_be(is_name, "give the name of a pipeline's part, such as 'text_encoder_2'")),
    "base_model_name_or_path": _maybe_path,
    "revision": _none_or(_be(is_revision, "give a branch, tag or commit sha")),
    "subspace_version": _maybe_text,
    "k": _none_or(_size),
    "r": _size,
    "rank_pattern": _by_pattern(
        _one_size_or_two,
        "k, or [k_out, k_in]",
        f"a whole number of at least 1 and at most {MOST_DIRECTIONS:,}, or two of them, [k_out, k_in]",
    ),
    "extra_rank": _be(_own_rank, f"give {_OWN_RANK}"),
    "extra_rank_pattern": _by_pattern(_own_rank, "extra_rank", _OWN_RANK),
    # beyond these, s or M / s leaves the range of float32
    "alpha": _be(
        lambda value: is_finite(value) and 1e-12 <= value <= 1e12, "give a number above 0, from 1e-12 to 1e12"
    ),
    "dropout": _be(lambda value: is_finite(value) and 0 <= value < 1, "give a number from 0 to below 1"),
    "start": _text,
    "seed": _be(lambda value: is_whole(value, least=-(1 << 63), most=(1 << 63) - 1), "give a whole number of 64 bits"),
    "target_modules": _none_or(_names_or_pattern),
    "exclude_modules": _none_or(_names_or_pattern),
    "modules_to_save": _none_or(
        _be(lambda value: isinstance(value, (list, tuple, set)) and all(map(is_name, value)), "give names")
    ),
    "trainable_token_indices": _none_or(_be(_tokens, "give token indices, or a dict, module → token indices")),
    "layers_to_transform": _none_or(_be(_layers, "give layer indices")),
    "layers_pattern": _none_or(_patterns),
    "basis_names": _none_or(_be(_names_by_name, "give a dict, module → its name in the basis")),
    "strict": _flag,
    "save_basis": _none_or(_flag),
    "fan_in_fan_out": _flag,
    "init_weights": _flag,
    "check_base_model": _flag,
    "inference_mode": _flag,
    "auto_mapping": _none_or(_be(lambda value: isinstance(value, dict), "give a dict")),
    "base_probe": _none_or(
        _be(
            lambda value: (
                isinstance(value, (list, tuple)) and len(value) <= MOST_PROBED and all(map(is_finite, value))
            ),
            f"give a list of at most {MOST_PROBED} finite numbers",
        )
    ),
    "base_weights": _none_or(weights_problem),
    "basis_modules": _none_or(_carried),
    "loaded_from": _none_or(_be(lambda value: isinstance(value, LoadedFrom), "leave it out: loading fills it in")),
    "weight_shapes": _none_or(_be(_shapes, "give a dict, module → the two or four sizes of its weight")),
}

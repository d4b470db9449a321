"""The keys and configuration of a PEFT LoRA: module names, factors and scale."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._io.untrusted import is_finite, is_name, is_whole, pattern_problem
from ..basis.module_names import clashes, plain_name, plain_names, plain_patterns

LORA_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_"
    r"(?:(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight|embedding_(?P<lookup>[AB])(?:\.(?P<other>[^.]+))?)$"
)
EMBEDDING_KEY = re.compile(
    r"(?:^|\.)(?:embed_tokens|lm_head|wte|word_embeddings?|shared|embed_in|embed_out|tok_embeddings|tokens_embed"
    r"|token_embedding|embeddings|decoder|generator_lm_head|lm_head\.out_proj|lm_heads\.\d+|lm_loss|output_layer"
    r"|output_projection|pred_layer\.proj|proj_out|vocab_projector)(?:\.base_layer)?\.(?:weight|bias)$"
)
PATTERNS = ("rank_pattern", "alpha_pattern")
# of LoraConfig in every version of PEFT: what a configuration that lacks the field means
DEFAULT_R, DEFAULT_ALPHA = 8, 8


def sort_keys(
    keys: Iterable[str], plain: Mapping[str, str] | None = None
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Group a state dict's keys by module and side.

    Keys of `modules_to_save` and others that no LoRA layer owns are passed over.

    Args:
        keys: the keys.
        plain: key → key without the names of wrappers; by default what `plain_names` makes of them.

    Returns:
        ``{module: {"A": key, "B": key}}``, and a list of problems, each with the key and the remedy.
    """
    modules: dict[str, dict[str, str]] = {}
    keys = list(keys)
    plain = plain_names(keys) if plain is None else plain
    problems: dict[str, str] = {each: each for each in clash_problems(plain)}
    adapters: dict[str, str] = {}
    for key in keys:
        if found := LORA_KEY.match(plain[key]):
            adapters.setdefault(found["adapter"] or found["other"] or "", key)
            # the name as the file has it: what is left out of it may hold anything as well
            if not is_name(key):
                problems[found["module"]] = f"{key[:80]!r} is no module's name"
            sides = modules.setdefault(found["module"], {})
            side = found["side"] or found["lookup"]
            if side in sides and plain[sides[side]] != plain[key]:
                problems.setdefault(
                    found["module"],
                    f"{key}: the state dict holds several adapters; pass one, as `get_peft_model_state_dict` gives it",
                )
            sides[side] = key
    problems |= {} if problems else several_problem(adapters)
    for module, sides in modules.items():
        if len(sides) < 2:
            problems[module] = f"module {module!r} has only lora_{next(iter(sides))}: the file is incomplete"
    return modules, list(problems.values())


def several_problem(adapters: Mapping[str, str]) -> dict[str, str]:
    """Return the problem of keys that are of several adapters, under one name.

    Args:
        adapters: name of an adapter ("" where the key has none) → a key of it.
    """
    if len(adapters) < 2:
        return {}
    first, second = list(adapters.values())[:2]
    named = ", ".join(repr(name) if name else "one without a name" for name in adapters)
    return {
        "adapters": f"{first}, {second}: the state dict holds several adapters ({named}); pass one, as"
        " `get_peft_model_state_dict` gives it"
    }


def clash_problems(plain: Mapping[str, str]) -> list[str]:
    """Return which keys of an adapter are one key without the names of wrappers, each with the remedy."""
    return [
        f"{first} and {second} are both {plain[first]} once the names of wrappers are left out: keep one of them"
        for first, second in clashes(plain)
    ]


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return s of one module: ``lora_alpha / r``, or ``lora_alpha / √r`` with rsLoRA (arXiv 2312.03732).

    `rank_pattern` and `alpha_pattern` are taken into account. Absent fields have PEFT's defaults.

    Args:
        config: the adapter's configuration.
        module: its name there.
        rank: of its tensors.

    Raises:
        ValueError: the configuration's rank for this module is not the rank of its tensors, or its alpha is no number.
    """
    r = _pattern(config.get("rank_pattern"), module, config.get("r", DEFAULT_R))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", DEFAULT_ALPHA))
    if not is_whole(r) or r != rank:
        said = f"says {str(r)[:40]}" if "r" in config else f"has no r, which means PEFT's default of {r}"
        raise ValueError(f"module {module!r} has rank {rank}, but its adapter_config.json {said}")
    if not is_finite(alpha):
        raise ValueError(f"module {module!r} has the alpha {str(alpha)[:40]}, which is no number")
    return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)


def config_problem(config: Mapping[str, Any]) -> str | None:
    """Return the first field, of those read here, whose value no LoRA's configuration has; None where all are fine."""
    for key in PATTERNS:
        patterns = config.get(key)
        if patterns is not None and not isinstance(patterns, Mapping):
            return f"its {key} is a {type(patterns).__name__}, not a dict"
        for pattern in patterns or ():
            problem = pattern_problem(pattern) if isinstance(pattern, str) else "it is no text"
            if problem is not None:
                return f"its {key} has {str(pattern)[:80]!r}: {problem}"
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, (str, Path)):
        return f"its base_model_name_or_path is a {type(base).__name__}, not a name"
    return None


def method_of(config: Mapping[str, Any]) -> str:
    """Return PEFT's name of an adapter's method; LORA where its configuration does not say."""
    kind = config.get("peft_type", "LORA")
    return str(getattr(kind, "value", kind))


def is_saved_module(key: str, config: Mapping[str, Any]) -> bool:
    """Return whether a key belongs to one of the configuration's `modules_to_save`.

    By PEFT's rule an entry means every module whose name ends with it: `norm` means `post_attention_layernorm` too.
    """
    return any(f"{name}." in plain_name(key) for name in saved_modules(config))


def saved_modules(config: Mapping[str, Any]) -> list[str]:
    """Return the configuration's `modules_to_save`, without the names of wrappers."""
    return [plain_name(name) for name in config.get("modules_to_save") or []]


def is_embedding(key: str) -> bool:
    """Return whether a key is of a base model's whole token embedding or output layer, as PEFT saves them with a LoRA.

    An output layer may have a bias, as those of BERT's and Phi's language models.
    """
    return EMBEDDING_KEY.search(key) is not None


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    # PEFT's rule: the first key that matches the whole name or its end, as a regular expression
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({each})$", module) for each in plain_patterns(pattern)):
            return value
    return default

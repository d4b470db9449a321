"""Read the keys of diffusers' and kohya's LoRA files: modules, their two factors, and their scales."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from ..basis.module_names import WRAPPERS, plain_names
from .lora import LORA_KEY, clash_problems, scaling, several_problem
from .pipeline import METADATA

FACTOR = re.compile(
    r"^(?P<stem>.+?)"
    r"(?P<style>\.lora_(?:down|up)|[._]lora\.(?:down|up)|\.lora_linear_layer\.(?:down|up)|\.lora_[AB](?:\.(?P<name>[^.]+))?)"
    r"\.weight$"
)
ALPHA = re.compile(r"^(?P<stem>.+?)(?:[._]lora|\.lora_linear_layer)?\.alpha$")
REFUSED = {
    ".dora_scale": "DoRA's magnitude is no low-rank update",
    ".lora_magnitude_vector": "DoRA's magnitude is no low-rank update",
    ".lora_mid": "a Tucker-decomposed convolution is no product of two factors",
    ".hada_": "LoHa is no product of two factors",
    ".lokr_": "LoKr is no product of two factors",
    ".oft_": "OFT is no low-rank update",
    ".diff": "a full difference is no low-rank update",
    ".lora_up.bias": "a trained LoRA bias is no low-rank update",
    ".lora_B.bias": "a trained LoRA bias is no low-rank update",
}
# which model of a pipeline kohya means
PARTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_transformer_": "transformer",
    "lycoris_": "",
}
# kohya writes a module's name with "_" for ".": only where the words are known can it be read back
UNET = """
    down_blocks up_blocks mid_block attentions resnets transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net
    proj proj_in proj_out conv1 conv2 conv_shortcut time_emb_proj downsamplers upsamplers conv conv_in conv_out
    time_embedding add_embedding linear_1 linear_2
"""
CLIP = """
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection embeddings
    token_embedding position_embedding
"""
WORDS = {"unet": UNET, "text_encoder": CLIP, "text_encoder_2": CLIP}
# what stands in front of an original checkpoint's names
ORIGINAL = ("diffusion_model.", "model.diffusion_model.")
# the names of wrappers with "_" for "."
_FLAT_WRAPPER = re.compile(rf"(?:(?<=_)|^)(?:{'|'.join(WRAPPERS)})_")

HOW = (
    "load the file into its diffusers pipeline and save that model's adapter, `pipe.load_lora_weights(file); "
    "pipe.unet.save_lora_adapter(folder)`, or pass the model that it adapts as base_model"
)


@dataclass
class ForeignKeys:
    """The sorted keys of a file of diffusers or kohya.

    Attributes:
        keys: ``{module: {"A": key, "B": key}}``; modules of a pipeline's parts begin with ``unet.``,
            ``text_encoder.`` and the like.
        scales: module → the factor by which B·A is multiplied.
        problems: reasons why it cannot be used; each names a key and the remedy.
        others: keys that are no LoRA's.
    """

    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    others: tuple[str, ...] = ()


def has_foreign_keys(names: Iterable[str]) -> bool:
    """Return whether any key is of diffusers' or kohya's own kinds, not PEFT's."""
    return any(
        (found := FACTOR.match(name)) and not found["style"].startswith((".lora_A", ".lora_B")) for name in names
    )


def read_foreign_keys(
    names: Iterable[str],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
    base_names: Iterable[str] = (),
) -> ForeignKeys:
    """Sort the keys of a diffusers or kohya file.

    The scale is alpha / rank where the file has alpha (an ``.alpha`` tensor, or diffusers' metadata). Elsewhere it
    counts as 1, as in diffusers.

    Args:
        names: the file's keys.
        read: key → tensor.
        metadata: the file's metadata.
        base_names: names of the base model's modules, against which kohya's names are read where they are given.
    """
    found = ForeignKeys()
    flat: dict[str, list[str]] = {}
    for name in base_names:
        flat.setdefault(name.replace(".", "_"), []).append(name)
    modules: dict[str, str | None] = {}
    alphas: dict[str, str] = {}
    unknown: list[str] = []
    others = []
    names = list(names)
    plain = plain_names(names)
    found.problems += clash_problems(plain)
    found.problems += several_problem(_adapters(plain)).values()
    for key in names:
        # a module may be called `diffusion_model`, so only what stands last counts
        refusal = next((mark for mark in REFUSED if mark in "." + ".".join(key.split(".")[-2:])), None)
        if refusal is not None:
            found.problems.append(f"{key}: {REFUSED[refusal]}; train or convert the adapter without")
        elif factor := FACTOR.match(plain[key]) or LORA_KEY.match(plain[key]):
            of_peft = "module" in factor.re.groupindex
            stem = factor["module" if of_peft else "stem"]
            style = "" if of_peft else factor["style"]
            old = style.startswith("_lora")
            if stem not in modules:
                modules[stem] = _module(stem, old, flat, of_peft or style.startswith((".lora_A", ".lora_B")))
                if modules[stem] is None:
                    unknown.append(key)
            if modules[stem] is None:
                continue
            sides = found.keys.setdefault(str(modules[stem]), {})
            side = factor["lookup"] if of_peft else "A" if "down" in style or "lora_A" in style else "B"
            if side in sides:
                found.problems.append(f"{key}: it and {sides[side]} are both of module {modules[stem]!r}")
            sides[side] = key
        elif alpha := ALPHA.match(plain[key]):
            alphas[alpha["stem"]] = key
        else:
            others.append(key)
    found.others = tuple(sorted(others))
    if unknown:
        found.problems.append(
            f"{unknown[0]}: which module of the model that is cannot be told for certain ({len(unknown)} such keys):"
            f" {HOW}"
        )
    found.problems += [
        f"module {module!r} has only lora_{next(iter(sides))}: the file is incomplete"
        for module, sides in found.keys.items()
        if len(sides) < 2
    ]
    found.problems += [
        f"{key}: no factors are of the module that this alpha is of: the file is incomplete, or of another form"
        for stem, key in alphas.items()
        if stem not in modules
    ]
    if not found.problems:
        _scales(found, {str(modules[stem]): key for stem, key in alphas.items()}, read, metadata)
    return found


def has_alphas(names: Iterable[str]) -> bool:
    """Return whether any key is an alpha, which PEFT has in its configuration only."""
    return any(ALPHA.match(name) for name in names)


def has_original_layout(names: Iterable[str]) -> bool:
    """Return whether any key is of an original checkpoint's layout, which no model of diffusers has."""
    return any(name.startswith(ORIGINAL) for name in names)


def _adapters(plain: Mapping[str, str]) -> dict[str, str]:
    """Return the names of adapters in keys that have them in PEFT's way, each with a key of it; "" for none."""
    found: dict[str, str] = {}
    for key, short in plain.items():
        factor = FACTOR.match(short)
        if factor is not None and factor["style"].startswith((".lora_A", ".lora_B")):
            found.setdefault(factor["name"] or "", key)
    return found


def metadata_configs(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the configurations in a file's metadata, as diffusers writes them: one per part of a pipeline."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in _metadata(metadata).items():
        part, _, name = key.rpartition(".")
        found.setdefault(part, {})[name] = value
    return list(found.values())


def _scales(
    found: ForeignKeys, alphas: Mapping[str, str], read: Callable[[str], torch.Tensor], metadata: Mapping[str, str]
) -> None:
    config = _metadata(metadata)
    for module, sides in found.keys.items():
        A = read(sides["A"])
        if A.dim() < 2 or not A.numel():
            continue  # refused with its shape when it is read for its values
        rank = A.shape[0]
        part, _, rest = module.partition(".")
        own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
        if module in alphas:
            alpha = read(alphas[module])
            if alpha.numel() != 1 or not bool(alpha.isfinite().all()):
                found.problems.append(f"{alphas[module]}: it is no finite number, as an alpha has to be")
                continue
            found.scales[module] = float(alpha) / rank
        elif own or config.get("r"):
            try:
                found.scales[module] = scaling(own or config, rest if own else module, rank)
            except ValueError as error:
                found.problems.append(f"{error}, as the file's metadata has it")


def _metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        config = json.loads(metadata.get(METADATA, "{}"))
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _module(stem: str, old: bool, flat: Mapping[str, list[str]], of_peft: bool = False) -> str | None:
    """Return the module that a key's beginning means, or None where that is not certain.

    Args:
        stem: the beginning, without the names of wrappers.
        old: whether it is of diffusers' old kind.
        flat: names of the base model with "_" for "." → those names.
        of_peft: whether the key ends as PEFT's do, which writes no name flat: `lm_head` is a module by itself.
    """
    for prefix, part in PARTS.items():
        if stem.startswith(prefix):
            rest = _FLAT_WRAPPER.sub("", stem.removeprefix(prefix))
            if len(hits := flat.get(rest, [])) == 1:
                return hits[0]
            read_back = _read_back(tuple(rest.split("_")), WORDS.get(part, ""))
            return f"{part}.{read_back[0]}" if len(read_back) == 1 else None
    # names of the original checkpoints' own layout are no module names of diffusers' models
    if ("." not in stem and not of_peft) or stem.startswith(("lora_", *ORIGINAL)):
        return None
    name = stem.replace(".processor.", ".")
    if old and "text_model." in name:
        return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    return re.sub(r"\.to_out$", ".to_out.0", name) if old else name


@cache
def _words(text: str) -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(word.split("_")) for word in text.split())


def _read_back(tokens: tuple[str, ...], words: str) -> list[str]:
    """Return all names of known words and numbers that give these tokens when every ``.`` is written as ``_``."""
    if not tokens:
        return [""]
    names = []
    for n in range(1, min(4, len(tokens)) + 1):
        head = tokens[:n]
        if head in _words(words) or (n == 1 and head[0].isdigit()):
            names += ["_".join(head) + (f".{rest}" if rest else "") for rest in _read_back(tokens[n:], words)]
    return names

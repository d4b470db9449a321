"""Tell a LoRA whose update is s·B·A from everything else that PEFT saves as one.

What a LoRA layer computes is settled by its configuration: some of PEFT's variants add tensors, some give the same
`lora_A` and `lora_B` another meaning, and some act on part of the input only. Therefore only fields that were read in
PEFT's sources (0.3 to 0.21) to leave ΔW = s·B·A pass; any other one that is set is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .lora import LORA_KEY, is_embedding, is_saved_module

KNOWN_UP_TO = "0.21"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# fields of LoraConfig under which a saved adapter is s·B·A, whatever their value; those that only training, loading or
# the choice of modules depends on among them
NEUTRAL = _words(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform
    loftq_config lora_alpha lora_dropout lora_ga_config megatron_config megatron_core merge_weights
    modules_to_save monteclora_config peft_type peft_version qalora_group_size r rank_pattern revision
    runtime_config target_modules task_type trainable_token_indices use_rslora velora_config
    """
)
# of other programs, which PEFT passes over: learning rates, dtypes of training, and which program wrote the file
FROM_OTHERS = _words(
    """
    _class_name _diffusers_version _name_or_path lora_dtype lorap_emb_lr lorap_lr_ratio loraplus_lr_embedding
    loraplus_lr_ratio peft_layers_to_transform transformers_version unsloth_fixed
    """
)
# fields under which it is not, and why
REASONS = {
    "use_dora": "DoRA rescales the base model's weights, so that its update is no product of lora_B and lora_A",
    "kasa_config": "KaSA cuts singular values off the base model's weights and has a diagonal between its factors",
    "use_bdlora": "BD-LoRA's factors are stored as the blocks of block-diagonal matrices",
    "alora_invocation_tokens": (
        "aLoRA acts from its invocation tokens on only, so its update depends on the input: no task in a basis does"
        " that"
    ),
    "arrow_config": "Arrow chooses among several adapters token by token, so its update depends on the input",
    "use_qalora": "QA-LoRA's lora_A takes averages over groups of inputs of a quantised layer; PEFT cannot merge it",
    "layer_replication": (
        "it repeats layers of the base model, and is an adapter of that longer model. Save the base model with its"
        " layers repeated, and take layer_replication out of adapter_config.json"
    ),
    "lora_bias": "its trained biases (lora_bias=True) are no part of a matrix update, and a basis holds none",
    "target_parameters": (
        "it adapts parameters, such as stacks of experts, and each expert has factors of its own; a basis is of"
        " modules that are matrices. Train it on target_modules alone"
    ),
    "enable_lora": "it adapts parts of fused layers (enable_lora of PEFT 0.3), whose factors are those of groups",
}
CONVERTIBLE = ("use_dora", "kasa_config", "use_bdlora")

# values of init_lora_weights that leave the base model's weights as they were
KEEPING_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
# these take their factors out of the base weights: the saved update means nothing on the base model itself
MUTATING_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# of these, PEFT makes the same start again from the base model alone
REPEATED_STARTS = ("pissa", "olora")

# tensors beside lora_A and lora_B that only training uses
TRAINING_ONLY = ("lora_velora_embed", "lora_monteclora_sampler")
TENSORS = {
    "lora_magnitude_vector": "DoRA's magnitude is no low-rank update",
    "lora_diag": "KaSA's diagonal is no part of lora_B·lora_A",
    "lora_E": "AdaLoRA's diagonal is no part of lora_B·lora_A",
    "lora_ranknum": "AdaLoRA's rank divides its update",
    "lora_arrow": "Arrow's router chooses by the input",
}
# other methods' tensors, which no LoRA's file has
FOREIGN = _words(
    """
    adapter_down adapter_up adaption_ b_norm boft_ c3a_ delora_ dora_scale fourierft_ gralora_ hada_ hira_ hra_
    ia3_ loha_ lokr_ miss_ oft_ prompt_embeddings prompt_encoder randlora_ reshape_weight road_ scale_weight
    scaled_fp8 set_weight shira_ tinylora_ unilora_ vblora_ vera_ w_norm waveft_ xlora_
    """
)
# a layer's own parameters, beside its factors where an adapter's keys lack PEFT's `base_layer`
OF_LAYERS = ("weight", "bias")
# modules of transformers that hold the weights of all experts as one parameter
STACK = re.compile(
    r"(?:^|\.)(?:(?:shared_)?experts|experts\.mlp|(?:experts|block_sparse_moe|moe)\.(?:input_linear|output_linear))$"
)
# methods that are no fixed update of weight matrices
NO_UPDATE = _words(
    """
    ADAPTION_PROMPT BEFT CARTRIDGE CPT LN_TUNING MULTITASK_PROMPT_TUNING P_TUNING POLY PREFIX_TUNING
    PROMPT_TUNING TRAINABLE_TOKENS XLORA
    """
)
# methods of which `converted` makes a LoRA, and those of which PEFT makes none
CONVERTED = _words(
    """
    ADALORA C3A DELORA FOURIERFT GRALORA LOHA LOKR MISS PSOFT RANDLORA TINYLORA UNILORA VBLORA VERA WAVEFT
    """
)
NOT_CONVERTED = _words(
    """
    ADAMSS BOFT DEFT FROD GLORA HIRA HRA IA3 LILY OFT OSF PEANUT PVERA ROAD SHADOW SHIRA SUPERTUNING
    """
)


def config_problems(config: Mapping[str, Any], *, converting: bool = False, offered: bool = True) -> list[str]:
    """Return why a LoRA with this configuration is not s·B·A; nothing where it is.

    Args:
        config: as in its adapter_config.json.
        converting: leave out what `needs_conversion` means, since the adapter is being converted.
        offered: whether the remedy may be a conversion on the base model.
    """
    problems = []
    for name, value in config.items():
        if name in NEUTRAL or name in FROM_OTHERS or _is_off(name, value) or (converting and name in CONVERTIBLE):
            continue
        if name in REASONS:
            problems.append(f"{name}: {REASONS[name]}{_offer(offered and name in CONVERTIBLE)}")
        else:
            written = config.get("peft_version")
            problems.append(
                f"its config has {name}={_short(value)}, which this package does not know: it may give lora_A and"
                f" lora_B another meaning (written by PEFT {written or 'of an unknown version'}; known are PEFT's"
                f" fields up to {KNOWN_UP_TO}). Convert it with PEFT's `save_as_lora` where it was trained, upgrade"
                " this package, or, if you know that its update is plain scale·B·A, take the field out of"
                " adapter_config.json"
            )
    start = _start(config)
    if start.startswith(MUTATING_STARTS):
        if not (converting and is_repeated_start(start)):
            problems.append(
                f"it was trained with init_lora_weights={start!r}, which changes the base weights, so its update does"
                " not belong to the base model: save it with PEFT's path_initial_model_for_weight_conversion, which"
                f" makes a plain LoRA of it{_offer(offered and is_repeated_start(start), ', or ')}"
            )
    elif start not in KEEPING_STARTS:
        problems.append(
            f"it was trained with init_lora_weights={start!r}, which this package does not know: it may change the"
            " base weights. Save it with PEFT's path_initial_model_for_weight_conversion, or set the field to true if"
            " you know that it does not"
        )
    shards = (config.get("megatron_config") or {}) if isinstance(config.get("megatron_config"), Mapping) else {}
    if _is_number(shards.get("tensor_model_parallel_size")) and shards["tensor_model_parallel_size"] > 1:
        problems.append("it was saved by one of several tensor-parallel processes, and is a part of an adapter")
    return problems


def needs_conversion(config: Mapping[str, Any]) -> str | None:
    """Return what a LoRA would have to be converted from on its base model; None where it is not to be converted.

    That is the name of a variant, such as ``DORA``, or of the start that changed the base weights.
    """
    for name in CONVERTIBLE:
        if not _is_off(name, config.get(name)):
            return name.removeprefix("use_").removesuffix("_config").upper()
    start = _start(config)
    return start.upper() if is_repeated_start(start) else None


def moves_weights(config: Mapping[str, Any]) -> bool:
    """Return whether PEFT changes the base model's weights when it starts an adapter that can be converted."""
    return not _is_off("kasa_config", config.get("kasa_config")) or is_repeated_start(_start(config))


def tensor_problems(
    plain: Mapping[str, str], config: Mapping[str, Any], *, converting: bool = False, alone: bool = False
) -> list[str]:
    """Return which of an adapter's tensors are neither its factors nor of its `modules_to_save`, and why that matters.

    Trained biases, whole embeddings and single trained tokens are no problem here.

    Args:
        plain: the keys of its state dict, each with the key without the names of wrappers.
        config: its configuration.
        converting: take the tensors of variants that can be converted, since the adapter is being converted.
        alone: whether nothing of the base model is among them, as in a file that PEFT wrote.
    """
    passed = (*TRAINING_ONLY, *(("lora_magnitude_vector", "lora_diag") if converting else ()))
    problems: dict[str, str] = {}
    modules: dict[str, str] = {}
    for name, short in plain.items():
        parts = short.split(".")
        odd = next((part for part in parts if part.startswith("lora_")), None)
        if found := LORA_KEY.match(short):
            modules.setdefault(found["module"], name)
        elif odd is None and is_saved_module(short, config):
            continue
        elif odd is not None and not odd.startswith(passed):
            problems.setdefault(odd, f"{name}: {_tensor_reason(odd, name)}")
        elif odd is None and (other := next((part for part in parts if part.startswith(tuple(FOREIGN))), None)):
            problems.setdefault(other, f"{name}: it is no tensor of a LoRA, and without it the adapter is another")
        elif odd is None and alone and not _is_explained(short, config):
            problems.setdefault(
                "rest",
                f"{name}: it is neither a factor nor of what the configuration says was trained (modules_to_save,"
                " bias, trainable_token_indices), and without it the adapter may be another. If it is the base"
                " model's own, save the adapter alone, with `model.save_pretrained(folder)`",
            )
    problems |= _stacks(modules)
    for name, short in plain.items():
        module, _, last = short.rpartition(".")
        if (
            module in modules
            and last not in OF_LAYERS
            and ".lora_" not in short
            and not is_saved_module(short, config)
        ):
            problems.setdefault(
                last,
                f"{name}: it stands beside the factors of {module!r}, this package does not know it, and without it"
                " the adapter may be another",
            )
    return list(problems.values())


def method_problem(kind: str) -> str:
    """Return why an adapter of another method than LoRA is no source, and the remedy."""
    if kind in NO_UPDATE:
        return (
            f"the adapter's peft_type is {kind}, not LORA: it is no fixed update of weight matrices, so no LoRA equals"
            " it. Leave it out."
        )
    if kind in NOT_CONVERTED:
        return (
            f"the adapter's peft_type is {kind}, not LORA, and PEFT (up to {KNOWN_UP_TO}) makes no LoRA of it. Leave"
            " it out."
        )
    if kind not in CONVERTED:
        return (
            f"the adapter's peft_type is {kind}, which PEFT up to {KNOWN_UP_TO} does not have. That of a LoRA is LORA."
            " Where the installed PEFT knows the method, pass the base model, base_model= (--base-model), and it is"
            " converted if PEFT can."
        )
    return (
        f"the adapter's peft_type is {kind}, not LORA. Pass its base model, base_model= (--base-model), and it is"
        " converted, or convert it with PEFT's `save_as_lora` first."
    )


def is_repeated_start(start: str) -> bool:
    """Return whether PEFT repeats this `init_lora_weights` exactly when it loads the adapter on its base model."""
    return start in REPEATED_STARTS


def _is_explained(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a tensor beside the factors is one that PEFT saves with such a configuration."""
    if is_embedding(name):
        return True
    if name.endswith(".bias"):
        return (config.get("bias") or "none") != "none"
    return "token_adapter" in name and bool(config.get("trainable_token_indices"))


def _stacks(modules: Mapping[str, str]) -> dict[str, str]:
    """Return problems of factors that are no module's own: PEFT's layers around parameters and attention."""
    problems = {}
    for module, key in modules.items():
        parts = module.split(".")
        if parts[-2:] == ["base_layer", "out_proj"]:
            problems["attention"] = (
                f"{key}: it adapts an nn.MultiheadAttention, whose three input projections are one parameter; a basis"
                " is of modules that are matrices. Leave it out of the adapter's target_modules"
            )
        elif "base_layer" in parts or STACK.search(module):
            problems["experts"] = (
                f"{key}: it adapts a stack of experts (target_parameters), and each expert has factors of its own; a"
                " basis is of modules that are matrices. Train it on target_modules alone"
            )
    return problems


def _tensor_reason(part: str, name: str) -> str:
    if part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        if name.endswith(".bias"):
            return "a trained LoRA bias (lora_bias=True) is no low-rank update; train without it"
        return f"PEFT writes no such key for {part}"
    if part in TENSORS:
        return f"{TENSORS[part]}; train the adapter without, or keep its own adapter_config.json beside it"
    return "this package does not know that tensor of a LoRA, and without it the adapter is another"


def _offer(possible: bool, before: str = ". ") -> str:
    if not possible:
        return ""
    words = "pass its base model, base_model= (--base-model), and it is converted to a LoRA"
    return before + (words if before.endswith("or ") else words[0].upper() + words[1:])


def _is_off(name: str, value: Any) -> bool:
    # PEFT makes a variant's configuration, which switches it on, out of an empty dict
    if name in REASONS and isinstance(value, Mapping):
        return False
    return (
        value is None
        or value is False
        or value in ("", 0)
        or (isinstance(value, (list, tuple, dict, set)) and not value)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _start(config: Mapping[str, Any]) -> str:
    return str(config.get("init_lora_weights", True)).lower()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"

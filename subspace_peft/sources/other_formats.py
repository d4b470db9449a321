"""Recognise adapters that other programs wrote in forms of their own, and say how to get a PEFT LoRA of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MLX = (
    "an adapter of MLX. Its factors are the transposes of PEFT's: write lora_a.T as"
    " base_model.model.<module>.lora_A.weight and lora_b.T as …lora_B.weight into adapter_model.safetensors, with r"
    ' and lora_alpha = scale·r and "peft_type": "LORA" in adapter_config.json'
)
TORCHTUNE = (
    "an adapter of torchtune. Its Hugging Face checkpointer writes PEFT's adapter_model.safetensors and"
    " adapter_config.json as well: name that folder, or convert the tensors with torchtune's"
    " `tune_to_peft_adapter_weights` and `tune_to_peft_adapter_config`"
)
LITGPT = (
    "an adapter of LitGPT or loralib, whose query, key and value are one layer with factors of their own. Merge it"
    " (`litgpt merge_lora`), convert the model (`litgpt convert_from_litgpt`), and train a PEFT LoRA on it"
)
NEMO = (
    "an adapter of NeMo or Megatron. Export it to PEFT's form: `llm.peft.export_lora` in NeMo 2,"
    " `AutoBridge.export_adapter_ckpt` in Megatron-Bridge, convert_nemo_to_hf in NeMo 1"
)
XLABS = (
    "a LoRA of XLabs for FLUX, in the original checkpoint's layout. Load it with diffusers,"
    " `pipe.load_lora_weights(file)`, and save that model's adapter, `pipe.transformer.save_lora_adapter(folder)`"
)
ADAPTERS = (
    "an adapter of the `adapters` library (AdapterHub). Train it with PEFT, or write its loras.<name>.lora_A and"
    " lora_B under PEFT's keys with r and lora_alpha in adapter_config.json"
)
GGUF = "a LoRA for llama.cpp. Name the PEFT folder that it was made from: GGUF renames and may quantise the tensors"

SHARDED = (
    "a distributed checkpoint of torch (FSDP, NeMo), in pieces. Gather it: save the adapter from all processes with"
    " `model.save_pretrained` under FSDP's full state dict, by `llm.peft.export_lora` in NeMo 2, or with torch's"
    " `torch.distributed.checkpoint.format_utils.dcp_to_torch_save`"
)
DEEPSPEED = (
    "a checkpoint of DeepSpeed, in pieces. Gather it with its zero_to_fp32.py, or save the adapter again with"
    " stage3_gather_16bit_weights_on_model_save"
)

KEYS = (
    (re.compile(r"\.loras\.[^.]+\.lora_[AB]$"), ADAPTERS),
    (re.compile(r"\.processor\.(?:proj|qkv)_lora\d*\.(?:down|up)\.weight$"), XLABS),
    (
        re.compile(
            r"adapter_layer\.|\.lora_(?:kqv|dense|hto4h|4htoh|q|k|v)\w*_adapter\.|\.adapter\.linear_(?:in|out)\."
        ),
        NEMO,
    ),
    (re.compile(r"(?:^|\.)layers\.\d+\..*\.(?:lora_[ab]\.weight|magnitude)$"), TORCHTUNE),
    (re.compile(r"^(?:blk\.\d+|token_embd|output)\..*\.lora_[ab]$"), GGUF),
    (re.compile(r"\.lora_[ab]$"), MLX),
    (re.compile(r"^(?:transformer\.h\.|lm_head\.).*\.lora_[AB]$"), LITGPT),
)
FILES = (
    ("adapters.safetensors", MLX),
    ("adapters.npz", MLX),
    ("lit_model.pth.lora", LITGPT),
    ("lit_model.pth", LITGPT),
    ("*.pth.lora", LITGPT),
    ("pytorch_adapter.bin", ADAPTERS),
    ("adapter_*.pt", TORCHTUNE),
    ("adapter_[0-9]*.safetensors", TORCHTUNE),
    ("*.nemo", NEMO),
    ("*.gguf", GGUF),
    ("ggml-adapter-model.bin", GGUF),
    ("*.distcp", SHARDED),
    ("weights/*.distcp", SHARDED),
    ("pytorch_model_fsdp*/*.distcp", SHARDED),
    ("*zero_pp_rank*.pt", DEEPSPEED),
    ("global_step*/*.pt", DEEPSPEED),
    ("zero_to_fp32.py", DEEPSPEED),
)


def format_of_keys(names: Iterable[str]) -> str | None:
    """Return what an adapter with these tensors is, and how to convert it; None where it is none of these forms."""
    keys = list(names)
    return next((words for pattern, words in KEYS if any(pattern.search(key) for key in keys)), None)


def format_of_config(config: Mapping[str, Any]) -> str | None:
    """Return the same of an adapter_config.json, which MLX and the `adapters` library write in forms of their own."""
    if "peft_type" in config:
        return None
    if "lora_parameters" in config:
        return MLX
    return ADAPTERS if isinstance(config.get("config"), Mapping) and "model_class" in config else None


def format_of_file(path: Path) -> str | None:
    """Return the same of a file, by its name."""
    return next((words for pattern, words in FILES if "/" not in pattern and path.match(pattern)), None)


def format_of_folder(folder: Path) -> str | None:
    """Return the same of a folder, by the names of its files."""
    return next((words for pattern, words in FILES if any(True for _ in folder.glob(pattern))), None)

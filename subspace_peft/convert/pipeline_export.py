"""Export a pipeline's tasks as the LoRA file that diffusers' pipelines load, or as a PEFT folder per part."""

from __future__ import annotations

from typing import Any

import torch

from ..basis.pipeline_parts import PARTS, split_part
from ..errors import SubspaceError
from ..tasks.read import Parts, SavedTask

FILE = "pytorch_lora_weights.safetensors"
CLIP = "text_model."  # before the modules of a CLIP text encoder, where its class wraps the model
UNET = ("down_blocks", "up_blocks", "mid_block", "conv_in", "conv_out", "time_embedding", "add_embedding")


def part_of(task: SavedTask) -> str | None:
    """Return the part of a pipeline that a task is of, by its basis's names and its own; None where neither tells."""
    if isinstance(task.modules, Parts):
        parts = {split_part(key)[0] for key in task.modules.names.values() if not _is_own(task, key)}
        if len(parts) == 1 and (part := parts.pop()):
            return part
    firsts = {name.split(".", 1)[0] for name in task.cores}
    if firsts <= set(UNET):
        return "unet"
    return "transformer" if firsts <= {"transformer_blocks", "single_transformer_blocks"} else None


def _is_own(task: SavedTask, key: str) -> bool:
    # a GPT-2's modules begin with "transformer" themselves
    return key in task.cores


def in_diffusers_names(part: str, name: str) -> str:
    """Return what diffusers' files call a module of a part of a pipeline."""
    clip = part.startswith("text_encoder") and name.startswith("encoder.layers.")
    return f"{part}.{CLIP if clip else ''}{name}"


def in_installed_names(part: str | None, task: SavedTask) -> dict[str, str]:
    """Return module → its name in the text encoder's class, where the installed transformers has flattened it.

    Files of LoRAs say ``text_model.encoder.layers…``; a `CLIPTextModel` of transformers 5 has ``encoder.layers…``, a
    `CLIPTextModelWithProjection`, which is the second one of a pipeline, still has the longer names.
    """
    if part != "text_encoder" or not all(name.startswith(CLIP) for name in task.cores) or _has_text_model():
        return {}
    return {name: name.removeprefix(CLIP) for name in task.cores}


def _has_text_model() -> bool:
    from transformers import CLIPTextConfig, CLIPTextModel

    tiny = CLIPTextConfig(
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=2,
        max_position_embeddings=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.device("meta"):
        return hasattr(CLIPTextModel(tiny), CLIP.rstrip("."))


def check_part(part: str | None, task: Any) -> str:
    """Return the part.

    Raises:
        SubspaceError: it is not known, or no part of a pipeline.
    """
    if part in PARTS:
        return str(part)
    raise SubspaceError(
        f"{task}: which part of a pipeline it is of is not known. Say it: part='unet' (--part unet), or one of"
        f" {', '.join(PARTS[1:])}."
    )


def check_plain(task: SavedTask, what: Any, modules_to_save: bool) -> None:
    """Raise `SubspaceError` where a task has tensors that no diffusers file holds, and that may not be left out."""
    embeddings = [name for name, shape in (task.config.weight_shapes or {}).items() if len(shape) == 2]
    others = [*(task.extras if modules_to_save else ()), *embeddings]
    if others:
        raise SubspaceError(
            f"{what}: it has trained {others[0]}, which no LoRA file of diffusers holds. Export it with format='peft'"
            " (--format peft), or leave it out with modules_to_save=False (--no-modules-to-save)."
        )

"""Tell a LoRA of a diffusion pipeline from one of a model, by the names of the modules that it adapts."""

from __future__ import annotations

from collections.abc import Mapping

from ..basis.module_names import has_peft_prefix
from ..basis.pipeline_parts import parts_in

METADATA = "lora_adapter_metadata"
# names in diffusers' transformers; a GPT-2, whose modules begin with "transformer." too, has none of them
WORDS = {"transformer_blocks", "single_transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out"}


def is_pipeline(keys: Mapping[str, Mapping[str, str]], metadata: Mapping[str, str] | None = None) -> bool:
    """Return whether modules' names begin with the parts of a pipeline that have them.

    Args:
        keys: module → its keys, by side.
        metadata: of the file, if there is one.
    """
    parts = parts_in(keys)
    # PEFT adapts one model, which may have a submodule called `unet`
    if not parts or any(has_peft_prefix(key) for sides in keys.values() for key in sides.values()):
        return False
    if not all(part.startswith("transformer") for part in parts) or METADATA in (metadata or {}):
        return True
    return any(not WORDS.isdisjoint(module.split(".")) for module in keys)

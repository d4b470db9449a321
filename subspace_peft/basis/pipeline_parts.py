"""The parts of a diffusion pipeline, whose names stand in front of modules' names in its LoRA files."""

from __future__ import annotations

from collections.abc import Iterable

# the attributes of diffusers' pipelines that hold models with adapters
PARTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_encoder_4",
    "image_encoder",
    "controlnet",
    "vae",
)


def split_part(name: str) -> tuple[str, str]:
    """Return the part that a module's name begins with, "" for none, and the name in it."""
    part, _, rest = name.partition(".")
    return (part, rest) if part in PARTS and rest else ("", name)


def parts_in(names: Iterable[str]) -> list[str]:
    """Return the parts that the names of modules begin with, in the order of `PARTS`; none where some begin with none.

    The names of a GPT-2 begin with ``transformer`` as well: only a pipeline's files may be asked.
    """
    found = {split_part(name)[0] for name in names}
    return [] if "" in found else sorted(found, key=PARTS.index)

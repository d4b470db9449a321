"""Say where a source's scale is a guess."""

from __future__ import annotations

from collections.abc import Iterable

from .._io.warn import warn_caller
from .source import Source

NAMED = 5


def warn_of_guesses(sources: Iterable[Source]) -> None:
    """Warn, once for all of them, of sources that came without configuration and alpha."""
    places = [source.location for source in sources if source.scale_is_guessed]
    if places:
        more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
        warn_caller(
            f"{', '.join(places[:NAMED])}{more}: no configuration and no alpha came with the factors, so lora_B·lora_A"
            " counts as the update, with a scale of 1. If it was trained with another lora_alpha / r, its size is"
            " wrong: put its adapter_config.json beside it, or pass (state_dict, config)."
        )

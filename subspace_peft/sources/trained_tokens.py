"""Say which sources trained single tokens, which no basis holds."""

from __future__ import annotations

from collections.abc import Iterable

from .._io.warn import warn_caller
from .source import Source

ENDING = "trainable_tokens_delta"
NAMED = 5


def warn_of_tokens(sources: Iterable[Source]) -> None:
    """Warn, once for all of them, of sources with tokens trained by `trainable_token_indices`.

    A basis is built of the updates of matrices alone, so these adapters are other functions without their tokens.
    """
    places = [source.location for source in sources if any(key.endswith(ENDING) for key in source.other_keys)]
    if places:
        more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
        warn_caller(
            f"{', '.join(places[:NAMED])}{more}: tokens were trained with the LoRA (trainable_token_indices), which no"
            " basis holds. The basis is built of the LoRA's updates alone, and no task can be projected from such an"
            " adapter: train it without, or with whole embeddings (modules_to_save), if its tasks are wanted."
        )

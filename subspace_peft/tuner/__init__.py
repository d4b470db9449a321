"""Train and serve in a basis: PEFT's own trio of config, layer and model."""

from typing import TYPE_CHECKING, Any

import peft  # noqa: F401  registers this method first, whichever module of this package is imported first

from .._moved import moved_name
from .config import SubspaceConfig
from .extra_choice import ExtraRanks, choose_extra_ranks
from .layer import SubspaceLayer
from .model import SubspaceModel

__all__ = ["ExtraRanks", "SubspaceConfig", "SubspaceLayer", "SubspaceModel", "choose_extra_ranks"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return moved_name(__name__, name)

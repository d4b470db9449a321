"""Training and serving in a basis: PEFT's own trio of config, layer and model."""

import peft  # noqa: F401  registers this method first, whichever module of this room is imported first

from .bank import TaskBank
from .config import SubspaceConfig
from .hotswap import hotswap
from .injected import load_adapter, save_adapter
from .layer import SubspaceLayer
from .model import SubspaceModel
from .registration import register

register()

__all__ = [
    "SubspaceConfig",
    "SubspaceLayer",
    "SubspaceModel",
    "TaskBank",
    "hotswap",
    "load_adapter",
    "register",
    "save_adapter",
]

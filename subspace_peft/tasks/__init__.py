"""Write, read, swap and push saved tasks, and serve many of them at once."""

from typing import TYPE_CHECKING, Any

from .._moved import moved_name
from .adapter_io import load_adapter, save_adapter
from .bank import TaskBank
from .hotswap import hotswap
from .read import SavedTask, read_task

__all__ = ["SavedTask", "TaskBank", "hotswap", "load_adapter", "read_task", "save_adapter"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return moved_name(__name__, name)

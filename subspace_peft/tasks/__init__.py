"""Saved tasks: write, read, swap, serve many at once, and push them."""

from .adapter_io import load_adapter, save_adapter
from .bank import TaskBank
from .hotswap import hotswap
from .read import Task, read_task

__all__ = ["Task", "TaskBank", "hotswap", "load_adapter", "read_task", "save_adapter"]

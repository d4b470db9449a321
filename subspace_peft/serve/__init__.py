"""Serve tasks in other programs: export them on demand, one by one, from a bank's file or a folder of tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exports import TaskExports

__all__ = ["TaskExports"]


def __getattr__(name: str) -> Any:
    # vLLM imports this package in all of its processes, whether or not its plugin has anything to do there
    if name == "TaskExports":
        from .exports import TaskExports

        return TaskExports
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

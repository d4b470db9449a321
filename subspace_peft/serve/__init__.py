"""Serve tasks in other programs: export them on demand, one by one, from a bank's file or a folder of tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .exports import TaskExports

__all__ = ["TaskExports"]

# vLLM imports this package in all of its processes, whether or not its plugin has anything to do there
if not TYPE_CHECKING:
    __getattr__, __dir__ = attach(__name__, {"TaskExports": "exports"})

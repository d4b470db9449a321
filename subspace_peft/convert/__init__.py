"""Convert LoRAs into tasks, tasks into LoRAs, and tasks from one basis to another."""

from typing import Any

from .._moved import moved_name
from .export import Export, export_lora
from .gguf import export_gguf
from .migrate import Migration, migrate_task
from .project import Projection, project_lora

__all__ = ["Export", "Migration", "Projection", "export_gguf", "export_lora", "migrate_task", "project_lora"]


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)

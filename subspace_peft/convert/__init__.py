"""Between LoRA and coefficients, both ways."""

from ..tuner.saved import Task, read_task
from .export import Export, export_lora
from .gguf import export_gguf
from .migrate import Migration, migrate_task
from .project import Projection, project_lora

__all__ = [
    "Export",
    "Migration",
    "Projection",
    "Task",
    "export_gguf",
    "export_lora",
    "migrate_task",
    "project_lora",
    "read_task",
]

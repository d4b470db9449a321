"""Between LoRA and coefficients, both ways."""

from .export import Export, export_lora
from .project import Projection, project_lora
from .task import Task, read_task

__all__ = ["Export", "Projection", "Task", "export_lora", "project_lora", "read_task"]

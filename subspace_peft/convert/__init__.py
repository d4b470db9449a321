"""Between LoRA and coefficients, both ways."""

from ..tuner.saved import Task, read_task
from .export import Export, export_lora
from .gguf import export_gguf
from .project import Projection, project_lora

__all__ = ["Export", "Projection", "Task", "export_gguf", "export_lora", "project_lora", "read_task"]

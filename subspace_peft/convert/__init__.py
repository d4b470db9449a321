"""Convert LoRAs into tasks, tasks into LoRAs, and tasks from one basis to another.

Names are loaded when they are first used: projecting needs nothing of what exports.
"""

from typing import TYPE_CHECKING, Any

from .._lazy import attach
from .._moved import NAMES, moved_name

if TYPE_CHECKING:
    from .absorb import absorb_task
    from .export import export_lora
    from .gguf import export_gguf
    from .lora_files import Export
    from .migrate import Migration, migrate_task
    from .project import project_lora
    from .projection import Projection

_PLACES = {
    "Export": "lora_files",
    "Migration": "migrate",
    "Projection": "projection",
    "absorb_task": "absorb",
    "export_gguf": "gguf",
    "export_lora": "export",
    "migrate_task": "migrate",
    "project_lora": "project",
}

__all__ = [
    "Export",
    "Migration",
    "Projection",
    "absorb_task",
    "export_gguf",
    "export_lora",
    "migrate_task",
    "project_lora",
]

if not TYPE_CHECKING:
    _get, __dir__ = attach(__name__, _PLACES)

    def __getattr__(name: str) -> Any:
        return moved_name(__name__, name) if name in NAMES.get("convert", {}) else _get(name)

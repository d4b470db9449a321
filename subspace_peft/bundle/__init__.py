"""Pack many tasks on one basis into one file, add to it, read them one by one, push it, and compress LoRAs into it.

Names are loaded when they are first used: listing a bundle's tasks needs no torch.
"""

from typing import TYPE_CHECKING, Any

from .._lazy import attach
from .._moved import NAMES, moved_name

if TYPE_CHECKING:
    from .bundle import Bundle, open_bundle
    from .compress import compress_fleet
    from .compression_report import CompressionReport
    from .index import BundledTask
    from .load import extract_task, extract_tasks, load_task
    from .migrate import migrate_bundle
    from .push import push_bundle
    from .write import add_tasks, bundle_tasks

_PLACES = {
    "Bundle": "bundle",
    "BundledTask": "index",
    "CompressionReport": "compression_report",
    "add_tasks": "write",
    "bundle_tasks": "write",
    "compress_fleet": "compress",
    "extract_task": "load",
    "extract_tasks": "load",
    "load_task": "load",
    "migrate_bundle": "migrate",
    "open_bundle": "bundle",
    "push_bundle": "push",
}

__all__ = [
    "Bundle",
    "BundledTask",
    "CompressionReport",
    "add_tasks",
    "bundle_tasks",
    "compress_fleet",
    "extract_task",
    "extract_tasks",
    "load_task",
    "migrate_bundle",
    "open_bundle",
    "push_bundle",
]

if not TYPE_CHECKING:
    _get, __dir__ = attach(__name__, _PLACES)

    def __getattr__(name: str) -> Any:
        return moved_name(__name__, name) if name in NAMES.get("bundle", {}) else _get(name)

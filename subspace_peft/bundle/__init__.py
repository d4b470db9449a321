"""Pack many tasks on one basis into one file, add to it, read them one by one, push it, and compress LoRAs into it."""

from typing import Any

from .._moved import moved_name
from .bundle import Bundle, BundledTask, open_bundle
from .compress import CompressionReport, compress_fleet
from .load import extract_task, extract_tasks, load_task
from .migrate import migrate_bundle
from .push import push_bundle
from .write import add_tasks, bundle_tasks

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


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)

"""Many tasks on one basis in one file: packing, adding, reading one by one, pushing, and compressing a fleet of LoRAs into it."""

from .bundle import Bundle, BundledTask, open_bundle
from .load import extract_task, extract_tasks, load_task
from .write import add_tasks, bundle_tasks

__all__ = [
    "Bundle",
    "BundledTask",
    "add_tasks",
    "bundle_tasks",
    "extract_task",
    "extract_tasks",
    "load_task",
    "open_bundle",
]

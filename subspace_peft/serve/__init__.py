"""Tasks for other programs to serve: exported on demand, one by one, out of a bank's file or a folder of tasks."""

from .exports import TaskExports

__all__ = ["TaskExports"]

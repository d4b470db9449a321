"""The command line: each verb is a thin door to one public function."""

from .main import main

__all__ = ["main"]

"""Warn at the line of the user's that led to it, however deep in the package it is noticed."""

from __future__ import annotations

import sys
import warnings

# what is between the package's own lines, or calls them for the user
INSIDE = (
    "subspace_peft",
    "torch",
    "contextlib",
    "functools",
    "peft",
    "transformers",
    "diffusers",
    "accelerate",
    "trl",
)


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn with a warning that names the user's own line on the way here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)

"""A griffe extension: the fields of a dataclass that keep their texts in `metadata["help"]`, as a table of parameters.

It also leaves private bases, such as what makes short reprs, out of the list of a class's bases.

griffe reads source; defaults and inherited fields are those of the class itself, which is therefore imported.
"""

from __future__ import annotations

import importlib
from dataclasses import MISSING, Field, fields
from typing import Any

import griffe
from peft import PeftConfig


class FieldTexts(griffe.Extension):
    """Add a section of parameters to the docstring of every such dataclass."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Look at a class once its members are read."""
        cls.bases = [base for base in cls.bases if "._" not in getattr(base, "canonical_path", "")]
        # its own fields, or those of the class that declares them for it
        if not any("'help'" in str(each.value) for each in cls.attributes.values()) and "ConfigFields" not in map(
            str, cls.bases
        ):
            return
        live = getattr(importlib.import_module(cls.module.path), cls.name)
        told = [each for each in fields(live) if each.init and "help" in each.metadata]
        inherited = {each.name for each in fields(PeftConfig)}
        told.sort(key=lambda each: each.name in inherited)  # its own first, inherited ones below
        parameters = [
            griffe.DocstringParameter(
                each.name, annotation=_annotation(cls, each), description=each.metadata["help"], value=_default(each)
            )
            for each in told
        ]
        docstring = cls.docstring
        docstring.parser = "google"
        docstring.parsed.append(griffe.DocstringSectionParameters(parameters, title="Fields:"))


def _annotation(cls: griffe.Class, field: Field[Any]) -> Any:
    own = cls.attributes.get(field.name)
    return own.annotation if own is not None else field.type


def _default(field: Field[Any]) -> str | None:
    if field.default_factory is not MISSING:
        return repr(field.default_factory())
    return None if field.default is MISSING else repr(field.default)

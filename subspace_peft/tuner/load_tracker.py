"""Track which tensors a task's file has brought, for loaders that check nothing: transformers assigns them singly."""

from __future__ import annotations

from typing import Any

from ..errors import BadFileError


class LoadTracker:
    """The tensors of one adapter that were loaded, over all its layers.

    An adapter into which nothing was loaded at all is a new one, made from a saved configuration; one into which some
    tensors were loaded and others not was read from an incomplete file.

    Attributes:
        loaded: (module, name of the tensor) of each.
    """

    def __init__(self) -> None:
        self.loaded: set[tuple[str, str]] = set()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # an earlier version called it otherwise
        self.loaded = state.get("loaded", state.get("came", set()))

    def note(self, module: str, name: str) -> None:
        """Note that the tensor `name` of `module` was loaded."""
        self.loaded.add((module, name))

    def check(self, module: str, coefficients: set[str], basis: set[str]) -> None:
        """Check that the file has brought all or nothing.

        Args:
            module: name of the layer's module.
            coefficients: names of its trained tensors.
            basis: names of the tensors of a basis that only the file has; they are needed in any case.

        Raises:
            BadFileError: some tensors that `module` needs were loaded, and others not.
        """
        needed = basis | (coefficients if self.loaded else set())
        missing = sorted(name for name in needed if (module, name) not in self.loaded)
        if missing:
            raise BadFileError(
                f"Module {module!r}: the task's file did not bring {', '.join(missing)}. It is incomplete, or was"
                " never loaded: fetch or save the task again; `PeftModel.from_pretrained` says more."
            )

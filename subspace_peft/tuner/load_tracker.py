"""Track which tensors a task's file has brought, for loaders that check nothing: transformers assigns them singly."""

from __future__ import annotations

from typing import Any

from .._io.warn import warn_caller
from ..errors import BadFileError


class LoadTracker:
    """The tensors of one adapter that were loaded, over all its layers.

    An adapter into which nothing was loaded at all is a new one, made from a saved configuration; one into which some
    tensors were loaded and others not was read from an incomplete file.

    Attributes:
        loaded: (module, name of the tensor) of each.
        unstarted: why a new task cannot start where the configuration says, until it is said; None where it can.
    """

    def __init__(self, unstarted: str | None = None) -> None:
        self.loaded: set[tuple[str, str]] = set()
        self.unstarted = unstarted

    def __setstate__(self, state: dict[str, Any]) -> None:
        # an earlier version called it otherwise
        self.loaded = state.get("loaded", state.get("came", set()))
        self.unstarted = state.get("unstarted")

    def note(self, module: str, name: str) -> None:
        """Note that the tensor `name` of `module` was loaded."""
        self.loaded.add((module, name))

    def require(self, module: str, coefficients: set[str], basis: set[str]) -> None:
        """Check that the file has brought all that `module` needs, or nothing where a new task can do without.

        Args:
            module: name of the layer's module.
            coefficients: names of its trained tensors.
            basis: names of the tensors of a basis that only the file has; they are needed in any case.

        Raises:
            BadFileError: some tensors that `module` needs were loaded, and others not.
        """
        needed = basis | (coefficients if self.loaded else set())
        missing = sorted(name for name in needed if (module, name) not in self.loaded)
        if missing and not self.loaded:
            raise BadFileError(
                f"Module {module!r}: {', '.join(missing)} lie in the file of the task whose configuration this is, and"
                " were never loaded. Load that task, `PeftModel.from_pretrained(model, task)`, and add a new one"
                " beside it, `model.add_adapter(name, config)`; or make a new SubspaceConfig with a basis."
            )
        if missing:
            raise BadFileError(
                f"Module {module!r}: the task's file did not bring {', '.join(missing)}. It is incomplete: fetch or"
                " save the task again; `PeftModel.from_pretrained` says more."
            )

    def warn_unstarted(self) -> None:
        """Warn, once, of a new task that starts elsewhere than its configuration asks."""
        if self.unstarted is not None and not self.loaded:
            warn_caller(f"A new task of a saved configuration starts at zero. {self.unstarted}")
            self.unstarted = None

"""What a task's own file has brought, where the loader does not check it: transformers assigns tensors one by one."""

from __future__ import annotations

from ..errors import BadFileError


class Arrivals:
    """The tensors of one adapter that have come, over all its layers.

    An adapter into which nothing has come at all is a new one, made from a saved configuration; one into which some
    tensors have come and others not was read from an incomplete file.
    """

    def __init__(self) -> None:
        self.came: set[tuple[str, str]] = set()

    def note(self, module: str, name: str) -> None:
        """Tensor `name` of `module` has come."""
        self.came.add((module, name))

    def check(self, module: str, coefficients: set[str], basis: set[str]) -> None:
        """Raise `BadFileError` where the file has brought something, but not all of what `module` needs.

        Args:
            module: name of the layer's module.
            coefficients: names of its trained tensors.
            basis: names of the tensors of a basis that only the file has; they are needed in any case.
        """
        needed = basis | (coefficients if self.came else set())
        missing = sorted(name for name in needed if (module, name) not in self.came)
        if missing:
            raise BadFileError(
                f"Module {module!r}: the task's file did not bring {', '.join(missing)}. It is incomplete, or was"
                " never loaded: fetch or save the task again; `PeftModel.from_pretrained` says more."
            )

"""The packages that recipes need beyond the library's own."""

from __future__ import annotations

import importlib.util

from subspace_peft.errors import SubspaceError


def require(*packages: str, extra: str = "recipes") -> None:
    """Check that packages are installed, before anything is trained.

    Args:
        packages: names by which they are imported.
        extra: the extra of subspace-peft that brings them.

    Raises:
        SubspaceError: some are not; names them and the command that installs them.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise SubspaceError(
            f'{", ".join(missing)} not found. Install what this needs: pip install "subspace-peft[{extra}]".'
        )

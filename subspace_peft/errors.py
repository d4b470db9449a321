"""The errors of this package. Each message names what clashed and the remedy."""

from __future__ import annotations


class SubspaceError(ValueError):
    """Base of every error that subspace_peft raises on bad input. A `ValueError`, as PEFT's own checks are."""


class BasisNotFoundError(SubspaceError):
    """No basis was given, or the one referenced is nowhere to be found."""


class BasisMismatchError(SubspaceError):
    """A basis was found, but it is not the one referenced, or it does not fit the model."""


class UnknownModuleError(BasisMismatchError, KeyError):
    """A basis was asked for a module that it does not have. A `KeyError` too, which is what a mapping raises."""

    def __str__(self) -> str:
        # a KeyError shows its message in quotes
        return ValueError.__str__(self)


class BadFileError(SubspaceError):
    """A file is truncated, malformed, of a wrong dtype or holds non-finite values."""


class NoConfigurationError(BadFileError, TypeError):
    """A JSON file makes no configuration. A `TypeError` too, which is what PEFT raises for it."""


class OccupiedError(SubspaceError):
    """Something else lies where a thing is to be written."""


class DiskError(OSError):
    """A file or folder cannot be read or written; says which, why, and what helps, in `strerror` and as its text.

    Raised as one that is also of the kind that Python raised, such as `PermissionError`.
    """

    def __str__(self) -> str:
        return str(self.strerror)


class SourceError(SubspaceError):
    """One or more source adapters cannot be used."""


class HubUnavailableError(SubspaceError):
    """The Hub did not answer: a time-out, a lost connection, a rate limit, a fault of the server.

    It says nothing about what was asked for, so nothing is skipped for it.
    """


class HubOfflineError(HubUnavailableError, SourceError, BasisNotFoundError):
    """The Hub may not be asked (HF_HUB_OFFLINE), and this machine does not have what is asked for.

    A source or basis that is not here, too.
    """


class ProcessError(SubspaceError):
    """Another of the processes that work together has failed or gone; the message names it."""

"""`ask`, through which every request to the Hub goes: repeated while the Hub does not answer, its faults named truly.

huggingface_hub repeats some requests a few times by itself, for some 20 seconds. A Hub that limits rates or is down
does so for minutes, and then what was asked for is as good as before.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import importlib
import json
import logging
import os
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import HubOfflineError, HubUnavailableError, SubspaceError

Answer = TypeVar("Answer")
WAIT = "SUBSPACE_PEFT_HUB_WAIT"
# seconds for which one request is repeated; in long runs, longer than the five minutes of a Hub's rate limit
LIMIT, PATIENT_LIMIT = 40.0, 360.0
# seconds between two tries: the first, doubled from try to try up to the last
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
PASSING = (408, 425, 429)  # and all from 500 on: the Hub may answer the same request later
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EMFILE)
logger = logging.getLogger(__name__)
# the state of `random` itself is the caller's
_random = random.Random()


@dataclass(frozen=True)
class Fault:
    """Why the Hub did not answer.

    Attributes:
        reason: in words.
        passing: whether it may pass.
        pause: seconds for which the Hub asks to be left alone; None: it does not say.
        reached: whether the request may have been carried out nevertheless.
        url: that was asked for, where it is known.
        offline: whether this machine was told not to ask.
    """

    reason: str
    passing: bool = True
    pause: float | None = None
    reached: bool = True
    url: str = ""
    offline: bool = False


@dataclass(frozen=True)
class _Patience:
    limit: float
    say: Callable[[str], object]


_patience: ContextVar[_Patience | None] = ContextVar("_patience", default=None)


@contextlib.contextmanager
def patient(say: Callable[[str], object] | None = None) -> Iterator[None]:
    """While open, requests wait for the Hub as long as a long run may: `PATIENT_LIMIT` seconds each.

    Args:
        say: is told what is waited for, and an empty text once the Hub answers; by default it is logged.
    """
    token = _patience.set(_Patience(PATIENT_LIMIT, say or _log))
    try:
        yield
    finally:
        _patience.reset(token)


def ask(what: str, call: Callable[[], Answer], *, repeat: Callable[[Fault], bool] = lambda fault: True) -> Answer:
    """Make a request to the Hub, again while it does not answer.

    The pauses between two tries grow from one second to a minute, with some jitter, and are never shorter than the
    Hub asks for (``Retry-After``, ``RateLimit``). A request is repeated for 40 seconds, within `patient` for six
    minutes, or for as many seconds as the environment variable `SUBSPACE_PEFT_HUB_WAIT` says.

    Args:
        what: what is asked for, for messages.
        call: makes the request, by huggingface_hub or PEFT.
        repeat: whether the request may be made again after a fault; one that is not idempotent may not always.

    Returns:
        What `call` returns.

    Raises:
        HubUnavailableError: the Hub does not answer.
        HubOfflineError: this machine was told not to ask.

    Whatever else `call` raises comes through, such as the Hub's answer that there is nothing of that name.
    """
    patience = _patience.get() or _Patience(LIMIT, _log)
    limit = _limit(patience.limit)
    start, tries, backoff = time.monotonic(), 0, FIRST_PAUSE
    while True:
        tries += 1
        try:
            answer = call()
        except Exception as error:
            fault = fault_of(error)
            if fault is None:
                raise
            if fault.offline:
                raise HubOfflineError(
                    f"{what}: there is no such folder on this machine, its cache does not have it, and it may not ask"
                    " the Hub (HF_HUB_OFFLINE). Unset that variable, or fetch it while online."
                ) from error
            spent = time.monotonic() - start
            pause = max(backoff * _random.uniform(0.8, 1.2), fault.pause or 0.0)
            if not fault.passing or not repeat(fault) or spent + pause > limit:
                raise HubUnavailableError(_told(what, fault, tries, spent, limit)) from error
            patience.say(
                f"the Hub does not answer ({fault.reason}): {what} is asked for again in {pause:.0f} s, for up to"
                f" {limit:.0f} s in all"
            )
            time.sleep(pause)
            backoff = min(2 * backoff, LONGEST_PAUSE)
        else:
            if tries > 1:
                patience.say("")
            return answer


def fault_of(error: BaseException) -> Fault | None:
    """Return why the Hub did not answer, by an error of its client or one that was raised from it.

    None where it did answer, if only that there is nothing of that name; or where the fault is this machine's.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    found: BaseException | None = error
    while found is not None and not isinstance(found, SubspaceError):
        if isinstance(found, OfflineModeIsEnabled):
            return Fault("offline", passing=False, offline=True)
        if isinstance(found, HfHubHTTPError):
            return _of_status(found.response)
        if isinstance(found, FileMetadataError):
            return Fault(_line(found), passing=False)
        if isinstance(found, OSError) and found.errno in DISK:
            return None
        if (fault := _of_transport(found)) is not None:
            return fault
        cause = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
        if cause is None and isinstance(found, LocalEntryNotFoundError) and constants.is_offline_mode():
            return Fault("offline", passing=False, offline=True)
        found = cause
    return None


def refusal(error: BaseException, repo_id: str, revision: str | None = None) -> str:
    """Say what the Hub's answer means: no such repository, private, gated, no such revision.

    Args:
        error: of huggingface_hub, or one that was raised from it.
        repo_id: the repository that was asked for.
        revision: that was asked for; None for main.
    """
    from huggingface_hub import errors

    found: BaseException | None = error
    while found is not None and not isinstance(found, errors.HfHubHTTPError):
        found = found.__cause__ or found.__context__
    if found is None:
        return _line(error)
    code = getattr(found.response, "status_code", None)
    log_in = "log in by `hf auth login`, or pass token="
    if isinstance(found, errors.GatedRepoError):
        return f"{repo_id} is gated: ask for access on its page on the Hub, and {log_in} ({code})"
    if isinstance(found, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision or 'main'} ({code})"
    if isinstance(found, errors.EntryNotFoundError):
        return f"{repo_id} has no such file at revision {revision or 'main'} ({code})"
    if isinstance(found, errors.DisabledRepoError):
        return f"{repo_id} was disabled by the Hub ({code})"
    if isinstance(found, errors.RepositoryNotFoundError):
        return f"the Hub has no repository {repo_id}, or it is private and you have to {log_in} ({code})"
    if code == 401:
        return f"the Hub does not know this token: {log_in} ({_line(found)})"
    if code == 403:
        return f"your token does not allow that for {repo_id}: {log_in}, of an account that may ({_line(found)})"
    return _line(found)


def _limit(usual: float) -> float:
    given = os.environ.get(WAIT)
    if not given:
        return usual
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise SubspaceError(f"{WAIT}={given!r}: give a number of seconds, or leave it out.")
    return seconds


def _told(what: str, fault: Fault, tries: int, spent: float, limit: float) -> str:
    times = "once" if tries == 1 else f"{tries} times in {spent:.0f} s"
    asked = f" The Hub asks to be left alone for {fault.pause:.0f} s." if fault.pause and fault.pause > limit else ""
    later = f" Try again later; {WAIT} sets for how many seconds a request is repeated." if fault.passing else ""
    return f"{what}: the Hub did not answer: {fault.reason}; asked {times}.{asked}{later}"


def _of_status(response: Any) -> Fault | None:
    code = int(response.status_code)
    if code not in PASSING and code < 500:
        return None
    said = " ".join(filter(None, (str(code), getattr(response, "reason_phrase", ""))))
    # a rate limit and a service that is closed are said before a request is carried out
    return Fault(said, pause=_pause(response.headers), reached=code not in (425, 429), url=_url(response))


def _url(asked: Any) -> str:
    """Return the address that an answer, or an error of the client, is of; an empty text where it is not known."""
    try:
        return str(asked.request.url)
    except (AttributeError, RuntimeError):
        return ""


def _of_transport(error: BaseException) -> Fault | None:
    """Return the fault that an error of the connection is; None for any other error."""
    said = f"{type(error).__name__}: {_line(error)}"
    for client in _clients():
        if isinstance(error, client.HTTPStatusError):
            return _of_status(error.response)
        if isinstance(error, (client.UnsupportedProtocol, client.InvalidURL)):
            return Fault(said, passing=False, reached=False)
        if isinstance(error, (client.TransportError, client.DecodingError, client.StreamError)):
            unsent = isinstance(error, (client.ConnectError, client.ConnectTimeout, client.PoolTimeout))
            return Fault(said, passing=not _untrusted(error), reached=not unsent, url=_url(error))
    if isinstance(error, json.JSONDecodeError):
        return Fault(f"what it sent is no JSON ({_line(error)})")
    if isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError)) or type(error).__name__ == "gaierror":
        return Fault(said, passing=not _untrusted(error))
    broken = isinstance(error, OSError) and str(error).startswith("Consistency check failed")
    if broken or type(error).__name__ == "XetDownloadError":
        return Fault(f"what it sent was cut off ({_line(error)})")
    return None


def _untrusted(error: BaseException) -> bool:
    # no waiting makes a certificate valid
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def _clients() -> Iterator[Any]:
    """Yield huggingface_hub's HTTP client, whose errors are no OSErrors."""
    for name in ("httpx2", "httpx"):  # of huggingface_hub 2 and 1
        with contextlib.suppress(ImportError):
            yield importlib.import_module(name)


def _pause(headers: Mapping[str, str]) -> float | None:
    """Return the seconds for which the Hub asks to be left alone, by its headers."""
    from huggingface_hub.utils import parse_ratelimit_headers

    asked: list[float] = []
    if after := str(headers.get("Retry-After") or "").strip():
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            # seconds, or a date
            date = None if after.replace(".", "", 1).isdecimal() else email.utils.parsedate_to_datetime(after)
            asked.append(float(after) if date is None else date.timestamp() - time.time())
    with contextlib.suppress(ValueError):
        limits = parse_ratelimit_headers(headers)
        if limits is not None and limits.remaining == 0:
            asked.append(float(limits.reset_in_seconds))
    return max(0.0, *asked) if asked else None


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _log(text: str) -> None:
    if text:
        logger.warning("%s", text[0].upper() + text[1:])

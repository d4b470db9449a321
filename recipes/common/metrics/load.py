"""`load_metric`: `evaluate.load`, or its twin where the Hub is out of reach."""

from __future__ import annotations

import functools
import logging
import os
import threading
from typing import TYPE_CHECKING

from subspace_peft.errors import SubspaceError

if TYPE_CHECKING:
    from evaluate import EvaluationModule

logger = logging.getLogger(__name__)
OFFLINE = ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE")
PATIENCE = 5.0  # seconds for the Hub to answer at all


def _is_script(name: str) -> bool:
    """Whether `evaluate.load` finds `name` on this machine: a script, or a folder with a script of the folder's
    name."""
    stem = os.path.basename(os.path.normpath(name))
    return (name.endswith(".py") and os.path.isfile(name)) or os.path.isfile(os.path.join(name, f"{stem}.py"))


@functools.cache
def _answers(endpoint: str) -> bool:
    """Whether anything answers at `endpoint` within `PATIENCE`; asked once per process, which so keeps to one kind."""
    import requests  # evaluate's own client, so that the same proxies and certificates count

    answered: list[int] = []

    def ask() -> None:
        try:
            answered.append(requests.head(endpoint, timeout=PATIENCE).status_code)
        except requests.RequestException as error:
            logger.debug("%s: %s", endpoint, error)

    # a thread, because the client's timeout counts anew for each address and does not bound the name's resolution
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return bool(answered)


def load_metric(name: str, config_name: str | None = None) -> EvaluationModule:
    """A metric by its published name.

    Which of the two is used is told by the type: the twins' modules begin with ``subspace_peft``.

    Args:
        name: ``glue``, ``accuracy``, ``rouge`` or ``exact_match`` have a twin, which is used when the Hub does not
            answer within `PATIENCE` or offline mode is set; anything else that `evaluate.load` knows needs the Hub, or
            a folder with the metric's script, and is awaited as long as evaluate does.
        config_name: as in `evaluate.load`; for ``glue`` the task.

    Raises:
        SubspaceError: the metric cannot be loaded and there is no twin, or GLUE has no such task.
    """
    import evaluate

    from .exact_match import ExactMatch
    from .glue import Accuracy, Glue
    from .rouge import Rouge

    twins = {"glue": Glue, "accuracy": Accuracy, "rouge": Rouge, "exact_match": ExactMatch}
    local = _is_script(name)
    # made before anything is asked for, so that a wrong configuration is the same error with and without the Hub
    twin = twins[name](config_name=config_name) if name in twins and not local else None
    cause: Exception | None = None
    if not local and any(os.environ.get(it, "").upper() in ("1", "ON", "YES", "TRUE") for it in OFFLINE):
        reason = "not tried: offline mode"
    elif twin is not None and not _answers(evaluate.config.HF_ENDPOINT):
        # evaluate itself waits 100 seconds, three times over
        reason = "the Hub does not answer"
    else:
        try:
            return evaluate.load(name, config_name)
        except (OSError, ImportError, ValueError) as error:
            # evaluate raises FileNotFoundError, ConnectionError (both OSError) or ImportError for a metric it cannot
            # fetch
            cause, reason = error, str(error)
    if twin is None:
        raise SubspaceError(
            f"The metric {name!r} could not be loaded by evaluate ({reason}), and there is no twin of it here: there"
            f" are {', '.join(twins)}. Check the name and the network, or unset {' and '.join(OFFLINE)}."
        ) from cause
    logger.info("%s: the twin that comes with subspace_peft, not evaluate.load's (%s).", name, reason)
    return twin

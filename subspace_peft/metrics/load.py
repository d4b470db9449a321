"""`load_metric`: `evaluate.load`, or its twin where the Hub is out of reach."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from ..errors import SubspaceError

if TYPE_CHECKING:
    from evaluate import EvaluationModule

logger = logging.getLogger(__name__)
OFFLINE = ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE")


def load_metric(name: str, config_name: str | None = None) -> EvaluationModule:
    """A metric by its published name.

    Args:
        name: ``glue``, ``accuracy``, ``rouge`` or ``exact_match`` have a twin; anything else that `evaluate.load` knows needs the
            Hub, or a folder with the metric's script.
        config_name: as in `evaluate.load`; for ``glue`` the task.

    Raises:
        SubspaceError: the Hub is out of reach and there is no twin, or the twin does not know `config_name`.
    """
    import evaluate

    offline = any(os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE") for variable in OFFLINE)
    failure = "not tried: offline mode"
    if os.path.exists(name) or not offline:
        try:
            return evaluate.load(name, config_name)
        except (OSError, ImportError, ValueError) as error:
            # evaluate raises FileNotFoundError, ConnectionError (both OSError) or ImportError for a metric it cannot fetch
            failure = str(error)
            logger.info("evaluate.load(%r) failed (%s); using the twin that comes with subspace_peft.", name, failure)
    from .exact_match import ExactMatch
    from .glue import Accuracy, Glue
    from .rouge import Rouge

    twins = {"glue": Glue, "accuracy": Accuracy, "rouge": Rouge, "exact_match": ExactMatch}
    if name not in twins:
        raise SubspaceError(
            f"The metric {name!r} could not be loaded by evaluate ({failure}), and there is no twin of it here: there are "
            f"{', '.join(twins)}. Check the name and the network, or unset {' and '.join(OFFLINE)}."
        )
    return twins[name](config_name=config_name)

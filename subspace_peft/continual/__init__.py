"""Continual learning: task after task on one basis, nothing forgotten, and what it costs.

Names are loaded when they are first used: a run's state is read without torch.
"""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .learner import ContinualLearner
    from .metrics import ScoreMatrix
    from .options import ContinualOptions
    from .status import RunStatus, read_status
    from .training import TaskRun

_PLACES = {
    "ContinualLearner": "learner",
    "ContinualOptions": "options",
    "RunStatus": "status",
    "ScoreMatrix": "metrics",
    "TaskRun": "training",
    "read_status": "status",
}

__all__ = [
    "ContinualLearner",
    "ContinualOptions",
    "RunStatus",
    "ScoreMatrix",
    "TaskRun",
    "read_status",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = attach(__name__, _PLACES)

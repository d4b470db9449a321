"""Whether a base model is the one that a run's tasks were trained on."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from ..errors import BasisMismatchError
from ..tuner import SubspaceConfig
from ..tuner.injection import make_plan
from ..tuner.targets import target_names


def check_trained_on(model: nn.Module, task: str, folder: Path) -> None:
    """Check that a base model has the weights that a saved task of the run was trained on; it stays as it is.

    Scores would notice it as well, but come last: by then a task is trained on the wrong weights, and absorbed.

    Args:
        model: The base model.
        task: The task's name.
        folder: Where it is saved.

    Raises:
        BasisMismatchError: The weights are others, as far as they are on record.
    """
    config = SubspaceConfig.from_pretrained(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said where the task is loaded to be scored
            make_plan(model, config, target_names(model, config))
    except BasisMismatchError as error:
        raise BasisMismatchError(
            f"model: the run's task {task!r} does not belong to this base model, and all tasks of a run share one."
            f" Nothing was trained. Give the base model that the run was begun with, or begin a run of this one in"
            f" another folder. {error}"
        ) from error

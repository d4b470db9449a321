"""What watches the stock Trainer inside: a bar, an end where parameters are not finite, and its checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .._io.progress import progress_bar
from ..logging import get_logger

logger = get_logger()

STATE_FILE = "trainer_state.json"


class Bar(TrainerCallback):
    """Shows a bar of a training that takes long, in the Trainer's own one's place, which shows at once and prints."""

    def __init__(self, what: str, *, shown: bool) -> None:
        self.what, self.shown = what, shown
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin the bar, where a resumed training stands."""
        self.bar = progress_bar(
            total=state.max_steps, initial=state.global_step, desc=self.what, unit="step", shown=self.shown
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Move the bar on."""
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Close the bar."""
        self.bar.close()


class Watch(TrainerCallback):
    """Ends a training whose parameters are not finite any more, at the end of an epoch."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Stop, and keep the last checkpoint that was whole, where a parameter is not finite."""
        if not_finite(given["model"]):
            control.should_training_stop = True
            control.should_save = False


def not_finite(model: nn.Module) -> str | None:
    """Return the name of a trained parameter that is not finite, or None."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            return name
    return None


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint of a training, and remove those that were interrupted while written."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda each: _steps(each), reverse=True) if folder.is_dir() else []
    for place in found:
        # the Trainer writes this file last
        try:
            state = json.loads((place / STATE_FILE).read_text(encoding="utf-8"))
            if state["global_step"] == _steps(place):
                return str(place)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(place)
        logger.info("%s was not wholly written, and is removed: the training goes on from before it", place)
    return None


def _steps(place: Path) -> int:
    number = place.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1

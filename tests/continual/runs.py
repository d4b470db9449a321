"""A small run: a model of two layers, a basis of three LoRAs, and tasks of a few examples."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from transformers.utils import logging

from subspace_peft import ContinualLearner, ContinualOptions

from ..models import bert

logging.set_verbosity_error()


def model() -> torch.nn.Module:
    return bert()


def data(seed: int, count: int = 12) -> list[dict[str, Any]]:
    """Examples whose label is whether one token comes before another."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(0, 100, (6,), generator=generator)
        rows.append({"input_ids": ids, "labels": int(ids[0] > ids[seed % 5 + 1])})
    return rows


def arguments(folder: Path | str = "unused", **more: Any) -> TrainingArguments:
    given = {
        "learning_rate": 3e-3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 6,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**given, **more})


def options(**more: Any) -> ContinualOptions:
    return ContinualOptions(**{"extra_rank": 1, "probe": "always", "probe_share": 0.5, "progress": False, **more})


def learner(folder: Path, basis: Any = None, **more: Any) -> ContinualLearner:
    given = {"options": options(), "args": arguments(), **more}
    return ContinualLearner(given.pop("model", None) or model(), basis, folder, **given)


def learn(folder: Path, names: str, basis: Any = None, **more: Any) -> None:
    """Learn tasks called by one letter each, or go on with them."""
    with warnings.catch_warnings(), learner(folder, basis, **more) as made:
        warnings.simplefilter("ignore")
        for name in names:
            made.learn(name, data(ord(name)), data(ord(name) + 100))


def again(run: Path, **more: Any) -> ContinualLearner:
    """Return a learner that knows the data of the task a."""
    made = learner(run, **more)
    made.learn("a", data(ord("a")), data(ord("a") + 100))
    return made


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, but the lock's."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "lock.json")
    # a card says how to load what it is about, from where it lies
    return {
        str(file.relative_to(folder)): file.read_bytes().replace(str(folder).encode(), b"FOLDER") for file in files
    }


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Let what is noted within of bases and tasks be unknown to other tests: a copy of a run counts as another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPACE_PEFT_CACHE", str(folder / "cache"))
        yield


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def killed(work: Callable[[], None], before: Callable[[Callable[[], None]], None]) -> bool:
    """Run `work` in a forked process, and return whether that was killed there.

    Args:
        work: what is done.
        before: called there with the function that kills; it says when.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            before(lambda: os.kill(os.getpid(), signal.SIGKILL))
            work()
        except BaseException as error:
            import traceback

            traceback.print_exception(error)
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the run failed, as is printed above"
    return False

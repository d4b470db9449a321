"""The fleet: one LoRA per task, and which of them a held-out task's basis may see."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from offline.models import put
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga

from subspace_peft import SubspaceBasis
from subspace_peft.errors import SubspaceError

from .bases import input_roots
from .encoder import ADAPTED, Top
from .gradients import backward
from .tasks import EncodedTask, kind_of, load, top_layers
from .training import Budget, make_model, score, train

TARGETS = list(ADAPTED)
HEAD = ["classifier"]
SOURCE_RATE = 2e-3
IN_WEIGHTS = ("pissa", "lora_ga")  # starts that PEFT takes off the base model's weights
STARTS = ("axes", *IN_WEIGHTS)
SOURCE_BUDGET = Budget(examples=1000, steps=180)


def source(name: str, folder: Path, *, start: int | str | None = None, budget: Budget = SOURCE_BUDGET) -> Path:
    """Return the folder of the LoRA r=8 of task `name`, trained now if it is not there.

    Args:
        name: a task.
        folder: the benchmark's cache.
        start: the seed of the LoRA's random start, each task's own without it; ``"axes"``: A starts at the leading
            principal axes of the task's own inputs (as EVA does, arXiv 2410.07170), rows of the norm that PEFT's own
            start has; ``"pissa"`` (arXiv 2404.02948) and ``"lora_ga"`` (arXiv 2407.05000) as PEFT has them: the update
            of such an adapter, of rank 16, is what it moved from its start.
        budget: of its training.

    Raises:
        SubspaceError: `start` is none of these.
    """
    if isinstance(start, str) and start not in STARTS:
        raise SubspaceError(f"start={start!r}: give a seed or one of {', '.join(STARTS)}.")
    kind = {None: "own"}.get(start, start if isinstance(start, str) else f"shared{start}")  # type: ignore[arg-type]
    home = folder / "sources" / f"{kind}-{budget.examples}-{budget.steps}" / name
    if home.is_dir():
        return home
    task = load(name, folder)
    # a name's hash is another number for every task, whatever their order
    own = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    torch.manual_seed(own)
    model = make_model(top_layers(kind_of(name), folder), task.outputs, 0)
    if isinstance(start, int):
        # behind the model: its head draws as many numbers as it has outputs, and the start would be another one
        torch.manual_seed(start)
    wrapped = _started(model, task, start)
    with TemporaryDirectory() as beside:
        begun = _keep_start(wrapped, Path(beside)) if start in IN_WEIGHTS else None
        train(wrapped, task, budget, SOURCE_RATE, 100, curve=False)
        print(f"source {name} ({kind}): test {score(wrapped, task, 'test'):.3f}", flush=True)
        aside = home.with_name(f".{home.name}.partial")
        with warnings.catch_warnings():
            # of PiSSA beside other adapters: the start is loaded to be taken off, nothing else
            warnings.filterwarnings("ignore", message="PiSSA changes the base weights")
            wrapped.save_pretrained(aside, path_initial_model_for_weight_conversion=begun)
    put(aside, home)
    return home


def _started(model: Top, task: EncodedTask, start: int | str | None) -> PeftModel:
    """Return `model` with a LoRA r=8 at its `start`; see `source`."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, modules_to_save=HEAD)
    if start in IN_WEIGHTS:
        config.init_lora_weights = start
    if start == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        data = task.splits["train"]
        some = data.take(torch.arange(min(300, len(data))))
        with warnings.catch_warnings():
            # the layers' inputs need no gradient, the weights do
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            preprocess_loraga(model, config, lambda: backward(model, some))
    if start != "axes":
        return get_peft_model(model, config)
    axes = {module: each["axes"] for module, each in input_roots(model, some_inputs(task)).items()}
    wrapped = get_peft_model(model, config)
    start_at(wrapped, axes)
    return wrapped


def _keep_start(wrapped: PeftModel, folder: Path) -> str:
    """Save `wrapped` as it begins and return the folder.

    PEFT wants it for taking the start off the trained adapter.
    """
    config, begun = wrapped.peft_config["default"], folder / "start"
    how = config.init_lora_weights
    config.init_lora_weights = True
    wrapped.save_pretrained(begun)
    config.init_lora_weights = how
    return str(begun)


def some_inputs(task: EncodedTask, count: int = 300) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return hidden states and lengths of the task's first training examples, fifty at a time."""
    split = task.splits["train"]
    return [(split.hidden[i : i + 50], split.lengths[i : i + 50]) for i in range(0, min(count, len(split)), 50)]


@torch.no_grad()
def start_at(model: torch.nn.Module, axes: Mapping[str, torch.Tensor]) -> None:
    """Set every LoRA's A (r, in) to the leading rows of its module's `axes` (in, in), at the norm of A's rows."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            module = next(module for module in axes if f".{module}." in name)
            parameter.copy_(axes[module][: len(parameter)] * parameter.norm(dim=1).mean())


def others(held_out: str, fleet: Sequence[str]) -> list[str]:
    """Return the fleet without the held-out task.

    Raises:
        SubspaceError: nothing is left.
    """
    left = [name for name in fleet if name != held_out]
    if not left:
        raise SubspaceError(
            f"Without {held_out!r} the fleet {list(fleet)} is empty: a basis needs other tasks' adapters."
        )
    return left


def require_left_out(basis: SubspaceBasis, own: Path) -> SubspaceBasis:
    """Return `basis`, if the adapter in folder `own` is none of its sources: by sha256 of its file and by name.

    Raises:
        SubspaceError: it is one of them, or the basis does not say what it was built from.
    """
    sources: Sequence[Mapping[str, Any]] = basis.info.get("sources") or []
    if not sources:
        raise SubspaceError(
            "This basis lists no sources: whether the held-out task is one cannot be told. Build it from adapters."
        )
    digest = hashlib.sha256((own / "adapter_model.safetensors").read_bytes()).hexdigest()
    for each in sources:
        if each["sha256"] == digest or Path(str(each["location"])).name == own.name:
            raise SubspaceError(
                f"The held-out task's own adapter {own} is among the basis's sources ({each['location']}): a score in"
                " that basis says nothing about new tasks. Build it without that adapter."
            )
    return basis

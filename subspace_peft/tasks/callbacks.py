"""Collect the facts of a training for the task's card, from a running Trainer or from the files that it left."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .._io.atomic import write_text_aside
from ..cards import Place
from ..errors import BadFileError, SubspaceError
from ..tuner.card import coefficients_digest, measured, noted, publish, write_section
from ..tuner.config import SubspaceConfig
from ..tuner.task_file import WEIGHTS_FILE

STATE_FILE = "trainer_state.json"
# entries of the Trainer's log that are about the machine and not about the task
NOT_METRICS = re.compile(
    r"(.*_)?(runtime|per_second|epoch|flos|model_preparation_time|jit_compilation_time|num_input_tokens_seen)"
)
HUB_DATASET = re.compile(r"hf://datasets/([^@]+)@")


class SubspaceCardCallback(TrainerCallback):
    """Trainer callback by which the task's card says how it was trained and how it scored.

    The card of every checkpoint says it, and the card that `save_pretrained` and `push_to_hub` write afterwards.

    Examples:
        >>> Trainer(model, args, train_dataset=data, callbacks=[SubspaceCardCallback()]).train()

    Args:
        datasets: Hub ids of the training data; by default those that the training set says it was fetched from.
    """

    def __init__(self, datasets: Iterable[str] | None = None) -> None:
        self.datasets = None if datasets is None else list(datasets)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Forget the facts of an earlier training, and note the settings of the one that begins."""
        model, data = given["model"], getattr(given.get("train_dataloader"), "dataset", None)
        self.settings = _settings(args, given.get("optimizer"), model, data)
        datasets = self.datasets if self.datasets is not None else hub_datasets(data)
        for config in _trained(model):
            card = {key: value for key, value in (config.card or {}).items() if key == "base"}
            config.card = card | ({"datasets": datasets} if datasets else {})
            if args.push_to_hub and args.hub_model_id:
                publish(args.output_dir, Place(args.hub_model_id))
        self._progress(state, model)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Note steps, epochs and the last training loss."""
        self._progress(state, given["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Note the metrics of the last evaluation."""
        self._progress(state, given["model"])
        note_metrics(given["model"], "evaluation", _without("eval_", given.get("metrics") or {}))

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **given: Any) -> None:
        """Note the metrics that `trainer.predict` measured on a test set."""
        note_metrics(given["model"], "test", _without("test_", metrics))

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Note the metrics of the best model, where `load_best_model_at_end` loaded it in the place of the last."""
        self._progress(state, given["model"])
        best = getattr(state, "best_global_step", None) if args.load_best_model_at_end else None
        if best and (found := _evaluation(state.log_history, best)):
            note_metrics(given["model"], "evaluation", found)

    def _progress(self, state: Any, model: Any) -> None:
        settings = getattr(self, "settings", None)
        if settings is None:
            return
        for config in _trained(model):
            progress = _progress(state.global_step, state.epoch, state.log_history)
            config.card = measured(config.card, training=settings | progress)


def note_metrics(model: Any, split: str, metrics: Mapping[str, Any]) -> None:
    """Have the cards of the model's active tasks say how they scored on a split.

    Args:
        model: The model whose active adapters were measured.
        split: Name of the split, such as ``test``.
        metrics: Metric → value; values that are not finite numbers are left out.
    """
    numbers = {name: float(value) for name, value in metrics.items() if _finite(value)}
    for config in _trained(model):
        if numbers:
            config.card = measured(config.card, metrics={split: numbers})


def write_card(
    folder: str | Path,
    *,
    trainer_state: str | Path | None = None,
    controls: str | Path | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    datasets: Iterable[str] | None = None,
) -> Path:
    """Write a saved task's card again, with further facts where they are given.

    The facts are kept in the task's `adapter_config.json`.

    Args:
        folder: The task's folder.
        trainer_state: A Trainer's `trainer_state.json`, which has steps, epochs, loss and metrics; by default the one
            in `folder`. Learning rates are in no file that can be read without unpickling it: use
            `SubspaceCardCallback` for them.
        controls: `results.json` of a recipe's `--stage compare`.
        metrics: Split → metric → number.
        datasets: Hub ids of the training data.

    Returns:
        The README.

    Raises:
        SubspaceError: `folder` holds no subspace task.
        BadFileError: `trainer_state` or `controls` cannot be read, or is another kind of file.
        OSError: The disk refuses; the earlier files stay.
    """
    folder = Path(folder)
    file = folder / "adapter_config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        kind = values.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise SubspaceError(f"{file} cannot be read ({error}). Pass the folder of a saved task.") from error
    if kind != "SUBSPACE":
        raise SubspaceError(
            f"{file}: its peft_type is {kind}, not SUBSPACE. Pass the folder of a saved subspace task."
        )
    names = {each.name for each in dataclasses.fields(SubspaceConfig) if each.init} - {"peft_type"}
    config = SubspaceConfig(**{key: value for key, value in values.items() if key in names})
    state = folder / STATE_FILE if trainer_state is None else Path(trainer_state)
    if trainer_state is not None or (state.is_file() and "training" not in (config.card or {})):
        config.card = noted(config.card, **_from_state(state))
    if controls is not None:
        config.card = noted(config.card, controls=_from_results(Path(controls)))
    if metrics is not None:
        config.card = noted(config.card, metrics={split: dict(numbers) for split, numbers in metrics.items()})
    if datasets is not None:
        config.card = noted(config.card, datasets=list(datasets))
    if config.card and (digest := coefficients_digest(folder / WEIGHTS_FILE)):
        config.card = noted(config.card, of=digest)
    text = json.dumps({**values, "card": config.card}, indent=2, sort_keys=True) + "\n"
    if values.get("card") != config.card:
        write_text_aside(file, text)
    write_section(folder, config.to_dict())
    return folder / "README.md"


def hub_datasets(data: Any) -> list[str]:
    """Return the Hub ids of the repositories that a `datasets.Dataset` says it was fetched from."""
    sums = getattr(getattr(data, "info", None), "download_checksums", None) or {}
    return sorted({found[1] for url in sums if (found := HUB_DATASET.match(str(url)))})


def _trained(model: Any) -> list[SubspaceConfig]:
    while not hasattr(model, "peft_config") and hasattr(model, "module"):
        model = model.module
    known = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapters", None) or []
    names = active() if callable(active) else active
    names = [names] if isinstance(names, str) else names
    return [known[name] for name in names if isinstance(known.get(name), SubspaceConfig)]


def _settings(args: Any, optimizer: Any, model: Any, data: Any) -> dict[str, Any]:
    """Return the settings of the training, for the card.

    Learning rates come from the optimizer itself, which need not be the one that `args` describe.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    groups = getattr(inner, "param_groups", None) or []
    ours = {id(p) for name, p in model.named_parameters() if "subspace_coef" in name}
    of_ours = [group for group in groups if any(id(p) in ours for p in group["params"])]
    # told apart by what they are: equality would compare their tensors
    known = {id(group) for group in of_ours}
    others = [group for group in groups if group["params"] and id(group) not in known]
    facts: dict[str, Any] = {}
    if of_ours:
        facts["learning_rate"] = _rates(of_ours)
        facts["weight_decay"] = max(group.get("weight_decay", 0.0) for group in of_ours)
        facts["optimizer"] = type(inner).__name__
    if others and _rates(others) != facts.get("learning_rate"):
        facts["head_learning_rate"] = _rates(others)
    facts["scheduler"] = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if args.warmup_steps:
        facts["warmup"] = args.warmup_steps
    facts["batch"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    facts["precision"] = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else None
    facts["seed"] = args.seed
    if hasattr(data, "__len__"):
        facts["examples"] = len(data)
    return {key: value for key, value in facts.items() if value is not None}


def _rates(groups: list[dict[str, Any]]) -> Any:
    rates = sorted({float(group.get("initial_lr", group["lr"])) for group in groups})
    return rates[0] if len(rates) == 1 else ", ".join(f"{rate:g}" for rate in rates)


def _progress(steps: Any, epochs: Any, history: Iterable[Mapping[str, Any]] | None) -> dict[str, Any]:
    entries = list(history or ())
    loss = next((entry[key] for entry in reversed(entries) for key in ("train_loss", "loss") if key in entry), None)
    return {
        **({"steps": int(steps)} if steps else {}),
        **({"epochs": round(float(epochs), 2)} if epochs else {}),
        **({"loss": float(loss)} if _finite(loss) else {}),
    }


def _evaluation(history: Iterable[Mapping[str, Any]] | None, step: int | None = None) -> dict[str, float]:
    entries = [entry for entry in history or () if any(str(key).startswith("eval_") for key in entry)]
    if step is not None:
        entries = [entry for entry in entries if entry.get("step") == step]
    last = entries[-1] if entries else {}
    return _without("eval_", {key: value for key, value in last.items() if str(key).startswith("eval_")})


def _without(prefix: str, numbers: Mapping[str, Any]) -> dict[str, float]:
    named = {str(key).removeprefix(prefix): value for key, value in numbers.items()}
    return {key: float(value) for key, value in named.items() if not NOT_METRICS.fullmatch(key) and _finite(value)}


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _from_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        history = state["log_history"]
        training = _progress(state["global_step"], state["epoch"], history)
        step = state.get("best_global_step") if state.get("best_model_checkpoint") == str(file.parent) else None
        found = _evaluation(history, step)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFileError(
            f"{file}: not the state of a Trainer ({type(error).__name__}: {error}). Pass the trainer_state.json of a"
            " checkpoint."
        ) from error
    return {"training": training, **({"metrics": {"evaluation": found}} if found else {})}


def _from_results(file: Path) -> dict[str, Any]:
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        keys = ("method", "test", "test_sd", "diverged", "rate", "trained_adapter", "trained_head", "bytes")
        rows = [{**{key: row[key] for key in keys}, "seeds": len(row["seeds"])} for row in body["results"]]
        return {"title": body["title"], "score": body["settings"].get("score"), "rows": rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFileError(
            f"{file}: not the results of a comparison ({type(error).__name__}: {error}). Pass the results.json of a"
            " recipe's `--stage compare`."
        ) from error

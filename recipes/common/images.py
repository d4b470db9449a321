"""Image tasks: out of a folder, or out of a set on the Hub that is split into tasks of disjoint classes."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from subspace_peft.errors import SubspaceError


def local_images(data_dir: str | Path, task: str) -> tuple[dict[str, Any], list[str]]:
    """Read a local image task.

    Returns:
        Its splits, `datasets.Dataset`s with the columns image and label; and the labels' names in their order.

    Raises:
        SubspaceError: task.json names no labels; a split has no images of a class that it names, or has some of one
            that it does not.
    """
    from datasets import Dataset, Image

    folder = Path(data_dir, "data", task)
    labels = json.loads((folder / "task.json").read_text(encoding="utf-8")).get("labels")
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(label, str) for label in labels):
        raise SubspaceError(f"{folder / 'task.json'}: give its labels, the names of at least two class folders.")
    splits = {}
    for split in ("train", "validation", "test"):
        found = sorted({path.parent.name for path in (folder / split).glob("*/*") if path.is_file()})
        if found != sorted(labels):
            raise SubspaceError(f"{folder / split} holds images of {found}, but task.json names {sorted(labels)}.")
        files = [
            file for label in sorted(labels) for file in sorted((folder / split / label).iterdir()) if file.is_file()
        ]
        rows = {"image": [str(file) for file in files], "label": [labels.index(file.parent.name) for file in files]}
        splits[split] = Dataset.from_dict(rows).cast_column("image", Image())
    return splits, labels


def class_group(
    raw: Any, name: str, *, groups: int, image: str, label: str, validation: int, where: str
) -> tuple[dict[str, Any], list[str]]:
    """Return one of the disjoint tasks that the classes of an image set are split into, as `local_images` does.

    Args:
        raw: a `datasets.DatasetDict` with a training split and one for the test, ``test`` or else ``validation``.
        name: ``group0``, ``group1``, … up to `groups`; ``all`` for all classes.
        groups: into how many. Which class goes where is the same on every machine.
        image, label: columns; the label is a ClassLabel.
        validation: so many training images become the validation split, at most half.
        where: the set's name, for messages.

    Raises:
        SubspaceError: a split or a column is missing, the labels have no names, or the group has fewer than two
            classes.
    """
    last = "test" if "test" in raw else "validation"
    if missing := {"train", last} - set(raw):
        raise SubspaceError(f"{where} has no split {', '.join(sorted(missing))}; it has {', '.join(raw)}.")
    for split in ("train", last):
        if missing := [column for column in (image, label) if column not in raw[split].column_names]:
            has = ", ".join(raw[split].column_names)
            raise SubspaceError(f"{where}, {split}: no column {missing[0]!r}; there are {has}.")
    names = getattr(raw["train"].features[label], "names", None)
    if names is None:
        raise SubspaceError(f"{where}: column {label!r} has no class names; name a ClassLabel column.")
    order = random.Random(0).sample(range(len(names)), len(names))
    mine = sorted(order if name == "all" else order[int(name.removeprefix("group")) :: groups])
    if len(mine) < 2:
        raise SubspaceError(f"{name} would have {len(mine)} of {len(names)} classes: give fewer --class-groups.")
    position = {number: place for place, number in enumerate(mine)}

    def chosen(split: str) -> Any:
        labels = raw[split][label][:]
        kept = [place for place, number in enumerate(labels) if number in position]
        part = raw[split].select(kept).select_columns(image)
        part = part if image == "image" else part.rename_column(image, "image")
        return part.add_column("label", [position[labels[place]] for place in kept])

    train = chosen("train")
    carved = train.train_test_split(min(validation, len(train) // 2), seed=0)
    return {"train": carved["train"], "validation": carved["test"], "test": chosen(last)}, [names[i] for i in mine]


def check_images(rows: Any, where: str) -> str:
    """Return the sha256 of the images and labels of a `datasets.Dataset`.

    Raises:
        SubspaceError: an image cannot be read; names the first.
    """
    from datasets import Image

    total = hashlib.sha256()
    for row in rows.cast_column("image", Image(decode=False)):
        content = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
        total.update(hashlib.sha256(content).digest() + json.dumps(row["label"]).encode())
        check_image(content, row["image"]["path"] or where)
    return total.hexdigest()


def check_image(content: bytes, where: str) -> None:
    """Raise `SubspaceError` naming `where` if these bytes are no image that can be read."""
    import io

    from PIL import Image, UnidentifiedImageError

    try:
        # `verify` would pass most formats cut off in the middle
        Image.open(io.BytesIO(content)).load()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise SubspaceError(f"{where} is no image that can be read ({error}). Mend or remove it.") from None


def rgb(image: Any) -> Any:
    """Return a `PIL.Image` of any mode in RGB."""
    from PIL import Image

    if image.mode.startswith("I"):
        # 16-bit grey, which Pillow's own conversion would clip to white
        image = Image.fromarray(np.clip(np.asarray(image) // 256, 0, 255).astype(np.uint8))
    return image.convert("RGB")

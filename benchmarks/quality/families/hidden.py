"""What the frozen lower layers make of a family's items, computed once and shared by its members."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from subspace_peft._io.atomic import write_aside

from ..tasks import IMAGE_SIZE, TOKENS, TOP, EncodedTask, Split, image_encoder, text_encoder
from .pools import Family

BATCH = 64


def load(family: Family, member: str, folder: Path) -> EncodedTask:
    """Return a member of a family; the outputs for all of its members are kept in `folder`, in half precision."""
    offsets, states = _states(family, folder)
    places = _places(family)
    splits = {}
    for pool, chosen in family.draw(member).items():
        rows = [places[place] for place, _ in chosen]
        lengths = torch.tensor([int(offsets[row + 1] - offsets[row]) for row in rows])
        hidden = torch.zeros(len(rows), int(lengths.max()), states.shape[1])
        for i, row in enumerate(rows):
            part = np.array(states[offsets[row] : offsets[row + 1]])
            hidden[i, : len(part)] = torch.from_numpy(part).float()
        splits[pool] = Split(hidden, lengths, torch.tensor([label for _, label in chosen]))
    return EncodedTask(f"{family.name}/{member}", splits, 2, family.digest)


@cache
def _places(family: Family) -> dict[int, int]:
    """Return item → its row among those that some member uses."""
    used = sorted({place for name in family.order for chosen in family.draw(name).values() for place, _ in chosen})
    return {place: row for row, place in enumerate(used)}


@lru_cache(maxsize=2)
def _states(family: Family, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return where each row begins, and the outputs of all rows' tokens one after another, (tokens, d) float16."""
    home = folder / "hidden"
    name = f"family-{family.name}-{family.digest[:12]}"
    file, index = home / f"{name}.npy", home / f"{name}.json"
    if not file.is_file():
        home.mkdir(parents=True, exist_ok=True)
        items = [family.items[place] for place in _places(family)]
        print(f"family {family.name}: {len(items)} items through the frozen layers", flush=True)
        parts = _text_states(items) if family.kind == "text" else _image_states(items, folder)
        offsets = [0, *np.cumsum([len(part) for part in parts]).tolist()]
        write_aside(index, lambda path: path.write_text(json.dumps(offsets)))

        def keep(path: Path) -> None:
            with path.open("wb") as stream:
                np.save(stream, np.concatenate(parts))

        write_aside(file, keep)
    return np.array(json.loads(index.read_text())), np.load(file, mmap_mode="r")


@torch.no_grad()
def _text_states(texts: Sequence[str]) -> list[np.ndarray]:
    """Return per text (tokens, d) float16."""
    model, tokenizer = text_encoder()
    lower = copy.deepcopy(model)
    lower.encoder.layer = lower.encoder.layer[:-TOP]
    tokens = [tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"] for text in texts]
    parts: list[Any] = [None] * len(texts)
    # of like lengths together: little padding
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        batch = tokenizer.pad({"input_ids": [tokens[i] for i in some]}, return_tensors="pt")
        out = lower(**batch).last_hidden_state.half().numpy()
        for i, states in zip(some, out, strict=True):
            parts[i] = states[: len(tokens[i])].copy()
    return parts


@torch.no_grad()
def _image_states(images: Sequence[np.ndarray], folder: Path) -> list[np.ndarray]:
    """Return per image (patches and one, d) float16."""
    model = image_encoder(folder)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    parts: list[np.ndarray] = []
    for start in range(0, len(images), BATCH):
        pixels = torch.from_numpy(np.stack(images[start : start + BATCH])).float()[:, None] / 255
        pixels = nn.functional.interpolate(pixels, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        out = model(pixel_values=(pixels.expand(-1, 3, -1, -1) - mean) / deviation, output_hidden_states=True)
        parts += list(out.hidden_states[-1 - TOP].half().numpy())
    return parts

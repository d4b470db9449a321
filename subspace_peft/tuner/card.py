"""The facts of a task for its card, and the card in the task's README.

Everything takes and returns plain values. What was measured of a task's parameters is kept in its configuration's
`card` beside ``of``, a hash of them. Facts without ``of`` are of the parameters that are in memory.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .._io.places import shown_place
from .._version import __version__
from ..basis.module import tensor_bytes
from ..cards import BaseFacts, BasisReferenceFacts, Place, TaskFacts, put_card, recorded, task_card
from ..cards.facts import AUTO_CLASSES
from .coefficients import OWN
from .task_file import BASIS_KEY, COEFFICIENT_KEY, WEIGHTS_FILE

Card = dict[str, Any]
# what was measured of certain parameters, and is not true of others
MEASURED = ("training", "metrics", "controls", "datasets")
HEADED = ("SEQ_CLS", "TOKEN_CLS")
HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
MORE_AUTO_CLASSES = (
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForMaskedLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
)
# a config of ten thousand names would outweigh the task
MOST_LABELS = 64


# folder → where its tasks will be loaded from: a task's configuration does not know where its folder goes
_places: dict[Path, Place] = {}
_published: contextvars.ContextVar[Mapping[Path, Place]] = contextvars.ContextVar("published", default={})  # noqa: B039


def publish(folder: str | Path, place: Place) -> None:
    """Let the cards of tasks that are saved in `folder`, or in folders of it, say to load them from `place`."""
    _places[Path(folder).resolve()] = place


@contextlib.contextmanager
def published(places: Mapping[Path, Place]) -> Iterator[None]:
    """While open, let cards name other places than their folders: folder → place. See `publish`."""
    before = _published.get()
    # this thread's only: another one may be saving another task meanwhile
    _published.set({**before, **{Path(folder).resolve(): place for folder, place in places.items()}})
    try:
        yield
    finally:
        _published.set(before)


def place_of(folder: Path) -> Place:
    """Return where a task that is saved in `folder` will be loaded from."""
    whole = folder.resolve()
    places = {**_places, **_published.get()}
    return next((places[path] for path in (whole, *whole.parents) if path in places), None) or Place.of_folder(folder)


def write_section(folder: Path, config: Mapping[str, Any]) -> None:
    """Put or replace the task's card in `folder`'s README.md; whatever else is in there stays.

    Args:
        folder: of the task.
        config: the task's configuration, as `SubspaceConfig.to_dict` gives it.
    """
    put_card(folder, task_card(facts_of(folder, config)))


def facts_of(folder: Path, config: Mapping[str, Any]) -> TaskFacts:
    """Return a card's facts of a task, from its configuration and the header of its file. Arguments as above."""
    said = recorded(config["card"])
    size = sizes_of(folder / WEIGHTS_FILE)
    task_type = _text(config["task_type"])
    base = dict(said.get("base") or {"auto_class": AUTO_CLASSES.get(task_type or "")})
    if task_type in HEADED and size:
        base.setdefault("num_labels", size.pop("classes"))
    carried = config["basis_modules"] is not None
    versions = {"subspace_peft": config["subspace_version"] or __version__, "PEFT": config["peft_version"]}
    return TaskFacts(
        place=place_of(folder),
        basis=BasisReferenceFacts(
            fingerprint=config["basis_fingerprint"],
            reference=None if carried else config["basis"] or "",
            revision=None if carried else config["basis_revision"],
        ),
        coefficients=config["coefficients"],
        mean_gain=config["mean_gain"],
        start=config["start"],
        alpha=config["alpha"],
        base=BaseFacts(reference=shown_place(config["base_model_name_or_path"]), revision=config["revision"], **base),
        task_type=task_type,
        numbers=size.get("numbers"),
        own=size.get("own"),
        directions=size.get("directions", {}),
        head=size.get("head"),
        bytes=size.get("bytes"),
        **{key: said[key] for key in MEASURED if key in said},
        versions={name: str(version) for name, version in versions.items() if version},
    )


def _text(task_type: Any) -> str | None:
    return None if task_type is None else str(getattr(task_type, "value", task_type))


def sizes_of(file: Path) -> dict[str, Any]:
    """Return what a task's file holds by its header: parameters by what they are, own directions by module, bytes.

    Args:
        file: ``adapter_model.safetensors``; nothing is returned of one that cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
            shapes = {key: tensors.get_slice(key).get_shape() for key in keys}
    except (SafetensorError, OSError):
        return {}
    counts = {"numbers": 0, "head": 0, "own": 0}
    directions: dict[str, int] = {}
    classes = None
    for key, shape in shapes.items():
        if BASIS_KEY.match(key):
            continue
        total = 1
        for side in shape:
            total *= side
        if found := COEFFICIENT_KEY.match(key):
            directions.setdefault(found["module"], 0)
            counts["numbers"] += total
            if found["name"] in OWN:
                counts["own"] += total
                directions[found["module"]] = shape[1] if found["name"] == OWN[0] else shape[0]
        else:
            counts["head"] += total
        if key.endswith(HEADS):
            classes = shape[0]
    return {**counts, "directions": directions, "classes": classes, "bytes": file.stat().st_size}


def noted(card: Mapping[str, Any] | None, **facts: Any) -> Card:
    """Return `card` with more facts.

    Args:
        card: a configuration's `card`.
        facts: `training`, `metrics`, `datasets`, `controls`, `base` or `of`; metrics are added to those of other
            splits, all else replaces earlier facts.
    """
    made = dict(card or {})
    for key, value in facts.items():
        made[key] = {**made.get(key, {}), **value} if key == "metrics" else value
    return made


def measured(card: Mapping[str, Any] | None, **facts: Any) -> Card:
    """Return `card` with facts that were measured just now, of the parameters in memory. Arguments as in `noted`."""
    return {key: value for key, value in noted(card, **facts).items() if key != "of"}


def card_for(card: Mapping[str, Any] | None, digest: str | None) -> Card | None:
    """Return the facts in `card` that hold of the coefficients with that hash; None where nothing is left.

    Measurements of others are left out: the task may have been trained on since it was read.

    Args:
        card: a configuration's `card`.
        digest: of the coefficients that are being saved; None: not known, and everything stays.
    """
    if not card or digest is None or not any(key in card for key in MEASURED):
        return None if card is None else dict(card)
    if card.get("of", digest) == digest:
        return {**card, "of": digest}
    return {key: value for key, value in card.items() if key not in (*MEASURED, "of")} or None


def unmeasured(card: Any) -> Card | None:
    """Return a card that was read from a file, without facts that may be of other parameters than those beside it.

    A card of another kind than a dict, which a stranger's file may have, counts as none.
    """
    if not isinstance(card, Mapping):
        return None
    if "of" in card:
        return dict(card)
    return {key: value for key, value in card.items() if key not in MEASURED} or None


def coefficients_digest(file: Path) -> str | None:
    """Return the sha256 of a saved task's coefficients; None where they cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return digest_of({key: tensors.get_tensor(key) for key in filter(COEFFICIENT_KEY.match, tensors.keys())})
    except (SafetensorError, OSError):
        return None


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of the coefficients among a task's tensors."""
    digest = hashlib.sha256()
    for key in sorted(filter(COEFFICIENT_KEY.match, tensors)):
        value = tensors[key]
        digest.update(f"{key}:{value.dtype}:{list(value.shape)};".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def base_facts(base: Any, config: Any) -> dict[str, Any]:
    """Return a card's facts of a live base model: how to make one like it.

    Args:
        base: the model.
        config: a PEFT configuration, of which `task_type` and `modules_to_save` are read.
    """
    facts: dict[str, Any] = {"class_name": type(base).__name__}
    settings = getattr(base, "config", None)
    if (family := getattr(settings, "model_type", None)) not in (None, "", "custom"):
        facts["family"] = family
    if (code := getattr(base, "card_code", None)) is not None:
        return {**facts, "code": code()}
    if (auto := _auto_class(base, settings, _text(config.task_type))) is None:
        return facts
    facts["auto_class"] = auto
    if config.modules_to_save and "Classification" in auto:
        labels = getattr(settings, "id2label", None) or {}
        facts["num_labels"] = len(labels)
        named = [str(name) for _, name in sorted(labels.items())]
        if len(named) <= MOST_LABELS and named != [f"LABEL_{i}" for i in range(len(named))]:
            facts["labels"] = named
    return facts


def _auto_class(base: Any, settings: Any, task_type: str | None) -> str | None:
    import transformers

    first = AUTO_CLASSES.get(str(task_type))
    for name in dict.fromkeys([*([first] if first else []), *AUTO_CLASSES.values(), *MORE_AUTO_CLASSES]):
        # transformers has no public way to ask which class an auto class makes of a configuration
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", None)
        made = mapping.get(type(settings), None) if mapping is not None else None
        if type(base) in (made if isinstance(made, (tuple, list)) else [made]):
            return name
    return None

"""The facts of a task for its card, and the card in the task's README."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from .._version import __version__
from ..basis.module import tensor_bytes
from ..cards import BaseFacts, BasisReferenceFacts, Place, TaskFacts, put_card, task_card
from ..cards.facts import AUTO_CLASSES
from .task_file import BASIS_KEY, COEFFICIENT_KEY, WEIGHTS_FILE

if TYPE_CHECKING:
    from peft import PeftModel

    from .config import SubspaceConfig

# what was measured of certain numbers, and is not true of others
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


def write_section(folder: Path, config: SubspaceConfig) -> None:
    """Put or replace the task's card in `folder`'s README.md; whatever else is in there stays."""
    put_card(folder, task_card(facts_of(folder, config)))


def facts_of(folder: Path, config: SubspaceConfig) -> TaskFacts:
    """What a card says of the task: from its configuration and the header of its file."""
    said: Mapping[str, Any] = config.card or {}
    size = _sizes(folder / WEIGHTS_FILE)
    task_type = None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type))
    base = dict(said.get("base") or {"auto_class": AUTO_CLASSES.get(task_type or "")})
    if task_type in HEADED and size:
        base.setdefault("num_labels", size.pop("classes"))
    for key in ("labels", "code"):
        base[key] = tuple(base[key]) if base.get(key) else None
    carried = config.basis_modules is not None
    versions = {"subspace_peft": config.subspace_version or __version__, "PEFT": config.peft_version}
    return TaskFacts(
        place=config._place or Place.of_folder(folder),
        basis=BasisReferenceFacts(
            fingerprint=config.basis_fingerprint,
            reference=None if carried else config.to_dict()["basis"],
            revision=None if carried else config.basis_revision,
        ),
        coefficients=config.coefficients,
        mean_gain=config.mean_gain,
        start=config.start,
        base=BaseFacts(reference=config.base_model_name_or_path or None, revision=config.revision, **base),
        task_type=task_type,
        numbers=size.get("numbers"),
        head=size.get("head"),
        bytes=size.get("bytes"),
        training=said.get("training") or {},
        metrics=said.get("metrics") or {},
        controls=said.get("controls"),
        datasets=tuple(said.get("datasets") or ()),
        versions={name: str(version) for name, version in versions.items() if version},
    )


def _sizes(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
            shapes = {key: tensors.get_slice(key).get_shape() for key in keys}
    except (SafetensorError, OSError):
        return {}
    counts = {"numbers": 0, "head": 0}
    classes = None
    for key, shape in shapes.items():
        if BASIS_KEY.match(key):
            continue
        total = 1
        for side in shape:
            total *= side
        counts["numbers" if COEFFICIENT_KEY.match(key) else "head"] += total
        if key.endswith(HEADS):
            classes = shape[0]
    return {**counts, "classes": classes, "bytes": file.stat().st_size}


def note(config: SubspaceConfig, **facts: Any) -> None:
    """Have the card say `facts` (`training`, `metrics`, `datasets`, `controls`, `base`); metrics are added to those of
    other splits."""
    card = dict(config.card or {})
    for key, value in facts.items():
        card[key] = {**card.get(key, {}), **value} if key == "metrics" else value
    config.card = card


def forget_others(folder: Path, config: SubspaceConfig) -> None:
    """Have `config.card` say nothing of other numbers than those in `folder`: it may have been trained on since it was
    read."""
    card = config.card
    if not card or not any(key in card for key in MEASURED):
        return
    digest = coefficients_digest(folder / WEIGHTS_FILE)
    if digest is None:
        return
    if not config._recorded and card.get("of") != digest:
        card = {key: value for key, value in card.items() if key not in (*MEASURED, "of")}
        config.card = card or None
    else:
        config.card = {**card, "of": digest}


def coefficients_digest(file: Path) -> str | None:
    """sha256 of a task's coefficients; None where they cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return digest_of({key: tensors.get_tensor(key) for key in filter(COEFFICIENT_KEY.match, tensors.keys())})
    except (SafetensorError, OSError):
        return None


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of the coefficients among a task's tensors."""
    digest = hashlib.sha256()
    for key in sorted(filter(COEFFICIENT_KEY.match, tensors)):
        value = tensors[key]
        digest.update(f"{key}:{value.dtype}:{list(value.shape)};".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def base_facts(base: Any, config: SubspaceConfig) -> dict[str, Any]:
    """What `config.card` keeps of a live base model: how to make one like it."""
    facts: dict[str, Any] = {"class_name": type(base).__name__}
    settings = getattr(base, "config", None)
    if (family := getattr(settings, "model_type", None)) not in (None, "", "custom"):
        facts["family"] = family
    if (code := getattr(base, "card_code", None)) is not None:
        return {**facts, "code": code()}
    if (auto := _auto_class(base, settings, config)) is None:
        return facts
    facts["auto_class"] = auto
    if config.modules_to_save and "Classification" in auto:
        labels = getattr(settings, "id2label", None) or {}
        facts["num_labels"] = len(labels)
        named = [str(name) for _, name in sorted(labels.items())]
        if len(named) <= MOST_LABELS and named != [f"LABEL_{i}" for i in range(len(named))]:
            facts["labels"] = named
    return facts


def _auto_class(base: Any, settings: Any, config: SubspaceConfig) -> str | None:
    import transformers

    first = AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)))
    for name in dict.fromkeys([*([first] if first else []), *AUTO_CLASSES.values(), *MORE_AUTO_CLASSES]):
        # transformers has no public way to ask which class an auto class makes of a configuration
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", None)
        made = mapping.get(type(settings), None) if mapping is not None else None
        if type(base) in (made if isinstance(made, (tuple, list)) else [made]):
            return name
    return None


def teach_cards() -> None:
    """Have `PeftModel.create_or_update_model_card`, which writes a page of gaps to fill in, leave a subspace task's
    README to its own card, and note how to make the base model. Other models go the way they went. Idempotent.
    """
    from peft import PeftModel

    original: Callable[..., Any] = PeftModel.create_or_update_model_card
    if getattr(original, "subspace", False):
        return

    @functools.wraps(original)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> Any:
        from .config import SubspaceConfig

        for config in self.peft_config.values():
            if isinstance(config, SubspaceConfig):
                note(config, base=base_facts(self.get_base_model(), config))
        # the adapter that PEFT saves in that folder, the others in folders of it
        default = self.peft_config.get("default")
        if not isinstance(default, SubspaceConfig):
            return original(self, output_dir)
        if (Path(output_dir) / "README.md").is_file():
            # the Trainer has just written one of its own, and asks for what belongs into it
            write_section(Path(output_dir), default)
        return None

    create_or_update_model_card.subspace = True  # type: ignore[attr-defined]
    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign]

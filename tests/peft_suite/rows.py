"""What is put into PEFT's tests: this method's configurations, where LoRA's are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from subspace_peft import SubspaceConfig

COEFFICIENTS: tuple[dict[str, Any], ...] = (
    {"coefficients": "core"},
    {"coefficients": "factor", "r": 2},
    {"coefficients": "diagonal"},
    {"coefficients": "core", "extra_rank": 2},
)
RANDOM: dict[str, Any] = {"basis": "random", "k": 4}

# name of a model in PEFT's test_custom_models.py, and what of it is adapted
CUSTOM = (
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "coefficients": "factor", "r": 2}),
    ("MLP", {"target_modules": ["lin0"], "coefficients": "diagonal"}),
    ("MLP", {"target_modules": ["lin0"], "coefficients": "directions"}),
    ("EmbConv1D", {"target_modules": ["conv1d"]}),
    ("EmbConv1D", {"target_modules": ["conv1d"], "coefficients": "factor", "r": 2}),
    ("EmbConv1D", {"target_modules": ["conv1d"], "coefficients": "diagonal"}),
    ("EmbConv1D", {"target_modules": ["emb"]}),
    # these tests train with plain SGD and a learning rate for LoRA's scale of 1: with ours, convolutions diverge
    ("Conv2d", {"target_modules": ["conv2d"], "alpha": 8.0}),
    ("Conv2d", {"target_modules": ["conv2d", "lin0"], "coefficients": "factor", "r": 2, "alpha": 8.0}),
    # so do own directions, in layers so narrow
    ("MLP", {"target_modules": ["lin0", "lin1"], "extra_rank": 2, "alpha": 8.0}),
    ("EmbConv1D", {"target_modules": ["emb", "conv1d"], "extra_rank": 2, "alpha": 8.0}),
    ("Conv2d", {"target_modules": ["conv2d", "lin0"], "extra_rank": 1, "alpha": 8.0}),
)


@dataclass
class SubspaceRandomConfig(SubspaceConfig):
    """A configuration that needs no basis, for tests that give every method the target modules only."""

    basis: Any = "random"
    k: int | None = 4
    # some of these tests load what they saved into a model with other random weights, which is refused otherwise
    check_base_model: bool = False


def rows(task_type: str | None = None) -> list[tuple[type[SubspaceConfig], dict[str, Any]]]:
    """A row per kind of coefficients for the lists that all of a file's tests run through."""
    task = {} if task_type is None else {"task_type": task_type}
    return [(SubspaceConfig, {"target_modules": None, **task, **RANDOM, **kind}) for kind in COEFFICIENTS]


def custom_rows() -> list[tuple[str, str, type[SubspaceConfig], dict[str, Any]]]:
    """Rows for PEFT's own small models."""
    return [
        (f"Subspace {model} {i}", model, SubspaceConfig, {**RANDOM, **what}) for i, (model, what) in enumerate(CUSTOM)
    ]


def several_active_rows() -> list[tuple[str, str, type[SubspaceConfig], dict[str, Any], dict[str, Any]]]:
    """Rows for the tests of two active adapters: in one layer, and in one layer each."""
    one, other = ({**RANDOM, "target_modules": [name], "init_weights": False} for name in ("lin0", "lin1"))
    return [
        ("Subspace Same", "subspace", SubspaceConfig, one, {**one, "coefficients": "factor", "seed": 1}),
        ("Subspace Different", "subspace", SubspaceConfig, one, other),
    ]


def batch_rows() -> list[tuple[str, SubspaceConfig, SubspaceConfig]]:
    """Rows for the tests of batches whose rows are of different adapters."""
    given = {**RANDOM, "target_modules": ["lin0"], "init_weights": False}
    return [
        ("Subspace mixed adapter", SubspaceConfig(**given), SubspaceConfig(**given, coefficients="diagonal")),
        ("Subspace own directions", SubspaceConfig(**given, extra_rank=2), SubspaceConfig(**given)),
        ("Subspace mixed basis", SubspaceConfig(**given), SubspaceConfig(**{**given, "k": 3}, seed=1)),
    ]


def subspace_config(**keywords: Any) -> SubspaceConfig:
    """A configuration from another method's keywords, for tests that are written for that method."""
    keywords = dict(keywords)
    for theirs in ("alpha", "lora_alpha", "subspace_alpha", "r"):
        keywords.pop(theirs, None)
    if "init_subspace_weights" in keywords:
        keywords["init_weights"] = keywords.pop("init_subspace_weights")
    return SubspaceConfig(**{**RANDOM, **keywords})

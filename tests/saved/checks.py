"""The files of earlier versions, what they are expected to give, and how written ones are held against them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from .models import outputs

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VERSIONS = sorted(Path(__file__).parent.resolve().glob("v*"))
# what `inspect` says of a basis as its config does
COPIED = {"sources", "build", "skipped", "certificates", "energy_kept_per_module", "energy_random_per_module"}
WRITTEN_BY = {"peft_version", "subspace_version", "subspace_peft_version"}


def said(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


EXPECTED = {root: said(root / "expected.json") for root in VERSIONS}
TENSORS = {root: load_file(root / "expected.safetensors") for root in VERSIONS}


def folders(kind: str, fits: Callable[[dict[str, Any]], bool] | None = None) -> list[Any]:
    """Parameters: all folders of a kind, of tasks those whose configuration `fits`."""
    return [
        pytest.param(folder, id=f"{root.name}-{folder.name}")
        for root in VERSIONS
        for folder in sorted((root / kind).iterdir())
        if fits is None or fits(said(folder / CONFIG))
    ]


def trains_more(config: dict[str, Any]) -> bool:
    """Whether the task has trained tensors beside its coefficients."""
    return bool(config["modules_to_save"] or config["bias"] != "none" or config["trainable_token_indices"])


def stored(config: dict[str, Any]) -> bool:
    """Whether the task's basis lies in a folder."""
    return config["basis_modules"] is None


def plain(config: dict[str, Any]) -> bool:
    return not trains_more(config)


def whole(config: dict[str, Any]) -> bool:
    """Whether the task adapts all modules of its stored basis, with all directions, and nothing else."""
    some = config["k"] or config["rank_pattern"] or config["exclude_modules"] or config["layers_to_transform"]
    return stored(config) and plain(config) and not some and config["target_modules"] != ["query"]


def named(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda config: config["base_model_name_or_path"] == name


def with_basis(folder: Path) -> Path:
    """The folder of a task's basis."""
    return (folder / said(folder / CONFIG)["basis"]).resolve()


def agree(given: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


def logits_of(folder: Path) -> torch.Tensor:
    return TENSORS[folder.parent.parent]["/".join(folder.parts[-2:])]


def check(model: nn.Module, folder: Path) -> None:
    agree(outputs(model), logits_of(folder))


def forget(model: nn.Module) -> nn.Module:
    """Set all of an adapter's coefficients to zero."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "subspace_coef" in name:
                value.zero_()
    return model


def same_json(new: Any, old: Any) -> None:
    """Hold a written configuration against the stored one; a newer PEFT may have keys of its own."""
    known = {key for key in PeftConfig.__dataclass_fields__ if key not in old} | WRITTEN_BY
    assert {key: value for key, value in new.items() if key not in known} == {
        key: value for key, value in old.items() if key not in WRITTEN_BY
    }


def same_bytes(new: Path, old: Path) -> None:
    """Hold a safetensors file against the stored one: names, dtypes, shapes, bytes, metadata."""
    one, two = load_file(new), load_file(old)
    assert list(one) == list(two)
    for key, value in one.items():
        assert value.dtype == two[key].dtype, key
        assert torch.equal(value, two[key]), key
    with safe_open(new, "pt") as given, safe_open(old, "pt") as wanted:
        assert (given.metadata() or {}).keys() == (wanted.metadata() or {}).keys()


def same_task(new: Path, old: Path, **changed: Any) -> None:
    config, wanted = said(new / CONFIG), {**said(old / CONFIG), **changed}
    _same_places(config, wanted)
    same_json(config, wanted)
    same_bytes(new / WEIGHTS, old / WEIGHTS)


def same_but_places(new: Path, old: Path) -> None:
    """Hold a task's configuration, which names this machine's places, against the stored one."""
    config, wanted = said(new / CONFIG), said(old / CONFIG)
    _same_places(config, wanted)
    if config["card"] is not None and "of" not in (wanted["card"] or {}):
        # version 0.1.0 put the hash of the coefficients into some cards only
        config["card"].pop("of", None)
    same_json(config, wanted)


def _same_places(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Take the places out of two tasks' configurations, where they are the same or not to be said in the new one."""
    basis, was = config.pop("basis"), wanted.pop("basis")
    assert basis is None or Path(basis).name == Path(was).name
    for each in (config, wanted):
        if each["bundle"] is not None:
            each["bundle"]["location"] = Path(each["bundle"]["location"]).name


def close_tensors(new: Path, old: Path) -> None:
    """Hold a file that products of matrices are in against the stored one."""
    one, two = load_file(new), load_file(old)
    assert list(one) == list(two)
    for key, value in one.items():
        assert value.dtype == two[key].dtype, key
        torch.testing.assert_close(value, two[key], atol=1e-5, rtol=1e-4)


def without(facts: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in keys}


def close_numbers(value: Any) -> Any:
    """Numbers of nested dictionaries to a tolerance."""
    if isinstance(value, dict):
        return {key: close_numbers(each) for key, each in value.items()}
    return pytest.approx(value, abs=1e-6) if isinstance(value, float) else value

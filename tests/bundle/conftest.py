"""Tasks of several kinds, and a bundle of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from subspace_peft import SubspaceConfig, bundle_tasks, open_bundle
from subspace_peft.bundle.format import BUNDLE_FILE

from ..models import bert, inputs, randomise

KINDS = [
    {},
    {"coefficients": "factor", "r": 3},
    {"mean_gain": "fixed", "alpha": 100.0},
    {"modules_to_save": ["classifier"], "id2label": {0: "ham", 1: "spam"}},
    {"k": 3},
    {"target_modules": ["query"], "coefficients": "diagonal"},
]
NAMES = [f"task{i}" for i in range(len(KINDS))]


def logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(inputs(), **kwargs).logits


def save(make, folder: Path, basis: str, seed: int = 0, **config: object) -> Path:
    model = randomise(get_peft_model(make(), SubspaceConfig(basis=basis, **config)), seed=seed)
    if "modules_to_save" in config:
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight.normal_(
                generator=torch.Generator().manual_seed(seed)
            )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def made(bases, tmp_path_factory):
    """A folder for each task, and their bundle, that no test writes into."""
    root = tmp_path_factory.mktemp("bundled")
    folders = [save(bert, root / name, bases[bert].location, i, **KINDS[i]) for i, name in enumerate(NAMES)]
    bundle_tasks(folders, root / "bundle", metrics={"task0": {"accuracy": 0.91}}, progress=False)
    return root


@pytest.fixture
def folders(made, tmp_path):
    return [Path(shutil.copytree(made / name, tmp_path / name)) for name in NAMES]


@pytest.fixture
def bundle(made, tmp_path):
    return open_bundle(shutil.copytree(made / "bundle", tmp_path / "bundle"))


def rewrite(folder: Path, change) -> None:
    """Change a bundle's header in place, data as it is."""
    file = folder / BUNDLE_FILE
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    index = json.loads(header["__metadata__"]["bank"])
    change(header, index)
    header["__metadata__"]["bank"] = json.dumps(index)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

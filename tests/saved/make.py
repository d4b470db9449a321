"""Write the files in this folder's `v0.1.0`, as subspace_peft 0.1.0 at commit 1ebe9de wrote them.

    python -m tests.saved.make

Every place in them is made relative: of tasks, bundles and exports to their folder, of sources to `v0.1.0`. The files
stay as they are when the package changes: run this again only for a version whose files are to be kept as well.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    TaskBank,
    __version__,
    build_basis,
    bundle_tasks,
    complete_basis,
    compress_fleet,
    export_lora,
    extract_task,
    load_task,
    migrate_task,
    open_bundle,
    project_lora,
    save_adapter,
    update_basis,
    write_card,
)
from subspace_peft.cli import main
from subspace_peft.convert import read_task

from .models import MAKERS, TARGETS, bert, fill, gpt2, outputs, small

ROOT = Path(__file__).parent.resolve() / f"v{__version__}"
BASES, TASKS, LORAS, BUNDLES = (ROOT / name for name in ("bases", "tasks", "loras", "bundles"))
LABELS = {0: "bad", 1: "good"}
# what `inspect` says of a basis as its config does
COPIED = ("sources", "build", "skipped", "certificates", "energy_kept_per_module", "energy_random_per_module")

# task → base model, basis, and what its configuration says
TRAINED: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "core": (bert, "float32", {}),
    "core-2": (bert, "float32", {"start": "bert-1", "alpha": 64.0, "dropout": 0.1}),
    "core-mean-fixed": (bert, "float32", {"mean_gain": "fixed"}),
    "core-mean-trainable": (bert, "float32", {"mean_gain": "trainable", "start": "mean"}),
    "factor": (bert, "float32", {"coefficients": "factor", "r": 2}),
    "diagonal": (bert, "float32", {"coefficients": "diagonal", "mean_gain": "trainable"}),
    "directions": (bert, "float32", {"coefficients": "directions", "mean_gain": "fixed"}),
    "none": (bert, "float32", {"coefficients": "none", "mean_gain": "trainable"}),
    "k": (bert, "float32", {"k": 4}),
    "rank-pattern": (bert, "float32", {"rank_pattern": {"query": 2, r"layer\.1\..*\.value": 3}}),
    "targets": (bert, "float32", {"target_modules": r".*\.(query|value)", "exclude_modules": r".*\.0\..*\.value"}),
    "layers": (bert, "float32", {"target_modules": ["query", "value"], "layers_to_transform": [1]}),
    "headed": (bert, "float32", {"task_type": "SEQ_CLS", "id2label": LABELS}),
    "saved-modules": (bert, "float32", {"coefficients": "factor", "r": 2, "modules_to_save": ["classifier"]}),
    "bias": (bert, "float32", {"bias": "subspace_only"}),
    "tokens": (bert, "float32", {"trainable_token_indices": {"word_embeddings": [1, 2]}}),
    "self-contained": (
        bert, "float32",
        {"save_basis": True, "coefficients": "directions", "mean_gain": "fixed", "rank_pattern": {"query": 4}},
    ),
    "random": (bert, "random", {"k": 3, "target_modules": ["query", "value"], "seed": 5}),
    "base-weights": (bert, "base-weights", {"k": 3, "target_modules": ["query", "value"]}),
    "int8": (bert, "int8", {"mean_gain": "fixed"}),
    "float16": (bert, "float16", {}),
    "bfloat16": (bert, "bfloat16", {"coefficients": "factor", "r": 2}),
    "updated": (bert, "updated", {}),
    "completed": (bert, "completed", {"coefficients": "diagonal"}),
    "gpt2": (gpt2, "gpt2", {"task_type": "CAUSAL_LM"}),
    "small": (small, "small", {"mean_gain": "trainable"}),
    "small-factor": (small, "small", {"coefficients": "factor", "r": 2}),
}  # fmt: skip


def make_all() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    make_loras()
    make_bases()
    for name, (make, basis, config) in TRAINED.items():
        make_task(name, make, basis, config)
    make_by_other_writers()
    make_bundles()
    extract_task(BUNDLES / "plain", "directions", TASKS / "extracted")
    export_lora(TASKS / "directions", ROOT / "exports" / "directions")
    export_lora(TASKS / "headed", ROOT / "exports" / "headed", pad_to=8, modules_to_save=True)
    export_lora(TASKS / "small", ROOT / "exports" / "small")
    make_pickles()
    make_expected()
    make_relative()


def make_loras() -> None:
    """Save stock LoRAs with random weights on both sides."""
    for make, count in ((bert, 7), (gpt2, 3), (small, 3)):
        for number in range(count):
            given = {"r": 4 if make is bert else 2, "lora_alpha": 8, "target_modules": TARGETS[make]}
            model = get_peft_model(make(), LoraConfig(**given, fan_in_fan_out=make is gpt2))
            fill(((name, value) for name, value in model.named_parameters() if "lora_" in name), 10 + number, 0.1)
            model.save_pretrained(LORAS / f"{make.__name__}-{number}")


def loras(make: Callable[[], nn.Module], *numbers: int) -> list[str]:
    return [str(LORAS / f"{make.__name__}-{number}") for number in numbers]


def make_bases() -> None:
    basis = build_basis(loras(bert, 0, 1, 2, 3, 4), k=6, directions=3, progress=False)
    basis.save_pretrained(BASES / "float32")
    for precision in ("int8", "float16", "bfloat16"):
        basis.to_precision(precision).save_pretrained(BASES / precision)
    update_basis(basis, loras(bert, 5), add=2, progress=False).save_pretrained(BASES / "updated")
    complete_basis(basis, k=8, progress=False).save_pretrained(BASES / "completed")
    build_basis(loras(gpt2, 0, 1, 2), k=4, k_in=3, progress=False).save_pretrained(BASES / "gpt2")
    build_basis(loras(small, 0, 1, 2), k=4, progress=False).save_pretrained(BASES / "small")


def trained(model: nn.Module, seed: int) -> nn.Module:
    """Give an adapter random numbers, as if it had been trained."""
    fill(((name, value) for name, value in model.named_parameters() if value.requires_grad), seed, 0.05)
    return model


def place(basis: str) -> str:
    return str(BASES / basis) if (BASES / basis).is_dir() else basis


def make_task(name: str, make: Callable[[], nn.Module], basis: str, config: dict[str, Any]) -> None:
    model = get_peft_model(make(), SubspaceConfig(basis=place(basis), **config))
    trained(model, seed=len(name)).save_pretrained(TASKS / name)


def make_by_other_writers() -> None:
    config = SubspaceConfig(basis=place("float32"), target_modules=["query"])
    save_adapter(trained(inject_adapter_in_model(config, bert()), seed=1), TASKS / "injected", "default")
    bank = TaskBank(PeftModel.from_pretrained(bert(), TASKS / "core"))
    for name in ("core", "core-mean-fixed", "factor"):
        bank.add(name, TASKS / name)
    bank.save(ROOT / "bank.safetensors")
    bank.save_task("core-mean-fixed", TASKS / "banked")
    project_lora(str(LORAS / "bert-5"), place("float32")).save_pretrained(TASKS / "projected")
    migrate_task(TASKS / "factor", place("updated")).save_pretrained(TASKS / "migrated")
    shutil.copytree(TASKS / "core", TASKS / "carded")
    write_card(TASKS / "carded", metrics={"test": {"accuracy": 0.75}}, datasets=["org/data"])


def make_bundles() -> None:
    names = ("core", "core-mean-fixed", "directions", "headed", "k")
    bundle_tasks(
        [TASKS / name for name in names],
        BUNDLES / "plain",
        metrics={"core": {"accuracy": 0.75}},
        id2label={"k": LABELS},
    )
    bundle_tasks([TASKS / "core", TASKS / "none"], BUNDLES / "bfloat16", dtype=torch.bfloat16)
    compress_fleet(loras(bert, 0, 5, 6), place("float32"), BUNDLES / "fleet", min_energy=0.6, residual=4)


def make_pickles() -> None:
    """Pickle a configuration and small bases, with no place in them: in a pickle none could be made relative."""
    config = SubspaceConfig(basis="org/basis", basis_revision="main", k=4, target_modules=["query", "value"])
    basis = SubspaceBasis.from_pretrained(place("float32"))
    module = "bert.encoder.layer.0.attention.self.query"
    one = SubspaceBasis({module: basis[module]}, {"base_model_name_or_path": basis.base_model})
    bases = {name: one.to_precision(name) for name in ("float32", "int8")}
    for name, value in {"config": config, **bases}.items():
        (ROOT / f"{name}.pickle").write_bytes(pickle.dumps(value, protocol=4))


# -- what is expected -----------------------------------------------------------------------------------------------


def make_expected() -> None:
    """Write the numbers that the files have to give: `expected.json` and `expected.safetensors`."""
    tensors: dict[str, torch.Tensor] = {}
    said: dict[str, Any] = {"bases": {}, "tasks": {}, "bundles": {}}
    for folder in sorted(BASES.iterdir()):
        basis = SubspaceBasis.from_pretrained(folder)
        said["bases"][folder.name] = {
            "fingerprint": basis.fingerprint, "shapes": basis.shapes(), "k": basis.describe_k(),
            "precision": basis.precision,
            "base_model": basis.base_model, "digests": basis.digests,
            "inspect": {
                key: None if key in COPIED else value for key, value in inspected(folder).items() if key != "location"
            },
        }  # fmt: skip
        for name, module in basis.items():
            for key, value in module.tensors().items():
                if key in ("U", "V", "M") and basis.precision is not None:
                    tensors[f"bases/{folder.name}/{name}.{key}"] = value.contiguous()
    for folder in sorted(TASKS.iterdir()):
        config, task = json.loads((folder / "adapter_config.json").read_text()), read_task(folder)
        model = PeftModel.from_pretrained(MAKERS[config["base_model_name_or_path"]](), folder)
        tensors[f"tasks/{folder.name}"] = outputs(model)
        tensors |= {f"tasks/{folder.name}/{name}": core.contiguous() for name, core in task.cores.items()}
        said["tasks"][folder.name] = {"extras": sorted(task.extras), "inspect": inspected(folder)}
    for folder in sorted(BUNDLES.iterdir()):
        said["bundles"][folder.name] = json.loads(printed("bundle", "ls", str(folder), "--verify", "--json"))
        for name in open_bundle(folder):
            tensors[f"bundles/{folder.name}/{name}"] = outputs(load_task(bert(), folder, name))
    (ROOT / "expected.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
    save_file(tensors, ROOT / "expected.safetensors")


def printed(*arguments: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(arguments) == 0, text.getvalue()
    return text.getvalue()


def inspected(folder: Path) -> dict[str, Any]:
    return json.loads(printed("inspect", str(folder), "--json"))


# -- places ---------------------------------------------------------------------------------------------------------


def make_relative() -> None:
    """Replace this machine's places by relative ones; keep a README of a task and of a basis only."""
    for file in sorted(ROOT.rglob("*")):
        kept = file.parent in (TASKS / "carded", BASES / "float32")
        if file.name == "README.md" and not kept:
            file.unlink()
        elif file.suffix in (".json", ".md"):
            file.write_text(relative(file.read_text(encoding="utf-8"), file), encoding="utf-8")
        elif file.suffix == ".safetensors":
            relative_header(file)


def relative(text: str, file: Path) -> str:
    # a task's basis is looked for beside it; the places of a basis's sources are from the working directory
    up = "../../" if file.parent.parent in (TASKS, BUNDLES, ROOT / "exports") else ""
    return text.replace(f"{ROOT}/", up)


def relative_header(file: Path) -> None:
    """Replace places in a safetensors file's metadata; the tensors' bytes stay as they are."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    new = {key: relative(value, file) for key, value in metadata.items()}
    if new != metadata:
        text = json.dumps({**header, "__metadata__": new}, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


if __name__ == "__main__":
    make_all()

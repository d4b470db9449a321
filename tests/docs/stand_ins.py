"""The folder that a page's blocks run in: small files under the names that README and docs use.

A page that makes `my-basis` itself finds none there: `Folder.make_way` removes a stand-in before the block that writes
it, and `Folder.follow` makes the stand-ins that belong to another basis again.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from subspace_peft import SubspaceBasis, build_basis, bundle_tasks, project_lora

LORAS = ("sst2", "cola", "mrpc", "qqp", "mnli", "qnli", "rte", "stsb")
NEUTRAL = ("the", "a", "this", "film", "story", "actor", "was", "is", "quite", "very", "it", "and", "with", "plot")
WORDS = (("bad", "dull", "awful", "boring", "weak"), ("good", "fine", "great", "moving", "strong"))
TASKS = {"my-task": "sst2", "tasks/spam": "mrpc", "tasks/billing": "qqp"}  # of these adapters' updates
# what a block writes: `--out my-basis`, `.save_pretrained("my-basis")`, `bundle_tasks([…], "my-bundle")`
WRITTEN = r"""--(?:tasks-)?out[ =]{name}(?![\w/-])|save_pretrained\(\s*"{name}\""""
WRITTEN_BUNDLE = r"""|(?:compress_fleet|bundle_tasks)\([^()]*, "{name}\""""


def make_folder(root: Path) -> Path:
    """Make base model, adapters, basis, tasks, bundle and data in `root`."""
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NEUTRAL, *WORDS[0], *WORDS[1]]
    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=len(vocabulary),
        max_position_embeddings=64,
        num_labels=2,
    )
    BertForSequenceClassification(config).save_pretrained(root / "base")
    BertTokenizer({word: at for at, word in enumerate(vocabulary)}).save_pretrained(root / "base")
    make_loras(root)
    for name, count, seed in (("train", 48, 0), ("test", 16, 1)):
        (root / f"{name}.json").write_text(json.dumps(sentences(count, seed), indent=1))
    build_basis([root / "loras" / name for name in LORAS], k=16, progress=False).save_pretrained(root / "my-basis")
    make_tasks(root, TASKS)
    make_bundle(root)
    make_demo_output(root)
    return root


def sentences(count: int, seed: int) -> list[dict[str, object]]:
    """Return rows of a text and its label, which its words tell."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = draw.sample(NEUTRAL, 5) + draw.sample(WORDS[number % 2], 2)
        rows.append({"text": " ".join(draw.sample(words, len(words))), "label": number % 2})
    return rows


def make_loras(root: Path) -> None:
    """Save eight LoRAs whose updates have half of their directions in common, with the heads that PEFT trains."""
    base = BertForSequenceClassification.from_pretrained(root / "base")
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    common = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(7))
    for number, name in enumerate(LORAS):
        draw = torch.Generator().manual_seed(100 + number)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                side = "lora_B" in key
                mixed = torch.randn(8, 8, generator=draw) @ common[int(side)] + torch.randn(8, 64, generator=draw)
                parameter.data.copy_(0.02 * (mixed.T if side else mixed))
        model.save_pretrained(root / "loras" / name)
        config = root / "loras" / name / "adapter_config.json"
        # as an adapter of the page's own would say; the place that was just used is gone tomorrow
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "base"}))


def make_tasks(root: Path, tasks: dict[str, str]) -> None:
    """Project adapters into `my-basis`, in closed form; those in `tasks/` without their heads."""
    for name, lora in tasks.items():
        folder = root / "loras" / lora
        source: object = folder
        if name.startswith("tasks/"):
            tensors = load_file(folder / "adapter_model.safetensors")
            config = json.loads((folder / "adapter_config.json").read_text())
            source = (
                {key: each for key, each in tensors.items() if "lora_" in key},
                {**config, "modules_to_save": None},
            )
        project_lora(source, root / "my-basis").save_pretrained(root / name)


def make_bundle(root: Path) -> None:
    """Put two tasks in a bundle."""
    bundle_tasks([root / "tasks/spam", root / "tasks/billing"], root / "my-bundle")


def make_demo_output(root: Path) -> None:
    """What `subspace-peft demo --stage sources` leaves: base model, adapters, and data of a held-out task."""
    out = root / "demo-output"
    shutil.copytree(root / "base", out / "base")
    shutil.copytree(root / "loras", out / "loras")
    (out / "data" / "editorials").mkdir(parents=True)
    for name in ("train", "test"):
        shutil.copyfile(root / f"{name}.json", out / "data" / "editorials" / f"{name}.json")


class Folder:
    """A copy of the stand-ins, and which of them the page has made itself."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.own = {"my-basis", "my-bundle", *TASKS}
        self.fingerprint = self._fingerprint()

    def make_way(self, source: str) -> None:
        """Remove the stand-ins that a block writes."""
        for name in sorted(self.own):
            written = WRITTEN + (WRITTEN_BUNDLE if name == "my-bundle" else "")
            if re.search(written.replace("{name}", re.escape(name)), source):
                shutil.rmtree(self.root / name, ignore_errors=True)
                self.own.discard(name)

    def follow(self) -> None:
        """Make stand-in tasks and bundle of the basis that is there now, if the page has made another."""
        found = self._fingerprint()
        if found in (None, self.fingerprint):
            return
        self.fingerprint = found
        stale = {name: lora for name, lora in TASKS.items() if name in self.own}
        for name in [*stale, *(["my-bundle"] if "my-bundle" in self.own else [])]:
            shutil.rmtree(self.root / name)
        make_tasks(self.root, stale)
        if "my-bundle" in self.own and {"tasks/spam", "tasks/billing"} <= stale.keys():
            make_bundle(self.root)

    def _fingerprint(self) -> str | None:
        if not (self.root / "my-basis").is_dir():
            return None
        return SubspaceBasis.from_pretrained(self.root / "my-basis").fingerprint

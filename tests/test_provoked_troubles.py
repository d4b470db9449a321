"""docs/troubleshooting.md beside what is really printed: what goes wrong most often is provoked and looked up."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from subspace_peft import SubspaceConfig, TaskBank, build_basis, project_lora
from subspace_peft.cli import main
from subspace_peft.tasks import read_task

from .models import bert, gpt2, train_lora
from .test_troubleshooting import PAGE, entries

ENTRIES = entries(PAGE.read_text(encoding="utf-8"))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def altered(folder, config=None, tensors=None):
    """Save a LoRA that is like the others but for what is given."""
    shutil.copytree("loras/l0", folder)
    values = json.loads(Path(folder, CONFIG).read_text())
    Path(folder, CONFIG).write_text(json.dumps(values | (config or {})))
    if tensors is not None:
        save_file(tensors(load_file(Path(folder, WEIGHTS))), Path(folder, WEIGHTS))
    return folder


def cut(file, by=50):
    file.write_bytes(file.read_bytes()[:-by])


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 16
    file.write_bytes(bytes(raw))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as users have it: three LoRAs, a basis of them, a task in it; and what is wrong with others."""
    root = tmp_path_factory.mktemp("troubles")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for number in range(3):
            train_lora(bert, Path("loras", f"l{number}"), number)
        basis = build_basis("loras/*", k=4, progress=False)
        basis.save_pretrained("basis")
        project_lora("loras/l0", basis).save_pretrained("task")
        build_basis("loras/*", k=2, progress=False).save_pretrained("other-basis")
        altered("nan", tensors=lambda found: {key: value * float("nan") for key, value in found.items()})
        altered("zero", tensors=lambda found: {key: value * ("lora_A" in key) for key, value in found.items()})
        altered("fewer", tensors=lambda found: {key: value for key, value in found.items() if "query" not in key})
        altered("dora", {"use_dora": True})
        altered("stranger", {"base_model_name_or_path": "org/other"})
        cut(Path(altered("torn"), WEIGHTS))
        Path(altered("bare"), WEIGHTS).unlink()
        for name, harm in (("damaged", flip), ("short", cut)):
            shutil.copytree("basis", name)
            harm(Path(name, "basis.safetensors"))
        shutil.copytree("task", "diverged")
        save_file(
            {key: value * float("nan") for key, value in load_file(Path("task", WEIGHTS)).items()},
            Path("diverged", WEIGHTS),
        )
        Path("notes.txt").write_text("loras/l0\n")
    return root


BUILD = "build loras/l0 loras/l1 {} --out new"
# command → the entry's words for what it prints
COMMANDS = {
    BUILD.format("loras/nope"): "there is no such folder or file.",
    BUILD.format("'loras/x*'"): "the pattern matches no folder",
    BUILD.format("loras/l0"): "It would count twice; list it once.",
    BUILD.format("nan"): "holds NaN or infinite values. Leave this adapter out.",
    BUILD.format("zero"): "every lora_B is zero",
    BUILD.format("fewer"): "unlike the others.",
    BUILD.format("dora"): "DoRA rescales",
    BUILD.format("torn"): "It is truncated or damaged: fetch or save it again.",
    BUILD.format("bare"): "save the adapter with `model.save_pretrained(folder)`",
    BUILD.format("org/lora"): "it may not ask the Hub (HF_HUB_OFFLINE)",
    "build loras/* -k 60 --out wide": "the fleet spans fewer directions",
    "build loras/*": "Say where to write the basis",
    "build loras/* --out task": "Give another place, or replace it with",
    "build loras/* --out loras/l0": "from which",
    "build loras/* --out notes.txt": "is a file;",
    "inspect nowhere": "There is no folder",
    "validate task": "it is not a basis.",
    "inspect loras/l0": "not SUBSPACE.",
    "validate damaged": "was altered or damaged after it was written",
    "validate short": "truncated or not a safetensors file",
    "project stranger --basis basis --no-base-check --out basis": "Give another place: no flag or argument allows",
    "compress loras/* --basis other-basis --out new --min-energy 1": "adapters cannot be compressed.",
    "migrate task --basis other-basis --out new": "of its update's norm, more than",
    "project loras/l0 --basis basis --extra-budget 5": "one direction takes",
    "migrate task --basis other-basis --out new --no-pad": "its tensors stay, on a basis",
    "update basis loras/l0 --out new": "it is in the basis already",
    "push task org/task": "where others who load it from the Hub would not find it.",
}


def looked_up(words, said):
    """Return the entry with these words, of which all that is fixed has to be in what was said, in order."""
    (quote,) = (each for each in ENTRIES if words in each)
    pattern = ".{0,400}?".join(re.escape(part) for part in quote.split("…"))
    return re.search(pattern, said, re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_prints_is_on_the_page(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [word.strip("'") for word in command.split()]
    if "loras/*" in words:
        at = words.index("loras/*")
        words[at : at + 1] = ["loras/l0", "loras/l1", "loras/l2"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        status = main([*words, "--quiet"])
    said = "\n".join(["".join(capsys.readouterr()), *(str(each.message) for each in warned)])
    assert status == (0 if "-k" in words else 1), said
    assert looked_up(COMMANDS[command], said), said


def wrapped(basis="basis", make=bert, **fields):
    return get_peft_model(make(), SubspaceConfig(basis=basis, **fields))


def with_own(rank=1):
    """A task with own directions, saved, whose file lacks what its config names."""
    wrapped(extra_rank=rank).save_pretrained("own")
    file = Path("own", WEIGHTS)
    save_file({key: value for key, value in load_file(file).items() if not key.endswith("extra_V")}, file)
    return "own"


def bank_without_room():
    model = wrapped()
    wide = wrapped(extra_rank=1)
    for name, parameter in wide.named_parameters():
        if "extra_" in name:
            torch.nn.init.ones_(parameter)
    TaskBank(model).add("wide", read_task(wide))


def narrow():
    """A model of the same names and half the width."""
    return BertForSequenceClassification(BertConfig(**bert().config.to_dict() | {"hidden_size": 16}))


def trained(rate):
    args = TrainingArguments("run", learning_rate=rate, max_steps=3, report_to="none", use_cpu=True)
    rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor(0)}] * 2
    Trainer(wrapped(task_type="SEQ_CLS"), args, train_dataset=rows).train()


# what is done in Python → the entry's words
CALLS = {
    "SubspaceConfig has no basis.": lambda: wrapped(None),
    "was not found:": lambda: wrapped("nowhere"),
    "It is another basis, or it was rebuilt since": lambda: SubspaceConfig.from_pretrained(
        "task", basis="other-basis"
    ).resolve(),
    "was altered or damaged": lambda: dict(SubspaceConfig(basis="damaged").resolve()),
    "None of the basis's": lambda: wrapped(make=gpt2),
    "Narrow target_modules": lambda: wrapped(target_modules=["query", "key"]),
    "modules are adapted in this": lambda: wrapped(make=lambda: bert(layers=1)),
    "modules have other shapes than the basis": lambda: wrapped(make=narrow),
    "dimensions on one side": lambda: wrapped(extra_rank=100),
    "no adapted module is called": lambda: wrapped(extra_rank_pattern={"nowhere": 1}),
    "do not belong together": lambda: PeftModel.from_pretrained(bert(), with_own()),
    "and this bank has room for": bank_without_room,
    "no such source in the basis": lambda: wrapped(start="nobody"),
    "The task's training diverged": lambda: PeftModel.from_pretrained(bert(), "diverged"),
    "in which they were measured to learn": lambda: trained(5e-5),
    "lives in memory only, so the task": lambda: wrapped(build_basis("loras/*", k=1, progress=False)).save_pretrained(
        "in-memory"
    ),
}


@pytest.mark.parametrize("words", CALLS)
def test_what_a_call_says_is_on_the_page(words, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("subspace_peft.tuner.learning_rate._said", set())  # it is said once in a process
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            CALLS[words]()
            said = "\n".join(str(each.message) for each in warned)
        except ValueError as error:
            said = str(error)
    assert looked_up(words, said), said

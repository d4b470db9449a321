"""Cards of real things: their snippets run as they stand, and what they say is what happened."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from subspace_peft import SubspaceCardCallback, SubspaceConfig, build_basis, project_lora, write_card
from subspace_peft.errors import BadFileError, SubspaceError

from . import fresh
from .models import bert, gpt2, randomise, train_lora
from .push_hub import PushHub
from .test_sharing import TOKEN, client

PUSH = """
    import torch, transformers
    from peft import get_peft_model
    from subspace_peft import SubspaceBasis, SubspaceConfig
    from tests.models import inputs, randomise
    def made(auto, base, **given):
        return getattr(transformers, auto).from_pretrained(base, **given)
    def push(base, task, **config):
        model = randomise(get_peft_model(base, SubspaceConfig(**config))).eval()
        model.push_to_hub(task)
        with torch.no_grad():
            print(task, model(inputs()).logits.double().sum().item())
"""
USE = """
from tests.models import inputs
print(model.eval()(inputs()).logits.double().sum().item())
"""


@pytest.fixture
def hub() -> Iterator[PushHub]:
    with PushHub(token=TOKEN) as server:
        yield server


def snippet(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_snippets_of_pushed_cards_run(hub, fleets, tmp_path):
    for name, make, task_type in (("bert", bert, "SEQ_CLS"), ("gpt2", gpt2, "CAUSAL_LM")):
        make().save_pretrained(tmp_path / name)
        hub.put(f"org/{name}", tmp_path / name)
        loras = [train_lora(make, tmp_path / f"{name}{i}", 10 + i, task_type=task_type) for i in range(2)]
        for folder in loras:
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(
                json.dumps({**config, "base_model_name_or_path": f"org/{name}"})
            )
        build_basis(loras, k=3, progress=False).save_pretrained(tmp_path / f"{name}-basis")
    said = client(
        hub,
        tmp_path / "one",
        PUSH,
        f"""
        bases = [SubspaceBasis.from_pretrained({str(tmp_path)!r} + f"/{{name}}-basis") for name in ("bert", "gpt2")]
        for name, basis in zip(("bert", "gpt2"), bases):
            basis.push_to_hub(f"me/{{name}}-basis")
        labels = {{"num_labels": 3, "id2label": {{0: "no", 1: "yes", 2: "so-so"}}, "ignore_mismatched_sizes": True}}
        cls = lambda: made("AutoModelForSequenceClassification", "org/bert", **labels)
        push(cls(), "me/cls", basis=bases[0], task_type="SEQ_CLS")
        push(cls(), "me/own", basis=bases[0], task_type="SEQ_CLS", save_basis=True)
        push(made("AutoModelForCausalLM", "org/gpt2"), "me/lm", basis=bases[1], task_type="CAUSAL_LM")
        """,
        HF_TOKEN=TOKEN,
    )
    totals = dict(line.split() for line in said.splitlines() if line.startswith("me/"))
    for repo, total in totals.items():
        card = hub.files(repo)["README.md"].decode()
        ran = client(hub, tmp_path / "two", snippet(card) + USE)
        assert ran.split()[-1] == total, card
        base = "org/gpt2" if repo == "me/lm" else "org/bert"
        front = front_matter(card)
        assert (front["base_model"], front["base_model_relation"], front["library_name"]) == (base, "adapter", "peft")
        assert front["pipeline_tag"] == ("text-generation" if repo == "me/lm" else "text-classification")
        assert {base.removeprefix("org/"), "subspace", "subspace-task", "subspace-core"} == set(front["tags"])
    for name in ("bert", "gpt2"):
        card = hub.files(f"me/{name}-basis")["README.md"].decode()
        ran = client(hub, tmp_path / "two", snippet(card) + USE)
        assert "trainable params" in ran and float(ran.split()[-1])
        assert front_matter(card)["base_model"] == f"org/{name}"


def test_the_snippet_of_a_folder_runs(basis_folder, tmp_path):
    bert().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, SubspaceConfig(basis=str(basis_folder), task_type="SEQ_CLS")))
    model.add_adapter("other", SubspaceConfig(basis=str(basis_folder), task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "task")
    card = (tmp_path / "task" / "README.md").read_text()
    assert "More Information Needed" not in card and "base_model" not in front_matter(card)
    assert '"./other"' in (tmp_path / "task" / "other" / "README.md").read_text()
    fresh.run("-c", snippet(card), cwd=tmp_path, check=True)


# -- training -------------------------------------------------------------------------------------------------------


def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": [[i, i + 1, 2] for i in range(8)], "labels": [0, 1] * 4})


def train(model, folder: Path, callbacks=(), **given) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
        **given,
    )

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.fixture
def model(basis_folder):
    return get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder), task_type="SEQ_CLS"))


def test_a_training_is_in_the_card_as_it_was(model, tmp_path):
    trainer = train(model, tmp_path / "out", [SubspaceCardCallback(datasets=["org/data"])])
    model.save_pretrained(tmp_path / "task")
    card = (tmp_path / "task" / "README.md").read_text()
    evaluation = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    last = next(entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry)
    for line in (
        "| learning rate of the coefficients | 0.01 |",
        "| epochs | 2 |",
        "| optimizer steps | 4 |",
        "| examples per step | 4 |",
        "| training examples | 8 |",
        "| optimizer | AdamW |",
        "| scheduler | linear |",
        "| seed | 7 |",
        f"| training loss | {last:.4g} |",
        f"| evaluation | accuracy | {evaluation['eval_accuracy']:.4g} |",
        f"| evaluation | loss | {evaluation['eval_loss']:.4g} |",
    ):
        assert line in card
    assert "runtime" not in card and "per_second" not in card
    front = front_matter(card)
    assert front["datasets"] == ["org/data"]
    assert front["model-index"][0]["results"][0]["metrics"] == [
        {"type": "accuracy", "value": evaluation["eval_accuracy"]}
    ]
    # every checkpoint has a card of its own time
    assert "| optimizer steps | 2 |" in (tmp_path / "out" / "checkpoint-2" / "README.md").read_text()
    # what is known is known after loading too, and not of numbers that were trained on since
    again = PeftModel.from_pretrained(bert(), tmp_path / "task", is_trainable=True)
    again.save_pretrained(tmp_path / "again")
    assert "| optimizer steps | 4 |" in (tmp_path / "again" / "README.md").read_text()
    randomise(again).save_pretrained(tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "## Training" not in card and "model-index" not in card and "datasets" not in front_matter(card)


def test_learning_rates_are_those_of_the_optimizer(model, tmp_path):
    head = [p for name, p in model.named_parameters() if p.requires_grad and "subspace_coef" not in name]
    ours = [p for name, p in model.named_parameters() if "subspace_coef" in name]
    optimizer = torch.optim.SGD([{"params": ours, "lr": 0.25}, {"params": head, "lr": 0.125}])
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = Trainer(
        model, arguments, train_dataset=rows(), optimizers=(optimizer, None), callbacks=[SubspaceCardCallback()]
    )
    trainer.train()
    trainer.predict(rows())
    model.save_pretrained(tmp_path / "task")
    card = (tmp_path / "task" / "README.md").read_text()
    assert "coefficients | 0.25 |" in card and "else is trained | 0.125 |" in card and "| optimizer | SGD |" in card
    assert "| test | loss |" in card and "## Beside" not in card


def test_groups_of_an_optimizer_with_as_many_tensors_each_are_told_apart(model, tmp_path):
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ours = [p for name, p in trained if "subspace_coef" in name]
    others = [p for name, p in trained if "subspace_coef" not in name]
    # as many of each, of other shapes
    count = min(len(ours), len(others))
    groups = [{"params": ours[:count], "lr": 0.02}, {"params": others[:count], "lr": 0.005}]
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    optimizers = (torch.optim.AdamW(groups), None)
    Trainer(model, arguments, train_dataset=rows(), optimizers=optimizers, callbacks=[SubspaceCardCallback()]).train()
    said = model.peft_config["default"].card["training"]
    assert (said["learning_rate"], said["head_learning_rate"]) == (0.02, 0.005)


def test_the_best_model_has_its_own_numbers(model, tmp_path):
    trainer = train(
        model,
        tmp_path / "out",
        [SubspaceCardCallback()],
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    best, worst = sorted(
        (entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry), reverse=True
    )
    assert best != worst
    model.save_pretrained(tmp_path / "task")
    assert f"| evaluation | loss | {best:.4g} |" in (tmp_path / "task" / "README.md").read_text()


def test_without_the_callback_nothing_is_said_of_the_training_until_the_state_is_read(model, tmp_path):
    train(model, tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert "## Training" not in (checkpoint / "README.md").read_text()
    (checkpoint / "training_args.bin").write_bytes(b"never read")
    card = write_card(checkpoint).read_text()
    assert "| optimizer steps | 4 |" in card and "| evaluation | accuracy |" in card and "| learning rate" not in card
    once = (checkpoint / "README.md").read_bytes(), (checkpoint / "adapter_config.json").read_bytes()
    write_card(checkpoint)
    assert ((checkpoint / "README.md").read_bytes(), (checkpoint / "adapter_config.json").read_bytes()) == once
    PeftModel.from_pretrained(bert(), checkpoint)


def test_the_trainers_own_card_gets_ours(model, tmp_path):
    trainer = train(model, tmp_path / "out", [SubspaceCardCallback()])
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Training hyperparameters" in card and "## Loading" in card and "KeyError: 'SUBSPACE'" in card
    assert front_matter(card)["library_name"] == "peft"


# -- writing by hand ------------------------------------------------------------------------------------------------

RESULT = {
    "method": "random basis",
    "test": 0.785,
    "test_sd": 0.017,
    "diverged": 0,
    "rate": 0.004,
    "seeds": [1, 2, 3],
    "trained_adapter": 1536,
    "trained_head": 770,
    "bytes": 7216,
}


def test_controls_and_metrics_are_added_and_kept(model, tmp_path):
    model.save_pretrained(tmp_path / "task")
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"title": "a title", "settings": {"score": "accuracy"}, "results": [RESULT]}))
    write_card(tmp_path / "task", controls=file, datasets=["org/data"])
    card = write_card(tmp_path / "task", metrics={"test": {"accuracy": 0.8}}).read_text()
    assert "| random basis | 0.785 ± 0.017 | 3 | 1,536 | 770 | 7,216 | 0.004 |" in card
    assert "| test | accuracy | 0.8 |" in card and front_matter(card)["datasets"] == ["org/data"]
    PeftModel.from_pretrained(bert(), tmp_path / "task").save_pretrained(tmp_path / "again")
    again = (tmp_path / "again" / "README.md").read_text()
    assert front_matter(again.replace("again", "task")) == front_matter(card)
    assert again.replace("again", "task").split(" -->\n", 2)[2] == card.split(" -->\n", 2)[2]


def test_what_is_no_such_file_is_named(model, tmp_path):
    model.save_pretrained(tmp_path / "task")
    before = (tmp_path / "task" / "README.md").read_bytes()
    for text in ("{", "[]", '{"results": [{}]}', '{"log_history": 3}'):
        (tmp_path / "file.json").write_text(text)
        for given in ("controls", "trainer_state"):
            with pytest.raises(BadFileError, match=r"file\.json.*Pass the"):
                write_card(tmp_path / "task", **{given: tmp_path / "file.json"})
    assert (tmp_path / "task" / "README.md").read_bytes() == before
    with pytest.raises(SubspaceError, match="saved task"):
        write_card(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(SubspaceError, match="LORA, not SUBSPACE"):
        write_card(tmp_path)


# -- sources --------------------------------------------------------------------------------------------------------


def test_licences_of_sources_are_read_where_they_are_said(fleets, tmp_path):
    said = {
        "plain": "---\nlicense: apache-2.0\n---\n",
        "other": "---\nlicense: other\nlicense_name: my-own\n---\n",
        "list": "---\nlicense: [mit, cc-by-4.0]\n---\n",
        "damaged": "---\na: [\n---\n",
        "none": "words",
    }
    folders = []
    for i, (name, text) in enumerate(said.items()):
        folders.append(train_lora(bert, tmp_path / name, 10 + i))
        (folders[-1] / "README.md").write_text(text)
    basis = build_basis(folders, k=3, progress=False)
    found = {source["name"]: source["license"] for source in basis.info["sources"]}
    assert found == {"plain": "apache-2.0", "other": "my-own", "list": "mit, cc-by-4.0", "damaged": None, "none": None}
    basis.save_pretrained(tmp_path / "basis")
    card = (tmp_path / "basis" / "README.md").read_text()
    for name in said:
        assert f"| {name} | `../{name}` |" in card
    assert "| apache-2.0 |" in card and "license" not in front_matter(card)


def test_a_projected_task_knows_its_head(bases, tmp_path):
    folder = train_lora(bert, tmp_path / "lora", 3, task_type="SEQ_CLS")
    project_lora(folder, bases[bert]).save_pretrained(tmp_path / "task")
    card = (tmp_path / "task" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" not in card  # its base model has no name
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    project_lora(folder, bases[bert]).save_pretrained(tmp_path / "task")
    card = (tmp_path / "task" / "README.md").read_text()
    assert 'AutoModelForSequenceClassification.from_pretrained("org/base", num_labels=2' in card

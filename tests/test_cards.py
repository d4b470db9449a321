"""Cards as text: what they look like for given facts, and what happens to a README that others write in too."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from subspace_peft.cards import (
    BaseFacts,
    BasisFacts,
    BasisReferenceFacts,
    BundledTaskFacts,
    BundleFacts,
    Place,
    SourceFacts,
    TaskFacts,
    add_tags,
    basis_card,
    bundle_card,
    put_card,
    task_card,
)
from subspace_peft.cards.readme import merge

from . import card_patterns

BASE = BaseFacts(reference="org/base", auto_class="AutoModelForCausalLM")
REFERENCE = BasisReferenceFacts(fingerprint="f" * 64, reference="org/basis")
BASIS = BasisFacts(
    place=Place("org/basis"),
    fingerprint="f" * 64,
    modules=12,
    k="k=16",
    frozen=24576,
    core=3072,
    builder="adapters",
    base=BASE,
    task_type="CAUSAL_LM",
    energy_kept=0.93,
    energy_random=0.0017,
    energy_left_out=0.0561,
    version="9.9",
    per_module={"a.q": {"kept": 0.95, "left_out": 0.06, "random": 0.0017}, "a.v": {"kept": 0.91, "random": 0.0017}},
    sources=(
        SourceFacts(
            name="one",
            location="org/one",
            revision="a" * 40,
            sha256="b" * 64,
            ranks=(8,),
            norm=1.23456,
            energy_kept=0.95,
            license="apache-2.0",
        ),
        SourceFacts(name="two|2", location="loras/two", sha256="c" * 64, ranks=(4, 8), norm=2.0),
        SourceFacts(name="bad", skipped="it is truncated"),
    ),
)
ROW = {"seeds": 3, "diverged": 0, "trained_adapter": 1536, "trained_head": 770, "bytes": 7216}
TASK = TaskFacts(
    place=Place("me/task", revision="dev"),
    basis=dataclasses.replace(REFERENCE, revision="abc"),
    coefficients="factor",
    base=BaseFacts(
        reference="org/base",
        revision="v1",
        auto_class="AutoModelForSequenceClassification",
        family="bert",
        num_labels=3,
        labels=("no", "yes", '"so-so"'),
    ),
    task_type="SEQ_CLS",
    numbers=3072,
    head=771,
    bytes=16384,
    datasets=("org/data",),
    training={"steps": 1200, "learning_rate": 0.004, "epochs": 3.0, "loss": 0.43214},
    metrics={"evaluation": {"loss": 0.5, "accuracy": 0.875}, "test": {"accuracy": 0.85}},
    controls={
        "title": "data: accuracy on 600 test examples",
        "score": "accuracy",
        "rows": [
            {
                "method": "base model",
                "test": 0.5,
                "test_sd": None,
                "seeds": 1,
                "diverged": 0,
                "rate": None,
                "trained_adapter": 0,
                "trained_head": 0,
                "bytes": 0,
            },
            {"method": "random basis", "test": 0.785, "test_sd": 0.0171, "rate": 0.004, **ROW},
            {"method": "this basis", "test": None, "test_sd": None, "rate": 0.012, **ROW, "diverged": 1},
        ],
    },
    versions={"subspace_peft": "9.9", "PEFT": "9.8"},
)
BARE_TASK = TaskFacts(
    place=Place("/somewhere/task"),
    basis=BasisReferenceFacts(fingerprint=None),
    coefficients="core",
    base=BaseFacts(class_name="MyModel"),
)
BUNDLE = BundleFacts(
    place=Place("me/bundle"),
    basis=REFERENCE,
    base=dataclasses.replace(BASE, family="bert"),
    task_type="CAUSAL_LM",
    bytes=4096,
    imports=("from somewhere import load",),
    loading=('model = load(base_model, "me/bundle")',),
    version="9.9",
    tasks=(
        BundledTaskFacts(
            name="first",
            coefficients="core",
            numbers=1024,
            metrics={"accuracy": 0.9, "loss": 1 / 3},
            datasets=("org/data",),
        ),
        BundledTaskFacts(name="second", coefficients="diagonal"),
    ),
)
CARDS = {
    "basis": (basis_card(BASIS), card_patterns.BASIS),
    "task": (task_card(TASK), card_patterns.TASK),
    "bare task": (task_card(BARE_TASK), card_patterns.BARE_TASK),
    "bundle": (bundle_card(BUNDLE), card_patterns.BUNDLE),
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_whole_card_is_as_expected(kind):
    card, pattern = CARDS[kind]
    lines, wanted = card.text().split("\n"), pattern.split("\n")
    # line by line first: a failure then names the line
    for line, expected in zip(lines, wanted, strict=False):
        assert re.fullmatch(expected, line), expected
    assert re.fullmatch(pattern, card.text())


@pytest.mark.parametrize("kind", CARDS)
def test_snippets_are_python(kind):
    for code in re.findall(r"```python\n(.*?)```", CARDS[kind][0].text(), re.DOTALL):
        compile(code, kind, "exec")


def test_putting_a_card_again_gives_the_same_bytes_and_a_new_card_replaces_the_old(tmp_path):
    for card, _ in CARDS.values():
        put_card(tmp_path, card)
        once = (tmp_path / "README.md").read_bytes()
        put_card(tmp_path, card)
        assert (tmp_path / "README.md").read_bytes() == once
    # the last card's front matter has taken the place of what the others had set
    last = CARDS["bundle"][0].text()
    assert yaml.safe_load(once.decode().split("---\n")[1]) == yaml.safe_load(last.split("---\n")[1])
    assert once.decode().split(" -->\n", 2)[2] == last.split(" -->\n", 2)[2]


OWN = """---
license: mit # said by me
pipeline_tag: fill-mask
tags: [zebra, subspace-of-mine]
model-index: {mine: 1}
---
# My task

Trained on a train.
"""


def test_what_others_wrote_stays(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(OWN)
    put_card(tmp_path, task_card(TASK))
    first = readme.read_text()
    front = yaml.safe_load(first.split("---\n")[1])
    assert (front["license"], front["pipeline_tag"], front["model-index"]) == ("mit", "fill-mask", {"mine": 1})
    assert front["tags"] == ["bert", "subspace", "subspace-factor", "subspace-of-mine", "subspace-task", "zebra"]
    assert (front["base_model"], front["library_name"]) == ("org/base", "peft")
    assert "# My task\n\nTrained on a train.\n" in first
    # their title is the title
    assert len(re.findall("^# ", first, re.MULTILINE)) == 1
    readme.write_text(first.replace("base_model: org/base", "base_model: my/own") + "\nThe end.\n")
    put_card(tmp_path, task_card(dataclasses.replace(TASK, coefficients="diagonal", datasets=())))
    again = readme.read_text()
    front = yaml.safe_load(again.split("---\n")[1])
    assert front["base_model"] == "my/own"
    assert "subspace-diagonal" in front["tags"] and "subspace-factor" not in front["tags"]
    assert "datasets" not in front
    assert "Trained on a train." in again and again.endswith("The end.\n") and again.count("## Loading") == 1


@pytest.mark.parametrize("front", ["a: [", "- a list", "just words"])
def test_front_matter_that_is_no_mapping_is_left_as_it_is(front):
    text = f"---\n{front}\n---\n\nmine\n"
    merged = merge(text, task_card(TASK))
    assert merged.startswith(text) and "## Loading" in merged
    assert merge(merged, task_card(TASK)) == merged


def test_a_base_model_that_is_no_hub_id_leaves_the_front_matter(tmp_path):
    for written in ("''", "/some/folder", str(tmp_path)):
        merged = merge(f"---\nbase_model: {written}\nlibrary_name: transformers\n---\n", task_card(BARE_TASK))
        assert yaml.safe_load(merged.split("---\n")[1]) == {
            "library_name": "peft",
            "tags": ["subspace", "subspace-core", "subspace-task"],
        }
    local = dataclasses.replace(TASK, base=dataclasses.replace(TASK.base, reference=str(tmp_path)))
    text = task_card(local).text()
    assert "base_model:" not in text and "base_model_relation" not in text
    assert f'from_pretrained("{tmp_path}"' in text


def test_metrics_of_an_unknown_dataset_are_in_no_index():
    text = task_card(dataclasses.replace(TASK, datasets=())).text()
    assert "model-index" not in text and "| test | accuracy | 0.85 |" in text


def test_a_readme_without_a_card_can_be_left_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("mine")
    put_card(tmp_path, basis_card(BASIS), only_ours=True)
    assert readme.read_text() == "mine"
    readme.write_text("# Shared basis\n<!-- generated by subspace_peft -->\nof an earlier version")
    put_card(tmp_path, basis_card(BASIS), only_ours=True)
    assert readme.read_text() == basis_card(BASIS).text()


def test_tags_are_added(tmp_path):
    put_card(tmp_path, task_card(BARE_TASK))
    add_tags(tmp_path / "README.md", ["mine"])
    put_card(tmp_path, task_card(BARE_TASK))
    tags = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])["tags"]
    assert tags == ["mine", "subspace", "subspace-core", "subspace-task"]

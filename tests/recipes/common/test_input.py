"""The input of recipes: arguments and data."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import common as shared
import pytest
from datasets import Dataset

from subspace_peft.errors import SubspaceError

# -- arguments --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Arguments(shared.CommonArguments):
    rate: float = shared.argument(1.0, "a rate")
    layers: list[int] = shared.argument((), "layers")  # noqa: RUF009


PRESETS = {"none": {}, "fast": {"rate": 2.0, "layers": [1, 2], "r": {"rte": 3}}, "bad": {"speed": 1}}


def parse(*arguments: str) -> Arguments:
    return shared.parse_arguments(Arguments, PRESETS, list(arguments))


def test_what_is_typed_wins_over_yaml_over_preset_over_default(tmp_path):
    file = tmp_path / "arguments.yaml"
    file.write_text("preset: fast\nrate: 1e-3\nsources: [a, b/c]\ndry_run: true\nk: null\n")
    assert (parse().rate, parse().layers, parse().seeds) == (1.0, [], [1, 2, 3])
    assert parse("--preset", "fast").rate == 2.0 and parse("--preset", "fast", "--rate", "1").rate == 1.0
    made = parse(str(file), "--layers", "7")
    assert (made.rate, made.layers, made.sources, made.dry_run, made.k) == (1e-3, [7], ["a", "b/c"], True, None)
    assert parse(str(file), "--rate", "5").rate == 5.0


def test_a_preset_may_have_a_value_per_task():
    assert parse("--preset", "fast", "--task", "rte").r == 3
    assert parse("--preset", "fast", "--task", "cola").r == 8
    assert parse("--preset", "fast", "--task", "rte", "--r", "5").r == 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("speed: 1", "speed, which is no argument"),
        ("[1]", "mapping"),
        ("rate: {a: 1}", "one value"),
        ("a: [", "read as YAML"),
    ],
)
def test_bad_yaml_is_refused(text, says, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SubspaceError, match=says):
        parse(str(tmp_path / "a.yaml"))


def test_bad_arguments_are_refused(tmp_path, capsys):
    with pytest.raises(SubspaceError, match=r"there is no preset|There is no preset"):
        parse("--preset", "quick")
    with pytest.raises(SubspaceError, match="speed"):
        parse("--preset", "bad")
    with pytest.raises(SubspaceError, match="cannot be read"):
        parse(str(tmp_path / "none.yaml"))
    (tmp_path / "a.yaml").write_text("stage: trian")
    for arguments in (["--rate", "fast"], ["--speed", "1"], [str(tmp_path / "a.yaml")]):
        with pytest.raises(SystemExit):
            parse(*arguments)
    assert "trian" in capsys.readouterr().err


# -- data -------------------------------------------------------------------------------------------------------------


def rows(**columns: list) -> Dataset:
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("data", "classes", "least", "says"),
    [
        (rows(text=["a"], label=[0]), 2, 1, "no column sentence"),
        (rows(sentence=["a"]), 2, 1, "no column label"),
        (rows(sentence=["a", None], label=[0, 1]), 2, 1, "1 of 2 rows have nothing in column sentence"),
        (rows(sentence=["a"], label=[0]), 2, 5, "1 examples, but 5 are needed"),
        (rows(sentence=["a", "b"], label=[0, 2]), 2, 1, "such as 2; they have to be whole numbers from 0 to 1"),
        (rows(sentence=["a"], label=[-1]), 2, 1, "-1 marks hidden"),
        (rows(sentence=["a"], label=[0.5]), 2, 1, "whole numbers"),
        (rows(sentence=["a"], label=[True]), 2, 1, "whole numbers"),
        (rows(sentence=["a"], label=["0"]), None, 1, "finite numbers"),
        (rows(sentence=["a"], label=[math.nan]), None, 1, "finite numbers"),
    ],
)
def test_bad_rows_are_refused(data, classes, least, says):
    with pytest.raises(SubspaceError, match=says):
        shared.check_rows("t, train", data, ["sentence"], classes, least=least)


def test_good_rows_pass():
    shared.check_rows("t", rows(sentence=["a", "b"], label=[0, 1]), ["sentence"], 2, least=2)
    shared.check_rows("t", rows(sentence=["a", "b"], label=[0.5, 5.0]), ["sentence"], None)


def test_drawing_is_by_seed():
    data = rows(label=list(range(50)))
    assert shared.draw(data, 5, 1)["label"] == shared.draw(data, 5, 1)["label"] != shared.draw(data, 5, 2)["label"]
    assert shared.draw(data, 0, 1) is data and shared.draw(data, 50, 1) is data


@pytest.mark.parametrize(
    ("task", "source", "refused"),
    [
        ("mrpc", "mrpc", True),
        ("mrpc", "rte", False),
        ("stsb", "org/sts-b_lora_r_8", True),
        ("sst2", "org/roberta-base-SST-2@v1", True),
        ("rte", "org/roberta-base-qnli", False),
        ("rte", "loras/rte", True),
        ("rte", "loras/rte/adapter", False),
        ("news", "news-comp", False),
        ("news-sci", "org/news_sci", True),
    ],
)
def test_the_tasks_own_adapter_is_refused(task, source, refused):
    known = ["mrpc", "rte", "news", "news-comp"]
    if refused:
        with pytest.raises(SubspaceError, match="must not hold that task's own adapter"):
            shared.refuse_own_adapter(task, ["qnli", source], known)
    else:
        shared.refuse_own_adapter(task, ["qnli", source], known)


def local_folder(
    root: Path, facts: str = '{"keys": ["sentence"], "labels": ["a", "b"], "metric": "accuracy"}'
) -> Path:
    folder = root / "data" / "t"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(facts)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(
            '{"sentence": "x\\u2028y", "label": 0}\n\n{"sentence": "z", "label": 1}\n'
        )
    return folder


def test_local_tasks_are_read(tmp_path):
    local_folder(tmp_path)
    assert shared.local_tasks(tmp_path)["t"]["classes"] == 2 and shared.local_tasks(tmp_path)["t"]["train"] == 2
    task = shared.LabelledTask.local(tmp_path, "t")
    assert task.metric == "sst2" and len(task.splits["test"]) == 2 and len(task.fingerprint()) == 64


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("train.jsonl", "", "no examples"),
        ("test.jsonl", '{"a": 1}\n{"a": ', "line 2: no JSON object"),
        ("test.jsonl", "[1]\n", "line 1: no JSON object"),
        ("train.jsonl", '{"label": 0}\n{"label": "x"}\n', "several kinds"),
        ("validation.jsonl", None, "cannot be read"),
        ("task.json", "{", "cannot be read"),
        ("task.json", "{}", "lacks keys, labels, metric"),
        ("task.json", None, "no data/<task>/task.json"),
    ],
)
def test_bad_local_tasks_are_refused(file, text, says, tmp_path):
    folder = local_folder(tmp_path)
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(SubspaceError, match=says):
        shared.LabelledTask.local(tmp_path, "t")

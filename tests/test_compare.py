"""Comparisons: sweeps that widen, cells that resume, tables that say what happened; and the recipes' small furniture."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, BertConfig, RobertaConfig

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft import compare as shared
from subspace_peft.compare import Cells, Method, compare
from subspace_peft.errors import SubspaceError

from .conftest import bert


def result(score: float, **more: Any) -> dict[str, Any]:
    sizes = {"trained_adapter": 1536, "trained_head": 770, "bytes": 7216}
    return {
        "validation": score,
        "test": score / 2,
        **sizes,
        "seconds": 2.0,
        "curve": [[8, score / 4], [16, score]],
        **more,
    }


class Runs:
    """A `run` that is a function of the rate, and the calls it got."""

    def __init__(self, score) -> None:
        self.score, self.calls = score, []

    def __call__(self, method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        self.calls.append((method.name, rate, seed))
        return result(self.score(rate) + 0.01 * seed * (rate is not None))


def head_only(*rates: float) -> Method:
    return Method("head only", None, rates)


def run_one(method: Method, runs: Runs, folder: Path, **more: Any) -> dict[str, Any]:
    return compare([method], runs, cells=Cells(folder, {"task": "t"}), progress=False, **more)[0]


# -- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimum", "tried", "at_edge"),
    [
        (1e-2, [1e-3, 1e-2, 1e-1], False),
        (1e0, [1e-3, 1e-2, 1e-1, 1e0, 1e1], False),
        (1e3, [1e-3, 1e-2, 1e-1, 1e0, 1e1], True),
        (1e-4, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1], False),
        (1e-9, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1], True),
    ],
)
def test_a_best_rate_at_the_edge_widens_the_sweep_by_its_ratio_at_most_twice(optimum, tried, at_edge, tmp_path):
    runs = Runs(lambda rate: 10 - abs(math.log10(rate / optimum)))
    row = run_one(head_only(1e-3, 1e-2, 1e-1), runs, tmp_path)
    assert [entry["rate"] for entry in row["sweep"]] == pytest.approx(tried)
    assert row["rate"] == pytest.approx(min(tried, key=lambda rate: abs(math.log10(rate / optimum))))
    assert row["at_edge"] is at_edge
    assert row["seeds"] == [1, 2, 3]
    assert [call for call in runs.calls if call[2] != 0] == [("head only", row["rate"], seed) for seed in (1, 2, 3)]


def test_equal_scores_go_to_the_smaller_rate(tmp_path):
    runs = Runs(lambda rate: 0.8 if rate in (1e-2, 1e-1) else 0.5)
    assert run_one(head_only(1e-3, 1e-2, 1e-1), runs, tmp_path)["rate"] == 1e-2


def test_one_rate_is_no_sweep_to_widen(tmp_path):
    row = run_one(head_only(1e-2), Runs(lambda rate: 0.5), tmp_path)
    assert row["at_edge"] and len(row["sweep"]) == 1


def test_the_test_score_chooses_nothing(tmp_path):
    def run(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        return result(1.0 if rate == 1e-2 else 0.5, test=0.1 if rate == 1e-2 else 0.9)

    row = compare([head_only(1e-3, 1e-2, 1e-1)], run, cells=Cells(tmp_path, {}), progress=False)[0]
    assert row["rate"] == 1e-2 and row["test"] == pytest.approx(0.1)


def test_a_sweeps_run_without_a_test_is_run_again_only_where_its_seed_is_reported(tmp_path):
    calls: list[int] = []

    def run(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        calls.append(seed)
        reported = seed in seeds
        return {**result(0.5, test=0.4 if reported else None), "metrics": {"a": 1.0} if reported else None}

    seeds = (1,)
    assert run_one(head_only(1e-2), run, tmp_path, seeds=seeds)["tests"] == [0.4] and calls == [0, 1]
    seeds = (0, 1)
    assert run_one(head_only(1e-2), run, tmp_path, seeds=seeds)["tests"] == [0.4, 0.4] and calls == [0, 1, 0]
    assert run_one(head_only(1e-2), run, tmp_path, seeds=seeds)["tests"] == [0.4, 0.4] and calls == [0, 1, 0]


def test_diverged_runs_lose_are_kept_and_are_reported(tmp_path):
    runs = Runs(lambda rate: math.nan if rate > 5e-3 else math.inf if rate > 2e-3 else 0.6)
    row = run_one(head_only(5e-4, 1e-3, 1e-2), runs, tmp_path)
    assert row["rate"] == 1.25e-4 and row["at_edge"]  # equals go to the smaller, which is at the edge twice
    assert row["sweep"][-1] == {"rate": 1e-2, "validation": None, "seconds": 2.0}
    assert row["diverged"] == 0

    def run(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        return result(0.5, test=math.nan if seed == 2 else 0.4)

    row = compare([head_only(1e-2)], run, cells=Cells(tmp_path, {"task": "other"}), progress=False)[0]
    assert row["diverged"] == 1 and row["tests"] == [0.4, None, 0.4]
    assert row["test"] is None and row["test_sd"] is None
    assert "diverged in 1 of 3 (others: 0.400, 0.400)" in shared.markdown_table([row])
    json.dumps(row, allow_nan=False)


def test_all_runs_diverged_is_a_result_too(tmp_path):
    row = run_one(head_only(1e-3, 1e-2), Runs(lambda rate: math.nan), tmp_path)
    assert row["diverged"] == 3 and row["rate"] == pytest.approx(1e-5) and row["at_edge"]


def test_a_method_without_rates_is_run_once(tmp_path):
    runs = Runs(lambda rate: 0.4)
    row = run_one(Method("base model", None, ()), runs, tmp_path)
    assert runs.calls == [("base model", None, 1)]
    assert row["rate"] is None and row["test"] == pytest.approx(0.2) and row["test_sd"] is None and not row["at_edge"]


def test_mean_and_spread(tmp_path):
    row = run_one(head_only(1e-2), Runs(lambda rate: 0.5), tmp_path, seeds=(1, 2, 3))
    assert row["tests"] == pytest.approx([0.255, 0.26, 0.265])
    assert row["test"] == pytest.approx(0.26) and row["test_sd"] == pytest.approx(0.005)
    assert row["seconds"] == 2.0 and len(row["curves"]) == 3


@pytest.mark.parametrize(
    ("methods", "more", "says"),
    [
        ([head_only(1e-2), head_only(1e-3)], {}, "one name"),
        ([head_only(1e-2)], {"seeds": ()}, "at least one"),
        ([head_only(1e-2)], {"seeds": (1, 1)}, "each once"),
    ],
)
def test_bad_comparisons_are_refused(methods, more, says, tmp_path):
    runs = Runs(lambda rate: 0.5)
    with pytest.raises(SubspaceError, match=says):
        compare(methods, runs, cells=Cells(tmp_path, {}), progress=False, **more)
    assert runs.calls == []


@pytest.mark.parametrize("rates", [(1e-2, 1e-3), (1e-3, 1e-3), (0.0, 1.0), (math.nan,), (1.0, math.inf)])
def test_rates_are_ascending_and_sensible(rates):
    with pytest.raises(SubspaceError, match="ascending"):
        head_only(*rates)


def test_an_adapter_needs_rates():
    with pytest.raises(SubspaceError, match="at least one"):
        Method("LoRA", lambda: None, ())


def test_a_run_that_lacks_a_key_is_refused(tmp_path):
    with pytest.raises(SubspaceError, match="returned no test, curve"):
        compare([head_only(1e-2)], lambda *_: {k: v for k, v in result(0.5).items() if k not in ("test", "curve")},
                cells=Cells(tmp_path, {}), progress=False)  # fmt: skip


# -- cells ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_comparison_resumes(tmp_path):
    runs = Runs(lambda rate: 0.5 - abs(rate - 1e-2))

    def interrupted(method: Method, rate: float | None, seed: int) -> dict[str, Any]:
        if seed == 2:
            raise KeyboardInterrupt
        return runs(method, rate, seed)

    with pytest.raises(KeyboardInterrupt):
        run_one(head_only(1e-3, 1e-2, 1e-1), interrupted, tmp_path)
    before = list(runs.calls)
    row = run_one(head_only(1e-3, 1e-2, 1e-1), runs, tmp_path)
    assert runs.calls[len(before) :] == [("head only", 1e-2, 2), ("head only", 1e-2, 3)]
    again = Runs(lambda rate: 0.0)
    assert run_one(head_only(1e-3, 1e-2, 1e-1), again, tmp_path) == row and again.calls == []


DAMAGES = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no object": lambda text: "[1, 2]",
    "an edited score": lambda text: text.replace('"validation": 0.5', '"validation": 0.9'),
    "of another run": lambda text: text.replace('"seed": 0', '"seed": 5'),
    "not UTF-8": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cell_is_run_again(damage, tmp_path, caplog):
    runs = Runs(lambda rate: 0.5)
    row = run_one(head_only(1e-2), runs, tmp_path)
    file = Cells(tmp_path, {"task": "t"}).file(head_only(1e-2), 1e-2, 0)
    change = DAMAGES[damage]
    file.write_bytes(b"\xff\xfe{" if change is None else change(file.read_text()).encode())
    runs.calls.clear()
    assert run_one(head_only(1e-2), runs, tmp_path) == row
    assert runs.calls == [("head only", 1e-2, 0)]
    assert file.name in caplog.text and "damaged" in caplog.text


def test_another_setting_seed_rate_or_basis_is_another_cell(bases, tmp_path):
    random = build_basis(like=bases[bert], builder="random", progress=False)

    def rows(basis: SubspaceBasis, **more: Any) -> Method:
        given = {
            "task_type": "SEQ_CLS",
            "target_modules": ["query", "value"],
            "basis": basis,
            "random": random,
            **more,
        }
        return shared.method_named(shared.methods(**given), "this basis")

    cells, method = Cells(tmp_path, {"task": "t"}), rows(bases[bert])
    files = [
        cells.file(method, 1e-2, 0),
        cells.file(method, 2e-2, 0),
        cells.file(method, 1e-2, 1),
        Cells(tmp_path, {"task": "u"}).file(method, 1e-2, 0),
        cells.file(rows(random), 1e-2, 0),
        cells.file(rows(bases[bert], k=3), 1e-2, 0),
        cells.file(rows(bases[bert], coefficients="factor"), 1e-2, 0),
        cells.file(rows(bases[bert], layers=[1]), 1e-2, 0),
    ]
    assert len(set(files)) == len(files)
    moved = bases[bert].save_pretrained(tmp_path / "elsewhere")
    assert cells.file(rows(SubspaceBasis.from_pretrained(moved)), 1e-2, 0) == files[0]
    assert cells.file(dataclasses.replace(method, rates=(1.0, 2.0)), 1e-2, 0) == files[0]


# -- methods ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def random_basis(bases, tmp_path) -> SubspaceBasis:
    basis = build_basis(like=bases[bert], builder="random", directions=3, progress=False)
    basis.save_pretrained(tmp_path / "random")
    return basis


def given(bases, random: SubspaceBasis | None, **more: Any) -> dict[str, Any]:
    modules = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    return {**modules, "basis": bases[bert], "random": random, **more}


@pytest.mark.parametrize("coefficients", ["core", "factor", "diagonal", "directions"])
def test_rows_train_what_was_planned(coefficients, bases, random_basis):
    more = {"coefficients": coefficients, "r": 2, "layers": [1]}
    rows = shared.methods(**given(bases, random_basis, **more))
    assert [row.name for row in rows] == ["head only", "mean only", "LoRA r=2", "VeRA", "random basis", "this basis"]
    with torch.device("meta"):
        empty = bert()
    plan = shared.planned_numbers(empty, target_modules=["query", "value"], k=6, directions=3, **more)
    assert plan["modules"] == 2 and plan["parameters"] == sum(p.numel() for p in bert().parameters())
    for row in rows:
        sizes = shared.measure(row.apply(bert(), "classifier"))
        assert sizes["trained_adapter"] == plan["rows"][row.name], row.name
        assert sizes["trained_head"] == plan["head"] == 2 * 32 + 2
        assert (sizes["bytes"] == 0) == (row.name == "head only")
        assert sizes["bytes"] < 4 * sizes["trained_adapter"] + 2500  # the file's header, and no basis in it


def test_a_basis_in_memory_travels_with_its_tasks(bases):
    random = build_basis(like=bases[bert], builder="random", progress=False)
    row = shared.method_named(shared.methods(**given(bases, random)), "random basis")
    assert row.adapter().save_basis is True
    assert shared.measure(row.apply(bert(), "classifier"))["bytes"] > 4 * 4 * 2 * 6 * 32


def test_without_a_head_the_first_row_is_the_base_model(bases, random_basis):
    for more in ({"head": False, "task_type": None}, {"task_type": "CAUSAL_LM"}):
        row = shared.methods(**given(bases, random_basis, **more))[0]
        assert row.name == "base model" and row.rates == ()
    model = row.apply(bert(), None)
    assert shared.measure(model) == {"trained_adapter": 0, "trained_head": 0, "bytes": 0}


def test_rows_that_cannot_be_are_left_out(bases, random_basis):
    names = [row.name for row in shared.methods(**given(bases, None, coefficients="none"))]
    assert names == ["head only", "mean only", "LoRA r=8", "VeRA"]
    assert "random basis" not in [row.name for row in shared.methods(**given(bases, None))]
    only_random = given({bert: random_basis}, random_basis)
    assert "mean only" not in [row.name for row in shared.methods(**only_random)]
    with pytest.raises(SubspaceError, match="there are head only, mean only"):
        shared.method_named(shared.methods(**given(bases, None)), "LoRA")


@pytest.mark.parametrize(("sweep", "rates"), [(0, (3e-4, 1e-3, 4e-3, 1.2e-2)), (1, (1e-3,)), (2, (1e-3, 4e-3))])
def test_a_shorter_sweep_keeps_the_middle(sweep, rates, bases, random_basis):
    assert shared.methods(**given(bases, random_basis, sweep=sweep))[-1].rates == rates


def test_planned_modules_have_to_exist():
    with pytest.raises(SubspaceError, match="match no linear layer"):
        shared.planned_numbers(bert(), target_modules=["q_proj"], k=4)


# -- tables and curves ------------------------------------------------------------------------------------------------


def test_table_json_and_curves(tmp_path):
    runs = Runs(lambda rate: 0.4 if rate is None else 1.0 - abs(rate - 1e-2))
    rows = [Method("base model", None, ()), head_only(1e-2, 1e-1)]
    results = compare(rows, runs, seeds=(1, 2), cells=Cells(tmp_path / "cells", {}), progress=False)
    text = shared.write_results(results, tmp_path / "out", title="A title", settings={"epochs": 4})
    assert (tmp_path / "out" / "table.md").read_text() == text
    lines = text.splitlines()
    assert lines[0] == "A title"
    assert lines[4] == "| base model | 0.200 | 1 | 1,536 | 770 | 7,216 | 2.0 | – |"
    assert lines[5] == "| head only | 0.508 ± 0.004 | 2 | 1,536 | 770 | 7,216 | 2.0 | 0.01 |"
    body = json.loads((tmp_path / "out" / "results.json").read_text())
    assert body == {"title": "A title", "settings": {"epochs": 4}, "results": results}
    edge = shared.markdown_table([{**results[1], "at_edge": True}])
    assert "| 0.01 * |" in edge and "a further one may be better" in edge
    diverged = {**results[1], "method": "x", "curves": [[[8, None], [16, None]]]}
    file = shared.draw_curves([*results, diverged], tmp_path / "out" / "curves.png", title="A title")
    assert file.read_bytes().startswith(b"\x89PNG") and not list((tmp_path / "out").glob(".*"))


# -- knobs ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Knobs(shared.SubspaceKnobs):
    rate: float = shared.knob(1.0, "a rate")
    layers: list[int] = shared.knob((), "layers")  # noqa: RUF009


PRESETS = {"none": {}, "fast": {"rate": 2.0, "layers": [1, 2], "r": {"rte": 3}}, "bad": {"speed": 1}}


def parse(*arguments: str) -> Knobs:
    return shared.parse_knobs(Knobs, PRESETS, list(arguments))


def test_what_is_typed_wins_over_yaml_over_preset_over_default(tmp_path):
    file = tmp_path / "knobs.yaml"
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
        ("speed: 1", "speed, which is no knob"),
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


# -- stages and models ------------------------------------------------------------------------------------------------


def test_markers_hold_for_the_same_settings_only(tmp_path):
    shared.finish(tmp_path, {"rate": 1e-3, "layers": (1, 2)}, {"validation": 0.5})
    assert shared.finished(tmp_path, {"layers": [1, 2], "rate": 1e-3}) == {"validation": 0.5}
    assert shared.finished(tmp_path, {"rate": 2e-3, "layers": [1, 2]}) is None
    (tmp_path / "recipe.json").write_text("{")
    assert shared.finished(tmp_path, {"rate": 1e-3, "layers": [1, 2]}) is None


def test_the_last_complete_checkpoint_is_taken(tmp_path):
    assert shared.last_checkpoint(tmp_path / "none") is None
    for step, complete in ((8, True), (16, True), (104, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert shared.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")


def test_a_diverged_adapter_is_not_saved(tmp_path):
    with pytest.raises(SubspaceError, match="diverged"):
        shared.save_finished(None, tmp_path / "a", {}, {"validation": math.nan})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig])
@pytest.mark.parametrize("classes", [3, 1])
def test_mean_pooling_leaves_padding_out(config, classes):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 100,
    }
    encoder = AutoModel.from_config(config(**shape, num_labels=classes, max_position_embeddings=40))
    model = shared.MeanPooledClassifier(encoder).eval()
    ids = torch.randint(5, 100, (2, 7))
    padded = torch.cat([ids, torch.full((2, 3), encoder.config.pad_token_id)], dim=1)
    mask = (torch.arange(10) < 7).long().expand(2, 10)
    labels = torch.tensor([0.5, 2.0]) if classes == 1 else torch.tensor([0, 2])
    out = model(input_ids=padded, attention_mask=mask, labels=labels, output_attentions=None, return_dict=True)
    torch.testing.assert_close(out.logits, model(input_ids=ids).logits)
    assert out.logits.shape == (2, classes) and out.loss.ndim == 0
    assert any(name.startswith(f"{encoder.base_model_prefix}.encoder.layer.0.") for name, _ in model.named_modules())

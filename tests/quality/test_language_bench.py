"""The language benchmark's rows, cells and prompts."""

from __future__ import annotations

import json

import pytest
import torch
from offline.texts import Row, TextTask

from benchmarks.quality.bench import OutOfTime
from benchmarks.quality.language import bench as bench_module
from benchmarks.quality.language.bench import LanguageBench
from benchmarks.quality.language.fleet import Fleet
from benchmarks.quality.language.model import top_of
from benchmarks.quality.language.prompts import INSTRUCTIONS, ORDER, WORDS, completions, in_halves, require_apart
from benchmarks.quality.language.rows import MORE, TABLE, row
from benchmarks.quality.training import Budget
from subspace_peft.errors import SubspaceError

from .language_toys import NAMES, TOP, Characters, tiny_model, toy

SMALL = Budget(examples=16, steps=2, batch=8, checks=())


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Return a function that makes a bench on toys, and the list of the cells that it trained."""
    model, trained = tiny_model(), []
    monkeypatch.setattr(bench_module, "load", lambda name, folder: toy(name, () if name == "three" else ("yes", "no")))
    monkeypatch.setattr(bench_module, "whole_model", lambda folder: (model, Characters()))
    monkeypatch.setattr(bench_module, "top_of", lambda whole: top_of(whole, TOP))
    monkeypatch.setattr(bench_module, "bottom_of", lambda whole: bench_module_bottom(whole))
    monkeypatch.setattr(bench_module, "facts", lambda name: {"instruction": name})
    monkeypatch.setattr("benchmarks.quality.language.rows.K", 4)
    monkeypatch.setattr("benchmarks.quality.language.rows.WIDE", 6)
    once = bench_module.train

    def counted(*arguments):
        trained.append(arguments[3:])
        return once(*arguments)

    monkeypatch.setattr(bench_module, "train", counted)

    def make(folder="cache", **given):
        given = {"names": NAMES, "tuned": NAMES[:2], "seeds": (1, 2), "budget": SMALL, "source_budget": SMALL, **given}
        return LanguageBench(tmp_path / folder, tmp_path / "results", **given)

    return make, trained


def bench_module_bottom(whole):
    from benchmarks.quality.language.model import bottom_of

    return bottom_of(whole, TOP)


def cells_of(tmp_path, name, targets="qv"):
    return json.loads((tmp_path / "results" / targets / f"{name}.json").read_text())["cells"]


def test_a_table_is_filled_seed_by_seed_and_never_twice_even_without_the_cache(made, tmp_path):
    make, trained = made
    make().perform(TABLE)
    count = len(trained)
    cells = cells_of(tmp_path, "seventh")
    assert {(cell["row"], cell["seed"]) for cell in cells} == {
        *((name, seed) for name in TABLE[1:] for seed in (1, 2)),
        ("zero-shot", 1),
    }
    # no rate was tried on a task that is not one of those for it
    assert {cell["seed"] for cell in cells_of(tmp_path, "one")} == {0, 1, 2}
    before = (tmp_path / "results" / "qv" / "one.json").read_bytes()
    make("another machine").perform(TABLE)
    assert len(trained) == count and not (tmp_path / "another machine").exists()
    assert (tmp_path / "results" / "qv" / "one.json").read_bytes() == before


def test_a_cell_that_the_cache_has_returns_to_the_results(made, tmp_path):
    make, trained = made
    make().perform(("zero-shot", "LoRA r=1"), ["one"])
    count, file = len(trained), tmp_path / "results" / "qv" / "one.json"
    before = file.read_bytes()
    file.unlink()
    make().perform(("zero-shot", "LoRA r=1"), ["one"])
    assert len(trained) == count and file.read_bytes() == before


def test_another_budget_is_another_cell(made):
    make, trained = made
    make().perform(("LoRA r=1",), ["seventh"])
    count = len(trained)
    make(budget=Budget(examples=16, steps=3, batch=8, checks=())).perform(("LoRA r=1",), ["seventh"])
    assert len(trained) == 2 * count


def test_every_row_trains_on_all_linear_layers(made, tmp_path):
    make, _ = made
    make(targets="linear", seeds=(1,), tuned=NAMES[:1]).perform((*TABLE, *MORE), ["seventh"])
    cells = {cell["row"]: cell["result"] for cell in cells_of(tmp_path, "seventh", "linear")}
    assert set(cells) == {*TABLE, *MORE}
    modules = 7 * TOP
    assert cells["fleet"]["trained_adapter"] == cells["random"]["trained_adapter"] == 16 * modules
    assert cells["fleet k=32"]["trained_adapter"] == 36 * modules
    assert cells["zero-shot"]["trained_adapter"] == 0
    assert all(cell["metrics"]["nll"] == pytest.approx(-cell["test"], abs=1e-4) for cell in cells.values())


def test_phrases_have_rouge_and_label_words_a_choice(made, tmp_path):
    make, _ = made
    make(seeds=(1,)).perform(("zero-shot",))
    assert set(cells_of(tmp_path, "one")[0]["result"]["metrics"]) == {"nll", "exact_match", "choice", "choice_nll"}
    assert set(cells_of(tmp_path, "three")[0]["result"]["metrics"]) == {"nll", "exact_match", "rougeL"}


def test_a_rate_is_the_best_of_the_other_tuned_tasks(made, monkeypatch):
    make, _ = made
    bench = make()
    sweeps = {"one": {1e-3: -1.0, 4e-3: -2.0}, "three": {1e-3: -2.0, 4e-3: -1.0}}
    told = lambda task, methods, seed, widenings: [  # noqa: E731
        {"sweep": [{"rate": rate, "validation": value} for rate, value in sweeps[task].items()]}
    ]
    monkeypatch.setattr(bench, "_compare", told)
    assert bench.usual_rate("LoRA r=8", "one") == (4e-3,)
    assert bench.usual_rate("LoRA r=8", "three") == bench.usual_rate("LoRA r=4", "three") == (1e-3,)
    assert bench.usual_rate("zero-shot", "one") == ()


def test_no_run_begins_when_the_time_is_over(made):
    make, trained = made
    with pytest.raises(OutOfTime):
        make(until=0.0).perform(TABLE)
    assert not trained


def test_cells_of_other_examples_are_refused(made, tmp_path):
    make, _ = made
    make().perform(("zero-shot",), ["one"])
    file = tmp_path / "results" / "qv" / "one.json"
    file.write_text(file.read_text().replace(toy("one").digest, "0" * 64))
    with pytest.raises(SubspaceError, match=r"one\.json has cells of other examples"):
        make().perform(("LoRA r=1",), ["one"])


def test_a_basis_never_holds_the_held_out_tasks_own_adapter(made, monkeypatch):
    make, _ = made
    bench = make()
    built = bench.fleet.basis("one", 4)
    assert {source["location"].rsplit("/", 1)[-1] for source in built.info["sources"]} == {"three", "seventh"}
    monkeypatch.setattr("benchmarks.quality.language.fleet.others", lambda held_out, names: list(names))
    with pytest.raises(SubspaceError, match="held-out task's own adapter"):
        make().fleet.basis("one", 4)


def test_every_source_has_a_start_of_its_own(made, tmp_path):
    from safetensors.torch import load_file

    make, _ = made
    fleet = make(source_budget=Budget(examples=16, steps=1, batch=8, checks=())).fleet
    firsts = [load_file(fleet.source(name) / "adapter_model.safetensors") for name in NAMES[:2]]
    key = next(key for key in firsts[0] if "lora_A" in key)
    a, b = (each[key].flatten() for each in firsts)
    assert abs(float(torch.nn.functional.cosine_similarity(a, b, dim=0))) < 0.5


def test_draws_of_a_random_basis_differ_by_seed(made):
    make, _ = made
    fleet: Fleet = make().fleet
    rows = [row("random", fleet, "one", seed) for seed in (1, 2)]
    assert rows[0].described() != rows[1].described()
    assert rows[0].identity() != rows[1].identity()


def test_a_row_that_is_not_there_is_named(made):
    with pytest.raises(KeyError, match="fleet k=99"):
        row("fleet k=99", made[0]().fleet, "one", 1)


def test_tasks_are_named_alike_everywhere():
    assert set(ORDER) == set(INSTRUCTIONS) and set(WORDS) < set(ORDER)


def test_a_text_in_two_tasks_is_refused():
    require_apart({"a": ["Some text.", "some text"], "b": ["another text"]})
    with pytest.raises(SubspaceError, match="both have the text"):
        require_apart({"a": ["Some text."], "b": ["some TEXT"]})


def test_halves_share_no_document():
    rows = [Row(f"text {i}", "1", f"document {i // 3}") for i in range(30)]
    first, second = in_halves(TextTask("task", "about", rows))
    documents = [{row.document for row in half.rows} for half in (first, second)]
    assert not documents[0] & documents[1] and len(documents[0]) == len(documents[1]) == 5
    assert len(first.rows) + len(second.rows) == 30


def test_a_sentence_is_completed_by_its_last_words():
    words = [f"w{i}" for i in range(20)]
    found = list(completions([Row(" ".join(words), "", "d"), Row("too short a sentence", "", "d")]))
    assert [(row.text.split(), row.label.split()) for row in found] == [(words[:15], words[15:])]

"""The language benchmark's tables: what is finished, what counts, shares of parameters."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig, get_peft_model

from benchmarks.quality.language.model import top_of
from benchmarks.quality.language.rows import TABLE
from benchmarks.quality.language.setting import QV
from benchmarks.quality.language.shares import parameters, shares_table
from benchmarks.quality.language.tables import WORST, finished, likelihood, main, read, render

from .language_toys import tiny_model

NLL = {"zero-shot": 2.0, "LoRA r=8": 1.0, "fleet": 1.1, "random": 1.5, "LoRA r=1": 1.2, "fleet + 1 own": 1.05}


def write(folder, tasks=("reviews", "classes"), seeds=(1, 2), without=(), further=()):
    for task in tasks:
        cells = []
        for row in (*TABLE, *further):
            for seed in (1,) if row == "zero-shot" else (0, *seeds):
                if (row, task, seed) in without:
                    continue
                nll = NLL.get(row, 1.3) + 0.01 * seed * (row != "zero-shot")
                second = {"rougeL": 0.2} if task == "classes" else {"choice": 0.75, "choice_nll": 0.625}
                metrics = {"nll": nll, "exact_match": 0.5, **second}
                trained = 0 if row == "zero-shot" else 100
                result = {"test": -nll, "metrics": metrics, "trained_adapter": trained, "data": "d"}
                cells.append({"row": row, "rate": 1e-3, "seed": seed, "key": "k", "result": result})
        (folder / "qv").mkdir(parents=True, exist_ok=True)
        (folder / "qv" / f"{task}.json").write_text(json.dumps({"task": task, "cells": cells}))
    return read(folder / "qv")


def test_only_whole_seeds_of_whole_tasks_are_told(tmp_path):
    assert finished(write(tmp_path / "a")) == (["reviews", "classes"], [1, 2], list(TABLE))
    found = finished(write(tmp_path / "b", without=[("fleet", "classes", 2)]))
    assert found == (["reviews", "classes"], [1], list(TABLE))
    assert finished(write(tmp_path / "c", without=[("fleet", "classes", 1)]))[:2] == (["reviews"], [1, 2])
    cells = write(tmp_path / "d", further=["mean only", "LoRA r=2"], without=[("LoRA r=2", "reviews", 2)])
    assert finished(cells)[2] == [*TABLE, "mean only"]
    assert finished({}) == ([], [], [])


def test_a_section_has_the_numbers_and_what_is_missing(tmp_path):
    text = "\n".join(render(write(tmp_path), "Title"))
    assert "2 held-out tasks, seeds 1, 2." in text and "Not finished: mean only" in text
    assert "| **mean** | **2.000** | **1.015** | **1.115** |" in text
    # of LoRA r=8's gain of 0.985 nats the fleet's row has 0.885
    assert [line for line in text.splitlines() if line.startswith("| fleet |") and "| 90 % |" in line]
    assert (
        "| classes | – " not in text
        and "| reviews | 75.0 |" in text
        and "| reviews | 0.625 |" in text
        and "| classes | 20.0 |" in text
    )


def test_a_run_that_diverged_counts_as_a_guess(tmp_path):
    cells = write(tmp_path)
    cells["fleet"]["reviews"][1]["test"] = None
    assert likelihood(cells, "fleet", "reviews", [1, 2]) == [WORST, pytest.approx(1.12)]


def test_the_page_and_the_figure_are_written(tmp_path, capsys):
    write(tmp_path)
    main(["--results", str(tmp_path)])
    assert (tmp_path / "tables.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "likelihoods.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["--results", str(tmp_path / "nowhere")])


def test_parameters_by_arithmetic_are_those_that_peft_counts():
    model = top_of(tiny_model(), 1)
    attention = model.model.layers[0].self_attn
    shapes = tuple(tuple(getattr(attention, name).weight.shape) for name in QV)
    wrapped = get_peft_model(model, LoraConfig(r=8, target_modules=list(QV)))
    counted = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert parameters("LoRA r=8", shapes) == counted
    assert parameters("fleet + 2 own", shapes) == 512 + 2 * counted // 8
    with pytest.raises(ValueError, match="no row"):
        parameters("nothing", shapes)


def test_wider_models_make_a_core_a_smaller_share():
    row = next(line for line in shares_table() if line.startswith("| fleet |"))
    assert row == "| fleet | 4.2 % | 3.3 % | 0.48 % |"

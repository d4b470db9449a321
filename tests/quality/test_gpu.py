"""benchmarks/quality/gpu.py: every stage that needs no Hub, walked at toy size."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.quality import gpu
from benchmarks.quality.gpu_stand_ins import make_stand_ins, toy_plan


@pytest.fixture
def plan(tmp_path):
    return toy_plan(tmp_path)


def test_the_list_names_every_stage_and_does_nothing(capsys, tmp_path):
    gpu.main(["--list", "--glue", "cola", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "gpu.json")])
    lines = capsys.readouterr().out.splitlines()[2:]
    names = [line.split(" | ")[0].strip("| ") for line in lines]
    assert names[:5] == ["steps-encoder", "steps-decoder", "mixed-batches", "builds", "glue-cola"]
    assert names[-1] == "instructions-task1541"
    assert [" | no | " in line for line in lines] == [True] * 4 + [False] * (len(lines) - 4)
    assert not list(tmp_path.iterdir())


def test_an_unknown_stage_is_named_beside_those_there_are(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--stage", "steps"])
    assert "there is no stage 'steps'; there are steps-encoder," in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_told_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--stage", "builds", "--out", str(tmp_path / "gpu.json")])
    assert "there is no GPU that torch can use: try --dry-run" in capsys.readouterr().err


def test_a_dry_run_keeps_nothing(capsys, tmp_path):
    gpu.main(["--dry-run", "--stage", "builds", "--out", str(tmp_path / "gpu.json")])
    assert "measurements walked" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_steps_are_timed_beside_the_frozen_base_in_both_precisions(kind, plan):
    (stage,) = (each for each in gpu.stages(plan) if each.name == f"steps-{kind}")
    assert len(stage.cells) == 4
    for name in ("query, value, bfloat16", "all linear, float32"):
        found = stage.cells[name]()
        assert set(found) == {
            "frozen base",
            *(f"LoRA r={r}" for r in (1, 2, 4, 8)),
            *("core", "core + 1 own", "core + 2 own", "core + 4 own"),
        }
        assert all(row["wall_low"] <= row["wall_ratio"] <= row["wall_high"] for row in found.values())
        assert found["core"]["trained"] < found["core + 1 own"]["trained"] < found["core + 4 own"]["trained"]
        assert found["LoRA r=8"]["trained"] == 8 * found["LoRA r=1"]["trained"]


def test_mixed_batches_are_timed_in_both_precisions(plan):
    (stage,) = (each for each in gpu.stages(plan) if each.name == "mixed-batches")
    for name in ("query, value, 3 tasks, bfloat16", "all linear, 3 tasks, float32"):
        found = stage.cells[name]()
        assert set(found) == {"4 rows × 1", "4 rows × 5"}
        for row in found.values():
            assert set(row) == {"frozen base", "one LoRA", "LoRA adapter_names", "core bank", "core bank, 1 own"}
            assert 0 < row["core bank"]["task_bytes"] < row["core bank, 1 own"]["task_bytes"]


def test_builds_leave_no_fleet_behind(plan):
    (stage,) = (each for each in gpu.stages(plan) if each.name == "builds")
    for cell in stage.cells.values():
        found = cell()
        assert 0 < found["energy_kept"] <= 1 and found["wall_seconds"] > 0
        assert {name.rsplit(".", 1)[-1] for name in found["certificates"]} == {"q_proj", "v_proj"}
    assert not list(plan.folder.iterdir())


def test_what_is_kept_is_not_measured_again_and_other_settings_are_other_measurements(tmp_path, plan):
    taken: list[str] = []

    def cell(name):
        return lambda: taken.append(name) or {"name": name}

    stage = gpu.Stage("one", "", 1, {"a": cell("a"), "b": cell("b")}, {"rounds": 2})
    file = tmp_path / "gpu.json"
    gpu.run([replace(stage, cells={"a": cell("a")})], plan, gpu.Results(file))
    gpu.run([stage], plan, gpu.Results(file))
    assert taken == ["a", "b"]
    kept = json.loads(file.read_text())["cells"]
    assert [each["result"]["name"] for each in kept] == ["a", "b"] and all(each["seconds"] >= 0 for each in kept)
    assert {"processor", "torch", "subspace_peft"} <= kept[0]["key"]["machine"].keys()
    gpu.run([replace(stage, settings={"rounds": 3})], replace(plan, bf16=True), gpu.Results(file))
    assert taken == ["a", "b", "a", "b"]


@pytest.mark.slow
def test_recipes_compare_and_choose_on_stand_ins_for_the_hub(tmp_path, plan):
    make_stand_ins(plan)
    stages = [each for each in gpu.stages(plan) if each.hub]
    assert [each.name for each in stages] == ["glue-kept", "images-kept", "instructions-copy"]
    results = gpu.Results(tmp_path / "gpu.json")
    gpu.run(stages, plan, results)
    for kept in results.kept:
        if kept["key"]["cell"] == "compare":
            assert {"this basis", "random basis", "VeRA"} <= {row["method"] for row in kept["result"]["compare"]}
        else:
            methods = [row["method"] for row in kept["result"]["choose"]["candidates"]]
            assert kept["result"]["choose"]["chosen"] in methods and len(methods) == 3

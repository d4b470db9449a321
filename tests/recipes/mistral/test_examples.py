"""recipes/mistral.py: what the labels are on, padding, truncation, packing."""

from __future__ import annotations

from pathlib import Path

import common as shared
import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
)

from subspace_peft.errors import SubspaceError

from .conftest import WORDS, make_model, make_tokenizer, recipe, row


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
    args = recipe.Arguments(model=str(folder / "model"), new_tokens=4)
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
    args = recipe.Arguments(model=str(folder / "model"), packing=True)
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

"""The language benchmark's model: lower layers kept, upper ones trained, answers measured and generated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from benchmarks.quality.language.answers import answer_logits, loss, measure
from benchmarks.quality.language.decoding import greedy
from benchmarks.quality.language.encoded import encode
from benchmarks.quality.language.model import after_prefix, bottom_of, top_of
from benchmarks.quality.language.training import train
from benchmarks.quality.training import Budget
from subspace_peft.errors import SubspaceError

from .language_toys import SIZES, TOP, Characters, prompts, tiny_model, toy

BUDGET = Budget(examples=24, steps=6, batch=8, checks=())


def with_prefix(task, rows):
    return torch.cat([task.prefix_ids.expand(len(rows), -1), rows], 1)


def test_two_parts_with_a_shared_prefix_and_padding_give_the_whole_models_logits():
    model, task = tiny_model(), toy("one")
    lower, upper = bottom_of(model, TOP).model, top_of(model, TOP)
    data, before = task.splits["test"], task.prefix.shape[1]
    assert data.lengths.min() < data.lengths.max()
    hidden, _ = after_prefix(lower, lower.embed_tokens(task.prefix_ids), lower.embed_tokens(task.ids))
    ours, _ = after_prefix(upper.model, task.prefix, hidden)
    ours = upper.lm_head(ours)
    for row, length in enumerate(data.lengths.tolist()):
        whole = model(with_prefix(task, task.ids[row : row + 1, :length])).logits[0, before:]
        assert torch.allclose(ours[row, :length], whole, atol=1e-4, rtol=1e-4)
    # and what is kept is the same in half precision
    real = torch.arange(hidden.shape[1]) < data.lengths[:, None]
    assert torch.equal(data.hidden[real], hidden[real].half().float())


def test_training_part_of_a_model_changes_neither_the_model_nor_its_class():
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    upper = top_of(model, TOP)
    wrapped = get_peft_model(upper, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    found = train(wrapped, toy("one"), BUDGET, 1e-2, 0)
    assert type(upper) is type(model) and found["seconds"] > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not [name for name, _ in model.named_modules() if "lora" in name]


def test_an_adapter_learns_the_answers():
    task = toy("one")
    wrapped = get_peft_model(top_of(tiny_model(), TOP), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    untrained = measure(wrapped, task, "validation")["nll"]
    found = train(wrapped, task, Budget(examples=24, steps=30, batch=8, checks=()), 2e-2, 0)
    assert -found["validation"] < untrained - 0.5


def test_gradients_pass_through_the_prefix():
    task = toy("one")
    wrapped = get_peft_model(top_of(tiny_model(), TOP), LoraConfig(r=2, target_modules=["v_proj"]))
    some = task.splits["train"].take(torch.arange(4))
    loss(wrapped, task.prefix, some).backward()
    ours = [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]
    wrapped.zero_grad()
    whole = torch.cat([task.prefix.expand(4, -1, -1), some.hidden], 1)
    inner = wrapped.get_base_model()
    out = inner.model(inputs_embeds=whole, use_cache=False).last_hidden_state[:, task.prefix.shape[1] :]
    follows = some.targets != -100
    F.cross_entropy(inner.lm_head(out[follows]), some.targets[follows]).backward()
    theirs = [p.grad for p in wrapped.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) > 0
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_metrics_are_those_of_one_example_at_a_time():
    task, model = toy("one"), top_of(tiny_model(), TOP)
    data = task.splits["test"]
    total, count, exact, chosen, among = 0.0, 0, 0, 0, 0.0
    for row in range(len(data)):
        logits, targets = answer_logits(model, task.prefix, data.take(torch.tensor([row])))
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
        exact += logits.argmax(1).tolist() == targets.tolist()
        chosen += max(task.words, key=lambda word: float(logits[0, word])) == int(targets[0])
        among -= float(logits[0, list(task.words)].log_softmax(0)[task.words.index(int(targets[0]))])
    found = measure(model, task, "test", batch=4)
    assert found["nll"] == pytest.approx(total / count, abs=1e-4)
    assert (found["exact_match"], found["choice"]) == (exact / len(data), chosen / len(data))
    assert found["choice_nll"] == pytest.approx(among / len(data), abs=1e-4)
    assert "choice" not in measure(model, toy("one", ()), "test")


def test_greedy_answers_are_those_of_the_whole_model():
    model, task = tiny_model(), toy("one", ())
    # in float32, so that rounding chooses no other token
    lower = bottom_of(model, TOP)
    hidden, _ = after_prefix(
        lower.model, lower.model.embed_tokens(task.prefix_ids), lower.model.embed_tokens(task.ids)
    )
    task.splits["test"].hidden.copy_(hidden)
    made = greedy(top_of(model, TOP), lower, task, end=2, count=6, new_tokens=5)
    for row, ids in enumerate(made):
        prompt = with_prefix(task, task.ids[row : row + 1, : int(task.splits["test"].asked[row])])
        expected = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)
        whole = expected[0, prompt.shape[1] :].tolist()
        assert ids == (whole[: whole.index(2)] if 2 in whole else whole)


def test_exact_match_is_what_greedy_decoding_gives():
    task = toy("one")
    wrapped = get_peft_model(top_of(tiny_model(), TOP), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    train(wrapped, task, Budget(examples=24, steps=40, batch=8, checks=()), 2e-2, 0)
    made = greedy(wrapped, bottom_of(tiny_model(), TOP), task, end=2, count=10, new_tokens=5)
    hits = [Characters().decode(ids) == answer for ids, answer in zip(made, task.answers, strict=True)]
    exact = measure(wrapped, task, "test")["exact_match"]
    assert sum(hits) / len(hits) == exact > 0


def test_label_words_that_begin_alike_are_refused():
    with pytest.raises(SubspaceError, match="begin with one token"):
        encode(prompts("one", ("yes", "yard")), tiny_model(), Characters(), top=TOP, sizes=SIZES)


def test_splits_share_no_text():
    from benchmarks.quality.tasks import split_texts

    parts = split_texts(prompts("one").texts, SIZES, 0)
    listed = [row.text for rows in parts.values() for row in rows]
    assert len(listed) == len(set(listed)) == sum(SIZES.values())

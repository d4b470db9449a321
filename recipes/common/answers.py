"""Instruction tasks for causal language models: examples, logits where a label follows, generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from subspace_peft.errors import SubspaceError

from .data import draw
from .task import InstructionTask


def prompt_ids(tokenizer: Any, definition: str, text: str) -> list[int]:
    """Return the token ids of the question, up to where the answer begins, by the chat template if there is one."""
    asked = f"{definition}\n\nInput: {text}" if definition else text
    if tokenizer.chat_template is None:
        return list(tokenizer(f"{asked}\n\nOutput:\n")["input_ids"])
    turns = [{"role": "user", "content": asked}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])


def encode_answer(row: dict[str, Any], tokenizer: Any, tokens: int, new_tokens: int = 0) -> dict[str, list[int]]:
    """Return one example of at most `tokens` ids, with labels, which are −100 on the prompt.

    With `new_tokens` it is the prompt alone, which leaves room for so many.

    Raises:
        SubspaceError: even without its input the prompt leaves no room for the answer.
    """
    definition, text = row["definition"], row["input"]
    answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    answer = [] if new_tokens else answer
    room = tokens - (new_tokens or len(answer))
    ids, words = prompt_ids(tokenizer, definition, text), tokenizer(text, add_special_tokens=False)["input_ids"]
    while len(ids) > room:
        if not words:
            raise SubspaceError(f"no room for an answer: give at least --tokens {len(ids) + tokens - room}.")
        # decoded and encoded again, a text may have another length than before
        words = words[: max(0, len(words) - (len(ids) - room))]
        ids = prompt_ids(tokenizer, definition, tokenizer.decode(words))
    return {"input_ids": ids + answer, "attention_mask": [1] * len(ids + answer), "labels": [-100] * len(ids) + answer}


def one_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as definition, input and output.

    Lots-of-LoRAs has the definition in the input, and a list of answers, whose first counts.
    """
    answers = row["output"] if isinstance(row["output"], list) else [row["output"]]
    return {"definition": row.get("definition") or "", "input": row["input"] or "", "output": (answers or [None])[0]}


def instruction_task(
    name: str,
    raw: Mapping[str, Any],
    columns: Sequence[str],
    tokenizer: Any,
    *,
    tokens: int,
    new_tokens: int,
    most: Mapping[str, int],
    least: Mapping[str, int],
) -> InstructionTask:
    """Check and tokenise a task: train and validation by `encode_answer`, prompts alone for the test.

    Args:
        name: the task's.
        raw: split → `datasets.Dataset`, or None.
        columns: those needed.
        tokenizer, tokens, new_tokens: as in `encode_answer`.
        most: split → at most so many rows, 0 for all. These splits are needed.
        least: split → at least so many rows; one by default.

    Raises:
        SubspaceError: a split or a column is missing, an output is empty or no text, a prompt leaves no room, too few
            rows.
    """
    task = InstructionTask(name=name)
    for split, count in most.items():
        where, rows, needed = f"{name}, {split}", raw.get(split), least.get(split) or 1
        if rows is None or len(rows) < needed:
            raise SubspaceError(f"{where}: {len(rows or ())} examples, but {needed} are needed. Ask for fewer.")
        has = rows.column_names
        if lacking := [column for column in columns if column not in has]:
            raise SubspaceError(f"{where}: there is no column {', '.join(lacking)}; there are {', '.join(has)}.")
        rows = draw(rows, count, seed=0).map(one_answer)
        if empty := sum(not isinstance(text, str) or not text.strip() for text in rows["output"]):
            raise SubspaceError(f"{where}: {empty} of {len(rows)} outputs are empty or no text. Leave them out.")
        room = {"tokenizer": tokenizer, "tokens": tokens, "new_tokens": new_tokens if split == "test" else 0}
        drop = [column for column in rows.column_names if split != "test" or column not in ("input", "output")]
        try:
            task.splits[split] = rows.map(encode_answer, fn_kwargs=room, remove_columns=drop)
        except SubspaceError as error:
            raise SubspaceError(f"{where}: {error}") from None
    return task


@dataclass
class AnswersOnly:
    """Collator that has the model compute its logits only where a label of any row follows.

    Logits are as wide as the vocabulary: most of a prompt's would be computed for nothing. `inner` collates.
    """

    inner: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = dict(self.inner(rows))
        following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        # A mask per row would keep fewer, but transformers takes one only from 5.21 on, which Python 3.10 cannot have.
        keep = (following != -100).any(0).nonzero()[:, 0]
        return {**batch, "logits_to_keep": keep, "shift_labels": following[:, keep]}


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], *, new_tokens: int, batch: int
) -> list[str]:
    """Generate greedy answers of at most `new_tokens` tokens, shared among the processes; pads on the left."""
    answers: list[str] = []
    model.eval()
    with PartialState().split_between_processes(list(prompts)) as own:
        for start in range(0, len(own), batch):
            rows = tokenizer.pad({"input_ids": own[start : start + batch]}, padding_side="left", return_tensors="pt")
            rows = rows.to(model.device)
            made = model.generate(
                **rows,
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            answers += tokenizer.batch_decode(made[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in gather_object(answers)]


def exact_and_rouge(answers: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Return ``exact_match`` and ``rougeL`` of generated answers."""
    from .metrics import load_metric

    both = {"predictions": list(answers), "references": [text.strip() for text in wanted]}
    numbers = {"exact_match": load_metric("exact_match"), "rougeL": load_metric("rouge")}
    return {name: float(metric.compute(**both)[name]) for name, metric in numbers.items()}

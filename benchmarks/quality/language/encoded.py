"""A task as token ids and the frozen lower layers' outputs for them, computed once and kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import digest
from safetensors.torch import load_file, save_file

from subspace_peft._io.atomic import write_aside
from subspace_peft.errors import SubspaceError

from ..tasks import split_texts
from .model import after_prefix, bottom_of, whole_model
from .prompts import PromptTask, facts, prompt_tasks
from .setting import ANSWER, SIZES, TEXT, TOP

OPENING, CLOSING = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, eq=False)
class Sequences:
    """Examples behind a task's prefix, padded on the right: input, answer, end.

    Attributes:
        hidden: (n, length, d) float32, the lower layers' outputs; the answer's last token has none.
        lengths: (n,) int64, positions of each that are real.
        asked: (n,) int64, how many of them are the prompt's; the answer's first token follows the last of these.
        targets: (n, length) int64: the token that follows each position in the answer, −100 on the prompt and behind.
    """

    hidden: torch.Tensor
    lengths: torch.Tensor
    asked: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, which: torch.Tensor) -> Sequences:
        """Return the examples at the places `which`, padded no further than the longest of them."""
        lengths = self.lengths[which]
        longest = int(lengths.max())
        return Sequences(self.hidden[which, :longest], lengths, self.asked[which], self.targets[which, :longest])


@dataclass(frozen=True, eq=False)
class EncodedTask:
    """A task: the prefix that all its prompts share, and its splits.

    Attributes:
        name: of the task.
        prefix: (1, p, d) float32, the lower layers' outputs for the instruction.
        prefix_ids: (1, p) int64.
        splits: by name.
        words: first token ids of its label words; empty where answers are phrases.
        answers: the test split's answers as texts.
        ids: (n, length) int64, the test split's tokens, 0 behind.
        digest: sha256 of all that the task was made from.
    """

    name: str
    prefix: torch.Tensor
    prefix_ids: torch.Tensor
    splits: dict[str, Sequences]
    words: tuple[int, ...]
    answers: list[str]
    ids: torch.Tensor
    digest: str


def load(name: str, folder: Path) -> EncodedTask:
    """Return a task, from `folder` or computed and kept there; hidden states behind the prefix in half precision."""
    decided = digest({**facts(name), "top": TOP, "lengths": [TEXT, ANSWER], "sizes": SIZES})
    file = folder / "hidden" / f"{name}-{decided[:12]}.safetensors"
    if not file.is_file():
        tensors, found = encode(prompt_tasks()[name], *whole_model(folder))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(file.with_suffix(".json"), lambda path: path.write_text(json.dumps(found), encoding="utf-8"))
        write_aside(file, lambda path: save_file(tensors, path))
    return restored(name, load_file(file), json.loads(file.with_suffix(".json").read_text(encoding="utf-8")))


def restored(name: str, tensors: dict[str, torch.Tensor], found: dict[str, Any]) -> EncodedTask:
    """Return the task of what `encode` made."""
    splits = {}
    for split in SIZES:
        parts = {key: tensors[f"{split}.{key}"] for key in ("hidden", "lengths", "asked", "targets")}
        splits[split] = Sequences(**{**parts, "hidden": parts["hidden"].float()})
    return EncodedTask(
        name,
        tensors["prefix"],
        tensors["prefix_ids"],
        splits,
        tuple(found["words"]),
        found["answers"],
        tensors["test.ids"],
        found["digest"],
    )


def encode(
    task: PromptTask, model: Any, tokenizer: Any, *, top: int = TOP, sizes: dict[str, int] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a task's tensors and facts.

    Prompts are in the model's chat format, without a system's turn.

    Raises:
        SubspaceError: too few texts, or two label words begin with the same token.
    """

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    words = [tokens(word)[0] for word in task.words]
    if len(set(words)) < len(words):
        raise SubspaceError(
            f"Task {task.texts.name!r}: two of the words {', '.join(task.words)} begin with one token: choose others."
        )
    prefix_ids = torch.tensor([tokens(f"{OPENING}{task.instruction}\n\n")])
    closing = tokens(CLOSING)
    bottom = bottom_of(model, top).model
    with torch.no_grad():
        prefix = bottom(inputs_embeds=bottom.embed_tokens(prefix_ids), use_cache=False).last_hidden_state
    content = hashlib.sha256(json.dumps([task.instruction, top, TEXT, ANSWER]).encode())
    tensors = {"prefix": prefix, "prefix_ids": prefix_ids}
    answers: list[str] = []
    for name, rows in split_texts(task.texts, sizes or SIZES, 0).items():
        content.update(json.dumps([name, [[row.text, row.label] for row in rows]], ensure_ascii=False).encode())
        prompts = [[*tokens(row.text)[:TEXT], *closing] for row in rows]
        # an answer that is cut has no end
        replies = [[*tokens(row.label), tokenizer.eos_token_id][:ANSWER] for row in rows]
        made = _padded(prompts, replies)
        made["hidden"] = _through(bottom, prefix_ids, made["ids"], made["lengths"])
        tensors |= {f"{name}.{key}": value for key, value in made.items() if key != "ids" or name == "test"}
        if name == "test":
            answers = [tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in replies]
    return tensors, {"words": words, "answers": answers, "digest": content.hexdigest()}


def _padded(prompts: list[list[int]], replies: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(len(a) + len(b) - 1 for a, b in zip(prompts, replies, strict=True))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    targets = torch.full((len(prompts), longest), -100)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        ids[row, : len(prompt) + len(reply) - 1] = torch.tensor([*prompt, *reply[:-1]])
        targets[row, len(prompt) - 1 : len(prompt) + len(reply) - 1] = torch.tensor(reply)
    return {
        "ids": ids,
        "targets": targets,
        "asked": torch.tensor([len(prompt) for prompt in prompts]),
        "lengths": torch.tensor([len(a) + len(b) - 1 for a, b in zip(prompts, replies, strict=True)]),
    }


@torch.no_grad()
def _through(
    bottom: Any, prefix_ids: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor, batch: int = 32
) -> torch.Tensor:
    found = torch.zeros(*ids.shape, bottom.config.hidden_size, dtype=torch.float16)
    # of like lengths, for little padding
    for which in lengths.argsort(stable=True).split(batch):
        rows = ids[which, : int(lengths[which].max())]
        out, _ = after_prefix(bottom, bottom.embed_tokens(prefix_ids), bottom.embed_tokens(rows))
        found[which, : rows.shape[1]] = out.half()
    if not torch.isfinite(found).all():
        raise SubspaceError("Outputs of the lower layers are too large for half precision: keep them in float32.")
    return found

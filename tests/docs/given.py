"""What a page leaves to its reader: for a block behind `<!-- given: unet, other_unet -->` small ones are made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

Names = dict[str, Any]


def trl(folder: Path) -> Names:
    """A causal language model that `my-basis` is of, its tokenizer beside it, and a data set of texts."""
    from datasets import Dataset

    from ..test_trl import WORDS, base, tokenizer

    _basis(base(), folder, ["q_proj", "v_proj"])
    model = base()
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    model.name_or_path = model.config._name_or_path = "model"
    return {"model": model, "data": Dataset.from_list([{"text": " ".join(WORDS[4:10])}] * 8)}


def serve_in_threads(folder: Path) -> Names:
    """A language model with a bank of two tasks, and a request for it."""
    from subspace_peft import SubspaceConfig, TaskBank

    from ..models import randomise
    from ..test_gguf import llama

    model = get_peft_model(llama(), SubspaceConfig(basis="random", k=3, task_type="CAUSAL_LM"), "spam").eval()
    bank = TaskBank(randomise(model, std=0.05))
    bank.add("spam")
    bank.add("billing", {module: 2 * core for module, core in bank["spam"].items()})
    request = {"input_ids": torch.arange(1, 9)[None], "max_new_tokens": 4, "do_sample": False}
    return {"bank": bank, "model": model, "request": request}


def serve_with_vllm(folder: Path) -> Names:
    """The file of a bank with the task spam."""
    from transformers import AutoModelForSequenceClassification

    from subspace_peft import TaskBank

    model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    bank = TaskBank(PeftModel.from_pretrained(model, folder / "my-task"))
    bank.add("spam", folder / "tasks/spam")
    bank.save(folder / "bank.safetensors")
    return {}


def serve_with_llama_cpp(folder: Path) -> Names:
    """A Llama as a GGUF file, and a task of it."""
    from subspace_peft import SubspaceConfig

    from ..models import randomise
    from ..test_gguf import llama, write_gguf

    write_gguf(folder / "base-model.gguf", llama())
    config = SubspaceConfig(basis=str(_basis(llama(), folder, ["q_proj", "down_proj"])), task_type="CAUSAL_LM")
    randomise(get_peft_model(llama(), config), std=0.05).save_pretrained(folder / "tasks/spam")
    return {}


def diffusers(folder: Path) -> Names:
    """UNets, one of them with the adapter `sketch`, a pipeline with its text encoder, and two files of styles."""
    from subspace_peft import SubspaceConfig

    from ..pipeline_files import FILES, SD, pipeline, text_encoder, unet, write

    basis = _basis(unet(), folder, ["to_q", "to_v"])
    other = unet()
    other.add_adapter(SubspaceConfig(basis=str(basis)), "sketch")
    for number in (1, 2):
        write(FILES["diffusers"](SD, number), folder / f"style{number}.safetensors")
    models = {"unet": unet(), "other_unet": other, "plain_unet": unet(), "new_unet": unet()}
    return {**models, "text_encoder": text_encoder(), "pipe": pipeline(folder, SD)}


MAKERS: dict[str, Callable[[Path], Names]] = {
    each.__name__.replace("_", "-"): each
    for each in (trl, serve_in_threads, serve_with_vllm, serve_with_llama_cpp, diffusers)
}


def _basis(model: torch.nn.Module, folder: Path, modules: list[str]) -> Path:
    """Make `my-basis` one of this model, in place of the stand-in."""
    import shutil

    from subspace_peft import build_basis

    shutil.rmtree(folder / "my-basis", ignore_errors=True)
    built = build_basis(builder="base-weights", base_model=model, target_modules=modules, k=4, progress=False)
    return built.save_pretrained(folder / "my-basis")

"""Instruction tuning with Mistral: LoRA adapters → their shared basis → a held-out task of kilobytes → its controls.

    python recipes/mistral.py --preset offline             # texts and a small Mistral out of packages, no Hub; 2 cores
    python recipes/mistral.py --preset smoke               # the same path on so few examples that scores mean nothing
    python recipes/mistral.py --bf16 --load-in-4bit --gradient-checkpointing --sources ID … --task Lots-of-LoRAs/task…
    accelerate launch --num_processes 4 recipes/mistral.py --bf16 --gradient-checkpointing …    # several GPUs
    python recipes/mistral.py --stage train --task Lots-of-LoRAs/task… --basis org/their-basis --coefficients factor
    python recipes/mistral.py settings.yaml --dry-run      # what it would fetch, train and write; fetches nothing
    subspace-peft run your_own_script.py …                 # any script that loads such a task, unchanged

Stages (`--stage`), each using what earlier ones left in `--out`; all but `choose` by default; interrupted runs resume:

    sources    a stock LoRA adapter per source task of `--data-dir`; adapters that exist (with a slash) are checked
    basis      `build_basis` of them, and a random basis of equal size as the control
    train      coefficients in the basis on `--task`, saved as a PEFT adapter; resumes from the last checkpoint
    evaluate   the saved task, loaded by PeftModel.from_pretrained, generates for the test set; prints three answers
    compare    base model, mean only, LoRA, VeRA, random basis, this basis under one budget: for each the learning rate
               with the best validation loss, then the report seeds → results.json, table.md, curves.png
    choose     this basis, it with 1, 2 or 4 directions of the task's own, or LoRA: the smallest that no other beats by
               more than noise on the validation split; saved and tested → choice.md

The adapter of `--task` is never in its basis: a source that is, or by its name may be, of that task is refused. Tasks
are as in Natural Instructions. On the Hub: columns input and output (a text or a list, whose first counts), and
definition unless input holds it. Own data: `--data-dir` takes a folder with data/<task>/{train,validation,test}.jsonl
(columns definition, input, output) and data/<task>/task.json (name, about, held_out, metric: exact_match or rougeL).
The prompt, by the tokenizer's chat template if it has one, is not trained on, the answer and its end are. What is
longer than `--tokens` loses the end of its input, never of its answer. `--packing` puts a batch into one row without
padding; examples do not see each other.

TRL takes the same configuration (docs/how-to/trl.md): SFTTrainer(model, train_dataset=prompts_and_completions,
peft_config=SubspaceConfig(basis="mistral-output/basis", task_type="CAUSAL_LM"),
args=SFTConfig(completion_only_loss=True)).

Cost and result:
    --preset offline, task editorials (positive or negative): 37 minutes of CPU time in one thread (so as long on a
    free core; 56 minutes beside six other jobs on two cores), 1.7 GB of memory. Exact match on 100 answers, mean ±
    standard deviation over three seeds, 96 training examples:

        base model 0.000            LoRA r=8 0.597 ± 0.031    random basis 0.573 ± 0.025   (3,072 trained parameters)
        mean only  0.660 ± 0.070    VeRA     0.597 ± 0.031    this basis   0.580 ± 0.030   (3,072; LoRA has 92,160)

    The untrained model never answers by one word. With so few examples the trained ones learn the two words and little
    more (a coin gives 0.5); the fleet's mean update, which comes from tasks with the same two words, is the best row.
    Mistral-7B itself was not run by us yet. --dry-run prints its downloads, steps and sizes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import common as shared
import datasets
import torch
import transformers
from accelerate import PartialState
from common import InstructionTask, argument
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from subspace_peft.errors import SubspaceError

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
# ids of the collection that public code names; it has about a thousand: name yours by --sources
FLEET = [
    f"Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16-task{number}"
    for number in (1391, 581, 909, 132, 1344, 1605, 280, 627)
]


@dataclass
class Arguments(shared.CommonArguments):
    out: str = argument("mistral-output", "folder of everything that is made")
    task: str = argument("", "the held-out task: a data set's Hub id, Lots-of-LoRAs/task…, or a name in --data-dir")
    model: str = argument(MISTRAL, "causal language model: Hub id or folder")
    load_in_4bit: bool = argument(False, "base model in 4-bit nf4, as in QLoRA; needs bitsandbytes")
    bf16: bool = argument(False, "base model and arithmetic in bfloat16")
    gradient_checkpointing: bool = argument(False, "less memory for more time")
    packing: bool = argument(False, "a batch in one row, without padding; examples do not see each other")
    target_modules: list[str] = argument(("q_proj", "v_proj"), "adapted modules")  # noqa: RUF009
    data_dir: str | None = argument(None, "local data instead of the Hub's")
    metric: Literal["exact_match", "rougeL"] = argument("rougeL", "test score of Hub data; local says its own")
    tokens: int = argument(1024, "prompt and answer together at most")
    new_tokens: int = argument(64, "longest generated answer")
    basis_k: int = argument(16, "directions per side of the basis that is built")
    source_r: int = argument(16, "rank of the source adapters")
    source_examples: int = argument(1000, "at most so many training examples per source; 0: all")
    source_epochs: float = argument(2, "passes over them")
    source_rate: float = argument(2e-4, "learning rate of the source adapters")
    validation_examples: int = argument(100, "validation examples")
    test_examples: int = argument(200, "test examples; 0: all")
    epochs: float = argument(2, "passes over the training examples")
    batch: int = argument(8, "examples per step and process")


SMALL = {
    "model": "offline",
    "data_dir": "offline",
    "layers": list(range(24, 30)),
    "tokens": 96,
    "new_tokens": 8,
    "batch": 4,
    "train_examples": 96,
    "validation_examples": 48,
    "test_examples": 100,
    "epochs": 2,
    "warmup": 0.0,
    "source_examples": 96,
    "source_epochs": 2,
    "source_rate": 2e-3,
    "source_r": 8,
    "sweep": 2,
}
FEW = {"train_examples": 16, "source_examples": 16, "validation_examples": 8, "test_examples": 8, "layers": [0, 1]}
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "offline": SMALL,
    "smoke": {**SMALL, **FEW, "epochs": 1, "source_epochs": 1, "basis_k": 8, "sweep": 1, "seeds": [1]},
}
# the arguments that decide how good any adapter gets; each stage adds its own
DECISIVE = (
    "model",
    "load_in_4bit",
    "bf16",
    "packing",
    "target_modules",
    "layers",
    "tokens",
    "batch",
    "scheduler",
    "warmup",
    "weight_decay",
)


@functools.cache
def tokenizer_of(model: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="right")
    if tokenizer.eos_token_id is None:
        raise SubspaceError(f"The tokenizer of {model} has no eos_token: no answer could end. Give it one.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_task(args: Arguments, name: str) -> InstructionTask:
    """Read, check and tokenise a task: train, validation, and test, whose rows are prompts beside input and output.

    Raises SubspaceError: no such data; missing splits or columns, empty outputs, prompts without room, too few
        examples.
    """
    if args.data_dir:
        raw, columns = shared.local_splits(args.data_dir, name), ("definition", "input", "output")
    else:
        try:
            raw, columns = dict(datasets.load_dataset(name)), ("input", "output")
        except (OSError, ValueError) as error:
            raise SubspaceError(f"The data set {name!r} cannot be loaded: {error}") from None
        raw["validation"] = raw.get("validation", raw.get("valid"))  # Lots-of-LoRAs has the latter
    least = {"train": args.train_examples, "validation": args.validation_examples} if name == args.task else {}
    most = {"train": 0, "validation": args.validation_examples, "test": args.test_examples}
    room = {"tokens": args.tokens, "new_tokens": args.new_tokens}
    task = shared.instruction_task(name, raw, columns, tokenizer_of(args.model), most=most, least=least, **room)
    task.score_name = args.metric
    return task


def make_model(args: Arguments, task: InstructionTask, seed: int) -> Any:
    """Load the base model, frozen, in float32, bfloat16 or 4-bit; an adapter's start is drawn by `seed`."""
    transformers.set_seed(seed)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    given: dict[str, Any] = {"quantization_config": nf4} if args.load_in_4bit else {}
    given |= {"dtype": dtype, "device_map": {"": PartialState().device}}
    model = AutoModelForCausalLM.from_pretrained(args.model, **given)
    model.config.use_cache = False  # where there is a cache, transformers does not look where packed examples begin
    if args.packing and not model._supports_attention_backend:
        raise SubspaceError(f"--packing: {type(model).__name__} would not keep packed examples apart. Leave it out.")
    if not args.load_in_4bit:
        return model.requires_grad_(False)
    # on a CPU no gradient would pass any more after the first evaluation, whatever the method
    shared.keep_unpacked(model)
    return prepare_model_for_kbit_training(model, False)  # of its second argument the Trainer takes care


def make_trainer(
    args: Arguments,
    model: Any,
    task: InstructionTask,
    *,
    examples: int = 1,
    rate: float = 0.0,
    epochs: float = 0.0,
    seed: int = 0,
    folder: Path | None = None,
) -> Trainer:
    """Make the stock Trainer, with a bar and checkpoints where a folder is given."""
    recompute = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(folder or args.out),
        save_strategy="steps" if folder else "no",
        save_steps=0.25,
        save_total_limit=2,
        num_train_epochs=epochs,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=2 * args.batch,
        learning_rate=rate,
        weight_decay=args.weight_decay,
        lr_scheduler_type=args.scheduler,
        warmup_steps=args.warmup,
        seed=seed,
        eval_strategy="epoch",
        prediction_loss_only=True,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=folder is None,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        **(recompute if args.gradient_checkpointing else {}),
    )
    pad = transformers.DataCollatorForSeq2Seq(tokenizer_of(args.model))
    inner = transformers.DataCollatorWithFlattening() if args.packing else pad
    if not isinstance(model, PeftModel):
        # the Trainer would refuse a 4-bit base without an adapter, which it shall only evaluate
        model.is_quantized = False
    trainer = Trainer(
        model,
        arguments,
        data_collator=shared.AnswersOnly(inner),
        eval_dataset=task.splits["validation"],
        train_dataset=shared.draw(task.splits["train"], examples, seed),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def test(args: Arguments, model: Any, task: InstructionTask) -> dict[str, Any]:
    """Measure exact match and ROUGE-L of the generated answers, and show three of these."""
    rows, how = task.splits["test"], {"new_tokens": args.new_tokens, "batch": 4 * args.batch}
    answers = shared.generate_answers(model, tokenizer_of(args.model), rows["input_ids"][:], **how)
    metrics = shared.exact_and_rouge(answers, rows["output"])
    shown = [
        f"  input  {row['input'][-200:]!r}\n  wanted {row['output']!r}\n  answer {answer!r}"
        for row, answer in zip(rows.select(range(min(3, len(rows)))), answers, strict=False)
    ]
    return {"test": metrics[args.metric], "metrics": metrics, "answers": "\n".join(shown)}


# what the stages do with these: skip what is finished, resume, save, sweep, tabulate
RECIPE = shared.Recipe(
    load_task=load_task,
    make_model=make_model,
    make_trainer=make_trainer,
    test=test,
    decisive=DECISIVE,
    head=None,
    task_type="CAUSAL_LM",
)


def main(arguments: list[str] | None = None) -> None:
    args = shared.parse_arguments(Arguments, PRESETS, arguments, description=__doc__)
    floors = {"batch": 1, "new_tokens": 1, "tokens": args.new_tokens + 1, "validation_examples": 1, "basis_k": 1}
    if low := [f"--{name} at least {least}" for name, least in floors.items() if getattr(args, name) < least]:
        raise SubspaceError(f"Give {', '.join(low)}.")
    if args.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise SubspaceError("--load-in-4bit needs bitsandbytes: pip install bitsandbytes. Or leave it out.")
    if not shared.take_offline("instructions", args):
        return
    known = shared.local_tasks(args.data_dir) if args.data_dir else {}
    args.task = args.task or next((name for name, facts in known.items() if facts.get("held_out")), "")
    if not args.task:
        raise SubspaceError("Name the held-out task by --task: the Hub id of a data set, such as Lots-of-LoRAs/task…")
    args.metric = known.get(args.task, {}).get("metric", args.metric)
    if args.metric not in ("exact_match", "rougeL"):
        raise SubspaceError(f"{args.task}: there is no metric {args.metric!r}; choose exact_match or rougeL.")
    if args.model == MISTRAL and not (args.sources or args.data_dir or args.basis):
        args.sources = FLEET
    args.sources = shared.choose_sources(args, known)
    if args.dry_run:
        shared.dry_run(
            args,
            known,
            data=[] if args.data_dir else [args.task],
            head=None,
            empty=AutoModelForCausalLM.from_config,
            # MistralConfig's own defaults are the 7B model's
            default=transformers.MistralConfig(dtype="bfloat16") if args.model == MISTRAL else None,
        )
        return
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise SubspaceError("Several GPUs: start by `accelerate launch`, or choose one with CUDA_VISIBLE_DEVICES=0.")
    RECIPE.run(args, known)


if __name__ == "__main__":
    try:
        main()
    except SubspaceError as error:
        sys.exit(f"error: {error}")

